//! The index service: one task that owns the index, the roster of workers and the publisher.
//!
//! Events come through one bounded channel, everything else through another, so that a flood of
//! events delays neither acknowledgements nor queries.

mod accounts;
mod apply;
mod control;
mod cursor;
mod decisions;
mod doubt;
mod dumping;
mod failing;
mod field;
mod health;
mod hearing;
mod knowledge;
mod partition;
mod peering;
mod pending;
mod prediction;
mod publisher;
mod queueing;
mod repair;
mod report;
mod roster;
mod saving;
mod selecting;
mod sessions;
mod slots;
mod snapshots;
mod strangers;
mod streams;
mod subscriber;
mod tally;
mod tokens;
mod trust;
mod underway;
mod walk;
mod watching;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use kv_core::head::Head;
use kv_core::id::{Slot, WorkerId};
use kv_core::index::{Index, IndexConfig};
use kv_core::table::{self, Settings, Table};
use kv_core::wire::Subscribe;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::config::{self, Config};
use crate::decision::{Decisions, Past};
use crate::dump::Line;
use crate::ejection::{Ejection, Look};
use crate::ingest::{Arrival, Plane};
use crate::load::{Accounts, ProxyId};
use crate::look::Looker;
use crate::metrics::{Kind, Metrics};
use crate::queue::Queues;
use crate::select::{Reservations, Served};
use crate::state::{self, Restored};

pub use control::Control;
pub use cursor::Cursor;
pub use dumping::{NotAdopted, NotDumped};
pub use field::{Field, Standing};
pub use hearing::{EventsReport, Known};
pub use knowledge::Knowledge;
pub use partition::Partition;
pub use publisher::{Refusal, SubscriberReport};
pub use report::{Available, IndexReport, OwnerReport, PoolReport, Readiness, WorkersReport};
pub use slots::Slots;
pub use strangers::{StrangerRank, StrangerReport};

/// Blocks to a group of a page.
const GROUP: u8 = 32;
/// Level of a fresh index: it grows by itself.
const LEVEL: u8 = 6;
/// Blocks of stores that wait for their parent.
const MAX_ORPHANS: usize = 1 << 18;
/// Least time between two writes of pages; changes are collected meanwhile.
const COALESCE: Duration = Duration::from_millis(1);
/// Most of it: changes are collected for twice as long as writing the last ones took, so that under
/// load up to two thirds of the time are left to events.
const COALESCE_MOST: Duration = Duration::from_millis(4);
/// How long they are collected while no Envoy is there to read them.
const COALESCE_ALONE: Duration = Duration::from_millis(50);
/// Ticks look after deadlines, beats and saving.
const TICK: Duration = Duration::from_millis(100);
/// Ticks between two signs of life.
const BEAT_TICKS: u32 = 5;
/// Ticks between two snapshots to disk, and between two looks at what was learned of workers.
const SAVE_TICKS: u32 = 100;
/// Ticks between two looks for sessions whose time is over.
const SESSION_TICKS: u32 = 5;
/// How long a fresh index waits for the engines' snapshots before it counts as complete.
const RECOVERY: Duration = Duration::from_secs(15);
/// Protocol version from which on proxies report their load and are told about it.
const REPORTS_FROM: u8 = 2;
/// Protocol version from which on filters take out of the lanes what they are told to.
const WRITE_OFFS_FROM: u8 = 3;
/// Protocol version from which on the VMs of a proxy know of each other's live prompts.
const BOARDS_FROM: u8 = 3;
/// Most times of reception of one flush.
const MAX_RECEIVED: usize = 1024;

/// The service.
pub struct Service {
    index: Index,
    roster: roster::Roster,
    publisher: publisher::Publisher,
    /// The roster's pools as the worker table has them.
    tables: Vec<Arc<table::Pool>>,
    /// All pools with all owners, as the select service has them.
    selectable: Vec<Arc<table::Pool>>,
    served: Arc<[Served]>,
    reservations: Reservations,
    accounts: Accounts,
    decisions: Decisions,
    /// Decisions that wait to be judged, and the load up to them.
    past: Past<decisions::Question>,
    /// Predicted blocks.
    predictions: prediction::Predictions,
    /// Blocks that may be gone, by pool and slot.
    doubts: HashMap<(usize, Slot), doubt::Doubt>,
    strangers: strangers::Strangers,
    dumps: VecDeque<dumping::Dump>,
    adoption: dumping::Adoption,
    underway: underway::Underway,
    ejection: Ejection,
    /// Whether workers that fail are left out.
    ejects: bool,
    /// Share of a pool's workers that stay though they fail.
    eject_floor: f64,
    looker: Looker,
    /// When each worker is looked at next.
    next_looks: HashMap<WorkerId, u64>,
    /// Looks at workers under way, at most one to each.
    probes: JoinSet<(WorkerId, Look)>,
    peering: Option<peering::Peering>,
    queues: Queues,
    /// Thresholds that were set at run time, by pool, and what the configuration said then.
    thresholds: BTreeMap<usize, queueing::SetThresholds>,
    loads_version: u64,
    /// When proxies are to be told about load; `None` while nothing has changed.
    loads_at: Option<Instant>,
    /// Before this they are not told again.
    loads_from: Instant,
    settings: Settings,
    epoch: u32,
    table_version: u64,
    is_restored: bool,
    min_initial_workers: u32,
    /// Whether so many workers have been there.
    is_staffed: bool,
    /// Whether a peer's index was taken over.
    is_bootstrapped: bool,
    /// Whether one may yet be.
    awaits_peer: bool,
    ready: bool,
    started: Instant,
    connected: BTreeSet<Plane>,
    planes: Vec<Plane>,
    tally: tally::Tally,
    requests: mpsc::Sender<WorkerId>,
    flushed: Instant,
    /// How long changes are collected after that.
    coalesce: Duration,
    flush_at: Option<Instant>,
    received_ns: Vec<u64>,
    saving: saving::Saving,
    sessions: sessions::Sessions,
    /// Kept for the standalone indexer alone.
    tokens: Option<tokens::Tokens>,
    silence: Arc<Notify>,
    metrics: Arc<Metrics>,
}

impl Service {
    /// A service for a configuration, with what was restored of its last run.
    ///
    /// `requests` takes workers whose snapshot is wanted.
    #[must_use]
    pub fn new(
        config: &Config,
        restored: Restored,
        requests: mpsc::Sender<WorkerId>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let kind = restored.kind();
        metrics.restores.get_or_create(&Kind { kind }).inc();
        let state = restored.into_state();
        let is_restored = state.is_some();
        let (epoch, level, states, sessions) = match state {
            Some(state) => (state.epoch, state.level, state.pools, state.sessions),
            None => (random_u32(), LEVEL, Vec::new(), Vec::new()),
        };
        let index = Index::new(IndexConfig {
            epoch,
            level,
            group: GROUP,
            max_orphans: MAX_ORPHANS,
            max_bytes: config.index_bytes,
            max_page_bytes: config.page_bytes,
        });
        let head = Head {
            epoch,
            level,
            group: GROUP,
            ready: false,
            table_version: 0,
            beat: unix_ms(),
        };
        let zmq = (!config.dynamo_zmq.is_empty()).then_some(Plane::Dynamo);
        let mut planes: Vec<_> = config.nats.iter().flat_map(planes).chain(zmq).collect();
        planes.sort_unstable();
        planes.dedup();
        let mut service = Self {
            index,
            roster: roster::Roster::default(),
            publisher: publisher::Publisher::new(head, Arc::clone(&metrics)),
            tables: Vec::new(),
            selectable: Vec::new(),
            served: Arc::default(),
            reservations: Reservations::new(random_u64()),
            accounts: Accounts::new(config.load).numbering_from(unix_ms()),
            decisions: Decisions::default(),
            past: Past::new(Accounts::replica()),
            predictions: prediction::Predictions::new(),
            doubts: HashMap::new(),
            strangers: strangers::Strangers::default(),
            dumps: VecDeque::new(),
            adoption: dumping::Adoption::default(),
            underway: underway::Underway::default(),
            ejection: Ejection::default(),
            ejects: config.eject_workers,
            eject_floor: config.eject_floor,
            looker: Looker::new(config.health_check.clone()),
            next_looks: HashMap::new(),
            probes: JoinSet::new(),
            peering: None,
            queues: Queues::new(Arc::clone(&metrics)),
            thresholds: BTreeMap::new(),
            loads_version: 0,
            loads_at: None,
            loads_from: Instant::now(),
            settings: config.settings,
            epoch,
            table_version: 0,
            is_restored,
            min_initial_workers: config.min_initial_workers,
            is_staffed: false,
            is_bootstrapped: false,
            awaits_peer: false,
            ready: false,
            started: Instant::now(),
            connected: BTreeSet::new(),
            planes,
            tally: tally::Tally::new(Arc::clone(&metrics)),
            requests,
            flushed: Instant::now(),
            coalesce: COALESCE,
            flush_at: None,
            received_ns: Vec::new(),
            saving: saving::Saving::new(config.state_dir.as_deref().map(state::file)),
            sessions: sessions::Sessions::restored(&sessions),
            tokens: config.indexer.as_ref().map(|_| tokens::Tokens::default()),
            silence: Arc::default(),
            metrics,
        };
        service.restore(&config.pools, states);
        service.serve_owners();
        service.publish_table(None);
        service.check_ready();
        // Epoch and slots are worth saving, events or not.
        service.saving.touch();
        service
    }

    /// Is told when a filter VM has fallen silent while its Envoy lives: it has trapped.
    #[must_use]
    pub fn silence(&self) -> Arc<Notify> {
        Arc::clone(&self.silence)
    }

    /// Whether the index came from the state folder.
    #[must_use]
    pub fn is_restored(&self) -> bool {
        self.is_restored
    }

    /// Awaits a peer's index before it takes events: those that come meanwhile wait, and those before
    /// them are in the peer's.
    #[must_use]
    pub fn awaiting_peer(mut self) -> Self {
        self.awaits_peer = true;
        self.ready = false;
        self.publisher.beat(false, &mut self.index);
        self
    }

    /// Serves until cancelled, then saves.
    pub async fn run(
        mut self,
        mut control: mpsc::Receiver<Control>,
        mut arrivals: mpsc::Receiver<Arrival>,
        cancel: CancellationToken,
    ) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut tick = 0_u32;
        loop {
            let flush_at = self.flush_at.filter(|_| self.publisher.wants_pages());
            // Timers are late while events stream in: the clock decides.
            if flush_at.is_some_and(|at| at <= Instant::now()) {
                self.flush();
                continue;
            }
            if self.loads_at.is_some_and(|at| at <= Instant::now()) {
                self.publish_loads();
                continue;
            }
            let dump_out = self.dump_out();
            tokio::select! {
                biased;
                () = cancel.cancelled() => break,
                Some(control) = control.recv() => self.control(control),
                _ = ticks.tick() => {
                    tick = tick.wrapping_add(1);
                    self.tick(tick);
                }
                () = at(flush_at) => self.flush(),
                () = at(self.loads_at) => self.publish_loads(),
                Some(Ok((worker, look))) = self.probes.join_next() => {
                    self.worker_looked_at(worker, look);
                }
                Some(arrival) = arrivals.recv(), if !self.awaits_peer => self.arrived(arrival),
                () = std::future::ready(()), if self.saving.is_under_way() => self.save_step(),
                place = room(dump_out) => self.dump_step(place),
            }
            if self.flush_at.is_none() && self.index.is_dirty() {
                self.flush_at = Some(self.flushed + self.coalesce);
            }
        }
        self.save_all().await;
    }

    fn control(&mut self, control: Control) {
        // Whoever asked may have gone away.
        match control {
            Control::Subscribe {
                who,
                version,
                out,
                reply,
            } => {
                let taken = self.subscribe(who, version, out);
                let _ = reply.send(taken);
            }
            Control::Ack(id, ack) => self.publisher.acked(id, ack, &mut self.index),
            Control::Reports(id, reports) => self.reports(id, reports),
            Control::Lanes(id, lanes) => self.lanes(id, &lanes),
            Control::Peer(arrival) => self.peer_arrived(arrival),
            Control::Gone(id) => {
                self.publisher.gone(id);
                self.disconnect_proxy(id);
            }
            Control::Configure { config, written } => self.configure(&config, written),
            Control::Workers(reply) => {
                let _ = reply.send(self.report_workers());
            }
            Control::Raw(reply) => {
                let _ = reply.send(self.accounts.raw());
            }
            Control::Decisions(wanted, reply) => {
                let _ = reply.send(self.decisions.report(&wanted));
            }
            Control::Queue(reply) => {
                let _ = reply.send(self.queues.report(unix_ns()));
            }
            Control::Thresholds(reply) => {
                let _ = reply.send(self.thresholds());
            }
            Control::Threshold {
                model,
                change,
                reply,
            } => {
                let _ = reply.send(self.set_threshold(&model, change));
            }
            Control::Index(reply) => {
                let _ = reply.send(self.report_index());
            }
            Control::Dump { out, reply } => {
                let begun = self.begin_dump(out);
                let _ = reply.send(begun);
            }
            Control::Adopt { line, reply } => {
                let _ = reply.send(self.adopt(line));
            }
            Control::Adopted(reply) => {
                self.awaits_peer = false;
                self.check_ready();
                let _ = reply.send(self.resumes());
            }
            Control::Readiness(reply) => {
                let _ = reply.send(self.report_readiness());
            }
            Control::Overlaps {
                pool,
                prompt,
                families,
                reply,
            } => {
                let _ = reply.send(self.field(pool, &prompt, &families));
            }
            Control::Table(reply) => {
                let _ = reply.send(self.table());
            }
            Control::Partitions(reply) => {
                let _ = reply.send(self.partitions());
            }
            Control::Held {
                pool,
                prompt,
                reply,
            } => {
                let _ = reply.send(self.held(pool, &prompt));
            }
            Control::Stores { pool, owner, reply } => {
                let _ = reply.send(self.stores(pool, owner));
            }
            Control::Select(ask) => self.select(ask),
        }
    }

    fn subscribe(
        &mut self,
        who: Subscribe,
        version: u8,
        out: mpsc::Sender<Bytes>,
    ) -> Result<u64, Refusal> {
        let proxy = ProxyId {
            process: who.process,
            vm_id: who.vm_id.clone(),
        };
        let id = self.publisher.subscribe(who, version, out, &self.index)?;
        if version >= REPORTS_FROM {
            // Envoy may hold what an earlier run said about load.
            let knows_its_own = version >= BOARDS_FROM;
            self.accounts
                .connected(proxy, id, knows_its_own, self.now_ms());
            if version >= WRITE_OFFS_FROM {
                self.accounts.writes_off(id);
            }
            self.publish_loads();
        }
        self.publisher.pump(&mut self.index);
        if self.flush_at.is_some() {
            // Somebody reads them from here on.
            self.flush_at = Some(Instant::now());
        }
        Ok(id)
    }

    /// Removed workers' pages go out before the table that drops them or gives their slots away.
    fn configure(&mut self, config: &Config, written: oneshot::Sender<()>) {
        self.settings = config.settings;
        self.eject_floor = config.eject_floor;
        self.looker = Looker::new(config.health_check.clone());
        self.min_initial_workers = config.min_initial_workers;
        self.index.resize(config.index_bytes, config.page_bytes);
        self.accounts.track(config.load);
        self.ejects = config.eject_workers;
        self.add_pools(config);
        let change = self.roster.update(&config.pools);
        for worker in &change.joined {
            if let Some((_, worker)) = self.roster.worker(*worker) {
                worker.since_ms = unix_ms();
            }
        }
        for (pool, slot) in &change.removed {
            self.drop_blocks(*pool, *slot);
        }
        if !change.removed.is_empty() {
            while self.index.is_dirty() {
                self.flush_once();
            }
        }
        self.report_change(&change);
        for worker in &change.joined {
            self.adopt_stranger(*worker);
        }
        self.reconfigure_health();
        self.serve_owners();
        self.reconfigure_peers();
        if self.connected.contains(&Plane::Json) {
            for worker in change.joined {
                self.begin_repair(worker, false);
            }
        }
        self.publish_table(Some(written));
        self.saving.touch();
    }

    fn report_change(&self, change: &roster::Change) {
        for owner in &change.without_slot {
            tracing::error!(
                worker = owner.worker,
                rank = owner.rank,
                "no slot left for owner"
            );
        }
        tracing::info!(
            joined = change.joined.len(),
            removed = change.removed.len(),
            "workers are in line with the configuration"
        );
    }

    fn table(&self) -> Table {
        Table {
            epoch: self.epoch,
            version: self.table_version,
            settings: self.settings,
            pools: self.tables.iter().map(|p| table::Pool::clone(p)).collect(),
        }
    }

    fn publish_table(&mut self, written: Option<oneshot::Sender<()>>) {
        // The clock keeps versions of a restarted sidecar apart from those Envoy may hold.
        self.table_version = unix_ms().max(self.table_version + 1);
        let table = self.table();
        self.publisher.table(&table, written, &mut self.index);
    }

    fn flush(&mut self) {
        let since = Instant::now();
        self.flush_once();
        self.flushed = Instant::now();
        let took = self.flushed - since;
        self.coalesce = if self.publisher.is_alone() {
            COALESCE_ALONE
        } else {
            (2 * took).clamp(COALESCE, COALESCE_MOST)
        };
        self.flush_at = self.index.is_dirty().then_some(self.flushed);
    }

    fn flush_once(&mut self) {
        let writes = self.index.flush();
        let received_ns = if self.index.is_dirty() {
            Vec::new()
        } else {
            std::mem::take(&mut self.received_ns)
        };
        self.publisher.pages(&writes, &received_ns, &mut self.index);
    }

    fn tick(&mut self, tick: u32) {
        self.look_after_repairs();
        self.sweep_loads();
        self.sweep_queues();
        if tick.is_multiple_of(SESSION_TICKS) {
            self.sweep_sessions();
        }
        self.tick_health();
        self.tick_peers(tick);
        self.expire_predictions();
        self.strangers.sweep(Instant::now());
        self.sweep_dumps();
        self.remember(unix_ns());
        self.judge_due();
        self.past.sweep(self.now_ms());
        self.check_ready();
        self.save_step();
        if tick.is_multiple_of(BEAT_TICKS) {
            self.judge_workers();
            self.publisher.beat(self.ready, &mut self.index);
            self.measure();
        }
        if tick.is_multiple_of(SAVE_TICKS) {
            self.begin_saving();
            self.sweep_tokens();
            self.sweep_reservations();
            self.learn_rates();
        }
    }

    /// A restored index is complete enough; a fresh one once every engine that answers has
    /// answered, or after [`RECOVERY`].
    fn check_ready(&mut self) {
        let wanted = usize::try_from(self.min_initial_workers).unwrap_or(usize::MAX);
        self.is_staffed = self.is_staffed || self.workers_there() >= wanted;
        if self.ready || self.awaits_peer {
            return;
        }
        let is_answered = !self.planes.contains(&Plane::Json)
            || self.connected.contains(&Plane::Json)
                && self.roster.workers().all(|w| w.repair.is_none());
        let is_told = |w: &mut roster::Worker| !w.source.is_own() || w.is_told();
        let is_complete = is_answered && self.roster.workers().all(is_told);
        let is_late = self.started.elapsed() >= RECOVERY;
        if self.is_restored || self.is_bootstrapped || is_complete || is_late {
            self.ready = true;
            self.publisher.beat(true, &mut self.index);
            tracing::info!(
                epoch = self.epoch,
                restored = self.is_restored,
                "index is ready"
            );
        }
    }
}

/// Planes of a configuration.
fn planes(nats: &config::Nats) -> impl Iterator<Item = Plane> + use<> {
    let dynamo = nats.dynamo.is_some().then_some(Plane::Dynamo);
    let json = nats.json.is_some().then_some(match nats.json_stream {
        Some(_) => Plane::JetStream,
        None => Plane::Json,
    });
    dynamo.into_iter().chain(json)
}

/// A place in a channel: for ever without one, at once and none when nobody reads it any more.
async fn room(out: Option<mpsc::Sender<Line>>) -> Option<mpsc::OwnedPermit<Line>> {
    match out {
        Some(out) => out.reserve_owned().await.ok(),
        None => std::future::pending().await,
    }
}

/// Waits for an instant; for ever without one.
async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

fn unix_ms() -> u64 {
    unix_ns() / 1_000_000
}

fn unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}

/// Random bits of the system; the sidecar can't do without.
pub(crate) fn random_u64() -> u64 {
    getrandom::u64().unwrap_or_else(|e| {
        tracing::error!(error = %e, "the system gives no randomness");
        std::process::abort()
    })
}

fn random_u32() -> u32 {
    // The high half is as random as the whole.
    (random_u64() >> 32) as u32
}

/// Where the snapshot of a configuration stands.
#[must_use]
pub fn state_file(config: &Config) -> Option<PathBuf> {
    config.state_dir.as_deref().map(state::file)
}
