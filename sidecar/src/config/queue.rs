//! How requests wait and are refused because of load.

use kv_core::queue::{Bounds, Bucketed, Class, Limits, Order, Profile, Refusing, Thresholds};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::check::{Check, milliseconds};
use super::file;

/// Name of the one class where none are given.
const DEFAULT_CLASS: &str = "default";

/// How requests wait while all workers are busy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Queue {
    /// A worker is busy while it has more prefill tokens than this share of
    /// `max_num_batched_tokens`; a request waits while all are that can take it. Mirrors Dynamo's
    /// `--router-queue-threshold`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "f64", range(min = 0.0, max = 1_000_000.0))]
    pub threshold: Option<f64>,
    /// Who goes first: `fcfs`, `wspt` or `lcfs`. Mirrors Dynamo's `--router-queue-policy`.
    pub policy: Order,
    /// Seconds that a request may wait.
    #[schemars(range(min = 0.01, max = 240.0))]
    pub max_wait_secs: f64,
    /// Requests that a thread of Envoy holds, at most.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub held_requests: u64,
    /// Their prompt tokens, at most.
    #[schemars(range(min = 1))]
    pub held_tokens: u64,
    /// Bytes of their bodies, at most.
    #[schemars(range(min = 1))]
    pub held_body_bytes: u64,
    /// The family of requests that name no class. Mirrors the key of Dynamo's policy file, as those
    /// below do.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "String", length(min = 1, max = 64))]
    pub default_policy_family: Option<String>,
    /// Buckets by prompt tokens to compute; the first starts at 0.
    #[schemars(length(max = 64))]
    pub uncached_isl_buckets: Vec<Bucket>,
    /// The classes. Without any there is one, `default`.
    #[schemars(length(max = 64))]
    pub policy_classes: Vec<PolicyClass>,
}

impl Default for Queue {
    fn default() -> Self {
        let bounds = Bounds::default();
        Self {
            threshold: None,
            policy: Order::default(),
            max_wait_secs: 30.0,
            held_requests: bounds.requests,
            held_tokens: bounds.tokens,
            held_body_bytes: bounds.body_bytes,
            default_policy_family: None,
            uncached_isl_buckets: Vec::new(),
            policy_classes: Vec::new(),
        }
    }
}

/// A bucket of requests by size.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Bucket {
    /// Prompt tokens to compute, at least.
    pub min_tokens: u64,
    /// Its name.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(required, with = "String", length(min = 1, max = 64))]
    pub bucket: Option<String>,
}

/// A class of requests.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PolicyClass {
    /// Its name, which clients with privileges may name in `x-dynamo-meta-policy-class`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(required, with = "String", length(min = 1, max = 64))]
    pub name: Option<String>,
    /// Its family; with `cache_bucket`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "String", length(min = 1, max = 64))]
    pub policy_family: Option<String>,
    /// Its bucket; with `policy_family`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "String", length(min = 1, max = 64))]
    pub cache_bucket: Option<String>,
    /// Who goes first, if not as `policy` says.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Order")]
    pub queue_policy: Option<Order>,
    /// Prompt tokens that it gets in a round of all classes.
    #[schemars(range(min = 1))]
    pub quantum: u64,
    /// A worker with more prefill tokens is busy for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "u64")]
    pub prefill_busy_threshold: Option<u64>,
    /// The same as a share of `max_num_batched_tokens`, if not as `threshold` says.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "f64", range(min = 0.0, max = 1_000_000.0))]
    pub prefill_busy_threshold_frac: Option<f64>,
    /// Requests that may wait, for each worker.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "u64")]
    pub request_queue_limit_per_worker: Option<u64>,
    /// Prompt tokens that may wait, for each worker.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "u64")]
    pub raw_isl_token_queue_limit_per_worker: Option<u64>,
    /// Cached prompt tokens that may wait, for each worker.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "u64")]
    pub cached_token_queue_limit_per_worker: Option<u64>,
}

impl Default for PolicyClass {
    fn default() -> Self {
        Self {
            name: None,
            policy_family: None,
            cache_bucket: None,
            queue_policy: None,
            quantum: 1,
            prefill_busy_threshold: None,
            prefill_busy_threshold_frac: None,
            request_queue_limit_per_worker: None,
            raw_isl_token_queue_limit_per_worker: None,
            cached_token_queue_limit_per_worker: None,
        }
    }
}

impl PolicyClass {
    fn class(&self, queue: &Queue) -> Class {
        Class {
            name: self.name.clone().unwrap_or_default(),
            order: self.queue_policy.unwrap_or(queue.policy),
            quantum: self.quantum,
            busy_tokens: self.prefill_busy_threshold,
            busy_share: self.prefill_busy_threshold_frac.or(queue.threshold),
            limits: Limits {
                requests: self.request_queue_limit_per_worker,
                tokens: self.raw_isl_token_queue_limit_per_worker,
                cached_tokens: self.cached_token_queue_limit_per_worker,
            },
        }
    }
}

impl Check {
    /// The classes of a pool's queue.
    pub(super) fn queue(&mut self, queue: &Queue, path: &str) -> Option<Profile> {
        let mut profile = self.profile(queue, path)?;
        profile.bounds = Bounds {
            wait_ms: milliseconds(queue.max_wait_secs),
            requests: queue.held_requests,
            tokens: queue.held_tokens,
            body_bytes: queue.held_body_bytes,
        };
        Some(profile)
    }

    fn profile(&mut self, queue: &Queue, path: &str) -> Option<Profile> {
        if queue.policy_classes.is_empty() {
            let class = PolicyClass {
                name: Some(DEFAULT_CLASS.into()),
                ..PolicyClass::default()
            };
            return Some(Profile::single(class.class(queue)));
        }
        let mut classes = Vec::new();
        for (i, class) in queue.policy_classes.iter().enumerate() {
            let at = match (&class.policy_family, &class.cache_bucket) {
                (Some(family), Some(bucket)) => Some((family.clone(), bucket.clone())),
                (None, None) => None,
                (Some(_), None) | (None, Some(_)) => {
                    let path = format!("{path}.policy_classes[{i}]");
                    let why = "needs both policy_family and cache_bucket, or neither";
                    let name = class.name.as_deref().unwrap_or_default();
                    self.refuse(path, name, why);
                    return None;
                }
            };
            classes.push(Bucketed {
                class: class.class(queue),
                at,
            });
        }
        let buckets = queue.uncached_isl_buckets.iter();
        let buckets: Vec<(u64, String)> = buckets
            .map(|b| (b.min_tokens, b.bucket.clone().unwrap_or_default()))
            .collect();
        let default = queue.default_policy_family.as_deref();
        match Profile::new(classes, default.unwrap_or(DEFAULT_CLASS), &buckets) {
            Ok(profile) => Some(profile),
            Err(error) => {
                let path = format!("{path}.policy_classes");
                self.refuse(path, "[...]", &error.to_string());
                None
            }
        }
    }
}

/// Past which load workers take no requests.
pub(super) fn overload(pool: &file::Pool) -> Thresholds {
    Thresholds {
        decode_blocks: pool.active_decode_blocks_threshold,
        prefill_tokens: pool.active_prefill_tokens_threshold,
        prefill_share: pool.active_prefill_tokens_threshold_frac,
    }
}

/// How requests are refused then.
pub(super) fn refusing(pool: &file::Pool) -> Refusing {
    Refusing {
        status: pool.overload_status,
        retry_after_s: pool.retry_after_secs,
    }
}
