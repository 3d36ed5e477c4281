//! A paged KV cache.
//!
//! Invariants:
//! - a block is in exactly one place: pinned by a sequence, empty, or idle (named, unpinned);
//! - whoever pins a block pins its ancestors, and a release gives blocks back from the tail, so
//!   the least recently used idle block never has a child in the cache: eviction is leaf first.
//!   Only [`Cache::remove`] makes holes in a chain;
//! - replaying [`Cache::take_changes`] from the start gives exactly [`Cache::keys`].

use std::collections::{BTreeMap, HashMap};

use crate::chain::Key;
use crate::change::Change;

/// Blocks in one change, which bounds the size of an event.
const CHANGE_BLOCKS: usize = 1024;

/// Blocks of one engine's accelerator memory.
#[derive(Debug)]
pub(crate) struct Cache {
    blocks: Vec<Block>,
    named: HashMap<u64, usize>,
    empty: Vec<usize>,
    /// Named blocks without a pin by the time of their release, least recent first.
    idle: BTreeMap<u64, usize>,
    releases: u64,
    generation: u64,
    changes: Vec<Change>,
}

#[derive(Clone, Debug, Default)]
struct Block {
    key: Option<Key>,
    pins: usize,
    released_at: u64,
}

/// The blocks one sequence has pinned, in order. Must go back through [`Cache::release`].
#[derive(Debug, Default)]
#[must_use]
pub(crate) struct Lease {
    blocks: Vec<usize>,
    named: usize,
    generation: u64,
}

impl Lease {
    /// Blocks pinned.
    #[must_use]
    pub(crate) fn len(&self) -> usize {
        self.blocks.len()
    }
}

// === impl Cache ===

impl Cache {
    /// An empty cache of `capacity` blocks.
    #[must_use]
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            blocks: vec![Block::default(); capacity],
            named: HashMap::new(),
            empty: (0..capacity).rev().collect(),
            idle: BTreeMap::new(),
            releases: 0,
            generation: 0,
            changes: Vec::new(),
        }
    }

    /// Blocks in all.
    #[must_use]
    pub(crate) fn capacity(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that sequences hold.
    #[must_use]
    pub(crate) fn pinned(&self) -> usize {
        self.blocks.len() - self.empty.len() - self.idle.len()
    }

    /// Every block that can be hit, in no order.
    pub(crate) fn keys(&self) -> impl Iterator<Item = Key> + '_ {
        self.named
            .values()
            .filter_map(|&block| self.blocks[block].key.clone())
    }

    /// How many leading blocks of `keys` are in the cache.
    #[must_use]
    pub(crate) fn overlap(&self, keys: &[Key]) -> usize {
        keys.iter()
            .take_while(|key| self.named.contains_key(&key.engine_hash))
            .count()
    }

    /// Pins the leading blocks of `keys` that are in the cache and takes others up to `count`
    /// blocks; `None`, and nothing changes, where there is no room. The second value is the
    /// number of blocks hit.
    pub(crate) fn admit(&mut self, keys: &[Key], count: usize) -> Option<(Lease, usize)> {
        let hits = self.overlap(keys).min(count);
        let found: Vec<usize> = keys[..hits]
            .iter()
            .map(|key| self.named[&key.engine_hash])
            .collect();
        let idle_hits = found.iter().filter(|&&b| self.blocks[b].pins == 0).count();
        if count - hits > self.empty.len() + self.idle.len() - idle_hits {
            return None;
        }
        for &block in &found {
            self.pin(block);
        }
        let mut lease = Lease {
            blocks: found,
            named: hits,
            generation: self.generation,
        };
        let grown = self.grow(&mut lease, count - hits);
        debug_assert!(grown, "room was counted above");
        Some((lease, hits))
    }

    /// Adds `count` blocks to a lease, evicting idle ones; `false`, and nothing changes, where
    /// there is no room.
    pub(crate) fn grow(&mut self, lease: &mut Lease, count: usize) -> bool {
        if count > self.empty.len() + self.idle.len() {
            return false;
        }
        for _ in 0..count {
            let Some(block) = self.empty.pop().or_else(|| self.evict_one()) else {
                return false;
            };
            self.blocks[block].pins = 1;
            lease.blocks.push(block);
        }
        true
    }

    /// Names the first blocks of a lease: they are full from here on. A block another sequence
    /// has named in the meantime is shared and the duplicate given back. A lease from before a
    /// [`Cache::clear`] names nothing: its chain would have no root.
    pub(crate) fn commit(&mut self, lease: &mut Lease, keys: &[Key]) {
        if lease.generation != self.generation {
            return;
        }
        let end = keys.len().min(lease.blocks.len());
        for (at, key) in keys.iter().enumerate().take(end).skip(lease.named) {
            let own = lease.blocks[at];
            if let Some(&shared) = self.named.get(&key.engine_hash) {
                self.pin(shared);
                lease.blocks[at] = shared;
                self.unpin(own);
            } else {
                self.blocks[own].key = Some(key.clone());
                self.named.insert(key.engine_hash, own);
                self.record_stored(key.clone());
            }
        }
        lease.named = lease.named.max(end);
    }

    /// Gives the blocks of a sequence back, its tail first.
    pub(crate) fn release(&mut self, lease: Lease) {
        for block in lease.blocks.into_iter().rev() {
            self.unpin(block);
        }
    }

    /// Forgets every block. Sequences keep their memory, but nothing of it can be hit.
    pub(crate) fn clear(&mut self) {
        for (_, block) in std::mem::take(&mut self.named) {
            self.blocks[block].key = None;
        }
        self.empty
            .extend(std::mem::take(&mut self.idle).into_values());
        self.generation += 1;
        self.changes.push(Change::Cleared);
    }

    /// Drops idle blocks by name wherever they stand in their chain; names that are unknown or
    /// pinned are passed over. Returns how many went.
    pub(crate) fn remove(&mut self, engine_hashes: &[u64]) -> usize {
        let mut dropped = 0;
        for hash in engine_hashes {
            let Some(&block) = self.named.get(hash) else {
                continue;
            };
            if self.blocks[block].pins == 0 {
                self.idle.remove(&self.blocks[block].released_at);
                self.forget(block);
                self.empty.push(block);
                dropped += 1;
            }
        }
        dropped
    }

    /// Evicts up to `count` least recently used blocks. Returns how many went.
    pub(crate) fn evict(&mut self, count: usize) -> usize {
        for evicted in 0..count {
            let Some(block) = self.evict_one() else {
                return evicted;
            };
            self.empty.push(block);
        }
        count
    }

    /// What changed since the last call, in order.
    pub(crate) fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes)
    }

    fn pin(&mut self, block: usize) {
        let state = &mut self.blocks[block];
        if state.pins == 0 {
            self.idle.remove(&state.released_at);
        }
        state.pins += 1;
    }

    fn unpin(&mut self, block: usize) {
        let state = &mut self.blocks[block];
        state.pins -= 1;
        if state.pins > 0 {
            return;
        }
        if state.key.is_some() {
            self.releases += 1;
            state.released_at = self.releases;
            self.idle.insert(self.releases, block);
        } else {
            self.empty.push(block);
        }
    }

    fn evict_one(&mut self) -> Option<usize> {
        let (_, block) = self.idle.pop_first()?;
        self.forget(block);
        Some(block)
    }

    fn forget(&mut self, block: usize) {
        if let Some(key) = self.blocks[block].key.take() {
            self.named.remove(&key.engine_hash);
            self.record_removed(key.engine_hash);
        }
    }

    fn record_stored(&mut self, key: Key) {
        if let Some(Change::Stored(run)) = self.changes.last_mut()
            && run.last().map(|last| last.engine_hash) == key.parent
            && run.len() < CHANGE_BLOCKS
        {
            run.push(key);
            return;
        }
        self.changes.push(Change::Stored(vec![key]));
    }

    fn record_removed(&mut self, engine_hash: u64) {
        if let Some(Change::Removed(run)) = self.changes.last_mut()
            && run.len() < CHANGE_BLOCKS
        {
            run.push(engine_hash);
            return;
        }
        self.changes.push(Change::Removed(vec![engine_hash]));
    }
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
