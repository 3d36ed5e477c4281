//! The reference index: what every owner holds, kept the obvious way.
//!
//! Slow and unbounded on purpose. The real index, its pages and the filter's lookup are tested
//! against it.

use std::collections::HashMap;

use crate::event::EventData;
use crate::hash::chain;
use crate::id::{Family, Slot, Tier};
use crate::overlap::Overlap;

/// A block as an owner named it.
#[derive(Clone, Copy, Debug)]
struct Named {
    parent: Option<u64>,
    tokens_hash: u64,
    /// Bit per tier; 0 once removed.
    tiers: u8,
}

/// Blocks by owner and engine hash.
#[derive(Clone, Debug, Default)]
pub struct Naive {
    owners: HashMap<(usize, Slot), HashMap<u64, Named>>,
    /// Mask of tiers by hash, for families in which a hash stands for the whole prefix.
    foreign: HashMap<(usize, Slot, Family), HashMap<u64, u8>>,
}

/// A prompt's hashes in a family, as its senders name the blocks, and the blocks of the pool that
/// one of them is.
#[derive(Clone, Debug, Default)]
pub struct Foreign {
    /// The family.
    pub family: Family,
    /// Blocks of the pool to a block of the family.
    pub blocks: u32,
    /// The hashes.
    pub hashes: Vec<u64>,
}

impl Naive {
    /// Applies an event of one owner.
    pub fn apply(&mut self, pool: usize, slot: Slot, tier: Tier, data: &EventData) {
        let owner = self.owners.entry((pool, slot)).or_default();
        let bit = 1 << tier.index();
        match data {
            EventData::Stored(stored) => {
                let mut parent = stored.parent_hash;
                for block in &stored.blocks {
                    let before = owner.get(&block.block_hash).map_or(0, |named| named.tiers);
                    let named = Named {
                        parent,
                        tokens_hash: block.tokens_hash,
                        tiers: before | bit,
                    };
                    owner.insert(block.block_hash, named);
                    parent = Some(block.block_hash);
                }
            }
            EventData::Removed(removed) => {
                for hash in &removed.block_hashes {
                    if let Some(named) = owner.get_mut(hash) {
                        named.tiers &= !bit;
                    }
                }
            }
            EventData::Cleared => owner.clear(),
        }
    }

    /// Applies an event of one owner about its blocks of one family.
    pub fn apply_family(
        &mut self,
        pool: usize,
        family: Family,
        slot: Slot,
        tier: Tier,
        data: &EventData,
    ) {
        if family == Family::Dynamo {
            self.apply(pool, slot, tier, data);
            return;
        }
        let held = self.foreign.entry((pool, slot, family)).or_default();
        let bit = 1 << tier.index();
        match data {
            EventData::Stored(stored) => {
                for block in &stored.blocks {
                    *held.entry(block.block_hash).or_default() |= bit;
                }
            }
            EventData::Removed(removed) => {
                for hash in &removed.block_hashes {
                    *held.entry(*hash).or_default() &= !bit;
                }
            }
            EventData::Cleared => held.clear(),
        }
    }

    /// Forgets an owner.
    pub fn remove_owner(&mut self, pool: usize, slot: Slot) {
        self.owners.remove(&(pool, slot));
        self.foreign.retain(|(p, s, _), _| (*p, *s) != (pool, slot));
    }

    /// What one worker holds of a prompt over all families, chained ones first, with the help of
    /// stores.
    #[must_use]
    pub fn holding(
        &self,
        pool: usize,
        slot: Slot,
        stores: &[Slot],
        prompt: &[u64],
        families: &[Foreign],
    ) -> Overlap {
        let dynamo = |slot| {
            let held = self.owners.get(&(pool, slot)).map(held);
            overlap(&held.unwrap_or_default(), prompt).depth
        };
        let best = |slot: Slot, family, hash: u64| {
            let held = self.foreign.get(&(pool, slot, family));
            let tiers = held.and_then(|held| held.get(&hash)).copied();
            tiers.filter(|tiers| *tiers != 0).map(u8::trailing_zeros)
        };
        let mut depth = dynamo(slot);
        let mut through: Vec<u32> = stores.iter().map(|s| dynamo(*s)[3]).collect();
        for f in families.iter().filter(|f| !f.family.is_flat()) {
            let prefix = |slot, tier: u32| {
                let holds = |h: &&u64| best(slot, f.family, **h).is_some_and(|best| best <= tier);
                let count = f.hashes.iter().take_while(holds).count();
                f.blocks * u32::try_from(count).unwrap_or(u32::MAX)
            };
            for (tier, depth) in (0..).zip(&mut depth) {
                *depth = prefix(slot, tier).max(*depth);
            }
            through.extend(stores.iter().map(|store| prefix(*store, 3)));
        }
        let mut reach = through.into_iter().chain(depth).max().unwrap_or(0);
        for f in families.iter().filter(|f| f.family.is_flat()) {
            let grow = |mut depth: u32, holds: &dyn Fn(u64) -> bool| {
                let hash = |depth: u32| f.hashes.get((depth / f.blocks) as usize);
                while hash(depth).is_some_and(|hash| holds(*hash)) {
                    depth = (depth / f.blocks + 1) * f.blocks;
                }
                depth
            };
            for (tier, depth) in (0..).zip(&mut depth) {
                *depth = grow(*depth, &|h| {
                    best(slot, f.family, h).is_some_and(|best| best <= tier)
                });
            }
            reach = grow(reach, &|hash| {
                let mut either = stores.iter().chain([&slot]);
                either.any(|slot| best(*slot, f.family, hash).is_some())
            });
        }
        let [.., all] = depth;
        Overlap {
            shared_cache: reach.saturating_sub(all),
            ..Overlap::new(depth)
        }
    }

    /// What every owner of a pool holds of each prompt; owners that hold nothing of it are left
    /// out. Ascending by slot.
    #[must_use]
    pub fn overlaps(&self, pool: usize, prompts: &[Vec<u64>]) -> Vec<Vec<(Slot, Overlap)>> {
        let mut overlaps = vec![Vec::new(); prompts.len()];
        for ((of, slot), blocks) in &self.owners {
            if *of != pool {
                continue;
            }
            let held = held(blocks);
            for (prompt, overlaps) in prompts.iter().zip(&mut overlaps) {
                let overlap = overlap(&held, prompt);
                if !overlap.is_empty() {
                    overlaps.push((*slot, overlap));
                }
            }
        }
        for overlaps in &mut overlaps {
            overlaps.sort_by_key(|(slot, _)| *slot);
        }
        overlaps
    }
}

/// Best tier by sequence hash of what an owner holds. A block whose chain of parents is not known
/// to the root has no sequence hash.
fn held(blocks: &HashMap<u64, Named>) -> HashMap<u64, usize> {
    let mut held = HashMap::new();
    let mut sequences = HashMap::new();
    for (name, named) in blocks {
        if named.tiers == 0 {
            continue;
        }
        let best = named.tiers.trailing_zeros() as usize;
        if let Some(sequence) = sequence_hash(blocks, *name, &mut sequences) {
            let tier = held.entry(sequence).or_insert(best);
            *tier = best.min(*tier);
        }
    }
    held
}

/// Sequence hash of a named block; `known` keeps those of blocks seen before.
fn sequence_hash(
    blocks: &HashMap<u64, Named>,
    name: u64,
    known: &mut HashMap<u64, Option<u64>>,
) -> Option<u64> {
    if let Some(sequence) = known.get(&name) {
        return *sequence;
    }
    // Until it is known: a block that is its own ancestor has none.
    known.insert(name, None);
    let sequence = blocks.get(&name).and_then(|named| match named.parent {
        None => Some(named.tokens_hash),
        Some(parent) => {
            sequence_hash(blocks, parent, known).map(|above| chain(above, named.tokens_hash))
        }
    });
    known.insert(name, sequence);
    sequence
}

fn overlap(held: &HashMap<u64, usize>, prompt: &[u64]) -> Overlap {
    let mut depth = [0; Tier::COUNT];
    for (tier, depth) in depth.iter_mut().enumerate() {
        let holds = |s: &&u64| held.get(*s).is_some_and(|best| *best <= tier);
        *depth = u32::try_from(prompt.iter().take_while(holds).count()).unwrap_or(u32::MAX);
    }
    Overlap::new(depth)
}
