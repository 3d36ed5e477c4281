//! Which blocks are published together. A unit is named by its first block; it begins at every
//! group border and at every block on the split position of the unit above it.

use super::directory::Directory;
use super::run::RunId;
use super::slab::{NIL, Slab};
use crate::page::WHOLE;

/// Number of a unit.
pub(super) type UnitId = u32;

#[derive(Clone, Copy, Debug)]
pub(super) struct Unit {
    /// The run that begins with its first block.
    pub(super) root: RunId,
    /// Key of the first block.
    pub(super) key: u64,
    /// Depth of the first block.
    pub(super) depth: u32,
    /// Units that begin at this unit's split.
    pub(super) below: u32,
    /// Flush in which it last changed; the least recently changed units leave a full page first.
    pub(super) touched: u32,
    /// Position in the group from which blocks are units of their own, or `WHOLE`.
    pub(super) split: u8,
    /// Whether its page lists it.
    pub(super) listed: bool,
    /// Whether it has not changed since its page was encoded.
    pub(super) encoded: bool,
    dirty: bool,
    lost: bool,
}

impl Default for Unit {
    fn default() -> Self {
        Self {
            root: NIL,
            key: 0,
            depth: 0,
            below: 0,
            touched: 0,
            split: WHOLE,
            listed: false,
            encoded: false,
            dirty: false,
            lost: false,
        }
    }
}

/// All units, those that changed, and the pages that list them.
#[derive(Debug)]
pub(super) struct Units {
    units: Slab<Unit>,
    changed: Vec<UnitId>,
    pub(super) directory: Directory,
    group: u32,
    /// Number of the flush under way.
    pub(super) clock: u32,
}

impl Units {
    pub(super) fn new(group: u8, directory: Directory) -> Self {
        Self {
            units: Slab::default(),
            changed: Vec::new(),
            directory,
            group: u32::from(group.max(1)),
            clock: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.units.len()
    }

    pub(super) fn at(&self, id: UnitId) -> &Unit {
        self.units.at(id)
    }

    pub(super) fn at_mut(&mut self, id: UnitId) -> &mut Unit {
        self.units.at_mut(id)
    }

    /// Position of a depth in its group.
    #[allow(clippy::cast_possible_truncation)]
    pub(super) fn position(&self, depth: u32) -> u8 {
        (depth % self.group) as u8
    }

    /// Blocks from a depth to the end of its group.
    pub(super) fn room(&self, depth: u32) -> usize {
        (self.group - depth % self.group) as usize
    }

    /// The unit of a block that joins the tree.
    pub(super) fn join(&mut self, root: RunId, key: u64, depth: u32, parent: UnitId) -> UnitId {
        let position = self.position(depth);
        if position != 0 {
            if self.at(parent).split != position {
                return parent;
            }
            self.at_mut(parent).below += 1;
        }
        self.begin(root, key, depth)
    }

    /// A unit of its own for a block.
    pub(super) fn begin(&mut self, root: RunId, key: u64, depth: u32) -> UnitId {
        self.units.insert(Unit {
            root,
            key,
            depth,
            ..Unit::default()
        })
    }

    /// A run left the tree; with the first one the unit goes.
    pub(super) fn leave(&mut self, run: RunId, unit: UnitId, parent: UnitId) {
        if self.at(unit).root != run {
            return;
        }
        let gone = *self.at(unit);
        self.unlist(unit);
        self.units.remove(unit);
        if self.position(gone.depth) != 0 {
            let parent_unit = self.at_mut(parent);
            parent_unit.below -= 1;
            if parent_unit.below == 0 {
                parent_unit.split = WHOLE;
                self.touch(parent, false);
            }
        }
    }

    /// Notes a change of what a unit publishes. `is_loss`: some owner lost a block or its tier.
    pub(super) fn touch(&mut self, id: UnitId, is_loss: bool) {
        let unit = self.units.at_mut(id);
        unit.lost |= is_loss;
        if !unit.dirty {
            unit.dirty = true;
            self.changed.push(id);
        }
    }

    pub(super) fn has_changes(&self) -> bool {
        !self.changed.is_empty()
    }

    /// A changed unit that still exists, and whether it lost something.
    pub(super) fn next_change(&mut self) -> Option<(UnitId, bool)> {
        while let Some(id) = self.changed.pop() {
            let clock = self.clock;
            let unit = self.units.at_mut(id);
            // A number may stand here twice: the unit it was pushed for is gone, and the number
            // has been reused or is free.
            if unit.dirty && unit.root != NIL {
                unit.dirty = false;
                unit.encoded = false;
                unit.touched = clock;
                return Some((id, std::mem::take(&mut unit.lost)));
            }
        }
        None
    }

    /// Lists a unit in its page.
    pub(super) fn list(&mut self, id: UnitId) {
        let unit = self.units.at_mut(id);
        if !unit.listed {
            unit.listed = true;
            self.directory.insert(unit.key, id);
        }
    }

    /// Takes a unit out of its page.
    pub(super) fn unlist(&mut self, id: UnitId) {
        let unit = self.units.at_mut(id);
        if unit.listed {
            unit.listed = false;
            let (key, depth) = (unit.key, unit.depth);
            self.directory.remove(key, id);
            self.directory.soil(key, depth, true);
        }
    }

    /// Bytes taken from the allocator.
    pub(super) fn bytes(&self) -> usize {
        let changed = self.changed.capacity() * size_of::<UnitId>();
        self.units.bytes() + changed + self.directory.own_bytes()
    }

    /// Bytes of what is in use.
    pub(super) fn used_bytes(&self) -> usize {
        self.units.used_bytes() + self.directory.own_bytes()
    }

    /// Numbers the units anew and gives back memory. Returns the numbers by their old ones.
    pub(super) fn compact(&mut self) -> Vec<UnitId> {
        // What has gone is not to be looked at under its number of then.
        let units = &self.units;
        self.changed.retain(|id| units.at(*id).root != NIL);
        let ids = self.units.compact();
        let renumber = |id: &mut UnitId| *id = ids.get(*id as usize).copied().unwrap_or(NIL);
        self.changed.iter_mut().for_each(renumber);
        self.changed.shrink_to_fit();
        self.directory.renumber(renumber);
        ids
    }

    /// All units, to change them.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Unit> {
        self.units.iter_mut()
    }

    /// One step of growth; the directory needs the units' keys for it.
    pub(super) fn grow(&mut self) {
        let units = &self.units;
        self.directory.grow(|id| units.at(id).key);
    }
}
