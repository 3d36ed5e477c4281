//! What of an owner's blocks counts after events about them were lost.

use kv_core::event::EventData;
use kv_core::id::{DpRank, Family, Slot, Tier, WorkerId};

use super::Service;
use super::doubt::Doubt;
use super::knowledge::Knowledge;

/// Blocks that one lost event or message is taken to have removed.
const REMOVED_BY_ONE: u64 = 16;
/// An owner's blocks stay where no more than one in so many can be gone: a few that are there no
/// more cost less than forgetting all.
const ONE_IN: u64 = 8;

impl Service {
    /// Drops all that is known of an owner's blocks.
    pub(super) fn drop_blocks(&mut self, pool: usize, slot: Slot) {
        self.index.remove_owner(pool, slot);
        self.doubts.remove(&(pool, slot));
        self.forget_predictions(pool, slot);
    }

    /// So many events of an owner are lost and nobody has them any more; 0 where their number is
    /// not known.
    pub(super) fn lost(&mut self, id: WorkerId, rank: DpRank, missing: u64) {
        let Some((pool, worker)) = self.roster.worker(id) else {
            return;
        };
        let Some(owner) = worker.owner_mut(rank) else {
            return;
        };
        owner.gaps += 1;
        owner.knowledge = Knowledge::Partial;
        let slot = owner.slot;
        self.count_gap(pool);
        self.put_in_doubt(pool, slot, missing);
    }

    /// Sets an owner's blocks aside, unless so little is missing that most of them are there.
    pub(super) fn put_in_doubt(&mut self, pool: usize, slot: Slot, missing: u64) {
        let held = self.index.owner_blocks(pool, slot) as u64;
        let removed = missing.saturating_mul(REMOVED_BY_ONE);
        if missing == 0 || removed.saturating_mul(ONE_IN) > held {
            self.set_aside(pool, slot);
        }
    }

    /// Lets an owner's blocks count for nothing until something vouches for them.
    pub(super) fn set_aside(&mut self, pool: usize, slot: Slot) {
        self.unpredict_owner(pool, slot);
        let blocks = self.index.dump(pool, slot);
        if blocks.is_empty() {
            return;
        }
        self.index.remove_owner(pool, slot);
        self.doubts.entry((pool, slot)).or_default().add(blocks);
    }

    /// Nothing about an owner's blocks is in doubt any more.
    pub(super) fn trust(&mut self, pool: usize, slot: Slot) {
        if let Some(doubt) = self.doubts.remove(&(pool, slot)) {
            self.index.restore(pool, slot, &doubt.to_blocks());
        }
    }

    /// What a change that is about to be applied says about blocks in doubt. How many of those it
    /// removes were.
    pub(super) fn vouch(
        &mut self,
        pool: usize,
        family: Family,
        slot: Slot,
        tier: Option<Tier>,
        data: &EventData,
    ) -> u32 {
        // Hardly ever is there any.
        let Some(doubt) = self.doubts.get_mut(&(pool, slot)) else {
            return 0;
        };
        let mut removed = 0;
        match data {
            EventData::Stored(stored) => {
                let chain = stored
                    .parent_hash
                    .map(|parent| doubt.vouch_for_name(family, parent));
                for block in &stored.blocks {
                    doubt.forget(family, block.block_hash);
                }
                self.index.restore(pool, slot, &chain.unwrap_or_default());
            }
            EventData::Removed(gone) => {
                let tier = tier.unwrap_or_default();
                let was_there = |hash: &&u64| doubt.remove(family, **hash, tier);
                removed = gone.block_hashes.iter().filter(was_there).count();
            }
            EventData::Cleared => match tier {
                Some(tier) => doubt.clear_tier(tier),
                None => *doubt = Doubt::default(),
            },
        }
        self.drop_empty_doubt(pool, slot);
        u32::try_from(removed).unwrap_or(u32::MAX)
    }

    /// An owner was found to hold a prompt's blocks.
    pub(super) fn vouch_for_prompt(&mut self, pool: usize, slot: Slot, prompt: &[u64]) {
        let Some(doubt) = self.doubts.get_mut(&(pool, slot)) else {
            return;
        };
        let chains = prompt
            .iter()
            .flat_map(|hash| doubt.vouch_for(Family::Dynamo, *hash));
        let chain: Vec<_> = chains.collect();
        self.index.restore(pool, slot, &chain);
        self.drop_empty_doubt(pool, slot);
    }

    fn drop_empty_doubt(&mut self, pool: usize, slot: Slot) {
        if self.doubts.get(&(pool, slot)).is_some_and(|d| d.len() == 0) {
            self.doubts.remove(&(pool, slot));
        }
    }
}
