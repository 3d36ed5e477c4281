//! An engine's own stream of events, in the words of a real engine: over ZMQ with replay, posted to
//! the router, or kept to be polled.

mod dialect;
mod poll;
mod value;
mod zmq;

use kv_publisher::Publisher;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::change::Change;
use crate::flexkv;
use crate::snapshot;

pub use self::dialect::Dialect;
pub(crate) use self::poll::Buffer;
pub use self::zmq::Faults;

/// How an engine tells what happens in its cache.
#[derive(Clone, Debug)]
pub enum OwnEvents {
    /// Published over ZMQ.
    Zmq(Zmq),
    /// Posted to the router.
    Http(kv_publisher::Settings),
    /// Kept for `POST /kv_cache_events`, which takes them away.
    Poll {
        /// Events that are kept; the oldest go first.
        buffer: usize,
    },
}

/// Sockets of an engine.
#[derive(Clone, Debug)]
pub struct Zmq {
    /// `tcp://host:port` of the PUB socket; port 0 takes a free one.
    pub listen: String,
    /// `tcp://host:port` of the ROUTER socket for replays.
    pub replay: Option<String>,
    /// Topic of the messages.
    pub topic: String,
    /// Messages that are kept for replays.
    pub buffer: usize,
    /// How events are written.
    pub dialect: Dialect,
    /// What goes wrong.
    pub faults: Faults,
}

impl Default for Zmq {
    fn default() -> Self {
        Self {
            listen: "tcp://127.0.0.1:0".to_owned(),
            replay: None,
            topic: "kv-events".to_owned(),
            buffer: 10_000,
            dialect: Dialect::VllmMaps,
            faults: Faults::default(),
        }
    }
}

/// Why a stream can't be offered.
#[derive(Debug, thiserror::Error)]
pub enum OwnError {
    /// A socket that can't be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: String,
        /// Why.
        source: zeromq::ZmqError,
    },
    /// Settings of posts that can't work.
    #[error(transparent)]
    Post(#[from] kv_publisher::SettingsError),
}

/// The whole cache.
pub(crate) type Content = Box<dyn Fn() -> Vec<crate::chain::Key> + Send + Sync>;

/// The sending half: takes changes without waiting.
#[derive(Debug)]
pub(crate) enum Outlet {
    Zmq(zmq::Publisher),
    Http(Publisher, usize),
    Poll(Buffer),
}

impl Outlet {
    pub(crate) async fn start(
        own: &OwnEvents,
        block_size: usize,
        blocks: usize,
        content: Content,
        stop: CancellationToken,
    ) -> Result<(Self, Vec<JoinHandle<()>>), OwnError> {
        match own {
            OwnEvents::Zmq(settings) => {
                let (publisher, task) = zmq::Publisher::start(settings, block_size, stop).await?;
                Ok((Self::Zmq(publisher), vec![task]))
            }
            OwnEvents::Http(settings) => {
                let cache = move || {
                    let runs = snapshot::runs(content());
                    runs.iter()
                        .map(|run| dialect::post(run, block_size))
                        .collect()
                };
                let publisher = Publisher::start(settings.clone(), cache)?;
                Ok((Self::Http(publisher, block_size), Vec::new()))
            }
            OwnEvents::Poll { buffer } => {
                let buffer = Buffer::new(*buffer, blocks);
                Ok((Self::Poll(buffer), Vec::new()))
            }
        }
    }

    /// Queues changes in order, those of the levels under the cache last; TensorRT-LLM has none.
    pub(crate) fn publish(&self, changes: &[Change], outside: &[flexkv::Change]) {
        match self {
            Self::Zmq(publisher) => publisher.publish(changes, outside),
            Self::Http(publisher, block_size) => {
                let events = changes.iter().map(|c| dialect::post(c, *block_size));
                let outside = outside
                    .iter()
                    .map(|c| dialect::post_outside(c, *block_size));
                publisher.publish(events.chain(outside).collect());
            }
            Self::Poll(buffer) => buffer.push(changes),
        }
    }

    /// Begins another run: numbers start at 0, and nothing is kept of the one before.
    pub(crate) fn restart(&self) {
        match self {
            Self::Zmq(publisher) => publisher.restart(),
            // Posts name their run: a publisher's own restart is another publisher.
            Self::Http(..) => {}
            Self::Poll(buffer) => buffer.restart(),
        }
    }

    /// Addresses of the sockets.
    pub(crate) fn addresses(&self) -> (Option<&str>, Option<&str>) {
        match self {
            Self::Zmq(publisher) => (Some(publisher.address()), publisher.replay()),
            _ => (None, None),
        }
    }

    /// Events handed out and events lost.
    pub(crate) fn totals(&self) -> (u64, u64) {
        match self {
            Self::Zmq(publisher) => publisher.totals(),
            Self::Http(publisher, _) => {
                use std::sync::atomic::Ordering::Relaxed;
                let totals = publisher.totals();
                (totals.taken.load(Relaxed), totals.dropped.load(Relaxed))
            }
            Self::Poll(buffer) => buffer.totals(),
        }
    }
}
