//! The configuration file as it is written. Each key's documentation is also its description in
//! the JSON Schema.

use std::collections::BTreeMap;
use std::path::PathBuf;

use kv_core::handover::Handover;
use kv_core::id::{Device, Family, Role, Tier};
use kv_core::policy::{Mode, Scoring};
use kv_core::table::Metadata;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::queue::Queue;

/// Configuration of the sidecar, and of the Envoy it prints a bootstrap for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[schemars(title = "kv-router configuration")]
pub struct File {
    /// Address Envoy listens on for requests. Mirrors Dynamo's `--http-host`.
    pub http_host: String,
    /// Port Envoy listens on for requests. Mirrors Dynamo's `--http-port`. Needs a restart of Envoy.
    #[schemars(range(min = 1))]
    pub http_port: u16,
    /// `ip:port` of the sidecar's own HTTP API: health, metrics, `/v1`.
    pub admin: String,
    /// File with the token by which `/v1` of `admin` answers peers of other machines, sent as
    /// `Authorization: Bearer`. Without it they get nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "PathBuf")]
    pub admin_token_file: Option<PathBuf>,
    /// `http://host:port` of other sidecars' `admin`. One that starts without a snapshot takes the
    /// index over from the first of them that has it, showing the token of `admin_token_file`.
    #[schemars(length(max = 16))]
    pub peers: Vec<String>,
    /// `ip:port` of Envoy's admin interface, which the bootstrap gives it.
    pub envoy_admin: String,
    /// Unix socket that the filter connects to. At most 100 bytes, a limit of the kernel.
    pub socket: PathBuf,
    /// Folder for the sidecar's snapshot and for the files Envoy watches. Without it a restarted
    /// sidecar starts with an empty index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "PathBuf")]
    pub state_dir: Option<PathBuf>,
    /// The filter's WebAssembly module, as Envoy finds it.
    pub filter_wasm: PathBuf,
    /// Where KV events come from. Without it only pools that take no KV events know of
    /// any cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Nats")]
    pub nats: Option<Nats>,
    /// The select service: Dynamo's HTTP interface to decisions. Needs a restart, as everything
    /// under `select` does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Select")]
    pub select: Option<Select>,
    /// The standalone indexer: Dynamo's HTTP interface to the index. Needs a restart, as everything
    /// under `indexer` does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Indexer")]
    pub indexer: Option<Indexer>,
    /// `tcp://host:port` of the sockets of Dynamo's event plane over ZMQ, publishers' or brokers'.
    /// Needs a restart.
    #[schemars(length(max = 4096))]
    pub dynamo_zmq: Vec<String>,
    /// Most bytes a second of a worker's own stream of events; what is above waits or, posted, is
    /// refused. Needs a restart.
    #[schemars(range(min = 65_536))]
    pub event_bytes_per_second: u64,
    /// Memory of the index, in bytes. When it is full, what has not been used for longest goes
    /// first.
    #[schemars(range(min = 1_048_576))]
    pub index_bytes: u64,
    /// Memory of the pages in each Envoy, in bytes, likewise.
    #[schemars(range(min = 65_536))]
    pub page_bytes: u64,
    /// Whose decisions are made: with `dynamo` those of Dynamo 1.6.1, by its formula and defaults.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Compat")]
    pub compat: Option<Compat>,
    /// Requests with a longer body are routed by load and not buffered.
    #[schemars(range(min = 1, max = 67_108_864))]
    pub body_limit_bytes: u64,
    /// Prompts with more token ids are routed by load.
    #[schemars(range(min = 1))]
    pub token_limit: u32,
    /// Whether the answer carries `x-kv-router-decision`, which tells why a worker was chosen.
    pub decision_header: bool,
    /// Whether prompt tokens count as load until the first token of the answer. Mirrors Dynamo's
    /// `--router-track-prefill-tokens`.
    pub router_track_prefill_tokens: bool,
    /// Whether the blocks of live requests count as load. Mirrors Dynamo's
    /// `--router-track-active-blocks`.
    pub router_track_active_blocks: bool,
    /// Whether the blocks that streamed answers fill count as load too; needs
    /// `router_track_active_blocks`. Mirrors Dynamo's `--router-track-output-blocks`.
    pub router_track_output_blocks: bool,
    /// Whether a block that several live requests of a worker have in common counts once. Mirrors
    /// Dynamo's `--router-assume-kv-reuse`.
    pub router_assume_kv_reuse: bool,
    /// Seconds after which a request counts no more if its proxy has not mentioned it since.
    /// Mirrors Dynamo's `DYN_ROUTER_ACTIVE_REQUEST_EXPIRY_SECS`.
    #[schemars(range(min = 1.0, max = 86_400.0))]
    pub active_request_expiry_secs: f64,
    /// Whether workers that fail requests are left out until something listens there again. The
    /// sidecar must be able to connect to them.
    pub eject_workers: bool,
    /// Share of a pool's workers that go on taking requests however many of them fail or are not
    /// well. Where nothing listens, a worker is left out all the same, but for the last.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub eject_floor: f64,
    /// How workers are asked whether they are well; without it they are only looked at when a
    /// request did not reach them. Needs `eject_workers`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "HealthCheck")]
    pub health_check: Option<HealthCheck>,
    /// Workers that may register at run time. Without it none may.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Registration")]
    pub registration: Option<Registration>,
    /// Workers that have to be there before the sidecar counts as ready for the first time. Mirrors
    /// Dynamo's `--router-min-initial-workers`.
    #[schemars(range(min = 0))]
    pub router_min_initial_workers: u32,
    /// The pools. In the short form their keys stand at the top level instead: one pool `default`.
    #[schemars(length(min = 1, max = 64))]
    pub pools: Vec<Pool>,
}

impl Default for File {
    fn default() -> Self {
        Self {
            http_host: "0.0.0.0".into(),
            http_port: 8000,
            admin: "127.0.0.1:9100".into(),
            admin_token_file: None,
            peers: Vec::new(),
            envoy_admin: "127.0.0.1:9901".into(),
            socket: "/run/kv-router/bridge.sock".into(),
            state_dir: None,
            filter_wasm: "kv_filter.wasm".into(),
            nats: None,
            select: None,
            indexer: None,
            dynamo_zmq: Vec::new(),
            event_bytes_per_second: 64 << 20,
            index_bytes: 1 << 30,
            page_bytes: 256 << 20,
            compat: None,
            body_limit_bytes: 16 << 20,
            token_limit: 1_500_000,
            decision_header: false,
            router_track_prefill_tokens: true,
            router_track_active_blocks: true,
            router_track_output_blocks: false,
            router_assume_kv_reuse: true,
            active_request_expiry_secs: 300.0,
            eject_workers: true,
            eject_floor: 0.5,
            health_check: None,
            registration: None,
            router_min_initial_workers: 0,
            pools: Vec::new(),
        }
    }
}

/// A router whose decisions are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Compat {
    /// Dynamo's, of release 1.6.1.
    Dynamo,
}

impl File {
    /// Whether its one pool's keys stand at the top level.
    pub(super) fn is_short(&self) -> bool {
        matches!(self.pools.as_slice(), [only] if only.name == super::DEFAULT_POOL)
    }
}

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

/// How firmly a session stays on its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Stickiness {
    /// As long as the worker takes requests.
    Hard,
    /// As long as it does not cost much more than another.
    Soft,
}

/// A model's tokenizer and chat template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tokenizer {
    /// Folder as Hugging Face lays it out: `tokenizer.json` or a tokenizer of tiktoken or
    /// SentencePiece, `tokenizer_config.json`, `chat_template.jinja`. Either this or `engine`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "PathBuf")]
    pub path: Option<PathBuf>,
    /// Where the files are not at hand: which path of the pool's workers tells the token ids of a
    /// prompt, `tokenize` or `render`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "EngineFace")]
    pub engine: Option<EngineFace>,
    /// Bytes of token ids that are remembered, so that the next turn of a conversation tokenizes
    /// only what is new.
    #[serde(default = "cache_bytes")]
    #[schemars(range(min = 0, max = 1_099_511_627_776_u64))]
    pub cache_bytes: u64,
    /// Milliseconds that reading a prompt may take.
    #[serde(default = "budget_ms")]
    #[schemars(range(min = 1, max = 10_000))]
    pub budget_ms: u32,
    /// Milliseconds more for every thousand words.
    #[serde(default = "budget_ms_per_1000_words")]
    #[schemars(range(min = 0, max = 1_000))]
    pub budget_ms_per_1000_words: u32,
    /// How workers get the token ids of a prompt that came as text, so that they need not tokenize
    /// it again: `field`, where the API has a place for them (`prompt` of completions, `input_ids`
    /// of SGLang's `/generate`), `nvext`, in Dynamo's `nvext.token_data` of completions and chats,
    /// or not at all. Bodies are altered by nothing else.
    #[serde(default)]
    pub hand_over: Handover,
}

/// Which path of an engine tells token ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum EngineFace {
    /// `/tokenize`, as vLLM has it; SGLang's takes texts only.
    Tokenize,
    /// `/v1/chat/completions/render` and `/v1/completions/render`, as vLLM and TensorRT-LLM have
    /// them.
    Render,
}

fn cache_bytes() -> u64 {
    256 << 20
}

fn budget_ms() -> u32 {
    20
}

fn budget_ms_per_1000_words() -> u32 {
    2
}

impl Default for Pool {
    fn default() -> Self {
        let policy = kv_core::policy::Policy::default();
        Self {
            name: super::DEFAULT_POOL.into(),
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
    pub(super) fn metadata(&self) -> Metadata {
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

fn one() -> u32 {
    1
}

/// A worker's own stream of events: one of the three.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Events {
    /// It is subscribed to over ZMQ: vLLM, SGLang, TensorRT-LLM, Dynamo's consolidator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Zmq")]
    pub zmq: Option<Zmq>,
    /// It is polled: TensorRT-LLM's HTTP server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "TrtLlm")]
    pub trtllm: Option<TrtLlm>,
    /// It posts its events to the sidecar's HTTP API.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Http")]
    pub http: Option<Http>,
}

/// Where an engine publishes over ZMQ.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Zmq {
    /// `tcp://host:port` of rank 0's PUB socket. Rank r is at port + r.
    #[schemars(required)]
    pub endpoint: Option<String>,
    /// Topic to subscribe to; empty takes all.
    #[serde(default)]
    pub topic: String,
    /// `tcp://host:port` of rank 0's replay socket. Rank r is at port + r.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "String")]
    pub replay_endpoint: Option<String>,
}

/// Where TensorRT-LLM's events are polled. Reading takes them away: one reader alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrtLlm {
    /// `http://host:port/kv_cache_events`.
    #[schemars(required)]
    pub url: Option<String>,
    /// Milliseconds between polls.
    #[serde(default = "fifty")]
    #[schemars(range(min = 1, max = 60_000))]
    pub poll_ms: u64,
}

fn fifty() -> u64 {
    50
}

/// How an engine that posts its events shows who it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Http {
    /// File with the token that it sends as `Authorization: Bearer`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "PathBuf")]
    pub token_file: Option<PathBuf>,
    /// Whether an engine on the sidecar's own machine needs no token.
    #[serde(default)]
    pub trust_loopback: bool,
}

/// Hashes that events without token ids carry, by the medium they are about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FamilyUse {
    /// How they are computed: any but `dynamo`.
    #[schemars(required)]
    pub family: Option<Family>,
    /// Names of media, each in one family at most.
    #[schemars(required, length(min = 1, max = 64))]
    pub media: Option<Vec<String>>,
    /// Tokens to a hash, a multiple of `kv_cache_block_size`, which it is unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "u32", range(min = 1, max = 65_536))]
    pub block_size: Option<u32>,
    /// `PYTHONHASHSEED` of the engines, which decides the hashes of vLLM's families; `0` unless
    /// given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "String", length(max = 64))]
    pub hash_seed: Option<String>,
    /// Hashes that one rank can hold, over all its media: beyond it, those not announced for
    /// longest are given up. For caches that drop blocks without a word, as `FlexKV`'s may.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "u32", range(min = 1))]
    pub max_blocks: Option<u32>,
    /// Objects in which a Mooncake store keeps one page of `HiCache`: two to each tensor-parallel
    /// and pipeline rank, which is 2 unless given; with MLA one to each pipeline rank.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "u32", range(min = 1, max = 64))]
    pub objects: Option<u32>,
}

/// Where the standalone indexer listens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Indexer {
    /// `ip:port`. An address that other machines reach needs `token_file`.
    pub listen: String,
    /// File with the token that clients send as `Authorization: Bearer`. Read at the start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "PathBuf")]
    pub token_file: Option<PathBuf>,
}

impl Default for Indexer {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:8090".into(),
            token_file: None,
        }
    }
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

/// Where the select service listens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Select {
    /// `ip:port`. An address that other machines reach needs `token_file`.
    pub listen: String,
    /// File with the token that clients send as `Authorization: Bearer`. Read at the start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "PathBuf")]
    pub token_file: Option<PathBuf>,
}

impl Default for Select {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:8092".into(),
            token_file: None,
        }
    }
}

/// The NATS server and the planes to read there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Nats {
    /// `nats://host:port` or `tls://host:port`; several are separated by commas. Needs a restart,
    /// as everything under `nats` does.
    #[schemars(required, length(min = 1))]
    pub url: Option<String>,
    /// Dynamo 1.6.1's event plane.
    pub dynamo: Option<DynamoPlane>,
    /// Subject of plain JSON events, with `{worker_id}` as one of its tokens. Engines answer a
    /// request on this subject followed by `.snapshot`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "String")]
    pub json_subject: Option<String>,
    /// Name of a JetStream stream that keeps `json_subject`. Events are read from there, from where
    /// the sidecar's snapshot ends, and engines are asked for no snapshots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "String", length(min = 1))]
    pub json_stream: Option<String>,
    /// Subject on which workers register, with `{worker_id}` as one of its tokens; needs
    /// `registration`. An empty message is a farewell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "String")]
    pub workers_subject: Option<String>,
    /// Whether load is exchanged with other sidecars, and with Dynamo's routers; needs `dynamo`,
    /// whose subjects it goes over. Mirrors Dynamo's `--router-replica-sync`.
    #[serde(default)]
    pub replica_sync: bool,
    /// Credentials file (JWT and seed).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "PathBuf")]
    pub credentials_file: Option<PathBuf>,
    /// File with an nkey seed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "PathBuf")]
    pub nkey_seed_file: Option<PathBuf>,
    /// TLS settings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Tls")]
    pub tls: Option<Tls>,
}

/// A component of Dynamo whose workers publish KV events.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DynamoPlane {
    /// Dynamo namespace.
    #[schemars(required, length(min = 1))]
    pub namespace: Option<String>,
    /// Dynamo component.
    #[schemars(required, length(min = 1))]
    pub component: Option<String>,
}

/// Certificates, as PEM files.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Tls {
    /// Authorities to trust instead of the system's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "PathBuf")]
    pub ca_file: Option<PathBuf>,
    /// Client certificate; with `key_file`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "PathBuf")]
    pub cert_file: Option<PathBuf>,
    /// Key of the client certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "PathBuf")]
    pub key_file: Option<PathBuf>,
}
