//! NATS as it is written: the server and the planes to read there.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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
