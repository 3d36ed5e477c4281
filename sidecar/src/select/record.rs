//! A worker as it registers and as it is shown.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use kv_core::id::{DpRank, WorkerId};
use kv_core::table::Metadata;
use serde::{Deserialize, Serialize, Serializer};

use super::request::DEFAULT;

/// Body of `POST /workers`.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Worker {
    pub(super) worker_id: WorkerId,
    #[serde(default = "default")]
    model_name: String,
    #[serde(default = "default")]
    routing_group: String,
    #[serde(flatten)]
    traits: Traits,
}

fn default() -> String {
    DEFAULT.to_owned()
}

/// Body of `PATCH /workers/{id}`, and what a record is made of besides its identity. What nothing
/// here goes by is shown as it came.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub(super) struct Traits {
    pub(super) endpoint: Option<String>,
    kv_events_endpoint: Option<String>,
    #[serde(serialize_with = "shown", skip_serializing_if = "is_empty")]
    kv_events_endpoints: Option<BTreeMap<DpRank, String>>,
    pub(super) replay_endpoint: Option<String>,
    pub(super) block_size: Option<u32>,
    data_parallel_start_rank: Option<u32>,
    data_parallel_size: Option<u32>,
    pub(super) max_num_batched_tokens: Option<u64>,
    pub(super) total_kv_blocks: Option<u64>,
    stable_routing_id: Option<String>,
    pub(super) is_eagle: Option<bool>,
    #[serde(serialize_with = "shown")]
    pub(super) taints: Option<BTreeSet<String>>,
    #[serde(serialize_with = "shown")]
    topology_domains: Option<BTreeMap<String, String>>,
    kv_transfer_domain: Option<String>,
    kv_transfer_enforcement: Option<Enforcement>,
    kv_transfer_preferred_weight: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    router_hint_worker_type: Option<String>,
    #[serde(serialize_with = "shown", skip_serializing_if = "is_empty")]
    router_hint_source_control_endpoints: Option<BTreeMap<DpRank, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kv_event_source_mode: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
enum Enforcement {
    Required,
    Preferred,
}

/// What a missing collection is shown as.
fn shown<T: Default + Serialize, S: Serializer>(
    value: &Option<T>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => value.serialize(serializer),
        None => T::default().serialize(serializer),
    }
}

fn is_empty(value: &Option<BTreeMap<DpRank, String>>) -> bool {
    value.as_ref().is_none_or(BTreeMap::is_empty)
}

/// Whether a worker takes requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Lifecycle {
    /// It has not said all that is needed.
    Incomplete,
    /// It does.
    Schedulable,
    /// It does not.
    Unschedulable,
}

/// A worker as `/workers` shows it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Record {
    pub(super) worker_id: WorkerId,
    pub(super) model_name: String,
    pub(super) routing_group: String,
    pub(super) lifecycle: Lifecycle,
    #[serde(flatten)]
    pub(super) traits: Traits,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) not_schedulable_reasons: Vec<String>,
}

impl From<Worker> for Record {
    fn from(worker: Worker) -> Self {
        Self {
            worker_id: worker.worker_id,
            model_name: worker.model_name,
            routing_group: worker.routing_group,
            lifecycle: Lifecycle::Incomplete,
            traits: worker.traits,
            not_schedulable_reasons: Vec::new(),
        }
    }
}

impl Traits {
    /// Those of a worker of the configuration.
    pub(super) fn configured(endpoint: String, block_size: u32, ranks: u32, of: &Metadata) -> Self {
        let blocks = of.total_kv_blocks;
        Self {
            endpoint: Some(endpoint),
            block_size: Some(block_size),
            data_parallel_start_rank: Some(0),
            data_parallel_size: Some(ranks),
            total_kv_blocks: (blocks > 0).then_some(blocks.into()),
            taints: Some(of.taints.iter().cloned().collect()),
            ..Self::default()
        }
    }

    /// Takes over what a patch sets; it can't unset.
    pub(super) fn patch(&mut self, patch: Self) {
        fn set<T>(own: &mut Option<T>, other: Option<T>) {
            if other.is_some() {
                *own = other;
            }
        }
        set(&mut self.endpoint, patch.endpoint);
        set(&mut self.kv_events_endpoint, patch.kv_events_endpoint);
        set(&mut self.kv_events_endpoints, patch.kv_events_endpoints);
        set(&mut self.replay_endpoint, patch.replay_endpoint);
        set(&mut self.block_size, patch.block_size);
        let start = patch.data_parallel_start_rank;
        set(&mut self.data_parallel_start_rank, start);
        set(&mut self.data_parallel_size, patch.data_parallel_size);
        let batched = patch.max_num_batched_tokens;
        set(&mut self.max_num_batched_tokens, batched);
        set(&mut self.total_kv_blocks, patch.total_kv_blocks);
        set(&mut self.stable_routing_id, patch.stable_routing_id);
        set(&mut self.is_eagle, patch.is_eagle);
        set(&mut self.taints, patch.taints);
        set(&mut self.topology_domains, patch.topology_domains);
        set(&mut self.kv_transfer_domain, patch.kv_transfer_domain);
        let enforcement = patch.kv_transfer_enforcement;
        set(&mut self.kv_transfer_enforcement, enforcement);
        let weight = patch.kv_transfer_preferred_weight;
        set(&mut self.kv_transfer_preferred_weight, weight);
        let hints = patch.router_hint_worker_type;
        set(&mut self.router_hint_worker_type, hints);
        let sources = patch.router_hint_source_control_endpoints;
        set(&mut self.router_hint_source_control_endpoints, sources);
        set(&mut self.kv_event_source_mode, patch.kv_event_source_mode);
    }

    /// Its ranks.
    pub(super) fn ranks(&self) -> Range<DpRank> {
        let start = self.data_parallel_start_rank.unwrap_or(0);
        start..start.saturating_add(self.size())
    }

    fn size(&self) -> u32 {
        self.data_parallel_size.unwrap_or(1)
    }

    /// Where each rank publishes its events.
    pub(super) fn sources(&self) -> BTreeMap<DpRank, String> {
        match &self.kv_events_endpoints {
            Some(endpoints) if !endpoints.is_empty() => endpoints.clone(),
            _ if self.size() == 1 => {
                let endpoint = self.kv_events_endpoint.clone();
                endpoint
                    .map(|e| (self.ranks().start, e))
                    .into_iter()
                    .collect()
            }
            _ => BTreeMap::new(),
        }
    }

    /// What it lacks to take requests.
    pub(super) fn lacks(&self) -> Vec<String> {
        let mut lacks = Vec::new();
        if self.endpoint.as_deref().is_none_or(str::is_empty) {
            lacks.push("endpoint is required".to_owned());
        }
        if self.block_size.is_none_or(|size| size == 0) {
            lacks.push("block_size must be greater than 0".to_owned());
        }
        if self.size() == 0 {
            lacks.push("data_parallel_size must be greater than 0".to_owned());
        }
        let sources = self.sources();
        let is_silent = |rank: &DpRank| sources.get(rank).is_none_or(String::is_empty);
        let silent = self.ranks().filter(is_silent);
        lacks.extend(
            silent.map(|rank| format!("kv_events endpoint is required for dp_rank {rank}")),
        );
        if self.size() > 1 && self.replay_endpoint.is_some() {
            let why = "replay_endpoint is supported only for data_parallel_size 1";
            lacks.push(why.to_owned());
        }
        lacks
    }
}
