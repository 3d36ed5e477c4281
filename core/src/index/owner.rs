//! One owner's names for its blocks. Engine hashes are opaque and belong to the owner alone, so
//! workers whose engines hash differently still share blocks in the tree.

use std::collections::BTreeSet;
use std::hash::BuildHasher;

use hashbrown::{DefaultHashBuilder, HashMap, HashTable};

use super::tree::NodeId;
use crate::id::Tier;

/// A block as the engine names it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Name {
    pub(super) hash: u64,
    pub(super) node: NodeId,
    /// Bit per tier.
    pub(super) tiers: u8,
}

/// A store whose parent the owner has not named.
#[derive(Clone, Debug)]
pub(super) struct Orphan {
    pub(super) tier: Tier,
    pub(super) blocks: Vec<OrphanBlock>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct OrphanBlock {
    pub(super) hash: u64,
    pub(super) tokens_hash: u64,
    /// Removed while waiting: it only links the blocks after it.
    pub(super) gone: bool,
}

/// Names and waiting stores of one owner.
#[derive(Debug, Default)]
pub(super) struct Owner {
    names: HashTable<Name>,
    hasher: DefaultHashBuilder,
    /// Blocks held under several names: how many more than one, by tier.
    aliases: HashMap<NodeId, [u32; Tier::COUNT]>,
    /// Waiting stores by the parent they wait for.
    orphans: HashMap<u64, Vec<Orphan>>,
    /// Each block in a waiting store with the parent that the store waits for.
    awaited: BTreeSet<(u64, u64)>,
}

/// What removing a name means for the block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unnamed {
    /// The owner has no such name on this tier.
    Unknown,
    /// Another name keeps the block on this tier.
    Kept,
    /// The block has left this tier.
    Left(NodeId),
}

impl Owner {
    pub(super) fn name(&self, hash: u64) -> Option<Name> {
        let same = |name: &Name| name.hash == hash;
        self.names.find(self.hasher.hash_one(hash), same).copied()
    }

    /// Names in use.
    pub(super) fn len(&self) -> usize {
        self.names.len()
    }

    pub(super) fn names(&self) -> impl Iterator<Item = Name> + '_ {
        self.names.iter().copied()
    }

    /// Names a block on a tier. `held` says whether the owner holds it there under another name.
    pub(super) fn add(&mut self, hash: u64, node: NodeId, tier: Tier, held: bool) {
        if held && let Some(extra) = self.aliases.entry(node).or_default().get_mut(tier.index()) {
            *extra += 1;
        }
        let (key, bit) = (self.hasher.hash_one(hash), 1 << tier.index());
        if let Some(name) = self.names.find_mut(key, |name| name.hash == hash) {
            name.tiers |= bit;
            return;
        }
        let name = Name {
            hash,
            node,
            tiers: bit,
        };
        let hasher = &self.hasher;
        self.names
            .insert_unique(key, name, |name| hasher.hash_one(name.hash));
    }

    /// Takes a name back from a tier.
    pub(super) fn remove(&mut self, hash: u64, tier: Tier) -> Unnamed {
        let (key, bit) = (self.hasher.hash_one(hash), 1_u8 << tier.index());
        let Ok(mut entry) = self.names.find_entry(key, |name| name.hash == hash) else {
            return Unnamed::Unknown;
        };
        let name = entry.get_mut();
        if name.tiers & bit == 0 {
            return Unnamed::Unknown;
        }
        name.tiers &= !bit;
        let node = name.node;
        if name.tiers == 0 {
            entry.remove();
        }
        let Some(extra) = self.aliases.get_mut(&node) else {
            return Unnamed::Left(node);
        };
        let outcome = match extra.get_mut(tier.index()) {
            Some(extra) if *extra > 0 => {
                *extra -= 1;
                Unnamed::Kept
            }
            _ => Unnamed::Left(node),
        };
        if *extra == [0; Tier::COUNT] {
            self.aliases.remove(&node);
        }
        outcome
    }

    pub(super) fn wait(&mut self, parent: u64, orphan: Orphan) {
        for block in &orphan.blocks {
            self.awaited.insert((block.hash, parent));
        }
        self.orphans.entry(parent).or_default().push(orphan);
    }

    /// The stores that waited for a block.
    pub(super) fn waiting_for(&mut self, parent: u64) -> Vec<Orphan> {
        if self.orphans.is_empty() {
            return Vec::new();
        }
        let orphans = self.orphans.remove(&parent).unwrap_or_default();
        for block in orphans.iter().flat_map(|orphan| &orphan.blocks) {
            self.awaited.remove(&(block.hash, parent));
        }
        orphans
    }

    /// Removes a block from every store that waits with it. Whether there was one.
    pub(super) fn remove_waiting(&mut self, hash: u64, tier: Tier) -> bool {
        let mut found = false;
        for (_, parent) in self.awaited.range((hash, 0)..=(hash, u64::MAX)) {
            let orphans = self.orphans.get_mut(parent).into_iter().flatten();
            let blocks = orphans
                .filter(|orphan| orphan.tier == tier)
                .flat_map(|orphan| &mut orphan.blocks);
            for block in blocks.filter(|block| block.hash == hash && !block.gone) {
                block.gone = true;
                found = true;
            }
        }
        found
    }

    /// Blocks in waiting stores.
    pub(super) fn waiting(&self) -> usize {
        self.orphans
            .values()
            .flatten()
            .map(|o| o.blocks.len())
            .sum()
    }
}
