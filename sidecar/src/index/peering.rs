//! Other routers' load into the accounts, and own load out to them.

use std::collections::BTreeMap;

use kv_core::id::OwnerId;
use kv_core::report::{OwnerKey, Step};
use kv_core::tracker::BookingId;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use serde::Serialize;
use tokio::sync::mpsc;

use super::{Service, roster};
use crate::metrics::Kind;
use crate::peers::announcer::Announcer;
use crate::peers::mirror::{Mirror, Taken};
use crate::peers::{Arrival, Departure, Dropped};

/// Ticks between two signs of life.
const ALIVE_TICKS: u32 = 10;

/// Both directions.
pub(super) struct Peering {
    announcer: Announcer,
    mirror: Mirror,
    out: mpsc::Sender<Departure>,
}

/// Requests of one peer on an owner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PeerRequests {
    /// The peer.
    pub router_id: u64,
    /// How many.
    pub requests: u32,
}

/// Requests by owner and peer.
pub(super) type ByPeer = std::collections::HashMap<OwnerKey, BTreeMap<u64, u32>>;

impl Service {
    /// The service as a peer of others: `router_id` among them, `out` to them.
    #[must_use]
    pub fn with_peers(mut self, router_id: u64, out: mpsc::Sender<Departure>) -> Self {
        self.peering = Some(Peering {
            announcer: Announcer::new(router_id),
            mirror: Mirror::new(router_id),
            out,
        });
        self
    }

    /// Whether others tell of load.
    pub(super) fn has_peers(&self) -> bool {
        self.peering.as_ref().is_some_and(|p| !p.mirror.is_empty())
    }

    /// Requests of others.
    pub(super) fn peer_requests(&self) -> ByPeer {
        let requests = |p: &Peering| p.mirror.requests(self.accounts.tracker());
        self.peering.as_ref().map(requests).unwrap_or_default()
    }

    /// A step of an own request has been applied.
    pub(super) fn step_for_peers(&mut self, vm: u64, step: &Step) {
        let Some(peering) = &mut self.peering else {
            return;
        };
        let request = match step {
            Step::Book(booked) => booked.request,
            Step::Move { request, .. }
            | Step::FirstToken { request }
            | Step::Prefilled { request }
            | Step::Free { request } => *request,
            // Peers are told of no such thing.
            Step::Cached { .. }
            | Step::Grown { .. }
            | Step::Failed { .. }
            | Step::WrittenOff(_)
            | Step::Queued(_)
            | Step::Unqueued { .. }
            | Step::Leave => return,
        };
        peering.announcer.changed(BookingId {
            source: vm,
            request,
        });
    }

    /// A complete report has been entered: what it doesn't list is freed.
    pub(super) fn report_for_peers(&mut self, vm: u64) {
        if let Some(peering) = &mut self.peering {
            peering.announcer.source_changed(vm);
        }
    }

    /// Bookings went that nobody claimed.
    pub(super) fn swept_for_peers(&mut self) {
        if let Some(peering) = &mut self.peering {
            peering.mirror.expired(self.accounts.tracker());
            peering.announcer.all_changed();
        }
    }

    /// Workers have joined or left.
    pub(super) fn reconfigure_peers(&mut self) {
        if let Some(peering) = &mut self.peering {
            peering.mirror.reconfigured();
        }
    }

    /// Tells others what has changed.
    pub(super) fn announce(&mut self) {
        let Some(peering) = &mut self.peering else {
            return;
        };
        let sent = peering.announcer.announce(
            self.accounts.tracker(),
            || peering.mirror.sources(),
            &peering.out,
        );
        for kind in sent.events {
            self.metrics.peer_sent.get_or_create(&Kind { kind }).inc();
        }
        for dropped in sent.dropped {
            count(&self.metrics.peer_dropped, dropped.kind());
        }
    }

    /// What others sent.
    pub(super) fn peer_arrived(&mut self, arrival: Arrival) {
        let now_ms = self.now_ms();
        let Some(peering) = &mut self.peering else {
            return;
        };
        match arrival {
            Arrival::Connected => {
                peering.announcer.connected(true);
                self.announce();
                self.depart(Departure::Ask { of: None });
            }
            Arrival::Disconnected => peering.announcer.connected(false),
            Arrival::Events(decoded) => {
                let find = |owner| owner_of(&mut self.roster, owner);
                let tracker = self.accounts.tracker_mut();
                let taken = peering.mirror.events(&decoded, tracker, find, now_ms);
                self.taken_from_peers(taken);
            }
            Arrival::Snapshot(decoded) => {
                let find = |owner| owner_of(&mut self.roster, owner);
                let tracker = self.accounts.tracker_mut();
                let taken = peering.mirror.snapshot(&decoded, tracker, find, now_ms);
                self.taken_from_peers(taken);
            }
            Arrival::Alive(alive) => {
                let tracker = self.accounts.tracker_mut();
                if peering.mirror.alive(alive, tracker, now_ms) {
                    let of = Some(alive.router_id);
                    self.depart(Departure::Ask { of });
                }
            }
            Arrival::Asked { reply } => {
                // What goes out before the snapshot is what it rests on.
                self.announce();
                let Some(peering) = &self.peering else { return };
                let events = peering.announcer.snapshot(self.accounts.tracker());
                self.depart(Departure::Snapshot { reply, events });
            }
        }
    }

    fn taken_from_peers(&mut self, taken: Vec<Taken>) {
        let is_changed = taken.iter().any(Result::is_ok);
        for taken in taken {
            match taken {
                Ok(kind) => count(&self.metrics.peer_events, kind),
                Err(dropped) => count(&self.metrics.peer_dropped, dropped.kind()),
            }
        }
        if is_changed {
            self.loads_due();
        }
    }

    fn depart(&self, departure: Departure) {
        let kind = match &departure {
            Departure::Ask { .. } => Some("asked"),
            Departure::Snapshot { .. } => Some("answered"),
            Departure::Events(_) | Departure::Alive { .. } => None,
        };
        let Some(peering) = &self.peering else { return };
        if peering.out.try_send(departure).is_err() {
            count(&self.metrics.peer_dropped, Dropped::QueueFull.kind());
        } else if let Some(kind) = kind {
            count(&self.metrics.peer_snapshots, kind);
        }
    }

    /// Looks after peers that fell silent, what couldn't be sent, and the own sign of life.
    pub(super) fn tick_peers(&mut self, tick: u32) {
        let now_ms = self.now_ms();
        let Some(peering) = &mut self.peering else {
            return;
        };
        let gone = peering.mirror.sweep(self.accounts.tracker_mut(), now_ms);
        for router_id in &gone.peers {
            tracing::warn!(router_id, "peer fell silent, its bookings are freed");
            self.metrics.lost_peers.inc();
        }
        let peers = i64::try_from(peering.mirror.len()).unwrap_or(i64::MAX);
        self.metrics.peers.set(peers);
        if gone.freed > 0 {
            self.loads_due();
        }
        self.announce();
        if let Some(peering) = &self.peering
            && tick.is_multiple_of(ALIVE_TICKS)
            && peering.announcer.is_connected()
        {
            let live = peering.announcer.live();
            self.depart(Departure::Alive { live });
        }
    }
}

fn owner_of(roster: &mut roster::Roster, id: OwnerId) -> Result<OwnerKey, Dropped> {
    let (pool, worker) = roster.worker(id.worker).ok_or(Dropped::UnknownWorker)?;
    worker.owner(id.rank).ok_or(Dropped::UnknownRank)?;
    let pool = u16::try_from(pool).map_err(|_| Dropped::UnknownWorker)?;
    Ok(OwnerKey { pool, id })
}

fn count(family: &Family<Kind, Counter>, kind: &'static str) {
    family.get_or_create(&Kind { kind }).inc();
}
