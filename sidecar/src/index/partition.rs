//! Partitions: what the standalone indexer calls the workers of a model in a routing group. Each
//! is a pool; those made at run time take no requests.

use std::collections::{HashMap, HashSet};

use kv_core::event::{EventData, KvCacheEvent, RouterEvent, StorageTier, Stored, StoredBlock};
use kv_core::id::{Family, OwnerId, Slot, Tier};
use kv_core::overlap::Overlap;

use super::{Service, Slots, random_u64};
use crate::config::Config;
use crate::indexer::{DEFAULT_GROUP, model_of};

/// A partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Number of its pool.
    pub pool: usize,
    /// Models that it goes by, the first one in dumps.
    pub models: Vec<String>,
    /// Routing group.
    pub group: String,
    /// Tokens to a block.
    pub block_size: u32,
    /// Its owners.
    pub owners: Vec<OwnerId>,
}

impl Partition {
    /// Whether it is that of a model in a routing group.
    #[must_use]
    pub fn is(&self, model: &str, group: &str) -> bool {
        self.group == group && self.models.iter().any(|name| name == model)
    }
}

impl Service {
    /// Pools that workers have registered for. They come after those of the configuration.
    pub(super) fn add_pools(&mut self, config: &Config) {
        for pool in config.pools.iter().skip(self.roster.pools.len()) {
            let key = random_u64();
            self.index.add_pool(key);
            self.roster.add(pool.clone(), key, Slots::default());
        }
    }

    /// All of them; one that was made at run time and that nobody is left in is none.
    pub(super) fn partitions(&self) -> Vec<Partition> {
        let pools = self.roster.pools.iter().enumerate();
        let partition = |(number, pool): (usize, &super::roster::Pool)| {
            let config = &pool.config;
            let group = config.routing_group.clone();
            if group.is_some() && pool.workers.is_empty() {
                return None;
            }
            let mut models = config.models.clone();
            if models.is_empty() {
                models.push(model_of(config).to_owned());
            }
            let workers = pool.workers.values();
            let mut owners: Vec<OwnerId> = workers.flat_map(|w| w.config.owners()).collect();
            owners.sort_unstable();
            Some(Partition {
                pool: number,
                models,
                group: group.unwrap_or_else(|| DEFAULT_GROUP.to_owned()),
                block_size: config.block_size,
                owners,
            })
        };
        pools.filter_map(partition).collect()
    }

    /// What the owners of a pool hold of a prompt; those that hold nothing are left out.
    pub(super) fn held(&self, pool: usize, prompt: &[u64]) -> Vec<(OwnerId, Overlap)> {
        let owners: HashMap<Slot, OwnerId> = self.slots_of(pool).map(|(o, s)| (s, o)).collect();
        let overlaps = self.index.overlaps(pool, prompt);
        let named = overlaps
            .into_iter()
            .filter_map(|(slot, overlap)| Some((*owners.get(&slot)?, overlap)));
        named.collect()
    }

    /// All blocks of an owner whose tokens' hash is known, parents first.
    pub(super) fn stores(&self, pool: usize, owner: OwnerId) -> Vec<RouterEvent> {
        let slot = self.slots_of(pool).find(|(id, _)| *id == owner);
        let (Some((_, slot)), Some(tokens)) = (slot, &self.tokens) else {
            return Vec::new();
        };
        let dump = self.index.dump(pool, slot);
        let mut names: HashMap<u64, u64> = HashMap::new();
        let mut stores = Vec::new();
        for held in dump.iter().filter(|held| held.family == Family::Dynamo) {
            let Some((name, tokens_hash)) = held.name.zip(tokens.of(pool, held)) else {
                continue;
            };
            names.insert(held.sequence, name);
            // What hangs on a block that isn't told can't be told.
            let parent_hash = match held.parent.map(|parent| names.get(&parent)) {
                None => None,
                Some(Some(parent)) => Some(*parent),
                Some(None) => continue,
            };
            let block = StoredBlock {
                block_hash: name,
                tokens_hash,
                mm_extra_info: None,
            };
            let stored = Stored {
                parent_hash,
                start_position: None,
                blocks: vec![block],
            };
            let tiers = Tier::ALL.into_iter();
            for tier in tiers.filter(|tier| held.tiers & (1 << tier.index()) != 0) {
                stores.push(RouterEvent {
                    worker_id: owner.worker,
                    storage_tier: StorageTier::from(tier),
                    residency_domain: Some("worker".to_owned()),
                    event: KvCacheEvent {
                        event_id: stores.len() as u64,
                        data: EventData::Stored(stored.clone()),
                        dp_rank: owner.rank,
                    },
                    session_id: None,
                });
            }
        }
        stores
    }

    /// Forgets the hashes of blocks that nobody holds.
    pub(super) fn sweep_tokens(&mut self) {
        let held = self.index.stats().owner_blocks;
        let is_crowded = |tokens: &mut super::tokens::Tokens| tokens.is_crowded(held);
        if !self.tokens.as_mut().is_some_and(is_crowded) {
            return;
        }
        let mut names: HashSet<(usize, u64)> = HashSet::new();
        for pool in 0..self.roster.pools.len() {
            for (_, slot) in self.slots_of(pool) {
                let mut dump = self.index.dump(pool, slot);
                dump.retain(|held| held.family == Family::Dynamo);
                names.extend(dump.iter().filter_map(|held| Some((pool, held.name?))));
            }
        }
        if let Some(tokens) = &mut self.tokens {
            tokens.retain(&names);
        }
    }

    /// Owners of a pool with their slots.
    fn slots_of(&self, pool: usize) -> impl Iterator<Item = (OwnerId, Slot)> + '_ {
        let workers = self.roster.pools.get(pool).into_iter();
        let workers = workers.flat_map(|pool| pool.workers.values());
        workers.flat_map(|worker| {
            let slots = worker.owners.iter().map(|owner| owner.slot);
            worker.config.owners().zip(slots)
        })
    }
}
