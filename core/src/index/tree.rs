//! The tree of blocks of all pools: who holds what, and who holds it without a gap from the root.
//!
//! A **run** is a chain of blocks of one unit with one owner set, without forks: only its last
//! block has children. So a run stands where most trees have one node to a block.
//!
//! Every run has two owner sets. `raw` is what engines reported. `eff` is prefix-closed: an owner
//! is in it only while it is in the parent's, at the worst tier along the chain. Only `eff` is
//! published, so that lookups may gallop; blocks that a removal hides stay in `raw` and return
//! with their parent. As `raw` is one along a run, so is `eff`.

use super::heads::Heads;
use super::leaves::Leaves;
use super::places::{Place, Places};
use super::run::{Block, Run, RunId, TIERS};
use super::sets::{EMPTY, Sets};
use super::slab::{NIL, Slab};
use super::space::Space;
use super::unit::Units;
use crate::hash::chain;
use crate::id::Slot;

/// What follows a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// The block asked for.
    There(Place),
    /// Not the block asked for.
    Absent,
    /// Another block of the tree has the sequence hash.
    Taken,
}

/// The tree and the units its blocks are published in.
#[derive(Debug)]
pub(super) struct Tree {
    pub(super) runs: Slab<Run>,
    pub(super) by_sequence: Places,
    /// By names that differ from the sequence hash.
    pub(super) by_name: Places,
    /// Blocks whose name is their sequence hash.
    pub(super) eponymous: usize,
    /// Secrets of the pools.
    pub(super) secrets: Vec<u64>,
    /// Members are `slot << 5 | SHARED | mask of tiers`.
    pub(super) raw: Sets,
    /// Members are `slot << 2 | tier`, as pages hold them.
    pub(super) eff: Sets,
    pub(super) units: Units,
    pub(super) leaves: Leaves,
    /// First blocks of prompts; blocks of flat families stand alone and are not among them.
    pub(super) heads: Heads,
    /// Blocks.
    pub(super) blocks: usize,
    /// Blocks that the runs have room for.
    pub(super) room: usize,
    /// (owner, block) pairs held.
    pub(super) held: usize,
    /// Number of the use under way.
    pub(super) clock: u32,
}

impl Tree {
    pub(super) fn new(units: Units) -> Self {
        Self {
            runs: Slab::default(),
            by_sequence: Places::new(),
            by_name: Places::new(),
            eponymous: 0,
            secrets: Vec::new(),
            raw: Sets::new(5),
            eff: Sets::new(2),
            units,
            leaves: Leaves::default(),
            heads: Heads::default(),
            blocks: 0,
            room: 0,
            held: 0,
            clock: 0,
        }
    }

    pub(super) fn add_pool(&mut self, secret: u64) -> usize {
        self.secrets.push(secret);
        self.secrets.len() - 1
    }

    pub(super) fn run(&self, id: RunId) -> &Run {
        self.runs.at(id)
    }

    /// Runs that begin after a run.
    pub(super) fn children(&self, id: RunId) -> impl Iterator<Item = RunId> + '_ {
        let some = |id: RunId| (id != NIL).then_some(id);
        std::iter::successors(some(self.run(id).child), move |c| some(self.run(*c).next))
    }

    /// Which of its run's blocks stands at a place.
    pub(super) fn index(&self, place: Place) -> usize {
        usize::from(place.position()).saturating_sub(self.run(place.run()).first.into())
    }

    pub(super) fn block(&self, place: Place) -> Block {
        let block = self.run(place.run()).blocks.get(self.index(place));
        block.copied().unwrap_or_default()
    }

    /// Sequence hash of the block with this token hash after a place.
    pub(super) fn sequence_after(&self, at: Place, tokens: u64) -> u64 {
        if at == Place::ROOT {
            tokens
        } else {
            chain(self.block(at).sequence, tokens)
        }
    }

    /// The block with this sequence hash after a place.
    pub(super) fn next(&self, space: Space, at: Place, sequence: u64) -> Next {
        let run = self.run(at.run());
        let following = if at == Place::ROOT {
            0
        } else {
            self.index(at) + 1
        };
        if let Some(block) = run.blocks.get(following)
            && block.sequence == sequence
        {
            return Next::There(run.place(at.run(), following));
        }
        let Some(place) = self.find(space, sequence) else {
            return Next::Absent;
        };
        let is_child = following == run.blocks.len()
            && self.index(place) == 0
            && self.run(place.run()).parent == at.run();
        if is_child {
            Next::There(place)
        } else {
            Next::Taken
        }
    }

    /// What `raw` says of an owner at a place.
    pub(super) fn low(&self, place: Place, slot: Slot) -> Option<u16> {
        self.raw.get(self.run(place.run()).raw, slot.0)
    }

    /// Adds a block after a place, held by one owner as `low` says, or by nobody as a link.
    /// `more` blocks are expected to follow.
    pub(super) fn add(
        &mut self,
        space: Space,
        at: Place,
        block: Block,
        by: Option<(Slot, u16)>,
        more: usize,
    ) -> Place {
        let parent = self.cut_after(at);
        let run = self.run(parent);
        let depth = if parent == NIL { 0 } else { run.end() };
        let position = self.units.position(depth);
        let begins_unit =
            parent == NIL || position == 0 || self.units.at(run.unit).split == position;
        let has_same_owners = match by {
            None => run.raw == EMPTY,
            Some((slot, low)) => self.raw.is_alone(run.raw, slot.0, low),
        };
        let extends = !begins_unit && run.child == NIL && has_same_owners;
        let id = if extends {
            self.push(parent, block);
            if self.run(parent).is_visible() {
                self.units.touch(self.run(parent).unit, false);
            }
            parent
        } else {
            let id = self.begin(space, parent, depth, block, more);
            if let Some((slot, low)) = by {
                self.runs.at_mut(id).raw = self.raw.replace(EMPTY, slot.0, Some(low));
                self.close(id, slot);
            }
            id
        };
        self.held += usize::from(by.is_some());
        let place = Place::new(id, position);
        self.list(space, block, place);
        place
    }

    /// Adds blocks to the end of a run without children, as long as they belong there and the tree
    /// has neither their hashes nor their names. All that hold the run hold them under these names.
    /// Returns how many were added.
    pub(super) fn extend(&mut self, id: RunId, blocks: &[Block]) -> usize {
        let run = self.run(id);
        let (space, unit, from) = (run.space, run.unit, run.blocks.len());
        let position = run.place(id, from).position();
        let split = self.units.at(unit).split;
        let mut room = self.units.room(run.depth) - from;
        if split >= position {
            room = room.min((split - position).into());
        }
        let blocks = blocks.get(..room).unwrap_or(blocks);
        let before = run.blocks.capacity();
        let run = self.runs.at_mut(id);
        run.blocks.extend_from_slice(blocks);
        let is_visible = run.is_visible();
        let places = (position..).map(|position| Place::new(id, position));
        let mut listed = blocks.iter().zip(places);
        let refused = listed.position(|(block, place)| !self.list_next(space, *block, place));
        let added = refused.unwrap_or(blocks.len());
        let run = self.runs.at_mut(id);
        run.blocks.truncate(from + added);
        self.room = self.room + run.blocks.capacity() - before;
        self.blocks += added;
        self.held += added * self.raw.members(self.run(id).raw).len();
        if added > 0 && is_visible {
            self.units.touch(unit, false);
        }
        added
    }

    fn push(&mut self, id: RunId, block: Block) {
        let blocks = &mut self.runs.at_mut(id).blocks;
        let before = blocks.capacity();
        blocks.push(block);
        self.room += blocks.capacity() - before;
        self.blocks += 1;
    }

    /// A run of its own for a block that joins the tree.
    fn begin(
        &mut self,
        space: Space,
        parent: RunId,
        depth: u32,
        block: Block,
        more: usize,
    ) -> RunId {
        let next = self.run(parent).child;
        let next = if parent == NIL { NIL } else { next };
        let first = self.units.position(depth);
        let room = self.units.room(depth).min(1 + more);
        let id = self.runs.insert(Run {
            blocks: Vec::with_capacity(room),
            parent,
            next,
            depth,
            space,
            first,
            used: self.clock,
            ..Run::default()
        });
        self.room += self.run(id).blocks.capacity();
        self.push(id, block);
        self.runs.at_mut(parent).child = id;
        self.runs.at_mut(next).previous = id;
        let key = space.key(&self.secrets, block.sequence);
        if parent == NIL && !space.family().is_flat() {
            self.heads.add(key);
        }
        let parent_unit = self.run(parent).unit;
        self.runs.at_mut(id).unit = self.units.join(id, key, depth, parent_unit);
        self.leaves.push(id, &self.runs);
        id
    }

    /// Sets what `raw` says of an owner at a place, and what follows for the blocks below. A block
    /// that nobody holds and nothing hangs on is dropped: keep no place across this.
    pub(super) fn hold(&mut self, place: Place, slot: Slot, low: Option<u16>) {
        let at = self.index(place);
        self.hold_some(place.run(), at, at + 1, slot, low);
    }

    /// The same for the blocks of a run from one to before another.
    pub(super) fn hold_some(
        &mut self,
        id: RunId,
        from: usize,
        to: usize,
        slot: Slot,
        low: Option<u16>,
    ) {
        let run = self.run(id);
        let before = self.raw.get(run.raw, slot.0);
        if before == low {
            return;
        }
        let (length, is_leaf) = (run.blocks.len(), run.child == NIL);
        let is_last_owner = low.is_none() && self.raw.members(run.raw).len() == 1;
        match (before.is_some(), low.is_some()) {
            (false, true) => self.held += to - from,
            (true, false) => self.held -= to - from,
            _ => {}
        }
        if is_last_owner && is_leaf && to == length && from > 0 {
            (from..to).for_each(|_| self.pop(id));
            return;
        }
        let mut id = id;
        if to < length {
            id = self.split(id, to).0;
        }
        if from > 0 {
            id = self.split(id, from).1;
        }
        let raw = self.raw.replace(self.run(id).raw, slot.0, low);
        self.runs.at_mut(id).raw = raw;
        self.close(id, slot);
        self.settle(id);
    }

    /// Sets what `raw` says of an owner along a whole run.
    pub(super) fn hold_all(&mut self, id: RunId, slot: Slot, low: Option<u16>) {
        self.hold_some(id, 0, self.run(id).blocks.len(), slot, low);
    }

    /// Restores the invariant of `eff` for one owner from a run downwards.
    fn close(&mut self, from: RunId, slot: Slot) {
        let mut stack = Vec::new();
        let mut at = Some(from);
        while let Some(id) = at {
            let run = self.run(id);
            let own = self.raw.get(run.raw, slot.0);
            let own = own.map(|low| best_tier(low & TIERS));
            let above = if run.parent == NIL {
                Some(0)
            } else {
                self.eff.get(self.run(run.parent).eff, slot.0)
            };
            let tier = above.zip(own).map(|(above, own)| above.max(own));
            let (eff, unit) = (run.eff, run.unit);
            let before = self.eff.get(eff, slot.0);
            if before != tier {
                let is_loss = tier.is_none_or(|tier| before.is_some_and(|before| before < tier));
                self.runs.at_mut(id).eff = self.eff.replace(eff, slot.0, tier);
                self.units.touch(unit, is_loss);
                let mut child = self.run(id).child;
                while child != NIL {
                    if self.raw.get(self.run(child).raw, slot.0).is_some() {
                        stack.push(child);
                    }
                    child = self.run(child).next;
                }
            }
            at = stack.pop();
        }
    }

    /// Drops a run that nobody holds and that has no children, and then its parents likewise.
    pub(super) fn release(&mut self, mut id: RunId) {
        while id != NIL {
            let run = self.run(id);
            if run.raw != EMPTY || run.child != NIL {
                return;
            }
            let (parent, unit, used) = (run.parent, run.unit, run.used);
            self.unlink(id);
            let run = self.runs.remove(id);
            self.blocks -= run.blocks.len();
            self.room -= run.blocks.capacity();
            if parent == NIL && !run.space.family().is_flat() {
                let first = run.blocks.first().map_or(0, |block| block.sequence);
                self.heads.remove(run.space.key(&self.secrets, first));
            }
            for (at, block) in run.blocks.iter().enumerate() {
                self.unlist(run.space, *block, run.place(id, at));
            }
            self.units.leave(id, unit, self.run(parent).unit);
            let above = self.runs.at_mut(parent);
            above.used = above.used.max(used);
            if parent != NIL && above.child != NIL {
                self.merge(parent);
                return;
            }
            if parent != NIL {
                self.leaves.push(parent, &self.runs);
            }
            id = parent;
        }
    }

    /// Drops the last block of a leaf.
    pub(super) fn pop(&mut self, id: RunId) {
        let run = self.run(id);
        let (space, unit, at) = (run.space, run.unit, run.blocks.len().saturating_sub(1));
        let place = run.place(id, at);
        if at == 0 {
            let (raw, eff) = (run.raw, run.eff);
            self.raw.release(raw);
            self.eff.release(eff);
            if eff != EMPTY {
                self.units.touch(unit, true);
            }
            let run = self.runs.at_mut(id);
            (run.raw, run.eff) = (EMPTY, EMPTY);
            self.release(id);
            return;
        }
        if run.is_visible() {
            self.units.touch(unit, true);
        }
        let blocks = &mut self.runs.at_mut(id).blocks;
        let before = blocks.capacity();
        let block = blocks.pop();
        if 4 * blocks.len() <= before {
            blocks.shrink_to(2 * blocks.len());
        }
        self.room -= before - blocks.capacity();
        self.blocks -= 1;
        if let Some(block) = block {
            self.unlist(space, block, place);
        }
    }

    /// Notes that a block and those before it are in use.
    pub(super) fn touch(&mut self, place: Place) {
        if self.clock == u32::MAX {
            // Orders what is old less finely, rather than wrongly.
            self.clock /= 2;
            self.runs.iter_mut().for_each(|run| run.used /= 2);
            self.leaves.rebuild(&self.runs);
        }
        self.clock += 1;
        self.runs.at_mut(place.run()).used = self.clock;
    }
}

/// Best tier of a non-empty mask.
#[allow(clippy::cast_possible_truncation)]
fn best_tier(mask: u16) -> u16 {
    mask.trailing_zeros() as u16
}
