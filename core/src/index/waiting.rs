//! Stores of an owner that wait for their parent.

use std::collections::VecDeque;
use std::hash::BuildHasher;

use hashbrown::{DefaultHashBuilder, HashMap, HashTable};

use super::BOX_BYTES;
use crate::id::Tier;

/// A store whose parent the owner has not named.
#[derive(Clone, Debug)]
pub(super) struct Orphan {
    pub(super) tier: Tier,
    pub(super) blocks: Vec<OrphanBlock>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct OrphanBlock {
    pub(super) hash: u64,
    pub(super) tokens_hash: u64,
    /// Removed while waiting: it only links the blocks after it.
    pub(super) gone: bool,
}

/// A block of a waiting store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    hash: u64,
    parent: u64,
    number: u64,
}

/// The waiting stores of one owner.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    /// With their numbers, ascending, by the parent they wait for.
    stores: HashMap<u64, VecDeque<(u64, Orphan)>>,
    /// Blocks that have not been removed while waiting.
    blocks: HashTable<Entry>,
    hasher: DefaultHashBuilder,
    /// Blocks of the stores.
    len: usize,
    /// Bytes of the stores.
    store_bytes: usize,
}

fn bytes(orphan: &Orphan) -> usize {
    // A deque may have room for twice as many, and a box of its own.
    let list = 2 * size_of::<(u64, Orphan)>() + BOX_BYTES;
    orphan.blocks.capacity() * size_of::<OrphanBlock>() + BOX_BYTES + list
}

impl Waiting {
    pub(super) fn is_empty(&self) -> bool {
        self.stores.is_empty()
    }

    /// Blocks that wait.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Lets a store wait. Numbers ascend.
    pub(super) fn push(&mut self, parent: u64, number: u64, orphan: Orphan) {
        let hasher = &self.hasher;
        for block in orphan.blocks.iter().filter(|block| !block.gone) {
            let hash = block.hash;
            let entry = Entry {
                hash,
                parent,
                number,
            };
            let key = |entry: &Entry| hasher.hash_one(entry.hash);
            self.blocks.insert_unique(key(&entry), entry, key);
        }
        self.len += orphan.blocks.len();
        self.store_bytes += bytes(&orphan);
        // Most parents are waited for by one store.
        let stores = self.stores.entry(parent);
        let stores = stores.or_insert_with(|| VecDeque::with_capacity(1));
        stores.push_back((number, orphan));
    }

    /// The stores that waited for a block.
    pub(super) fn take(&mut self, parent: u64) -> Vec<Orphan> {
        if self.stores.is_empty() {
            return Vec::new();
        }
        let stores = self.stores.remove(&parent).unwrap_or_default();
        let mut taken = Vec::with_capacity(stores.len());
        for (number, orphan) in stores {
            self.forget(parent, number, &orphan);
            taken.push(orphan);
        }
        taken
    }

    /// Drops a store, if it still waits, and returns how many blocks it had.
    pub(super) fn drop(&mut self, parent: u64, number: u64) -> usize {
        let Some(stores) = self.stores.get_mut(&parent) else {
            return 0;
        };
        let Ok(at) = stores.binary_search_by_key(&number, |(number, _)| *number) else {
            return 0;
        };
        let dropped = stores.remove(at);
        if stores.is_empty() {
            self.stores.remove(&parent);
        }
        dropped.map_or(0, |(_, orphan)| {
            self.forget(parent, number, &orphan);
            orphan.blocks.len()
        })
    }

    /// Whether a store still waits.
    pub(super) fn has(&self, parent: u64, number: u64) -> bool {
        let stores = self.stores.get(&parent);
        stores.is_some_and(|stores| stores.binary_search_by_key(&number, |(n, _)| *n).is_ok())
    }

    fn forget(&mut self, parent: u64, number: u64, orphan: &Orphan) {
        for block in orphan.blocks.iter().filter(|block| !block.gone) {
            let hash = block.hash;
            let gone = Entry {
                hash,
                parent,
                number,
            };
            let key = self.hasher.hash_one(hash);
            if let Ok(entry) = self.blocks.find_entry(key, |entry| *entry == gone) {
                entry.remove();
            }
        }
        self.len -= orphan.blocks.len();
        self.store_bytes -= bytes(orphan);
    }

    /// Removes a block from every store that waits with it for a tier. Whether there was one.
    pub(super) fn remove(&mut self, hash: u64, tier: Tier) -> bool {
        if self.blocks.is_empty() {
            return false;
        }
        let key = self.hasher.hash_one(hash);
        let entries = self.blocks.iter_hash(key).filter(|e| e.hash == hash);
        let entries: Vec<Entry> = entries.copied().collect();
        let mut found = false;
        for entry in entries {
            let stores = self.stores.get_mut(&entry.parent);
            let number = |(number, _): &(u64, Orphan)| *number;
            let store = stores.and_then(|stores| {
                let at = stores.binary_search_by_key(&entry.number, number).ok()?;
                stores.get_mut(at)
            });
            let Some((_, orphan)) = store.filter(|(_, orphan)| orphan.tier == tier) else {
                continue;
            };
            let same = orphan.blocks.iter_mut().filter(|block| block.hash == hash);
            same.for_each(|block| block.gone = true);
            if let Ok(gone) = self.blocks.find_entry(key, |other| *other == entry) {
                gone.remove();
            }
            found = true;
        }
        found
    }

    /// Bytes taken from the allocator.
    pub(super) fn bytes(&self) -> usize {
        self.store_bytes + self.stores.allocation_size() + self.blocks.allocation_size()
    }

    /// Gives back memory that is not in use.
    pub(super) fn compact(&mut self) {
        self.stores.shrink_to_fit();
        let hasher = &self.hasher;
        self.blocks
            .shrink_to_fit(|entry| hasher.hash_one(entry.hash));
    }
}
