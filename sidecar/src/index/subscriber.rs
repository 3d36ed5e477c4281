//! One Envoy that pages go to.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use kv_core::head::Head;
use kv_core::index::Index;
use kv_core::wire::{Subscribe, WINDOW};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::pending::{Key, Pending};
use crate::metrics::Metrics;

/// Something to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Item {
    Page(u32),
    Table,
    /// A shard of sessions.
    Sessions(u16),
}

/// A batch without its acknowledgement.
#[derive(Debug)]
pub(super) struct Sent {
    pub(super) seq: u64,
    /// Version of the table in it.
    pub(super) table: Option<u64>,
    /// When events that it makes visible were received, Unix nanoseconds.
    pub(super) received_ns: Vec<u64>,
    /// Whether it ends the full sync.
    pub(super) ends_sync: bool,
}

/// An Envoy that is being fed.
#[derive(Debug)]
pub(super) struct Subscriber {
    pub(super) id: u64,
    pub(super) who: Subscribe,
    /// Version of its messages.
    pub(super) version: u8,
    pub(super) out: mpsc::Sender<Bytes>,
    pub(super) seq: u64,
    pub(super) unacked: VecDeque<Sent>,
    pub(super) queue: VecDeque<Item>,
    pub(super) queued: HashSet<u32>,
    pub(super) queued_sessions: HashSet<u16>,
    /// Since when it is being brought up to date for the first time.
    pub(super) syncing: Option<Instant>,
    /// Its head as last sent; `None` before the first.
    pub(super) head: Option<Head>,
    pub(super) head_due: bool,
    /// Loads that it has not been sent.
    pub(super) loads: Option<Arc<[u8]>>,
    pub(super) received_ns: Vec<u64>,
    pub(super) table_sent: u64,
    pub(super) table_acked: u64,
    pub(super) alive: bool,
}

impl Subscriber {
    pub(super) fn new(id: u64, who: Subscribe, version: u8, out: mpsc::Sender<Bytes>) -> Self {
        Self {
            id,
            who,
            version,
            out,
            seq: 0,
            unacked: VecDeque::new(),
            queue: VecDeque::new(),
            queued: HashSet::new(),
            queued_sessions: HashSet::new(),
            syncing: Some(Instant::now()),
            head: None,
            head_due: true,
            loads: None,
            received_ns: Vec::new(),
            table_sent: 0,
            table_acked: 0,
            alive: true,
        }
    }

    pub(super) fn is_open(&self) -> bool {
        self.alive && self.unacked.len() < WINDOW
    }

    pub(super) fn has_work(&self) -> bool {
        self.head_due || !self.queue.is_empty()
    }

    pub(super) fn enqueue(&mut self, page: u32) {
        if self.queued.insert(page) {
            self.queue.push_back(Item::Page(page));
        }
    }

    pub(super) fn enqueue_sessions(&mut self, shard: u16) {
        if self.queued_sessions.insert(shard) {
            self.queue.push_back(Item::Sessions(shard));
        }
    }

    /// Moves what is queued into a batch, as far as it fits.
    pub(super) fn fill(
        &mut self,
        batch: &mut Pending,
        table: &Arc<[u8]>,
        version: u64,
        sessions: &[Arc<[u8]>],
        index: &mut Index,
    ) {
        while let Some(item) = self.queue.front().copied() {
            match item {
                Item::Page(id) => {
                    let bytes = index.page(id);
                    if !batch.fits(bytes.len()) {
                        return;
                    }
                    batch.push(Key::page(id), bytes);
                    self.queued.remove(&id);
                }
                Item::Sessions(shard) => {
                    let bytes = sessions.get(usize::from(shard));
                    let bytes = bytes.map(Arc::clone).unwrap_or_default();
                    if !batch.fits(bytes.len()) {
                        return;
                    }
                    batch.push(Key::sessions(shard), bytes);
                    self.queued_sessions.remove(&shard);
                }
                Item::Table => {
                    if !batch.fits(table.len()) {
                        return;
                    }
                    batch.push(Key::TABLE, Arc::clone(table));
                    batch.table = Some(version);
                    self.table_sent = version;
                }
            }
            self.queue.pop_front();
            self.head_due = true;
        }
    }

    /// Ends a group of batches with the head.
    pub(super) fn end(&mut self, batch: &mut Pending, head: Head, is_clean: bool) {
        // A level counts once all its pages are out.
        let level = match self.head {
            Some(before) if !is_clean => before.level,
            _ => head.level,
        };
        let head = Head {
            level,
            table_version: self.table_sent,
            ..head
        };
        self.push_head(batch, head);
        batch.ends_sync = self.syncing.is_some() && self.queue.is_empty();
        batch.received_ns = std::mem::take(&mut self.received_ns);
        self.head = Some(head);
        self.head_due = false;
    }

    /// The head is to be sent again. One that is behind is sent it at once, with the level and
    /// table it has.
    pub(super) fn beat(&mut self, current: Head, metrics: &Metrics) {
        self.head_due = true;
        if self.queue.is_empty() || !self.is_open() {
            return;
        }
        if let Some(head) = self.head {
            let mut batch = Pending::default();
            let head = Head {
                beat: current.beat,
                ready: current.ready,
                ..head
            };
            self.push_head(&mut batch, head);
            self.send(batch, metrics);
        }
    }

    /// Loads go before the head.
    fn push_head(&mut self, batch: &mut Pending, head: Head) {
        if let Some(loads) = self.loads.take() {
            batch.push(Key::LOADS, loads);
        }
        batch.push(Key::HEAD, Arc::from(head.encode()));
    }

    pub(super) fn send(&mut self, batch: Pending, metrics: &Metrics) {
        self.seq += 1;
        let message = batch.encode(self.version, self.seq);
        metrics.batches.inc();
        metrics.sent.inc_by(message.len() as u64);
        self.unacked.push_back(Sent {
            seq: self.seq,
            table: batch.table,
            received_ns: batch.received_ns,
            ends_sync: batch.ends_sync,
        });
        // The channel holds a whole window: it is full or closed only when the stream is broken.
        self.alive = self.out.try_send(message.into()).is_ok();
    }
}
