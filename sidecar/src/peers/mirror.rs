//! Peers and their bookings, as they tell of them.
//!
//! A peer's bookings stand in the tracker under a source of their own. What a peer announced but
//! could not be booked is kept by name, so that its [`Alive`] can be held against what is known.

mod snapshot;

use std::collections::{BTreeMap, HashMap, HashSet};

use kv_core::id::OwnerId;
use kv_core::replica::{ActiveSequenceEvent, ActiveSequenceEventData};
use kv_core::report::OwnerKey;
use kv_core::tracker::{Booking, BookingId, TrackError, Tracker};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::codec::Decoded;
use super::tombs::{Tomb, Tombs};
use super::{Alive, Dropped};
use snapshot::Snapshot;

/// Peers at a time.
const MAX_PEERS: usize = 256;
/// Requests of all peers at a time.
const MAX_REQUESTS: usize = 1 << 18;
/// How long a peer that has given signs of life may be silent.
const SILENCE_MS: u64 = 5_000;
/// Least time between two requests to one peer for its bookings.
const ASK_PAUSE_MS: u64 = 2_000;
/// All peers.
#[derive(Debug)]
pub struct Mirror {
    own: u64,
    peers: BTreeMap<u64, Peer>,
    /// Which peer announced a request.
    by_request: HashMap<u64, u64>,
    tombs: Tombs,
}

/// A router that announces requests.
#[derive(Debug, Default)]
struct Peer {
    requests: HashMap<u64, Known>,
    /// Last sign of life; `None` for one that gives none.
    heard_ms: Option<u64>,
    next_sequence: Option<u64>,
    /// Whether something was missed.
    is_suspect: bool,
    asked_ms: Option<u64>,
    snapshot: Option<Snapshot>,
}

/// A request of a peer.
#[derive(Clone, Copy, Debug)]
struct Known {
    /// Whether it is in the tracker.
    is_booked: bool,
    since_ms: u64,
}

/// What an event came to, as a metric's label, or why it was dropped.
pub type Taken = Result<&'static str, Dropped>;

/// What went because nobody claimed it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gone {
    /// Peers that fell silent.
    pub peers: Vec<u64>,
    /// Bookings of these.
    pub freed: usize,
}

impl Mirror {
    /// No peers of the router `own`.
    #[must_use]
    pub fn new(own: u64) -> Self {
        Self {
            own,
            peers: BTreeMap::new(),
            by_request: HashMap::new(),
            tombs: Tombs::default(),
        }
    }

    /// Peers.
    #[must_use]
    pub fn len(&self) -> usize {
        self.peers.len()
    }

    /// Whether there are no peers.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.peers.is_empty()
    }

    /// Under what sources peers' bookings stand in the tracker.
    #[must_use]
    pub fn sources(&self) -> HashSet<u64> {
        self.peers.keys().map(|router| source(*router)).collect()
    }

    /// Applies a message of events. `owner` finds a worker's rank.
    pub fn events(
        &mut self,
        decoded: &Decoded,
        tracker: &mut Tracker,
        mut owner: impl FnMut(OwnerId) -> Result<OwnerKey, Dropped>,
        now_ms: u64,
    ) -> Vec<Taken> {
        if decoded.publisher == self.own {
            return Vec::new();
        }
        if let Some(peer) = self.heard(decoded.publisher, now_ms) {
            let expected = peer.next_sequence;
            peer.is_suspect |= expected.is_some_and(|next| next != decoded.sequence);
            peer.next_sequence = Some(decoded.sequence.wrapping_add(1));
        }
        let (own, mut taken) = (self.own, Vec::new());
        for event in decoded.events.iter().filter(|e| e.router_id != own) {
            taken.push(self.event(event, hash(event), tracker, &mut owner, now_ms));
        }
        taken.extend((0..decoded.malformed).map(|_| Err(Dropped::Malformed)));
        taken
    }

    /// Takes a sign of life. Whether the peer is to be asked for its bookings, because something of
    /// it was missed.
    pub fn alive(&mut self, alive: Alive, tracker: &mut Tracker, now_ms: u64) -> bool {
        if alive.router_id == self.own {
            return false;
        }
        let Some(peer) = self.peer(alive.router_id) else {
            return false;
        };
        peer.heard_ms = Some(now_ms);
        let source = source(alive.router_id);
        for (request, _) in peer.requests.iter().filter(|(_, known)| known.is_booked) {
            let request = *request;
            tracker.touch(&BookingId { source, request }, now_ms);
        }
        let next = *peer.next_sequence.get_or_insert(alive.next_sequence);
        // Messages that were sent after it may have overtaken it here; never the other way round.
        peer.is_suspect |= next < alive.next_sequence;
        peer.is_suspect |= next == alive.next_sequence && peer.requests.len() as u64 != alive.live;
        peer.next_sequence = Some(next.max(alive.next_sequence));
        let is_due = peer
            .asked_ms
            .is_none_or(|asked| now_ms.saturating_sub(asked) >= ASK_PAUSE_MS);
        if !peer.is_suspect || !is_due {
            return false;
        }
        peer.asked_ms = Some(now_ms);
        true
    }

    /// The configuration has other workers: what was unknown may not be.
    pub fn reconfigured(&mut self) {
        for peer in self.peers.values_mut() {
            peer.is_suspect |= peer.requests.values().any(|known| !known.is_booked);
        }
    }

    /// Drops peers that have fallen silent, with all they booked.
    pub fn sweep(&mut self, tracker: &mut Tracker, now_ms: u64) -> Gone {
        self.tombs.prune(now_ms);
        let mut gone = Gone::default();
        let by_request = &mut self.by_request;
        self.peers.retain(|router, peer| {
            let Some(heard_ms) = peer.heard_ms else {
                return !peer.requests.is_empty();
            };
            let stays = now_ms.saturating_sub(heard_ms) <= SILENCE_MS;
            if !stays {
                gone.peers.push(*router);
                gone.freed += tracker.retain(source(*router), |_| false);
                peer.requests.keys().for_each(|request| {
                    by_request.remove(request);
                });
            }
            stays
        });
        gone
    }

    /// Forgets requests whose bookings the tracker let expire.
    pub fn expired(&mut self, tracker: &Tracker) {
        for (router, peer) in &mut self.peers {
            let source = source(*router);
            let by_request = &mut self.by_request;
            peer.requests.retain(|request, known| {
                let request = *request;
                let stays =
                    !known.is_booked || tracker.get(&BookingId { source, request }).is_some();
                if !stays {
                    by_request.remove(&request);
                }
                stays
            });
        }
    }

    /// Requests of peers on each owner.
    #[must_use]
    pub fn requests(&self, tracker: &Tracker) -> HashMap<OwnerKey, BTreeMap<u64, u32>> {
        let mut requests: HashMap<OwnerKey, BTreeMap<u64, u32>> = HashMap::new();
        for (router, peer) in &self.peers {
            let source = source(*router);
            for request in peer.requests.keys() {
                let request = *request;
                if let Some((owner, _)) = tracker.get(&BookingId { source, request }) {
                    let of_owner = requests.entry(owner).or_default();
                    *of_owner.entry(*router).or_default() += 1;
                }
            }
        }
        requests
    }

    /// A peer that gives signs of life.
    fn heard(&mut self, router: u64, now_ms: u64) -> Option<&mut Peer> {
        let peer = self.peers.get_mut(&router)?;
        peer.heard_ms.as_mut().map(|heard| *heard = now_ms)?;
        Some(peer)
    }

    /// A peer, known or not; `None` when there are too many.
    fn peer(&mut self, router: u64) -> Option<&mut Peer> {
        if self.peers.len() >= MAX_PEERS && !self.peers.contains_key(&router) {
            return None;
        }
        Some(self.peers.entry(router).or_default())
    }

    fn event(
        &mut self,
        event: &ActiveSequenceEvent,
        request: u64,
        tracker: &mut Tracker,
        owner: impl FnOnce(OwnerId) -> Result<OwnerKey, Dropped>,
        now_ms: u64,
    ) -> Taken {
        if let ActiveSequenceEventData::AddRequest { .. } = &event.data {
            return self.add(event, request, tracker, owner, now_ms);
        }
        let is_free = event.data == ActiveSequenceEventData::Free;
        let tomb = if is_free {
            Tomb::Freed
        } else {
            Tomb::Prefilled
        };
        let Some(router) = self.by_request.get(&request).copied() else {
            self.tombs.remember(request, tomb, now_ms);
            return Err(Dropped::UnknownRequest);
        };
        let id = BookingId {
            source: source(router),
            request,
        };
        let booked = tracker.get(&id);
        if booked.is_some_and(|(owner, _)| owner.id != OwnerId::from(event.worker)) {
            return Err(Dropped::WorkerMismatch);
        }
        if is_free {
            self.free(router, request, tracker);
            self.tombs.remember(request, tomb, now_ms);
            return Ok("freed");
        }
        if booked.is_some_and(|(_, booking)| !booking.decoding) {
            tracker.first_token(&id, now_ms);
        }
        Ok("first_token")
    }

    fn add(
        &mut self,
        event: &ActiveSequenceEvent,
        request: u64,
        tracker: &mut Tracker,
        owner: impl FnOnce(OwnerId) -> Result<OwnerKey, Dropped>,
        now_ms: u64,
    ) -> Taken {
        if self.by_request.contains_key(&request) {
            return Err(Dropped::Duplicate);
        }
        if self.by_request.len() >= MAX_REQUESTS {
            return Err(Dropped::Full);
        }
        let tomb = self.tombs.recall(request);
        if tomb == Some(Tomb::Freed) {
            return Err(Dropped::Superseded);
        }
        let router = event.router_id;
        let peer = self.peer(router).ok_or(Dropped::TooManyPeers)?;
        let gives_signs = peer.heard_ms.is_some();
        let booked = owner(event.worker.into()).and_then(|owner| {
            let id = BookingId {
                source: source(router),
                request,
            };
            let booking = booking(&event.data, tomb == Some(Tomb::Prefilled));
            tracker
                .book(id, owner, booking, now_ms)
                .map_err(|error| match error {
                    TrackError::Duplicate(_) => Dropped::Duplicate,
                    TrackError::Full(_) => Dropped::Full,
                })
        });
        // Without signs of life nothing is held against it, and nothing would end it.
        if booked.is_ok() || gives_signs {
            let known = Known {
                is_booked: booked.is_ok(),
                since_ms: now_ms,
            };
            peer.requests.insert(request, known);
            self.by_request.insert(request, router);
        }
        booked.map(|()| "booked")
    }

    fn free(&mut self, router: u64, request: u64, tracker: &mut Tracker) {
        self.forget(router, request);
        tracker.free(&BookingId {
            source: source(router),
            request,
        });
    }

    fn forget(&mut self, router: u64, request: u64) {
        self.by_request.remove(&request);
        if let Some(peer) = self.peers.get_mut(&router) {
            peer.requests.remove(&request);
        }
    }
}

fn booking(data: &ActiveSequenceEventData, decoding: bool) -> Booking {
    let ActiveSequenceEventData::AddRequest {
        token_sequence,
        track_prefill_tokens,
        prefill_load_hint,
        ..
    } = data
    else {
        return Booking::default();
    };
    let hint = prefill_load_hint.filter(|_| *track_prefill_tokens);
    let tokens = hint.map_or(0, |hint| hint.initial_effective_prefill_tokens);
    Booking {
        prefill_tokens: u32::try_from(tokens).unwrap_or(u32::MAX),
        decoding,
        hashes: token_sequence.clone().unwrap_or_default(),
        ..Booking::default()
    }
}

fn hash(event: &ActiveSequenceEvent) -> u64 {
    xxh3_64(event.request_id.as_bytes())
}

/// Under what a router's bookings stand in the tracker, apart from VMs' nonces.
fn source(router: u64) -> u64 {
    xxh3_64_with_seed(b"router", router)
}

#[cfg(test)]
mod tests;
