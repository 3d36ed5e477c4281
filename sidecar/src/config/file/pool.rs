//! A pool as it is written: what it serves and how one of its workers is chosen.

use std::collections::BTreeMap;

use kv_core::id::Tier;
use kv_core::policy::{Mode, Scoring};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Dns, FamilyUse, Tokenizer, Worker};
use crate::config::DEFAULT_POOL;
use crate::config::queue::Queue;

/// Workers that serve the same models, and how one of them is chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Pool {
    /// Name in metrics, records and the `x-kv-pool` header.
    #[schemars(regex(pattern = r"^[A-Za-z0-9._-]{1,64}$"))]
    pub name: String,
    /// Model names served. Empty takes any name, for the first pool only.
    pub models: Vec<String>,
    /// LoRA adapters, which requests name as their model.
    pub lora_adapters: Vec<String>,
    /// How a worker is chosen. Mirrors Dynamo's `--router-mode`.
    pub router_mode: Mode,
    /// What the mode `kv` compares.
    pub policy: Scoring,
    /// Weights of the policy `predicted-delay`.
    pub predicted_delay: PredictedDelay,
    /// Tokens to a block, as the engines have it. Mirrors Dynamo's `--kv-cache-block-size`.
    #[schemars(range(min = 1, max = 4096))]
    pub kv_cache_block_size: u32,
    /// Softmax temperature over normalised costs; 0 takes the least cost. Mirrors Dynamo's
    /// `--router-temperature`.
    #[schemars(range(min = 0.0, max = 1000.0))]
    pub router_temperature: f64,
    /// Whether KV events of the pool's workers are indexed. Otherwise the blocks of every prompt
    /// sent to a worker are predicted to be there for a while. Mirrors Dynamo's `--kv-events`.
    pub kv_events: bool,
    /// Seconds for which a predicted block is believed in after its last use; for pools without
    /// `kv_events`. Mirrors Dynamo's `--router-ttl-secs`.
    #[schemars(range(min = 0.1, max = 86_400.0))]
    pub router_ttl_secs: f64,
    /// What predicted blocks are forgotten by: `ttl`, or `lru` for workers that say how many blocks
    /// they can hold (`total_kv_blocks`). Mirrors Dynamo's `--router-approximate-cache-policy`.
    pub router_approximate_cache_policy: CachePolicy,
    /// Seconds for which the blocks of a routed prompt are believed in beside events; for pools
    /// with `kv_events`. Mirrors Dynamo's `--router-predicted-ttl-secs`.
    #[schemars(range(min = 0.1, max = 86_400.0))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "f64")]
    pub router_predicted_ttl_secs: Option<f64>,
    /// Older name of one knob: sets `prefill_load_scale`, and at 0 also `overlap_score_credit` to
    /// 0. Not together with either. Mirrors Dynamo's `--kv-overlap-score-weight`.
    #[schemars(range(min = 0.0, max = 1_000_000.0))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "f64")]
    pub kv_overlap_score_weight: Option<f64>,
    /// Weight of prefill blocks against blocks being decoded; 1 unless given. Mirrors Dynamo's
    /// `--router-prefill-load-scale`.
    #[schemars(range(min = 0.0, max = 1_000_000.0))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "f64")]
    pub prefill_load_scale: Option<f64>,
    /// Credit for a block in accelerator memory, in blocks; 1 unless given. Mirrors Dynamo's
    /// `--router-kv-overlap-score-credit`.
    #[schemars(range(min = 0.0, max = 1_000_000.0))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "f64")]
    pub overlap_score_credit: Option<f64>,
    /// Credit for a block in host memory, in blocks. Mirrors Dynamo's
    /// `--router-host-cache-hit-weight`.
    #[schemars(range(min = 0.0, max = 1_000_000.0))]
    pub host_cache_hit_weight: f64,
    /// Credit for a block on disk or in a store, in blocks. Mirrors Dynamo's
    /// `--router-disk-cache-hit-weight`.
    #[schemars(range(min = 0.0, max = 1_000_000.0))]
    pub disk_cache_hit_weight: f64,
    /// Credit for a block that a worker does not have and a store of the pool has, in blocks.
    /// Mirrors Dynamo's `--shared-cache-multiplier`.
    #[schemars(range(min = 0.0, max = 1_000_000.0))]
    pub shared_cache_multiplier: f64,
    /// Cost of one active request, in blocks. Mirrors Dynamo's
    /// `--router-decode-active-request-weight`.
    #[schemars(range(min = 0.0, max = 1_000_000.0))]
    pub decode_active_request_weight: f64,
    /// How much of `overlap_score_credit` prefill queued at a worker takes away. Mirrors Dynamo's
    /// `--router-kv-overlap-score-credit-decay`.
    #[schemars(range(min = 0.0, max = 1_000_000.0))]
    pub overlap_score_credit_decay: f64,
    /// Names of media in engines' events, beyond the usual ones, and the tiers they stand for.
    /// Upper and lower case are the same.
    #[schemars(extend("maxProperties" = 64))]
    pub media: BTreeMap<String, Tier>,
    /// What the hashes are in events without token ids.
    #[schemars(length(max = 8))]
    pub families: Vec<FamilyUse>,
    /// The model's placeholder token of images, where requests have another id in its place that
    /// stands for the image, as Dynamo's frontend puts there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "u32")]
    pub image_token_id: Option<u32>,
    /// Whether any client may say where its request goes and how urgent it is. Otherwise only those
    /// may whose route says so in its metadata, and those of `trusted_sources`.
    pub trust_hints: bool,
    /// Networks such as `10.0.0.0/8` whose clients may do that too, by the address that Envoy takes
    /// for the client's.
    #[schemars(length(max = 64))]
    pub trusted_sources: Vec<String>,
    /// Seconds after its last request for which a session keeps its worker. Without it sessions are
    /// not kept together. Mirrors Dynamo's `--router-session-affinity-ttl-secs`.
    #[schemars(range(min = 1.0, max = 31_536_000.0))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "f64")]
    pub router_session_affinity_ttl_secs: Option<f64>,
    /// Whether a session's worker gets its requests whatever it costs, or only up to
    /// `session_affinity_slack`. Mirrors Dynamo's `--router-session-affinity-mode`.
    pub router_session_affinity_mode: Stickiness,
    /// In the mode `soft`: how many times the least cost that of the session's worker may be.
    #[schemars(range(min = 1.0, max = 1_000_000.0))]
    pub session_affinity_slack: f64,
    /// Headers with the id of a session, in lower case, that count before Dynamo's and agents' own.
    #[schemars(length(max = 16), inner(length(min = 1, max = 128)))]
    pub session_headers: Vec<String>,
    /// In the mode `device-aware-weighted`: requests on a worker with an accelerator for each on a
    /// worker without. Mirrors Dynamo's `DYN_ENCODER_CUDA_TO_CPU_RATIO`.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub encoder_cuda_to_cpu_ratio: u32,
    /// How requests wait while all workers are busy; without it none waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Queue")]
    pub queue: Option<Queue>,
    /// A worker takes no requests while more than this share of its `total_kv_blocks` is in use.
    /// Mirrors Dynamo's `--active-decode-blocks-threshold`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "f64", range(min = 0.0, max = 1.0))]
    pub active_decode_blocks_threshold: Option<f64>,
    /// A worker takes no requests while it has more prompt tokens to prefill. Mirrors Dynamo's
    /// `--active-prefill-tokens-threshold`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "u64")]
    pub active_prefill_tokens_threshold: Option<u64>,
    /// The same as a share of `max_num_batched_tokens`. Mirrors Dynamo's
    /// `--active-prefill-tokens-threshold-frac`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "f64", range(min = 0.0, max = 1_000_000.0))]
    pub active_prefill_tokens_threshold_frac: Option<f64>,
    /// Status of requests that are refused because of load. Mirrors Dynamo's
    /// `DYN_HTTP_OVERLOAD_STATUS_CODE`.
    #[schemars(range(min = 400, max = 599))]
    pub overload_status: u16,
    /// Seconds after which they may be sent again, in `retry-after`.
    #[schemars(range(min = 0, max = 86_400))]
    pub retry_after_secs: u32,
    /// Seconds for which the share of requests grows that a worker gets which joins or comes back,
    /// from a tenth of its usual share; 0 gives it all at once.
    #[schemars(range(min = 0.0, max = 3600.0))]
    pub slow_start_secs: f64,
    /// How prompts that are text are read; without it they are routed by load. Needs a restart, as
    /// everything under `tokenizer` does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Tokenizer")]
    pub tokenizer: Option<Tokenizer>,
    /// The workers.
    pub workers: Vec<Worker>,
    /// DNS names of further workers.
    #[schemars(length(max = 64))]
    pub dns: Vec<Dns>,
}

impl Default for Pool {
    fn default() -> Self {
        let policy = kv_core::policy::Policy::default();
        Self {
            name: DEFAULT_POOL.into(),
            models: Vec::new(),
            lora_adapters: Vec::new(),
            router_mode: policy.mode,
            policy: Scoring::PredictedDelay,
            predicted_delay: PredictedDelay::default(),
            overlap_score_credit_decay: policy.overlap_score_credit_decay,
            kv_cache_block_size: 16,
            router_temperature: policy.temperature,
            kv_events: true,
            router_ttl_secs: 120.0,
            router_approximate_cache_policy: CachePolicy::Ttl,
            router_predicted_ttl_secs: None,
            kv_overlap_score_weight: None,
            prefill_load_scale: None,
            overlap_score_credit: None,
            host_cache_hit_weight: policy.host_cache_hit_weight,
            disk_cache_hit_weight: policy.disk_cache_hit_weight,
            shared_cache_multiplier: policy.shared_cache_multiplier,
            decode_active_request_weight: policy.decode_active_request_weight,
            media: BTreeMap::new(),
            families: Vec::new(),
            image_token_id: None,
            trust_hints: false,
            trusted_sources: Vec::new(),
            router_session_affinity_ttl_secs: None,
            router_session_affinity_mode: Stickiness::Hard,
            session_affinity_slack: 2.0,
            session_headers: Vec::new(),
            encoder_cuda_to_cpu_ratio: 8,
            queue: None,
            active_decode_blocks_threshold: None,
            active_prefill_tokens_threshold: None,
            active_prefill_tokens_threshold_frac: None,
            overload_status: 529,
            retry_after_secs: 1,
            slow_start_secs: 0.0,
            tokenizer: None,
            workers: Vec::new(),
            dns: Vec::new(),
        }
    }
}

/// Weights of the policy `predicted-delay`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PredictedDelay {
    /// Milliseconds to prefill a token, of workers of which nothing has been learned.
    #[schemars(range(min = 0.000_01, max = 1000.0))]
    pub prefill_ms_per_token: f64,
    /// Part of the prefill booked on a worker that counts however long ago it was booked.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub backlog_floor: f64,
    /// What the prompt's prefill counts for each request there that waits for its first token.
    #[schemars(range(min = 0.0, max = 1000.0))]
    pub waiting_weight: f64,
    /// The same for each request there that decodes, of at most 64.
    #[schemars(range(min = 0.0, max = 1000.0))]
    pub decoding_weight: f64,
    /// What the pool's usual prefill counts for each request there.
    #[schemars(range(min = 0.0, max = 1000.0))]
    pub request_weight: f64,
    /// Milliseconds by which delays may differ and still be alike.
    #[schemars(range(min = 0.0, max = 1000.0))]
    pub band_ms: f64,
}

impl Default for PredictedDelay {
    fn default() -> Self {
        let weights = kv_core::delay::Weights::default();
        Self {
            prefill_ms_per_token: weights.prefill_ms_per_token,
            backlog_floor: weights.backlog_floor,
            waiting_weight: weights.waiting,
            decoding_weight: weights.decoding,
            request_weight: weights.requests,
            band_ms: weights.band_ms,
        }
    }
}

/// How firmly a session stays on its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Stickiness {
    /// As long as the worker takes requests.
    Hard,
    /// As long as it does not cost much more than another.
    Soft,
}

/// What predicted blocks are forgotten by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum CachePolicy {
    /// The time since their last use.
    #[default]
    Ttl,
    /// The room that their worker has.
    Lru,
}
