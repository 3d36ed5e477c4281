//! Failures that proxies report into who takes requests.

use std::net::SocketAddr;
use std::time::Duration;

use kv_core::id::{Role, WorkerId};
use kv_core::report::{Failure, OwnerKey};
use tokio::net::TcpStream;

use super::Service;
use crate::ejection::{Due, Why};
use crate::metrics::Kind;

/// How long a worker may take to accept a connection.
const PROBE: Duration = Duration::from_secs(1);

impl Service {
    /// A worker has failed a request.
    pub(super) fn worker_failed(&mut self, owner: OwnerKey, failure: Failure) {
        let kind = failure.name();
        self.metrics
            .worker_failures
            .get_or_create(&Kind { kind })
            .inc();
        let worker = owner.id.worker;
        if !self.ejects || self.roster.worker(worker).is_none() {
            return;
        }
        if let Some(due) = self.ejection.failed(worker, failure) {
            self.treat(worker, due);
        }
    }

    /// A worker has answered a request to its end.
    pub(super) fn worker_answered(&mut self, worker: WorkerId) {
        self.ejection.answered(worker);
    }

    /// Looks at those whose pause is over.
    pub(super) fn tick_health(&mut self) {
        for worker in self.ejection.due(self.now_ms()) {
            self.treat(worker, Due::Probe);
        }
        let out = i64::try_from(self.ejection.out()).unwrap_or(i64::MAX);
        self.metrics.workers_out.set(out);
    }

    /// Workers have joined or left, or none is left out any more.
    pub(super) fn reconfigure_health(&mut self) {
        let roster = &mut self.roster;
        let known: std::collections::HashSet<WorkerId> =
            roster.workers().map(|w| w.config.id).collect();
        let ejects = self.ejects;
        self.ejection
            .keep(|worker| ejects && known.contains(&worker));
    }

    /// Somebody has looked whether a worker is there.
    pub(super) fn worker_probed(&mut self, worker: WorkerId, is_there: bool) {
        let now_ms = self.now_ms();
        if let Some(due) = self.ejection.probed(worker, is_there, now_ms) {
            self.treat(worker, due);
        }
    }

    fn treat(&mut self, worker: WorkerId, due: Due) {
        let kind = match due {
            Due::Probe => {
                let known = self.roster.worker(worker);
                if let Some(endpoint) = known.and_then(|(_, known)| known.config.endpoint) {
                    self.probes.spawn(probe(worker, endpoint));
                }
                return;
            }
            Due::LeaveOut(why) => self.leave_out(worker, why),
            Due::TakeBack => {
                tracing::info!(
                    worker,
                    "worker accepts connections again, it takes requests"
                );
                "returned"
            }
        };
        self.metrics
            .worker_changes
            .get_or_create(&Kind { kind })
            .inc();
        if kind != "spared" {
            self.serve_owners();
            self.publish_table(None);
        }
    }

    fn leave_out(&mut self, worker: WorkerId, why: Why) -> &'static str {
        let Some((number, _)) = self.roster.worker(worker) else {
            return "spared";
        };
        let Some(pool) = self.roster.pools.get(number) else {
            return "spared";
        };
        let takes = |w: &&super::roster::Worker| w.config.role == Role::Aggregated;
        let all = pool.workers.values().filter(takes);
        let left = all
            .clone()
            .filter(|w| w.config.id != worker && self.ejection.is_in(w.config.id));
        let kind = why.kind();
        if left.count() < why.floor(all.count()) {
            tracing::warn!(worker, kind, "worker fails, but too few others are left");
            return "spared";
        }
        tracing::warn!(worker, kind, "worker takes no requests for a while");
        let owners = pool.workers.get(&worker);
        let slots: Vec<_> =
            owners.map_or_else(Vec::new, |w| w.owners.iter().map(|o| o.slot).collect());
        self.ejection.left_out(worker, self.now_ms());
        // Who comes back may be another process; with events, it says so itself.
        for slot in slots {
            self.unpredict_owner(number, slot);
        }
        kind
    }
}

/// Whether a worker accepts connections.
async fn probe(worker: WorkerId, endpoint: SocketAddr) -> (WorkerId, bool) {
    let connected = tokio::time::timeout(PROBE, TcpStream::connect(endpoint)).await;
    (worker, matches!(connected, Ok(Ok(_))))
}
