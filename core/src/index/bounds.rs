//! What the index takes, and who goes when that is too much.
//!
//! When memory is short, the leaf that has not been used for longest loses its last block, for all
//! owners at once: what is left is as closed as it was. Only our knowledge goes. The engine still
//! has the block; its removal, if it comes, is of a block unknown.

use std::collections::VecDeque;

use super::owner::Owner;
use super::places::{MAX_RUNS, Places};
use super::run::{Block, SHARED, UNNAMED};
use super::slab::NIL;
use super::space::Space;
use super::store::count;
use super::tree::Tree;
use super::{Applied, BOX_BYTES, Index};
use crate::id::Slot;

/// Bytes that a waiting block takes, the tables included.
const ORPHAN_BYTES: usize = 96;
/// Part of the memory that waiting stores may take.
const ORPHAN_SHARE: usize = 8;
/// Part of the limit that is kept free, for what is taken but not in use. Half of it is for what
/// the account misses, such as an event being applied.
const SPARE: usize = 16;
/// Least part of the blocks that a flush drops when the pages are too large.
const PAGE_STEP: usize = 64;

/// A waiting store: whose, for which parent, and its number.
type Turn = ((Space, Slot), u64, u64);

/// Waiting stores of all owners, the longest waiting first. Some may wait no more.
#[derive(Debug, Default)]
pub(super) struct Queue {
    turns: VecDeque<Turn>,
    number: u64,
}

impl Queue {
    /// Adds a store and returns its number.
    pub(super) fn push(&mut self, owner: (Space, Slot), parent: u64) -> u64 {
        self.number += 1;
        self.turns.push_back((owner, parent, self.number));
        self.number
    }
}

impl Index {
    /// Bytes that the index has taken from the allocator.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let queue = self.queue.turns.capacity() * size_of::<Turn>();
        let owners = self.owners.allocation_size() + self.owner_bytes;
        self.tree.bytes() + owners + queue
    }

    /// Bytes that what the index has takes at most, if it never had more.
    fn used_bytes(&self) -> usize {
        let queue = self.queue.turns.len() * size_of::<Turn>();
        let owners = self.owners.allocation_size() + self.owner_bytes;
        self.tree.used_bytes() + owners + queue
    }

    /// Bounds what is held from the next change on.
    pub fn resize(&mut self, max_bytes: usize, max_page_bytes: usize) {
        self.max_bytes = max_bytes;
        self.max_page_bytes = max_page_bytes;
    }

    /// Drops stores that have waited longest while too many wait.
    pub(super) fn bound_orphans(&mut self, applied: &mut Applied) {
        let most = (self.max_bytes / ORPHAN_SHARE / ORPHAN_BYTES).min(self.max_orphans);
        while self.orphans > most
            && let Some((key, parent, number)) = self.queue.turns.pop_front()
        {
            let Some(owner) = self.owners.get_mut(&key) else {
                continue;
            };
            let before = owner.bytes();
            let dropped = owner.waiting.drop(parent, number);
            let after = owner.bytes();
            self.owner_bytes = self.owner_bytes + after - before;
            self.orphans -= dropped;
            applied.orphans_dropped += count(dropped);
        }
        if self.queue.turns.len() > 1024 + 2 * self.orphans {
            let owners = &self.owners;
            self.queue.turns.retain(|(key, parent, number)| {
                let owner = owners.get(key);
                owner.is_some_and(|owner| owner.waiting.has(*parent, *number))
            });
        }
    }

    /// Drops leaves until what is left fits.
    pub(super) fn bound(&mut self) {
        let limit = self.max_bytes - self.max_bytes / SPARE;
        while self.used_bytes() > limit || self.tree.runs.len() >= MAX_RUNS {
            if !self.evict() {
                break;
            }
        }
        // What is taken and not in use is given back, though not for the sake of a few blocks.
        let has_gone = self.evicted_since_compaction > self.tree.blocks / SPARE;
        if has_gone && self.bytes() > self.max_bytes - self.max_bytes / SPARE / 2 {
            self.evicted_since_compaction = 0;
            self.compact();
        }
    }

    /// Drops leaves if the pages have grown too large; those that they were on shrink with the
    /// flushes that follow.
    pub(super) fn bound_pages(&mut self) {
        let bytes = self.tree.units.directory.envoy_bytes();
        let excess = bytes.saturating_sub(self.max_page_bytes);
        // What has been evicted shows only when its pages have been encoded.
        let is_late = excess > self.max_page_bytes / SPARE;
        if excess == 0 || self.is_dirty() && !is_late {
            return;
        }
        let blocks = self.tree.blocks;
        let share = excess as f64 / bytes as f64;
        let step = (blocks as f64 * share) as usize + 1 + blocks / PAGE_STEP;
        for _ in 0..step {
            if !self.evict() {
                break;
            }
        }
    }

    /// Drops the last block of the leaf that has not been used for longest. Whether there was one.
    fn evict(&mut self) -> bool {
        let tree = &mut self.tree;
        let Some(id) = tree.leaves.oldest(&tree.runs) else {
            return false;
        };
        let run = tree.runs.at(id);
        let Block { sequence, name } = run.blocks.last().copied().unwrap_or_default();
        let members = tree.raw.members(run.raw);
        for member in members {
            let slot = Slot(member >> tree.raw.shift());
            let Some(owner) = self.owners.get_mut(&(run.space, slot)) else {
                continue;
            };
            owner.held -= 1;
            let before = owner.bytes();
            let Owner { own, announced, .. } = owner;
            if let Some(announced) = announced {
                if member & SHARED == 0 {
                    own.of(sequence)
                        .for_each(|name| announced.forget(name.hash));
                } else {
                    announced.forget(name);
                }
            }
            if member & SHARED == 0 {
                own.forget(sequence);
            }
            self.owner_bytes = self.owner_bytes + owner.bytes() - before;
        }
        tree.held -= members.len();
        self.evicted_owner_blocks += members.len() as u64;
        self.evicted_blocks += 1;
        self.evicted_since_compaction += 1;
        tree.pop(id);
        true
    }

    /// Gives back memory that is taken and not in use.
    fn compact(&mut self) {
        self.tree.compact();
        for owner in self.owners.values_mut() {
            let before = owner.bytes();
            owner.own.compact();
            owner.waiting.compact();
            self.owner_bytes = self.owner_bytes + owner.bytes() - before;
        }
        self.queue.turns.shrink_to_fit();
    }
}

impl Tree {
    fn bytes(&self) -> usize {
        let tables = self.by_sequence.bytes() + self.by_name.bytes();
        let sets = self.raw.bytes() + self.eff.bytes();
        self.runs.bytes()
            + self.block_bytes()
            + tables
            + sets
            + self.units.bytes()
            + self.leaves.bytes()
            + self.heads.bytes()
    }

    fn used_bytes(&self) -> usize {
        let tables = self.by_sequence.used_bytes() + self.by_name.used_bytes();
        let sets = self.raw.used_bytes() + self.eff.used_bytes();
        self.runs.used_bytes()
            + self.block_bytes()
            + tables
            + sets
            + self.units.used_bytes()
            + self.leaves.bytes()
            + self.heads.bytes()
    }

    /// Bytes of the runs' lists of blocks.
    fn block_bytes(&self) -> usize {
        self.room * size_of::<Block>() + self.runs.len() * BOX_BYTES
    }

    /// Numbers everything anew without gaps.
    fn compact(&mut self) {
        let renumber = |ids: &[u32], id: &mut u32| {
            if *id != NIL {
                *id = ids.get(*id as usize).copied().unwrap_or(NIL);
            }
        };
        let runs = self.runs.compact();
        let units = self.units.compact();
        let (raw, eff) = (self.raw.compact(), self.eff.compact());
        for run in self.runs.iter_mut() {
            for id in [
                &mut run.parent,
                &mut run.child,
                &mut run.next,
                &mut run.previous,
            ] {
                renumber(&runs, id);
            }
            renumber(&units, &mut run.unit);
            renumber(&raw, &mut run.raw);
            renumber(&eff, &mut run.eff);
        }
        for unit in self.units.iter_mut() {
            renumber(&runs, &mut unit.root);
        }
        (self.by_sequence, self.by_name) = (Places::new(), Places::new());
        let listed = self.runs.iter().flat_map(|(id, run)| {
            let blocks = run.blocks.iter().enumerate();
            blocks.map(move |(at, block)| (run.space, *block, run.place(id, at)))
        });
        let keys = |(space, block, place): (Space, Block, _)| {
            let key = space.key(&self.secrets, block.sequence);
            (key, place)
        };
        self.by_sequence.fill(listed.clone().map(keys));
        let has_own = |block: &Block| block.name != UNNAMED && !block.is_eponymous();
        let named = listed.filter(|(_, block, _)| has_own(block));
        let keys = |(space, block, place): (Space, Block, _)| {
            let key = space.name_key(&self.secrets, block.name);
            (key, place)
        };
        self.by_name.fill(named.map(keys));
        self.leaves.rebuild(&self.runs);
    }
}
