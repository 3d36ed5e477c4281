//! What every owner of a pool holds of a prompt, over all families.
//!
//! Dynamo's blocks and those of chained families are looked up from the prompt's first block; an
//! owner's depth on a tier is the greatest of them. A flat family is walked block by block from
//! there: an owner's depth grows while the owner has the next block. All counts are blocks of the
//! pool's own size, of which a family's block is a multiple.
//!
//! A shared store has no depth of its own. What is reached from a worker's depth through blocks that
//! the worker or some store has is the worker's [`Overlap::shared_cache`].

use serde::{Deserialize, Serialize};

use crate::family::{Namespace, Scheme};
use crate::id::{Family, Slot, Tier};
use crate::index::Index;
use crate::overlap::Overlap;
use crate::reader::{Reader, View};

/// Blocks of one flat family that a lookup asks for, at most.
const MAX_FLAT: usize = 4096;
/// Rows of a walk: the tiers, and last what is reached with the help of stores.
const ROWS: usize = Tier::COUNT + 1;

/// A prompt's blocks in one family.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Named {
    /// The family.
    pub family: Family,
    /// Blocks of the pool to a block of the family.
    pub blocks: u32,
    /// As [`Scheme::hashes`] has them.
    pub hashes: Vec<u64>,
}

/// A prompt in the families of a pool that has blocks of `block_size` tokens. Families without
/// hashes for it are left out.
#[must_use]
pub fn named(
    schemes: &[Scheme],
    block_size: u32,
    tokens: &[u32],
    namespace: Namespace<'_>,
) -> Vec<Named> {
    let named = schemes.iter().filter_map(|scheme| {
        Some(Named {
            family: scheme.family,
            blocks: scheme.block_size.checked_div(block_size)?,
            hashes: scheme.hashes(tokens, namespace),
        })
    });
    named
        .filter(|n| n.blocks > 0 && !n.hashes.is_empty())
        .collect()
}

/// Where blocks are looked up: the pages, or the index itself.
pub trait Source {
    /// Tells of every owner that holds at least the first block how much it holds, by tier.
    fn prefixes(
        &mut self,
        family: Family,
        hashes: &[u64],
        each: impl FnMut(Slot, [u32; Tier::COUNT]),
    );

    /// Sets in `bits`, which are `words` to a tier, the owners of one block on a tier or a better
    /// one.
    fn holders(&mut self, family: Family, hash: u64, words: usize, bits: &mut [u64]);
}

/// A lookup's result. Keep it between requests: its buffers are reused.
#[derive(Debug, Default)]
pub struct Holdings {
    slots: usize,
    /// By row, then slot.
    depths: Vec<u32>,
    /// Depth of the owner that holds most of Dynamo's blocks.
    known: u32,
    walk: Walk,
}

/// The rows that go on at a block of a flat family.
#[derive(Debug, Default)]
struct Walk {
    words: usize,
    /// Block at which a row begins to need the family, row, slot; the last one comes first.
    starts: Vec<(usize, usize, usize)>,
    /// By row: a bit to each slot.
    alive: Vec<u64>,
    bits: Vec<u64>,
    stores: Vec<u64>,
}

impl Holdings {
    /// Nothing looked up.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Looks a prompt up, given by its sequence hashes and its hashes in further families. Slots in
    /// use are below `slots`, those of `stores` among them.
    pub fn look_up(
        &mut self,
        source: &mut impl Source,
        slots: usize,
        stores: &[Slot],
        hashes: &[u64],
        families: &[Named],
    ) {
        self.slots = slots.min(usize::from(Slot::MAX));
        self.depths.clear();
        self.depths.resize(ROWS * self.slots, 0);
        self.prefixes(source, stores, Family::Dynamo, 1, hashes);
        let depths = self.depths.iter().copied();
        self.known = depths.max().unwrap_or(0);
        let (flat, chained): (Vec<&Named>, Vec<&Named>) =
            families.iter().partition(|named| named.family.is_flat());
        for named in chained {
            self.prefixes(source, stores, named.family, named.blocks, &named.hashes);
        }
        for named in flat {
            self.walk(source, stores, named);
        }
        for store in stores {
            for row in 0..ROWS {
                if let Some(depth) = self.depth_mut(row, store.index()) {
                    *depth = 0;
                }
            }
        }
    }

    /// What the owner in a slot holds.
    #[must_use]
    pub fn overlap(&self, slot: Slot) -> Overlap {
        let at = |row| self.depth(row, slot.index());
        let all = at(Tier::COUNT - 1);
        Overlap {
            depth: [at(0), at(1), at(2), all],
            shared_cache: at(Tier::COUNT).saturating_sub(all),
        }
    }

    /// How many leading blocks some owner holds by their sequence hashes.
    #[must_use]
    pub fn known(&self) -> u32 {
        self.known
    }

    /// Slots whose owner holds at least the prompt's first block.
    pub fn held(&self) -> impl Iterator<Item = Slot> + '_ {
        let slots = (0..).take(self.slots).map(Slot);
        slots.filter(|slot| self.depth(Tier::COUNT - 1, slot.index()) > 0)
    }

    fn depth(&self, row: usize, slot: usize) -> u32 {
        let depth = self.depths.get(row * self.slots + slot);
        depth.copied().filter(|_| slot < self.slots).unwrap_or(0)
    }

    fn depth_mut(&mut self, row: usize, slot: usize) -> Option<&mut u32> {
        let at = row * self.slots + slot;
        self.depths.get_mut(at).filter(|_| slot < self.slots)
    }

    fn raise(&mut self, row: usize, slot: usize, to: u32) {
        if let Some(depth) = self.depth_mut(row, slot) {
            *depth = to.max(*depth);
        }
    }

    fn prefixes(
        &mut self,
        source: &mut impl Source,
        stores: &[Slot],
        family: Family,
        blocks: u32,
        hashes: &[u64],
    ) {
        let mut shared = 0;
        source.prefixes(family, hashes, |slot, depth| {
            let [.., all] = depth;
            for (row, depth) in depth.into_iter().chain([all]).enumerate() {
                self.raise(row, slot.index(), depth.saturating_mul(blocks));
            }
            if stores.contains(&slot) {
                shared = all.saturating_mul(blocks).max(shared);
            }
        });
        for slot in 0..self.slots {
            self.raise(Tier::COUNT, slot, shared);
        }
    }

    fn walk(&mut self, source: &mut impl Source, stores: &[Slot], named: &Named) {
        let mut walk = std::mem::take(&mut self.walk);
        walk.begin(self, stores, named);
        let (mut block, mut asked) = (0, 0);
        loop {
            if walk.alive.iter().all(|word| *word == 0) {
                let Some((start, ..)) = walk.starts.last() else {
                    break;
                };
                block = *start;
            }
            while let Some((_, row, slot)) = walk.starts.pop_if(|(start, ..)| *start == block) {
                set(&mut walk.alive, row * walk.words, slot);
            }
            let hash = named.hashes.get(block).filter(|_| asked < MAX_FLAT);
            walk.bits.fill(0);
            if let Some(hash) = hash {
                asked += 1;
                source.holders(named.family, *hash, walk.words, &mut walk.bits);
                walk.reach_through_stores();
            }
            let depth = u32::try_from(block).unwrap_or(u32::MAX);
            self.end(
                &mut walk.alive,
                &walk.bits,
                depth.saturating_mul(named.blocks),
            );
            if hash.is_none() {
                break;
            }
            block += 1;
        }
        self.walk = walk;
    }

    /// Keeps alive what has the block that begins at `depth`; the others end there.
    fn end(&mut self, alive: &mut [u64], bits: &[u64], depth: u32) {
        let words = alive.len() / ROWS;
        for (i, (alive, bits)) in alive.iter_mut().zip(bits).enumerate() {
            let mut ends = *alive & !bits;
            *alive &= bits;
            while ends != 0 {
                let slot = 64 * (i % words) + ends.trailing_zeros() as usize;
                ends &= ends - 1;
                self.raise(i / words, slot, depth);
            }
        }
    }
}

impl Walk {
    fn begin(&mut self, holdings: &Holdings, stores: &[Slot], named: &Named) {
        self.words = holdings.slots.div_ceil(64);
        for (buffer, rows) in [
            (&mut self.alive, ROWS),
            (&mut self.bits, ROWS),
            (&mut self.stores, 1),
        ] {
            buffer.clear();
            buffer.resize(rows * self.words, 0);
        }
        for store in stores {
            set(&mut self.stores, 0, store.index());
        }
        self.starts.clear();
        let blocks = usize::try_from(named.blocks).unwrap_or(usize::MAX).max(1);
        for slot in 0..holdings.slots {
            if get(&self.stores, slot) {
                continue;
            }
            for row in 0..ROWS {
                let depth = usize::try_from(holdings.depth(row, slot)).unwrap_or(usize::MAX);
                self.starts.push((depth / blocks, row, slot));
            }
        }
        self.starts
            .retain(|(start, ..)| *start < named.hashes.len());
        self.starts.sort_unstable_by(|a, b| b.cmp(a));
    }

    /// Fills the last row: everyone who has the block, or everyone if some store has it.
    fn reach_through_stores(&mut self) {
        let Some((tiers, reach)) = self.bits.split_at_mut_checked(Tier::COUNT * self.words) else {
            return;
        };
        let all = tiers.get((Tier::COUNT - 1) * self.words..).unwrap_or(&[]);
        let mut in_store = all.iter().zip(&self.stores);
        if in_store.any(|(all, stores)| all & stores != 0) {
            reach.fill(u64::MAX);
        } else {
            reach.copy_from_slice(all);
        }
    }
}

fn set(bits: &mut [u64], first: usize, slot: usize) {
    if let Some(word) = bits.get_mut(first + slot / 64) {
        *word |= 1 << (slot % 64);
    }
}

fn get(bits: &[u64], slot: usize) -> bool {
    let word = bits.get(slot / 64);
    word.is_some_and(|word| word & 1 << (slot % 64) != 0)
}

/// Blocks as the pages show them.
#[derive(Debug)]
pub struct Pages<'a, F> {
    /// Reads them.
    pub reader: &'a mut Reader,
    /// How; its family is that of each question.
    pub view: View,
    /// Gives the bytes of a page.
    pub fetch: F,
}

impl<F: FnMut(u32) -> Option<Vec<u8>>> Source for Pages<'_, F> {
    fn prefixes(
        &mut self,
        family: Family,
        hashes: &[u64],
        mut each: impl FnMut(Slot, [u32; Tier::COUNT]),
    ) {
        let view = View {
            family,
            ..self.view
        };
        self.reader.gallop(&view, hashes, &mut self.fetch);
        for slot in self.reader.held() {
            each(slot, self.reader.overlap(slot).depth);
        }
    }

    fn holders(&mut self, family: Family, hash: u64, _: usize, bits: &mut [u64]) {
        let view = View {
            family,
            ..self.view
        };
        let held = self.reader.holders(&view, hash, &mut self.fetch);
        for (bits, held) in bits.iter_mut().zip(held) {
            *bits |= held;
        }
    }
}

/// Blocks of one pool as the index has them.
#[derive(Clone, Copy, Debug)]
pub struct InIndex<'a> {
    /// The index.
    pub index: &'a Index,
    /// Number of the pool.
    pub pool: usize,
}

impl Source for InIndex<'_> {
    fn prefixes(
        &mut self,
        family: Family,
        hashes: &[u64],
        mut each: impl FnMut(Slot, [u32; Tier::COUNT]),
    ) {
        for (slot, overlap) in self.index.overlaps_in(self.pool, family, hashes) {
            each(slot, overlap.depth);
        }
    }

    fn holders(&mut self, family: Family, hash: u64, words: usize, bits: &mut [u64]) {
        for (slot, best) in self.index.holders(self.pool, family, hash) {
            for tier in best.index()..Tier::COUNT {
                if slot.index() < 64 * words {
                    set(bits, tier * words, slot.index());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
