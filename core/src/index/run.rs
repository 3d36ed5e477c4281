//! Runs: chains of blocks of one unit with one owner set, without forks.

use super::places::Place;
use super::sets::{EMPTY, SetId};
use super::slab::NIL;
use super::space::Space;
use super::unit::UnitId;

/// Number of a run.
pub(super) type RunId = u32;

/// The name of a block that no name of an engine is kept with.
pub(super) const UNNAMED: u64 = 0;

/// Tiers in what `raw` says of an owner.
pub(super) const TIERS: u16 = (1 << 4) - 1;
/// Set where an owner has one name for the block, and it is the one kept with the block.
pub(super) const SHARED: u16 = 1 << 4;

/// One block. 16 bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Block {
    /// Sequence hash.
    pub(super) sequence: u64,
    /// The name that all owners in `raw` marked [`SHARED`] have for it.
    pub(super) name: u64,
}

impl Block {
    /// Whether it has its sequence hash for a name.
    pub(super) fn is_eponymous(self) -> bool {
        self.name == self.sequence && self.name != UNNAMED
    }
}

/// A run of blocks. 64 bytes.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) blocks: Vec<Block>,
    /// The run after whose last block it begins.
    pub(super) parent: RunId,
    pub(super) child: RunId,
    pub(super) next: RunId,
    pub(super) previous: RunId,
    pub(super) raw: SetId,
    pub(super) eff: SetId,
    /// The unit its blocks belong to.
    pub(super) unit: UnitId,
    /// Depth of its first block.
    pub(super) depth: u32,
    /// When it was last used, if no run below it was used later.
    pub(super) used: u32,
    pub(super) space: Space,
    /// Position of its first block in its group.
    pub(super) first: u8,
}

impl Default for Run {
    fn default() -> Self {
        Self {
            blocks: Vec::new(),
            parent: NIL,
            child: NIL,
            next: NIL,
            previous: NIL,
            raw: EMPTY,
            eff: EMPTY,
            unit: NIL,
            depth: 0,
            used: 0,
            space: Space::default(),
            first: 0,
        }
    }
}

impl Run {
    /// Where one of its blocks stands.
    #[allow(clippy::cast_possible_truncation)]
    pub(super) fn place(&self, id: RunId, at: usize) -> Place {
        // A run is no longer than a group, and a group no longer than `MAX_GROUP`.
        Place::new(id, self.first + at as u8)
    }

    /// Whether somebody is published with its blocks.
    pub(super) fn is_visible(&self) -> bool {
        self.eff != EMPTY
    }

    /// Depth of the block after its last one.
    #[allow(clippy::cast_possible_truncation)]
    pub(super) fn end(&self) -> u32 {
        self.depth + self.blocks.len() as u32
    }
}
