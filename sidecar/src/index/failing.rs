//! Failures that proxies report into who takes requests.

use kv_core::id::{Role, WorkerId};
use kv_core::report::{Failure, OwnerKey};

use super::{Service, unix_ms};
use crate::ejection::{Due, Look, Why};
use crate::metrics::Kind;

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

    /// Looks at those whose pause is over, and at all others every now and then, if that is wanted.
    pub(super) fn tick_health(&mut self) {
        let now_ms = self.now_ms();
        for worker in self.ejection.due(now_ms) {
            self.treat(worker, Due::Probe);
        }
        if let Some(interval_ms) = self.looker.interval_ms() {
            let takes = |w: &&mut super::roster::Worker| w.config.endpoint.is_some();
            let workers = self.roster.workers().filter(takes);
            let workers: Vec<WorkerId> = workers.map(|w| w.config.id).collect();
            for worker in workers {
                let next = self.next_looks.entry(worker).or_insert(now_ms);
                if *next <= now_ms && self.ejection.begin_look(worker) {
                    *next = now_ms.saturating_add(interval_ms);
                    self.treat(worker, Due::Probe);
                }
            }
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
        self.next_looks.retain(|worker, _| known.contains(worker));
    }

    /// Somebody has looked at a worker.
    pub(super) fn worker_looked_at(&mut self, worker: WorkerId, look: Look) {
        let now_ms = self.now_ms();
        let unwell = self.looker.unwell_after();
        if let Some(due) = self.ejection.looked(worker, look, unwell, now_ms) {
            self.treat(worker, due);
        }
    }

    fn treat(&mut self, worker: WorkerId, due: Due) {
        let kind = match due {
            Due::Probe => {
                let known = self.roster.worker(worker);
                if let Some(endpoint) = known.and_then(|(_, known)| known.config.endpoint) {
                    let looker = self.looker.clone();
                    let look = async move { (worker, looker.look(endpoint).await) };
                    self.probes.spawn(look);
                }
                return;
            }
            Due::LeaveOut(why) => self.leave_out(worker, why),
            Due::TakeBack => {
                tracing::info!(worker, "worker is well again, it takes requests");
                if let Some((_, known)) = self.roster.worker(worker) {
                    known.since_ms = unix_ms();
                }
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
        let takes =
            |w: &&super::roster::Worker| w.config.role == Role::Aggregated && !w.config.draining;
        let all = pool.workers.values().filter(takes);
        let left = all
            .clone()
            .filter(|w| w.config.id != worker && self.ejection.is_in(w.config.id));
        let kind = why.kind();
        if left.count() < why.floor(all.count(), self.eject_floor) {
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
