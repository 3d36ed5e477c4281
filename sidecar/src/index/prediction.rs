//! Blocks of pools without KV events, and of workers whose events don't count, predicted from
//! bookings.

use kv_core::approximate::Approximate;
use kv_core::event::{EventData, Removed};
use kv_core::id::{Family, Slot, Tier};
use kv_core::index::Held;
use kv_core::report::OwnerKey;

use super::{Service, roster};

/// Predicted blocks of a pool, counted once for each owner.
const MAX_PREDICTED: usize = 1 << 21;
/// Blocks forgotten at a time.
const MAX_EXPIRED: usize = 20_000;

impl Service {
    /// Whether no events tell of an owner's blocks.
    pub(super) fn is_predicted(&self, owner: OwnerKey) -> bool {
        let pool = self.roster.pools.get(usize::from(owner.pool));
        let is_ill = |pool: &roster::Pool| {
            let worker = pool.workers.get(&owner.id.worker);
            worker.is_some_and(|worker| worker.health.ailment().is_some())
        };
        pool.is_some_and(|pool| !pool.config.kv_events || is_ill(pool))
    }

    /// A prompt goes to an owner: its blocks are taken to be there. Returns how many of its leading
    /// blocks were so already.
    pub(super) fn predict(&mut self, owner: OwnerKey, prompt: &[u64], now_ms: u64) -> usize {
        let number = usize::from(owner.pool);
        let Some(slot) = self.slot_of(owner) else {
            return 0;
        };
        let approximate = self.predictions.entry(number);
        let approximate = approximate.or_insert_with(|| Approximate::new(MAX_PREDICTED));
        let known = approximate.insert(slot, prompt, now_ms);
        let parents = std::iter::once(None).chain(prompt.iter().map(|hash| Some(*hash)));
        let blocks = parents.zip(prompt).skip(known);
        let held: Vec<Held> = blocks
            .map(|(parent, hash)| Held {
                family: Family::Dynamo,
                sequence: *hash,
                parent,
                name: Some(predicted_name(*hash)),
                tiers: 1 << Tier::Device.index(),
            })
            .collect();
        // Too many in all: the longest unused go.
        let excess: Vec<_> = std::iter::from_fn(|| approximate.expire(0)).collect();
        self.index.restore(number, slot, &held);
        self.unpredict(number, &excess);
        known
    }

    /// Blocks, in the order of the prompt, that an owner has not got after all.
    pub(super) fn take_back(&mut self, owner: OwnerKey, blocks: &[u64]) {
        let number = usize::from(owner.pool);
        let Some(slot) = self.slot_of(owner) else {
            return;
        };
        let Some(approximate) = self.predictions.get_mut(&number) else {
            return;
        };
        let last_first = blocks.iter().rev();
        let there = last_first.filter(|hash| approximate.remove(slot, **hash));
        let there: Vec<_> = there.map(|hash| (slot, *hash)).collect();
        self.unpredict(number, &there);
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
        for (number, approximate) in &mut self.predictions {
            let Some(pool) = self.roster.pools.get(*number) else {
                continue;
            };
            let before_ms = now_ms.saturating_sub(pool.config.ttl_ms);
            let blocks = std::iter::from_fn(|| approximate.expire(before_ms));
            expired.push((*number, blocks.take(MAX_EXPIRED).collect::<Vec<_>>()));
        }
        for (number, blocks) in expired {
            self.unpredict(number, &blocks);
        }
    }

    fn unpredict(&mut self, pool: usize, blocks: &[(Slot, u64)]) {
        for (slot, hash) in blocks {
            let removed = EventData::Removed(Removed {
                block_hashes: vec![predicted_name(*hash)],
            });
            self.index.apply(pool, *slot, Tier::Device, &removed);
        }
    }

    /// Forgets what was predicted for an owner.
    pub(super) fn unpredict_owner(&mut self, pool: usize, slot: Slot) {
        let approximate = self.predictions.get_mut(&pool);
        let blocks = approximate.map_or_else(Vec::new, |a| a.remove_owner(slot));
        let blocks: Vec<_> = blocks.into_iter().map(|hash| (slot, hash)).collect();
        self.unpredict(pool, &blocks);
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
