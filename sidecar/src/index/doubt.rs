//! Blocks of an owner that may be gone, because events about them were lost.
//!
//! They count for nothing until something vouches for them: a store below one, for an engine keeps
//! the blocks that a running prompt stands on, or an answer whose worker found them in its cache.

use std::collections::HashMap;

use kv_core::id::{Family, Tier};
use kv_core::index::{Held, parents_first};

/// Blocks set aside.
#[derive(Clone, Debug, Default)]
pub(super) struct Doubt {
    /// By family and sequence hash, one for each name; links have none.
    blocks: HashMap<(Family, u64), Vec<Held>>,
    /// Sequence hashes by family and name.
    names: HashMap<(Family, u64), u64>,
}

impl Doubt {
    /// Sets blocks aside.
    pub(super) fn add(&mut self, blocks: Vec<Held>) {
        for block in blocks {
            if let Some(name) = block.name {
                self.forget(block.family, name);
                self.names.insert((block.family, name), block.sequence);
            }
            let blocks = self.blocks.entry((block.family, block.sequence));
            blocks.or_default().push(block);
        }
    }

    /// Blocks, without links.
    pub(super) fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether a block of Dynamo's family is among them.
    pub(super) fn has(&self, sequence: u64) -> bool {
        let blocks = self.blocks.get(&(Family::Dynamo, sequence));
        blocks.is_some_and(|blocks| blocks.iter().any(|block| block.name.is_some()))
    }

    /// The block of this name is there, and with it those before it: they are taken out, parents
    /// first.
    pub(super) fn vouch_for_name(&mut self, family: Family, name: u64) -> Vec<Held> {
        let sequence = self.names.get(&(family, name)).copied();
        sequence.map_or_else(Vec::new, |sequence| self.vouch_for(family, sequence))
    }

    /// As [`Doubt::vouch_for_name`], by sequence hash.
    pub(super) fn vouch_for(&mut self, family: Family, sequence: u64) -> Vec<Held> {
        let mut chain = Vec::new();
        let mut at = Some(sequence);
        while let Some(blocks) = at.and_then(|sequence| self.blocks.remove(&(family, sequence))) {
            at = blocks.first().and_then(|block| block.parent);
            for block in blocks {
                if let Some(name) = block.name {
                    self.names.remove(&(family, name));
                }
                chain.push(block);
            }
        }
        chain.reverse();
        chain
    }

    /// A name stands for something else.
    pub(super) fn forget(&mut self, family: Family, name: u64) {
        self.drop_tiers(family, name, u8::MAX);
    }

    /// A block has left a tier. Whether it was set aside there.
    pub(super) fn remove(&mut self, family: Family, name: u64, tier: Tier) -> bool {
        self.drop_tiers(family, name, 1 << tier.index())
    }

    /// Nothing is left on a tier.
    pub(super) fn clear_tier(&mut self, tier: Tier) {
        let names: Vec<_> = self.names.keys().copied().collect();
        for (family, name) in names {
            self.remove(family, name, tier);
        }
    }

    fn drop_tiers(&mut self, family: Family, name: u64, mask: u8) -> bool {
        let Some(sequence) = self.names.get(&(family, name)).copied() else {
            return false;
        };
        let blocks = self.blocks.get_mut(&(family, sequence));
        let block = blocks.and_then(|b| b.iter_mut().find(|b| b.name == Some(name)));
        let Some(block) = block else {
            return false;
        };
        let was_there = block.tiers & mask != 0;
        block.tiers &= !mask;
        if block.tiers == 0 {
            // Blocks below it may still be vouched for.
            block.name = None;
            self.names.remove(&(family, name));
        }
        was_there
    }

    /// All of it, parents first.
    pub(super) fn to_blocks(&self) -> Vec<Held> {
        let mut blocks: Vec<Held> = self.blocks.values().flatten().copied().collect();
        parents_first(&mut blocks);
        blocks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A chain of blocks named as their sequence hash times ten.
    fn doubt() -> Doubt {
        let block = |sequence: u64| Held {
            family: Family::Dynamo,
            sequence,
            parent: (sequence > 1).then(|| sequence - 1),
            name: Some(10 * sequence),
            tiers: 1,
        };
        let mut doubt = Doubt::default();
        doubt.add((1..=4).map(block).collect());
        doubt
    }

    fn sequences(blocks: &[Held]) -> Vec<u64> {
        blocks.iter().map(|block| block.sequence).collect()
    }

    #[test]
    fn a_block_vouches_for_all_before_it_once() {
        let mut doubt = doubt();
        assert_eq!(sequences(&doubt.vouch_for_name(Family::Dynamo, 20)), [1, 2]);
        assert!(doubt.vouch_for_name(Family::Dynamo, 20).is_empty());
        assert_eq!(doubt.len(), 2);
        assert_eq!(sequences(&doubt.vouch_for(Family::Dynamo, 4)), [3, 4]);
        assert_eq!(doubt.len(), 0);
    }

    #[test]
    fn a_removed_block_is_only_a_link() {
        let mut doubt = doubt();
        assert!(doubt.remove(Family::Dynamo, 20, Tier::Device));
        assert!(!doubt.remove(Family::Dynamo, 20, Tier::Device));
        let chain = doubt.vouch_for_name(Family::Dynamo, 30);
        assert_eq!(sequences(&chain), [1, 2, 3]);
        assert_eq!(chain[1].name, None);
    }

    #[test]
    fn a_cleared_tier_leaves_the_others() {
        let mut doubt = doubt();
        doubt.add(vec![Held {
            family: Family::Dynamo,
            sequence: 9,
            parent: None,
            name: Some(90),
            tiers: 3,
        }]);
        doubt.clear_tier(Tier::Device);
        assert_eq!(doubt.len(), 1);
        let left = doubt.vouch_for_name(Family::Dynamo, 90);
        assert_eq!(left[0].tiers, 2);
    }
}
