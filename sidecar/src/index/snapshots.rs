//! Snapshots of workers on the JSON plane: asked for after a loss, taken in place of what is known.

use kv_core::event::{RouterEvent, SnapshotPart};
use kv_core::id::WorkerId;
use tokio::time::Instant;

use super::Service;
use super::cursor::{Cursor, Step};
use super::knowledge::Knowledge;
use super::repair::{PAUSE, RETRY, Repair, Snapshot};
use crate::ingest::{NoSnapshot, Plane, Rejection, decode};
use crate::metrics::Kind;

impl Service {
    /// Asks a worker for its snapshot and holds its events back meanwhile.
    pub(super) fn begin_repair(&mut self, id: WorkerId, restarted: bool) {
        if !self.takes_events(id) {
            return;
        }
        let Some((_, worker)) = self.roster.worker(id) else {
            return;
        };
        if worker
            .source
            .plane()
            .is_some_and(|plane| plane != Plane::Json)
        {
            return;
        }
        let at = Instant::now();
        let ask_at = worker.ask_from.map_or(at, |from| from.max(at));
        worker.repair = Some(Repair::new(ask_at, restarted, worker.repair.take()));
        self.ask(id);
    }

    /// Asks a worker for its snapshot, if it is time.
    fn ask(&mut self, id: WorkerId) {
        let Some((_, worker)) = self.roster.worker(id) else {
            return;
        };
        let at = Instant::now();
        if !worker.repair.as_mut().is_some_and(|repair| repair.asks(at)) {
            return;
        }
        worker.ask_from = Some(at + PAUSE);
        if self.requests.try_send(id).is_err() {
            // One request to a worker at a time: there is room unless the source has stopped.
            self.end_repair(id, Err(NoSnapshot::Disconnected));
        }
    }

    /// Whether events of a worker are wanted; those of an unknown one are to be counted as such.
    pub(super) fn takes_events(&mut self, id: WorkerId) -> bool {
        let pool = self.roster.worker(id).map(|(pool, _)| pool);
        let pool = pool.and_then(|pool| self.roster.pools.get(pool));
        pool.is_none_or(|pool| pool.config.kv_events)
    }

    pub(super) fn snapshot(&mut self, id: WorkerId, part: Result<SnapshotPart, NoSnapshot>) {
        let repair = self.roster.worker(id).and_then(|(_, w)| w.repair.as_mut());
        let Some(repair) = repair else {
            self.reject(Plane::Json, Rejection::UnaskedSnapshot);
            return;
        };
        match part.and_then(|part| repair.take(part)) {
            Ok(None) => {}
            Ok(Some(snapshot)) => self.end_repair(id, Ok(snapshot)),
            Err(why) => self.end_repair(id, Err(why)),
        }
    }

    /// Asks, gives up and asks again where it is time to.
    pub(super) fn look_after_repairs(&mut self) {
        let at = Instant::now();
        // Only workers that use the plane: others would never answer.
        let again = self.roster.workers().filter(|worker| {
            worker.repair.is_none()
                && worker.json.last.is_some()
                && worker
                    .owners
                    .iter()
                    .any(|o| o.knowledge != Knowledge::Whole)
                && worker.ask_from.is_none_or(|from| at >= from + RETRY)
        });
        let again: Vec<_> = again.map(|worker| worker.config.id).collect();
        if self.connected.contains(&Plane::Json) {
            for id in again {
                self.begin_repair(id, false);
            }
        }
        let repairing = self.roster.workers().filter_map(|worker| {
            let repair = worker.repair.as_ref()?;
            Some((worker.config.id, repair.is_overdue(at)))
        });
        for (id, is_overdue) in repairing.collect::<Vec<_>>() {
            if is_overdue {
                self.end_repair(id, Err(NoSnapshot::Timeout));
            } else {
                self.ask(id);
            }
        }
    }

    /// Replaces what is known of a worker by its snapshot, where there is one, and applies what
    /// was held back.
    pub(super) fn end_repair(&mut self, id: WorkerId, outcome: Result<Snapshot, NoSnapshot>) {
        let Some((pool, worker)) = self.roster.worker(id) else {
            return;
        };
        let Some(repair) = worker.repair.take() else {
            return;
        };
        let slots: Vec<_> = worker.owners.iter().map(|o| o.slot).collect();
        let kind = outcome
            .as_ref()
            .map_or_else(|why| why.kind(), |_| "applied");
        let is_replaced = outcome.is_ok();
        let held = repair.held();
        let is_first_of_all = worker.json.last.is_none()
            && held.first().is_some_and(|first| first.event.event_id <= 1);
        // What came before the first event held back is lost.
        let first = held.first().map(|first| first.event.event_id);
        let missing = first.zip(worker.json.last);
        let missing = missing.map_or(0, |(first, last)| first.saturating_sub(last + 1));
        for slot in slots {
            if is_replaced || repair.restarted {
                self.drop_blocks(pool, slot);
            } else if missing > 0 {
                // Counted when it was found.
                self.put_in_doubt(pool, slot, missing);
            }
        }
        let Some((_, worker)) = self.roster.worker(id) else {
            return;
        };
        match outcome {
            Ok(snapshot) => {
                worker.json = Cursor::after(Some(snapshot.event_id));
                for event in &snapshot.events {
                    let fit = decode::fit(event).and_then(|()| self.apply_snapshot(id, event));
                    if let Err(rejection) = fit {
                        self.reject(Plane::Json, rejection);
                    }
                }
            }
            Err(_) => {
                if let Some(first) = first {
                    worker.json = Cursor::after(first.checked_sub(1));
                }
                tracing::warn!(
                    worker = id,
                    why = kind,
                    "no snapshot, going on with live events"
                );
            }
        }
        self.metrics.snapshots.get_or_create(&Kind { kind }).inc();
        let is_whole = is_replaced || is_first_of_all;
        if let Some((_, worker)) = self.roster.worker(id) {
            // Of one that neither answers nor publishes nothing is known.
            if is_whole || worker.json.last.is_some() {
                worker.know(Knowledge::of(is_whole));
            }
        }
        let held = repair.into_held();
        self.apply_held(id, held);
        self.saving.touch();
    }

    /// Stores of a snapshot count for the worker that sent it, whatever they say.
    fn apply_snapshot(&mut self, id: WorkerId, event: &RouterEvent) -> Result<(), Rejection> {
        if event.worker_id != id {
            return Err(Rejection::WorkerMismatch);
        }
        let (pool, worker) = self.roster.worker(id).ok_or(Rejection::UnknownWorker)?;
        let owner = worker
            .owner(event.event.dp_rank)
            .ok_or(Rejection::UnknownRank)?;
        let (slot, tier) = (owner.slot, event.storage_tier.into());
        let applied = self.index.apply(pool, slot, tier, &event.event.data);
        self.tally.add(&applied);
        Ok(())
    }

    fn apply_held(&mut self, id: WorkerId, held: Vec<RouterEvent>) {
        for event in held {
            let Some((_, worker)) = self.roster.worker(id) else {
                return;
            };
            let before = worker.json.last;
            let event_id = event.event.event_id;
            let step = worker.json.step(event_id, None);
            if step == Step::Back {
                // The snapshot includes it.
                continue;
            }
            if step == Step::Gap {
                let missing = before.map_or(0, |last| event_id.saturating_sub(last + 1));
                self.lost(id, event.event.dp_rank, missing);
            }
            if let Err(rejection) = self.apply(Plane::Json, &event, Instant::now()) {
                self.reject_of(id, Plane::Json, rejection);
            }
        }
    }
}
