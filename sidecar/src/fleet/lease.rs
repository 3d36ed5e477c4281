//! Who is registered, and until when. Synchronous: time is milliseconds of any clock that doesn't go
//! back.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use kv_core::id::{Slot, WorkerId};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::outcome::{Outcome, RegisterError};
use super::said::Said;
use super::{Joined, StateFile};
use crate::config::{Config, Events, Pool, Registration, Source};
use crate::state::replace;

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
        if base.workers().any(|w| w.id == id) {
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
        Err(if base.workers().any(|w| w.id == worker) {
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
        for registered in self.workers.values() {
            let mut worker = registered.said.worker.clone();
            worker.source = Source::Registered;
            config.admit(&registered.pool, worker);
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
        let mut all = base.workers().chain(registered);
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
mod tests;
