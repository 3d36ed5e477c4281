//! Where blocks stand, by a hash.

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;

use super::run::RunId;
use super::slab::NIL;

/// Bits of a position.
const POSITION_BITS: u32 = 7;
/// Most runs: their numbers must leave room for a position.
pub(super) const MAX_RUNS: usize = (1 << (32 - POSITION_BITS)) - 1;
/// Parts of a table, each of which grows by itself: growth pauses for a part only.
const SHARDS: usize = 64;
/// Entries that move together when a table grows.
const STEP: usize = 64;
/// Bytes of an entry in a table that has just grown and so is filled least.
const ENTRY_BYTES: usize = 12;

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

/// A table of places.
#[derive(Debug)]
pub(super) struct Places {
    shards: Vec<HashTable<Place>>,
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
        // Bits that a shard uses for neither the bucket nor the tag.
        (hash >> 40) as usize % SHARDS
    }

    pub(super) fn get(&self, hash: u64, is_it: impl FnMut(&Place) -> bool) -> Option<Place> {
        self.shards
            .get(Self::shard(hash))?
            .find(hash, is_it)
            .copied()
    }

    /// Adds a place that is not there yet.
    pub(super) fn insert<K>(&mut self, hash: u64, place: Place, hashing: &impl Hashing<K>) {
        if let Some(shard) = self.shards.get_mut(Self::shard(hash)) {
            self.bytes += make_room(shard, hashing);
            shard.insert_unique(hash, place, |place| hashing.hash(hashing.find(*place)));
            self.len += 1;
        }
    }

    /// Adds a place unless one like it is there. Whether none was.
    pub(super) fn insert_absent<K>(
        &mut self,
        hash: u64,
        place: Place,
        is_it: impl FnMut(&Place) -> bool,
        hashing: &impl Hashing<K>,
    ) -> bool {
        let Some(shard) = self.shards.get_mut(Self::shard(hash)) else {
            return false;
        };
        self.bytes += make_room(shard, hashing);
        let rehash = |place: &Place| hashing.hash(hashing.find(*place));
        match shard.entry(hash, is_it, rehash) {
            Entry::Occupied(_) => false,
            Entry::Vacant(entry) => {
                entry.insert(place);
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
                // There is room for all: nothing is hashed again.
                shard.insert_unique(hash, place, |_| hash);
            }
        }
    }

    /// Puts another place where one stood.
    pub(super) fn replace(&mut self, hash: u64, old: Place, new: Place) {
        let shard = self.shards.get_mut(Self::shard(hash));
        if let Some(place) = shard.and_then(|s| s.find_mut(hash, |place| *place == old)) {
            *place = new;
        }
    }

    pub(super) fn remove(&mut self, hash: u64, place: Place) {
        let shard = self.shards.get_mut(Self::shard(hash));
        if let Some(Ok(entry)) = shard.map(|s| s.find_entry(hash, |other| *other == place)) {
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

/// How places hash, in two steps.
pub(super) trait Hashing<K> {
    /// Where what is hashed is to be read.
    fn find(&self, place: Place) -> K;

    /// Reads and hashes it.
    fn hash(&self, key: K) -> u64;
}

/// Makes room for one more in a full table and returns the bytes that it grew by. Where blocks are
/// is found for many before one is read: so few reads wait for others.
fn make_room<K>(shard: &mut HashTable<Place>, hashing: &impl Hashing<K>) -> usize {
    if shard.len() < shard.capacity() {
        return 0;
    }
    let before = shard.allocation_size();
    let room = shard.len() + shard.len() / 2 + 1;
    let old = std::mem::replace(shard, HashTable::with_capacity(room));
    let mut places = old.iter().copied();
    let (mut found, mut hashes) = (Vec::new(), Vec::new());
    loop {
        found.extend(
            places
                .by_ref()
                .take(STEP)
                .map(|place| (hashing.find(place), place)),
        );
        if found.is_empty() {
            break;
        }
        hashes.extend(
            found
                .drain(..)
                .map(|(key, place)| (hashing.hash(key), place)),
        );
        for (hash, place) in hashes.drain(..) {
            shard.insert_unique(hash, place, |_| hash);
        }
    }
    shard.allocation_size().saturating_sub(before)
}
