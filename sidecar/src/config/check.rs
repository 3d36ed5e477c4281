//! Rules that a schema can't say: addresses, uniqueness, keys that exclude each other.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use kv_core::affinity::Affinity;
use kv_core::delay::Weights;
use kv_core::id::{Role, Slot};
use kv_core::policy::{Mode, Policy, Scoring};
use kv_core::table::{Metadata, Settings};
use kv_core::text::Budget;
use kv_core::tracker::Tracking;

use super::error::{ConfigErrors, Problem};
use super::file;
use super::file::File;
use super::layer::Layer;
use super::queue;
use super::{
    Api, CachePolicy, Config, Dns, DynamoPlane, HealthCheck, Nats, Pool, Registration, Source,
    Tokenizer, TokenizerFrom, Worker,
};
use crate::ingest::subject::{Template, TemplateError};
use crate::load;
use crate::text::tokenizer_file;

/// Longest path of a Unix socket that every system takes.
const SOCKET_PATH_BYTES: usize = 100;
/// Placeholder for an address that has been reported. What the schema has found missing is empty
/// here; no configuration comes of it.
const UNKNOWN: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), 0);

/// The configuration of a file, unless the file or `problems` found before say otherwise.
pub(super) fn check(
    file: &File,
    problems: Vec<Problem>,
    layers: &[Layer],
) -> Result<Config, ConfigErrors> {
    let mut check = Check::new(problems);
    let config = check.file(file);
    if check.problems.is_empty() {
        Ok(config)
    } else {
        Err(ConfigErrors::new(check.problems, layers))
    }
}

/// The one worker of a file, by itself.
pub(super) fn worker(file: &File, problems: Vec<Problem>) -> Result<Worker, ConfigErrors> {
    let mut check = Check::new(problems);
    let workers = file.pools.iter().flat_map(|pool| &pool.workers);
    let worker = workers.map(|worker| check.worker(worker, "")).last();
    match worker {
        Some(worker) if check.problems.is_empty() => Ok(worker),
        _ => Err(ConfigErrors::new(check.problems, &[])),
    }
}

/// Problems so far, and at which path each unique value was first seen.
pub(super) struct Check {
    problems: Vec<Problem>,
    names: HashMap<String, String>,
    workers: HashMap<u64, String>,
    endpoints: HashMap<SocketAddr, String>,
    pub(super) streams: HashMap<String, String>,
    served: HashMap<String, String>,
}

impl Check {
    fn new(problems: Vec<Problem>) -> Self {
        Self {
            problems,
            names: HashMap::new(),
            workers: HashMap::new(),
            endpoints: HashMap::new(),
            streams: HashMap::new(),
            served: HashMap::new(),
        }
    }

    fn file(&mut self, file: &File) -> Config {
        let listen = format!("{}:{}", bracketed(&file.http_host), file.http_port);
        let listen = self.address("http_host", &listen, "must be an IP address");
        let socket = file.socket.as_os_str().len();
        if !(1..=SOCKET_PATH_BYTES).contains(&socket) {
            let why = format!("must be a path of 1 to {SOCKET_PATH_BYTES} bytes");
            self.refuse("socket", file.socket.display(), &why);
        }
        let tracking = Tracking {
            prefill_tokens: file.router_track_prefill_tokens,
            active_blocks: file.router_track_active_blocks,
            kv_reuse: file.router_assume_kv_reuse,
            output_blocks: file.router_track_output_blocks,
        };
        if tracking.output_blocks && !tracking.active_blocks {
            let why = "needs router_track_active_blocks";
            self.refuse("router_track_output_blocks", true, why);
        }
        let subject = file.nats.as_ref().and_then(|n| n.workers_subject.as_ref());
        if let (Some(subject), None) = (subject, &file.registration) {
            let why = "needs `registration`, which says who may";
            self.refuse("nats.workers_subject", subject, why);
        }
        if file.health_check.is_some() && !file.eject_workers {
            let why = "needs eject_workers, or nothing comes of it";
            self.refuse("health_check", "{...}", why);
        }
        let is_short = file.is_short();
        let pools = file.pools.iter().enumerate().map(|(i, pool)| {
            let prefix = if is_short {
                String::new()
            } else {
                format!("pools[{i}].")
            };
            self.pool(pool, &prefix, tracking)
        });
        Config {
            file: file.clone(),
            pools: pools.collect(),
            listen,
            admin: self.address("admin", &file.admin, "must be ip:port"),
            admin_token_file: file.admin_token_file.clone(),
            peers: self.peers(file),
            envoy_admin: self.address("envoy_admin", &file.envoy_admin, "must be ip:port"),
            socket: file.socket.clone(),
            state_dir: file.state_dir.clone(),
            filter_wasm: file.filter_wasm.clone(),
            nats: file.nats.as_ref().map(|nats| self.nats(nats)),
            select: file.select.as_ref().map(|select| Api {
                listen: self.exposed("select", &select.listen, select.token_file.as_deref()),
                token_file: select.token_file.clone(),
            }),
            indexer: file.indexer.as_ref().map(|indexer| Api {
                listen: self.exposed("indexer", &indexer.listen, indexer.token_file.as_deref()),
                token_file: indexer.token_file.clone(),
            }),
            dynamo_zmq: self.dynamo_zmq(&file.dynamo_zmq),
            event_bytes_per_second: file.event_bytes_per_second,
            index_bytes: bytes(file.index_bytes),
            page_bytes: bytes(file.page_bytes),
            load: load::Settings {
                tracking,
                expiry_ms: milliseconds(file.active_request_expiry_secs),
            },
            eject_workers: file.eject_workers,
            eject_floor: file.eject_floor,
            health_check: file.health_check.as_ref().map(health_check),
            registration: file.registration.as_ref().map(|r| self.registration(r)),
            min_initial_workers: file.router_min_initial_workers,
            settings: Settings {
                body_limit: file.body_limit_bytes,
                token_limit: file.token_limit,
                decision_header: file.decision_header,
            },
        }
    }

    fn registration(&mut self, registration: &file::Registration) -> Registration {
        let networks = registration.networks.iter().flatten().enumerate();
        let network = |(i, text): (usize, &String)| {
            let network = text.parse().ok();
            if network.is_none() {
                let why = "must be a network such as 10.0.0.0/8";
                self.refuse(format!("registration.networks[{i}]"), text, why);
            }
            network
        };
        let networks = networks.filter_map(network).collect();
        if registration.ttl_secs > registration.max_ttl_secs {
            let why = "must be at most registration.max_ttl_secs";
            self.refuse("registration.ttl_secs", registration.ttl_secs, why);
        }
        Registration {
            networks,
            max_workers: registration.max_workers,
            ttl_ms: milliseconds(registration.ttl_secs),
            max_ttl_ms: milliseconds(registration.max_ttl_secs),
        }
    }

    /// The address of an interface that needs a token where other machines reach it.
    fn exposed(&mut self, key: &str, listen: &str, token_file: Option<&Path>) -> SocketAddr {
        let at = format!("{key}.listen");
        let listen = self.address(&at, listen, "must be ip:port");
        if token_file.is_none() && listen != UNKNOWN && !listen.ip().is_loopback() {
            let why = format!("needs {key}.token_file, because other machines reach it");
            self.refuse(&*at, listen, &why);
        }
        self.readable(&format!("{key}.token_file"), token_file);
        listen
    }

    fn peers(&mut self, file: &File) -> Vec<http::Uri> {
        self.readable("admin_token_file", file.admin_token_file.as_deref());
        let mut peers = Vec::new();
        for (i, peer) in file.peers.iter().enumerate() {
            let uri = peer.parse::<http::Uri>().ok();
            let uri = uri.filter(|uri| {
                let is_bare = matches!(
                    uri.path_and_query().map(http::uri::PathAndQuery::as_str),
                    None | Some("/")
                );
                uri.scheme_str() == Some("http") && uri.host().is_some() && is_bare
            });
            match uri {
                Some(uri) => peers.push(uri),
                None => self.refuse(format!("peers[{i}]"), peer, "must be http://host:port"),
            }
        }
        peers
    }

    fn nats(&mut self, nats: &file::Nats) -> Nats {
        let url = nats.url.as_deref().unwrap_or_default();
        let urls: Vec<&str> = url.split(',').map(str::trim).collect();
        for one in &urls {
            if !url.is_empty() && one.parse::<async_nats::ServerAddr>().is_err() {
                // What stands before the @ may be a password.
                let shown = one.rsplit('@').next().unwrap_or_default();
                self.refuse(
                    "nats.url",
                    shown,
                    "must be a NATS URL such as nats://host:4222",
                );
            }
        }
        let subjects = [&nats.json_subject, &nats.workers_subject];
        if nats.dynamo.is_none() && subjects.iter().all(|subject| subject.is_none()) {
            let why = "needs `dynamo`, `json_subject` or `workers_subject`, or nothing is read \
                       from it";
            self.refuse("nats", url, why);
        }
        if nats.replica_sync && nats.dynamo.is_none() {
            let why = "needs nats.dynamo, whose subjects it goes over";
            self.refuse("nats.replica_sync", true, why);
        }
        let mut template = |key: &str, subject: Option<&str>| {
            let template = Template::new(subject?);
            let refuse = |why: TemplateError| {
                self.refuse(key, subject.unwrap_or_default(), &why.to_string());
            };
            template.map_err(refuse).ok()
        };
        let json = template("nats.json_subject", nats.json_subject.as_deref());
        let workers = template("nats.workers_subject", nats.workers_subject.as_deref());
        let workers = workers.map(Box::new);
        if let (Some(stream), None) = (&nats.json_stream, &nats.json_subject) {
            let why = "needs nats.json_subject, which it keeps";
            self.refuse("nats.json_stream", stream, why);
        }
        if let (Some(credentials), Some(_)) = (&nats.credentials_file, &nats.nkey_seed_file) {
            let why = "excludes nkey_seed_file";
            self.refuse("nats.credentials_file", credentials.display(), why);
        }
        let tls = nats.tls.clone().unwrap_or_default();
        if tls.cert_file.is_some() != tls.key_file.is_some() {
            let one = tls.cert_file.as_ref().or(tls.key_file.as_ref());
            let one = one.map_or(String::new(), |p| p.display().to_string());
            self.refuse("nats.tls", one, "cert_file and key_file go together");
        }
        let files = [
            ("nats.credentials_file", nats.credentials_file.as_deref()),
            ("nats.nkey_seed_file", nats.nkey_seed_file.as_deref()),
            ("nats.tls.ca_file", tls.ca_file.as_deref()),
            ("nats.tls.cert_file", tls.cert_file.as_deref()),
            ("nats.tls.key_file", tls.key_file.as_deref()),
        ];
        for (path, file) in files {
            self.readable(path, file);
        }
        Nats {
            urls: urls.into_iter().map(str::to_owned).collect(),
            dynamo: nats.dynamo.as_ref().map(|plane| DynamoPlane {
                namespace: plane.namespace.clone().unwrap_or_default(),
                component: plane.component.clone().unwrap_or_default(),
            }),
            json,
            json_stream: nats.json_stream.clone(),
            workers,
            replica_sync: nats.replica_sync,
            credentials_file: nats.credentials_file.clone(),
            nkey_seed_file: nats.nkey_seed_file.clone(),
            tls: nats.tls.clone(),
        }
    }

    fn pool(&mut self, pool: &file::Pool, prefix: &str, tracking: Tracking) -> Pool {
        let path = |key: &str| format!("{prefix}{key}");
        if let Some(other) = self.names.insert(pool.name.clone(), path("name")) {
            self.refuse(path("name"), &pool.name, &format!("is taken by {other}"));
        }
        let lists = [
            ("models", &pool.models),
            ("lora_adapters", &pool.lora_adapters),
        ];
        for (key, list) in lists {
            for (i, model) in list.iter().enumerate() {
                let at = path(&format!("{key}[{i}]"));
                if model.is_empty() {
                    self.refuse(at, "\"\"", "must not be empty");
                } else if let Some(other) = self.served.insert(model.clone(), at.clone()) {
                    self.refuse(at, model, &format!("is served by {other}"));
                }
            }
        }
        let owners: u64 = pool
            .workers
            .iter()
            .map(|w| u64::from(w.data_parallel_size))
            .sum();
        if owners > u64::from(Slot::MAX) {
            let why = format!("must make at most {} owners (workers x ranks)", Slot::MAX);
            self.refuse(path("workers"), owners, &why);
        }
        let takes = |w: &file::Worker| w.role == Role::Aggregated;
        if !pool.workers.is_empty() && !pool.workers.iter().any(takes) {
            let why = "must have a worker of role aggregated: requests are sent whole";
            self.refuse(path("workers"), "[...]", why);
        }
        let workers = pool.workers.iter().enumerate();
        let workers =
            workers.map(|(i, worker)| self.worker(worker, &format!("{prefix}workers[{i}].")));
        let workers = workers.collect();
        let tokenizer = pool.tokenizer.as_ref();
        let tokenizer = tokenizer.map(|t| self.tokenizer(t, &path("tokenizer.path")));
        let media = self.media(pool, prefix);
        let queue = pool.queue.as_ref();
        let queue = queue.and_then(|queue| self.queue(queue, &path("queue")));
        Pool {
            queue,
            overload: queue::overload(pool),
            refusing: queue::refusing(pool),
            tokenizer,
            workers,
            families: self.families(pool, &media, prefix),
            media,
            image_token: pool.image_token_id,
            dns: pool.dns.iter().map(dns).collect(),
            name: pool.name.clone(),
            models: pool.models.clone(),
            lora_adapters: pool.lora_adapters.clone(),
            block_size: pool.kv_cache_block_size,
            policy: Policy {
                tracking,
                ..self.policy(pool, prefix)
            },
            kv_events: pool.kv_events,
            ttl_ms: milliseconds(pool.router_ttl_secs),
            cache_policy: self.cache_policy(pool, prefix),
            predicted_ttl_ms: self.predicted_ttl(pool, prefix),
            routing_group: None,
            trusts_hints: pool.trust_hints,
            trusted_sources: self.trusted_sources(pool, prefix),
            affinity: affinity(pool),
            device_ratio: pool.encoder_cuda_to_cpu_ratio,
            slow_start_ms: u32::try_from(milliseconds(pool.slow_start_secs)).unwrap_or(u32::MAX),
        }
    }

    fn worker(&mut self, worker: &file::Worker, prefix: &str) -> Worker {
        let path = |key: &str| format!("{prefix}{key}");
        if let Some(id) = worker.id
            && let Some(other) = self.workers.insert(id, path("id"))
        {
            self.refuse(path("id"), id, &format!("is taken by {other}"));
        }
        let why = "must be ip:port or [v6]:port";
        let is_store = worker.role == Role::Store;
        let endpoint = match &worker.endpoint {
            Some(endpoint) if is_store => {
                let why = "must be left out: a store takes no requests";
                self.refuse(path("endpoint"), endpoint, why);
                UNKNOWN
            }
            Some(endpoint) => self.address(&path("endpoint"), endpoint, why),
            None => {
                let path = path("endpoint");
                // What the schema has cut away has been reported.
                let known = self.problems.iter().any(|p| p.path() == Some(&path));
                if !is_store && !known {
                    self.problems.push(Problem::Missing { path });
                }
                UNKNOWN
            }
        };
        if endpoint != UNKNOWN
            && let Some(other) = self.endpoints.insert(endpoint, path("endpoint"))
        {
            self.refuse(path("endpoint"), endpoint, &format!("is taken by {other}"));
        }
        Worker {
            id: worker.id.unwrap_or_default(),
            endpoint: Some(endpoint).filter(|_| !is_store),
            role: worker.role,
            device: worker.device,
            ranks: worker.data_parallel_size,
            metadata: worker.metadata(),
            draining: worker.draining,
            source: Source::File,
            events: worker
                .events
                .as_ref()
                .and_then(|events| self.events(events, worker.data_parallel_size, &path("events"))),
        }
    }

    fn cache_policy(&mut self, pool: &file::Pool, prefix: &str) -> CachePolicy {
        let policy = pool.router_approximate_cache_policy;
        if policy == CachePolicy::Lru && pool.kv_events {
            let at = format!("{prefix}router_approximate_cache_policy");
            self.refuse(
                at,
                "lru",
                "needs kv_events: false: with events, engines say what goes",
            );
        }
        policy
    }

    fn predicted_ttl(&mut self, pool: &file::Pool, prefix: &str) -> Option<u64> {
        let secs = pool.router_predicted_ttl_secs?;
        if !pool.kv_events {
            let at = format!("{prefix}router_predicted_ttl_secs");
            self.refuse(
                at,
                secs,
                "needs kv_events: without them router_ttl_secs is how long",
            );
        }
        Some(milliseconds(secs))
    }

    fn trusted_sources(&mut self, pool: &file::Pool, prefix: &str) -> Vec<IpNet> {
        let mut networks = Vec::new();
        for (i, source) in pool.trusted_sources.iter().enumerate() {
            match source.parse::<IpNet>() {
                Ok(network) => networks.push(network.trunc()),
                Err(_) => {
                    let at = format!("{prefix}trusted_sources[{i}]");
                    self.refuse(at, source, "must be a network such as 10.0.0.0/8");
                }
            }
        }
        networks
    }

    fn tokenizer(&mut self, tokenizer: &file::Tokenizer, at: &str) -> Tokenizer {
        let from = match (&tokenizer.path, tokenizer.engine) {
            (Some(folder), engine) => {
                self.readable(at, Some(&tokenizer_file(folder)));
                if engine.is_some() {
                    self.refuse(at, folder.display(), "excludes engine");
                }
                TokenizerFrom::Folder(folder.clone())
            }
            (None, Some(engine)) => TokenizerFrom::Engine(engine),
            (None, None) => {
                let path = at.to_owned();
                self.problems.push(Problem::Missing { path });
                TokenizerFrom::Folder(PathBuf::new())
            }
        };
        Tokenizer {
            from,
            cache_bytes: tokenizer.cache_bytes,
            budget: Budget {
                base_ms: tokenizer.budget_ms,
                per_thousand_words_ms: tokenizer.budget_ms_per_1000_words,
            },
            handover: tokenizer.hand_over,
        }
    }

    /// Knobs that what the mode kv compares does not have would do nothing.
    fn knobs(&mut self, pool: &file::Pool, prefix: &str) {
        if pool.router_mode == Mode::Kv && pool.policy == Scoring::PredictedDelay {
            let if_set = |weight: f64| (weight > 0.0).then_some(weight);
            let knobs = [
                ("kv_overlap_score_weight", pool.kv_overlap_score_weight),
                ("prefill_load_scale", pool.prefill_load_scale),
                (
                    "decode_active_request_weight",
                    if_set(pool.decode_active_request_weight),
                ),
                (
                    "overlap_score_credit_decay",
                    if_set(pool.overlap_score_credit_decay),
                ),
            ];
            let why = "is of Dynamo's formula alone and takes policy: dynamo, or compat: dynamo";
            for (knob, weight) in knobs {
                if let Some(weight) = weight {
                    self.refuse(format!("{prefix}{knob}"), weight, why);
                }
            }
        }
    }

    fn policy(&mut self, pool: &file::Pool, prefix: &str) -> Policy {
        if let Some(weight) = pool.kv_overlap_score_weight
            && (pool.prefill_load_scale.is_some() || pool.overlap_score_credit.is_some())
        {
            let why = "excludes prefill_load_scale and overlap_score_credit";
            self.refuse(format!("{prefix}kv_overlap_score_weight"), weight, why);
        }
        self.knobs(pool, prefix);
        let defaults = Policy::default();
        let (scale, credit) = match pool.kv_overlap_score_weight {
            Some(0.0) => (0.0, 0.0),
            Some(weight) => (weight, defaults.overlap_score_credit),
            None => (
                pool.prefill_load_scale
                    .unwrap_or(defaults.prefill_load_scale),
                pool.overlap_score_credit
                    .unwrap_or(defaults.overlap_score_credit),
            ),
        };
        Policy {
            mode: pool.router_mode,
            temperature: pool.router_temperature,
            prefill_load_scale: scale,
            overlap_score_credit: credit,
            host_cache_hit_weight: pool.host_cache_hit_weight,
            disk_cache_hit_weight: pool.disk_cache_hit_weight,
            shared_cache_multiplier: pool.shared_cache_multiplier,
            decode_active_request_weight: pool.decode_active_request_weight,
            overlap_score_credit_decay: pool.overlap_score_credit_decay,
            scoring: pool.policy,
            delay: delay(&pool.predicted_delay),
            ..defaults
        }
    }

    fn address(&mut self, path: &str, text: &str, why: &str) -> SocketAddr {
        match text.parse::<SocketAddr>() {
            Ok(address) if address.port() != 0 => address,
            _ => {
                self.refuse(path, format!("{text:?}"), why);
                UNKNOWN
            }
        }
    }

    pub(super) fn readable(&mut self, path: &str, file: Option<&Path>) {
        let Some(file) = file else { return };
        if let Err(e) = std::fs::File::open(file) {
            self.refuse(path, file.display(), &format!("can't be read ({e})"));
        }
    }

    pub(super) fn refuse(
        &mut self,
        path: impl Into<String>,
        value: impl std::fmt::Display,
        why: &str,
    ) {
        self.problems.push(Problem::value(path, value, why));
    }
}

/// How a pool keeps sessions together.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn affinity(pool: &file::Pool) -> Option<Affinity> {
    let ttl = pool.router_session_affinity_ttl_secs?;
    let is_soft = pool.router_session_affinity_mode == file::Stickiness::Soft;
    let headers = pool.session_headers.iter();
    Some(Affinity {
        ttl_s: ttl.ceil() as u32,
        slack: is_soft.then_some(pool.session_affinity_slack),
        headers: headers.map(|name| name.to_ascii_lowercase()).collect(),
    })
}

fn health_check(check: &file::HealthCheck) -> HealthCheck {
    HealthCheck {
        path: check.path.clone(),
        interval_ms: milliseconds(check.interval_secs),
        timeout_ms: milliseconds(check.timeout_secs),
        unwell_after: check.unwell_after,
    }
}

/// A name; what the schema has found missing is empty.
fn dns(dns: &file::Dns) -> Dns {
    Dns {
        name: dns.name.clone().unwrap_or_default(),
        port: dns.port.unwrap_or_default(),
        family: dns.family,
        refresh: Duration::from_millis(milliseconds(dns.refresh_secs)),
        ranks: dns.data_parallel_size,
        metadata: Metadata {
            taints: dns.taints.clone(),
            total_kv_blocks: dns.total_kv_blocks,
            max_requests: dns.max_requests,
            ..Metadata::default()
        },
        zmq_port: dns.zmq_port,
        zmq_replay_port: dns.zmq_replay_port,
    }
}

/// More than the machine could address is no limit.
fn bytes(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// Weights as the core has them.
fn delay(weights: &file::PredictedDelay) -> Weights {
    Weights {
        backlog_floor: weights.backlog_floor,
        waiting: weights.waiting_weight,
        decoding: weights.decoding_weight,
        requests: weights.request_weight,
        band_ms: weights.band_ms,
        prefill_ms_per_token: weights.prefill_ms_per_token,
    }
}

/// Seconds as milliseconds; the schema bounds them.
pub(super) fn milliseconds(seconds: f64) -> u64 {
    (seconds * 1000.0).round() as u64
}

/// An IPv6 address as it stands before a port.
fn bracketed(host: &str) -> String {
    if host.contains(':') && !host.starts_with('[') {
        format!("[{host}]")
    } else {
        host.to_owned()
    }
}
