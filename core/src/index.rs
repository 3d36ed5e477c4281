//! The authoritative index: which owner holds which blocks, and its pages.
//!
//! Invariants:
//! - what is published is prefix-closed per owner, and tiers never get better along a chain;
//! - a page image is the absolute state of its units: writing it twice, late or out of order does
//!   no harm;
//! - engine hashes are looked up per owner and never compared between owners.

mod announced;
mod bounds;
#[cfg(test)]
mod check;
mod cut;
mod directory;
mod dump;
mod heads;
mod held;
mod leaves;
mod listing;
mod lookup;
mod own;
mod owner;
mod places;
mod publish;
mod run;
mod sets;
mod slab;
mod space;
mod store;
mod tree;
mod unit;
mod waiting;

use std::ops::Range;
use std::sync::Arc;

use hashbrown::HashMap;
use serde::{Deserialize, Serialize};

use crate::event::EventData;
use crate::id::{Family, Slot, Tier};
use directory::Directory;
pub use held::parents_first;
use space::Space;
use tree::Tree;
use unit::Units;
use waiting::OrphanBlock;

/// Bytes that an allocator takes for a box beside what is in it.
const BOX_BYTES: usize = 16;

/// Shape and bounds of an index.
#[derive(Clone, Copy, Debug)]
pub struct IndexConfig {
    /// Epoch of the pages.
    pub epoch: u32,
    /// Level to start with: `2^level` pages.
    pub level: u8,
    /// Blocks to a group, at most [`crate::page::MAX_GROUP`].
    pub group: u8,
    /// Blocks of stores that wait for their parent, over all owners. The longest waiting are
    /// dropped for others.
    pub max_orphans: usize,
    /// Bytes that the index may take. Leaves that have not been used for longest are dropped for
    /// others.
    pub max_bytes: usize,
    /// Bytes that the pages and their keys may take in Envoy, likewise.
    pub max_page_bytes: usize,
}

/// What an event changed, in blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Applied {
    /// Blocks the owner did not hold on this tier.
    pub stored: u32,
    /// Stored blocks that it held already, and removed names of blocks that another name keeps.
    pub duplicates: u32,
    /// Blocks it holds no more on this tier.
    pub removed: u32,
    /// Removed blocks that it did not hold.
    pub unknown: u32,
    /// Stored blocks that wait for their parent.
    pub orphaned: u32,
    /// Blocks that waited and were stored, because their parent came.
    pub adopted: u32,
    /// Waiting blocks dropped because too many wait.
    pub orphans_dropped: u32,
    /// Names that moved to another block.
    pub renamed: u32,
    /// Blocks dropped because another block has their sequence hash.
    pub collisions: u32,
    /// Blocks given up because their owner announced more than it can hold.
    pub expired: u32,
}

/// Size of an index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct IndexStats {
    /// Distinct blocks.
    pub blocks: usize,
    /// (owner, block) pairs.
    pub owner_blocks: usize,
    /// Units.
    pub units: usize,
    /// Distinct owner sets published.
    pub owner_sets: usize,
    /// Pages.
    pub pages: u32,
    /// Level of page ids.
    pub level: u8,
    /// Bytes of the pages as last written.
    pub page_bytes: usize,
    /// Bytes of the pages and their keys in Envoy.
    pub envoy_bytes: usize,
    /// Pages that must be written.
    pub dirty_pages: usize,
    /// Units that did not fit into their page.
    pub left_out_units: usize,
    /// Blocks waiting for their parent.
    pub orphans: usize,
    /// Bytes of the index.
    pub bytes: usize,
    /// Blocks dropped for want of memory so far.
    pub evicted_blocks: u64,
    /// (owner, block) pairs dropped with them.
    pub evicted_owner_blocks: u64,
}

/// A page to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageWrite {
    /// Its id.
    pub id: u32,
    /// Its image.
    pub bytes: Arc<[u8]>,
}

/// A block of an owner in a dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// What the hashes are.
    pub family: Family,
    /// Sequence hash.
    pub sequence: u64,
    /// Sequence hash of the block before it.
    pub parent: Option<u64>,
    /// The engine's name for it; `None` for a block the owner lost that others hang on.
    pub name: Option<u64>,
    /// Bit per tier.
    pub tiers: u8,
}

/// The index of all pools.
#[derive(Debug)]
pub struct Index {
    tree: Tree,
    owners: store::Owners,
    /// Most names of an owner, for families whose caches forget blocks without a word.
    limits: HashMap<Space, usize>,
    epoch: u32,
    /// Blocks that wait.
    orphans: usize,
    queue: bounds::Queue,
    /// Room for the blocks of a store.
    scratch: Vec<OrphanBlock>,
    /// Bytes of all owners' own.
    owner_bytes: usize,
    max_orphans: usize,
    max_bytes: usize,
    max_page_bytes: usize,
    evicted_blocks: u64,
    evicted_owner_blocks: u64,
    evicted_since_compaction: usize,
}

impl Index {
    /// An empty index.
    #[must_use]
    pub fn new(config: IndexConfig) -> Self {
        let group = config.group.clamp(1, crate::page::MAX_GROUP);
        Self {
            tree: Tree::new(Units::new(group, Directory::new(config.level))),
            owners: HashMap::new(),
            limits: HashMap::new(),
            epoch: config.epoch,
            orphans: 0,
            queue: bounds::Queue::default(),
            scratch: Vec::new(),
            owner_bytes: 0,
            max_orphans: config.max_orphans,
            max_bytes: config.max_bytes,
            max_page_bytes: config.max_page_bytes,
            evicted_blocks: 0,
            evicted_owner_blocks: 0,
            evicted_since_compaction: 0,
        }
    }

    /// Adds a pool with its secret and returns its number.
    pub fn add_pool(&mut self, key: u64) -> usize {
        self.tree.add_pool(key)
    }

    /// Applies an event of one owner whose hashes are Dynamo's.
    pub fn apply(&mut self, pool: usize, slot: Slot, tier: Tier, data: &EventData) -> Applied {
        self.apply_family(pool, Family::Dynamo, slot, tier, data)
    }

    /// Applies an event of one owner about its blocks of one family. Of any family but Dynamo's,
    /// the `tokens_hash` of a stored block is its hash in that family.
    pub fn apply_family(
        &mut self,
        pool: usize,
        family: Family,
        slot: Slot,
        tier: Tier,
        data: &EventData,
    ) -> Applied {
        let mut applied = Applied::default();
        let space = Space::new(pool, family);
        match data {
            EventData::Stored(stored) if family.is_flat() => {
                self.store_each(space, slot, tier, stored, &mut applied);
            }
            EventData::Stored(stored) => self.store(space, slot, tier, stored, &mut applied),
            EventData::Removed(removed) => {
                self.remove(space, slot, tier, &removed.block_hashes, &mut applied);
            }
            EventData::Cleared => applied.removed = self.clear(space, slot),
        }
        self.expire(space, slot, data, &mut applied);
        self.bound();
        applied
    }

    /// Drops all blocks of an owner and returns how many it held.
    pub fn remove_owner(&mut self, pool: usize, slot: Slot) -> u32 {
        let families = Family::ALL.into_iter();
        families.fold(0, |sum: u32, family| {
            sum.saturating_add(self.clear(Space::new(pool, family), slot))
        })
    }

    fn clear(&mut self, space: Space, slot: Slot) -> u32 {
        let Some(owner) = self.owners.remove(&(space, slot)) else {
            return 0;
        };
        self.orphans -= owner.waiting.len();
        self.owner_bytes -= owner.bytes();
        let before = self.tree.held;
        let runs: Vec<_> = self.runs_of(space, slot).collect();
        for run in runs {
            self.tree.hold_all(run, slot, None);
        }
        store::count(before - self.tree.held)
    }

    /// The next pages to write, in the order in which a reader may see them. Bounded per call:
    /// call again while [`Index::is_dirty`].
    pub fn flush(&mut self) -> Vec<PageWrite> {
        let writes = publish::flush(&mut self.tree, self.epoch);
        self.bound_pages();
        writes
    }

    /// Whether some page must be written.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.tree.units.has_changes() || self.tree.units.directory.is_dirty()
    }

    /// The image of one page as of the last flush, for a reader that has none: what has changed
    /// since comes with the next flush.
    pub fn page(&mut self, id: u32) -> Arc<[u8]> {
        publish::page(&mut self.tree, id, self.epoch)
    }

    /// All page ids; empty pages must be written too.
    #[must_use]
    pub fn page_ids(&self) -> Range<u32> {
        0..self.tree.units.directory.pages()
    }

    /// Level for the head record.
    #[must_use]
    pub fn level(&self) -> u8 {
        self.tree.units.directory.level()
    }

    /// Sizes.
    #[must_use]
    pub fn stats(&self) -> IndexStats {
        let directory = &self.tree.units.directory;
        IndexStats {
            blocks: self.tree.blocks,
            owner_blocks: self.tree.held,
            units: self.tree.units.len(),
            owner_sets: self.tree.eff.len(),
            pages: directory.pages(),
            level: directory.level(),
            page_bytes: directory.bytes(),
            envoy_bytes: directory.envoy_bytes(),
            dirty_pages: directory.dirty(),
            left_out_units: directory.left_out(),
            orphans: self.orphans,
            bytes: self.bytes(),
            evicted_blocks: self.evicted_blocks,
            evicted_owner_blocks: self.evicted_owner_blocks,
        }
    }

    /// Blocks that an owner holds.
    #[must_use]
    pub fn owner_blocks(&self, pool: usize, slot: Slot) -> usize {
        let owner = |family| self.owners.get(&(Space::new(pool, family), slot));
        let owners = Family::ALL.into_iter().filter_map(owner);
        owners.map(|owner| owner.held).sum()
    }
}

#[cfg(test)]
mod tests;
