//! Which names an owner was last heard to hold, in order of that. For caches that forget blocks
//! without a word: what has not been announced for longest is given up.

use std::hash::BuildHasher;

use hashbrown::{DefaultHashBuilder, HashTable};

use super::slab::{NIL, Slab};
use super::space::Space;
use super::store::hand;
use super::{Applied, BOX_BYTES, Index};
use crate::event::EventData;
use crate::id::{Family, Slot, Tier};

#[derive(Debug)]
struct Entry {
    hash: u64,
    /// Announced after this one, and before.
    newer: u32,
    older: u32,
}

impl Default for Entry {
    fn default() -> Self {
        Self {
            hash: 0,
            newer: NIL,
            older: NIL,
        }
    }
}

/// Names in order of their last announcement.
#[derive(Debug)]
pub(super) struct Announced {
    entries: Slab<Entry>,
    by_hash: HashTable<u32>,
    hasher: DefaultHashBuilder,
    newest: u32,
    oldest: u32,
}

impl Default for Announced {
    fn default() -> Self {
        Self {
            entries: Slab::default(),
            by_hash: HashTable::new(),
            hasher: DefaultHashBuilder::default(),
            newest: NIL,
            oldest: NIL,
        }
    }
}

impl Announced {
    /// A name is announced, for the first time or again.
    pub(super) fn touch(&mut self, hash: u64) {
        let key = self.hasher.hash_one(hash);
        let same = |id: &u32| self.entries.at(*id).hash == hash;
        let id = if let Some(id) = self.by_hash.find(key, same).copied() {
            self.unlink(id);
            id
        } else {
            let id = self.entries.insert(Entry {
                hash,
                ..Entry::default()
            });
            let (entries, hasher) = (&self.entries, &self.hasher);
            let rehash = |id: &u32| hasher.hash_one(entries.at(*id).hash);
            self.by_hash.insert_unique(key, id, rehash);
            id
        };
        let entry = self.entries.at_mut(id);
        (entry.newer, entry.older) = (NIL, self.newest);
        self.entries.at_mut(self.newest).newer = id;
        self.newest = id;
        if self.oldest == NIL {
            self.oldest = id;
        }
    }

    /// A name is gone.
    pub(super) fn forget(&mut self, hash: u64) {
        let key = self.hasher.hash_one(hash);
        let same = |id: &u32| self.entries.at(*id).hash == hash;
        if let Ok(found) = self.by_hash.find_entry(key, same) {
            let (id, _) = found.remove();
            self.unlink(id);
            self.entries.remove(id);
        }
    }

    /// Bytes taken from the allocator.
    pub(super) fn bytes(&self) -> usize {
        let own = size_of::<Self>() + BOX_BYTES;
        own + self.entries.bytes() + self.by_hash.allocation_size()
    }

    /// The name that has not been announced for longest, if there are more than `most`.
    pub(super) fn surplus(&self, most: usize) -> Option<u64> {
        (self.entries.len() > most).then(|| self.entries.at(self.oldest).hash)
    }

    fn unlink(&mut self, id: u32) {
        let Entry { newer, older, .. } = *self.entries.at(id);
        if newer == NIL {
            self.newest = older;
        } else {
            self.entries.at_mut(newer).older = older;
        }
        if older == NIL {
            self.oldest = newer;
        } else {
            self.entries.at_mut(older).newer = newer;
        }
    }
}

impl Index {
    /// Bounds the blocks that any one owner of a pool holds of a family. Beyond it those that were
    /// not announced for longest are given up.
    pub fn limit(&mut self, pool: usize, family: Family, blocks: usize) {
        self.limits.insert(Space::new(pool, family), blocks);
    }

    /// Notes what an event announced, if that is limited, and gives up what is too much.
    pub(super) fn expire(
        &mut self,
        space: Space,
        slot: Slot,
        data: &EventData,
        applied: &mut Applied,
    ) {
        let Some(most) = self.limits.get(&space).copied() else {
            return;
        };
        if !self.owners.contains_key(&(space, slot)) {
            return;
        }
        let mut hand = hand(&mut self.tree, &mut self.owners, space, slot);
        let before = hand.owner.bytes();
        let mut announced = hand.owner.announced.take().unwrap_or_default();
        match data {
            EventData::Stored(stored) => {
                // Backwards: of one announcement the end goes first.
                for block in stored.blocks.iter().rev() {
                    announced.touch(block.block_hash);
                }
            }
            EventData::Removed(removed) => {
                let hashes = removed.block_hashes.iter();
                for hash in hashes.filter(|hash| hand.known(**hash).is_none()) {
                    announced.forget(*hash);
                }
            }
            EventData::Cleared => {}
        }
        while let Some(hash) = announced.surplus(most) {
            for tier in Tier::ALL {
                hand.take(hash, tier);
            }
            announced.forget(hash);
            applied.expired = applied.expired.saturating_add(1);
        }
        hand.owner.announced = Some(announced);
        self.owner_bytes = self.owner_bytes + hand.owner.bytes() - before;
    }
}

#[cfg(test)]
mod tests {
    use super::Announced;
    use crate::rng::Rng;

    #[test]
    fn the_surplus_is_what_was_announced_longest_ago() {
        let mut announced = Announced::default();
        let mut expected: Vec<u64> = Vec::new();
        let mut rng = Rng::new(1);
        for _ in 0..2_000 {
            let hash = rng.below(30) as u64;
            expected.retain(|h| *h != hash);
            if rng.below(4) == 0 {
                announced.forget(hash);
            } else {
                announced.touch(hash);
                expected.push(hash);
            }
            let over = expected.len().checked_sub(1);
            let oldest = over.and_then(|most| announced.surplus(most));
            assert_eq!(oldest, expected.first().copied());
            assert_eq!(announced.surplus(expected.len()), None);
        }
    }
}
