//! Pools, workers and owners: who is in the configuration, with what slot, heard up to where.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use kv_core::family::Scheme;
use kv_core::id::{DpRank, Family, OwnerId, Role, Slot, WorkerId};
use kv_core::table::{self, Traits};
use tokio::time::Instant;

use super::cursor::Cursor;
use super::health::{self, Health};
use super::knowledge::{Knowledge, Source, Stream};
use super::repair::Repair;
use super::slots::Slots;
use crate::config;
use crate::ejection::Ejection;

/// A pool with its workers.
#[derive(Debug)]
pub(super) struct Pool {
    /// What the configuration says.
    pub(super) config: config::Pool,
    /// Secret of its pages.
    pub(super) key: u64,
    /// Slots of its owners.
    pub(super) slots: Slots,
    /// Workers by id.
    pub(super) workers: BTreeMap<WorkerId, Worker>,
}

/// A worker and what is known of its events.
#[derive(Debug)]
pub(super) struct Worker {
    /// What the configuration says.
    pub(super) config: config::Worker,
    /// Ids of its events on the JSON plane, which numbers them per worker.
    pub(super) json: Cursor,
    /// Snapshot under way.
    pub(super) repair: Option<Repair>,
    /// Before this it is not asked for a snapshot again.
    pub(super) ask_from: Option<Instant>,
    /// Where its events come from.
    pub(super) source: Source,
    /// Its own streams, by number.
    pub(super) streams: BTreeMap<u32, Stream>,
    /// Whether its events agree with what it does.
    pub(super) health: Health,
    /// Since when it takes requests, Unix milliseconds; 0 for one that was there at the start.
    pub(super) since_ms: u64,
    /// Owners, by rank.
    pub(super) owners: Vec<Owner>,
}

/// One rank of a worker.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Owner {
    /// Its slot.
    pub(super) slot: Slot,
    /// Ids of its events on Dynamo's plane, which numbers them per rank.
    pub(super) dynamo: Cursor,
    /// Times that events were lost.
    pub(super) gaps: u64,
    /// How much of its cache is known.
    pub(super) knowledge: Knowledge,
    /// When its last event was applied.
    pub(super) heard: Option<Instant>,
    /// Prompt tokens that it prefills in a second, as proxies are told; 0 where not known.
    pub(super) prefill_rate: u32,
    /// Nanoseconds that it takes to prefill a token, as proxies are told; 0 where not known.
    pub(super) prefill_ns_per_token: u32,
}

impl Owner {
    fn new(slot: Slot) -> Self {
        Self {
            slot,
            dynamo: Cursor::default(),
            gaps: 0,
            knowledge: Knowledge::Unknown,
            heard: None,
            prefill_rate: 0,
            prefill_ns_per_token: 0,
        }
    }
}

/// What a change of the configuration did.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Change {
    /// Owners that are gone: pool and slot.
    pub(super) removed: Vec<(usize, Slot)>,
    /// Workers that are there for the first time.
    pub(super) joined: Vec<WorkerId>,
    /// Owners for which no slot was left.
    pub(super) without_slot: Vec<OwnerId>,
}

/// All pools, by number.
#[derive(Debug, Default)]
pub(super) struct Roster {
    /// The pools.
    pub(super) pools: Vec<Pool>,
    pool_of: HashMap<WorkerId, usize>,
}

impl Roster {
    /// Adds a pool without workers.
    pub(super) fn add(&mut self, config: config::Pool, key: u64, slots: Slots) {
        self.pools.push(Pool {
            config,
            key,
            slots,
            workers: BTreeMap::new(),
        });
    }

    /// Brings workers and policies in line with a configuration of the same pools.
    pub(super) fn update(&mut self, pools: &[config::Pool]) -> Change {
        let mut change = Change::default();
        for (number, (pool, config)) in self.pools.iter_mut().zip(pools).enumerate() {
            if pool.config.reads_otherwise(config) {
                pool.forget(number, &mut change);
            }
            pool.config = config.clone();
            pool.update(number, &mut change);
        }
        let workers = |(number, pool): (usize, &Pool)| {
            let ids: Vec<_> = pool.workers.keys().map(|id| (*id, number)).collect();
            ids
        };
        self.pool_of = self.pools.iter().enumerate().flat_map(workers).collect();
        change
    }

    /// A worker and the number of its pool.
    pub(super) fn worker(&mut self, id: WorkerId) -> Option<(usize, &mut Worker)> {
        let pool = *self.pool_of.get(&id)?;
        let worker = self.pools.get_mut(pool)?.workers.get_mut(&id)?;
        Some((pool, worker))
    }

    /// All workers.
    pub(super) fn workers(&mut self) -> impl Iterator<Item = &mut Worker> {
        self.pools.iter_mut().flat_map(|p| p.workers.values_mut())
    }

    /// The worker table, without epoch, version and settings. Pools that take no requests come last
    /// and are no part of it.
    #[must_use]
    pub(super) fn table_pools(&self, ejection: &Ejection) -> Vec<table::Pool> {
        let routed = |pool: &&Pool| pool.config.routing_group.is_none();
        self.pools
            .iter()
            .take_while(routed)
            .map(|pool| pool.table(ejection))
            .collect()
    }

    /// All pools, with the owners of workers that take no requests of Envoy, without an endpoint.
    /// Where there are none, they are those of the worker table.
    pub(super) fn selectable_pools(
        &self,
        ejection: &Ejection,
        tables: &[Arc<table::Pool>],
    ) -> Vec<Arc<table::Pool>> {
        let pools = self.pools.iter().enumerate();
        let whole = pools.map(|(number, pool)| {
            let is_routed = |worker: &Worker| worker.config.endpoint.is_some();
            match tables.get(number) {
                Some(table) if pool.workers.values().all(is_routed) => Arc::clone(table),
                _ => Arc::new(pool.whole_table(ejection)),
            }
        });
        whole.collect()
    }
}

impl Pool {
    /// Lets all workers leave: what is known of their blocks no longer holds.
    fn forget(&mut self, number: usize, change: &mut Change) {
        let mut gone: Vec<OwnerId> = self.slots.owners().collect();
        gone.sort_unstable();
        for owner in gone {
            change
                .removed
                .extend(self.slots.free(owner).map(|slot| (number, slot)));
        }
        self.workers.clear();
    }

    fn update(&mut self, number: usize, change: &mut Change) {
        let wanted: HashMap<OwnerId, ()> = self
            .config
            .workers
            .iter()
            .flat_map(config::Worker::owners)
            .map(|owner| (owner, ()))
            .collect();
        let mut gone: Vec<OwnerId> = self
            .slots
            .owners()
            .filter(|owner| !wanted.contains_key(owner))
            .collect();
        gone.sort_unstable();
        for owner in gone {
            change
                .removed
                .extend(self.slots.free(owner).map(|slot| (number, slot)));
        }
        let mut before = std::mem::take(&mut self.workers);
        for config in &self.config.workers {
            let old = before.remove(&config.id);
            if old.is_none() {
                change.joined.push(config.id);
            }
            let mut owners = Vec::new();
            for id in config.owners() {
                let Some(slot) = self.slots.assign(id) else {
                    change.without_slot.push(id);
                    continue;
                };
                let known = old.as_ref().and_then(|w| w.owner(id.rank));
                owners.push(known.copied().unwrap_or_else(|| Owner::new(slot)));
            }
            let worker = match old {
                Some(old) => Worker { owners, ..old },
                None => Worker::new(config, owners),
            };
            let worker = worker.configured(config);
            self.workers.insert(config.id, worker);
        }
    }

    /// The pool in the worker table.
    #[must_use]
    pub(super) fn table(&self, ejection: &Ejection) -> table::Pool {
        let mut table = self.whole_table(ejection);
        table.owners.retain(|owner| !owner.endpoint.is_empty());
        table
    }

    /// The same with owners that have no endpoint.
    fn whole_table(&self, ejection: &Ejection) -> table::Pool {
        let workers = self.workers.values();
        let owners = workers.flat_map(|worker| {
            let is_in = ejection.is_in(worker.config.id);
            worker.table(is_in && !worker.config.draining)
        });
        let mut owners: Vec<table::Owner> = owners.collect();
        owners.sort_unstable_by_key(|owner| owner.slot);
        let is_store = |worker: &&Worker| worker.config.role == Role::Store;
        let stores = self.workers.values().filter(is_store);
        let stores = stores.flat_map(|worker| worker.owners.iter().map(|owner| owner.slot));
        let families = self.config.families.iter().map(|used| Scheme {
            family: used.family,
            block_size: used.block_size,
            hash_seed: used.hash_seed.clone(),
        });
        let predicts = self.config.kv_events && self.config.predicted_ttl_ms.is_some();
        let predicted = predicts.then(|| Scheme {
            family: Family::Predicted,
            block_size: self.config.block_size,
            hash_seed: String::new(),
        });
        table::Pool {
            name: self.config.name.clone(),
            key: self.key,
            models: self.config.models.clone(),
            lora_adapters: self.config.lora_adapters.clone(),
            block_size: self.config.block_size,
            families: families.chain(predicted).collect(),
            policy: self.config.policy,
            owners,
            trusts_hints: self.config.trusts_hints,
            trusted_sources: self.config.trusted_sources.clone(),
            affinity: self.config.affinity.clone(),
            device_ratio: self.config.device_ratio,
            slow_start_ms: self.config.slow_start_ms,
            stores: stores.collect(),
            text: self.config.tokenizer.as_ref().map(|t| t.budget),
            queue: self.config.queue.clone(),
            overload: self.config.overload,
            refusing: self.config.refusing,
            // Chunks are what is predicted, and events tell of none.
            chunks: self.config.tokenizer.is_none() && !self.config.kv_events,
            handover: self
                .config
                .tokenizer
                .as_ref()
                .map(|t| t.handover)
                .unwrap_or_default(),
        }
    }
}

impl Worker {
    fn new(config: &config::Worker, owners: Vec<Owner>) -> Self {
        Self {
            config: config.clone(),
            json: Cursor::default(),
            repair: None,
            ask_from: None,
            source: Source::default(),
            streams: BTreeMap::new(),
            health: Health::default(),
            since_ms: 0,
            owners,
        }
    }

    /// Whether its own stream has said how complete it is, for every rank.
    pub(super) fn is_told(&self) -> bool {
        let is_told = |owner: &Owner| owner.knowledge != Knowledge::Unknown;
        self.owners.iter().all(is_told)
    }

    /// Sets how much is known of all ranks.
    pub(super) fn know(&mut self, knowledge: Knowledge) {
        for owner in &mut self.owners {
            owner.knowledge = knowledge;
        }
    }

    /// An event of a rank is about to be applied.
    pub(super) fn hear(&mut self, rank: DpRank, at: Instant) -> Option<health::Change> {
        if let Some(owner) = self.owner_mut(rank) {
            owner.heard = Some(at);
        }
        self.health.heard(at)
    }

    fn configured(mut self, config: &config::Worker) -> Self {
        self.source.configure(config.events.as_ref());
        if self.config.events != config.events {
            // Another source numbers its messages in another way.
            self.streams.clear();
        }
        self.config = config.clone();
        self
    }

    /// The owner of a rank.
    #[must_use]
    pub(super) fn owner(&self, rank: DpRank) -> Option<&Owner> {
        self.owners.get(usize::try_from(rank).ok()?)
    }

    /// The owner of a rank.
    pub(super) fn owner_mut(&mut self, rank: DpRank) -> Option<&mut Owner> {
        self.owners.get_mut(usize::try_from(rank).ok()?)
    }

    fn table(&self, accepting: bool) -> impl Iterator<Item = table::Owner> {
        let ids = self.config.owners();
        let owners = self.owners.iter().zip(ids);
        let endpoint = self.config.endpoint.map(|endpoint| endpoint.to_string());
        owners.map(move |(owner, id)| table::Owner {
            slot: owner.slot,
            id,
            role: self.config.role,
            endpoint: endpoint.clone().unwrap_or_default(),
            accepting,
            traits: Traits {
                device: self.config.device,
                prefill_rate: owner.prefill_rate,
                prefill_ns_per_token: owner.prefill_ns_per_token,
                since_ms: self.since_ms,
            },
            metadata: self.config.metadata.clone(),
        })
    }
}
