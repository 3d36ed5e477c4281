//! What peers have been told of own bookings, and what they are to be told next.
//!
//! The difference between what was announced and what is booked is told, not each step: a booking
//! that came and went between two announcements is never mentioned, and whatever couldn't be sent
//! is told later in its latest state.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};

use kv_core::replica::{
    ActiveSequenceEvent, ActiveSequenceEventData, MAX_BATCH_EVENTS, PrefillLoadHint,
};
use kv_core::report::OwnerKey;
use kv_core::tracker::{Booking, BookingId, Tracker};
use tokio::sync::mpsc;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::codec::MAX_BATCH_BLOCKS;
use super::{Departure, Dropped};

/// Bookings that wait to be looked at; more are found by looking at all.
const MAX_CHANGED: usize = 1 << 18;
/// Most events that one booking gives rise to.
const EVENTS_OF_ONE: usize = 3;

/// A booking as peers know it.
#[derive(Clone, Copy, Debug)]
struct Announced {
    owner: OwnerKey,
    decoding: bool,
    /// Makes its request id.
    number: u64,
}

/// Own bookings, as announced.
#[derive(Debug)]
pub struct Announcer {
    router_id: u64,
    is_connected: bool,
    announced: HashMap<BookingId, Announced>,
    changed: VecDeque<BookingId>,
    /// Whether all bookings are to be looked at.
    is_all_changed: bool,
    number: u64,
}

/// What an announcement came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Events by kind.
    pub events: Vec<&'static str>,
    /// What was not sent.
    pub dropped: Vec<Dropped>,
}

impl Announcer {
    /// Nothing announced. Nothing will be before [`Announcer::connected`].
    #[must_use]
    pub fn new(router_id: u64) -> Self {
        Self {
            router_id,
            is_connected: false,
            announced: HashMap::new(),
            changed: VecDeque::new(),
            is_all_changed: true,
            number: 0,
        }
    }

    /// The connection to peers is there, or lost.
    pub fn connected(&mut self, is_connected: bool) {
        self.is_connected = is_connected;
        if is_connected {
            self.all_changed();
        }
    }

    /// Whether peers can be reached.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.is_connected
    }

    /// Something happened to a booking.
    pub fn changed(&mut self, id: BookingId) {
        if !self.is_connected || self.is_all_changed {
            return;
        }
        if self.changed.len() >= MAX_CHANGED {
            self.all_changed();
        } else {
            self.changed.push_back(id);
        }
    }

    /// Bookings of a source may have been freed.
    pub fn source_changed(&mut self, source: u64) {
        let of_source: Vec<BookingId> = self
            .announced
            .keys()
            .filter(|id| id.source == source)
            .cloned()
            .collect();
        of_source.into_iter().for_each(|id| self.changed(id));
    }

    /// Something happened to any bookings.
    pub fn all_changed(&mut self) {
        self.is_all_changed = true;
        self.changed.clear();
    }

    /// Bookings that peers know of.
    #[must_use]
    pub fn live(&self) -> u64 {
        self.announced.len() as u64
    }

    /// Tells peers what has changed, as far as the queue takes it. `sources` are the peers' own in
    /// the tracker.
    pub fn announce(
        &mut self,
        tracker: &Tracker,
        sources: impl FnOnce() -> HashSet<u64>,
        out: &mpsc::Sender<Departure>,
    ) -> Sent {
        let mut sent = Sent::default();
        if !self.is_connected {
            return sent;
        }
        if std::mem::take(&mut self.is_all_changed) {
            let booked = tracker.bookings().map(|(id, ..)| id);
            let sources = sources();
            let booked = booked.filter(|id| !sources.contains(&id.source));
            let all: BTreeSet<BookingId> = booked.chain(self.announced.keys()).cloned().collect();
            self.changed = all.into_iter().collect();
        }
        while !self.changed.is_empty() {
            let Ok(permit) = out.try_reserve() else {
                sent.dropped.push(Dropped::QueueFull);
                break;
            };
            let mut events = Vec::new();
            while events.len() + EVENTS_OF_ONE <= MAX_BATCH_EVENTS
                && let Some(id) = self.changed.pop_front()
            {
                self.differ(&id, tracker, &mut events, &mut sent.dropped);
            }
            if !events.is_empty() {
                sent.events.extend(events.iter().map(kind));
                permit.send(Departure::Events(events));
            }
        }
        sent
    }

    /// What turns a booking as announced into what it is.
    fn differ(
        &mut self,
        id: &BookingId,
        tracker: &Tracker,
        events: &mut Vec<ActiveSequenceEvent>,
        dropped: &mut Vec<Dropped>,
    ) {
        let booked = tracker.get(id);
        let known = self.announced.get(id).copied();
        let stays = known.filter(|known| booked.is_some_and(|(owner, _)| owner == known.owner));
        if let (Some(known), None) = (known, stays) {
            events.push(self.event(&known, ActiveSequenceEventData::Free));
            self.announced.remove(id);
        }
        let Some((owner, booking)) = booked else {
            return;
        };
        let mut known = match stays {
            Some(known) => known,
            None => {
                self.number += 1;
                let fresh = Announced {
                    owner,
                    decoding: false,
                    number: self.number,
                };
                let Some(add) = self.add(&fresh, booking) else {
                    dropped.push(Dropped::TooLong);
                    return;
                };
                events.push(add);
                fresh
            }
        };
        if booking.decoding && !known.decoding {
            known.decoding = true;
            let mark = ActiveSequenceEventData::MarkPrefillCompleted;
            events.push(self.event(&known, mark));
        }
        self.announced.insert(id.clone(), known);
    }

    /// All live bookings, for one who doesn't know them.
    #[must_use]
    pub fn snapshot(&self, tracker: &Tracker) -> Vec<ActiveSequenceEvent> {
        let mut events = Vec::new();
        for (id, known) in &self.announced {
            let booked = tracker.get(id).filter(|(owner, _)| *owner == known.owner);
            let Some(add) = booked.and_then(|(_, booking)| self.add(known, booking)) else {
                // The difference is still to be told.
                continue;
            };
            events.push(add);
            if known.decoding {
                let mark = ActiveSequenceEventData::MarkPrefillCompleted;
                events.push(self.event(known, mark));
            }
        }
        events
    }

    fn event(&self, known: &Announced, data: ActiveSequenceEventData) -> ActiveSequenceEvent {
        ActiveSequenceEvent {
            // An id is never used again: Dynamo's routers ignore what they have once freed.
            request_id: format!("{:014x}-{:x}", self.router_id, known.number),
            worker: known.owner.id.into(),
            data,
            router_id: self.router_id,
            lora_name: None,
        }
    }

    /// `None` when it has more blocks than a message takes.
    fn add(&self, known: &Announced, booking: &Booking) -> Option<ActiveSequenceEvent> {
        let token_sequence = self.blocks(known, booking)?;
        let tokens = u64::from(booking.prefill_tokens);
        let data = ActiveSequenceEventData::AddRequest {
            token_sequence: Some(token_sequence),
            track_prefill_tokens: tokens > 0,
            expected_output_tokens: None,
            prefill_load_hint: (tokens > 0).then_some(PrefillLoadHint {
                initial_effective_prefill_tokens: tokens,
                expected_prefill_duration: None,
            }),
        };
        Some(self.event(known, data))
    }

    /// Blocks whose hashes are not known get ones that no other request has, so that they count.
    fn blocks(&self, known: &Announced, booking: &Booking) -> Option<Vec<u64>> {
        let total = booking.hashes.len() + booking.private_blocks as usize;
        if total > MAX_BATCH_BLOCKS {
            return None;
        }
        let name = self.router_id.rotate_left(32) ^ known.number;
        let unknown = (0..booking.private_blocks)
            .map(|i| xxh3_64_with_seed(&u64::from(i).to_le_bytes(), name));
        let mut unknown: Vec<u64> = unknown.collect();
        let before = unknown.len().min(booking.start as usize);
        let after = unknown.split_off(before);
        unknown.extend(&booking.hashes);
        unknown.extend(after);
        Some(unknown)
    }
}

fn kind(event: &ActiveSequenceEvent) -> &'static str {
    match event.data {
        ActiveSequenceEventData::AddRequest { .. } => "booked",
        ActiveSequenceEventData::MarkPrefillCompleted => "first_token",
        ActiveSequenceEventData::Free => "freed",
    }
}

#[cfg(test)]
mod tests;
