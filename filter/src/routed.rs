//! A request on its way to a worker: which one really serves it, its first token, its end.

use std::rc::Rc;

use kv_core::cost::Demand;
use kv_core::report;

use crate::bookings::{BookingId, Told};
use crate::choose::{Ask, Choice};
use crate::fleet::{Fleet, Served};
use crate::host::{Headers, Host};
use crate::metrics::{Fault, Miss};
use crate::reason::Reason;
use crate::record::{self, Evidence};
use crate::request::DECISION;
use crate::vm::Router;

/// Pool label of requests for which no pool is known.
const NO_POOL: &str = "none";

/// A request that has been decided.
#[derive(Debug)]
pub struct Routed {
    /// The table it was decided with, and the position of its pool there.
    pool: Option<(Rc<Fleet>, usize)>,
    reason: Reason,
    demand: Demand,
    /// Position of the chosen owner in the pool.
    owner: Option<usize>,
    booking: Option<BookingId>,
    evidence: Option<Evidence>,
    /// Whether a worker has answered.
    answered: bool,
}

impl Routed {
    /// A request for which no pool was known.
    #[must_use]
    pub fn nowhere() -> Self {
        Self {
            pool: None,
            reason: Reason::NoTable,
            demand: Demand::default(),
            owner: None,
            booking: None,
            evidence: None,
            answered: false,
        }
    }

    /// A request for which a choice was made. Makes its booking known.
    pub fn new<H: Host>(
        router: &mut Router<H>,
        fleet: Rc<Fleet>,
        served: &Served<'_>,
        ask: &Ask<'_>,
        choice: Choice,
    ) -> Self {
        let Choice {
            owner,
            reason,
            booking,
            prefix,
            trust,
            read_ns,
            mut weighed,
            ..
        } = choice;
        record::keep_best(&mut weighed);
        let demand = weighed.demand;
        let booking = booking.map(|booking| {
            let known = prefix.map_or(0, |(depth, _)| depth as usize);
            let told = Told {
                prefix,
                hashes: ask.hashes.get(known..).unwrap_or_default().to_vec(),
                evidence: Some(report::Evidence {
                    at_ns: read_ns,
                    reason: reason.name().to_owned(),
                    tokens: ask.tokens,
                    #[allow(clippy::cast_possible_truncation)]
                    trust: trust as f32,
                    candidates: record::told(served.pool, &weighed),
                }),
            };
            let Router {
                host,
                metrics,
                bookings,
                ..
            } = router;
            booking.open(bookings, host, metrics, told)
        });
        let position = served.position;
        let evidence = fleet.table.settings.decision_header.then(|| {
            let fleet = Rc::clone(&fleet);
            Evidence::new(fleet, position, reason, weighed)
        });
        Self {
            pool: Some((fleet, position)),
            reason,
            demand,
            owner,
            booking,
            evidence,
            answered: false,
        }
    }

    /// Label of its pool.
    #[must_use]
    pub fn pool(&self) -> &str {
        let pool = self.pool.as_ref();
        let pool = pool.and_then(|(fleet, position)| fleet.table.pools.get(*position));
        pool.map_or(NO_POOL, |pool| &pool.name)
    }

    /// Why it was routed as it was.
    #[must_use]
    pub fn reason(&self) -> Reason {
        self.reason
    }

    /// Response headers have come.
    pub fn on_response_headers<H: Host>(&mut self, router: &mut Router<H>) {
        if !self.answered {
            self.attribute(router);
        }
        let Some(record) = self.evidence.take().and_then(|e| e.to_header()) else {
            return;
        };
        let host = &router.host;
        if !host.set_header(Headers::Response, DECISION, record.as_bytes()) {
            router.metrics.fault(host, Fault::Header);
        }
    }

    /// The first bytes of the answer have come: prefill is done. For an answer that is not
    /// streamed that is at its end, so its worker seems to prefill for as long as it works.
    pub fn on_first_token<H: Host>(&mut self, router: &mut Router<H>) {
        if let Some(booking) = self.booking {
            let Router {
                host,
                metrics,
                bookings,
                ..
            } = router;
            bookings.first_token(host, metrics, booking);
        }
    }

    /// The request is over, whatever happened.
    pub fn on_over<H: Host>(self, router: &mut Router<H>) {
        let Router {
            host,
            metrics,
            bookings,
            ..
        } = router;
        if !self.answered {
            metrics.missed(host, Miss::Unanswered);
        }
        if let Some(booking) = self.booking {
            bookings.free(host, metrics, booking);
        }
    }

    /// Sets the worker that really serves the request against the chosen one, and books it there.
    /// An answer of Envoy itself names none.
    fn attribute<H: Host>(&mut self, router: &mut Router<H>) {
        let Router {
            host,
            metrics,
            bookings,
            world,
            ..
        } = router;
        let Some(address) = host.property(b"upstream\0address") else {
            return;
        };
        self.answered = true;
        // A long answer shall not keep an old table in memory.
        let pool = self.pool.take();
        let pool = pool
            .as_ref()
            .and_then(|(fleet, at)| fleet.table.pools.get(*at));
        let chosen = self.owner.and_then(|owner| pool?.owners.get(owner));
        let chosen = chosen.map(|owner| owner.endpoint.as_bytes());
        if chosen == Some(&address) {
            metrics.intended(host, pool.map_or(NO_POOL, |pool| &pool.name), self.reason);
            return;
        }
        let miss = match chosen {
            None => Miss::Unattributed,
            Some(_) if attempts(host) > 1 => Miss::Retried,
            Some(_) => Miss::OverrideMissed,
        };
        metrics.missed(host, miss);
        let fleet = world.fleet();
        let place = fleet.as_ref().and_then(|fleet| {
            let served = fleet.named(&pool?.name)?;
            served.place(served.owner_at(std::str::from_utf8(&address).ok()?)?)
        });
        match (self.booking, place) {
            (Some(booking), Some(place)) => bookings.relocate(host, metrics, booking, place),
            // It loads nobody that is chosen among.
            (Some(booking), None) => bookings.free(host, metrics, booking),
            (None, Some(place)) => {
                let Demand { tokens, .. } = self.demand;
                let size = (tokens, self.demand.blocks());
                let booking = bookings.hold(host, metrics, place, size, None);
                let told = Told::default();
                self.booking = Some(booking.open(bookings, host, metrics, told));
            }
            (None, None) => {}
        }
    }
}

/// How often Envoy has sent the current request; 0 where it does not say.
fn attempts(host: &impl Host) -> u64 {
    let count = host.property(b"upstream\0request_attempt_count");
    let count = count.and_then(|count| count.try_into().ok());
    count.map_or(0, u64::from_le_bytes)
}
