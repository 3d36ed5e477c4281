//! Blocks by their hashes and names.

use super::places::Place;
use super::run::{Block, RunId, SHARED, UNNAMED};
use super::space::Space;
use super::tree::Tree;

impl Tree {
    /// The place of a sequence hash.
    pub(super) fn find(&self, space: Space, sequence: u64) -> Option<Place> {
        let is_it = |place: &Place| {
            self.block(*place).sequence == sequence && self.run(place.run()).space == space
        };
        self.by_sequence
            .get(space.key(&self.secrets, sequence), is_it)
    }

    /// The place of the block that a name is kept with.
    pub(super) fn find_name(&self, space: Space, name: u64) -> Option<Place> {
        let is_it =
            |place: &Place| self.block(*place).name == name && self.run(place.run()).space == space;
        self.by_name.get(space.name_key(&self.secrets, name), is_it)
    }

    /// Enters a block into the tables.
    pub(super) fn list(&mut self, space: Space, block: Block, place: Place) {
        let Self { runs, secrets, .. } = self;
        let (runs, secrets) = (&*runs, &*secrets);
        let key = |place: &Place| {
            let run = runs.at(place.run());
            let at = usize::from(place.position().saturating_sub(run.first));
            run.space
                .key(secrets, run.blocks.get(at).map_or(0, |b| b.sequence))
        };
        self.by_sequence
            .insert(space.key(secrets, block.sequence), place, key);
        if block.name != UNNAMED {
            self.list_name(space, block.name, place);
        }
    }

    fn list_name(&mut self, space: Space, name: u64, place: Place) {
        let Self { runs, secrets, .. } = self;
        let (runs, secrets) = (&*runs, &*secrets);
        let key = |place: &Place| {
            let run = runs.at(place.run());
            let at = usize::from(place.position().saturating_sub(run.first));
            run.space
                .name_key(secrets, run.blocks.get(at).map_or(0, |b| b.name))
        };
        self.by_name
            .insert(space.name_key(secrets, name), place, key);
    }

    /// Takes a block out of the tables.
    pub(super) fn unlist(&mut self, space: Space, block: Block, place: Place) {
        let key = space.key(&self.secrets, block.sequence);
        self.by_sequence.remove(key, place);
        if block.name != UNNAMED {
            let key = space.name_key(&self.secrets, block.name);
            self.by_name.remove(key, place);
        }
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
        if block.name != UNNAMED {
            let key = space.name_key(&self.secrets, block.name);
            self.by_name.remove(key, place);
        }
        let index = self.index(place);
        if let Some(block) = self.runs.at_mut(place.run()).blocks.get_mut(index) {
            block.name = name;
        }
        self.list_name(space, name, place);
        true
    }

    /// Where one of the blocks of a run stands: its keys in both tables.
    pub(super) fn relist(&mut self, old: RunId, new: RunId, from: usize, to: usize) {
        let run = self.runs.at(new);
        for (at, block) in run.blocks.iter().enumerate().take(to).skip(from) {
            let (was, is) = (run.place(old, at), run.place(new, at));
            let key = run.space.key(&self.secrets, block.sequence);
            self.by_sequence.replace(key, was, is);
            if block.name != UNNAMED {
                let key = run.space.name_key(&self.secrets, block.name);
                self.by_name.replace(key, was, is);
            }
        }
    }
}
