//! Keys that a flag or a variable can set. The names are Dynamo's where Dynamo has the knob.

use clap::{Arg, ArgAction, ArgMatches, Command};
use serde_json::Value;

use super::layer::{Layer, Origin};

/// What a value's text stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Text,
    Number,
    /// Has flags of its own for "no".
    Switch(&'static [&'static str]),
}

/// A key with its flag and variables.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Setting {
    /// Key path in the file.
    pub(super) key: &'static str,
    /// Whether the key is a pool's.
    pub(super) pool: bool,
    kind: Kind,
    /// The flag and further names for it.
    flags: &'static [&'static str],
    /// Its variables, the first that is set counts.
    variables: &'static [&'static str],
    help: &'static str,
}

const fn setting(
    key: &'static str,
    pool: bool,
    kind: Kind,
    flags: &'static [&'static str],
    variables: &'static [&'static str],
    help: &'static str,
) -> Setting {
    Setting {
        key,
        pool,
        kind,
        flags,
        variables,
        help,
    }
}

/// All of them.
static SETTINGS: &[Setting] = &[
    setting(
        "http_host",
        false,
        Kind::Text,
        &["http-host"],
        &["DYN_HTTP_HOST"],
        "Address Envoy listens on for requests",
    ),
    setting(
        "http_port",
        false,
        Kind::Number,
        &["http-port"],
        &["DYN_HTTP_PORT"],
        "Port Envoy listens on for requests",
    ),
    setting(
        "router_min_initial_workers",
        false,
        Kind::Number,
        &["router-min-initial-workers"],
        &["DYN_ROUTER_MIN_INITIAL_WORKERS"],
        "Workers that have to be there before the sidecar counts as ready",
    ),
    setting(
        "router_mode",
        true,
        Kind::Text,
        &["router-mode"],
        &["DYN_ROUTER_MODE"],
        "kv, round-robin, random, least-loaded, power-of-two, direct or device-aware-weighted",
    ),
    setting(
        "kv_cache_block_size",
        true,
        Kind::Number,
        &["kv-cache-block-size"],
        &["DYN_KV_CACHE_BLOCK_SIZE"],
        "Tokens to a block",
    ),
    setting(
        "router_temperature",
        true,
        Kind::Number,
        &["router-temperature"],
        &["DYN_ROUTER_TEMPERATURE"],
        "Softmax temperature over normalised costs; 0 takes the least cost",
    ),
    setting(
        "kv_events",
        true,
        Kind::Switch(&["no-kv-events", "no-router-kv-events"]),
        &["kv-events", "router-kv-events"],
        &[
            "DYN_ROUTER_USE_KV_EVENTS",
            "DYN_USE_KV_EVENTS",
            "DYN_KV_EVENTS",
        ],
        "Index KV events; without them blocks are predicted from the requests routed",
    ),
    setting(
        "router_ttl_secs",
        true,
        Kind::Number,
        &["router-ttl-secs"],
        &["DYN_ROUTER_TTL_SECS"],
        "Seconds for which a predicted block is believed in",
    ),
    setting(
        "router_track_prefill_tokens",
        false,
        Kind::Switch(&["no-router-track-prefill-tokens"]),
        &["router-track-prefill-tokens"],
        &["DYN_ROUTER_TRACK_PREFILL_TOKENS"],
        "Count prompt tokens as load until the first token",
    ),
    setting(
        "router_track_active_blocks",
        false,
        Kind::Switch(&["no-router-track-active-blocks"]),
        &["router-track-active-blocks"],
        &["DYN_ROUTER_TRACK_ACTIVE_BLOCKS"],
        "Count the blocks of live requests as load",
    ),
    setting(
        "router_track_output_blocks",
        false,
        Kind::Switch(&["no-router-track-output-blocks"]),
        &["router-track-output-blocks"],
        &["DYN_ROUTER_TRACK_OUTPUT_BLOCKS"],
        "Count the blocks that streamed answers fill as load",
    ),
    setting(
        "router_assume_kv_reuse",
        false,
        Kind::Switch(&["no-router-assume-kv-reuse"]),
        &["router-assume-kv-reuse"],
        &["DYN_ROUTER_ASSUME_KV_REUSE"],
        "Count a block that live requests have in common once",
    ),
    setting(
        "active_request_expiry_secs",
        false,
        Kind::Number,
        &["active-request-expiry-secs"],
        &["DYN_ROUTER_ACTIVE_REQUEST_EXPIRY_SECS"],
        "Seconds after which a request that its proxy does not mention counts no more",
    ),
    setting(
        "eject_workers",
        false,
        Kind::Switch(&["no-eject-workers"]),
        &["eject-workers"],
        &["KV_ROUTER_EJECT_WORKERS"],
        "Leave workers out that fail requests, until something listens there again",
    ),
    setting(
        "encoder_cuda_to_cpu_ratio",
        true,
        Kind::Number,
        &["encoder-cuda-to-cpu-ratio"],
        &["DYN_ENCODER_CUDA_TO_CPU_RATIO"],
        "Requests on a worker with an accelerator for each on one without",
    ),
    setting(
        "kv_overlap_score_weight",
        true,
        Kind::Number,
        &["kv-overlap-score-weight", "router-kv-overlap-score-weight"],
        &[
            "DYN_ROUTER_KV_OVERLAP_SCORE_WEIGHT",
            "DYN_OVERLAP_SCORE_WEIGHT",
        ],
        "Sets prefill_load_scale, and at 0 also overlap_score_credit to 0",
    ),
    setting(
        "overlap_score_credit",
        true,
        Kind::Number,
        &["router-kv-overlap-score-credit"],
        &["DYN_ROUTER_KV_OVERLAP_SCORE_CREDIT"],
        "Credit for a block in accelerator memory, in blocks",
    ),
    setting(
        "prefill_load_scale",
        true,
        Kind::Number,
        &["router-prefill-load-scale"],
        &["DYN_ROUTER_PREFILL_LOAD_SCALE"],
        "Weight of prefill blocks against blocks being decoded",
    ),
    setting(
        "host_cache_hit_weight",
        true,
        Kind::Number,
        &["router-host-cache-hit-weight"],
        &["DYN_ROUTER_HOST_CACHE_HIT_WEIGHT"],
        "Credit for a block in host memory, in blocks",
    ),
    setting(
        "disk_cache_hit_weight",
        true,
        Kind::Number,
        &["router-disk-cache-hit-weight"],
        &["DYN_ROUTER_DISK_CACHE_HIT_WEIGHT"],
        "Credit for a block on disk or in a store, in blocks",
    ),
    setting(
        "shared_cache_multiplier",
        true,
        Kind::Number,
        &["shared-cache-multiplier"],
        &["DYN_SHARED_CACHE_MULTIPLIER"],
        "Credit for a block that only a shared store has, in blocks",
    ),
    setting(
        "decode_active_request_weight",
        true,
        Kind::Number,
        &["router-decode-active-request-weight"],
        &["DYN_ROUTER_DECODE_ACTIVE_REQUEST_WEIGHT"],
        "Cost of one active request, in blocks",
    ),
    setting(
        "admin",
        false,
        Kind::Text,
        &["admin"],
        &["KV_ROUTER_ADMIN"],
        "ip:port of the sidecar's HTTP API",
    ),
    setting(
        "envoy_admin",
        false,
        Kind::Text,
        &["envoy-admin"],
        &["KV_ROUTER_ENVOY_ADMIN"],
        "ip:port of Envoy's admin interface",
    ),
    setting(
        "socket",
        false,
        Kind::Text,
        &["socket"],
        &["KV_ROUTER_SOCKET"],
        "Unix socket that the filter connects to",
    ),
    setting(
        "state_dir",
        false,
        Kind::Text,
        &["state-dir"],
        &["KV_ROUTER_STATE_DIR"],
        "Folder for the snapshot and the files Envoy watches",
    ),
    setting(
        "filter_wasm",
        false,
        Kind::Text,
        &["filter-wasm"],
        &["KV_ROUTER_FILTER_WASM"],
        "The filter's WebAssembly module",
    ),
    setting(
        "nats.url",
        false,
        Kind::Text,
        &["nats-url"],
        &["KV_ROUTER_NATS_URL"],
        "NATS server",
    ),
    setting(
        "nats.replica_sync",
        false,
        Kind::Switch(&["no-router-replica-sync"]),
        &["router-replica-sync"],
        &["DYN_ROUTER_REPLICA_SYNC"],
        "Exchange load with other sidecars and Dynamo's routers",
    ),
];

impl Setting {
    fn value(&self, text: &str) -> Value {
        let number = || {
            let whole = text.parse::<u64>().ok().map(Value::from);
            let broken = || text.parse::<f64>().ok().map(Value::from);
            whole.or_else(broken)
        };
        let parsed = match self.kind {
            Kind::Text => None,
            Kind::Number => number(),
            Kind::Switch(_) => match text.to_ascii_lowercase().as_str() {
                "1" | "true" | "on" | "yes" => Some(true.into()),
                "0" | "false" | "off" | "no" => Some(false.into()),
                _ => None,
            },
        };
        // What isn't a number or switch stays text, for the schema to refuse.
        parsed.unwrap_or_else(|| Value::from(text))
    }

    fn flag(&self) -> &'static str {
        self.flags.first().copied().unwrap_or(self.key)
    }

    /// The flags that say "no": the first and further names for it.
    fn negative(&self) -> Option<(&'static str, &'static [&'static str])> {
        match self.kind {
            Kind::Switch([first, others @ ..]) => Some((first, others)),
            _ => None,
        }
    }
}

/// The layer of variables. `lookup` gives a variable's value; an empty one counts as not set.
pub fn from_environment(lookup: impl Fn(&str) -> Option<String>) -> Vec<Layer> {
    let set = |setting: &'static Setting| {
        setting.variables.iter().find_map(|name| {
            let text = lookup(name).filter(|text| !text.is_empty())?;
            Some(Layer {
                origin: Origin::Variable(name),
                value: setting.value(&text),
                setting,
            })
        })
    };
    SETTINGS.iter().filter_map(set).collect()
}

/// The layer of flags, for use with `#[command(flatten)]`.
#[derive(Clone, Debug, Default)]
pub struct Flags {
    /// What was given.
    pub layers: Vec<Layer>,
}

impl clap::FromArgMatches for Flags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = |setting: &'static Setting| {
            let layer = |value| Layer {
                origin: Origin::Flag(setting.flag()),
                setting,
                value,
            };
            match setting.negative() {
                Some((negative, _)) if matches.get_flag(negative) => Some(Layer {
                    origin: Origin::Flag(negative),
                    ..layer(Value::from(false))
                }),
                Some(_) if matches.get_flag(setting.key) => Some(layer(Value::from(true))),
                Some(_) => None,
                None => {
                    let text = matches.get_one::<String>(setting.key)?;
                    Some(layer(setting.value(text)))
                }
            }
        };
        Ok(Self {
            layers: SETTINGS.iter().filter_map(given).collect(),
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl clap::Args for Flags {
    fn augment_args(command: Command) -> Command {
        SETTINGS.iter().fold(command, |command, setting| {
            let help = format!("{} [env: {}]", setting.help, setting.variables.join(", "));
            let arg = Arg::new(setting.key)
                .long(setting.flag())
                .visible_aliases(setting.flags.iter().skip(1).copied().collect::<Vec<_>>())
                .help(help);
            let Some((negative, others)) = setting.negative() else {
                return command.arg(arg.action(ArgAction::Set));
            };
            let no = Arg::new(negative)
                .long(negative)
                .visible_aliases(others.to_vec())
                .help(format!("The opposite of --{}", setting.flag()))
                .action(ArgAction::SetTrue)
                .overrides_with(setting.key);
            command
                .arg(arg.action(ArgAction::SetTrue).overrides_with(negative))
                .arg(no)
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}
