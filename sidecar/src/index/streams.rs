//! Workers' own streams into the index.

use std::collections::HashMap;

use kv_core::event::EventData;
use kv_core::id::{DpRank, WorkerId};
use tokio::time::Instant;

use super::knowledge::{Knowledge, Stream, Taken};
use super::{MAX_RECEIVED, Service};
use crate::ingest::batch::{Batch, Change, Origin, Resume, Turn};
use crate::ingest::{Plane, Rejection};
use crate::metrics::PlaneKind;
use crate::state::StreamState;

/// Streams of one worker, above its ranks.
const MAX_STREAMS: usize = 1024;

impl Service {
    /// A message of a worker's own stream, which speaks for that worker alone.
    pub(super) fn batch(&mut self, origin: Origin, plane: Plane, batch: Batch) {
        self.tally.plane(plane).messages += 1;
        let (label, kind) = (plane.kind(), "events");
        let label = PlaneKind { plane: label, kind };
        self.metrics.messages.get_or_create(&label).inc();
        self.saving.touch();
        for rejection in batch.rejected {
            self.reject_of(origin.worker, plane, rejection);
        }
        if let Err(rejection) = self.may_speak(origin.worker, plane) {
            for _ in &batch.changes {
                self.reject_of(origin.worker, plane, rejection);
            }
            return;
        }
        for change in &batch.changes {
            if let Err(rejection) = self.change(origin, plane, change) {
                self.reject_of(origin.worker, plane, rejection);
            }
        }
        if let Some(stream) = self.stream(origin, plane) {
            let mark = batch.mark;
            stream.last = batch.sequence.map(|sequence| Resume {
                sequence,
                mark,
                is_whole: false,
            });
        }
        if self.index.is_dirty() && self.received_ns.len() < MAX_RECEIVED {
            self.received_ns.push(batch.received_ns);
        }
    }

    /// Whether events of a worker are taken from a plane.
    pub(super) fn may_speak(&mut self, id: WorkerId, plane: Plane) -> Result<(), Rejection> {
        if !self.takes_events(id) {
            return Err(Rejection::EventsOff);
        }
        let (pool, worker) = self.roster.worker(id).ok_or(Rejection::UnknownWorker)?;
        match worker.source.take(plane, Instant::now()) {
            Taken::Yes => Ok(()),
            Taken::No(is_first) => {
                if is_first {
                    let (used, plane) = (worker.source.plane().map(Plane::kind), plane.kind());
                    tracing::error!(
                        worker = id,
                        used,
                        refused = plane,
                        "two sources speak for one worker, one is not taken"
                    );
                }
                Err(Rejection::OtherSource)
            }
            Taken::Instead(before) => {
                let (before, plane) = (before.kind(), plane.kind());
                tracing::warn!(
                    worker = id,
                    before,
                    plane,
                    "events come from another source"
                );
                worker.json = Default::default();
                worker.streams.clear();
                let slots: Vec<_> = worker.owners.iter().map(|o| o.slot).collect();
                for owner in &mut worker.owners {
                    owner.dynamo = Default::default();
                    owner.knowledge = Knowledge::Partial;
                }
                for slot in slots {
                    self.drop_blocks(pool, slot);
                }
                Ok(())
            }
        }
    }

    fn change(&mut self, origin: Origin, plane: Plane, change: &Change) -> Result<(), Rejection> {
        let id = origin.worker;
        let (pool, worker) = self.roster.worker(id).ok_or(Rejection::UnknownWorker)?;
        let owner = worker
            .owner_mut(change.rank)
            .ok_or(Rejection::UnknownRank)?;
        let slot = owner.slot;
        if change.data == EventData::Cleared && change.tier.is_none() {
            owner.knowledge = Knowledge::Whole;
        } else if owner.knowledge == Knowledge::Unknown {
            owner.knowledge = Knowledge::Partial;
        }
        if let Some(stream) = self.stream(origin, plane) {
            stream.speaks_for(change.rank);
        }
        self.heard(id, change.rank);
        let owner = (pool, slot);
        self.apply_data(plane, owner, change.family, change.tier, &change.data);
        Ok(())
    }

    /// What became of a worker's own stream.
    pub(super) fn turn(&mut self, origin: Origin, plane: Plane, turn: Turn) {
        let id = origin.worker;
        let Some(stream) = self.stream(origin, plane) else {
            return;
        };
        let ranks = stream.ranks.clone();
        match turn {
            Turn::Opened => stream.is_open = true,
            Turn::Closed => stream.is_open = false,
            Turn::Whole => stream.knowledge = Knowledge::Whole,
            Turn::Gap { .. } => {
                stream.knowledge = Knowledge::Partial;
                stream.gaps += 1;
            }
            Turn::Restarted => {
                stream.knowledge = Knowledge::Partial;
                stream.last = None;
            }
        }
        let number = origin.stream;
        match turn {
            Turn::Opened => tracing::info!(worker = id, stream = number, "stream is open"),
            Turn::Closed => tracing::warn!(worker = id, stream = number, "stream is closed"),
            Turn::Whole => self.know_whole(id, &ranks),
            Turn::Gap { missing } => {
                tracing::warn!(worker = id, stream = number, missing, "messages are lost");
                for rank in ranks {
                    self.lost(id, rank, missing);
                }
            }
            Turn::Restarted => {
                tracing::info!(worker = id, stream = number, "engine has started anew");
                self.forget_blocks(id, &ranks);
            }
        }
        self.saving.touch();
        self.check_ready();
    }

    fn know_whole(&mut self, id: WorkerId, ranks: &[DpRank]) {
        for rank in ranks {
            let Some((pool, worker)) = self.roster.worker(id) else {
                return;
            };
            let Some(owner) = worker.owner_mut(*rank) else {
                continue;
            };
            owner.knowledge = Knowledge::Whole;
            let slot = owner.slot;
            self.trust(pool, slot);
        }
    }

    fn forget_blocks(&mut self, id: WorkerId, ranks: &[DpRank]) {
        for rank in ranks {
            let Some((pool, worker)) = self.roster.worker(id) else {
                return;
            };
            let Some(owner) = worker.owner_mut(*rank) else {
                continue;
            };
            owner.knowledge = Knowledge::Partial;
            let slot = owner.slot;
            self.drop_blocks(pool, slot);
        }
    }

    /// A stream, made if it isn't known; `None` where it is not the worker's or is one too many.
    fn stream(&mut self, origin: Origin, plane: Plane) -> Option<&mut Stream> {
        let (_, worker) = self.roster.worker(origin.worker)?;
        let ranks = worker.config.ranks;
        if worker.source.plane().is_some_and(|used| used != plane) {
            return None;
        }
        let is_full = worker.streams.len() >= MAX_STREAMS;
        if is_full && !worker.streams.contains_key(&origin.stream) {
            return None;
        }
        let new = || Stream::new(plane, origin.stream, ranks);
        Some(worker.streams.entry(origin.stream).or_insert_with(new))
    }

    /// Where workers' own streams are to be taken up, by what the index includes.
    #[must_use]
    pub fn resumes(&self) -> HashMap<Origin, Resume> {
        let states = self.roster.pools.iter().flat_map(Self::stream_states);
        let resume = |state: StreamState| {
            let origin = Origin {
                worker: state.worker,
                stream: state.stream,
            };
            (origin, state.resume)
        };
        states.map(resume).collect()
    }
}
