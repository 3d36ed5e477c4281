//! Settings of Dynamo's router that no key stands for: each is refused with what stands in its
//! place, or let be because it is for another part of Dynamo. None is passed over in silence.
//! Names and defaults are those of release 1.6.1.

use super::setting::{Effect, Kind, Setting};

/// A setting that takes only values which say what is so anyway.
const fn refused(
    kind: Kind,
    flags: &'static [&'static str],
    variables: &'static [&'static str],
    unless: &'static [&'static str],
    why: &'static str,
) -> Setting {
    Setting {
        key: "",
        pool: false,
        kind,
        flags,
        variables,
        help: "Not taken",
        effect: Effect::Refused { unless, why },
    }
}

/// Variables of another part of Dynamo.
const fn elsewhere(variables: &'static [&'static str], why: &'static str) -> Setting {
    Setting {
        key: "",
        pool: false,
        kind: Kind::Text,
        flags: &[],
        variables,
        help: "",
        effect: Effect::Elsewhere(why),
    }
}

const NOT_DISAGGREGATED: &str = "prefill and decode are not split over workers: a request is served whole by the one it is sent to";
const NO_PLUGINS: &str =
    "policies are keys of a pool, not plugins: set policy and its weights there";
const NO_SHARED_TABLE: &str =
    "stores tell of themselves by events, and shared_cache_multiplier weighs them";
const HASHES: &str = "load is told by public sequence hashes (xxh3) alone";
const ONE_THREAD: &str = "there is nothing to set: one thread keeps the index";
const ZMQ_LOAD: &str = "load is exchanged over NATS alone: set nats.replica_sync";
const STREAM: &str = "nats.json_stream names a stream of events, which outlives restarts";
const BY_BYTES: &str = "the index is bounded by index_bytes, and predictions by router_ttl_secs";

/// All of them, and presets of keys.
pub(super) static SETTINGS: &[Setting] = &[
    Setting {
        key: "",
        pool: false,
        kind: Kind::Switch(&["no-load-aware"]),
        flags: &["load-aware"],
        variables: &["DYN_ROUTER_LOAD_AWARE"],
        help: "Route by load alone: router_mode kv, kv_events and router_assume_kv_reuse off, \
               overlap_score_credit 0",
        effect: Effect::Preset(&[
            ("router_mode", "kv"),
            ("kv_events", "false"),
            ("overlap_score_credit", "0"),
            ("router_assume_kv_reuse", "false"),
        ]),
    },
    refused(
        Kind::Text,
        &["admission-control"],
        &["DYN_ADMISSION_CONTROL"],
        &["none"],
        "it does nothing in Dynamo 1.6.1 either: leave it out",
    ),
    refused(
        Kind::Switch(&["no-enforce-disagg"]),
        &["enforce-disagg"],
        &["DYN_ENFORCE_DISAGG"],
        &["false"],
        NOT_DISAGGREGATED,
    ),
    refused(
        Kind::Switch(&["no-decode-fallback"]),
        &["decode-fallback"],
        &["DYN_DECODE_FALLBACK"],
        &["true", "false"],
        NOT_DISAGGREGATED,
    ),
    refused(
        Kind::Switch(&["no-serve-indexer"]),
        &["serve-indexer"],
        &["DYN_SERVE_INDEXER"],
        &["false"],
        "the key indexer serves the index to others",
    ),
    refused(
        Kind::Switch(&["no-use-remote-indexer"]),
        &["use-remote-indexer"],
        &["DYN_USE_REMOTE_INDEXER"],
        &["false"],
        "every sidecar has the whole index: peers names those a fresh one takes it over from",
    ),
    refused(
        Kind::Number,
        &["migration-limit"],
        &["DYN_MIGRATION_LIMIT"],
        &["0"],
        "an answer that has begun stays where it is: envoy's retry policy repeats those that have not",
    ),
    refused(
        Kind::Number,
        &["migration-max-seq-len"],
        &["DYN_MIGRATION_MAX_SEQ_LEN"],
        &[],
        "an answer that has begun stays where it is",
    ),
    refused(
        Kind::Text,
        &["event-plane"],
        &["DYN_EVENT_PLANE"],
        &[],
        "nats.dynamo or dynamo_zmq says where Dynamo's events are read, and both may",
    ),
    refused(
        Kind::Text,
        &["request-plane"],
        &["DYN_REQUEST_PLANE"],
        &["http"],
        "requests reach workers over HTTP, through envoy",
    ),
    refused(
        Kind::Text,
        &["discovery-backend"],
        &["DYN_DISCOVERY_BACKEND"],
        &["file"],
        "no registry is asked: workers are named in the file, register themselves, or are found by DNS",
    ),
    refused(
        Kind::Number,
        &[],
        &["DYN_ROUTER_OVERLAP_REFRESH_AFTER_SECS"],
        &[],
        "overlap is looked up anew when a request leaves the queue, however long it waited",
    ),
    refused(
        Kind::Text,
        &["router-policy-config"],
        &["DYN_ROUTER_POLICY_CONFIG"],
        &[],
        "there is one file: the settings of its `router` are keys of the same names here",
    ),
    refused(
        Kind::Text,
        &["router-prefill-policy"],
        &["DYN_ROUTER_PREFILL_POLICY"],
        &["default"],
        NO_PLUGINS,
    ),
    refused(
        Kind::Text,
        &["router-decode-policy"],
        &["DYN_ROUTER_DECODE_POLICY"],
        &["default"],
        NO_PLUGINS,
    ),
    refused(
        Kind::Text,
        &[],
        &["DYN_ROUTER_WORKER_SELECTION_POLICY"],
        &["default"],
        NO_PLUGINS,
    ),
    refused(
        Kind::Text,
        &["router-tracking-hash"],
        &["DYN_ROUTER_TRACKING_HASH"],
        &["public-xxh3-v1"],
        HASHES,
    ),
    refused(
        Kind::Text,
        &["router-tracking-hash-key-file", "router-tracking-key-file"],
        &[
            "DYN_ROUTER_TRACKING_HASH_KEY_FILE",
            "DYN_ROUTER_TRACKING_KEY_FILE",
        ],
        &[],
        HASHES,
    ),
    refused(
        Kind::Text,
        &["router-tracking-hash-key-id", "router-tracking-key-id"],
        &[
            "DYN_ROUTER_TRACKING_HASH_KEY_ID",
            "DYN_ROUTER_TRACKING_KEY_ID",
        ],
        &[],
        HASHES,
    ),
    refused(
        Kind::Text,
        &["router-prefill-load-model"],
        &["DYN_ROUTER_PREFILL_LOAD_MODEL"],
        &["none"],
        "no model estimates prefill: its rate is learned from the workers' answers",
    ),
    refused(
        Kind::Number,
        &["router-event-threads"],
        &["DYN_ROUTER_EVENT_THREADS"],
        &["1"],
        ONE_THREAD,
    ),
    refused(
        Kind::Switch(&["no-router-conditional-disagg"]),
        &["router-conditional-disagg"],
        &["DYN_ROUTER_CONDITIONAL_DISAGG"],
        &["false"],
        NOT_DISAGGREGATED,
    ),
    refused(
        Kind::Text,
        &["router-conditional-disagg-config"],
        &[
            "DYN_ROUTER_CONDITIONAL_DISAGG_CONFIG",
            "DYN_ROUTER_CONDITIONAL_DISAGG_POLICY",
            "DYN_ROUTER_CONDITIONAL_DISAGG_EFF_ISL_THRESHOLD",
            "DYN_ROUTER_CONDITIONAL_DISAGG_EFF_ISL_RATIO_THRESHOLD",
            "DYN_ROUTER_CONDITIONAL_DISAGG_PREFILL_BUSY_THRESHOLD",
            "DYN_ROUTER_CONDITIONAL_DISAGG_DECODE_BUSY_THRESHOLD",
        ],
        &[],
        NOT_DISAGGREGATED,
    ),
    refused(
        Kind::Text,
        &["shared-cache-type"],
        &["DYN_SHARED_CACHE_TYPE"],
        &["none"],
        NO_SHARED_TABLE,
    ),
    refused(
        Kind::Switch(&["no-enable-session-prefix-index"]),
        &["enable-session-prefix-index"],
        &["DYN_ENABLE_SESSION_PREFIX_INDEX"],
        &["false"],
        "sessions are not kept apart: the index finds a prefix whoever sent it",
    ),
    refused(
        Kind::Switch(&["no-router-durable-kv-events"]),
        &["router-durable-kv-events"],
        &["DYN_ROUTER_DURABLE_KV_EVENTS"],
        &["false"],
        STREAM,
    ),
    refused(
        Kind::Number,
        &["router-snapshot-threshold"],
        &["DYN_ROUTER_SNAPSHOT_THRESHOLD"],
        &[],
        "the index is saved to state_dir by itself",
    ),
    refused(
        Kind::Switch(&["no-router-reset-states"]),
        &["router-reset-states"],
        &["DYN_ROUTER_RESET_STATES"],
        &["false"],
        "an empty state_dir begins anew",
    ),
    refused(
        Kind::Number,
        &["router-max-tree-size"],
        &["DYN_ROUTER_MAX_TREE_SIZE"],
        &[],
        BY_BYTES,
    ),
    refused(
        Kind::Number,
        &["router-prune-target-ratio"],
        &["DYN_ROUTER_PRUNE_TARGET_RATIO"],
        &[],
        BY_BYTES,
    ),
    refused(
        Kind::Text,
        &[],
        &["DYN_ROUTER_POSITIONAL_SEARCH_MODE"],
        &[],
        "there is nothing to set: the index has one way to search",
    ),
    refused(
        Kind::Switch(&[]),
        &[],
        &["DYN_ROUTER_ACTIVE_SEQUENCE_DIRECT_ZMQ"],
        &["false"],
        ZMQ_LOAD,
    ),
    refused(
        Kind::Number,
        &[],
        &[
            "DYN_ROUTER_ACTIVE_SEQUENCE_ZMQ_RCVHWM",
            "DYN_ROUTER_ZMQ_ENDPOINTS_PER_SUB",
        ],
        &[],
        ZMQ_LOAD,
    ),
    refused(
        Kind::Number,
        &[],
        &["DYN_RUNTIME_INHIBITED_DURATION_SECS"],
        &[],
        "eject_workers says whether workers that fail are left out; how long is decided by looking at them",
    ),
    refused(
        Kind::Number,
        &[],
        &["DYN_HTTP_BACKEND_STREAM_TIMEOUT_SECS"],
        &[],
        "timeouts are those of the route in envoy's configuration",
    ),
    refused(
        Kind::Switch(&[]),
        &[],
        &["DYN_DISABLE_FRONTEND_NVEXT"],
        &["false"],
        "trust_hints and a route's metadata say whose hints count",
    ),
    refused(
        Kind::Switch(&[]),
        &[],
        &["DYN_DISABLE_FRONTEND_ADMIN_API"],
        &["false"],
        "admin is an address of its own, and answers others only with admin_token_file",
    ),
    elsewhere(
        &["DYN_EVENT_PLANE_CODEC", "DYN_EVENT_PLANE_HOST"],
        "it is for those who publish events",
    ),
    elsewhere(
        &["DYN_ZMQ_BROKER_URL", "DYN_ZMQ_BROKER_ENABLED"],
        "dynamo_zmq names publishers or brokers to read from",
    ),
    elsewhere(
        &[
            "ZMQ_BROKER_XSUB_BIND",
            "ZMQ_BROKER_XPUB_BIND",
            "ZMQ_BROKER_NAMESPACE",
        ],
        "it is for the broker itself",
    ),
    elsewhere(
        &[
            "DYN_ZMQ_EVENT_SUBSCRIBER_CHANNEL_CAPACITY",
            "DYN_ZMQ_IO_THREADS",
        ],
        "there is nothing to set: what waits is bounded by event_bytes_per_second",
    ),
    elsewhere(
        &[
            "NATS_SERVER",
            "NATS_AUTH_*",
            "NATS_TLS_*",
            "DYN_NATS_REQUEST_TIMEOUT_SECS",
        ],
        "the keys of nats say where NATS is and how to get in",
    ),
    elsewhere(
        &["DYN_LORA_*"],
        "adapters are not placed on workers: lora_adapters names those there are",
    ),
    elsewhere(
        &[
            "DYN_TOPOLOGY_ENABLED",
            "DYN_TOPOLOGY_MOUNT_PATH",
            "DYN_KV_TRANSFER_*",
        ],
        "it is for workers",
    ),
    elsewhere(
        &[
            "DYN_KV_STATE_AGENT_HOST_DISCOVERY_TIMEOUT_SECS",
            "DYN_KV_INDEXER_TEST_ENDPOINTS",
            "DYN_AIC_*",
            "DYN_AIS_*",
        ],
        "it is for parts that are not here",
    ),
    elsewhere(
        &["DYN_METRICS_PREFIX", "DYN_SYSTEM_PORT"],
        "metrics are at the address of admin, under names of their own",
    ),
];

/// A variable that has a router's name and is none of its settings.
pub(super) static UNKNOWN: Setting = refused(
    Kind::Text,
    &[],
    &[],
    &[],
    "is no setting of Dynamo's router, as of release 1.6.1",
);

/// Whether a variable's name says that it is a setting of the router. Kubernetes puts the
/// addresses of services into the environment too, also of one called `dyn-router`.
pub(super) fn is_of_router(name: &str) -> bool {
    let is_service = ["_SERVICE_", "_PORT_"]
        .iter()
        .any(|part| name.contains(part))
        || name.ends_with("_PORT");
    name.starts_with("DYN_ROUTER_") && !is_service
}
