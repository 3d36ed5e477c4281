//! What one owner has, and its hand on the tree. Engine hashes are opaque and belong to the owner
//! alone, so workers whose engines hash differently still share blocks in the tree.
//!
//! A name that is kept with its block counts for those owners only whose member in `raw` is marked
//! [`SHARED`]; the names of the others are their own.

use super::announced::Announced;
use super::own::Names;
use super::places::Place;
use super::run::{SHARED, TIERS, UNNAMED};
use super::space::Space;
use super::tree::Tree;
use super::waiting::Waiting;
use crate::id::{Slot, Tier};

/// Names and waiting stores of one owner.
#[derive(Debug, Default)]
pub(super) struct Owner {
    pub(super) own: Names,
    pub(super) waiting: Waiting,
    /// Where its names are limited.
    pub(super) announced: Option<Box<Announced>>,
    /// Blocks that it holds.
    pub(super) held: usize,
}

impl Owner {
    /// Bytes taken from the allocator.
    pub(super) fn bytes(&self) -> usize {
        let announced = self.announced.as_ref().map_or(0, |a| a.bytes());
        self.own.bytes() + self.waiting.bytes() + announced
    }
}

/// An owner about to change what it holds.
pub(super) struct Hand<'a> {
    pub(super) tree: &'a mut Tree,
    pub(super) owner: &'a mut Owner,
    pub(super) space: Space,
    pub(super) slot: Slot,
}

/// A name of an owner.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known {
    pub(super) place: Place,
    pub(super) tiers: u16,
    is_own: bool,
}

/// What taking a name back means for the block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// The owner has no such name on this tier.
    Unknown,
    /// Another name keeps the block on this tier.
    Kept,
    /// The block has left this tier.
    Left,
}

/// What an owner names like this.
pub(super) fn known(
    tree: &Tree,
    owner: &Owner,
    space: Space,
    slot: Slot,
    hash: u64,
) -> Option<Known> {
    if let Some(name) = owner.own.get(hash) {
        let place = tree.find(space, name.sequence)?;
        return Some(Known {
            place,
            tiers: name.tiers,
            is_own: true,
        });
    }
    if hash == UNNAMED {
        return None;
    }
    let place = tree.find_name(space, hash)?;
    let low = tree.low(place, slot)?;
    (low & SHARED != 0).then_some(Known {
        place,
        tiers: low & TIERS,
        is_own: false,
    })
}

impl Hand<'_> {
    /// What the owner names like this.
    pub(super) fn known(&self, hash: u64) -> Option<Known> {
        known(self.tree, self.owner, self.space, self.slot, hash)
    }

    /// Names a block on some tiers. The owner names no other block so.
    pub(super) fn give(&mut self, place: Place, hash: u64, tiers: u16) {
        let low = self.tree.low(place, self.slot);
        let held = low.map_or(0, |low| low & TIERS);
        let may_share = low.is_none_or(|low| low & SHARED != 0);
        let shares = may_share && self.tree.shares(place, hash, low.is_some());
        let block = self.tree.block(place);
        if !shares {
            if may_share && held != 0 {
                // With two names for the block, both are the owner's own.
                self.owner.own.add(block.name, block.sequence, held);
            }
            self.owner.own.add(hash, block.sequence, tiers);
        }
        self.owner.held += usize::from(held == 0);
        let low = held | tiers | if shares { SHARED } else { 0 };
        self.tree.hold(place, self.slot, Some(low));
    }

    /// Takes a name back from a tier.
    pub(super) fn take(&mut self, hash: u64, tier: Tier) -> Taken {
        let bit = 1 << tier.index();
        let Some(known) = self.known(hash).filter(|known| known.tiers & bit != 0) else {
            return Taken::Unknown;
        };
        if known.is_own {
            let sequence = self.tree.block(known.place).sequence;
            self.owner.own.remove(hash, bit);
            let mut others = self.owner.own.of(sequence);
            if others.any(|name| name.tiers & bit != 0) {
                return Taken::Kept;
            }
        }
        let low = self.tree.low(known.place, self.slot).unwrap_or(0) & !bit;
        let low = (low & TIERS != 0).then_some(low);
        self.owner.held -= usize::from(low.is_none());
        self.tree.hold(known.place, self.slot, low);
        Taken::Left
    }
}
