//! Workers as they are written, and how they are found and asked whether they are well.

use std::collections::BTreeMap;

use kv_core::id::{Device, Role};
use kv_core::table::Metadata;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Events;

/// One engine instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Worker {
    /// The id its KV events carry; unique over all pools.
    // Optional to serde alone: what the schema has reported as missing must not end the checks.
    #[schemars(required)]
    pub id: Option<u64>,
    /// `ip:port` or `[v6]:port`, where it takes requests; unique over all pools. Everyone but a
    /// store has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "String")]
    pub endpoint: Option<String>,
    /// What it does for a request.
    #[serde(default)]
    pub role: Role,
    /// What it computes with, for the mode `device-aware-weighted`.
    #[serde(default)]
    pub device: Device,
    /// Data-parallel ranks, each with a cache of its own.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 1024))]
    pub data_parallel_size: u32,
    /// LoRA adapters that it has loaded, of the pool's; all of them unless given.
    #[serde(default)]
    #[schemars(length(max = 1024), inner(length(min = 1, max = 256)))]
    pub lora: Vec<String>,
    /// Taints, which requests can require or prefer.
    #[serde(default)]
    #[schemars(length(max = 64), inner(length(min = 1, max = 256)))]
    pub taints: Vec<String>,
    /// Labels, its place in the topology among them.
    #[serde(default)]
    #[schemars(extend("maxProperties" = 64))]
    pub labels: BTreeMap<String, String>,
    /// KV blocks that each rank can hold; 0 where not known.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub total_kv_blocks: u32,
    /// Requests that each rank takes at a time; 0 for any number.
    #[serde(default)]
    #[schemars(range(min = 0, max = 32_768))]
    pub max_requests: u32,
    /// Prompt tokens that it computes in one batch; 0 where not known. Mirrors the engines'
    /// `--max-num-batched-tokens`.
    #[serde(default)]
    pub max_num_batched_tokens: u32,
    /// Whether it is to get no more requests; those that it has run on.
    #[serde(default)]
    pub draining: bool,
    /// The stream of events that it publishes itself. Without it the worker's events are what NATS
    /// brings for its id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Events")]
    pub events: Option<Events>,
}

impl Worker {
    /// What it is said to be.
    pub(in crate::config) fn metadata(&self) -> Metadata {
        Metadata {
            lora: self.lora.clone(),
            taints: self.taints.clone(),
            labels: self.labels.clone(),
            total_kv_blocks: self.total_kv_blocks,
            max_requests: self.max_requests,
            max_num_batched_tokens: self.max_num_batched_tokens,
        }
    }
}

/// A DNS name that stands for workers, each address for one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Dns {
    /// Name to look up: A and AAAA records, by the system's resolver.
    #[schemars(required, length(min = 1, max = 253))]
    pub name: Option<String>,
    /// Port at which the workers take requests.
    #[schemars(required, range(min = 1))]
    pub port: Option<u16>,
    /// Which addresses count.
    #[serde(default)]
    pub family: AddressFamily,
    /// Seconds between lookups.
    #[serde(default = "refresh_secs")]
    #[schemars(range(min = 0.1, max = 86_400.0))]
    pub refresh_secs: f64,
    /// Data-parallel ranks of each worker.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 1024))]
    pub data_parallel_size: u32,
    /// Taints of each worker.
    #[serde(default)]
    #[schemars(length(max = 64), inner(length(min = 1, max = 256)))]
    pub taints: Vec<String>,
    /// KV blocks that each rank can hold; 0 where not known.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub total_kv_blocks: u32,
    /// Requests that each rank takes at a time; 0 for any number.
    #[serde(default)]
    #[schemars(range(min = 0, max = 32_768))]
    pub max_requests: u32,
    /// Port of each worker's ZMQ socket of events, rank 0's. Without it the events are what NATS
    /// brings for the worker's id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "u16", range(min = 1))]
    pub zmq_port: Option<u16>,
    /// Port of each worker's ZMQ socket of replays, rank 0's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "u16", range(min = 1))]
    pub zmq_replay_port: Option<u16>,
}

/// Addresses by their kind.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum AddressFamily {
    /// Both.
    #[default]
    Any,
    /// A records.
    Ipv4,
    /// AAAA records.
    Ipv6,
}

fn one() -> u32 {
    1
}

fn refresh_secs() -> f64 {
    5.0
}

/// How workers are asked whether they are well.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct HealthCheck {
    /// Path of a GET that a worker answers with a status of 200 to 299 while it is well.
    #[schemars(regex(pattern = r"^/[!-~]{0,1023}$"))]
    pub path: String,
    /// Seconds between two.
    #[schemars(range(min = 0.1, max = 3600.0))]
    pub interval_secs: f64,
    /// Seconds that an answer may take.
    #[schemars(range(min = 0.01, max = 60.0))]
    pub timeout_secs: f64,
    /// Bad answers in a row after which a worker is left out.
    #[schemars(range(min = 1, max = 100))]
    pub unwell_after: u32,
}

impl Default for HealthCheck {
    fn default() -> Self {
        Self {
            path: "/health".into(),
            interval_secs: 5.0,
            timeout_secs: 1.0,
            unwell_after: 3,
        }
    }
}

/// Workers that register at run time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Registration {
    /// Networks, such as `10.0.0.0/8`, inside which their endpoints must be.
    #[schemars(required, length(min = 1, max = 64))]
    pub networks: Option<Vec<String>>,
    /// Workers at a time.
    #[serde(default = "max_workers")]
    #[schemars(range(min = 1, max = 65_536))]
    pub max_workers: usize,
    /// Seconds for which one counts that does not say for how long.
    #[serde(default = "ttl_secs")]
    #[schemars(range(min = 1.0, max = 86_400.0))]
    pub ttl_secs: f64,
    /// Longest time that one may ask for, in seconds.
    #[serde(default = "max_ttl_secs")]
    #[schemars(range(min = 1.0, max = 86_400.0))]
    pub max_ttl_secs: f64,
}

fn max_workers() -> usize {
    1024
}

fn ttl_secs() -> f64 {
    30.0
}

fn max_ttl_secs() -> f64 {
    600.0
}
