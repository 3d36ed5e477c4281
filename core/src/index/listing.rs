//! Blocks by their hashes and names. A block whose name is its sequence hash, as Dynamo's own engines
//! and caches name it, is listed once.

use super::places::Place;
use super::run::{Block, Run, RunId, SHARED, UNNAMED};
use super::slab::Slab;
use super::space::Space;
use super::tree::Tree;

/// Whether the block with this sequence hash stands at a place.
fn is_block(runs: &Slab<Run>, place: Place, space: Space, sequence: u64) -> bool {
    let run = runs.at(place.run());
    let at = usize::from(place.position().saturating_sub(run.first));
    run.space == space
        && run
            .blocks
            .get(at)
            .is_some_and(|block| block.sequence == sequence)
}

impl Tree {
    /// The place of a sequence hash.
    pub(super) fn find(&self, space: Space, sequence: u64) -> Option<Place> {
        let is_it = |place: Place| is_block(&self.runs, place, space, sequence);
        self.by_sequence
            .get(space.key(&self.secrets, sequence), is_it)
    }

    /// Whether a prompt that some block of the tree is of may begin with this one.
    pub(super) fn may_begin(&self, space: Space, sequence: u64) -> bool {
        let key = space.key(&self.secrets, sequence);
        self.heads.may_have(key) || space.family().is_flat()
    }

    /// The place of the block that a name is kept with.
    pub(super) fn find_name(&self, space: Space, name: u64) -> Option<Place> {
        if self.eponymous > 0
            && let Some(place) = self.find(space, name)
            && self.block(place).name == name
        {
            return Some(place);
        }
        self.find_unlike(space, name)
    }

    /// The place of the block that has a name that is not its sequence hash.
    fn find_unlike(&self, space: Space, name: u64) -> Option<Place> {
        if self.by_name.is_empty() {
            return None;
        }
        let is_it =
            |place: Place| self.block(place).name == name && self.run(place.run()).space == space;
        self.by_name.get(space.name_key(&self.secrets, name), is_it)
    }

    /// Enters a block into the tables.
    pub(super) fn list(&mut self, space: Space, block: Block, place: Place) {
        let hash = space.key(&self.secrets, block.sequence);
        self.by_sequence.insert(hash, place);
        self.list_name(space, block, place);
    }

    /// Enters a block that follows in its run, if the tables have neither its hash nor its name.
    /// Whether they had not.
    pub(super) fn list_next(&mut self, space: Space, block: Block, place: Place) -> bool {
        let hash = space.key(&self.secrets, block.sequence);
        let runs = &self.runs;
        let is_it = |other: Place| is_block(runs, other, space, block.sequence);
        if !self.by_sequence.insert_absent(hash, place, is_it) {
            return false;
        }
        let named = if block.is_eponymous() {
            self.find_unlike(space, block.name)
        } else {
            self.find_name(space, block.name)
        };
        if named.is_some() {
            self.by_sequence.remove(hash, place);
            return false;
        }
        self.list_name(space, block, place);
        true
    }

    fn list_name(&mut self, space: Space, block: Block, place: Place) {
        if block.is_eponymous() {
            self.eponymous += 1;
        } else if block.name != UNNAMED {
            let hash = space.name_key(&self.secrets, block.name);
            self.by_name.insert(hash, place);
        }
    }

    fn unlist_name(&mut self, space: Space, block: Block, place: Place) {
        if block.is_eponymous() {
            self.eponymous -= 1;
        } else if block.name != UNNAMED {
            let key = space.name_key(&self.secrets, block.name);
            self.by_name.remove(key, place);
        }
    }

    /// Takes a block out of the tables.
    pub(super) fn unlist(&mut self, space: Space, block: Block, place: Place) {
        let key = space.key(&self.secrets, block.sequence);
        self.by_sequence.remove(key, place);
        self.unlist_name(space, block, place);
    }

    /// Keeps a name with a block, if it has that name or nobody uses the one it has. `is_held`:
    /// the owner that brings the name holds the block.
    pub(super) fn shares(&mut self, place: Place, name: u64, is_held: bool) -> bool {
        let (run, block) = (self.run(place.run()), self.block(place));
        if block.name == name || name == UNNAMED || is_held {
            return block.name == name && name != UNNAMED;
        }
        let space = run.space;
        let is_used = self.raw.members(run.raw).iter().any(|m| m & SHARED != 0);
        if is_used || self.find_name(space, name).is_some() {
            return false;
        }
        self.unlist_name(space, block, place);
        let index = self.index(place);
        let block = Block { name, ..block };
        if let Some(kept) = self.runs.at_mut(place.run()).blocks.get_mut(index) {
            *kept = block;
        }
        self.list_name(space, block, place);
        true
    }

    /// Where one of the blocks of a run stands: its keys in both tables.
    pub(super) fn relist(&mut self, old: RunId, new: RunId, from: usize, to: usize) {
        let run = self.runs.at(new);
        for (at, block) in run.blocks.iter().enumerate().take(to).skip(from) {
            let (was, is) = (run.place(old, at), run.place(new, at));
            let key = run.space.key(&self.secrets, block.sequence);
            self.by_sequence.replace(key, was, is);
            if block.name != UNNAMED && !block.is_eponymous() {
                let key = run.space.name_key(&self.secrets, block.name);
                self.by_name.replace(key, was, is);
            }
        }
    }
}
