//! The state of a running engine and the clock that drives it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kv_core::event::SnapshotPart;
use kv_core::hash::Seed;
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

use super::{Config, Refusal};
use crate::chain::{Chain, Key};
use crate::change::Change;
use crate::flexkv::FlexKv;
use crate::metrics::{self, Counters, Gauges};
use crate::own::Outlet;
use crate::publish::Publisher;
use crate::scheduler::{Output, Scheduler, Sequence, blocks_for};
use crate::snapshot;

/// Requests that wait before the engine refuses more.
const MAX_WAITING: usize = 16_384;

/// A step that ends late shortens the next ones by at most this.
const CATCH_UP: Duration = Duration::from_millis(10);

/// What the step loop and the HTTP handlers share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: Config,
    core: Mutex<Core>,
    wake: Notify,
    started: Instant,
    requests: AtomicU64,
}

/// The engine's state. Changes get their event ids under the lock that made them, so a snapshot
/// and the events after it always fit together.
#[derive(Debug)]
struct Core {
    scheduler: Scheduler,
    last_event_id: u64,
    /// Changes and their event ids.
    unpublished: Vec<(u64, Change)>,
    publisher: Option<Publisher>,
    own: Option<Outlet>,
    stopped: bool,
}

// === impl Shared ===

impl Shared {
    pub(super) fn new(config: Config) -> Self {
        let mut scheduler = Scheduler::new(config.limits.clone(), config.blocks);
        if let Some(flexkv) = &config.flexkv {
            scheduler.offload_to(FlexKv::new(flexkv, config.limits.block_size));
        }
        Self {
            config,
            core: Mutex::new(Core {
                scheduler,
                last_event_id: 0,
                unpublished: Vec::new(),
                publisher: None,
                own: None,
                stopped: false,
            }),
            wake: Notify::new(),
            started: Instant::now(),
            requests: AtomicU64::new(0),
        }
    }

    /// Takes a request; its tokens arrive on the receiver.
    pub(crate) fn submit(
        &self,
        prompt: Vec<u32>,
        max_tokens: usize,
        salt: &str,
    ) -> Result<mpsc::Receiver<Output>, Refusal> {
        let limits = &self.config.limits;
        if prompt.is_empty() {
            return Err(Refusal::EmptyPrompt);
        }
        if max_tokens == 0 {
            return Err(Refusal::NoTokens);
        }
        let asked = prompt.len().saturating_add(max_tokens);
        if blocks_for(asked, limits.block_size) > self.config.blocks {
            return Err(Refusal::TooLong {
                asked,
                room: self.config.blocks * limits.block_size,
            });
        }
        let (out, tokens) = mpsc::channel(max_tokens);
        let seed = Seed::new("", salt);
        let chain = Chain::new(self.config.worker_id, limits.block_size, seed).salted(salt);
        let arrived = self.started.elapsed();
        let sequence = Sequence::new(prompt, max_tokens, chain, arrived, out);
        let mut core = self.lock();
        if core.stopped {
            return Err(Refusal::Stopping);
        }
        if core.scheduler.waiting() >= MAX_WAITING {
            return Err(Refusal::Busy(core.scheduler.waiting()));
        }
        core.scheduler.submit(sequence);
        drop(core);
        self.wake.notify_one();
        Ok(tokens)
    }

    /// Numbers requests from 1, for their ids.
    pub(crate) fn next_request_number(&self) -> u64 {
        self.requests.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub(crate) fn clear(&self) {
        self.change(|scheduler| scheduler.cache_mut().clear());
    }

    pub(crate) fn blocks(&self) -> (u64, Vec<Key>) {
        let core = self.lock();
        (core.last_event_id, core.scheduler.cache().keys().collect())
    }

    pub(crate) fn metrics(&self) -> String {
        metrics::render(&self.config.model, &self.counters(), &self.gauges())
    }

    pub(super) fn attach(&self, publisher: Publisher) {
        self.lock().publisher = Some(publisher);
    }

    pub(super) fn attach_own(&self, outlet: Outlet) {
        self.lock().own = Some(outlet);
    }

    /// Takes the events that wait to be polled; `None` where they go another way.
    pub(crate) fn poll(&self) -> Option<Vec<serde_json::Value>> {
        match &self.lock().own {
            Some(Outlet::Poll(buffer)) => Some(buffer.take()),
            _ => None,
        }
    }

    /// The cache is empty and the own stream begins anew, as after a restart of the process; nobody
    /// is told.
    pub(crate) fn restart(&self) {
        let mut core = self.lock();
        core.scheduler.cache_mut().clear();
        core.scheduler.cache_mut().take_changes();
        core.unpublished.clear();
        if let Some(own) = &core.own {
            own.restart();
        }
    }

    /// Addresses of the own stream's sockets: events and replay.
    pub(super) fn addresses(&self) -> (Option<String>, Option<String>) {
        let core = self.lock();
        let (events, replay) = core.own.as_ref().map_or((None, None), Outlet::addresses);
        (events.map(str::to_owned), replay.map(str::to_owned))
    }

    pub(super) fn counters(&self) -> Counters {
        self.lock().scheduler.counters().clone()
    }

    /// Leading tokens of a prompt that are cached.
    pub(super) fn overlap(&self, tokens: &[u32]) -> usize {
        let chain = self.chain_of(tokens);
        let blocks = self.lock().scheduler.cache().overlap(chain.keys());
        blocks * self.config.limits.block_size
    }

    pub(super) fn gauges(&self) -> Gauges {
        let core = self.lock();
        let (told, lost) = core.own.as_ref().map_or((0, 0), Outlet::totals);
        Gauges {
            running: core.scheduler.running(),
            waiting: core.scheduler.waiting(),
            blocks_pinned: core.scheduler.cache().pinned(),
            blocks: core.scheduler.cache().capacity(),
            last_event_id: core.last_event_id,
            events_published: core.publisher.as_ref().map_or(told, Publisher::published),
            events_dropped: core.publisher.as_ref().map_or(lost, Publisher::dropped),
        }
    }

    pub(super) fn snapshot(&self) -> Vec<SnapshotPart> {
        let (event_id, keys) = self.blocks();
        snapshot::parts(self.config.worker_id, event_id, keys)
    }

    pub(super) fn chain_of(&self, tokens: &[u32]) -> Chain {
        let limits = &self.config.limits;
        let seed = Seed::new("", "");
        let mut chain = Chain::new(self.config.worker_id, limits.block_size, seed);
        chain.extend(tokens);
        chain
    }

    /// Changes the cache from outside the schedule and publishes at once.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut Scheduler) -> T) -> T {
        let mut core = self.lock();
        let result = change(&mut core.scheduler);
        core.number_changes();
        core.publish(self.config.worker_id);
        result
    }

    fn begin_step(&self) -> Option<Duration> {
        let mut core = self.lock();
        let duration = core.scheduler.begin_step();
        core.number_changes();
        duration
    }

    fn end_step(&self) {
        let mut core = self.lock();
        // Events first: who has a token may rely on its blocks being on their way.
        core.publish(self.config.worker_id);
        core.scheduler.end_step(self.started.elapsed());
        // What finished sequences left outside.
        core.publish(self.config.worker_id);
    }

    fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Core ===

impl Core {
    fn number_changes(&mut self) {
        for change in self.scheduler.cache_mut().take_changes() {
            self.last_event_id += 1;
            if self.publisher.is_some() || self.own.is_some() {
                self.unpublished.push((self.last_event_id, change));
            }
        }
    }

    fn publish(&mut self, worker_id: u64) {
        let flexkv = self.scheduler.flexkv_mut();
        let outside = flexkv.map(FlexKv::take_changes).unwrap_or_default();
        if self.unpublished.is_empty() && outside.is_empty() {
            return;
        }
        let unpublished = std::mem::take(&mut self.unpublished);
        if let Some(publisher) = &self.publisher {
            let event =
                |(id, change): &(u64, Change)| snapshot::event(worker_id, *id, change.data());
            publisher.publish(unpublished.iter().map(event).collect());
        }
        if let Some(own) = &self.own {
            let changes: Vec<Change> = unpublished.into_iter().map(|(_, change)| change).collect();
            own.publish(&changes, &outside);
        }
    }
}

/// Steps follow each other while there is work, each ending its duration after the one before.
pub(super) async fn run_steps(shared: Arc<Shared>, stop: CancellationToken) {
    let mut clock = Instant::now();
    while !stop.is_cancelled() {
        let Some(duration) = shared.begin_step() else {
            tokio::select! {
                () = shared.wake.notified() => {}
                () = stop.cancelled() => {}
            }
            clock = Instant::now();
            continue;
        };
        if shared.config.instant {
            tokio::task::yield_now().await;
        } else {
            let now = Instant::now();
            clock = clock.max(now.checked_sub(CATCH_UP).unwrap_or(now)) + duration;
            tokio::select! {
                () = tokio::time::sleep_until(clock.into()) => {}
                () = stop.cancelled() => {}
            }
        }
        shared.end_step();
    }
    let mut core = shared.lock();
    core.stopped = true;
    core.scheduler.abort_all();
}
