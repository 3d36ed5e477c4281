//! Where blocks stand, by a hash.

use hashbrown::hash_table::{self as table, HashTable};

use super::run::RunId;
use super::slab::NIL;

/// Bits of a position.
const POSITION_BITS: u32 = 7;
/// Most runs: their numbers must leave room for a position.
pub(super) const MAX_RUNS: usize = (1 << (32 - POSITION_BITS)) - 1;
/// Parts of a table, each of which grows by itself: growth pauses for a part only.
const SHARDS: usize = 64;
/// Bytes of an entry in a table that has just grown and so is filled least.
const ENTRY_BYTES: usize = 21;

/// Where a block stands: in which run, and at which position of its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place(u32);

impl Place {
    /// Before all first blocks.
    pub(super) const ROOT: Self = Self(u32::MAX);

    pub(super) fn new(run: RunId, position: u8) -> Self {
        Self(run << POSITION_BITS | u32::from(position))
    }

    /// The run, `NIL` at the root.
    pub(super) fn run(self) -> RunId {
        if self == Self::ROOT {
            NIL
        } else {
            self.0 >> POSITION_BITS
        }
    }

    /// The position in the group.
    #[allow(clippy::cast_possible_truncation)]
    pub(super) fn position(self) -> u8 {
        (self.0 & ((1 << POSITION_BITS) - 1)) as u8
    }
}

/// A place, and bits of what it is found by: enough to find most others out without reading their
/// blocks, and to grow the table without reading any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    key: u32,
    place: Place,
}

impl Entry {
    #[allow(clippy::cast_possible_truncation)]
    fn new(hash: u64, place: Place) -> Self {
        let key = hash as u32;
        Self { key, place }
    }

    /// What the table takes for its hash: a bucket by low bits, a tag by high ones.
    fn hash(&self) -> u64 {
        u64::from(self.key) << 32 | u64::from(self.key)
    }
}

/// A table of places.
#[derive(Debug)]
pub(super) struct Places {
    shards: Vec<HashTable<Entry>>,
    len: usize,
    bytes: usize,
}

impl Places {
    pub(super) fn new() -> Self {
        let mut shards = Vec::new();
        shards.resize_with(SHARDS, HashTable::new);
        Self {
            shards,
            len: 0,
            bytes: 0,
        }
    }

    #[allow(clippy::cast_possible_truncation)]
    fn shard(hash: u64) -> usize {
        // Bits that are not in the key.
        (hash >> 40) as usize % SHARDS
    }

    pub(super) fn get(&self, hash: u64, mut is_it: impl FnMut(Place) -> bool) -> Option<Place> {
        let wanted = Entry::new(hash, Place::ROOT);
        let shard = self.shards.get(Self::shard(hash))?;
        let is_it = |entry: &Entry| entry.key == wanted.key && is_it(entry.place);
        shard.find(wanted.hash(), is_it).map(|entry| entry.place)
    }

    /// Adds a place that is not there yet.
    pub(super) fn insert(&mut self, hash: u64, place: Place) {
        self.insert_absent(hash, place, |_| false);
    }

    /// Adds a place unless one like it is there. Whether none was.
    pub(super) fn insert_absent(
        &mut self,
        hash: u64,
        place: Place,
        mut is_it: impl FnMut(Place) -> bool,
    ) -> bool {
        let Some(shard) = self.shards.get_mut(Self::shard(hash)) else {
            return false;
        };
        if shard.len() == shard.capacity() {
            self.bytes += grow(shard);
        }
        let new = Entry::new(hash, place);
        let is_it = |entry: &Entry| entry.key == new.key && is_it(entry.place);
        match shard.entry(new.hash(), is_it, Entry::hash) {
            table::Entry::Occupied(_) => false,
            table::Entry::Vacant(entry) => {
                entry.insert(new);
                self.len += 1;
                true
            }
        }
    }

    /// Fills an empty table, which then takes the least memory.
    pub(super) fn fill(&mut self, places: impl Iterator<Item = (u64, Place)> + Clone) {
        let mut sizes = vec![0_usize; self.shards.len()];
        for (hash, _) in places.clone() {
            if let Some(size) = sizes.get_mut(Self::shard(hash)) {
                *size += 1;
            }
        }
        for (shard, size) in self.shards.iter_mut().zip(&sizes) {
            *shard = HashTable::with_capacity(*size);
            self.bytes += shard.allocation_size();
        }
        self.len = sizes.iter().sum();
        for (hash, place) in places {
            if let Some(shard) = self.shards.get_mut(Self::shard(hash)) {
                let entry = Entry::new(hash, place);
                shard.insert_unique(entry.hash(), entry, Entry::hash);
            }
        }
    }

    /// Puts another place where one stood.
    pub(super) fn replace(&mut self, hash: u64, old: Place, new: Place) {
        let old = Entry::new(hash, old);
        let shard = self.shards.get_mut(Self::shard(hash));
        if let Some(entry) = shard.and_then(|s| s.find_mut(old.hash(), |entry| *entry == old)) {
            entry.place = new;
        }
    }

    pub(super) fn remove(&mut self, hash: u64, place: Place) {
        let gone = Entry::new(hash, place);
        let shard = self.shards.get_mut(Self::shard(hash));
        if let Some(Ok(entry)) = shard.map(|s| s.find_entry(gone.hash(), |entry| *entry == gone)) {
            entry.remove();
            self.len -= 1;
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes taken from the allocator.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Most bytes that this many entries take, if there were never more.
    pub(super) fn used_bytes(&self) -> usize {
        self.len * ENTRY_BYTES
    }
}

/// Makes room in a full table and returns the bytes that it grew by: none where it is full of what
/// has gone.
fn grow(shard: &mut HashTable<Entry>) -> usize {
    let before = shard.allocation_size();
    let room = shard.len() + shard.len() / 2 + 1;
    let old = std::mem::replace(shard, HashTable::with_capacity(room));
    for entry in old {
        shard.insert_unique(entry.hash(), entry, Entry::hash);
    }
    shard.allocation_size().saturating_sub(before)
}
