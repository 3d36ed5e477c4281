//! Keys that a flag or a variable can set. The names are Dynamo's where Dynamo has the knob; those
//! of Dynamo's that no key stands for are in [`super::dynamo`].

use clap::{Arg, ArgAction, ArgMatches, Command};
use serde_json::Value;

use super::dynamo;
use super::layer::{Layer, Origin};

/// What a value's text stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Text,
    Number,
    /// Has flags of its own for "no".
    Switch(&'static [&'static str]),
}

/// What a setting does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// Its value becomes a key's.
    Key,
    /// Switched on, it gives several keys values that everything else may replace.
    Preset(&'static [(&'static str, &'static str)]),
    /// Only these values are taken, which say what is so anyway.
    Refused {
        /// In lower case.
        unless: &'static [&'static str],
        /// What stands in its place.
        why: &'static str,
    },
    /// It is for another part of an installation, which may share its variables: it is let be, and
    /// told of.
    Elsewhere(&'static str),
}

/// A flag and variables, and what they do.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Setting {
    /// Key path in the file; empty without one.
    pub(super) key: &'static str,
    /// Whether the key is a pool's.
    pub(super) pool: bool,
    pub(super) kind: Kind,
    /// The flag and further names for it.
    pub(super) flags: &'static [&'static str],
    /// Its variables, the first that is set counts. `*` stands for any end of a name.
    pub(super) variables: &'static [&'static str],
    pub(super) help: &'static str,
    pub(super) effect: Effect,
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
        effect: Effect::Key,
    }
}

/// Those that set a key.
pub(super) static SETTINGS: &[Setting] = &[
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
        "compat",
        false,
        Kind::Text,
        &["compat"],
        &["KV_ROUTER_COMPAT"],
        "dynamo makes Dynamo's decisions, as of release 1.6.1",
    ),
    setting(
        "policy",
        true,
        Kind::Text,
        &["policy"],
        &["KV_ROUTER_POLICY"],
        "What the mode kv compares: predicted-delay or dynamo",
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
        "router_session_affinity_ttl_secs",
        true,
        Kind::Number,
        &["router-session-affinity-ttl-secs"],
        &["DYN_ROUTER_SESSION_AFFINITY_TTL_SECS"],
        "Seconds for which an idle session keeps its worker",
    ),
    setting(
        "router_session_affinity_mode",
        true,
        Kind::Text,
        &["router-session-affinity-mode"],
        &["DYN_ROUTER_SESSION_AFFINITY_MODE"],
        "Whether sessions stay on their worker whatever it costs (hard) or within bounds (soft)",
    ),
    setting(
        "router_approximate_cache_policy",
        true,
        Kind::Text,
        &["router-approximate-cache-policy"],
        &["DYN_ROUTER_APPROXIMATE_CACHE_POLICY"],
        "What predicted blocks are forgotten by: ttl, or lru by the room of their worker",
    ),
    setting(
        "router_predicted_ttl_secs",
        true,
        Kind::Number,
        &["router-predicted-ttl-secs"],
        &["DYN_ROUTER_PREDICTED_TTL_SECS"],
        "Seconds for which the blocks of a routed prompt are believed in beside events",
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
        "overlap_score_credit_decay",
        true,
        Kind::Number,
        &["router-kv-overlap-score-credit-decay"],
        &["DYN_ROUTER_KV_OVERLAP_SCORE_CREDIT_DECAY"],
        "How much of the credit prefill queued at a worker takes away",
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
        "queue.threshold",
        true,
        Kind::Number,
        &["router-queue-threshold"],
        &["DYN_ROUTER_QUEUE_THRESHOLD"],
        "Requests wait while all workers have more prefill tokens than this share of a batch",
    ),
    setting(
        "queue.policy",
        true,
        Kind::Text,
        &["router-queue-policy"],
        &["DYN_ROUTER_QUEUE_POLICY"],
        "Who goes first of those who wait: fcfs, wspt or lcfs",
    ),
    setting(
        "active_decode_blocks_threshold",
        true,
        Kind::Number,
        &["active-decode-blocks-threshold"],
        &["DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD"],
        "Share of a worker's KV blocks in use past which it takes no requests",
    ),
    setting(
        "active_prefill_tokens_threshold",
        true,
        Kind::Number,
        &["active-prefill-tokens-threshold"],
        &["DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD"],
        "Prefill tokens past which a worker takes no requests",
    ),
    setting(
        "active_prefill_tokens_threshold_frac",
        true,
        Kind::Number,
        &["active-prefill-tokens-threshold-frac"],
        &["DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD_FRAC"],
        "The same as a share of a batch",
    ),
    setting(
        "overload_status",
        true,
        Kind::Number,
        &["overload-status"],
        &["DYN_HTTP_OVERLOAD_STATUS_CODE"],
        "Status of requests that are refused because of load",
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

/// All of them, presets first: what is given by itself lies over them. What sets a key is not
/// refused.
pub(super) fn all() -> impl Iterator<Item = &'static Setting> {
    let sets_a_key = |other: &&Setting| SETTINGS.iter().any(|s| s.has_a_name_of(other));
    let others = dynamo::SETTINGS.iter();
    others
        .filter(move |other| !sets_a_key(other))
        .chain(SETTINGS)
}

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

    pub(super) fn flag(&self) -> Option<&'static str> {
        self.flags.first().copied()
    }

    fn has_a_name_of(&self, other: &Self) -> bool {
        let is_flag = self.flags.iter().any(|flag| other.flags.contains(flag));
        let mut variables = self.variables.iter();
        is_flag || variables.any(|name| other.variables.contains(name))
    }

    /// Name among the arguments.
    fn id(&self) -> &'static str {
        if self.key.is_empty() {
            self.flag().unwrap_or_default()
        } else {
            self.key
        }
    }

    /// The flags that say "no": the first and further names for it.
    fn negative(&self) -> Option<(&'static str, &'static [&'static str])> {
        match self.kind {
            Kind::Switch([first, others @ ..]) => Some((first, others)),
            _ => None,
        }
    }

    /// What a value comes to: a layer to a key, lowest first.
    fn layers(&'static self, origin: &Origin, value: &Value) -> Vec<Layer> {
        let as_it_is = || Layer {
            origin: origin.clone(),
            setting: self,
            value: value.clone(),
        };
        let Effect::Preset(keys) = self.effect else {
            return vec![as_it_is()];
        };
        let keys = match value {
            Value::Bool(true) => keys,
            Value::Bool(false) => &[],
            _ => return vec![as_it_is()],
        };
        let of = |key: &str| SETTINGS.iter().find(|setting| setting.key == key);
        let given = keys.iter().filter_map(|(key, text)| Some((of(key)?, text)));
        given
            .map(|(setting, text)| Layer {
                origin: origin.clone(),
                setting,
                value: setting.value(text),
            })
            .collect()
    }
}

/// Whether a variable has a name, of which `*` may be the end.
fn is_named(name: &str, variable: &str) -> bool {
    match name.strip_suffix('*') {
        Some(beginning) => variable.starts_with(beginning),
        None => name == variable,
    }
}

/// The layers of variables, given as names with values. An empty one counts as not set.
pub fn from_environment(variables: impl IntoIterator<Item = (String, String)>) -> Vec<Layer> {
    let is_set = |(_, text): &(String, String)| !text.is_empty();
    let variables: Vec<(String, String)> = variables.into_iter().filter(is_set).collect();
    let mut layers = Vec::new();
    for setting in all() {
        // Those that count less lie lower.
        for name in setting.variables.iter().rev() {
            let given = variables.iter().filter(|(given, _)| is_named(name, given));
            for (name, text) in given {
                let origin = Origin::Variable(name.clone());
                layers.extend(setting.layers(&origin, &setting.value(text)));
            }
        }
    }
    let is_known = |given: &str| {
        let mut names = all().flat_map(|setting| setting.variables);
        names.any(|name| is_named(name, given))
    };
    let unknown = variables
        .iter()
        .filter(|(name, _)| dynamo::is_of_router(name) && !is_known(name));
    layers.extend(unknown.map(|(name, text)| Layer {
        origin: Origin::Variable(name.clone()),
        setting: &dynamo::UNKNOWN,
        value: Value::from(text.as_str()),
    }));
    layers
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
            let flag = setting.flag()?;
            let (flag, value) = match (setting.kind, setting.negative()) {
                (_, Some((negative, _))) if matches.get_flag(negative) => {
                    (negative, Value::from(false))
                }
                (Kind::Switch(_), _) if matches.get_flag(setting.id()) => (flag, Value::from(true)),
                (Kind::Switch(_), _) => return None,
                _ => {
                    let text = matches.get_one::<String>(setting.id())?;
                    (flag, setting.value(text))
                }
            };
            Some(setting.layers(&Origin::Flag(flag), &value))
        };
        Ok(Self {
            layers: all().filter_map(given).flatten().collect(),
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl clap::Args for Flags {
    fn augment_args(command: Command) -> Command {
        let with_flag = all().filter_map(|setting| Some((setting, setting.flag()?)));
        with_flag.fold(command, |command, (setting, flag)| {
            let help = format!("{} [env: {}]", setting.help, setting.variables.join(", "));
            // What is refused is parsed to be told why.
            let is_hidden = !matches!(setting.effect, Effect::Key | Effect::Preset(_));
            let arg = Arg::new(setting.id())
                .long(flag)
                .visible_aliases(setting.flags.iter().skip(1).copied().collect::<Vec<_>>())
                .help(help)
                .hide(is_hidden);
            if !matches!(setting.kind, Kind::Switch(_)) {
                return command.arg(arg.action(ArgAction::Set));
            }
            let arg = arg.action(ArgAction::SetTrue);
            let Some((negative, others)) = setting.negative() else {
                return command.arg(arg);
            };
            let no = Arg::new(negative)
                .long(negative)
                .visible_aliases(others.to_vec())
                .help(format!("The opposite of --{flag}"))
                .hide(is_hidden)
                .action(ArgAction::SetTrue)
                .overrides_with(setting.id());
            command.arg(arg.overrides_with(negative)).arg(no)
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}
