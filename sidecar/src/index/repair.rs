//! Replacing what is known of a worker by the snapshot it sends, while its events go on.

use std::time::Duration;

use kv_core::event::{EventData, RouterEvent, SnapshotPart};
use tokio::time::Instant;

use crate::ingest::NoSnapshot;

/// How long all parts may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(2);
/// Least time between two requests to a worker: one whose ids make no sense is not asked for
/// everything with each event.
pub(super) const PAUSE: Duration = Duration::from_secs(1);
/// How long after a request without an answer a worker is asked again.
pub(super) const RETRY: Duration = Duration::from_secs(30);
/// Most parts of one snapshot.
const MAX_PARTS: u32 = 1 << 14;
/// Most blocks of one snapshot.
const MAX_BLOCKS: usize = 1 << 23;
/// Most blocks, and events, of the events held back meanwhile.
const MAX_HELD: usize = 1 << 20;

/// A snapshot under way.
#[derive(Debug)]
pub(super) struct Repair {
    ask_at: Instant,
    is_asked: bool,
    parts: Vec<Option<SnapshotPart>>,
    missing: usize,
    blocks: usize,
    held: Vec<RouterEvent>,
    held_size: usize,
    /// Whether the worker numbers its events anew: blocks it had are gone, snapshot or not.
    pub(super) restarted: bool,
}

/// A complete snapshot.
#[derive(Debug, PartialEq)]
pub(super) struct Snapshot {
    /// Id of the last event it includes.
    pub(super) event_id: u64,
    /// Its stores, parents first.
    pub(super) events: Vec<RouterEvent>,
}

impl Repair {
    /// A repair that asks at a given time; it goes on with the events held back by one that it
    /// replaces.
    #[must_use]
    pub(super) fn new(ask_at: Instant, restarted: bool, before: Option<Self>) -> Self {
        let (held, held_size, before) = before.map_or((Vec::new(), 0, false), |r| {
            (r.held, r.held_size, r.restarted)
        });
        Self {
            ask_at,
            is_asked: false,
            parts: Vec::new(),
            missing: 0,
            blocks: 0,
            held,
            held_size,
            restarted: restarted || before,
        }
    }

    /// Holds an event back.
    ///
    /// # Errors
    /// When too much is held back.
    pub(super) fn hold(&mut self, event: RouterEvent) -> Result<(), NoSnapshot> {
        self.held_size += 1 + blocks(&event);
        self.held.push(event);
        if self.held_size > MAX_HELD {
            return Err(NoSnapshot::Overflow);
        }
        Ok(())
    }

    /// Takes a part; the snapshot once it is complete.
    ///
    /// # Errors
    /// When the part contradicts those before it or the whole is too large.
    pub(super) fn take(&mut self, part: SnapshotPart) -> Result<Option<Snapshot>, NoSnapshot> {
        if self.parts.is_empty() {
            if !(1..=MAX_PARTS).contains(&part.parts) {
                return Err(NoSnapshot::Malformed);
            }
            self.missing = part.parts as usize;
            self.parts.resize_with(self.missing, || None);
        }
        let first = self.parts.iter().flatten().next();
        let is_of_this = part.parts as usize == self.parts.len()
            && first.is_none_or(|first| first.event_id == part.event_id);
        let place = self.parts.get_mut(part.part as usize);
        let (Some(place @ None), true) = (place, is_of_this) else {
            return Err(NoSnapshot::Malformed);
        };
        self.blocks += part.events.iter().map(blocks).sum::<usize>();
        if self.blocks > MAX_BLOCKS {
            return Err(NoSnapshot::Overflow);
        }
        let event_id = part.event_id;
        *place = Some(part);
        self.missing -= 1;
        if self.missing > 0 {
            return Ok(None);
        }
        let parts = std::mem::take(&mut self.parts).into_iter().flatten();
        let events = parts.flat_map(|part| part.events).collect();
        Ok(Some(Snapshot { event_id, events }))
    }

    /// Whether its time has run out.
    #[must_use]
    pub(super) fn is_overdue(&self, at: Instant) -> bool {
        at >= self.ask_at + PATIENCE
    }

    /// Whether it is time to ask; only once.
    pub(super) fn asks(&mut self, at: Instant) -> bool {
        let is_due = !self.is_asked && at >= self.ask_at;
        self.is_asked |= is_due;
        is_due
    }

    /// The events held back, in order.
    #[must_use]
    pub(super) fn held(&self) -> &[RouterEvent] {
        &self.held
    }

    /// The events held back, in order.
    #[must_use]
    pub(super) fn into_held(self) -> Vec<RouterEvent> {
        self.held
    }
}

fn blocks(event: &RouterEvent) -> usize {
    match &event.event.data {
        EventData::Stored(stored) => stored.blocks.len(),
        EventData::Removed(removed) => removed.block_hashes.len(),
        EventData::Cleared => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(part: u32, parts: u32, event_id: u64) -> SnapshotPart {
        SnapshotPart {
            worker_id: 1,
            event_id,
            part,
            parts,
            events: Vec::new(),
        }
    }

    #[test]
    fn parts_in_any_order_make_a_snapshot() {
        let mut repair = Repair::new(Instant::now(), false, None);
        assert_eq!(repair.take(part(2, 3, 9)), Ok(None));
        assert_eq!(repair.take(part(0, 3, 9)), Ok(None));
        let snapshot = repair.take(part(1, 3, 9)).unwrap().unwrap();
        assert_eq!((snapshot.event_id, snapshot.events.len()), (9, 0));
    }

    #[test]
    fn parts_that_contradict_each_other_are_refused() {
        for wrong in [part(0, 3, 9), part(1, 3, 8), part(1, 4, 9), part(3, 3, 9)] {
            let mut repair = Repair::new(Instant::now(), false, None);
            assert_eq!(repair.take(part(0, 3, 9)), Ok(None));
            assert_eq!(repair.take(wrong), Err(NoSnapshot::Malformed));
        }
        assert_eq!(
            Repair::new(Instant::now(), false, None).take(part(0, 0, 1)),
            Err(NoSnapshot::Malformed)
        );
    }
}
