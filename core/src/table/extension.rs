//! What the worker table says besides what the first release's filter reads of it.

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{Metadata, Table, Traits};
use crate::affinity::Affinity;
use crate::delay::Weights;
use crate::family::Scheme;
use crate::handover::Handover;
use crate::id::Slot;
use crate::policy::Scoring;
use crate::text::Budget;
use crate::tracker::Tracking;

/// By position of the pool in the table.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Extension(Vec<OfPool>);

#[derive(Debug, Serialize, Deserialize)]
struct OfPool {
    tracking: Tracking,
    trusts_hints: bool,
    device_ratio: u32,
    text: Option<Budget>,
    /// By position of the owner in its pool.
    owners: Vec<Traits>,
    families: Vec<Scheme>,
    stores: Vec<Slot>,
    shared_cache_multiplier: f64,
    /// By position of the owner in its pool.
    metadata: Vec<Metadata>,
    trusted_sources: Vec<IpNet>,
    overlap_score_credit_decay: f64,
    scoring: Scoring,
    delay: Weights,
    affinity: Option<Affinity>,
    slow_start_ms: u32,
    chunks: bool,
    handover: Handover,
}

impl Extension {
    pub(super) fn of(table: &Table) -> Self {
        let pools = table.pools.iter().map(|pool| OfPool {
            tracking: pool.policy.tracking,
            trusts_hints: pool.trusts_hints,
            device_ratio: pool.device_ratio,
            text: pool.text,
            owners: pool.owners.iter().map(|owner| owner.traits).collect(),
            families: pool.families.clone(),
            stores: pool.stores.clone(),
            shared_cache_multiplier: pool.policy.shared_cache_multiplier,
            metadata: pool.owners.iter().map(|o| o.metadata.clone()).collect(),
            trusted_sources: pool.trusted_sources.clone(),
            overlap_score_credit_decay: pool.policy.overlap_score_credit_decay,
            scoring: pool.policy.scoring,
            delay: pool.policy.delay,
            affinity: pool.affinity.clone(),
            slow_start_ms: pool.slow_start_ms,
            chunks: pool.chunks,
            handover: pool.handover,
        });
        Self(pools.collect())
    }

    pub(super) fn extend(self, table: &mut Table) {
        for (pool, more) in table.pools.iter_mut().zip(self.0) {
            pool.policy.tracking = more.tracking;
            pool.policy.overlap_score_credit_decay = more.overlap_score_credit_decay;
            pool.policy.scoring = more.scoring;
            pool.policy.delay = more.delay;
            pool.trusts_hints = more.trusts_hints;
            pool.trusted_sources = more.trusted_sources;
            pool.affinity = more.affinity;
            pool.device_ratio = more.device_ratio;
            pool.families = more.families;
            pool.stores = more.stores;
            pool.policy.shared_cache_multiplier = more.shared_cache_multiplier;
            pool.text = more.text;
            pool.slow_start_ms = more.slow_start_ms;
            pool.chunks = more.chunks;
            pool.handover = more.handover;
            for (owner, traits) in pool.owners.iter_mut().zip(more.owners) {
                owner.traits = traits;
            }
            for (owner, metadata) in pool.owners.iter_mut().zip(more.metadata) {
                owner.metadata = metadata;
            }
        }
    }
}
