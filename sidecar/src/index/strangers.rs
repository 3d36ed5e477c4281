//! Workers that publish on Dynamo's plane and that the configuration gives no endpoint. They are
//! indexed apart, in an index that is never published, so that nothing is ever sent to them and
//! nothing is lost when they get one.

use std::collections::BTreeMap;
use std::time::Duration;

use kv_core::event::RouterEvent;
use kv_core::id::{DpRank, OwnerId, Slot, WorkerId};
use kv_core::index::{Held, Index, IndexConfig};
use serde::Serialize;
use tokio::time::Instant;

use super::Slots;
use super::cursor::{Cursor, Step};
use super::knowledge::Knowledge;
use crate::ingest::Rejection;

/// Workers at a time.
const MAX_WORKERS: usize = 64;
/// Ranks of one worker.
const MAX_RANKS: usize = 64;
/// Blocks in all, counted once for each rank.
const MAX_BLOCKS: usize = 1 << 20;
/// Memory of their index, in bytes.
const MAX_BYTES: usize = 256 << 20;
/// How long one may be silent.
const SILENCE: Duration = Duration::from_secs(300);
const POOL: usize = 0;

/// All of them.
#[derive(Debug)]
pub(super) struct Strangers {
    index: Index,
    slots: Slots,
    workers: BTreeMap<WorkerId, Stranger>,
}

#[derive(Debug)]
struct Stranger {
    heard: Instant,
    ranks: BTreeMap<DpRank, Rank>,
}

#[derive(Debug)]
struct Rank {
    slot: Slot,
    cursor: Cursor,
    knowledge: Knowledge,
    gaps: u64,
}

/// What was known of a rank when its worker got an endpoint.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) rank: DpRank,
    pub(super) cursor: Cursor,
    pub(super) knowledge: Knowledge,
    pub(super) gaps: u64,
    /// Parents first.
    pub(super) blocks: Vec<Held>,
}

/// A worker without an endpoint, in the answer of `/v1/workers`.
#[derive(Clone, Debug, Serialize)]
pub struct StrangerReport {
    /// The worker.
    pub worker: WorkerId,
    /// Why it gets no requests: `no endpoint`.
    pub state: &'static str,
    /// Since its last event, milliseconds.
    pub last_event_ms: u64,
    /// Its ranks.
    pub ranks: Vec<StrangerRank>,
}

/// A rank of such a worker.
#[derive(Clone, Debug, Serialize)]
pub struct StrangerRank {
    /// Data-parallel rank.
    pub rank: DpRank,
    /// Blocks that it holds.
    pub blocks: usize,
    /// Id of its last event.
    pub last_event_id: Option<u64>,
    /// Jumps in its event ids.
    pub gaps: u64,
    /// How much of its cache is known.
    pub knowledge: Knowledge,
}

impl Default for Strangers {
    fn default() -> Self {
        let mut index = Index::new(IndexConfig {
            epoch: 0,
            level: 0,
            group: super::GROUP,
            max_orphans: super::MAX_ORPHANS / 16,
            max_bytes: MAX_BYTES,
            max_page_bytes: usize::MAX,
        });
        // Never published, so it needs no secret.
        index.add_pool(0);
        Self {
            index,
            slots: Slots::default(),
            workers: BTreeMap::new(),
        }
    }
}

impl Strangers {
    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.workers.len()
    }

    /// Takes an event. Ids are counted per rank.
    pub(super) fn take(
        &mut self,
        event: &RouterEvent,
        publisher: Option<u64>,
        at: Instant,
    ) -> Result<(), Rejection> {
        let (worker, rank) = (event.worker_id, event.event.dp_rank);
        let count = self.workers.len();
        let known = self.workers.get(&worker);
        let has_rank = known.is_some_and(|stranger| stranger.ranks.contains_key(&rank));
        let ranks = known.map_or(0, |stranger| stranger.ranks.len());
        if !has_rank {
            if known.is_none() && count >= MAX_WORKERS || ranks >= MAX_RANKS {
                return Err(Rejection::TooManyStrangers);
            }
            let slot = self.slots.assign(OwnerId { worker, rank });
            let slot = slot.ok_or(Rejection::TooManyStrangers)?;
            if known.is_none() {
                tracing::warn!(worker, "a worker publishes events and has no endpoint");
            }
            let fresh = Rank {
                slot,
                cursor: Cursor::default(),
                knowledge: Knowledge::Unknown,
                gaps: 0,
            };
            let stranger = self.workers.entry(worker).or_insert_with(|| Stranger {
                heard: at,
                ranks: BTreeMap::new(),
            });
            stranger.ranks.insert(rank, fresh);
        }
        let is_full = self.index.stats().owner_blocks >= MAX_BLOCKS;
        let stranger = self.workers.get_mut(&worker);
        let stranger = stranger.ok_or(Rejection::UnknownWorker)?;
        stranger.heard = at;
        let owner = stranger.ranks.get_mut(&rank);
        let owner = owner.ok_or(Rejection::UnknownRank)?;
        let data = &event.event.data;
        match owner.cursor.step(event.event.event_id, publisher) {
            Step::Next => {}
            Step::Back => return Err(Rejection::DuplicateId),
            Step::First(true) => owner.knowledge = Knowledge::Whole,
            Step::First(false) => owner.knowledge = Knowledge::Partial,
            // Nobody is sent to it: forgetting costs nothing.
            Step::Gap | Step::Restart => {
                owner.gaps += 1;
                owner.knowledge = Knowledge::Partial;
                self.index.remove_owner(POOL, owner.slot);
            }
        }
        if is_full && matches!(data, kv_core::event::EventData::Stored(_)) {
            owner.knowledge = Knowledge::Partial;
            return Err(Rejection::TooManyStrangers);
        }
        self.index
            .apply(POOL, owner.slot, event.storage_tier.into(), data);
        Ok(())
    }

    /// Forgets workers that fell silent, and what the index would publish.
    pub(super) fn sweep(&mut self, at: Instant) {
        let silent = self.workers.iter().filter(|(_, s)| at >= s.heard + SILENCE);
        let silent: Vec<WorkerId> = silent.map(|(id, _)| *id).collect();
        for worker in silent {
            tracing::info!(worker, "a worker without an endpoint fell silent");
            self.remove(worker);
        }
        if self.index.is_dirty() {
            self.index.flush();
        }
    }

    /// A worker has got an endpoint: what is known of it.
    pub(super) fn adopt(&mut self, worker: WorkerId) -> Vec<Known> {
        let Some(stranger) = self.workers.get(&worker) else {
            return Vec::new();
        };
        let known = |(rank, state): (&DpRank, &Rank)| Known {
            rank: *rank,
            cursor: state.cursor,
            knowledge: state.knowledge,
            gaps: state.gaps,
            blocks: self.index.dump(POOL, state.slot),
        };
        let known = stranger.ranks.iter().map(known).collect();
        self.remove(worker);
        known
    }

    fn remove(&mut self, worker: WorkerId) {
        let Some(stranger) = self.workers.remove(&worker) else {
            return;
        };
        for (rank, state) in stranger.ranks {
            self.index.remove_owner(POOL, state.slot);
            self.slots.free(OwnerId { worker, rank });
        }
    }

    /// As `/v1/workers` shows them.
    pub(super) fn report(&self, at: Instant) -> Vec<StrangerReport> {
        let rank = |(rank, state): (&DpRank, &Rank)| StrangerRank {
            rank: *rank,
            blocks: self.index.owner_blocks(POOL, state.slot),
            last_event_id: state.cursor.last,
            gaps: state.gaps,
            knowledge: state.knowledge,
        };
        let workers = self.workers.iter();
        workers
            .map(|(worker, stranger)| StrangerReport {
                worker: *worker,
                state: "no endpoint",
                last_event_ms: milliseconds(at, stranger.heard),
                ranks: stranger.ranks.iter().map(rank).collect(),
            })
            .collect()
    }
}

/// Milliseconds from then to now.
pub(super) fn milliseconds(now: Instant, then: Instant) -> u64 {
    let passed = now.saturating_duration_since(then).as_millis();
    u64::try_from(passed).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use kv_core::event::{EventData, KvCacheEvent, StorageTier, Stored, StoredBlock};

    use super::*;

    fn event(worker_id: WorkerId, dp_rank: DpRank, event_id: u64) -> RouterEvent {
        let block = StoredBlock {
            block_hash: event_id,
            tokens_hash: event_id,
            mm_extra_info: None,
        };
        RouterEvent {
            worker_id,
            storage_tier: StorageTier::Device,
            residency_domain: None,
            event: KvCacheEvent {
                event_id,
                data: EventData::Stored(Stored {
                    blocks: vec![block],
                    ..Stored::default()
                }),
                dp_rank,
            },
            session_id: None,
        }
    }

    #[test]
    fn what_was_heard_is_handed_over_with_its_cursor() {
        let (mut strangers, at) = (Strangers::default(), Instant::now());
        for id in 1..=3 {
            strangers.take(&event(9, 0, id), Some(5), at).unwrap();
        }
        let again = strangers.take(&event(9, 0, 3), Some(5), at);
        assert_eq!(again, Err(Rejection::DuplicateId));
        let known = strangers.adopt(9);
        assert_eq!(known.len(), 1);
        assert_eq!(known[0].blocks.len(), 3);
        assert_eq!(known[0].cursor.last, Some(3));
        assert_eq!(known[0].knowledge, Knowledge::Whole);
        assert_eq!((strangers.len(), strangers.index.stats().blocks), (0, 0));
    }

    #[test]
    fn their_number_is_bounded_and_silent_ones_make_room() {
        let (mut strangers, at) = (Strangers::default(), Instant::now());
        for worker in 0..MAX_WORKERS as u64 {
            strangers.take(&event(worker, 0, 1), None, at).unwrap();
        }
        let refused = Err(Rejection::TooManyStrangers);
        assert_eq!(strangers.take(&event(1000, 0, 1), None, at), refused);
        for rank in 1..u32::try_from(MAX_RANKS).unwrap() {
            strangers.take(&event(3, rank, 1), None, at).unwrap();
        }
        assert_eq!(strangers.take(&event(3, 1000, 1), None, at), refused);
        let later = at + SILENCE;
        strangers.take(&event(3, 0, 2), None, later).unwrap();
        strangers.sweep(later);
        assert_eq!(strangers.len(), 1);
        strangers.take(&event(1000, 0, 1), None, later).unwrap();
    }

    #[test]
    fn a_gap_forgets_what_was_known() {
        let (mut strangers, at) = (Strangers::default(), Instant::now());
        strangers.take(&event(9, 0, 1), None, at).unwrap();
        strangers.take(&event(9, 0, 7), None, at).unwrap();
        let report = strangers.report(at);
        let rank = &report[0].ranks[0];
        assert_eq!((rank.blocks, rank.gaps), (1, 1));
        assert_eq!(rank.knowledge, Knowledge::Partial);
    }
}
