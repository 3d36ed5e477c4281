//! What an owner holds, a part at a time, and clearing one tier of it.

use hashbrown::HashMap;

use super::owner::known;
use super::run::{Run, SHARED, TIERS};
use super::slab::NIL;
use super::space::Space;
use super::{Held, Index};
use crate::event::{EventData, Removed};
use crate::id::{Family, Slot, Tier};

impl Index {
    /// The engine's names of all blocks that an owner holds, with their families, in no order. With
    /// [`Index::held`] they make a dump in parts.
    #[must_use]
    pub fn names(&self, pool: usize, slot: Slot) -> Vec<(Family, u64)> {
        let names = |family| {
            let names = self.names_on(Space::new(pool, family), slot, TIERS);
            names.into_iter().map(move |name| (family, name))
        };
        Family::ALL.into_iter().flat_map(names).collect()
    }

    /// The names of all blocks that an owner has on some of these tiers.
    fn names_on(&self, space: Space, slot: Slot, tiers: u16) -> Vec<u64> {
        let Some(owner) = self.owners.get(&(space, slot)) else {
            return Vec::new();
        };
        let mut names = Vec::new();
        for id in self.runs_of(space, slot) {
            let run = self.tree.run(id);
            let low = self.tree.raw.get(run.raw, slot.0).unwrap_or(0);
            if low & tiers == 0 {
                continue;
            }
            if low & SHARED != 0 {
                names.extend(run.blocks.iter().map(|block| block.name));
                continue;
            }
            let own = run.blocks.iter().flat_map(|b| owner.own.of(b.sequence));
            let own = own.filter(|name| name.tiers & tiers != 0);
            names.extend(own.map(|name| name.hash));
        }
        names
    }

    /// The blocks of these names as an owner holds them at this moment, and after each the links
    /// above it that the owner lost; names that it has no more are left out. Parts are in no order
    /// ([`parents_first`]), and a link may come twice.
    #[must_use]
    pub fn held(&self, pool: usize, slot: Slot, names: &[(Family, u64)]) -> Vec<Held> {
        let tree = &self.tree;
        let mut part = Vec::with_capacity(names.len());
        for (family, name) in names {
            let space = Space::new(pool, *family);
            let owner = self.owners.get(&(space, slot));
            let known = owner.and_then(|owner| known(tree, owner, space, slot, *name));
            let Some(known) = known else {
                continue;
            };
            let run = tree.run(known.place.run());
            let at = tree.index(known.place);
            part.push(Held {
                family: *family,
                sequence: tree.block(known.place).sequence,
                parent: self.before(run, at),
                name: Some(*name),
                // Tiers are four.
                tiers: u8::try_from(known.tiers).unwrap_or(0),
            });
            let mut above = run.parent;
            while above != NIL {
                let run = tree.run(above);
                if tree.raw.get(run.raw, slot.0).is_some() {
                    break;
                }
                let links = run.blocks.iter().enumerate().rev();
                part.extend(links.map(|(at, block)| Held {
                    family: *family,
                    sequence: block.sequence,
                    parent: self.before(run, at),
                    name: None,
                    tiers: 0,
                }));
                above = run.parent;
            }
        }
        part
    }

    /// Whether an owner holds a block of Dynamo's family, on whatever tier and whatever is missing before it.
    #[must_use]
    pub fn holds(&self, pool: usize, slot: Slot, sequence: u64) -> bool {
        let place = self.tree.find(Space::new(pool, Family::Dynamo), sequence);
        place.is_some_and(|place| self.tree.low(place, slot).is_some())
    }

    /// Drops all blocks of an owner from one tier and returns how many it held there.
    pub fn clear_tier(&mut self, pool: usize, slot: Slot, tier: Tier) -> u32 {
        let mut removed: u32 = 0;
        for family in Family::ALL {
            let names = self.names_on(Space::new(pool, family), slot, 1 << tier.index());
            let data = EventData::Removed(Removed {
                block_hashes: names,
            });
            let applied = self.apply_family(pool, family, slot, tier, &data);
            removed = removed.saturating_add(applied.removed);
        }
        removed
    }

    /// Sequence hash of the block before one of a run.
    fn before(&self, run: &Run, at: usize) -> Option<u64> {
        let block = match at.checked_sub(1) {
            Some(before) => run.blocks.get(before),
            None => self.tree.run(run.parent).blocks.last(),
        };
        block.map(|block| block.sequence)
    }
}

/// Puts the parts of a dump in the order that [`Index::restore`] takes: family by family, parents
/// before children. Of a family, blocks whose parent is not among them come first.
pub fn parents_first(blocks: &mut [Held]) {
    let key = |block: &Held| (block.family, block.sequence);
    let parent = |block: &Held| block.parent.map(|parent| (block.family, parent));
    let parents: HashMap<_, _> = blocks.iter().map(|b| (key(b), parent(b))).collect();
    let mut depths: HashMap<_, u32> = HashMap::with_capacity(parents.len());
    let mut above = Vec::new();
    for block in blocks.iter() {
        let mut at = Some(key(block));
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
    blocks.sort_by_cached_key(|block| (block.family, depths.get(&key(block)).copied()));
}

#[cfg(test)]
mod tests {
    use super::super::{Index, IndexConfig};
    use super::*;
    use crate::event::{Stored, StoredBlock};
    use crate::rng::Rng;

    const SLOT: Slot = Slot(3);

    fn index() -> Index {
        let mut index = Index::new(IndexConfig {
            epoch: 1,
            level: 2,
            group: 8,
            max_orphans: 100,
            max_bytes: usize::MAX,
            max_page_bytes: usize::MAX,
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
            family: Family::Dynamo,
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
