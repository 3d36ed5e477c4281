//! Events over ZMQ as vLLM's publisher sends them: numbered messages of three frames, the last ones
//! kept and given once more to who asks.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use zeromq::{PubSocket, RouterSocket, Socket as _, SocketRecv as _, SocketSend as _, ZmqMessage};

use super::dialect::{self, Dialect};
use super::value::Value;
use super::{OwnError, Zmq};
use crate::change::Change;
use crate::flexkv;

/// Batches that wait to be sent.
const QUEUE: usize = 4096;
/// Blocks of one message.
const MESSAGE_BLOCKS: usize = 4096;

/// What a publisher does wrong.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Numbers of messages that are not sent, though kept for replays.
    pub drop: BTreeSet<u64>,
    /// Hashes are written as 32 bytes.
    pub bytes_hashes: bool,
    /// Batches have no rank.
    pub short_batches: bool,
}

/// The sending half.
#[derive(Debug)]
pub(crate) struct Publisher {
    queue: mpsc::Sender<Item>,
    address: String,
    replay: Option<String>,
    block_size: usize,
    dialect: Dialect,
    faults: Faults,
    totals: Arc<Totals>,
}

#[derive(Debug, Default)]
struct Totals {
    sent: AtomicU64,
    lost: AtomicU64,
    /// Numbers spent on messages that found the queue full.
    skipped: AtomicU64,
}

#[derive(Debug)]
enum Item {
    Batch(Bytes, u64),
    Restart,
}

impl Publisher {
    pub(super) async fn start(
        settings: &Zmq,
        block_size: usize,
        stop: CancellationToken,
    ) -> Result<(Self, JoinHandle<()>), OwnError> {
        let listen = |address: &str, source| OwnError::Listen {
            address: address.to_owned(),
            source,
        };
        let mut publish = PubSocket::new();
        let bound = publish.bind(&settings.listen).await;
        let address = bound.map_err(|e| listen(&settings.listen, e))?.to_string();
        let mut replays = None;
        let mut replay = None;
        if let Some(endpoint) = &settings.replay {
            let mut socket = RouterSocket::new();
            let bound = socket.bind(endpoint).await;
            replay = Some(bound.map_err(|e| listen(endpoint, e))?.to_string());
            replays = Some(socket);
        }
        let (queue, items) = mpsc::channel(QUEUE);
        let totals = Arc::new(Totals::default());
        let sender = Sender {
            publish,
            replays,
            topic: Bytes::from(settings.topic.clone()),
            next: 0,
            kept: VecDeque::new(),
            buffer: settings.buffer,
            drop: settings.faults.drop.clone(),
            totals: Arc::clone(&totals),
        };
        let task = tokio::spawn(sender.run(items, stop));
        let publisher = Self {
            queue,
            address,
            replay,
            block_size,
            dialect: settings.dialect,
            faults: settings.faults.clone(),
            totals,
        };
        Ok((publisher, task))
    }

    pub(super) fn publish(&self, changes: &[Change], outside: &[flexkv::Change]) {
        let mut rest = changes;
        while !rest.is_empty() {
            let mut blocks = 0;
            let fits = |change: &&Change| {
                blocks += change.blocks();
                blocks <= MESSAGE_BLOCKS
            };
            let count = rest.iter().take_while(fits).count().max(1);
            let (some, others) = rest.split_at(count);
            let events =
                |change| dialect::events(self.dialect, change, self.block_size, &self.faults);
            self.send(some.iter().flat_map(events).collect(), some.len());
            rest = others;
        }
        // Each may be of a whole prompt.
        for change in outside {
            self.send(vec![dialect::outside(change, self.block_size)], 1);
        }
    }

    fn send(&self, events: Vec<Value>, changes: usize) {
        let payload = dialect::batch(events, &self.faults);
        self.enqueue(Item::Batch(payload.into(), changes as u64));
    }

    pub(super) fn restart(&self) {
        self.enqueue(Item::Restart);
    }

    fn enqueue(&self, item: Item) {
        let count = match &item {
            Item::Batch(_, count) => *count,
            Item::Restart => 0,
        };
        if self.queue.try_send(item).is_err() {
            // The number is spent, so that the loss shows as a gap.
            self.totals.skipped.fetch_add(1, Ordering::Relaxed);
            self.totals.lost.fetch_add(count, Ordering::Relaxed);
        }
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }

    pub(super) fn replay(&self) -> Option<&str> {
        self.replay.as_deref()
    }

    pub(super) fn totals(&self) -> (u64, u64) {
        let total = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (total(&self.totals.sent), total(&self.totals.lost))
    }
}

struct Sender {
    publish: PubSocket,
    replays: Option<RouterSocket>,
    topic: Bytes,
    next: u64,
    kept: VecDeque<(u64, Bytes)>,
    buffer: usize,
    drop: BTreeSet<u64>,
    totals: Arc<Totals>,
}

impl Sender {
    async fn run(mut self, mut items: mpsc::Receiver<Item>, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                item = items.recv() => match item {
                    Some(Item::Batch(payload, count)) => self.send(payload, count).await,
                    Some(Item::Restart) => {
                        self.next = 0;
                        self.kept.clear();
                        self.drop.clear();
                    }
                    None => return,
                },
                request = request(&mut self.replays) => match request {
                    Some((peer, start)) => self.replay(&peer, start).await,
                    None => {
                        eprintln!("a replay was asked for in a way that nobody understands");
                    }
                },
            }
        }
    }

    async fn send(&mut self, payload: Bytes, count: u64) {
        self.next += self.totals.skipped.swap(0, Ordering::Relaxed);
        let sequence = self.next;
        self.next += 1;
        if !self.drop.contains(&sequence) {
            let frames = [
                self.topic.clone(),
                Bytes::copy_from_slice(&sequence.to_be_bytes()),
                payload.clone(),
            ];
            let sent = match message(frames) {
                Some(message) => self.publish.send(message).await.is_ok(),
                None => false,
            };
            let total = if sent {
                &self.totals.sent
            } else {
                &self.totals.lost
            };
            total.fetch_add(count, Ordering::Relaxed);
        }
        if self.kept.len() >= self.buffer {
            self.kept.pop_front();
        }
        if self.buffer > 0 {
            self.kept.push_back((sequence, payload));
        }
    }

    /// All kept messages from a number on, then one without payload.
    async fn replay(&mut self, peer: &Bytes, start: u64) {
        let Some(socket) = &mut self.replays else {
            return;
        };
        let wanted = self.kept.iter().filter(|(sequence, _)| *sequence >= start);
        let end = (u64::MAX, Bytes::new());
        for (sequence, payload) in wanted.chain([&end]) {
            let frames = [
                peer.clone(),
                Bytes::new(),
                Bytes::copy_from_slice(&sequence.to_be_bytes()),
                payload.clone(),
            ];
            let Some(message) = message(frames) else {
                return;
            };
            if socket.send(message).await.is_err() {
                // Whoever asked has gone.
                return;
            }
        }
    }
}

fn message(frames: impl IntoIterator<Item = Bytes>) -> Option<ZmqMessage> {
    let frames: Vec<Bytes> = frames.into_iter().collect();
    ZmqMessage::try_from(frames).ok()
}

/// The next request for a replay: who asks, and from which number; never without a socket.
async fn request(socket: &mut Option<RouterSocket>) -> Option<(Bytes, u64)> {
    let Some(socket) = socket else {
        return std::future::pending().await;
    };
    let frames = socket.recv().await.ok()?.into_vec();
    let [peer, .., start] = frames.as_slice() else {
        return None;
    };
    let start = <[u8; 8]>::try_from(start.as_ref()).ok()?;
    Some((peer.clone(), u64::from_be_bytes(start)))
}
