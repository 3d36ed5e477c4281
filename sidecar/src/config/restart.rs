//! Which keys a running sidecar does not take over, and why; all others it does.

use serde::Serialize;
use serde_json::Value;

use super::file::File;

/// What has to be restarted when a key changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Restart {
    /// The sidecar.
    Sidecar,
    /// Envoy, with another bootstrap.
    Envoy,
    /// Sidecar and Envoy.
    Both,
}

impl Restart {
    /// As the guide has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Sidecar => "sidecar",
            Self::Envoy => "Envoy",
            Self::Both => "both",
        }
    }
}

/// Keys with what is below them, and why they are not taken over.
struct Rule {
    keys: &'static [&'static str],
    restart: Restart,
    why: &'static str,
}

static RULES: &[Rule] = &[
    Rule {
        keys: &["http_host", "http_port"],
        restart: Restart::Both,
        why: "the listener is in envoy's bootstrap",
    },
    Rule {
        keys: &["envoy_admin"],
        restart: Restart::Envoy,
        why: "it is in envoy's bootstrap",
    },
    Rule {
        keys: &["socket"],
        restart: Restart::Both,
        why: "the sidecar opens it at the start, and it is in envoy's bootstrap",
    },
    Rule {
        keys: &["state_dir"],
        restart: Restart::Both,
        why: "the snapshot is read at the start, and envoy's bootstrap names the files it watches",
    },
    Rule {
        keys: &["admin", "admin_token_file", "select", "indexer"],
        restart: Restart::Sidecar,
        why: "the listener is opened and its token read at the start",
    },
    Rule {
        keys: &["filter_wasm"],
        restart: Restart::Sidecar,
        why: "the filter's file for envoy is written at the start",
    },
    Rule {
        keys: &["peers"],
        restart: Restart::Sidecar,
        why: "only a sidecar that starts takes an index over",
    },
    Rule {
        keys: &["nats", "dynamo_zmq", "event_bytes_per_second"],
        restart: Restart::Sidecar,
        why: "the sources of events are opened at the start",
    },
    Rule {
        keys: &["pools[].tokenizer"],
        restart: Restart::Sidecar,
        why: "the model's files are read at the start",
    },
    Rule {
        keys: &["pools[].trusted_sources"],
        restart: Restart::Both,
        why: "the first and the last of them change how envoy's bootstrap tells clients' addresses",
    },
    Rule {
        keys: &["pools[].name"],
        restart: Restart::Both,
        why: "each pool is a cluster of envoy's bootstrap",
    },
];

/// What has to be restarted when a key path changes, and why it isn't taken over.
#[must_use]
pub fn restart(path: &str) -> Option<(Restart, &'static str)> {
    let path = general(path);
    let path = path.strip_prefix("pools[].").unwrap_or(&path);
    let is_of = |key: &&str| -> bool {
        let key = key.strip_prefix("pools[].").unwrap_or(key);
        let rest = path.strip_prefix(key);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
    };
    let rule = RULES.iter().find(|rule| rule.keys.iter().any(is_of))?;
    Some((rule.restart, rule.why))
}

/// A path with no positions in it: `pools[].workers[].id`.
fn general(path: &str) -> String {
    path.split_inclusive(['[', ']'])
        .map(|part| match part.strip_suffix(']') {
            Some(_) => "]",
            None => part,
        })
        .collect()
}

/// `after` where a running sidecar with `before` takes it over, and the paths of what it doesn't.
pub(super) fn taken_over(before: &File, after: &File) -> Result<(File, Vec<String>), String> {
    let tree = |file: &File| serde_json::to_value(file).map_err(|e| e.to_string());
    let trusts = |file: &File| file.pools.iter().any(|p| !p.trusted_sources.is_empty());
    let are_addresses_told = trusts(before) && trusts(after);
    let (before, mut after) = (tree(before)?, tree(after)?);
    let mut kept = Vec::new();
    let names = |tree: &Value| -> Vec<Value> {
        let pools = tree["pools"].as_array().into_iter().flatten();
        pools.map(|pool| pool["name"].clone()).collect()
    };
    if names(&before) != names(&after) {
        kept.push("pools[].name".to_owned());
        after["pools"] = before["pools"].clone();
    }
    let is_kept = |path: &str| {
        restart(path).is_some() && !(are_addresses_told && path.ends_with("].trusted_sources"))
    };
    keep(&before, &mut after, "", &is_kept, &mut kept);
    let file = serde_json::from_value(after).map_err(|e| e.to_string())?;
    Ok((file, kept))
}

fn keep(
    before: &Value,
    after: &mut Value,
    at: &str,
    is_kept: &impl Fn(&str) -> bool,
    kept: &mut Vec<String>,
) {
    match (before, after) {
        (Value::Object(before), Value::Object(after)) => {
            let keys: std::collections::BTreeSet<String> =
                before.keys().chain(after.keys()).cloned().collect();
            for key in keys {
                let path = if at.is_empty() {
                    key.clone()
                } else {
                    format!("{at}.{key}")
                };
                let (was, is) = (before.get(&key), after.get_mut(&key));
                if was == is.as_deref() {
                    continue;
                }
                if is_kept(&path) {
                    kept.push(path);
                    match was {
                        Some(was) => after.insert(key, was.clone()),
                        None => after.remove(&key),
                    };
                } else if let (Some(was), Some(is)) = (was, is) {
                    keep(was, is, &path, is_kept, kept);
                }
            }
        }
        // Other lists than that of pools are taken over whole.
        (Value::Array(before), Value::Array(after)) if at == "pools" => {
            for (i, (was, is)) in before.iter().zip(after).enumerate() {
                keep(was, is, &format!("pools[{i}]"), is_kept, kept);
            }
        }
        _ => {}
    }
}
