//! The door to an engine's PUB socket, with its ROUTER socket for what was missed.
//!
//! A message is `[topic, sequence u64 big-endian, payload]`. A replay is asked for by
//! `["", first sequence]` and answered by messages whose last two frames are sequence and payload,
//! ended by an empty payload.

use std::time::Duration;

use bytes::{Buf as _, Bytes};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::order::Frame;
use super::pause;
use super::stream::{Gone, Stream, unix_ns};
use super::zmtp::{Connection, Role, ZmtpError};

/// Most bytes of a message. A step that stores a prompt of a million tokens has about 5 MB.
pub const MESSAGE_BYTES: usize = 16 << 20;
/// How long an answer may take to go on.
const ANSWER: Duration = Duration::from_secs(5);
/// Silence after which the engine is asked whether something was missed.
const QUIET: Duration = Duration::from_secs(1);
/// Frames of a replay that wait to be put in order.
const REPLAYED: usize = 64;

/// Where an engine publishes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// `host:port` of the PUB socket.
    pub events: String,
    /// Topics start with this.
    pub topic: String,
    /// `host:port` of the ROUTER socket.
    pub replay: Option<String>,
}

/// Reads for ever.
///
/// # Errors
/// When the index is gone.
pub async fn run(address: Address, mut stream: Stream) -> Result<Gone, Gone> {
    let mut failed = 0;
    loop {
        match subscribe(&address).await {
            Ok(connection) => {
                stream.order.opened();
                let (why, messages) = read(connection, &address, &mut stream).await?;
                if messages > 0 {
                    failed = 0;
                }
                report(&stream, &address.events, &why);
                stream.order.closed();
                stream.proceed().await?;
            }
            Err(why) => {
                if failed == 0 {
                    report(&stream, &address.events, &why);
                } else {
                    stream.outlet.count(why.kind());
                }
            }
        }
        tokio::time::sleep(pause::after(failed)).await;
        failed = failed.saturating_add(1);
    }
}

async fn subscribe(address: &Address) -> Result<Connection, ZmtpError> {
    let mut connection = Connection::open(&address.events, Role::Sub, MESSAGE_BYTES).await?;
    connection.subscribe(&address.topic).await?;
    Ok(connection)
}

fn report(stream: &Stream, address: &str, why: &ZmtpError) {
    let worker = stream.outlet.origin().worker;
    if !matches!(why, ZmtpError::Closed) {
        stream.outlet.count(why.kind());
    }
    tracing::warn!(worker, address, %why, "no events over zmq, trying again");
}

/// Reads until the connection is gone; tells why, and how many messages came.
async fn read(
    mut connection: Connection,
    address: &Address,
    stream: &mut Stream,
) -> Result<(ZmtpError, u64), Gone> {
    let mut messages = 0;
    let mut replay: Option<Replay> = None;
    let mut replays_failed = 0;
    loop {
        if let Some(from) = stream.proceed().await?
            && let Some(endpoint) = &address.replay
        {
            stream.outlet.count("replay");
            let wait = (replays_failed > 0).then(|| pause::after(replays_failed - 1));
            replay = Some(Replay::start(
                endpoint.clone(),
                from,
                wait.unwrap_or_default(),
            ));
        }
        tokio::select! {
            message = connection.receive() => {
                let message = match message {
                    Ok(message) => message,
                    Err(why) => return Ok((why, messages)),
                };
                messages += 1;
                stream.outlet.admit(message.iter().map(Bytes::len).sum()).await;
                match message.as_slice() {
                    [_, sequence, payload] if let Some(sequence) = number(sequence) => {
                        stream.order.live(Frame {
                            sequence,
                            payload: payload.clone(),
                            received_ns: unix_ns(),
                        });
                    }
                    _ => stream.outlet.count("malformed"),
                }
            }
            replayed = next(&mut replay) => match replayed {
                Some(frame) => {
                    stream.outlet.admit(frame.payload.len()).await;
                    stream.order.replayed(frame);
                }
                None => {
                    let is_complete = replay.take().is_some_and(|r| r.is_complete());
                    replays_failed = if is_complete { 0 } else { replays_failed + 1 };
                    if !is_complete {
                        stream.outlet.count("replay_failed");
                    }
                    stream.order.replay_ended(is_complete);
                }
            },
            () = tokio::time::sleep(QUIET), if replay.is_none() => stream.order.quiet(),
        }
    }
}

/// A number as a frame of eight bytes.
fn number(mut frame: &[u8]) -> Option<u64> {
    (frame.len() == 8).then(|| frame.get_u64())
}

/// The next frame of a replay; `None` at its end. Never without one.
async fn next(replay: &mut Option<Replay>) -> Option<Frame> {
    match replay {
        Some(replay) => replay.frames.recv().await.and_then(|frame| {
            replay.is_complete = frame.is_none();
            frame
        }),
        None => std::future::pending().await,
    }
}

/// A replay under way, on a connection of its own.
struct Replay {
    /// Frames, then `None` where the answer has an end.
    frames: mpsc::Receiver<Option<Frame>>,
    is_complete: bool,
    _task: AbortOnDropHandle<()>,
}

impl Replay {
    fn start(endpoint: String, from: u64, wait: Duration) -> Self {
        let (to, frames) = mpsc::channel(REPLAYED);
        let task = tokio::spawn(async move {
            tokio::time::sleep(wait).await;
            if let Err(why) = ask(&endpoint, from, &to).await {
                tracing::warn!(endpoint, from, %why, "no replay over zmq");
            }
        });
        Self {
            frames,
            is_complete: false,
            _task: AbortOnDropHandle::new(task),
        }
    }

    fn is_complete(&self) -> bool {
        self.is_complete
    }
}

/// Asks for a replay and hands on its frames; what hears of none more is told by the end of the
/// channel.
async fn ask(endpoint: &str, from: u64, to: &mpsc::Sender<Option<Frame>>) -> Result<(), ZmtpError> {
    let mut connection = Connection::open(endpoint, Role::Dealer, MESSAGE_BYTES).await?;
    let request = vec![Bytes::new(), Bytes::copy_from_slice(&from.to_be_bytes())];
    connection.send(request).await?;
    loop {
        let answer = tokio::time::timeout(ANSWER, connection.receive()).await;
        let message = answer.unwrap_or(Err(ZmtpError::Timeout))?;
        let [.., sequence, payload] = message.as_slice() else {
            return Err(ZmtpError::Protocol("an answer of one frame"));
        };
        let sequence = number(sequence).ok_or(ZmtpError::Protocol("a sequence not of 8 bytes"))?;
        let frame = (!payload.is_empty()).then(|| Frame {
            sequence,
            payload: payload.clone(),
            received_ns: unix_ns(),
        });
        let is_end = frame.is_none();
        // The reader has no use for it any more when it is gone.
        if to.send(frame).await.is_err() || is_end {
            return Ok(());
        }
    }
}
