//! A request on its way to a worker: which one really serves it, its first token, its end.

use std::rc::Rc;

use kv_core::cost::Demand;
use kv_core::report::{self, Failure, OwnerKey};
use kv_core::table::Owner;

use crate::answer::Growth;
use crate::bookings::{BookingId, Told};
use crate::choose::{Answer, Ask, Choice, Weighed};
use crate::fleet::{Fleet, Served};
use crate::host::{Headers, Host};
use crate::metrics::{Fault, Miss};
use crate::reason::Reason;
use crate::record::{self, Evidence};
use crate::request::DECISION;
use crate::usage::Usage;
use crate::vm::Router;

/// Pool label of requests for which no pool is known.
pub const NO_POOL: &str = "none";

/// Envoy's response flags of a worker that could not be connected or that broke off: remote reset,
/// connection failure, connection termination, protocol error.
const BROKEN: u64 = 0x10 | 0x20 | 0x40 | 0x80_0000;

/// A request that has been decided.
#[derive(Debug)]
pub struct Routed {
    /// The table it was decided with, and the position of its pool there.
    pool: Option<(Rc<Fleet>, usize)>,
    reason: Reason,
    demand: Demand,
    /// Position of the chosen owner in the pool.
    owner: Option<usize>,
    /// The chosen owner, and the one named after it.
    named: [Option<OwnerKey>; 2],
    booking: Option<BookingId>,
    evidence: Option<Evidence>,
    /// Where the worker's word on its cache can be held against the decision.
    usage: Option<Usage>,
    /// Whether a worker has answered.
    answered: bool,
    /// Whether the answer has come to its end.
    is_complete: bool,
    /// The owner whose worker did.
    server: Option<OwnerKey>,
    /// Whether the answer is an error, which has no tokens.
    is_error: bool,
    /// Blocks that a streamed answer fills, where they are tracked.
    growth: Option<Growth>,
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
            named: [None; 2],
            booking: None,
            evidence: None,
            usage: None,
            answered: false,
            is_complete: false,
            server: None,
            is_error: false,
            growth: None,
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
            second,
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
        let usage = predicted(served, ask, reason, &weighed).map(Usage::new);
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
                    constraints: ask.constraints.clone(),
                }),
                session: ask.session,
                whole: ask.answer == Answer::Whole,
                prefill_rate: owner.and_then(|owner| served.owner(owner)).map_or(0, rate),
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
            Evidence::new(fleet, position, reason, weighed, ask.constraints.clone())
        });
        let key = |owner: usize| Some(served.place(owner)?.owner);
        let is_tracked = served.pool.policy.tracking.output_blocks;
        let growth = match ask.answer {
            Answer::Streamed { expected, .. } if is_tracked => {
                Some(Growth::new(ask.tokens, served.pool.block_size, expected))
            }
            _ => None,
        };
        Self {
            pool: Some((fleet, position)),
            reason,
            demand,
            owner,
            named: [owner.and_then(key), second.and_then(key)],
            booking,
            evidence,
            usage,
            answered: false,
            is_complete: false,
            server: None,
            is_error: false,
            growth,
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
        let status = status(&router.host);
        self.is_error = status >= 300;
        let by_worker = status < 500 || is_via_upstream(&router.host);
        if !self.answered && by_worker {
            // The chosen one is tried first, and again only after all others.
            if !self.attribute(router) {
                self.fail_unreached(router, attempts(&router.host).saturating_sub(1));
            }
            if status >= 500 {
                self.fail(router, self.server, Failure::Status);
            }
        }
        let Some(record) = self.evidence.take().and_then(|e| e.to_header()) else {
            return;
        };
        let host = &router.host;
        if !host.set_header(Headers::Response, DECISION, record.as_bytes()) {
            router.metrics.fault(host, Fault::Header);
        }
    }

    /// A part of the answer has come. With the first, prefill is done; of an answer that is not
    /// streamed that is at its end; `end` with the last part.
    pub fn on_response_body<H: Host>(&mut self, router: &mut Router<H>, size: usize, end: bool) {
        self.is_complete |= end;
        let booking = self.booking.filter(|_| size > 0 && !self.is_error);
        let Some(booking) = booking else {
            return;
        };
        let Router {
            host,
            metrics,
            bookings,
            ..
        } = router;
        bookings.first_token(host, metrics, booking);
        if let Some(growth) = &mut self.growth
            && let Some((blocks, left)) = growth.feed(&host.answer(0, size))
        {
            bookings.grow(host, metrics, booking, blocks, left);
        }
        if let Some(usage) = &mut self.usage {
            let (start, wanted) = Usage::wanted(size);
            usage.take(&host.answer(start, wanted));
        }
    }

    /// The request is over, whatever happened.
    pub fn on_over<H: Host>(self, router: &mut Router<H>) {
        // An answer that has come to its end is not broken off.
        let may_be_broken = !(self.answered && self.is_complete);
        let is_broken = may_be_broken && flags(&router.host) & BROKEN != 0;
        if !self.answered {
            router.metrics.missed(&router.host, Miss::Unanswered);
            if is_broken {
                // Where Envoy does not say how often it tried, it tried once.
                self.fail_unreached(router, attempts(&router.host).max(1));
            }
        } else if is_broken {
            self.fail(router, self.server, Failure::Broken);
        }
        let Router {
            host,
            metrics,
            bookings,
            ..
        } = router;
        if let Some(booking) = self.booking {
            if let Some(usage) = &self.usage
                && let Some(found) = usage.found()
            {
                bookings.cached(host, metrics, booking, usage.predicted(), found);
            }
            bookings.free(host, metrics, booking);
        }
    }

    /// Tells of the workers that the first `attempts` attempts did not reach.
    fn fail_unreached<H: Host>(&self, router: &mut Router<H>, attempts: u64) {
        let attempts = usize::try_from(attempts).unwrap_or(usize::MAX);
        for owner in self.named.into_iter().take(attempts) {
            self.fail(router, owner, Failure::Unreached);
        }
    }

    fn fail<H: Host>(&self, router: &mut Router<H>, owner: Option<OwnerKey>, failure: Failure) {
        let Router {
            host,
            metrics,
            bookings,
            ..
        } = router;
        if let Some(owner) = owner {
            bookings.fail(host, metrics, self.booking, owner, failure);
        }
    }

    /// Sets the worker that really serves the request against the chosen one, and books it there.
    /// An answer of Envoy itself names none. Whether it is the chosen one.
    fn attribute<H: Host>(&mut self, router: &mut Router<H>) -> bool {
        let Router {
            host,
            metrics,
            bookings,
            world,
            ..
        } = router;
        let Some(address) = host.property(b"upstream\0address") else {
            return false;
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
            let [chosen, _] = self.named;
            self.server = chosen;
            return true;
        }
        self.usage = None;
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
        self.server = place.map(|place| place.owner);
        let tracking = pool.map_or_else(Default::default, |pool| pool.policy.tracking);
        match (self.booking, place) {
            (Some(booking), Some(place)) => bookings.relocate(host, metrics, booking, place),
            // It loads nobody that is chosen among.
            (Some(booking), None) => bookings.free(host, metrics, booking),
            (None, Some(place)) => {
                let Demand { tokens, .. } = self.demand;
                let size = (tokens, self.demand.blocks());
                let booking = bookings.hold(host, metrics, place, tracking, size, None);
                let told = Told::default();
                self.booking = Some(booking.open(bookings, host, metrics, told));
            }
            (None, None) => {}
        }
        false
    }
}

/// Prompt tokens that the chosen owner should find in its cache, where its overlap was looked up:
/// an engine computes at least the last token, and with it the last block. `None` too where the
/// answer will not say what it did find.
fn predicted(served: &Served<'_>, ask: &Ask<'_>, reason: Reason, weighed: &Weighed) -> Option<u32> {
    let chosen = weighed.scored.get(weighed.chosen?)?;
    let [.., blocks] = chosen.candidate.overlap.depth;
    let block = served.pool.block_size;
    let usable = ask.tokens.checked_sub(1)?.checked_div(block)?;
    let says = !matches!(
        ask.answer,
        Answer::Streamed {
            tells_usage: false,
            ..
        }
    );
    let is_known = says && reason == Reason::Kv && !ask.hashes.is_empty();
    is_known.then(|| blocks.min(usable).saturating_mul(block))
}

/// The learned rate of an owner.
fn rate(owner: &Owner) -> u32 {
    owner.traits.prefill_rate
}

/// Status of the current response; 200 where there is none to be read.
fn status(host: &impl Host) -> u32 {
    let status = host.header(Headers::Response, ":status");
    let status = status.and_then(|status| std::str::from_utf8(&status).ok()?.parse().ok());
    status.unwrap_or(200)
}

/// Whether the current response is a worker's, and not one of Envoy itself.
fn is_via_upstream(host: &impl Host) -> bool {
    host.property(b"response\0code_details").as_deref() == Some(b"via_upstream")
}

/// Why the current request ended as it did, as bits.
fn flags(host: &impl Host) -> u64 {
    let flags = host.property(b"response\0flags");
    let flags = flags.and_then(|flags| flags.try_into().ok());
    flags.map_or(0, u64::from_le_bytes)
}

/// How often Envoy has sent the current request; 0 where it does not say.
fn attempts(host: &impl Host) -> u64 {
    let count = host.property(b"upstream\0request_attempt_count");
    let count = count.and_then(|count| count.try_into().ok());
    count.map_or(0, u64::from_le_bytes)
}
