//! Events into the tree.

use hashbrown::HashMap;

use super::owner::{Hand, Owner, Taken};
use super::places::Place;
use super::run::{Block, SHARED, TIERS, UNNAMED};
use super::slab::NIL;
use super::space::Space;
use super::tree::{Next, Tree};
use super::waiting::{Orphan, OrphanBlock};
use super::{Applied, Index};
use crate::event::{Stored, StoredBlock};
use crate::id::{Slot, Tier};

/// Owners by their space and slot.
pub(super) type Owners = HashMap<(Space, Slot), Owner>;

impl Index {
    pub(super) fn store(
        &mut self,
        space: Space,
        slot: Slot,
        tier: Tier,
        stored: &Stored,
        applied: &mut Applied,
    ) {
        if stored.blocks.is_empty() {
            return;
        }
        let mut blocks = std::mem::take(&mut self.scratch);
        blocks.clear();
        blocks.extend(stored.blocks.iter().map(waiting));
        let mut next = Some((stored.parent_hash, Orphan { tier, blocks }));
        let mut adopted = Vec::new();
        let mut is_adoption = false;
        let (tree, owners) = (&mut self.tree, &mut self.owners);
        let mut hand = hand(tree, owners, space, slot);
        let before = hand.owner.bytes();
        while let Some((parent, mut orphan)) = next {
            let at = match parent {
                None => Some(Place::ROOT),
                Some(hash) => hand.known(hash).map(|known| known.place),
            };
            match (at, parent) {
                (None, Some(parent)) => {
                    orphan.blocks.shrink_to_fit();
                    let blocks = orphan.blocks.len();
                    self.orphans += blocks;
                    applied.orphaned += count(blocks);
                    let number = self.queue.push((space, slot), parent);
                    hand.owner.waiting.push(parent, number, orphan);
                }
                (at, _) => {
                    let at = at.unwrap_or(Place::ROOT);
                    hand.attach(at, &orphan, applied, is_adoption);
                    if !hand.owner.waiting.is_empty() {
                        for block in orphan.blocks.iter().filter(|block| !block.gone) {
                            for store in hand.owner.waiting.take(block.hash) {
                                self.orphans -= store.blocks.len();
                                adopted.push((Some(block.hash), store));
                            }
                        }
                    }
                    is_adoption = true;
                    self.scratch = orphan.blocks;
                }
            }
            next = adopted.pop();
        }
        let after = hand.owner.bytes();
        self.owner_bytes = self.owner_bytes + after - before;
        self.bound_orphans(applied);
    }

    /// Stores blocks that stand alone: nothing waits for one.
    pub(super) fn store_each(
        &mut self,
        space: Space,
        slot: Slot,
        tier: Tier,
        stored: &Stored,
        applied: &mut Applied,
    ) {
        let blocks = std::mem::take(&mut self.scratch);
        let mut alone = Orphan { tier, blocks };
        let mut hand = hand(&mut self.tree, &mut self.owners, space, slot);
        let before = hand.owner.bytes();
        for block in &stored.blocks {
            alone.blocks.clear();
            alone.blocks.push(waiting(block));
            hand.attach(Place::ROOT, &alone, applied, false);
        }
        self.scratch = alone.blocks;
        self.owner_bytes = self.owner_bytes + hand.owner.bytes() - before;
    }

    pub(super) fn remove(
        &mut self,
        space: Space,
        slot: Slot,
        tier: Tier,
        hashes: &[u64],
        applied: &mut Applied,
    ) {
        if !self.owners.contains_key(&(space, slot)) {
            applied.unknown += count(hashes.len());
            return;
        }
        let (tree, owners) = (&mut self.tree, &mut self.owners);
        let mut hand = hand(tree, owners, space, slot);
        let before = hand.owner.bytes();
        for hash in hashes {
            let taken = hand.take(*hash, tier);
            // A block that is held may be in stores that wait as well: it must not come back with
            // them.
            let waited = hand.owner.waiting.remove(*hash, tier);
            match taken {
                Taken::Left => applied.removed += 1,
                Taken::Kept => applied.duplicates += 1,
                Taken::Unknown if waited => applied.removed += 1,
                Taken::Unknown => applied.unknown += 1,
            }
        }
        let after = hand.owner.bytes();
        self.owner_bytes = self.owner_bytes + after - before;
    }
}

fn waiting(block: &StoredBlock) -> OrphanBlock {
    OrphanBlock {
        hash: block.block_hash,
        tokens_hash: block.tokens_hash,
        gone: false,
    }
}

pub(super) fn hand<'a>(
    tree: &'a mut Tree,
    owners: &'a mut Owners,
    space: Space,
    slot: Slot,
) -> Hand<'a> {
    Hand {
        tree,
        owner: owners.entry((space, slot)).or_default(),
        space,
        slot,
    }
}

pub(super) fn count(blocks: usize) -> u32 {
    u32::try_from(blocks).unwrap_or(u32::MAX)
}

impl Hand<'_> {
    /// Stores a chain of blocks after a place.
    fn attach(&mut self, from: Place, chain: &Orphan, applied: &mut Applied, is_adoption: bool) {
        let bit = 1 << chain.tier.index();
        let mut at = from;
        let mut stored = 0;
        let mut rest = chain.blocks.as_slice();
        let mut following = Vec::new();
        while let Some((block, after)) = rest.split_first() {
            let sequence = self.tree.sequence_after(at, block.tokens_hash);
            match self.tree.next(self.space, at, sequence) {
                Next::Taken => {
                    applied.collisions += 1;
                    break;
                }
                Next::Absent => {
                    at = self.place(at, sequence, block, bit, after.len(), applied);
                    let more = self.follow(&mut at, after, bit, &mut following);
                    stored += u32::from(!block.gone) + count(more);
                    rest = after.get(more..).unwrap_or(&[]);
                }
                Next::There(place) => {
                    let alike = self.alike(place, rest);
                    let blocks = alike.max(1);
                    let is_held = if alike > 0 {
                        self.hold_alike(&mut at, place, alike, bit)
                    } else if block.gone {
                        at = place;
                        rest = after;
                        continue;
                    } else {
                        self.hold_one(&mut at, place, block, bit, applied)
                    };
                    if is_held {
                        applied.duplicates += count(blocks);
                    } else {
                        stored += count(blocks);
                    }
                    rest = rest.get(blocks..).unwrap_or(&[]);
                }
            }
        }
        if is_adoption {
            applied.adopted += stored;
        } else {
            applied.stored += stored;
        }
        if at != from {
            self.tree.touch(at);
            // Links that nothing came to hang on.
            self.tree.release(at.run());
        }
    }

    /// Adds blocks after one that has been added, as many as join its run under names that are
    /// kept with them, and returns how many. `chain` is room for them.
    fn follow(
        &mut self,
        at: &mut Place,
        blocks: &[OrphanBlock],
        bit: u16,
        chain: &mut Vec<Block>,
    ) -> usize {
        let run = self.tree.run(at.run());
        let is_last = self.tree.index(*at) + 1 == run.blocks.len() && run.child == NIL;
        let is_alone = self.tree.raw.is_alone(run.raw, self.slot.0, bit | SHARED);
        if !is_last || !is_alone {
            return 0;
        }
        let own = &self.owner.own;
        let is_plain = |block: &&OrphanBlock| {
            !block.gone && block.hash != UNNAMED && own.get(block.hash).is_none()
        };
        let room = self.tree.units.room(run.end() - 1) - 1;
        let mut sequence = self.tree.block(*at).sequence;
        chain.clear();
        chain.extend(blocks.iter().take(room).take_while(is_plain).map(|block| {
            sequence = crate::hash::chain(sequence, block.tokens_hash);
            let name = block.hash;
            Block { sequence, name }
        }));
        let added = self.tree.extend(at.run(), chain);
        self.owner.held += added;
        let run = self.tree.run(at.run());
        *at = run.place(at.run(), run.blocks.len() - 1);
        added
    }

    /// Adds a block that the tree lacks.
    fn place(
        &mut self,
        at: Place,
        sequence: u64,
        block: &OrphanBlock,
        bit: u16,
        more: usize,
        applied: &mut Applied,
    ) -> Place {
        let (space, hash) = (self.space, block.hash);
        if block.gone {
            let name = UNNAMED;
            let link = Block { sequence, name };
            return self.tree.add(space, at, link, None, more);
        }
        let is_own = self.owner.own.get(hash).is_some();
        let named = self.tree.find_name(space, hash);
        if is_own || named.is_some() && self.known(hash).is_some() {
            let name = UNNAMED;
            let block = Block { sequence, name };
            self.owner.held += 1;
            let place = self
                .tree
                .add(space, at, block, Some((self.slot, bit)), more);
            self.rename(hash, applied);
            self.owner.own.add(hash, sequence, bit);
            return self.tree.find(space, sequence).unwrap_or(place);
        }
        self.bring(at, sequence, hash, named.is_none(), bit, more)
    }

    /// Adds a block that the tree lacks under a name that the owner does not use. `is_free`: no
    /// block has the name.
    pub(super) fn bring(
        &mut self,
        at: Place,
        sequence: u64,
        hash: u64,
        is_free: bool,
        tiers: u16,
        more: usize,
    ) -> Place {
        let shares = is_free && hash != UNNAMED;
        let name = if shares { hash } else { UNNAMED };
        let low = tiers | if shares { SHARED } else { 0 };
        if !shares {
            self.owner.own.add(hash, sequence, tiers);
        }
        self.owner.held += 1;
        let block = Block { sequence, name };
        self.tree
            .add(self.space, at, block, Some((self.slot, low)), more)
    }

    /// Lets go of the block that has a name, because another one gets it.
    fn rename(&mut self, hash: u64, applied: &mut Applied) {
        applied.renamed += 1;
        for tier in Tier::ALL {
            self.take(hash, tier);
        }
    }

    /// How many of these blocks stand at a place and after it in one run, under the same names.
    fn alike(&self, place: Place, blocks: &[OrphanBlock]) -> usize {
        let run = self.tree.run(place.run());
        let low = self.tree.raw.get(run.raw, self.slot.0);
        if low.is_some_and(|low| low & SHARED == 0) {
            return 0;
        }
        let here = run.blocks.iter().skip(self.tree.index(place));
        let mut before = None;
        let is_alike = |(here, block): &(&Block, &OrphanBlock)| {
            let sequence = before.map_or(here.sequence, |before| {
                crate::hash::chain(before, block.tokens_hash)
            });
            before = Some(sequence);
            let own = &self.owner.own;
            !block.gone
                && here.sequence == sequence
                && here.name == block.hash
                && here.name != UNNAMED
                && (own.is_empty() || own.get(block.hash).is_none())
        };
        here.zip(blocks).take_while(is_alike).count()
    }

    /// Holds blocks of a run under the names kept with them. Whether they were held already.
    fn hold_alike(&mut self, at: &mut Place, place: Place, blocks: usize, bit: u16) -> bool {
        let id = place.run();
        let from = self.tree.index(place);
        let to = from + blocks;
        let run = self.tree.run(id);
        *at = run.place(id, to - 1);
        let low = self.tree.raw.get(run.raw, self.slot.0);
        if low.is_some_and(|low| low & bit != 0) {
            return true;
        }
        let last = self.tree.block(*at).sequence;
        if low.is_none() {
            self.owner.held += blocks;
        }
        let low = low.unwrap_or(0) | bit | SHARED;
        self.tree.hold_some(id, from, to, self.slot, Some(low));
        *at = self.tree.find(self.space, last).unwrap_or(*at);
        false
    }

    /// Holds one block, whatever its names are. Whether it was held already.
    fn hold_one(
        &mut self,
        at: &mut Place,
        place: Place,
        block: &OrphanBlock,
        bit: u16,
        applied: &mut Applied,
    ) -> bool {
        *at = place;
        let low = self.tree.low(place, self.slot);
        let is_held = low.is_some_and(|low| low & TIERS & bit != 0);
        let sequence = self.tree.block(place).sequence;
        match self.known(block.hash) {
            Some(known) if known.place == place => {
                if known.tiers & bit == 0 {
                    self.give(place, block.hash, bit);
                }
            }
            None => self.give(place, block.hash, bit),
            Some(_) => {
                // Held before the other block is let go, which might drop this one otherwise.
                let low = low.unwrap_or(0);
                let held = low & TIERS;
                if low & SHARED != 0 {
                    let name = self.tree.block(place).name;
                    self.owner.own.add(name, sequence, held);
                }
                self.owner.held += usize::from(held == 0);
                self.tree.hold(place, self.slot, Some(held | bit));
                self.rename(block.hash, applied);
                self.owner.own.add(block.hash, sequence, bit);
            }
        }
        *at = self.tree.find(self.space, sequence).unwrap_or(place);
        is_held
    }
}
