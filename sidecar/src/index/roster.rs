//! Pools, workers and owners: who is in the configuration, with what slot, heard up to where.

use std::collections::{BTreeMap, HashMap};

use kv_core::id::{DpRank, OwnerId, Slot, WorkerId};
use kv_core::table::{self, Traits};
use tokio::time::Instant;

use super::cursor::Cursor;
use super::repair::Repair;
use super::slots::Slots;
use crate::config;
use crate::health::Health;

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
    /// Jumps in the ids.
    pub(super) gaps: u64,
    /// Whether blocks may be missing or left over.
    pub(super) partial: bool,
    /// Prompt tokens that it prefills in a second, as proxies are told; 0 where not known.
    pub(super) prefill_rate: u32,
}

impl Owner {
    fn new(slot: Slot) -> Self {
        Self {
            slot,
            dynamo: Cursor::default(),
            gaps: 0,
            partial: true,
            prefill_rate: 0,
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

    /// The worker table, without epoch, version and settings.
    #[must_use]
    pub(super) fn table_pools(&self, health: &Health) -> Vec<table::Pool> {
        self.pools.iter().map(|pool| pool.table(health)).collect()
    }
}

impl Pool {
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
            let (json, repair, ask_from) =
                old.map_or_else(Default::default, |w| (w.json, w.repair, w.ask_from));
            let worker = Worker {
                config: *config,
                json,
                repair,
                ask_from,
                owners,
            };
            self.workers.insert(config.id, worker);
        }
    }

    /// The pool in the worker table.
    #[must_use]
    pub(super) fn table(&self, health: &Health) -> table::Pool {
        let workers = self.workers.values();
        let owners = workers.flat_map(|worker| worker.table(health.is_in(worker.config.id)));
        let mut owners: Vec<table::Owner> = owners.collect();
        owners.sort_unstable_by_key(|owner| owner.slot);
        table::Pool {
            name: self.config.name.clone(),
            key: self.key,
            models: self.config.models.clone(),
            lora_adapters: self.config.lora_adapters.clone(),
            block_size: self.config.block_size,
            policy: self.config.policy,
            owners,
            trusts_hints: self.config.trusts_hints,
            device_ratio: self.config.device_ratio,
            text: self.config.tokenizer.as_ref().map(|t| t.budget),
        }
    }
}

impl Worker {
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
        self.owners
            .iter()
            .zip(ids)
            .map(move |(owner, id)| table::Owner {
                slot: owner.slot,
                id,
                role: self.config.role,
                endpoint: self.config.endpoint.to_string(),
                accepting,
                traits: Traits {
                    device: self.config.device,
                    prefill_rate: owner.prefill_rate,
                },
            })
    }
}
