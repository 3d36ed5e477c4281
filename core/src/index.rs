//! The authoritative index: which owner holds which blocks, and its pages.
//!
//! Invariants:
//! - what is published is prefix-closed per owner, and tiers never get better along a chain;
//! - a page image is the absolute state of its units: writing it twice, late or out of order does
//!   no harm;
//! - engine hashes are looked up per owner and never compared between owners.

mod directory;
mod held;
mod owner;
mod publish;
mod sets;
mod slab;
mod tree;
mod unit;

use std::ops::Range;

use hashbrown::HashMap;
use serde::{Deserialize, Serialize};

use crate::event::{EventData, Stored};
use crate::id::{Slot, Tier};
use crate::overlap::Overlap;
use directory::Directory;
pub use held::parents_first;
use owner::{Orphan, OrphanBlock, Owner, Unnamed};
use sets::EMPTY;
use slab::NIL;
use tree::Tree;
use unit::Units;

/// Shape and bounds of an index.
#[derive(Clone, Copy, Debug)]
pub struct IndexConfig {
    /// Epoch of the pages.
    pub epoch: u32,
    /// Level to start with: `2^level` pages.
    pub level: u8,
    /// Blocks to a group, at most [`crate::page::MAX_GROUP`].
    pub group: u8,
    /// Blocks of stores that wait for their parent, over all owners.
    pub max_orphans: usize,
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
    /// Stored blocks dropped because too many wait.
    pub orphans_dropped: u32,
    /// Names that moved to another block.
    pub renamed: u32,
    /// Blocks dropped because another block has their sequence hash.
    pub collisions: u32,
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
    /// Pages that must be written.
    pub dirty_pages: usize,
    /// Units that did not fit into their page.
    pub left_out_units: usize,
    /// Blocks waiting for their parent.
    pub orphans: usize,
}

/// A page to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageWrite {
    /// Its id.
    pub id: u32,
    /// Its image.
    pub bytes: Vec<u8>,
}

/// A block of an owner in a dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
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
    owners: HashMap<(usize, Slot), Owner>,
    epoch: u32,
    orphans: usize,
    max_orphans: usize,
}

impl Index {
    /// An empty index.
    #[must_use]
    pub fn new(config: IndexConfig) -> Self {
        let group = config.group.clamp(1, crate::page::MAX_GROUP);
        Self {
            tree: Tree::new(Units::new(group, Directory::new(config.level))),
            owners: HashMap::new(),
            epoch: config.epoch,
            orphans: 0,
            max_orphans: config.max_orphans,
        }
    }

    /// Adds a pool with its secret and returns its number.
    pub fn add_pool(&mut self, key: u64) -> usize {
        self.tree.add_pool(key)
    }

    /// Applies an event of one owner.
    pub fn apply(&mut self, pool: usize, slot: Slot, tier: Tier, data: &EventData) -> Applied {
        let mut applied = Applied::default();
        match data {
            EventData::Stored(stored) => self.store(pool, slot, tier, stored, &mut applied),
            EventData::Removed(removed) => {
                for hash in &removed.block_hashes {
                    self.remove(pool, slot, tier, *hash, &mut applied);
                }
            }
            EventData::Cleared => {
                applied.removed = self.remove_owner(pool, slot);
            }
        }
        applied
    }

    /// Drops all blocks of an owner and returns how many it held.
    pub fn remove_owner(&mut self, pool: usize, slot: Slot) -> u32 {
        let Some(owner) = self.owners.remove(&(pool, slot)) else {
            return 0;
        };
        self.orphans -= owner.waiting();
        let before = self.tree.held;
        for name in owner.names() {
            // A second name of a block finds it dropped already.
            if self.tree.tiers(name.node, slot) != 0 {
                self.tree.hold(name.node, slot, 0);
            }
        }
        u32::try_from(before - self.tree.held).unwrap_or(u32::MAX)
    }

    fn store(
        &mut self,
        pool: usize,
        slot: Slot,
        tier: Tier,
        stored: &Stored,
        applied: &mut Applied,
    ) {
        let waiting = |block: &crate::event::StoredBlock| OrphanBlock {
            hash: block.block_hash,
            tokens_hash: block.tokens_hash,
            gone: false,
        };
        let blocks = stored.blocks.iter().map(waiting).collect();
        let first = (stored.parent_hash, Orphan { tier, blocks });
        let mut work = vec![first];
        let mut is_adoption = false;
        while let Some((parent, orphan)) = work.pop() {
            let owner = self.owners.entry((pool, slot)).or_default();
            let at = match parent {
                None => Some(NIL),
                Some(hash) => owner.name(hash).map(|name| name.node),
            };
            let Some(at) = at else {
                let n = orphan.blocks.len();
                let count = u32::try_from(n).unwrap_or(u32::MAX);
                if self.orphans + n > self.max_orphans {
                    applied.orphans_dropped += count;
                } else if let Some(parent) = parent {
                    self.orphans += n;
                    applied.orphaned += count;
                    owner.wait(parent, orphan);
                }
                continue;
            };
            for (hash, adopted) in self.attach(pool, slot, at, &orphan, applied, is_adoption) {
                self.orphans -= adopted.blocks.len();
                work.push((Some(hash), adopted));
            }
            is_adoption = true;
        }
    }

    /// Stores a chain of blocks below a node. Returns the stores that waited for one of them.
    fn attach(
        &mut self,
        pool: usize,
        slot: Slot,
        parent: u32,
        chain: &Orphan,
        applied: &mut Applied,
        is_adoption: bool,
    ) -> Vec<(u64, Orphan)> {
        let pool_number = u16::try_from(pool).unwrap_or(u16::MAX);
        let bit = 1_u16 << chain.tier.index();
        let mut adopted = Vec::new();
        let mut at = parent;
        for block in &chain.blocks {
            let Some(node) = self.tree.below(pool_number, at, block.tokens_hash) else {
                applied.collisions += 1;
                break;
            };
            at = node;
            if block.gone {
                continue;
            }
            let owner = self.owners.entry((pool, slot)).or_default();
            let named = owner.name(block.hash);
            let is_same =
                named.is_some_and(|name| name.node == node && u16::from(name.tiers) & bit != 0);
            if is_same {
                applied.duplicates += 1;
            } else {
                let tiers = self.tree.tiers(node, slot);
                let is_held = tiers & bit != 0;
                // Held before the old block is let go, which might drop this one otherwise.
                self.tree.hold(node, slot, tiers | bit);
                if named.is_some_and(|name| name.node != node) {
                    applied.renamed += 1;
                    for tier in Tier::ALL {
                        self.unname(pool, slot, tier, block.hash);
                    }
                }
                let owner = self.owners.entry((pool, slot)).or_default();
                owner.add(block.hash, node, chain.tier, is_held);
                match (is_held, is_adoption) {
                    (true, _) => applied.duplicates += 1,
                    (false, false) => applied.stored += 1,
                    (false, true) => applied.adopted += 1,
                }
            }
            let owner = self.owners.entry((pool, slot)).or_default();
            let waiting = owner.waiting_for(block.hash);
            adopted.extend(waiting.into_iter().map(|orphan| (block.hash, orphan)));
        }
        if at != parent {
            // Links that nothing came to hang on.
            let tiers = self.tree.tiers(at, slot);
            self.tree.hold(at, slot, tiers);
        }
        adopted
    }

    fn remove(&mut self, pool: usize, slot: Slot, tier: Tier, hash: u64, applied: &mut Applied) {
        let outcome = self.unname(pool, slot, tier, hash);
        // A block that is held may be in stores that wait as well: it must not come back with them.
        let owner = self.owners.get_mut(&(pool, slot));
        let waited = owner.is_some_and(|owner| owner.remove_waiting(hash, tier));
        match outcome {
            Unnamed::Left(_) => applied.removed += 1,
            Unnamed::Kept => applied.duplicates += 1,
            Unnamed::Unknown if waited => applied.removed += 1,
            Unnamed::Unknown => applied.unknown += 1,
        }
    }

    fn unname(&mut self, pool: usize, slot: Slot, tier: Tier, hash: u64) -> Unnamed {
        let Some(owner) = self.owners.get_mut(&(pool, slot)) else {
            return Unnamed::Unknown;
        };
        let outcome = owner.remove(hash, tier);
        if let Unnamed::Left(node) = outcome {
            let tiers = self.tree.tiers(node, slot) & !(1 << tier.index());
            self.tree.hold(node, slot, tiers);
        }
        outcome
    }

    /// What every owner of a pool holds of a prompt, from the tree itself; owners that hold
    /// nothing are left out. Ascending by slot.
    #[must_use]
    pub fn overlaps(&self, pool: usize, prompt: &[u64]) -> Vec<(Slot, Overlap)> {
        let pool = u16::try_from(pool).unwrap_or(u16::MAX);
        let mut found: Vec<(Slot, Overlap)> = Vec::new();
        let mut mark = |set, depth| {
            for member in self.tree.eff.members(set) {
                let (slot, tier) = (Slot(member >> 2), usize::from(member & 3));
                let at = match found.binary_search_by_key(&slot, |(slot, _)| *slot) {
                    Ok(at) => at,
                    Err(at) => {
                        found.insert(at, (slot, Overlap::default()));
                        at
                    }
                };
                if let Some((_, overlap)) = found.get_mut(at) {
                    overlap.depth.iter_mut().skip(tier).for_each(|d| *d = depth);
                }
            }
        };
        let (mut set, mut depth) = (EMPTY, 0);
        for sequence in prompt {
            let node = self.tree.find(pool, *sequence).map(|id| self.tree.node(id));
            let Some(eff) = node.map(|n| n.eff).filter(|eff| *eff != EMPTY) else {
                break;
            };
            if eff != set {
                mark(set, depth);
                set = eff;
            }
            depth += 1;
        }
        mark(set, depth);
        found
    }

    /// Sequence hashes from a prompt's first block to the one with this hash; `None` for a block
    /// that the index does not have.
    #[must_use]
    pub fn chain(&self, pool: usize, hash: u64) -> Option<Vec<u64>> {
        let mut at = self.tree.find(u16::try_from(pool).ok()?, hash)?;
        let mut chain = Vec::new();
        while at != NIL {
            let node = self.tree.node(at);
            chain.push(node.sequence);
            at = node.parent;
        }
        chain.reverse();
        Some(chain)
    }

    /// Positions of a prompt's blocks after which other prompts go on differently, deepest first,
    /// at most `most`.
    #[must_use]
    pub fn branches(&self, pool: usize, prompt: &[u64], most: usize) -> Vec<u32> {
        let pool = u16::try_from(pool).unwrap_or(u16::MAX);
        let nodes = prompt.iter().map_while(|hash| self.tree.find(pool, *hash));
        let nodes: Vec<u32> = nodes.collect();
        let numbered = (0_u32..).zip(nodes.iter().enumerate());
        let branch = |(position, (at, node)): (u32, (usize, &u32))| {
            let next = prompt.get(at + 1);
            let goes_elsewhere = |child| Some(&self.tree.node(child).sequence) != next;
            let branches = next.is_some() && self.tree.children(*node).any(goes_elsewhere);
            branches.then_some(position)
        };
        let mut branches: Vec<u32> = numbered.filter_map(branch).collect();
        branches.reverse();
        branches.truncate(most);
        branches
    }

    /// The next pages to write, in the order in which a reader may see them. Bounded per call:
    /// call again while [`Index::is_dirty`].
    pub fn flush(&mut self) -> Vec<PageWrite> {
        publish::flush(&mut self.tree, self.epoch)
    }

    /// Whether some page must be written.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.tree.units.has_changes() || self.tree.units.directory.is_dirty()
    }

    /// The image of one page as of the last flush, for a reader that has none: what has changed
    /// since comes with the next flush.
    pub fn page(&mut self, id: u32) -> Vec<u8> {
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
            blocks: self.tree.blocks(),
            owner_blocks: self.tree.held,
            units: self.tree.units.len(),
            owner_sets: self.tree.eff.len(),
            pages: directory.pages(),
            level: directory.level(),
            page_bytes: directory.bytes(),
            dirty_pages: directory.dirty(),
            left_out_units: directory.left_out(),
            orphans: self.orphans,
        }
    }

    /// Blocks that an owner holds.
    #[must_use]
    pub fn owner_blocks(&self, pool: usize, slot: Slot) -> usize {
        self.owners.get(&(pool, slot)).map_or(0, Owner::len)
    }

    /// All blocks of an owner, parents first. Waiting stores are not part of it.
    #[must_use]
    pub fn dump(&self, pool: usize, slot: Slot) -> Vec<Held> {
        let Some(owner) = self.owners.get(&(pool, slot)) else {
            return Vec::new();
        };
        let mut blocks: HashMap<u32, Vec<Option<owner::Name>>> = HashMap::new();
        for name in owner.names() {
            blocks.entry(name.node).or_default().push(Some(name));
            let mut parent = self.tree.node(name.node).parent;
            while parent != NIL && self.tree.tiers(parent, slot) == 0 {
                blocks.entry(parent).or_insert_with(|| vec![None]);
                parent = self.tree.node(parent).parent;
            }
        }
        let mut order: Vec<(u32, u32)> = blocks
            .keys()
            .map(|id| (self.tree.node(*id).depth, *id))
            .collect();
        order.sort_unstable();
        let mut dump = Vec::with_capacity(order.len());
        for (_, id) in order {
            let node = self.tree.node(id);
            let parent = (node.parent != NIL).then(|| self.tree.node(node.parent).sequence);
            for name in blocks.remove(&id).unwrap_or_default() {
                dump.push(Held {
                    sequence: node.sequence,
                    parent,
                    name: name.map(|n| n.hash),
                    tiers: name.map_or(0, |n| n.tiers),
                });
            }
        }
        dump
    }

    /// Gives an owner without blocks those of a dump. Blocks whose parent the dump lacks, and names
    /// that it uses twice, are dropped and counted as collisions.
    pub fn restore(&mut self, pool: usize, slot: Slot, dump: &[Held]) -> Applied {
        let mut applied = Applied::default();
        let pool_number = u16::try_from(pool).unwrap_or(u16::MAX);
        let mut links = Vec::new();
        for held in dump {
            let parent = match held.parent {
                None => Some(NIL),
                Some(parent) => self.tree.find(pool_number, parent),
            };
            let node = parent
                .and_then(|parent| self.tree.with_sequence(pool_number, parent, held.sequence));
            let Some(node) = node else {
                applied.collisions += 1;
                continue;
            };
            let Some(name) = held.name else {
                links.push(held.sequence);
                continue;
            };
            let owner = self.owners.entry((pool, slot)).or_default();
            if owner.name(name).is_some() {
                applied.collisions += 1;
                continue;
            }
            for tier in Tier::ALL {
                let bit = 1_u16 << tier.index();
                if u16::from(held.tiers) & bit == 0 {
                    continue;
                }
                let tiers = self.tree.tiers(node, slot);
                let owner = self.owners.entry((pool, slot)).or_default();
                owner.add(name, node, tier, tiers & bit != 0);
                self.tree.hold(node, slot, tiers | bit);
                applied.stored += 1;
            }
        }
        for sequence in links.into_iter().rev() {
            if let Some(node) = self.tree.find(pool_number, sequence) {
                let tiers = self.tree.tiers(node, slot);
                self.tree.hold(node, slot, tiers);
            }
        }
        applied
    }
}

#[cfg(test)]
mod tests;
