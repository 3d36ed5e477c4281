//! The configuration file as it is written. Each key's documentation is also its description in
//! the JSON Schema.

mod events;
mod fleet;
mod nats;
mod pool;
mod tokenizer;

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub(super) use events::{Events, FamilyUse};
pub use fleet::AddressFamily;
pub(super) use fleet::{Dns, HealthCheck, Registration, Worker};
pub(super) use nats::Nats;
pub use nats::Tls;
pub use pool::CachePolicy;
pub(super) use pool::{Pool, PredictedDelay, Stickiness};
pub use tokenizer::EngineFace;
pub(super) use tokenizer::Tokenizer;

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
