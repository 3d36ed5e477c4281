//! What an engine truly holds, and how each side counts it.

use std::collections::{HashMap, HashSet};

use kv_core::event::EventData;
use kv_core::id::Tier;

/// Leading blocks of a prompt by tier, each with those of the tiers before it.
pub type Depths = [u32; Tier::COUNT];

/// One rank's cache, block by block, by the engine's hashes. Every hash stands for one block of one
/// chain, as with an engine whose hashes depend on nothing but the tokens.
#[derive(Clone, Debug, Default)]
pub struct Content {
    /// Bit per tier.
    tiers: HashMap<u64, u8>,
    /// The block before each block ever stored.
    parents: HashMap<u64, Option<u64>>,
    /// Device blocks that Dynamo's tree is bound to have: stored below a block it was bound to
    /// have, and nothing on their path has been removed since.
    certain: HashSet<u64>,
}

impl Content {
    /// Follows an event.
    pub fn apply(&mut self, tier: Tier, data: &EventData) {
        let bit = 1 << tier.index();
        match data {
            EventData::Stored(stored) => {
                let mut parent = stored.parent_hash;
                let is_certain = parent.is_none_or(|parent| self.certain.contains(&parent));
                for block in &stored.blocks {
                    *self.tiers.entry(block.block_hash).or_default() |= bit;
                    self.parents.insert(block.block_hash, parent);
                    if tier == Tier::Device && is_certain {
                        self.certain.insert(block.block_hash);
                    }
                    parent = Some(block.block_hash);
                }
            }
            EventData::Removed(removed) => {
                for hash in &removed.block_hashes {
                    if let Some(tiers) = self.tiers.get_mut(hash) {
                        *tiers &= !bit;
                    }
                    if tier == Tier::Device {
                        self.doubt(*hash);
                    }
                }
            }
            EventData::Cleared => *self = Self::default(),
        }
    }

    /// A block and what hangs on it may be gone from Dynamo's tree.
    fn doubt(&mut self, hash: u64) {
        let parents = &self.parents;
        self.certain.retain(|block| {
            let mut at = Some(*block);
            while let Some(name) = at.filter(|name| *name != hash) {
                at = parents.get(&name).copied().flatten();
            }
            at.is_none()
        });
    }

    /// Whether Dynamo's tree may have forgotten a device block that the engine holds, because a
    /// block before it was removed or its store came before its parent's.
    #[must_use]
    pub fn is_doubtful(&self, hash: u64) -> bool {
        self.holds(hash, Tier::Device) && !self.certain.contains(&hash)
    }

    /// Whether a block lies on a tier.
    #[must_use]
    pub fn holds(&self, hash: u64, tier: Tier) -> bool {
        self.tiers
            .get(&hash)
            .is_some_and(|tiers| tiers & (1 << tier.index()) != 0)
    }

    /// Blocks on a tier.
    pub fn on(&self, tier: Tier) -> impl Iterator<Item = u64> {
        let held = self.tiers.keys().copied();
        held.filter(move |hash| self.holds(*hash, tier))
    }

    /// The block before a block.
    #[must_use]
    pub fn parent(&self, hash: u64) -> Option<u64> {
        self.parents.get(&hash).copied().flatten()
    }

    /// How we count: leading blocks at a tier or a better one.
    #[must_use]
    pub fn reachable(&self, chain: &[u64]) -> Depths {
        Tier::ALL.map(|worst| {
            let holds = |hash: &&u64| {
                let tiers = Tier::ALL.iter().take_while(|tier| **tier <= worst);
                tiers.into_iter().any(|tier| self.holds(**hash, *tier))
            };
            u32::try_from(chain.iter().take_while(holds).count()).unwrap_or(u32::MAX)
        })
    }

    /// How Dynamo counts, given how many device blocks it finds: each slower tier goes on where
    /// the one before it stopped, and none goes back to a faster one.
    #[must_use]
    pub fn walked(&self, chain: &[u64], device: u32) -> Depths {
        let mut depth = device as usize;
        let mut depths = [device; Tier::COUNT];
        for tier in [Tier::Host, Tier::Disk, Tier::External] {
            let rest = chain.iter().skip(depth);
            depth += rest.take_while(|hash| self.holds(**hash, tier)).count();
            depths[tier.index()] = u32::try_from(depth).unwrap_or(u32::MAX);
        }
        depths
    }
}
