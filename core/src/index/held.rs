//! What an owner holds, a part at a time, and clearing one tier of it.

use hashbrown::HashMap;

use super::slab::NIL;
use super::{Held, Index};
use crate::id::{Slot, Tier};

impl Index {
    /// The engine's names of all blocks that an owner holds, in no order. With [`Index::held`] they
    /// make a dump in parts.
    #[must_use]
    pub fn names(&self, pool: usize, slot: Slot) -> Vec<u64> {
        let owner = self.owners.get(&(pool, slot));
        owner.map_or_else(Vec::new, |owner| owner.names().map(|n| n.hash).collect())
    }

    /// The blocks of these names as an owner holds them at this moment, and after each the links
    /// above it that the owner lost; names that it has no more are left out. Parts are in no order
    /// ([`parents_first`]), and a link may come twice.
    #[must_use]
    pub fn held(&self, pool: usize, slot: Slot, names: &[u64]) -> Vec<Held> {
        let Some(owner) = self.owners.get(&(pool, slot)) else {
            return Vec::new();
        };
        let mut part = Vec::with_capacity(names.len());
        for name in names.iter().filter_map(|hash| owner.name(*hash)) {
            let node = self.tree.node(name.node);
            part.push(Held {
                sequence: node.sequence,
                parent: self.sequence(node.parent),
                name: Some(name.hash),
                tiers: name.tiers,
            });
            let mut at = node.parent;
            while at != NIL && self.tree.tiers(at, slot) == 0 {
                let link = self.tree.node(at);
                part.push(Held {
                    sequence: link.sequence,
                    parent: self.sequence(link.parent),
                    name: None,
                    tiers: 0,
                });
                at = link.parent;
            }
        }
        part
    }

    /// Whether an owner holds a block, on whatever tier and whatever is missing before it.
    #[must_use]
    pub fn holds(&self, pool: usize, slot: Slot, sequence: u64) -> bool {
        let node = u16::try_from(pool)
            .ok()
            .and_then(|pool| self.tree.find(pool, sequence));
        node.is_some_and(|node| self.tree.tiers(node, slot) != 0)
    }

    /// Drops all blocks of an owner from one tier and returns how many it held there.
    pub fn clear_tier(&mut self, pool: usize, slot: Slot, tier: Tier) -> u32 {
        let bit = 1_u8 << tier.index();
        let Some(owner) = self.owners.get(&(pool, slot)) else {
            return 0;
        };
        let on_tier = owner.names().filter(|name| name.tiers & bit != 0);
        let names: Vec<u64> = on_tier.map(|name| name.hash).collect();
        let mut applied = super::Applied::default();
        for name in names {
            self.remove(pool, slot, tier, name, &mut applied);
        }
        applied.removed
    }

    fn sequence(&self, node: u32) -> Option<u64> {
        (node != NIL).then(|| self.tree.node(node).sequence)
    }
}

/// Puts the parts of a dump in the order that [`Index::restore`] takes: parents before children.
/// Blocks whose parent is not among them come first.
pub fn parents_first(blocks: &mut [Held]) {
    let parents: HashMap<u64, Option<u64>> =
        blocks.iter().map(|b| (b.sequence, b.parent)).collect();
    let mut depths: HashMap<u64, u32> = HashMap::with_capacity(parents.len());
    let mut above = Vec::new();
    for block in blocks.iter() {
        let mut at = Some(block.sequence);
        let mut depth = 0;
        // A circle, which no index makes, ends where it began.
        while let Some(sequence) = at.filter(|_| above.len() <= parents.len()) {
            if let Some(known) = depths.get(&sequence) {
                depth = known + 1;
                break;
            }
            let Some(parent) = parents.get(&sequence) else {
                break;
            };
            above.push(sequence);
            at = *parent;
        }
        while let Some(sequence) = above.pop() {
            depths.insert(sequence, depth);
            depth += 1;
        }
    }
    blocks.sort_by_cached_key(|block| depths.get(&block.sequence).copied());
}

#[cfg(test)]
mod tests {
    use super::super::{Index, IndexConfig};
    use super::*;
    use crate::event::{EventData, Removed, Stored, StoredBlock};
    use crate::rng::Rng;

    const SLOT: Slot = Slot(3);

    fn index() -> Index {
        let mut index = Index::new(IndexConfig {
            epoch: 1,
            level: 2,
            group: 8,
            max_orphans: 100,
        });
        index.add_pool(7);
        index
    }

    fn store(parent: Option<u64>, hashes: &[u64]) -> EventData {
        EventData::Stored(Stored {
            parent_hash: parent,
            start_position: None,
            blocks: hashes
                .iter()
                .map(|hash| StoredBlock {
                    block_hash: *hash,
                    tokens_hash: hash * 31,
                    mm_extra_info: None,
                })
                .collect(),
        })
    }

    /// Random chains with holes, on two tiers.
    fn filled(rng: &mut Rng) -> Index {
        let mut index = index();
        for chain in 0..20 {
            let names: Vec<u64> = (0..12)
                .map(|i| 1000 * (chain % 7) + 100 * chain + i)
                .collect();
            let tier = Tier::from_index(rng.below(2));
            index.apply(0, SLOT, tier, &store(None, &names));
            let gone = names.iter().filter(|_| rng.below(4) == 0).copied();
            let block_hashes = gone.collect();
            index.apply(0, SLOT, tier, &EventData::Removed(Removed { block_hashes }));
        }
        index
    }

    #[test]
    fn parts_in_any_order_make_the_whole_dump() {
        for seed in 0..20 {
            let mut rng = Rng::new(seed);
            let index = filled(&mut rng);
            let names = index.names(0, SLOT);
            let parts = names.chunks(7).rev();
            let mut blocks: Vec<Held> = parts.flat_map(|part| index.held(0, SLOT, part)).collect();
            parents_first(&mut blocks);
            let mut copy = super::tests::index();
            let applied = copy.restore(0, SLOT, &blocks);
            assert_eq!(applied.collisions, 0);
            let (mut ours, mut theirs) = (copy.dump(0, SLOT), index.dump(0, SLOT));
            let key = |b: &Held| (b.sequence, b.name);
            ours.sort_by_key(key);
            theirs.sort_by_key(key);
            assert_eq!(ours, theirs);
        }
    }

    #[test]
    fn names_that_went_meanwhile_are_left_out() {
        let mut index = index();
        index.apply(0, SLOT, Tier::Device, &store(None, &[1, 2, 3]));
        let names = index.names(0, SLOT);
        let block_hashes = vec![3];
        index.apply(
            0,
            SLOT,
            Tier::Device,
            &EventData::Removed(Removed { block_hashes }),
        );
        assert_eq!(index.held(0, SLOT, &names).len(), 2);
        assert!(index.holds(0, SLOT, 31));
        assert!(!index.holds(0, SLOT, 93));
    }

    #[test]
    fn clearing_a_tier_leaves_the_others() {
        let mut index = index();
        index.apply(0, SLOT, Tier::Device, &store(None, &[1, 2, 3]));
        index.apply(0, SLOT, Tier::Host, &store(None, &[1, 2]));
        assert_eq!(index.clear_tier(0, SLOT, Tier::Device), 3);
        assert_eq!(index.clear_tier(0, SLOT, Tier::Device), 0);
        assert_eq!(index.owner_blocks(0, SLOT), 2);
        assert_eq!(index.clear_tier(0, SLOT, Tier::Host), 2);
        assert_eq!(index.stats().blocks, 0);
    }

    #[test]
    fn a_circle_of_parents_ends() {
        let block = |sequence, parent| Held {
            sequence,
            parent: Some(parent),
            name: Some(sequence),
            tiers: 1,
        };
        let mut blocks = [block(1, 2), block(2, 1), block(3, 2)];
        parents_first(&mut blocks);
        assert_eq!(blocks.len(), 3);
    }
}
