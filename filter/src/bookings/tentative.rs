//! A booking between the decision and the word to the sidecar.

use kv_core::affinity::Session;
use kv_core::load::{Delta, Leg};
use kv_core::report::{Booked, Evidence, Step};

use super::{BookingId, Bookings, Live, MAX_HASHES, Place, unlist};
use crate::board::Listing;
use crate::host::Host;
use crate::metrics::Metrics;

/// A booking that is in the lanes and that nobody has been told of: it is to be opened or undone.
#[derive(Debug)]
#[must_use]
pub struct Tentative {
    pub(super) place: Place,
    /// Where its prompt stands, if it does.
    pub(super) listing: Option<Listing>,
    pub(super) leg: Leg,
    pub(super) prefill_tokens: u32,
    pub(super) blocks: u32,
    pub(super) delta: Delta,
    /// When it was made, Unix nanoseconds.
    pub(super) at_ns: u64,
}

/// What a booking is told with.
#[derive(Clone, Debug, Default)]
pub struct Told {
    /// See [`Booked::prefix`].
    pub prefix: Option<(u32, u64)>,
    /// See [`Booked::hashes`].
    pub hashes: Vec<u64>,
    /// What the decision rested on.
    pub evidence: Option<Evidence>,
    /// See [`Booked::session`].
    pub session: Option<Session>,
    /// Whether the answer comes whole, so that its first token is not seen.
    pub whole: bool,
    /// Prompt tokens that the worker prefills in a second; 0 where not known.
    pub prefill_rate: u32,
}

impl Tentative {
    /// What it has added to the lanes.
    #[must_use]
    pub fn delta(&self) -> Delta {
        self.delta
    }

    /// Where its prompt stands among the live ones.
    #[must_use]
    pub fn listing(&self) -> Option<Listing> {
        self.listing
    }

    /// Takes it back as if it had never been.
    pub fn undo(mut self, bookings: &mut Bookings, host: &impl Host) {
        let delta = self.leg.release().plus(unlist(host, self.listing));
        bookings.add(host, self.place, delta);
        self.place.lane.unwind(host, self.prefill_tokens);
    }

    /// Makes it known.
    pub fn open(
        self,
        bookings: &mut Bookings,
        host: &impl Host,
        metrics: &mut Metrics,
        told: Told,
    ) -> BookingId {
        bookings.last += 1;
        let request = bookings.last;
        let Told {
            prefix,
            mut hashes,
            evidence,
            session,
            whole,
            prefill_rate,
        } = told;
        hashes.truncate(MAX_HASHES);
        let owner = self.place.owner;
        let booked = Booked {
            request,
            owner,
            decoding: false,
            prefill_tokens: self.prefill_tokens,
            blocks: self.blocks,
            prefix,
            hashes,
            evidence: None,
            session,
        };
        let live = Live {
            lane: self.place.lane,
            listing: self.listing,
            leg: self.leg,
            booked: booked.clone(),
            whole,
            prefilled_ns: (whole && prefill_rate > 0).then(|| {
                let takes_ns = u64::from(self.prefill_tokens) * 1_000_000_000;
                host.now_ns()
                    .saturating_add(takes_ns / u64::from(prefill_rate))
            }),
        };
        bookings.live.insert(request, live);
        let booked = Booked { evidence, ..booked };
        bookings.tell(host, metrics, owner, self.at_ns, || {
            Step::Book(Box::new(booked))
        });
        BookingId(request)
    }
}
