//! Blocks of pools without KV events, of workers whose events don't count, and of prompts that are
//! under way beside events, predicted from bookings.

use std::collections::{BTreeMap, HashSet};

use kv_core::approximate::Approximate;
use kv_core::event::{EventData, Removed};
use kv_core::id::{Family, Slot, Tier, WorkerId};
use kv_core::index::Held;
use kv_core::report::OwnerKey;

use super::Service;
use crate::config::{self, CachePolicy};

/// Predicted blocks of a pool, counted once for each owner.
const MAX_PREDICTED: usize = 1 << 21;
/// Blocks forgotten at a time.
const MAX_EXPIRED: usize = 20_000;

/// Predictions by pool and the family that they are kept in.
pub(super) type Predictions = BTreeMap<(usize, Family), Approximate>;

/// Where and how long the blocks of prompts that go to an owner are believed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Belief {
    family: Family,
    ttl_ms: u64,
}

/// Beside events, predictions have a family of their own: what events say of a block is true
/// whatever was predicted of it.
fn beliefs(pool: &config::Pool) -> [Belief; 2] {
    [
        Belief {
            family: Family::Dynamo,
            ttl_ms: pool.ttl_ms,
        },
        Belief {
            family: Family::Predicted,
            ttl_ms: pool.predicted_ttl_ms.unwrap_or(0),
        },
    ]
}

impl Service {
    /// Whether the prompts that go to an owner tell of its blocks.
    pub(super) fn is_predicted(&self, owner: OwnerKey) -> bool {
        self.prediction_family(owner).is_some()
    }

    /// The family in which blocks are predicted for an owner.
    fn prediction_family(&self, owner: OwnerKey) -> Option<Family> {
        let pool = self.roster.pools.get(usize::from(owner.pool))?;
        if pool.config.kv_events && pool.config.predicted_ttl_ms.is_some() {
            return Some(Family::Predicted);
        }
        let worker = pool.workers.get(&owner.id.worker);
        let is_ill = worker.is_some_and(|worker| worker.health.ailment().is_some());
        (!pool.config.kv_events || is_ill).then_some(Family::Dynamo)
    }

    /// Blocks that a rank of a worker has room for, where that is what it forgets by.
    fn room(&self, pool: usize, worker: WorkerId) -> Option<usize> {
        let pool = self.roster.pools.get(pool)?;
        let blocks = pool.workers.get(&worker)?.config.metadata.total_kv_blocks;
        let is_known = pool.config.cache_policy == CachePolicy::Lru && blocks > 0;
        usize::try_from(blocks).ok().filter(|_| is_known)
    }

    /// A prompt goes to an owner: its blocks are taken to be there. Returns how many of its leading
    /// blocks were so already.
    pub(super) fn predict(&mut self, owner: OwnerKey, prompt: &[u64], now_ms: u64) -> usize {
        let number = usize::from(owner.pool);
        let (Some(slot), Some(family)) = (self.slot_of(owner), self.prediction_family(owner))
        else {
            return 0;
        };
        let room = self.room(number, owner.id.worker);
        let approximate = self.predictions.entry((number, family));
        let approximate = approximate.or_insert_with(|| Approximate::new(MAX_PREDICTED));
        let known = approximate.insert(slot, prompt, now_ms);
        let parents = std::iter::once(None).chain(prompt.iter().map(|hash| Some(*hash)));
        let blocks = parents.zip(prompt).skip(known);
        let held: Vec<Held> = blocks
            .map(|(parent, hash)| Held {
                family,
                sequence: *hash,
                parent,
                name: Some(predicted_name(*hash)),
                tiers: 1 << Tier::Device.index(),
            })
            .collect();
        // Too many in all: the longest unused go.
        let excess = std::iter::from_fn(|| approximate.expire(0, |_| true));
        let mut excess: Vec<_> = excess.collect();
        if let Some(room) = room {
            let tracker = self.accounts.tracker();
            let is_used = |hash| tracker.uses(&owner, hash) > 0;
            let evicted = approximate.evict(slot, room, is_used);
            excess.extend(evicted.into_iter().map(|hash| (slot, hash)));
        }
        self.index.restore(number, slot, &held);
        self.unpredict((number, family), &excess);
        known
    }

    /// Blocks, in the order of the prompt, that an owner has not got after all.
    pub(super) fn take_back(&mut self, owner: OwnerKey, blocks: &[u64]) {
        let number = usize::from(owner.pool);
        let Some(slot) = self.slot_of(owner) else {
            return;
        };
        for family in [Family::Dynamo, Family::Predicted] {
            let Some(approximate) = self.predictions.get_mut(&(number, family)) else {
                continue;
            };
            let last_first = blocks.iter().rev();
            let there = last_first.filter(|hash| approximate.remove(slot, **hash));
            let there: Vec<_> = there.map(|hash| (slot, *hash)).collect();
            self.unpredict((number, family), &there);
        }
    }

    fn slot_of(&self, owner: OwnerKey) -> Option<Slot> {
        let owners = &self.selectable.get(usize::from(owner.pool))?.owners;
        let known = owners.iter().find(|o| o.id == owner.id)?;
        Some(known.slot)
    }

    /// Forgets blocks that have not been used for too long.
    pub(super) fn expire_predictions(&mut self) {
        let now_ms = self.now_ms();
        let mut expired = Vec::new();
        for ((number, family), approximate) in &mut self.predictions {
            let Some(pool) = self.roster.pools.get(*number) else {
                continue;
            };
            let beliefs = beliefs(&pool.config).into_iter();
            let ttl_ms = beliefs.filter(|b| b.family == *family).map(|b| b.ttl_ms);
            let before_ms = now_ms.saturating_sub(ttl_ms.max().unwrap_or(0));
            // Owners that forget what they have no room for don't forget for age.
            let roomy = pool.workers.values().filter(|worker| {
                let is_known = worker.config.metadata.total_kv_blocks > 0;
                pool.config.cache_policy == CachePolicy::Lru && is_known
            });
            let roomy = roomy.flat_map(|worker| worker.owners.iter().map(|owner| owner.slot));
            let roomy: HashSet<Slot> = roomy.collect();
            let is_timed = |slot| *family == Family::Predicted || !roomy.contains(&slot);
            let blocks = std::iter::from_fn(|| approximate.expire(before_ms, is_timed));
            let blocks: Vec<_> = blocks.take(MAX_EXPIRED).collect();
            expired.push(((*number, *family), blocks));
        }
        for (place, blocks) in expired {
            self.unpredict(place, &blocks);
        }
    }

    fn unpredict(&mut self, (pool, family): (usize, Family), blocks: &[(Slot, u64)]) {
        for (slot, hash) in blocks {
            let removed = EventData::Removed(Removed {
                block_hashes: vec![predicted_name(*hash)],
            });
            self.index
                .apply_family(pool, family, *slot, Tier::Device, &removed);
        }
    }

    /// Forgets what was predicted for an owner.
    pub(super) fn unpredict_owner(&mut self, pool: usize, slot: Slot) {
        for family in [Family::Dynamo, Family::Predicted] {
            let approximate = self.predictions.get_mut(&(pool, family));
            let blocks = approximate.map_or_else(Vec::new, |a| a.remove_owner(slot));
            let blocks: Vec<_> = blocks.into_iter().map(|hash| (slot, hash)).collect();
            self.unpredict((pool, family), &blocks);
        }
    }

    /// An owner's blocks are gone from the index, predicted ones among them.
    pub(super) fn forget_predictions(&mut self, pool: usize, slot: Slot) {
        let of_pool = self.predictions.iter_mut().filter(|((p, _), _)| *p == pool);
        for (_, approximate) in of_pool {
            approximate.remove_owner(slot);
        }
    }

    /// Predicted blocks, over all pools.
    pub(super) fn predicted(&self) -> usize {
        self.predictions.values().map(Approximate::len).sum()
    }
}

/// Name of a predicted block, apart from those of engines that name blocks by their sequence hash.
fn predicted_name(hash: u64) -> u64 {
    !hash
}
