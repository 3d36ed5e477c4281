//! Events into the index.

use kv_core::event::{EventData, RouterEvent};
use kv_core::id::{Family, Slot, Tier};
use kv_core::index::Applied;
use tokio::time::Instant;

use super::cursor::Step;
use super::knowledge::Knowledge;
use super::{MAX_RECEIVED, Service};
use crate::ingest::{Arrival, Decoded, Plane, Rejection};
use crate::metrics::{InPool, PlaneKind};

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
                self.tally.plane(plane).messages += 1;
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
        let at = Instant::now();
        // Who may speak at the beginning of a message may to its end.
        let mut speaker = None;
        for event in decoded.events {
            let worker = event.worker_id;
            let may_speak = if speaker == Some(worker) {
                Ok(())
            } else {
                self.may_speak(worker, plane)
            };
            speaker = may_speak.is_ok().then_some(worker);
            let outcome = match (plane, may_speak) {
                (Plane::Json, Ok(())) => self.json(event),
                // Dynamo numbers events in this way whatever carries them.
                (_, Ok(())) => self.dynamo(plane, &event, decoded.publisher, at),
                (Plane::Dynamo, Err(Rejection::UnknownWorker)) => {
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
        self.tally.plane(plane).reject(rejection.kind());
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
        at: Instant,
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
        self.apply(plane, event, at)
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
        let (id, at) = (event.worker_id, Instant::now());
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
                return self.apply(Plane::Json, &event, at);
            }
            Step::First(true) => {
                worker.json = cursor;
                worker.know(Knowledge::Whole);
                return self.apply(Plane::Json, &event, at);
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
    pub(super) fn apply(
        &mut self,
        plane: Plane,
        event: &RouterEvent,
        at: Instant,
    ) -> Result<(), Rejection> {
        let (id, rank) = (event.worker_id, event.event.dp_rank);
        let (pool, worker) = self.roster.worker(id).ok_or(Rejection::UnknownWorker)?;
        let owner = worker.owner_mut(rank).ok_or(Rejection::UnknownRank)?;
        let slot = owner.slot;
        let data = &event.event.data;
        let is_cleared = *data == EventData::Cleared;
        if is_cleared {
            owner.knowledge = Knowledge::Whole;
        }
        if let Some(change) = worker.hear(rank, at) {
            self.changed(id, &change);
        }
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
        self.tally.plane(plane).apply(data);
        self.tally.add(&applied);
    }

    pub(super) fn count_gap(&mut self, pool: usize) {
        self.tally.gaps += 1;
        if let Some(pool) = self.roster.pools.get(pool) {
            let pool = pool.config.name.clone();
            self.metrics.gaps.get_or_create(&InPool { pool }).inc();
        }
    }
}
