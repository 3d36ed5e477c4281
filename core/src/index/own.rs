//! Names that an owner alone has for blocks: engines whose hashes differ from those of the engine
//! that brought the block, and second names. All other names are kept with the blocks themselves.

use std::hash::BuildHasher;

use hashbrown::{DefaultHashBuilder, HashTable};

/// A block as the engine names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Name {
    pub(super) hash: u64,
    /// Sequence hash of the block.
    pub(super) sequence: u64,
    /// Bit per tier.
    pub(super) tiers: u16,
}

/// Names by themselves and by their blocks.
#[derive(Debug, Default)]
pub(super) struct Names {
    names: Vec<Name>,
    by_hash: HashTable<u32>,
    by_sequence: HashTable<u32>,
    hasher: DefaultHashBuilder,
}

impl Names {
    pub(super) fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    pub(super) fn get(&self, hash: u64) -> Option<Name> {
        self.at(self.find(hash)?).copied()
    }

    /// Names of a block.
    pub(super) fn of(&self, sequence: u64) -> impl Iterator<Item = Name> + '_ {
        let numbers = self.by_sequence.iter_hash(self.hasher.hash_one(sequence));
        let names = numbers.filter_map(|id| self.at(*id)).copied();
        names.filter(move |name| name.sequence == sequence)
    }

    /// Names a block on some tiers, on which it may have the name already.
    pub(super) fn add(&mut self, hash: u64, sequence: u64, tiers: u16) {
        let id = self.find(hash);
        if let Some(name) = id.and_then(|id| self.names.get_mut(id as usize)) {
            name.tiers |= tiers;
            return;
        }
        let id = u32::try_from(self.names.len()).unwrap_or(u32::MAX);
        self.names.push(Name {
            hash,
            sequence,
            tiers,
        });
        let Self { names, hasher, .. } = self;
        let name = |id: &u32| names.get(*id as usize);
        let key = |id: &u32| hasher.hash_one(name(id).map_or(0, |n| n.hash));
        self.by_hash.insert_unique(key(&id), id, key);
        let key = |id: &u32| hasher.hash_one(name(id).map_or(0, |n| n.sequence));
        self.by_sequence.insert_unique(key(&id), id, key);
    }

    /// Takes a name back from a tier.
    pub(super) fn remove(&mut self, hash: u64, bit: u16) {
        let Some(id) = self.find(hash) else {
            return;
        };
        if let Some(name) = self.names.get_mut(id as usize) {
            name.tiers &= !bit;
            if name.tiers == 0 {
                self.drop(id);
            }
        }
    }

    /// Drops all names of a block.
    pub(super) fn forget(&mut self, sequence: u64) {
        let key = self.hasher.hash_one(sequence);
        while let Some(id) = {
            let is_it = |id: &u32| self.at(*id).is_some_and(|n| n.sequence == sequence);
            self.by_sequence.find(key, is_it).copied()
        } {
            self.drop(id);
        }
    }

    /// Bytes taken from the allocator.
    pub(super) fn bytes(&self) -> usize {
        let tables = self.by_hash.allocation_size() + self.by_sequence.allocation_size();
        self.names.capacity() * size_of::<Name>() + tables
    }

    /// Gives back memory that is not in use.
    pub(super) fn compact(&mut self) {
        let Self { names, hasher, .. } = self;
        names.shrink_to_fit();
        let name = |id: &u32| names.get(*id as usize);
        let key = |id: &u32| hasher.hash_one(name(id).map_or(0, |n| n.hash));
        self.by_hash.shrink_to_fit(key);
        let key = |id: &u32| hasher.hash_one(name(id).map_or(0, |n| n.sequence));
        self.by_sequence.shrink_to_fit(key);
    }

    fn at(&self, id: u32) -> Option<&Name> {
        self.names.get(id as usize)
    }

    fn find(&self, hash: u64) -> Option<u32> {
        if self.names.is_empty() {
            return None;
        }
        let is_it = |id: &u32| self.at(*id).is_some_and(|name| name.hash == hash);
        self.by_hash
            .find(self.hasher.hash_one(hash), is_it)
            .copied()
    }

    /// Drops a name; the last one takes its number.
    fn drop(&mut self, id: u32) {
        let last = u32::try_from(self.names.len()).map_or(0, |n| n.saturating_sub(1));
        let (Some(name), Some(moved)) = (self.at(id).copied(), self.at(last).copied()) else {
            return;
        };
        let Self { hasher, .. } = self;
        for (table, gone, kept) in [
            (&mut self.by_hash, name.hash, moved.hash),
            (&mut self.by_sequence, name.sequence, moved.sequence),
        ] {
            if let Ok(entry) = table.find_entry(hasher.hash_one(gone), |other| *other == id) {
                entry.remove();
            }
            if let Some(number) = table.find_mut(hasher.hash_one(kept), |other| *other == last) {
                *number = id;
            }
        }
        self.names.swap_remove(id as usize);
    }
}
