//! Workers that come and go at run time: those that registered under a lease, and those that a DNS
//! name stands for. Both lie over the configuration as if its file had them; where the file has the
//! same worker or endpoint, the file holds.
//!
//! - [`said`]: what a worker says when it registers; [`lease`]: who is registered, and until when;
//!   [`outcome`]: what that comes to.
//! - [`names`]: the addresses behind DNS names.
//! - [`subject`]: registration over NATS.

pub mod lease;
pub mod names;
pub mod outcome;
pub mod said;
pub mod subject;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kv_core::id::WorkerId;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Duration, Instant};

use crate::config::Config;
use crate::envoy::{cluster, endpoints_of};
use crate::metrics::{Kind, Metrics};
use crate::xds::Assignments;
use lease::{Lease, Leases};
use names::{Name, Names};
use outcome::{Outcome, RegisterError};
use said::Said;

/// Asks that one change of the workers takes up.
const BATCH: usize = 256;

/// What the keeper of the workers is asked.
#[derive(Debug)]
pub enum Ask {
    /// A worker registers, or extends its lease.
    Join(Box<Said>, oneshot::Sender<Result<Joined, RegisterError>>),
    /// A worker extends its lease.
    Renew(WorkerId, oneshot::Sender<Result<Joined, RegisterError>>),
    /// A worker leaves.
    Leave(WorkerId, oneshot::Sender<Result<(), RegisterError>>),
    /// A name stands for these.
    Resolved(Name, std::collections::BTreeSet<SocketAddr>),
}

/// The answer to a worker that registered.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Joined {
    /// The worker.
    pub id: WorkerId,
    /// Its pool.
    pub pool: String,
    /// What its registration did.
    pub outcome: Outcome,
    /// How long it counts, seconds.
    pub ttl_secs: f64,
}

/// Where workers register, and who has. Clones share it.
#[derive(Clone, Debug)]
pub struct Front {
    asks: mpsc::Sender<Ask>,
    leases: Arc<Mutex<Leases>>,
    started: Instant,
}

impl Front {
    /// Where to ask.
    #[must_use]
    pub fn asks(&self) -> &mpsc::Sender<Ask> {
        &self.asks
    }

    /// Every lease.
    #[must_use]
    pub fn leases(&self) -> Vec<Lease> {
        lock(&self.leases).list(since(self.started))
    }
}

/// Keeps them.
#[derive(Debug)]
pub struct Fleet {
    leases: Arc<Mutex<Leases>>,
    names: Names,
    asked: mpsc::Receiver<Ask>,
    started: Instant,
    metrics: Arc<Metrics>,
}

/// What a round of asks has come to. The askers are answered when it is in force.
#[derive(Default)]
pub struct Round {
    /// Whether workers have changed.
    pub is_changed: bool,
    answers: Vec<Box<dyn FnOnce() + Send>>,
}

impl Round {
    /// Answers everybody.
    pub fn answer(self) {
        for answer in self.answers {
            answer();
        }
    }

    fn reply<T: Send + 'static>(&mut self, to: oneshot::Sender<T>, answer: T) {
        // Whoever asked may have gone away.
        self.answers.push(Box::new(move || drop(to.send(answer))));
    }
}

impl Fleet {
    /// Those who were registered when the sidecar last ran, for one lease more. Also gives where to
    /// ask.
    #[must_use]
    pub fn restore(config: &Config, metrics: Arc<Metrics>) -> (Self, Front) {
        let (asks, asked) = mpsc::channel(BATCH);
        let file = config
            .state_dir
            .as_deref()
            .map(|dir| dir.join("workers.json"));
        let mut fleet = Self {
            leases: Arc::new(Mutex::new(Leases::restore(file, config, 0))),
            names: Names::new(asks.clone(), Arc::clone(&metrics)),
            asked,
            started: Instant::now(),
            metrics,
        };
        fleet.names.configure(config);
        fleet.measure();
        let front = Front {
            asks,
            leases: Arc::clone(&fleet.leases),
            started: fleet.started,
        };
        (fleet, front)
    }

    /// The configuration with them.
    #[must_use]
    pub fn over(&self, config: Config) -> Config {
        self.names.over(lock(&self.leases).over(config))
    }

    /// Brings the names in line with a configuration.
    pub fn configure(&mut self, config: &Config) {
        self.names.configure(config);
    }

    /// Waits until somebody asks or a lease has run out; then there may be no asks. Breaking the
    /// wait off loses nothing.
    pub async fn due(&mut self) -> Vec<Ask> {
        let expiry = lock(&self.leases).next_expiry();
        let expired = async {
            match expiry {
                Some(at) => {
                    tokio::time::sleep_until(self.started + Duration::from_millis(at)).await;
                }
                None => std::future::pending().await,
            }
        };
        let mut asks = Vec::new();
        tokio::select! {
            ask = self.asked.recv() => asks.extend(ask),
            () = expired => {}
        }
        while asks.len() < BATCH
            && let Ok(ask) = self.asked.try_recv()
        {
            asks.push(ask);
        }
        asks
    }

    /// Takes asks up. `base` is the configuration without what registered.
    pub fn take(&mut self, base: &Config, asks: Vec<Ask>) -> Round {
        let now_ms = since(self.started);
        let mut round = Round::default();
        let shared = Arc::clone(&self.leases);
        let mut leases = lock(&shared);
        for ask in asks {
            match ask {
                Ask::Join(said, reply) => {
                    let joined = leases.join(base, *said, now_ms);
                    self.joined(joined, reply, &mut round);
                }
                Ask::Renew(worker, reply) => {
                    let joined = leases.renew(worker, now_ms);
                    self.joined(joined, reply, &mut round);
                }
                Ask::Leave(worker, reply) => {
                    let left = leases.leave(base, worker);
                    round.is_changed |= left.is_ok();
                    self.count(if left.is_ok() { "left" } else { "refused" });
                    round.reply(reply, left);
                }
                Ask::Resolved(name, addresses) => {
                    round.is_changed |= self.names.resolved(&name, addresses);
                }
            }
        }
        for worker in leases.expire(now_ms) {
            tracing::warn!(worker, "a worker's lease has run out");
            self.count("expired");
            round.is_changed = true;
        }
        if round.is_changed {
            leases.save();
        }
        drop(leases);
        self.measure();
        round
    }

    fn joined(
        &self,
        joined: Result<Joined, RegisterError>,
        reply: oneshot::Sender<Result<Joined, RegisterError>>,
        round: &mut Round,
    ) {
        let kind = joined.as_ref().map_or("refused", |j| j.outcome.kind());
        self.count(kind);
        round.is_changed |= joined.as_ref().is_ok_and(|j| j.outcome != Outcome::Renewed);
        round.reply(reply, joined);
    }

    fn count(&self, kind: &'static str) {
        self.metrics
            .registrations
            .get_or_create(&Kind { kind })
            .inc();
    }

    fn measure(&self) {
        let registered = i64::try_from(lock(&self.leases).len()).unwrap_or(i64::MAX);
        self.metrics.registered.set(registered);
    }
}

/// Milliseconds since then.
fn since(started: Instant) -> u64 {
    u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX)
}

fn lock(leases: &Mutex<Leases>) -> MutexGuard<'_, Leases> {
    // A panic can't leave them half changed.
    leases.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The endpoints that Envoys are to know on the way from one set of workers to another: those of
/// both.
#[must_use]
pub fn both(before: &Config, after: &Config) -> Assignments {
    let mut both = assignments(before);
    for (cluster, endpoints) in assignments(after) {
        both.entry(cluster).or_default().extend(endpoints);
    }
    both
}

/// The endpoints of each pool that takes requests.
#[must_use]
pub fn assignments(config: &Config) -> Assignments {
    let routed = config
        .pools
        .iter()
        .filter(|pool| pool.routing_group.is_none());
    let of = |pool: &crate::config::Pool| {
        let endpoints = endpoints_of(pool).into_iter().collect();
        (cluster(&pool.name), endpoints)
    };
    routed.map(of).collect::<BTreeMap<_, _>>()
}

/// Where the state of registered workers is kept.
pub(crate) type StateFile = Option<PathBuf>;
