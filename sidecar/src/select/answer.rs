//! Bodies of answers.

use kv_core::cost::Demand;
use kv_core::id::{DpRank, WorkerId};
use kv_core::table::Owner;
use serde::Serialize;

use super::Choice;
use super::prompt::Hashed;
use crate::index::{Field, Standing};
use crate::indexer::Held;

/// Answer of `/select` and `/select_and_reserve`.
#[derive(Debug, Serialize)]
pub(super) struct Selected<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    selection_id: Option<String>,
    #[serde(flatten)]
    booked: Option<Booked>,
    model_name: &'a str,
    routing_group: &'a str,
    worker_id: WorkerId,
    dp_rank: DpRank,
    endpoint: String,
    block_size: u32,
    overlap: Held,
    effective_prefill_tokens: u32,
    potential_decode_blocks: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    worker_load: Option<WorkerLoad>,
}

/// What a booking adds.
#[derive(Debug, Serialize)]
struct Booked {
    sequence_hashes: Vec<i64>,
    isl_tokens: u32,
    track_prefill_tokens: bool,
}

/// Load of the chosen worker.
#[derive(Debug, Serialize)]
pub(super) struct WorkerLoad {
    pub(super) active_prefill_tokens: u64,
    pub(super) prefill_token_capacity: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) total_kv_blocks: Option<u64>,
}

impl<'a> Selected<'a> {
    pub(super) fn new(
        choice: &Choice,
        (model_name, routing_group): (&'a str, &'a str),
        endpoint: String,
        selection_id: Option<String>,
    ) -> Self {
        let block_size = choice.pool.block_size;
        let mut overlap = Held::default();
        for (rank, held) in &choice.ranks {
            overlap.add(*rank, held, block_size);
        }
        Self {
            selection_id,
            booked: None,
            model_name,
            routing_group,
            worker_id: choice.owner.worker,
            dp_rank: choice.owner.rank,
            endpoint,
            block_size,
            overlap,
            effective_prefill_tokens: choice.prefill_tokens,
            potential_decode_blocks: choice.potential_blocks,
            worker_load: None,
        }
    }

    /// With what tells that it is booked.
    pub(super) fn booked(mut self, choice: &Choice, isl_tokens: u32) -> Self {
        let hashes = choice.hashes.iter().map(|hash| hash.cast_signed());
        self.booked = Some(Booked {
            sequence_hashes: hashes.collect(),
            isl_tokens,
            track_prefill_tokens: choice.tracks_prefill,
        });
        self
    }

    /// With the load that it rests on.
    pub(super) fn loaded(mut self, load: WorkerLoad) -> Self {
        self.worker_load = Some(load);
        self
    }
}

/// Answer of `POST /reservations`.
#[derive(Debug, Serialize)]
pub(super) struct Reserved<'a> {
    pub(super) selection_id: &'a str,
    pub(super) model_name: &'a str,
    pub(super) routing_group: &'a str,
    pub(super) worker_id: WorkerId,
    pub(super) dp_rank: DpRank,
    pub(super) endpoint: String,
}

/// Answer of `/loads`, for a partition.
#[derive(Debug, Serialize)]
pub(super) struct PartitionLoads<'a> {
    pub(super) model_name: &'a str,
    pub(super) routing_group: &'a str,
    pub(super) loads: Vec<Load>,
    /// Requests that wait for a worker: none, as this service chooses at once.
    pub(super) pending_count: usize,
    pub(super) pending_isl_tokens: usize,
}

/// What an owner would have to do.
#[derive(Debug, Serialize)]
pub(super) struct Load {
    worker_id: WorkerId,
    dp_rank: DpRank,
    potential_prefill_tokens: u64,
    potential_decode_blocks: u64,
    active_requests: u32,
}

impl Load {
    /// An owner's load as it is.
    pub(super) fn new(owner: &Owner, standing: &Standing) -> Self {
        Self {
            worker_id: owner.id.worker,
            dp_rank: owner.id.rank,
            potential_prefill_tokens: standing.load.prefill_tokens,
            potential_decode_blocks: standing.load.blocks,
            active_requests: standing.load.waiting.saturating_add(standing.load.decoding),
        }
    }

    /// The same with a prompt; `prefill` is false where its tokens don't count.
    pub(super) fn with(
        field: &Field,
        (owner, standing): (&Owner, &Standing),
        prompt: &Hashed,
        prefill: bool,
    ) -> Self {
        let policy = &field.pool.policy;
        let demand = Demand {
            tokens: prompt.tokens,
            block_size: field.pool.block_size,
        };
        let mut load = Self::new(owner, standing);
        if prefill {
            let own = demand.uncached_tokens(&standing.overlap, policy);
            load.potential_prefill_tokens += u64::from(own);
        }
        if policy.tracking.active_blocks {
            let own = u64::try_from(prompt.used.len()).unwrap_or(u64::MAX);
            let own = own.saturating_sub(standing.shared_blocks.into());
            load.potential_decode_blocks += own;
        }
        load
    }
}

/// Answer of `/overlap_scores`.
#[derive(Debug, Serialize)]
pub(super) struct Scores {
    pub(super) block_size: u32,
    pub(super) num_blocks: usize,
    pub(super) workers: Vec<Score>,
    pub(super) shared_cache: SharedCache,
}

/// What an owner holds of a prompt, in blocks; slower tiers with those before them, and without.
#[derive(Debug, Serialize)]
pub(super) struct Score {
    worker_id: WorkerId,
    dp_rank: DpRank,
    device_blocks: u32,
    host_pinned_blocks: u32,
    disk_blocks: u32,
    host_pinned_extension_blocks: u32,
    disk_extension_blocks: u32,
    shared_beyond_device_blocks: Option<u32>,
}

/// What a store of all workers has of it.
#[derive(Debug, Serialize)]
pub(super) struct SharedCache {
    enabled: bool,
    total_hit_blocks: u32,
    ranges: Vec<(u32, u32)>,
    error: Option<String>,
}

impl Score {
    pub(super) fn new(owner: &Owner, standing: &Standing, is_stored: bool) -> Self {
        let [device, host, disk, external] = standing.overlap.by_tier();
        let [_, cpu, _, all] = standing.overlap.depth;
        Self {
            worker_id: owner.id.worker,
            dp_rank: owner.id.rank,
            device_blocks: device,
            host_pinned_blocks: cpu,
            disk_blocks: all,
            host_pinned_extension_blocks: host,
            disk_extension_blocks: disk + external,
            shared_beyond_device_blocks: is_stored.then_some(standing.overlap.shared_cache),
        }
    }
}

impl SharedCache {
    pub(super) fn new(field: &Field) -> Self {
        let depth = |standing: &Standing| {
            let [.., all] = standing.overlap.depth;
            match standing.overlap.shared_cache {
                0 => 0,
                beyond => all + beyond,
            }
        };
        let hit = field.standings.iter().map(depth).max().unwrap_or(0);
        Self {
            enabled: !field.pool.stores.is_empty(),
            total_hit_blocks: hit,
            ranges: (hit > 0).then_some((0, hit)).into_iter().collect(),
            error: None,
        }
    }
}
