//! Bodies of requests.

use std::collections::{HashMap, HashSet};

use kv_core::id::{DpRank, OwnerId, WorkerId};
use serde::Deserialize;

use super::SelectError;
use super::choice::Constraints;
use super::prompt::{BlockMedia, RoutingTokens};

/// Model and routing group of what names none.
pub(super) const DEFAULT: &str = "default";
/// Longest id of a selection, in bytes.
const LONGEST_ID: usize = 1024;

/// Any question about a prompt; each path reads what concerns it.
#[derive(Debug, Deserialize)]
pub(super) struct Asked {
    pub(super) model_name: Option<String>,
    #[serde(default = "default")]
    pub(super) routing_group: String,
    pub(super) selection_id: Option<String>,
    pub(super) token_ids: Option<Vec<u32>>,
    pub(super) mm_routing_info: Option<RoutingTokens>,
    pub(super) block_mm_infos: Option<Vec<Option<BlockMedia>>>,
    pub(super) block_hashes: Option<Vec<i64>>,
    pub(super) sequence_hashes: Option<Vec<i64>>,
    pub(super) isl_tokens: Option<u32>,
    pub(super) lora_name: Option<String>,
    pub(super) cache_salt: Option<String>,
    pub(super) is_eagle: Option<bool>,
    #[serde(default)]
    pub(super) router_config_override: Option<Override>,
    affinity_target: Option<Affinity>,
    pinned_worker: Option<Pinned>,
    allowed_worker_ids: Option<HashSet<WorkerId>>,
    #[serde(default)]
    routing_constraints: Taints,
    #[serde(default)]
    pub(super) advisory: bool,
    pub(super) worker_id: Option<WorkerId>,
    pub(super) dp_rank: Option<DpRank>,
    pub(super) effective_prefill_tokens: Option<u64>,
    pub(super) track_prefill_tokens: Option<bool>,
}

/// What a request may change of the policy. As in Dynamo, weights are fixed at the start: those
/// given here mean nothing.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Override {
    pub(super) assume_kv_reuse: Option<bool>,
    pub(super) track_prefill_tokens: Option<bool>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct Affinity {
    worker_id: WorkerId,
    dp_rank: Option<DpRank>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct Pinned {
    worker_id: WorkerId,
    dp_rank: DpRank,
}

#[derive(Debug, Default, Deserialize)]
struct Taints {
    #[serde(default)]
    required_taints: HashSet<String>,
    #[serde(default)]
    preferred_taints: HashMap<String, f32>,
}

/// Body of `/reservations/{id}/output_block`.
#[derive(Debug, Deserialize)]
pub(super) struct Output {
    pub(super) decay_fraction: Option<f64>,
}

/// Partitions that are asked for; without either, all.
#[derive(Debug, Deserialize)]
pub(super) struct Filter {
    pub(super) model_name: Option<String>,
    pub(super) routing_group: Option<String>,
}

fn default() -> String {
    DEFAULT.to_owned()
}

impl Asked {
    /// The model that is asked for.
    pub(super) fn model(&self) -> &str {
        self.model_name.as_deref().unwrap_or(DEFAULT)
    }

    /// The id of the selection, if it has one.
    ///
    /// # Errors
    /// When it is too long.
    pub(super) fn id(&self) -> Result<Option<&str>, SelectError> {
        let id = self.selection_id.as_deref();
        if id.is_some_and(|id| id.len() > LONGEST_ID) {
            let why = format!("selection_id must have at most {LONGEST_ID} bytes");
            return Err(SelectError::Invalid(why));
        }
        Ok(id)
    }

    /// Whether others can share the blocks of this request; `None` where the configuration says.
    pub(super) fn reuses(&self) -> Option<bool> {
        self.router_config_override.as_ref()?.assume_kv_reuse
    }

    /// Whether its prompt tokens count; `None` where the configuration says.
    pub(super) fn tracks_prefill(&self) -> Option<bool> {
        self.router_config_override.as_ref()?.track_prefill_tokens
    }

    /// Where it may go.
    pub(super) fn constraints(&mut self) -> Constraints {
        let Taints {
            required_taints,
            preferred_taints,
        } = std::mem::take(&mut self.routing_constraints);
        Constraints {
            pinned: self.pinned_worker.map(|pinned| OwnerId {
                worker: pinned.worker_id,
                rank: pinned.dp_rank,
            }),
            allowed: self.allowed_worker_ids.take(),
            affinity: self.affinity_target.map(|to| (to.worker_id, to.dp_rank)),
            required_taints,
            preferred_taints,
        }
    }
}

impl Filter {
    pub(super) fn wants(&self, models: &[String], group: &str) -> bool {
        let is_model = |model: &String| models.contains(model);
        self.model_name.as_ref().is_none_or(is_model)
            && self.routing_group.as_ref().is_none_or(|g| g == group)
    }
}
