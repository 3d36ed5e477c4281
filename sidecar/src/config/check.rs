//! Rules that a schema can't say: addresses, uniqueness, keys that exclude each other.

mod fleet;
mod nats;
mod pool;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;

use kv_core::table::Settings;
use kv_core::tracker::Tracking;

use super::error::{ConfigErrors, Problem};
use super::file::File;
use super::layer::Layer;
use super::{Api, Config, Worker};
use crate::load;

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
            health_check: file.health_check.as_ref().map(fleet::health_check),
            registration: file.registration.as_ref().map(|r| self.registration(r)),
            min_initial_workers: file.router_min_initial_workers,
            settings: Settings {
                body_limit: file.body_limit_bytes,
                token_limit: file.token_limit,
                decision_header: file.decision_header,
            },
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

/// More than the machine could address is no limit.
fn bytes(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
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
