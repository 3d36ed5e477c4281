//! One simulated engine: scheduler, clock, event plane and HTTP server in one process.

mod state;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::serve::ListenerExt as _;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::api;
use crate::chain::Key;
use crate::flexkv;
use crate::metrics::{Counters, Gauges};
use crate::own::{Outlet, OwnError, OwnEvents};
use crate::publish::{EventPlane, PublishError, Publisher};
use crate::scheduler::Limits;

pub(crate) use self::state::Shared;

/// How long a shutdown waits for open streams.
const SHUTDOWN_WAIT: Duration = Duration::from_secs(5);

/// An engine's identity, limits and outlets.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Identity in events and in `x-worker-id`.
    pub worker_id: u64,
    /// Name of the model served.
    pub model: String,
    /// Blocks of the cache.
    pub blocks: usize,
    /// Block size, batch limits and speed.
    pub limits: Limits,
    /// Steps take no time.
    pub instant: bool,
    /// Where events go on NATS; `None` publishes none there.
    pub events: Option<EventPlane>,
    /// The stream of events that the engine offers itself.
    pub own: Option<OwnEvents>,
    /// Levels under the cache.
    pub flexkv: Option<flexkv::Config>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            worker_id: 1,
            model: "sim".to_owned(),
            blocks: 3072,
            limits: Limits {
                block_size: 16,
                max_batched_tokens: 8192,
                max_seqs: 256,
                step: Duration::from_millis(6),
                prefill_per_token: Duration::from_micros(80),
                decode_per_seq: Duration::from_micros(100),
            },
            instant: false,
            events: None,
            own: None,
            flexkv: None,
        }
    }
}

/// Why an engine did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A limit that must be at least 1 is 0.
    #[error("{0} must be at least 1")]
    Zero(&'static str),
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// NATS cannot be used.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// The own stream cannot be offered.
    #[error(transparent)]
    Own(#[from] OwnError),
}

/// Why a request is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The prompt has no token.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// No token is asked for.
    #[error("max_tokens must be at least 1")]
    NoTokens,
    /// It could never fit.
    #[error("{asked} prompt and output tokens exceed the cache of {room} tokens")]
    TooLong {
        /// Prompt tokens plus `max_tokens`.
        asked: usize,
        /// Tokens the cache holds.
        room: usize,
    },
    /// Too many requests wait.
    #[error("{0} requests are waiting")]
    Busy(usize),
    /// The engine is shutting down.
    #[error("the engine is stopping")]
    Stopping,
}

/// A running engine. Dropping it stops it without waiting.
#[derive(Debug)]
pub struct Engine {
    shared: Arc<Shared>,
    address: SocketAddr,
    tasks: Vec<JoinHandle<()>>,
    stop: CancellationToken,
    _stop_on_drop: DropGuard,
}

// === impl Engine ===

impl Engine {
    /// Starts an engine; it serves when this returns.
    ///
    /// # Errors
    ///
    /// A limit of 0, an address in use, a NATS URL or subject that is none. A NATS server that
    /// does not answer is no error: events wait for it.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        for (name, value) in [
            ("block size", config.limits.block_size),
            ("blocks", config.blocks),
            ("max batched tokens", config.limits.max_batched_tokens),
            ("max sequences", config.limits.max_seqs),
        ] {
            if value == 0 {
                return Err(StartError::Zero(name));
            }
        }
        let listen = |source| StartError::Listen {
            address: config.listen,
            source,
        };
        let listener = TcpListener::bind(config.listen).await.map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        let shared = Arc::new(Shared::new(config));
        let stop = CancellationToken::new();
        let mut tasks = Vec::new();
        if let Some(plane) = &shared.config.events {
            let source = Arc::downgrade(&shared);
            let snapshot = Arc::new(move || {
                source
                    .upgrade()
                    .map_or_else(Vec::new, |shared| shared.snapshot())
            });
            let worker_id = shared.config.worker_id;
            let (publisher, senders) =
                Publisher::start(plane, worker_id, snapshot, stop.clone()).await?;
            shared.attach(publisher);
            tasks.extend(senders);
        }
        if let Some(own) = &shared.config.own {
            let source = Arc::downgrade(&shared);
            let content = move || {
                let shared = source.upgrade();
                shared.map_or_else(Vec::new, |shared| shared.blocks().1)
            };
            let (block_size, blocks) = (shared.config.limits.block_size, shared.config.blocks);
            let (outlet, senders) =
                Outlet::start(own, block_size, blocks, Box::new(content), stop.clone()).await?;
            shared.attach_own(outlet);
            tasks.extend(senders);
        }
        tasks.push(tokio::spawn(state::run_steps(
            Arc::clone(&shared),
            stop.clone(),
        )));
        let app = api::router(Arc::clone(&shared));
        let closed = stop.clone().cancelled_owned();
        tasks.push(tokio::spawn(async move {
            // Small writes, one token each, must not wait for each other.
            let listener = listener.tap_io(|stream| {
                let _best_effort = stream.set_nodelay(true);
            });
            let served = axum::serve(listener, app).with_graceful_shutdown(closed);
            if let Err(error) = served.await {
                eprintln!("http server of {address} ended: {error}");
            }
        }));
        Ok(Self {
            shared,
            address,
            tasks,
            _stop_on_drop: stop.clone().drop_guard(),
            stop,
        })
    }

    /// Where the engine listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The engine's id.
    #[must_use]
    pub fn worker_id(&self) -> u64 {
        self.shared.config.worker_id
    }

    /// Every cached block, in no order.
    #[must_use]
    pub fn blocks(&self) -> Vec<Key> {
        self.shared.blocks().1
    }

    /// Every cached block, and the id of the last event that made it so.
    #[must_use]
    pub fn content(&self) -> (u64, Vec<Key>) {
        self.shared.blocks()
    }

    /// Addresses of the own stream's sockets, `tcp://host:port`: events and replay.
    #[must_use]
    pub fn event_addresses(&self) -> (Option<String>, Option<String>) {
        self.shared.addresses()
    }

    /// Empties the cache and begins the own stream anew without a word, as a restart of the process
    /// would but for its connections.
    pub fn restart_events(&self) {
        self.shared.restart();
    }

    /// Id of the last event, 0 before the first.
    #[must_use]
    pub fn last_event_id(&self) -> u64 {
        self.shared.gauges().last_event_id
    }

    /// Totals since the start.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.shared.counters()
    }

    /// Queue lengths, cache use and event totals.
    #[must_use]
    pub fn gauges(&self) -> Gauges {
        self.shared.gauges()
    }

    /// Leading tokens of a prompt that are cached.
    #[must_use]
    pub fn overlap(&self, tokens: &[u32]) -> usize {
        self.shared.overlap(tokens)
    }

    /// Caches the full blocks of a prompt as if a request had run, and publishes the events.
    /// Returns `false` where running requests leave no room.
    #[must_use]
    pub fn store(&self, tokens: &[u32]) -> bool {
        let chain = self.shared.chain_of(tokens);
        let keys = chain.keys();
        self.shared.change(|scheduler| {
            let cache = scheduler.cache_mut();
            let Some((mut lease, _)) = cache.admit(keys, keys.len()) else {
                return false;
            };
            cache.commit(&mut lease, keys);
            cache.release(lease);
            true
        })
    }

    /// Drops blocks by engine hash, wherever they stand in their chain, unless a running request
    /// holds them; publishes the removal. Returns how many went.
    #[must_use]
    pub fn remove(&self, engine_hashes: &[u64]) -> usize {
        self.shared
            .change(|scheduler| scheduler.cache_mut().remove(engine_hashes))
    }

    /// Evicts up to `count` least recently used blocks, leaves first. Returns how many went.
    #[must_use]
    pub fn evict(&self, count: usize) -> usize {
        self.shared
            .change(|scheduler| scheduler.cache_mut().evict(count))
    }

    /// Forgets every block and publishes that. Running requests go on; nothing of them is cached.
    pub fn clear(&self) {
        self.shared.clear();
    }

    /// Stops: open streams end early, the port is free when this returns.
    pub async fn shutdown(mut self) {
        self.stop.cancel();
        for mut task in std::mem::take(&mut self.tasks) {
            if tokio::time::timeout(SHUTDOWN_WAIT, &mut task)
                .await
                .is_err()
            {
                task.abort();
            }
        }
    }
}
