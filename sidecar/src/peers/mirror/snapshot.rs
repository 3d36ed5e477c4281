//! Snapshots of a peer's live bookings: what they list is booked, and what a whole one doesn't list
//! is freed.

use std::collections::HashSet;

use kv_core::id::OwnerId;
use kv_core::replica::ActiveSequenceEventData;
use kv_core::report::OwnerKey;
use kv_core::tracker::Tracker;

use super::{Known, Mirror, Taken, hash};
use crate::peers::Dropped;
use crate::peers::codec::Decoded;

/// A booking younger than this may be missing in a snapshot that was taken before it.
const YOUNG_MS: u64 = 2_000;

/// A snapshot that is coming in.
#[derive(Debug, Default)]
pub(super) struct Snapshot {
    listed: HashSet<u64>,
    parts: u64,
}

impl Mirror {
    /// Applies a part of a snapshot.
    pub fn snapshot(
        &mut self,
        decoded: &Decoded,
        tracker: &mut Tracker,
        mut owner: impl FnMut(OwnerId) -> Result<OwnerKey, Dropped>,
        now_ms: u64,
    ) -> Vec<Taken> {
        let (router, part) = (decoded.publisher, decoded.sequence);
        if router == self.own || self.peer(router).is_none() {
            return Vec::new();
        }
        let is_end = decoded.events.is_empty() && decoded.malformed == 0;
        let mut snapshot = self.begin_part(router, part);
        let mut taken = Vec::new();
        for event in decoded.events.iter().filter(|e| e.router_id == router) {
            let request = hash(event);
            if let Some(snapshot) = &mut snapshot {
                snapshot.listed.insert(request);
            }
            let is_add = matches!(event.data, ActiveSequenceEventData::AddRequest { .. });
            if is_add && self.is_booked(router, request) {
                continue;
            }
            if is_add {
                // It may have been announced before its worker was known.
                self.forget(router, request);
            }
            taken.push(self.event(event, request, tracker, &mut owner, now_ms));
        }
        taken.extend((0..decoded.malformed).map(|_| Err(Dropped::Malformed)));
        match snapshot {
            Some(snapshot) if is_end => {
                let stale = self.unlisted(router, &snapshot, now_ms);
                for request in stale {
                    self.free(router, request, tracker);
                    taken.push(Ok("stale"));
                }
            }
            snapshot => {
                if let Some(peer) = self.peers.get_mut(&router) {
                    peer.snapshot = snapshot;
                }
            }
        }
        taken
    }

    /// The snapshot that a part continues, unless parts before it are missing.
    fn begin_part(&mut self, router: u64, part: u64) -> Option<Snapshot> {
        let peer = self.peers.get_mut(&router)?;
        let mut snapshot = if part == 0 {
            // Whatever was missed before is in it.
            peer.is_suspect = false;
            Some(Snapshot::default())
        } else {
            peer.snapshot.take()
        };
        if let Some(snapshot) = &mut snapshot {
            if snapshot.parts != part {
                peer.is_suspect = true;
                return None;
            }
            snapshot.parts += 1;
        }
        snapshot
    }

    fn is_booked(&self, router: u64, request: u64) -> bool {
        let peer = self.peers.get(&router);
        let known = peer.and_then(|peer| peer.requests.get(&request));
        known.is_some_and(|known| known.is_booked)
    }

    fn unlisted(&self, router: u64, snapshot: &Snapshot, now_ms: u64) -> Vec<u64> {
        let requests = self.peers.get(&router).into_iter();
        let requests = requests.flat_map(|peer| &peer.requests);
        let is_stale = |(request, known): &(&u64, &Known)| {
            let is_young = now_ms.saturating_sub(known.since_ms) < YOUNG_MS;
            !is_young && !snapshot.listed.contains(request)
        };
        requests.filter(is_stale).map(|(r, _)| *r).collect()
    }
}
