//! What Envoy needs: a bootstrap, the files it watches, and a look at somebody else's bootstrap.

mod bootstrap;
mod check;
mod files;

pub use bootstrap::{Discovery, bootstrap};
pub use check::{CheckError, Lack, check};
pub use files::{Files, FilesError, endpoints_of};

/// Request header that names the chosen endpoint (Gateway API Inference Extension).
pub const DESTINATION: &str = "x-gateway-destination-endpoint";
/// Request header that names the chosen pool; the filter sets it and removes a client's.
pub const POOL: &str = "x-kv-pool";
/// Request header with the `content-encoding` that a body had; Envoy sets it before it unpacks one,
/// and removes it before a worker sees it.
pub const PACKED: &str = "x-kv-packed";
/// Envoy cluster of the sidecar.
pub const SIDECAR_CLUSTER: &str = "kv_router_sidecar";
/// Name of the filter, its extension configuration, root id and VM id.
pub const FILTER: &str = "kv_router";
/// Labels in the names of the filter's metrics.
pub const LABELS: [&str; 3] = ["pool", "reason", "kind"];
/// Type of the filter's configuration.
const WASM_TYPE: &str = "type.googleapis.com/envoy.extensions.filters.http.wasm.v3.Wasm";
/// Requests, connections and retries that a cluster takes at a time.
const CLUSTER_LIMIT: u64 = 100_000;
/// Bytes of a request's body that Envoy holds for the filter.
const BODY_BUFFER_BYTES: u64 = 64 << 20;

/// Envoy cluster of a pool.
#[must_use]
pub fn cluster(pool: &str) -> String {
    format!("kv_router_pool_{pool}")
}

/// Text as a YAML scalar: JSON strings are such.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// The regular expression that takes a label out of a metric's name.
fn label_regex(label: &str) -> String {
    format!(r"(_?{label}=\.=(.+?);\.;)")
}
