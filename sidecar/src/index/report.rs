//! What the service tells about itself.

use std::collections::{BTreeMap, HashMap};

use kv_core::id::{DpRank, Role, WorkerId};
use kv_core::index::IndexStats;
use kv_core::policy::Policy;
use kv_core::report::OwnerKey;
use kv_core::table::Metadata;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use serde::Serialize;
use tokio::time::Instant;

use super::hearing::{EventsReport, Known};
use super::knowledge::Knowledge;
use super::peering::{ByPeer, PeerRequests};
use super::publisher::SubscriberReport;
use super::strangers::StrangerReport;
use super::tally::Counts;
use super::{Service, roster};
use crate::config::Source;
use crate::load::{LoadReport, ProxyId, ProxyRequests};
use crate::metrics::OfOwner;

/// Requests by owner and proxy.
type Requests<'a> = HashMap<OwnerKey, BTreeMap<&'a ProxyId, u32>>;

/// Answer of `/v1/index`.
#[derive(Clone, Debug, Serialize)]
pub struct IndexReport {
    /// Epoch of the pages.
    pub epoch: u32,
    /// Version of the worker table.
    pub table_version: u64,
    /// Whether the index counts as complete.
    pub ready: bool,
    /// Whether its contents came from the state folder.
    pub restored: bool,
    /// Whether they came from a peer.
    pub bootstrapped: bool,
    /// Whether somebody subscribed, and every page and load is written and acknowledged by every
    /// subscriber.
    pub settled: bool,
    /// Workers whose snapshot is awaited.
    pub repairs: usize,
    /// Sizes.
    pub stats: IndexStats,
    /// Counts since the start.
    #[serde(flatten)]
    pub counts: Counts,
    /// Whom the pages go to.
    pub subscribers: Vec<SubscriberReport>,
}

/// Answer of `/v1/workers`.
#[derive(Clone, Debug, Serialize)]
pub struct WorkersReport {
    /// Whether the load below is known.
    pub load: Available,
    /// The pools.
    pub pools: Vec<PoolReport>,
    /// Workers that publish and that the configuration gives no endpoint.
    pub no_endpoint: Vec<StrangerReport>,
}

/// Whether load is known.
#[derive(Clone, Debug, Serialize)]
pub struct Available {
    available: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'static str>,
}

impl Available {
    /// It is where some proxy or peer reports it.
    #[must_use]
    pub fn new(is_reported: bool) -> Self {
        let error = "neither a proxy nor a peer that reports load is connected";
        Self {
            available: is_reported,
            error: (!is_reported).then_some(error),
        }
    }
}

/// A pool in the answer of `/v1/workers`.
#[derive(Clone, Debug, Serialize)]
pub struct PoolReport {
    /// Its name.
    pub pool: String,
    /// Model names served.
    pub models: Vec<String>,
    /// LoRA adapters served.
    pub lora_adapters: Vec<String>,
    /// Tokens to a block.
    pub block_size: u32,
    /// Whether KV events are indexed.
    pub kv_events: bool,
    /// How a worker is chosen.
    pub policy: Policy,
    /// Its owners.
    pub owners: Vec<OwnerReport>,
}

/// An owner in the answer of `/v1/workers`.
#[derive(Clone, Debug, Serialize)]
pub struct OwnerReport {
    /// The worker.
    pub worker: WorkerId,
    /// Its data-parallel rank.
    pub rank: DpRank,
    /// Its number in the pages.
    pub slot: u16,
    /// Where it takes requests; `null` for one that is indexed alone.
    pub endpoint: Option<String>,
    /// What it does.
    pub role: Role,
    /// What it is said to be.
    pub metadata: Metadata,
    /// How it came to be known.
    pub source: Source,
    /// Whether it is to get no more requests.
    pub draining: bool,
    /// Whether it takes requests.
    pub accepting: bool,
    /// Blocks that it holds.
    pub blocks: usize,
    /// Id of its last event.
    pub last_event_id: Option<u64>,
    /// Times that events of it were lost.
    pub gaps: u64,
    /// Whether blocks may be missing or left over.
    pub partial: bool,
    /// How much of its cache is known.
    pub knowledge: Knowledge,
    /// Blocks that may be gone: they count for nothing until something vouches for them.
    pub doubtful: usize,
    /// Its worker's events.
    pub events: EventsReport,
    /// Whether its snapshot is awaited.
    pub repairing: bool,
    /// Its true load, over all proxies; `null` while none reports any.
    pub load: Option<LoadReport>,
    /// Requests on it, by proxy.
    pub requests: Vec<ProxyRequests>,
    /// Requests on it, by peer that announced them.
    pub peers: Vec<PeerRequests>,
}

/// What readiness rests on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Readiness {
    /// What is missing, empty when ready.
    pub missing: Vec<String>,
    /// Ranks by how much of their caches is known.
    pub ranks: Known,
}

impl Service {
    pub(super) fn report_index(&mut self) -> IndexReport {
        let subscribers = self.publisher.report();
        let is_idle = |s: &SubscriberReport| s.synced && s.queued_pages + s.unacked_batches == 0;
        IndexReport {
            epoch: self.epoch,
            table_version: self.table_version,
            ready: self.ready,
            restored: self.is_restored,
            bootstrapped: self.is_bootstrapped,
            settled: !self.index.is_dirty()
                && self.loads_at.is_none()
                && !subscribers.is_empty()
                && subscribers.iter().all(is_idle),
            repairs: self.roster.workers().filter(|w| w.repair.is_some()).count(),
            stats: self.index.stats(),
            counts: self.tally.counts(),
            subscribers,
        }
    }

    /// Whether some proxy or peer tells of load.
    pub(super) fn is_load_known(&self) -> bool {
        self.accounts.is_reported() || self.has_peers() || self.reservations.live() > 0
    }

    pub(super) fn report_workers(&self) -> WorkersReport {
        let requests = self.accounts.requests();
        let by_peer = self.peer_requests();
        let pools = (0_u16..).zip(&self.roster.pools);
        WorkersReport {
            load: Available::new(self.is_load_known()),
            pools: pools
                .map(|(number, pool)| self.report_pool(number, pool, &requests, &by_peer))
                .collect(),
            no_endpoint: self.strangers.report(Instant::now()),
        }
    }

    fn report_pool(
        &self,
        number: u16,
        pool: &roster::Pool,
        requests: &Requests<'_>,
        by_peer: &ByPeer,
    ) -> PoolReport {
        let is_reported = self.is_load_known();
        let of_owner = |owner: &OwnerKey| {
            let by_proxy = requests.get(owner).into_iter().flatten();
            by_proxy.map(|(proxy, requests)| ProxyRequests {
                proxy: ProxyId::clone(proxy),
                requests: *requests,
            })
        };
        let of_peers = |owner: &OwnerKey| {
            let by_peer = by_peer.get(owner).into_iter().flatten();
            by_peer.map(|(router_id, requests)| PeerRequests {
                router_id: *router_id,
                requests: *requests,
            })
        };
        let owners = pool.workers.values().flat_map(|worker| {
            let ids = worker.config.owners();
            worker.owners.iter().zip(ids).map(move |(owner, id)| {
                let key = OwnerKey { pool: number, id };
                OwnerReport {
                    worker: id.worker,
                    rank: id.rank,
                    slot: owner.slot.0,
                    endpoint: worker.config.endpoint.map(|e| e.to_string()),
                    role: worker.config.role,
                    metadata: worker.config.metadata.clone(),
                    source: worker.config.source,
                    draining: worker.config.draining,
                    accepting: worker.config.endpoint.is_some()
                        && !worker.config.draining
                        && self.ejection.is_in(id.worker),
                    blocks: self.index.owner_blocks(number.into(), owner.slot),
                    last_event_id: owner.dynamo.last.max(worker.json.last),
                    gaps: owner.gaps,
                    partial: owner.knowledge != Knowledge::Whole,
                    knowledge: owner.knowledge,
                    doubtful: self.doubtful(number.into(), owner.slot),
                    events: self.report_events(worker, id.rank, owner),
                    repairing: worker.repair.is_some(),
                    load: is_reported.then(|| self.accounts.load(&key).into()),
                    requests: of_owner(&key).collect(),
                    peers: of_peers(&key).collect(),
                }
            })
        });
        PoolReport {
            pool: pool.config.name.clone(),
            models: pool.config.models.clone(),
            lora_adapters: pool.config.lora_adapters.clone(),
            block_size: pool.config.block_size,
            kv_events: pool.config.kv_events,
            policy: pool.config.policy,
            owners: owners.collect(),
        }
    }

    pub(super) fn report_readiness(&self) -> Readiness {
        let mut missing = Vec::new();
        if !self.ready {
            missing.push("the index is being recovered".to_owned());
        }
        for plane in &self.planes {
            if !self.connected.contains(plane) {
                missing.push(format!("nats is not connected ({} plane)", plane.kind()));
            }
        }
        if !self.publisher.report().iter().any(|s| s.synced) {
            missing.push("no envoy holds all pages".to_owned());
        }
        if !self.is_staffed {
            let (there, wanted) = (self.workers_there(), self.min_initial_workers);
            missing.push(format!("{there} of {wanted} workers are there"));
        }
        Readiness {
            missing,
            ranks: self.known(),
        }
    }

    /// Workers that take requests.
    pub(super) fn workers_there(&self) -> usize {
        let pools = self.roster.pools.iter();
        let workers = pools.flat_map(|pool| pool.workers.values());
        let takes = |w: &&roster::Worker| w.config.endpoint.is_some() && !w.config.draining;
        workers.filter(takes).count()
    }

    /// Sizes into the metrics.
    pub(super) fn measure(&mut self) {
        let stats = self.index.stats();
        self.metrics.blocks.set(stats.blocks as i64);
        self.metrics.owner_blocks.set(stats.owner_blocks as i64);
        self.metrics.orphans.set(stats.orphans as i64);
        self.metrics.left_out_units.set(stats.left_out_units as i64);
        self.metrics.pages.set(i64::from(stats.pages));
        self.metrics.index_bytes.set(stats.bytes as i64);
        self.metrics.page_bytes.set(stats.envoy_bytes as i64);
        let evicted = &self.metrics.evicted;
        evicted.inc_by(stats.evicted_blocks.saturating_sub(evicted.get()));
        let owners = self.roster.workers().flat_map(|w| w.owners.iter());
        let partial = owners.filter(|o| o.knowledge != Knowledge::Whole).count();
        self.metrics.partial_owners.set(partial as i64);
        self.measure_load();
        self.measure_health();
    }

    fn measure_load(&self) {
        let metrics = &self.metrics;
        self.queues.measure();
        metrics.bookings.set(self.accounts.bookings() as i64);
        metrics.predicted.set(self.predicted() as i64);
        metrics.reservations.set(self.reservations.live() as i64);
        for (number, pool) in (0_u16..).zip(&self.tables) {
            for owner in &pool.owners {
                let key = OwnerKey {
                    pool: number,
                    id: owner.id,
                };
                let load = self.accounts.load(&key);
                let label = OfOwner {
                    pool: pool.name.clone(),
                    worker: owner.id.worker,
                    rank: owner.id.rank,
                };
                let gauge = |family: &Family<OfOwner, Gauge>, value: u64| {
                    let value = i64::try_from(value).unwrap_or(i64::MAX);
                    family.get_or_create(&label).set(value);
                };
                gauge(&metrics.active_blocks, load.blocks);
                gauge(&metrics.active_prefill_tokens, load.prefill_tokens);
                let requests = u64::from(load.waiting) + u64::from(load.decoding);
                gauge(&metrics.active_requests, requests);
            }
        }
    }

    /// Drops the gauges of owners, some of which have left.
    pub(super) fn forget_gauges(&self) {
        self.metrics.active_blocks.clear();
        self.metrics.active_prefill_tokens.clear();
        self.metrics.active_requests.clear();
        self.metrics.accuracy.clear();
    }
}
