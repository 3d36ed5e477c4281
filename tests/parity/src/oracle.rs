//! Dynamo's index: its radix tree for device blocks, its lower-tier indexers for the others.

use std::collections::BTreeMap;

use dynamo_kv_router::RadixTree;
use dynamo_kv_router::indexer::{
    KvIndexerInterface, LowerTierIndexers, LowerTierQueryOptions, query_lower_tiers_with_options,
};
use dynamo_kv_router::protocols::{
    ExternalSequenceBlockHash, KvCacheEvent, KvCacheEventData, KvCacheRemoveData, KvCacheStoreData,
    KvCacheStoredBlockData, LocalBlockHash, RouterEvent, StorageTier,
};
use kv_core::event::EventData;
use kv_core::id::{OwnerId, Tier};

use crate::content::Depths;

/// Dynamo's index of one pool.
pub struct Oracle {
    tree: RadixTree,
    lower: LowerTierIndexers,
}

impl Oracle {
    /// An empty index.
    #[must_use]
    pub fn new() -> Self {
        Self {
            tree: RadixTree::new(),
            lower: LowerTierIndexers::new(1, 16),
        }
    }

    /// Applies an event as Dynamo's indexer service does: device events to the tree, others to
    /// their tier, a clear to all. Its errors are its own affair: what it refuses it doesn't index.
    pub fn apply(&mut self, owner: OwnerId, tier: Tier, data: &EventData) {
        let event = router_event(owner, tier, data);
        match (data, tier) {
            (EventData::Cleared, _) => {
                let _ = self.tree.apply_event(event.clone());
                for indexer in self.lower.all() {
                    let _ = block_on(indexer.apply_event_and_wait(event.clone()));
                }
            }
            (_, Tier::Device) => {
                let _ = self.tree.apply_event(event);
            }
            _ => {
                let indexer = self.lower.get_or_create(event.storage_tier);
                let _ = block_on(indexer.apply_event_and_wait(event));
            }
        }
    }

    /// A rank has left.
    pub fn remove(&mut self, owner: OwnerId) {
        self.tree.remove_worker_dp_rank(owner.worker, owner.rank);
        for indexer in self.lower.all() {
            let reset = indexer.reset_worker_dp_rank_and_wait(owner.worker, owner.rank);
            block_on(reset).expect("the rank is reset");
        }
    }

    /// What every owner holds of a prompt, given by its block hashes; owners that hold nothing are
    /// left out.
    #[must_use]
    pub fn depths(&self, tokens: &[u64]) -> BTreeMap<OwnerId, Depths> {
        let sequence: Vec<LocalBlockHash> = tokens.iter().copied().map(LocalBlockHash).collect();
        let device = self.tree.find_match_details(sequence.clone(), false);
        let options = LowerTierQueryOptions::default();
        let lower = query_lower_tiers_with_options(&self.lower, &sequence, &device, options);
        let mut found: BTreeMap<OwnerId, Depths> = BTreeMap::new();
        for (worker, blocks) in device.overlap_scores.scores {
            let owner = OwnerId {
                worker: worker.worker_id,
                rank: worker.dp_rank,
            };
            found.insert(owner, [blocks; Tier::COUNT]);
        }
        for tier in [Tier::Host, Tier::Disk, Tier::External] {
            for (worker, blocks) in lower
                .get(&storage_tier(tier))
                .iter()
                .flat_map(|details| &details.hits)
            {
                let owner = OwnerId {
                    worker: worker.worker_id,
                    rank: worker.dp_rank,
                };
                let depths = found.entry(owner).or_default();
                for depth in &mut depths[tier.index()..] {
                    *depth += u32::try_from(*blocks).expect("a depth");
                }
            }
        }
        found.retain(|_, depths| *depths != [0; Tier::COUNT]);
        found
    }
}

/// Waits, on whatever thread: the indexer's own threads do the work. Tokio must not ration it.
fn block_on<T>(work: impl Future<Output = T>) -> T {
    futures::executor::block_on(tokio::task::unconstrained(work))
}

impl Default for Oracle {
    fn default() -> Self {
        Self::new()
    }
}

/// An event in Dynamo's types.
#[must_use]
pub fn router_event(owner: OwnerId, tier: Tier, data: &EventData) -> RouterEvent {
    let data = match data {
        EventData::Stored(stored) => KvCacheEventData::Stored(KvCacheStoreData {
            parent_hash: stored.parent_hash.map(ExternalSequenceBlockHash),
            start_position: stored.start_position,
            blocks: stored
                .blocks
                .iter()
                .map(|block| KvCacheStoredBlockData {
                    block_hash: ExternalSequenceBlockHash(block.block_hash),
                    tokens_hash: LocalBlockHash(block.tokens_hash),
                    mm_extra_info: None,
                })
                .collect(),
        }),
        EventData::Removed(removed) => {
            let hashes = removed.block_hashes.iter().copied();
            KvCacheEventData::Removed(KvCacheRemoveData {
                block_hashes: hashes.map(ExternalSequenceBlockHash).collect(),
            })
        }
        EventData::Cleared => KvCacheEventData::Cleared,
    };
    let event = KvCacheEvent {
        event_id: 0,
        data,
        dp_rank: owner.rank,
    };
    RouterEvent::with_storage_tier(owner.worker, event, storage_tier(tier))
}

fn storage_tier(tier: Tier) -> StorageTier {
    match tier {
        Tier::Device => StorageTier::Device,
        Tier::Host => StorageTier::HostPinned,
        Tier::Disk => StorageTier::Disk,
        Tier::External => StorageTier::External,
    }
}
