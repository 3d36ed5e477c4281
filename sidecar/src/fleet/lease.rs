//! Who is registered, and until when. Synchronous: time is milliseconds of any clock that doesn't go
//! back.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use kv_core::id::{Slot, WorkerId};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::said::Said;
use super::{Joined, StateFile};
use crate::config::{Config, Events, Pool, Registration, Source};
use crate::state::replace;

/// What a registration did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The worker is there for the first time.
    Joined,
    /// It says something else than before.
    Changed,
    /// Its lease is extended.
    Renewed,
}

impl Outcome {
    /// Label for metrics.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::Joined => "joined",
            Self::Changed => "changed",
            Self::Renewed => "renewed",
        }
    }
}

/// Why a registration is refused.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RegisterError {
    /// The configuration takes none.
    #[error("workers can't register: the configuration has no `registration`")]
    Off,
    /// It is not what a worker says.
    #[error("the registration is not valid: {0}")]
    Body(String),
    /// Another worker than the path or the subject names.
    #[error("the registration is of worker {said}, not of {expected}")]
    OtherWorker {
        /// Whom the body names.
        said: WorkerId,
        /// Whom the path or the subject names.
        expected: WorkerId,
    },
    /// An address outside the configured networks, or none.
    #[error("{0} is not an address inside registration.networks")]
    Network(String),
    /// A source of events that only the configuration file may name.
    #[error("events.http can't be registered: it belongs into the configuration file")]
    Events,
    /// The pool or the model is not known.
    #[error("no pool {0}")]
    NoPool(String),
    /// Its blocks are of another size.
    #[error("block_size must be {expected}, which pool {pool:?} has, not {said}")]
    BlockSize {
        /// The pool.
        pool: String,
        /// Its block size.
        expected: u32,
        /// What was said.
        said: u32,
    },
    /// A lease that is too short or too long.
    #[error("ttl_secs must be from 1 to {longest}, not {said}")]
    Ttl {
        /// The longest.
        longest: f64,
        /// What was said.
        said: f64,
    },
    /// The configuration file has this worker.
    #[error("worker {0} is in the configuration file")]
    OfFile(WorkerId),
    /// Another worker has the endpoint.
    #[error("endpoint {endpoint} is worker {other}'s")]
    EndpointTaken {
        /// The endpoint.
        endpoint: SocketAddr,
        /// Whose it is.
        other: WorkerId,
    },
    /// There is no room.
    #[error("too many {0}")]
    Full(&'static str),
    /// No such worker has registered.
    #[error("worker {0} is not registered")]
    NotRegistered(WorkerId),
    /// The sidecar is shutting down.
    #[error("the sidecar is shutting down")]
    ShuttingDown,
}

impl RegisterError {
    /// Label for metrics and answers.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Off => "registration_off",
            Self::Body(_) => "invalid_body",
            Self::OtherWorker { .. } => "other_worker",
            Self::Network(_) => "network",
            Self::Events => "events",
            Self::NoPool(_) => "no_such_pool",
            Self::BlockSize { .. } => "block_size",
            Self::Ttl { .. } => "ttl",
            Self::OfFile(_) => "of_file",
            Self::EndpointTaken { .. } => "endpoint_taken",
            Self::Full(_) => "full",
            Self::NotRegistered(_) => "not_registered",
            Self::ShuttingDown => "shutting_down",
        }
    }
}

/// A lease in the answer of `GET /v1/workers`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Lease {
    /// The worker.
    pub worker: WorkerId,
    /// Its pool.
    pub pool: String,
    /// Where it takes requests.
    pub endpoint: Option<SocketAddr>,
    /// How long it counts without a sign of life, seconds.
    pub ttl_secs: f64,
    /// How long it counts still, seconds.
    pub left_secs: f64,
    /// Whether it is to get no more requests.
    pub draining: bool,
}

#[derive(Clone, Debug)]
struct Registered {
    said: Said,
    pool: String,
    ttl_ms: u64,
    until_ms: u64,
}

/// A registered worker as it is saved.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    pool: String,
    ttl_ms: u64,
    said: Map<String, Value>,
}

/// Everybody who is registered.
#[derive(Debug, Default)]
pub struct Leases {
    workers: BTreeMap<WorkerId, Registered>,
    file: StateFile,
}

impl Leases {
    /// Those who were saved, each for one lease from here on. What can't be read is left out.
    #[must_use]
    pub fn restore(file: StateFile, base: &Config, now_ms: u64) -> Self {
        let mut leases = Self {
            workers: BTreeMap::new(),
            file,
        };
        let Some(file) = leases.file.as_deref() else {
            return leases;
        };
        let text = match std::fs::read(file) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return leases,
            Err(error) => {
                tracing::error!(%error, file = %file.display(), "can't read registered workers");
                return leases;
            }
        };
        let saved: Vec<Saved> = serde_json::from_slice(&text).unwrap_or_else(|error| {
            tracing::error!(%error, file = %file.display(), "registered workers are not readable");
            Vec::new()
        });
        for one in saved {
            let joined = Said::of(one.said).and_then(|mut said| {
                said.terms.pool = Some(one.pool);
                said.terms.ttl_secs = Some(seconds(one.ttl_ms));
                leases.join(base, said, now_ms)
            });
            if let Err(error) = joined {
                tracing::warn!(%error, "a saved worker is not taken up again");
            }
        }
        tracing::info!(
            workers = leases.len(),
            "registered workers are taken up again"
        );
        leases
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.workers.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.workers.is_empty()
    }

    /// A worker registers, or extends its lease.
    ///
    /// # Errors
    /// Says why not; nothing has changed then.
    pub fn join(
        &mut self,
        base: &Config,
        said: Said,
        now_ms: u64,
    ) -> Result<Joined, RegisterError> {
        let terms = base.registration.as_ref().ok_or(RegisterError::Off)?;
        let id = said.id();
        allowed(terms, &said)?;
        let pool = pool_of(base, &said)?;
        if let Some(said) = said
            .terms
            .block_size
            .filter(|size| *size != pool.block_size)
        {
            return Err(RegisterError::BlockSize {
                pool: pool.name.clone(),
                expected: pool.block_size,
                said,
            });
        }
        let ttl_ms = ttl(terms, said.terms.ttl_secs)?;
        if base
            .pools
            .iter()
            .flat_map(|p| &p.workers)
            .any(|w| w.id == id)
        {
            return Err(RegisterError::OfFile(id));
        }
        self.endpoint_is_free(base, &said)?;
        let before = self.workers.get(&id);
        if before.is_none() && self.workers.len() >= terms.max_workers {
            return Err(RegisterError::Full("workers"));
        }
        let others = self
            .workers
            .iter()
            .filter(|(other, r)| **other != id && r.pool == pool.name);
        let ranks = others.map(|(_, r)| r.said.worker.ranks);
        let ranks = ranks.chain(pool.workers.iter().map(|w| w.ranks));
        let ranks: u32 = ranks.fold(said.worker.ranks, u32::saturating_add);
        if ranks > u32::from(Slot::MAX) {
            return Err(RegisterError::Full("ranks"));
        }
        let outcome = match before {
            None => Outcome::Joined,
            Some(before) if before.said.worker != said.worker || before.pool != pool.name => {
                Outcome::Changed
            }
            Some(_) => Outcome::Renewed,
        };
        let registered = Registered {
            said,
            pool: pool.name.clone(),
            ttl_ms,
            until_ms: now_ms.saturating_add(ttl_ms),
        };
        let joined = registered.joined(outcome);
        self.workers.insert(id, registered);
        Ok(joined)
    }

    /// A worker extends its lease.
    ///
    /// # Errors
    /// When it is not registered.
    pub fn renew(&mut self, worker: WorkerId, now_ms: u64) -> Result<Joined, RegisterError> {
        let registered = self.workers.get_mut(&worker);
        let registered = registered.ok_or(RegisterError::NotRegistered(worker))?;
        registered.until_ms = now_ms.saturating_add(registered.ttl_ms);
        Ok(registered.joined(Outcome::Renewed))
    }

    /// A worker leaves.
    ///
    /// # Errors
    /// When it is not registered.
    pub fn leave(&mut self, base: &Config, worker: WorkerId) -> Result<(), RegisterError> {
        if self.workers.remove(&worker).is_some() {
            return Ok(());
        }
        let mut of_file = base.pools.iter().flat_map(|pool| &pool.workers);
        Err(if of_file.any(|w| w.id == worker) {
            RegisterError::OfFile(worker)
        } else {
            RegisterError::NotRegistered(worker)
        })
    }

    /// Takes those out whose lease has run out.
    pub fn expire(&mut self, now_ms: u64) -> Vec<WorkerId> {
        let is_over = |_: &WorkerId, registered: &mut Registered| registered.until_ms <= now_ms;
        let over = self.workers.extract_if(.., is_over);
        over.map(|(worker, _)| worker).collect()
    }

    /// When the next lease runs out.
    #[must_use]
    pub fn next_expiry(&self) -> Option<u64> {
        self.workers.values().map(|r| r.until_ms).min()
    }

    /// The configuration with them.
    #[must_use]
    pub fn over(&self, mut config: Config) -> Config {
        for (id, registered) in &self.workers {
            let endpoint = registered.said.worker.endpoint;
            let mut all = config.pools.iter().flat_map(|pool| &pool.workers);
            if all.any(|w| w.id == *id || endpoint.is_some() && w.endpoint == endpoint) {
                continue;
            }
            let pool = config.pools.iter_mut().find(|p| p.name == registered.pool);
            if let Some(pool) = pool {
                let mut worker = registered.said.worker.clone();
                worker.source = Source::Registered;
                pool.workers.push(worker);
            }
        }
        config
    }

    /// Every lease.
    #[must_use]
    pub fn list(&self, now_ms: u64) -> Vec<Lease> {
        let lease = |(id, registered): (&WorkerId, &Registered)| Lease {
            worker: *id,
            pool: registered.pool.clone(),
            endpoint: registered.said.worker.endpoint,
            ttl_secs: seconds(registered.ttl_ms),
            left_secs: seconds(registered.until_ms.saturating_sub(now_ms)),
            draining: registered.said.worker.draining,
        };
        self.workers.iter().map(lease).collect()
    }

    /// Writes them to the state folder, if there is one.
    pub fn save(&self) {
        let Some(file) = &self.file else { return };
        let saved = self.workers.values().map(|registered| Saved {
            pool: registered.pool.clone(),
            ttl_ms: registered.ttl_ms,
            said: registered.said.text.clone(),
        });
        let text = serde_json::to_vec_pretty(&saved.collect::<Vec<_>>());
        let written = text
            .map_err(std::io::Error::from)
            .and_then(|text| replace(file, &text, 0o600));
        if let Err(error) = written {
            tracing::error!(%error, file = %file.display(), "can't save registered workers");
        }
    }

    fn endpoint_is_free(&self, base: &Config, said: &Said) -> Result<(), RegisterError> {
        let Some(endpoint) = said.worker.endpoint else {
            return Ok(());
        };
        let registered = self.workers.values().map(|r| &r.said.worker);
        let of_file = base.pools.iter().flat_map(|pool| &pool.workers);
        let mut all = of_file.chain(registered);
        let other = all.find(|w| w.endpoint == Some(endpoint) && w.id != said.id());
        match other {
            Some(other) => Err(RegisterError::EndpointTaken {
                endpoint,
                other: other.id,
            }),
            None => Ok(()),
        }
    }
}

impl Registered {
    fn joined(&self, outcome: Outcome) -> Joined {
        Joined {
            id: self.said.id(),
            pool: self.pool.clone(),
            outcome,
            ttl_secs: seconds(self.ttl_ms),
        }
    }
}

/// Whether a registrant may name these addresses.
fn allowed(terms: &Registration, said: &Said) -> Result<(), RegisterError> {
    let inside = |ip: IpAddr| {
        let ip = ip.to_canonical();
        terms.networks.iter().any(|network| network.contains(&ip))
    };
    let endpoint = said.worker.endpoint;
    if let Some(endpoint) = endpoint.filter(|e| !inside(e.ip())) {
        return Err(RegisterError::Network(endpoint.to_string()));
    }
    let of_host = |host: &str| {
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        match bare.parse() {
            Ok(ip) if inside(ip) => Ok(()),
            _ => Err(RegisterError::Network(host.to_owned())),
        }
    };
    match &said.worker.events {
        None => Ok(()),
        Some(Events::Zmq {
            endpoint, replay, ..
        }) => {
            of_host(&endpoint.host)?;
            replay
                .as_ref()
                .map_or(Ok(()), |replay| of_host(&replay.host))
        }
        Some(Events::TrtLlm { url, .. }) => of_host(url.host().unwrap_or_default()),
        // It names a file of this machine.
        Some(Events::Http { .. } | Events::Sockets(_)) => Err(RegisterError::Events),
    }
}

/// The pool that a worker names, or that serves its model.
fn pool_of<'a>(base: &'a Config, said: &Said) -> Result<&'a Pool, RegisterError> {
    let mut pools = base.pools.iter();
    if let Some(name) = &said.terms.pool {
        let named = pools.find(|pool| pool.name == *name);
        return named.ok_or_else(|| RegisterError::NoPool(format!("{name:?}")));
    }
    let mut served = None;
    for model in said.terms.models() {
        let serves = |pool: &&Pool| {
            let mut models = pool.models.iter().chain(&pool.lora_adapters);
            models.any(|m| m == model)
        };
        let pool = base.pools.iter().find(serves);
        // The first pool may take any model.
        let pool = pool.or_else(|| pools.clone().next().filter(|p| p.models.is_empty()));
        served = Some(pool.ok_or_else(|| RegisterError::NoPool(format!("serves {model:?}")))?);
    }
    match (served, base.pools.as_slice()) {
        (Some(pool), _) | (None, [pool]) => Ok(pool),
        _ => Err(RegisterError::NoPool(
            "is named, and there are several".into(),
        )),
    }
}

fn ttl(terms: &Registration, said: Option<f64>) -> Result<u64, RegisterError> {
    let Some(said) = said else {
        return Ok(terms.ttl_ms);
    };
    let longest = seconds(terms.max_ttl_ms);
    if !(1.0..=longest).contains(&said) {
        return Err(RegisterError::Ttl { longest, said });
    }
    Ok((said * 1000.0).round() as u64)
}

fn seconds(ms: u64) -> f64 {
    ms as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn base(more: &str) -> Config {
        let text = format!(
            "registration: {{networks: [10.0.0.0/8, 'fd00::/8'], max_workers: 3}}\n{more}\n\
             workers: [{{id: 1, endpoint: '10.0.0.1:80'}}]"
        );
        Config::parse(&text, &[]).unwrap_or_else(|e| panic!("{e}"))
    }

    fn said(id: u64, more: &Value) -> Said {
        let mut text = json!({"id": id, "endpoint": format!("10.0.0.{id}:80"), "ttl_secs": 5});
        let text = text.as_object_mut().unwrap();
        text.extend(more.as_object().unwrap().clone());
        Said::of(text.clone()).unwrap()
    }

    fn ids(config: &Config) -> Vec<u64> {
        config.pools[0].workers.iter().map(|w| w.id).collect()
    }

    #[test]
    fn a_lease_lasts_until_it_is_renewed_no_more() {
        let (base, mut leases) = (base(""), Leases::default());
        let joined = leases.join(&base, said(2, &json!({})), 0).unwrap();
        assert_eq!(joined.outcome, Outcome::Joined);
        assert_eq!(ids(&leases.over(base.clone())), [1, 2]);
        let again = leases.join(&base, said(2, &json!({})), 4_000).unwrap();
        assert_eq!(again.outcome, Outcome::Renewed);
        assert!(leases.expire(8_999).is_empty());
        assert_eq!(leases.renew(2, 8_999).unwrap().ttl_secs, 5.0);
        assert_eq!(leases.next_expiry(), Some(13_999));
        assert_eq!(leases.expire(13_999), [2]);
        assert_eq!(
            leases.renew(2, 14_000),
            Err(RegisterError::NotRegistered(2))
        );
        assert_eq!(ids(&leases.over(base)), [1]);
    }

    #[test]
    fn what_a_worker_says_anew_is_a_change_and_who_leaves_is_gone() {
        let (base, mut leases) = (base(""), Leases::default());
        leases.join(&base, said(2, &json!({})), 0).unwrap();
        let drained = leases.join(&base, said(2, &json!({"draining": true})), 0);
        assert_eq!(drained.unwrap().outcome, Outcome::Changed);
        assert!(leases.list(1_000)[0].draining);
        assert_eq!(leases.list(1_000)[0].left_secs, 4.0);
        assert_eq!(leases.leave(&base, 2), Ok(()));
        assert_eq!(leases.leave(&base, 2), Err(RegisterError::NotRegistered(2)));
        assert_eq!(leases.leave(&base, 1), Err(RegisterError::OfFile(1)));
    }

    #[test]
    fn registrants_are_held_to_networks_pool_and_number() {
        let (base, mut leases) = (
            base("kv_cache_block_size: 16\nmodels: [llama]"),
            Leases::default(),
        );
        let mut kind = |said: Said| leases.join(&base, said, 0).map_err(|e| e.kind());
        let refused = [
            (json!({"endpoint": "192.168.0.1:80"}), "network"),
            (
                json!({"events": {"zmq": {"endpoint": "tcp://10.9.9.9:1"}}}),
                "",
            ),
            (
                json!({"events": {"zmq": {"endpoint": "tcp://[fd00::1]:1"}}}),
                "",
            ),
            (
                json!({"events": {"zmq": {"endpoint": "tcp://elsewhere:1"}}}),
                "network",
            ),
            (
                json!({"events": {"trtllm": {"url": "http://1.2.3.4/kv_cache_events"}}}),
                "network",
            ),
            (
                json!({"events": {"http": {"trust_loopback": true}}}),
                "events",
            ),
            (json!({"pool": "other"}), "no_such_pool"),
            (json!({"model": "gpt"}), "no_such_pool"),
            (json!({"model": "llama", "block_size": 32}), "block_size"),
            (json!({"ttl_secs": 0.5}), "ttl"),
            (json!({"id": 1}), "of_file"),
            (json!({"endpoint": "10.0.0.1:80"}), "endpoint_taken"),
            (json!({"data_parallel_size": 1024}), "full"),
            (json!({"model": "llama", "block_size": 16}), ""),
        ];
        for (more, expected) in refused {
            let outcome = kind(said(7, &more)).err().unwrap_or_default();
            assert_eq!(outcome, expected, "{more}");
        }
        for id in [8, 9] {
            kind(said(id, &json!({}))).unwrap();
        }
        assert_eq!(kind(said(10, &json!({}))).err(), Some("full"));
        let off = Config::parse("workers: []", &[]).unwrap();
        assert_eq!(
            Leases::default().join(&off, said(7, &json!({})), 0),
            Err(RegisterError::Off)
        );
    }

    #[test]
    fn bodies_that_no_worker_says_are_refused_with_the_key() {
        for (body, key) in [
            ("[]", "invalid type"),
            (r#"{"id": 7}"#, "endpoint: missing"),
            (r#"{"endpoint": "10.0.0.7:80"}"#, "id: missing"),
            (
                r#"{"id": 7, "endpoint": "host:80"}"#,
                "endpoint: must be ip:port",
            ),
            (
                r#"{"id": 7, "endpoint": "10.0.0.7:80", "colour": 1}"#,
                "colour: unknown key",
            ),
            (
                r#"{"id": 7, "endpoint": "10.0.0.7:80", "ttl_secs": "x"}"#,
                "invalid type",
            ),
        ] {
            let error = Said::read(body.as_bytes()).unwrap_err();
            assert!(error.to_string().contains(key), "{body}: {error}");
        }
    }

    #[test]
    fn the_saved_are_there_for_one_lease_more() {
        let folder = tempfile::TempDir::new().unwrap();
        let file = Some(folder.path().join("workers.json"));
        let base = base("");
        let mut leases = Leases::restore(file.clone(), &base, 0);
        leases
            .join(&base, said(2, &json!({"taints": ["spot"]})), 0)
            .unwrap();
        leases.join(&base, said(3, &json!({})), 0).unwrap();
        leases.save();
        let restored = Leases::restore(file.clone(), &base, 1_000_000);
        assert_eq!(restored.next_expiry(), Some(1_005_000));
        let config = restored.over(base.clone());
        assert_eq!(ids(&config), [1, 2, 3]);
        assert_eq!(config.pools[0].workers[1].metadata.taints, ["spot"]);
        std::fs::write(folder.path().join("workers.json"), "{").unwrap();
        assert!(Leases::restore(file, &base, 0).is_empty());
    }
}
