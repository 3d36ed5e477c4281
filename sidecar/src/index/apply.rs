//! Events and snapshots into the index.

use kv_core::event::{EventData, RouterEvent, SnapshotPart};
use kv_core::id::{Family, Slot, Tier, WorkerId};
use kv_core::index::Applied;
use tokio::time::Instant;

use super::cursor::{Cursor, Step};
use super::knowledge::Knowledge;
use super::repair::{PAUSE, RETRY, Repair, Snapshot};
use super::report::by_kind;
use super::{MAX_RECEIVED, Service};
use crate::ingest::{Arrival, Decoded, NoSnapshot, Plane, Rejection, decode};
use crate::metrics::{InPool, Kind, PlaneKind};

impl Service {
    pub(super) fn arrived(&mut self, arrival: Arrival) {
        match arrival {
            Arrival::Connected(plane) => {
                self.connected.insert(plane);
                if plane == Plane::Json {
                    let workers: Vec<_> = self.roster.workers().map(|w| w.config.id).collect();
                    for worker in workers {
                        self.begin_repair(worker, false);
                    }
                }
            }
            Arrival::Disconnected(plane) => {
                self.connected.remove(&plane);
            }
            Arrival::Events {
                plane,
                received_ns,
                decoded,
            } => {
                self.counts.plane(plane).messages += 1;
                self.saving.touch();
                self.events(plane, decoded);
                // Nothing that a flush would show has no time of being shown.
                if self.index.is_dirty() && self.received_ns.len() < MAX_RECEIVED {
                    self.received_ns.push(received_ns);
                }
            }
            Arrival::Snapshot { worker, part } => self.snapshot(worker, part),
            Arrival::Batch(origin, plane, batch) => self.batch(origin, plane, batch),
            Arrival::Turn(origin, plane, turn) => self.turn(origin, plane, turn),
        }
    }

    fn events(&mut self, plane: Plane, decoded: Decoded) {
        for rejection in decoded.rejected {
            self.reject(plane, rejection);
        }
        for event in decoded.events {
            let worker = event.worker_id;
            let outcome = match (plane, self.may_speak(worker, plane)) {
                (Plane::Json, Ok(())) => self.json(event),
                // Dynamo numbers events in this way whatever carries them.
                (_, Ok(())) => self.dynamo(plane, &event, decoded.publisher),
                (Plane::Dynamo, Err(Rejection::UnknownWorker)) => {
                    let at = Instant::now();
                    self.strangers.take(&event, decoded.publisher, at)
                }
                (_, Err(rejection)) => Err(rejection),
            };
            if let Err(rejection) = outcome {
                self.reject_of(worker, plane, rejection);
            }
        }
    }

    pub(super) fn reject(&mut self, plane: Plane, rejection: Rejection) {
        self.counts.plane(plane).reject(rejection.kind());
        let (plane, kind) = (plane.kind(), rejection.kind());
        self.metrics
            .rejections
            .get_or_create(&PlaneKind { plane, kind })
            .inc();
    }

    /// Dynamo numbers events per rank, and a restarted publisher is another one.
    fn dynamo(
        &mut self,
        plane: Plane,
        event: &RouterEvent,
        publisher: Option<u64>,
    ) -> Result<(), Rejection> {
        let (pool, worker) = self
            .roster
            .worker(event.worker_id)
            .ok_or(Rejection::UnknownWorker)?;
        let owner = worker
            .owner_mut(event.event.dp_rank)
            .ok_or(Rejection::UnknownRank)?;
        let (slot, before) = (owner.slot, owner.dynamo.last);
        let (id, rank) = (event.event.event_id, event.event.dp_rank);
        match owner.dynamo.step(id, publisher) {
            Step::Next => {}
            Step::Back => return Err(Rejection::DuplicateId),
            Step::First(is_whole) => owner.knowledge = Knowledge::of(is_whole),
            Step::Gap => {
                let missing = before.map_or(0, |last| id.saturating_sub(last + 1));
                self.lost(event.worker_id, rank, missing);
            }
            Step::Restart => {
                owner.knowledge = Knowledge::of(id <= 1);
                self.drop_blocks(pool, slot);
            }
        }
        self.apply(plane, event)
    }

    /// Plain JSON events are numbered per worker, and a worker can be asked for everything.
    fn json(&mut self, event: RouterEvent) -> Result<(), Rejection> {
        let (pool, worker) = self
            .roster
            .worker(event.worker_id)
            .ok_or(Rejection::UnknownWorker)?;
        let rank = event.event.dp_rank;
        if worker.owner(rank).is_none() {
            return Err(Rejection::UnknownRank);
        }
        let id = event.worker_id;
        if let Some(repair) = &mut worker.repair {
            if let Err(why) = repair.hold(event) {
                self.end_repair(id, Err(why));
            }
            return Ok(());
        }
        let mut cursor = worker.json;
        let step = cursor.step(event.event.event_id, None);
        match step {
            Step::Next => {
                worker.json = cursor;
                return self.apply(Plane::Json, &event);
            }
            Step::First(true) => {
                worker.json = cursor;
                worker.know(Knowledge::Whole);
                return self.apply(Plane::Json, &event);
            }
            Step::Gap => {
                if let Some(owner) = worker.owner_mut(rank) {
                    owner.gaps += 1;
                }
                self.count_gap(pool);
            }
            Step::First(false) | Step::Back | Step::Restart => {}
        }
        self.begin_repair(id, step == Step::Back);
        // Held back; the repair has room for it.
        self.json(event)
    }

    /// Applies an event whose worker and rank are known.
    fn apply(&mut self, plane: Plane, event: &RouterEvent) -> Result<(), Rejection> {
        let (pool, worker) = self
            .roster
            .worker(event.worker_id)
            .ok_or(Rejection::UnknownWorker)?;
        let owner = worker
            .owner_mut(event.event.dp_rank)
            .ok_or(Rejection::UnknownRank)?;
        let slot = owner.slot;
        let data = &event.event.data;
        let is_cleared = *data == EventData::Cleared;
        if is_cleared {
            owner.knowledge = Knowledge::Whole;
        }
        self.heard(event.worker_id, event.event.dp_rank);
        // A clear is one of all tiers.
        let tier = (!is_cleared).then(|| event.storage_tier.into());
        self.apply_data(plane, (pool, slot), Family::Dynamo, tier, data);
        Ok(())
    }

    /// Applies a change of what an owner, given by pool and slot, holds of a family. A clear is one
    /// of all families, and of all tiers if it names none.
    pub(super) fn apply_data(
        &mut self,
        plane: Plane,
        (pool, slot): (usize, Slot),
        family: Family,
        tier: Option<Tier>,
        data: &EventData,
    ) {
        if let Some(tokens) = self.tokens.as_mut().filter(|_| family == Family::Dynamo) {
            tokens.note(pool, data);
        }
        let doubtful = self.vouch(pool, family, slot, tier, data);
        let mut applied = match (data, tier) {
            (EventData::Cleared, Some(tier)) => {
                let removed = self.index.clear_tier(pool, slot, tier);
                if tier == Tier::Device {
                    self.forget_predictions(pool, slot);
                }
                Applied {
                    removed,
                    ..Applied::default()
                }
            }
            (EventData::Cleared, None) => {
                let removed = self.index.remove_owner(pool, slot);
                self.drop_blocks(pool, slot);
                Applied {
                    removed,
                    ..Applied::default()
                }
            }
            (_, tier) => {
                let tier = tier.unwrap_or_default();
                self.index.apply_family(pool, family, slot, tier, data)
            }
        };
        // Those were known, though they counted for nothing.
        applied.unknown = applied.unknown.saturating_sub(doubtful);
        applied.removed += doubtful;
        let kind = match data {
            EventData::Stored(_) => "stored",
            EventData::Removed(_) => "removed",
            EventData::Cleared => "cleared",
        };
        self.counts.plane(plane).apply(kind);
        let plane = plane.kind();
        self.metrics
            .events
            .get_or_create(&PlaneKind { plane, kind })
            .inc();
        self.count_applied(&applied);
    }

    fn count_applied(&mut self, applied: &Applied) {
        self.counts.add(applied);
        for (kind, blocks) in by_kind(applied) {
            if blocks > 0 {
                let counter = self.metrics.changes.get_or_create(&Kind { kind });
                counter.inc_by(u64::from(blocks));
            }
        }
    }

    pub(super) fn count_gap(&mut self, pool: usize) {
        self.counts.gaps += 1;
        if let Some(pool) = self.roster.pools.get(pool) {
            let pool = pool.config.name.clone();
            self.metrics.gaps.get_or_create(&InPool { pool }).inc();
        }
    }

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

    fn snapshot(&mut self, id: WorkerId, part: Result<SnapshotPart, NoSnapshot>) {
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
    fn end_repair(&mut self, id: WorkerId, outcome: Result<Snapshot, NoSnapshot>) {
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
        self.count_applied(&applied);
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
            if let Err(rejection) = self.apply(Plane::Json, &event) {
                self.reject_of(id, Plane::Json, rejection);
            }
        }
    }
}
