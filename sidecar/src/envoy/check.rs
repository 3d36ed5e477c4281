//! What somebody else's bootstrap lacks for the filter to work.

use std::fmt;
use std::path::Path;

use serde_json::{Map, Value};

use super::{CLUSTER_LIMIT, DESTINATION, LABELS, SIDECAR_CLUSTER, WASM_TYPE};
use crate::config::Config;

const HCM: &str = "HttpConnectionManager";
const ROUTER: &str = "envoy.extensions.filters.http.router.v3.Router";
const OVERRIDE_HOST: &str = "override_host.v3.OverrideHost";
/// Shortest `stream_idle_timeout` that leaves slow prefills alive, in seconds.
const STREAM_IDLE_SECONDS: f64 = 60.0;

/// Something that is lacking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lack {
    /// The part of the bootstrap it concerns.
    pub part: String,
    /// What is wrong and what would be right.
    pub what: String,
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.part, self.what)
    }
}

/// Why a bootstrap can't be looked at.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CheckError {
    /// Neither YAML nor JSON.
    #[error("the bootstrap is neither YAML nor JSON: {0}")]
    Syntax(String),
}

/// Says what a bootstrap (YAML or JSON) lacks to route by this configuration. Files that it names
/// for ECDS and EDS are looked at too.
///
/// # Errors
/// When it can't be read.
pub fn check(bootstrap: &str, config: &Config) -> Result<Vec<Lack>, CheckError> {
    let root: Value =
        serde_saphyr::from_str(bootstrap).map_err(|e| CheckError::Syntax(e.to_string()))?;
    let mut checker = Checker {
        config,
        lacks: Vec::new(),
    };
    checker.root(&root);
    Ok(checker.lacks)
}

struct Checker<'a> {
    config: &'a Config,
    lacks: Vec<Lack>,
}

impl Checker<'_> {
    fn lack(&mut self, part: impl Into<String>, what: impl Into<String>) {
        let lack = Lack {
            part: part.into(),
            what: what.into(),
        };
        if !self.lacks.contains(&lack) {
            self.lacks.push(lack);
        }
    }

    fn root(&mut self, root: &Value) {
        let resources = root.get("static_resources").unwrap_or(&Value::Null);
        let clusters = list(resources, "clusters");
        let picked: Vec<&Value> = clusters.iter().filter(|c| overrides_host(c)).collect();
        if picked.is_empty() {
            self.lack(
                "clusters",
                format!("none has an override_host policy with the header {DESTINATION}"),
            );
        }
        for cluster in &picked {
            self.picked_cluster(cluster);
        }
        self.workers(&picked);
        let names: Vec<&str> = picked.iter().filter_map(|c| text(c, "name")).collect();
        let mut managers = Vec::new();
        typed(resources.get("listeners"), HCM, &mut managers);
        let mut sidecars = Vec::new();
        for manager in managers {
            sidecars.extend(self.manager(manager, &names));
        }
        if sidecars.is_empty() {
            self.lack(
                "listeners",
                "no http connection manager has the wasm filter",
            );
        }
        sidecars.sort();
        sidecars.dedup();
        for sidecar in sidecars {
            self.sidecar_cluster(&sidecar, clusters);
        }
        self.stats(root);
    }

    /// The clusters of the sidecar that its filters name.
    fn manager(&mut self, manager: &Map<String, Value>, picked: &[&str]) -> Vec<String> {
        let prefix = manager.get("stat_prefix").and_then(Value::as_str);
        let part = format!("http connection manager {}", prefix.unwrap_or("?"));
        let filters: &[Value] = manager
            .get("http_filters")
            .and_then(Value::as_array)
            .map_or(&[], Vec::as_slice);
        let mut sidecars = Vec::new();
        let mut ours = None;
        for (i, filter) in filters.iter().enumerate() {
            for wasm in wasm_configs(filter) {
                ours = Some(i);
                sidecars.push(self.wasm(&part, &wasm));
            }
        }
        let routes = routes(manager);
        let routed: Vec<&&Value> = routes
            .iter()
            .filter(|r| cluster_of(r).is_some_and(|c| picked.contains(&c)))
            .collect();
        let Some(ours) = ours else {
            if !routed.is_empty() {
                let what = format!(
                    "routes to an override_host cluster without the filter: any client may send \
                     {DESTINATION} and choose the host"
                );
                self.lack(&part, what);
            }
            return sidecars;
        };
        if filters.last().is_none_or(|f| !has_type(f, ROUTER)) {
            self.lack(&part, "the router must be the last http filter");
        }
        for filter in filters.iter().take(ours) {
            let name = text(filter, "name").unwrap_or("?");
            let reads_choice = ["header_to_metadata", "stateful_session"];
            if reads_choice.iter().any(|kind| contains_type(filter, kind)) {
                self.lack(&part, format!("{name} must stand after the wasm filter"));
            }
        }
        if let Some(idle) = manager.get("stream_idle_timeout").and_then(seconds)
            && idle > 0.0
            && idle < STREAM_IDLE_SECONDS
        {
            let what = format!("stream_idle_timeout {idle} s cuts off slow prefills, set 300s");
            self.lack(&part, what);
        }
        if self.config.trusts_sources()
            && manager.get("use_remote_address") != Some(&Value::Bool(true))
        {
            let what = "use_remote_address is not true: a client may pass for one of \
                        trusted_sources by sending x-forwarded-for";
            self.lack(&part, what);
        }
        if routed.is_empty() {
            self.lack(&part, "no route leads to an override_host cluster");
        }
        for route in routed {
            self.route(&part, route);
        }
        sidecars
    }

    fn wasm(&mut self, part: &str, wasm: &Value) -> String {
        let config = wasm.get("config").unwrap_or(&Value::Null);
        if config.get("allow_on_headers_stop_iteration") != Some(&Value::Bool(true)) {
            let what = "the wasm filter lacks allow_on_headers_stop_iteration: true; requests \
                        would never be routed by their body";
            self.lack(part, what);
        }
        if config.get("failure_policy").is_some() {
            let what = "the wasm filter has a failure_policy; set fail_open: true instead, or a \
                        trap resets running streams";
            self.lack(part, what);
        } else if config.get("fail_open") != Some(&Value::Bool(true)) {
            self.lack(part, "the wasm filter lacks fail_open: true");
        }
        let settings = config
            .pointer("/configuration/value")
            .and_then(Value::as_str);
        let settings = settings.and_then(|s| serde_json::from_str::<Value>(s).ok());
        let sidecar = settings.as_ref().and_then(|s| text(s, "sidecar_cluster"));
        sidecar.unwrap_or(SIDECAR_CLUSTER).to_owned()
    }

    fn route(&mut self, part: &str, route: &Value) {
        let action = route.get("route").unwrap_or(&Value::Null);
        let cluster = text(action, "cluster").unwrap_or("?");
        let part = format!("{part}, route to {cluster}");
        if action.get("timeout").and_then(seconds) != Some(0.0) {
            self.lack(&part, "timeout must be 0s: answers stream for minutes");
        }
        let limit = route.get("request_body_buffer_limit").and_then(number);
        let needed = self.config.settings.body_limit;
        if limit.is_none_or(|limit| limit < needed) {
            let is = limit.map_or("the default of 1 MiB".to_owned(), |l| l.to_string());
            let what =
                format!("request_body_buffer_limit is {is}, below body_limit_bytes {needed}");
            self.lack(&part, what);
        }
        for add in list(route, "request_headers_to_add") {
            let key = add.pointer("/header/key").and_then(Value::as_str);
            if key.is_some_and(|key| key.eq_ignore_ascii_case(DESTINATION)) {
                self.lack(
                    &part,
                    format!("request_headers_to_add overwrites {DESTINATION}"),
                );
            }
        }
    }

    fn picked_cluster(&mut self, cluster: &Value) {
        let part = format!("cluster {}", text(cluster, "name").unwrap_or("?"));
        let thresholds = cluster.pointer("/circuit_breakers/thresholds");
        let thresholds = thresholds.and_then(Value::as_array);
        let default = |t: &&Value| matches!(text(t, "priority"), None | Some("DEFAULT"));
        let threshold = thresholds.and_then(|list| list.iter().find(default));
        for (key, otherwise) in [
            ("max_connections", 1024),
            ("max_pending_requests", 1024),
            ("max_requests", 1024),
            ("max_retries", 3),
        ] {
            let limit = threshold.and_then(|t| t.get(key)).and_then(number);
            let limit = limit.unwrap_or(otherwise);
            if limit < CLUSTER_LIMIT {
                self.lack(&part, format!("{key} is {limit}, set {CLUSTER_LIMIT}"));
            }
        }
    }

    fn workers(&mut self, clusters: &[&Value]) {
        let mut hosts = Vec::new();
        let mut is_known = !clusters.is_empty();
        for cluster in clusters {
            let eds = cluster.pointer("/eds_cluster_config/eds_config");
            let eds = eds.and_then(watched_file);
            match (cluster.get("load_assignment"), eds) {
                (Some(inline), _) => addresses(inline, &mut hosts),
                (None, Some(file)) => addresses(&file, &mut hosts),
                // Endpoints that come from elsewhere can't be seen from here.
                (None, None) => is_known = false,
            }
        }
        for worker in self.config.workers() {
            let unknown = worker.endpoint.filter(|e| is_known && !hosts.contains(e));
            if let Some(endpoint) = unknown {
                let id = worker.id;
                self.lack("clusters", format!("none has worker {id} at {endpoint}"));
            }
        }
    }

    fn sidecar_cluster(&mut self, name: &str, clusters: &[Value]) {
        let part = format!("cluster {name}");
        let Some(cluster) = clusters.iter().find(|c| text(c, "name") == Some(name)) else {
            self.lack(part, "missing: the filter reaches the sidecar through it");
            return;
        };
        let options = cluster.get("typed_extension_protocol_options");
        let http2 = find(options, "http2_protocol_options").is_some()
            || cluster.get("http2_protocol_options").is_some();
        if !http2 {
            self.lack(
                &part,
                "must speak HTTP/2: explicit_http_config with http2_protocol_options",
            );
        }
        let socket = std::path::absolute(&self.config.socket);
        let socket = socket.unwrap_or_else(|_| self.config.socket.clone());
        let path = find(cluster.get("load_assignment"), "pipe").and_then(|p| text(p, "path"));
        if path.is_none_or(|path| Path::new(path) != socket) {
            let what = format!(
                "its pipe is {}, the configuration's socket is {}",
                path.unwrap_or("absent"),
                socket.display()
            );
            self.lack(part, what);
        }
    }

    fn stats(&mut self, root: &Value) {
        let config = root.get("stats_config").unwrap_or(&Value::Null);
        let tags = list(config, "stats_tags");
        for label in LABELS {
            if !tags.iter().any(|t| text(t, "tag_name") == Some(label)) {
                let regex = super::label_regex(label);
                let what = format!("no tag {label} with the regular expression {regex}");
                self.lack("stats_config.stats_tags", what);
            }
        }
    }
}

fn text<'v>(value: &'v Value, key: &str) -> Option<&'v str> {
    value.get(key)?.as_str()
}

fn list<'v>(value: &'v Value, key: &str) -> &'v [Value] {
    let list = value.get(key).and_then(Value::as_array);
    list.map_or(&[], Vec::as_slice)
}

/// Protobuf's JSON has 64-bit numbers as text.
fn number(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_str()?.parse().ok())
}

/// `300s` or `0.5s`.
fn seconds(value: &Value) -> Option<f64> {
    value.as_str()?.strip_suffix('s')?.parse().ok()
}

fn has_type(value: &Value, kind: &str) -> bool {
    let found = value.pointer("/typed_config/@type").and_then(Value::as_str);
    found.is_some_and(|t| t.contains(kind))
}

fn contains_type(value: &Value, kind: &str) -> bool {
    let mut found = Vec::new();
    typed(Some(value), kind, &mut found);
    !found.is_empty()
}

/// All messages whose `@type` contains a text.
fn typed<'v>(value: Option<&'v Value>, kind: &str, found: &mut Vec<&'v Map<String, Value>>) {
    match value {
        Some(Value::Object(map)) => {
            let of = map.get("@type").and_then(Value::as_str);
            if of.is_some_and(|t| t.contains(kind)) {
                found.push(map);
            }
            map.values().for_each(|v| typed(Some(v), kind, found));
        }
        Some(Value::Array(list)) => list.iter().for_each(|v| typed(Some(v), kind, found)),
        _ => {}
    }
}

/// The first value under a key, at any depth.
fn find<'v>(value: Option<&'v Value>, key: &str) -> Option<&'v Value> {
    match value? {
        Value::Object(map) => map
            .get(key)
            .or_else(|| map.values().find_map(|v| find(Some(v), key))),
        Value::Array(list) => list.iter().find_map(|v| find(Some(v), key)),
        _ => None,
    }
}

fn overrides_host(cluster: &Value) -> bool {
    let mut policies = Vec::new();
    typed(
        cluster.get("load_balancing_policy"),
        OVERRIDE_HOST,
        &mut policies,
    );
    let sources = policies
        .iter()
        .filter_map(|p| p.get("override_host_sources")?.as_array());
    sources
        .flatten()
        .any(|s| text(s, "header") == Some(DESTINATION))
}

/// The wasm configurations of an http filter, given in place or by a watched file.
fn wasm_configs(filter: &Value) -> Vec<Value> {
    if let Some(config) = filter.get("typed_config") {
        let is_wasm = text(config, "@type") == Some(WASM_TYPE);
        return is_wasm.then(|| config.clone()).into_iter().collect();
    }
    let source = filter.pointer("/config_discovery/config_source");
    let Some(file) = source.and_then(watched_file) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    typed(Some(&file), WASM_TYPE, &mut found);
    found.into_iter().cloned().map(Value::Object).collect()
}

/// The contents of a file that a config source names.
fn watched_file(source: &Value) -> Option<Value> {
    let path = source.pointer("/path_config_source/path")?.as_str()?;
    let text = std::fs::read_to_string(path).ok()?;
    serde_saphyr::from_str(&text).ok()
}

fn routes(manager: &Map<String, Value>) -> Vec<&Value> {
    let hosts = manager
        .get("route_config")
        .map_or(&[][..], |c| list(c, "virtual_hosts"));
    hosts.iter().flat_map(|host| list(host, "routes")).collect()
}

fn cluster_of(route: &Value) -> Option<&str> {
    route.pointer("/route/cluster")?.as_str()
}

fn addresses(value: &Value, hosts: &mut Vec<std::net::SocketAddr>) {
    match value {
        Value::Object(map) => {
            let ip = map.get("address").and_then(Value::as_str);
            let port = map.get("port_value").and_then(number);
            let ip = ip.and_then(|ip| ip.parse().ok());
            if let (Some(ip), Some(port)) = (ip, port.and_then(|p| u16::try_from(p).ok())) {
                hosts.push(std::net::SocketAddr::new(ip, port));
            }
            map.values().for_each(|v| addresses(v, hosts));
        }
        Value::Array(list) => list.iter().for_each(|v| addresses(v, hosts)),
        _ => {}
    }
}
