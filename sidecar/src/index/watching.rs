//! Looks after workers whose events don't agree with what they do.

use kv_core::id::{DpRank, Slot, WorkerId};
use kv_core::report::OwnerKey;
use tokio::time::Instant;

use super::health::{Ailment, Change};
use super::knowledge::Knowledge;
use super::{Service, roster};
use crate::ingest::{Plane, Rejection};
use crate::metrics::{Kind, OfWorker};

impl Service {
    /// An event of an owner is about to be applied.
    pub(super) fn heard(&mut self, id: WorkerId, rank: DpRank) {
        let worker = self.roster.worker(id);
        if let Some(change) = worker.and_then(|(_, worker)| worker.hear(rank, Instant::now())) {
            self.changed(id, &change);
        }
    }

    /// An event of a worker is dropped.
    pub(super) fn reject_of(&mut self, id: WorkerId, plane: Plane, rejection: Rejection) {
        self.reject(plane, rejection);
        let Some((_, worker)) = self.roster.worker(id) else {
            return;
        };
        let kind = rejection.kind();
        let begins = worker.health.dropped(kind, Instant::now());
        // Repetitions come with every new connection; the other two are told elsewhere.
        let is_worth_telling = !matches!(
            rejection,
            Rejection::DuplicateId | Rejection::OtherSource | Rejection::EventsOff
        );
        if begins && is_worth_telling {
            let plane = plane.kind();
            tracing::warn!(worker = id, plane, kind, "events of a worker are dropped");
        }
    }

    /// A request was answered to its end: its prompt is in the worker's cache, and an event should
    /// have said so.
    pub(super) fn prompt_computed(&mut self, owner: OwnerKey, last: u64) {
        let number = usize::from(owner.pool);
        let Some((pool, worker)) = self.roster.worker(owner.id.worker) else {
            return;
        };
        let slot = worker.owner(owner.id.rank).map(|owner| owner.slot);
        let Some(slot) = slot.filter(|_| pool == number) else {
            return;
        };
        let doubt = self.doubts.get(&(pool, slot));
        let is_held = self.index.holds(pool, slot, last) || doubt.is_some_and(|d| d.has(last));
        if let Some((_, worker)) = self.roster.worker(owner.id.worker) {
            let at = Instant::now();
            worker.health.computed(slot, last, is_held, at);
        }
    }

    /// A worker has said what it found in its cache of a prompt.
    pub(super) fn cache_found(
        &mut self,
        owner: OwnerKey,
        prompt: &[u64],
        predicted: u32,
        found: u32,
    ) {
        let Some((pool, worker)) = self.roster.worker(owner.id.worker) else {
            return;
        };
        let Some(slot) = worker.owner(owner.id.rank).map(|owner| owner.slot) else {
            return;
        };
        let is_held_back = worker.repair.is_some();
        let Some(config) = self.roster.pools.get(pool).map(|pool| &pool.config) else {
            return;
        };
        let label = OfWorker {
            pool: config.name.clone(),
            worker: owner.id.worker,
        };
        let (p, f) = (u64::from(predicted), u64::from(found));
        self.metrics
            .predicted_tokens
            .get_or_create(&label)
            .inc_by(p);
        self.metrics.found_tokens.get_or_create(&label).inc_by(f);
        let blocks = found / config.block_size.max(1);
        let there = prompt.get(..blocks as usize).unwrap_or(prompt);
        let there = there.to_vec();
        // What events have said since the decision, or would have, is no fault of theirs.
        let is_said = there.last().is_some_and(|last| {
            let doubt = self.doubts.get(&(pool, slot));
            self.index.holds(pool, slot, *last) || doubt.is_some_and(|d| d.has(*last))
        });
        let is_late = found > predicted && (is_said || is_held_back);
        if let Some((_, worker)) = self.roster.worker(owner.id.worker) {
            let predicted = if is_late { found } else { predicted };
            worker.health.answered(predicted, found);
        }
        self.vouch_for_prompt(pool, slot, &there);
    }

    /// A worker without an endpoint has got one: what was heard of it counts.
    pub(super) fn adopt_stranger(&mut self, id: WorkerId) {
        for known in self.strangers.adopt(id) {
            if !self.takes_events(id) {
                return;
            }
            let Some((pool, worker)) = self.roster.worker(id) else {
                return;
            };
            if worker
                .source
                .plane()
                .is_some_and(|plane| plane != Plane::Dynamo)
            {
                return;
            }
            let Some(owner) = worker.owner_mut(known.rank) else {
                continue;
            };
            owner.dynamo = known.cursor;
            owner.knowledge = known.knowledge;
            owner.gaps = known.gaps;
            let slot = owner.slot;
            self.index.restore(pool, slot, &known.blocks);
        }
    }

    /// Judges all workers.
    pub(super) fn judge_workers(&mut self) {
        let at = Instant::now();
        let connected = self.connected.clone();
        let mut changes = Vec::new();
        let (index, doubts) = (&self.index, &self.doubts);
        for (number, pool) in self.roster.pools.iter_mut().enumerate() {
            if !pool.config.kv_events {
                continue;
            }
            let is_held = |slot: Slot, last: u64| {
                let doubt = doubts.get(&(number, slot));
                index.holds(number, slot, last) || doubt.is_some_and(|d| d.has(last))
            };
            for worker in pool.workers.values_mut() {
                // Of a plane that is down everybody knows; one never heard may be named wrongly.
                let heard = worker.source.heard_at().and(worker.source.plane());
                let is_down = |plane: Plane| plane.is_shared() && !connected.contains(&plane);
                let change = worker
                    .health
                    .judge(at, !heard.is_some_and(is_down), is_held);
                changes.extend(change.map(|change| (worker.config.id, change)));
            }
        }
        for (id, change) in changes {
            self.changed(id, &change);
        }
    }

    pub(super) fn changed(&mut self, id: WorkerId, change: &Change) {
        let Some((pool, worker)) = self.roster.worker(id) else {
            return;
        };
        let accuracy = worker.health.accuracy();
        let slots: Vec<_> = worker.owners.iter().map(|owner| owner.slot).collect();
        match change {
            Change::Fell(ailment) => {
                tell(id, *ailment, accuracy);
                let is_stale = ailment.is_stale();
                for owner in worker.owners.iter_mut().filter(|_| is_stale) {
                    owner.knowledge = owner.knowledge.min(Knowledge::Partial);
                }
                for slot in slots.into_iter().filter(|_| is_stale) {
                    self.set_aside(pool, slot);
                }
                if is_stale && self.is_asked_for_snapshots(id) {
                    self.begin_repair(id, false);
                }
            }
            Change::Recovered(ailment) => {
                let was = ailment.kind();
                tracing::info!(worker = id, was, "events of the worker count again");
                for slot in slots {
                    self.unpredict_owner(pool, slot);
                }
            }
        }
    }

    fn is_asked_for_snapshots(&mut self, id: WorkerId) -> bool {
        let is_connected = self.connected.contains(&Plane::Json);
        let worker = self.roster.worker(id);
        is_connected && worker.is_some_and(|(_, w)| w.source.plane() == Some(Plane::Json))
    }

    /// Health into the metrics.
    pub(super) fn measure_health(&mut self) {
        let at = Instant::now();
        let doubtful: usize = self.doubts.values().map(super::doubt::Doubt::len).sum();
        self.metrics.doubtful.set(doubtful as i64);
        self.metrics.strangers.set(self.strangers.len() as i64);
        let workers = || self.roster.pools.iter().flat_map(|p| p.workers.values());
        let count = |kind: &'static str, is_so: &dyn Fn(&roster::Worker) -> bool| {
            let count = workers().filter(|worker| is_so(worker)).count();
            let gauge = self.metrics.unwell.get_or_create(&Kind { kind });
            gauge.set(count as i64);
        };
        for kind in Ailment::KINDS {
            count(kind, &|w| {
                w.health.ailment().is_some_and(|a| a.kind() == kind)
            });
        }
        count("dropping", &|w| w.health.is_dropping(at));
        count("two_sources", &|w| w.source.refused(at).next().is_some());
        for pool in &self.roster.pools {
            for (id, worker) in &pool.workers {
                let Some(accuracy) = worker.health.accuracy() else {
                    continue;
                };
                let label = OfWorker {
                    pool: pool.config.name.clone(),
                    worker: *id,
                };
                self.metrics.accuracy.get_or_create(&label).set(accuracy);
            }
        }
    }
}

fn tell(id: WorkerId, ailment: Ailment, accuracy: Option<f64>) {
    match ailment {
        Ailment::Silent => tracing::error!(
            worker = id,
            "the worker serves requests and publishes no events, its blocks are predicted"
        ),
        Ailment::Dropped(kind) => tracing::error!(
            worker = id,
            kind,
            "all events of the worker are dropped, its blocks are predicted"
        ),
        Ailment::Mismatched => tracing::error!(
            worker = id,
            "the worker's events never name what it computes, its blocks are predicted; \
             compare block sizes"
        ),
        Ailment::Inaccurate { is_over } => tracing::error!(
            worker = id,
            accuracy,
            finds_less = is_over,
            "the worker's cache is not what its events say, its blocks are predicted"
        ),
    }
}
