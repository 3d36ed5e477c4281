//! The bookings of this VM: what each has added to the lanes, what all of them have, and what the
//! sidecar is told.
//!
//! Whatever is added to a lane is added to its owner's sum in the same function, [`Bookings::add`],
//! so the reported sums are exactly what this VM added.

mod tentative;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use hashbrown::{HashMap, HashSet};
use kv_core::board::EntryId;
use kv_core::load::{Delta, Leg};
use kv_core::report::{Booked, Failure, OwnerKey, Queued, Step, Sum};
use kv_core::table::Table;
use kv_core::tracker::Tracking;

pub use self::tentative::{Tentative, Told};
use crate::board::{self, Glimpse, Listing};
use crate::host::Host;
use crate::lanes::Lane;
use crate::metrics::{Event, Metrics};
use crate::outbox::{NO_POOL, Outbox, Sums};

/// Owners whose sums are kept although they are zero.
const MAX_SUMS: usize = 4096;

/// Sequence hashes that a booking names, at most; blocks past them count as nobody else's.
pub const MAX_HASHES: usize = 16_384;

/// Boards that are swept at a time: all of them in 16 ticks.
const SWEPT: usize = 16;

/// Where a request may be booked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The owner's gauges.
    pub lane: Lane,
    /// The owner.
    pub owner: OwnerKey,
}

/// Number of a booking within its VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BookingId(u64);

#[derive(Debug)]
struct Live {
    lane: Lane,
    listing: Option<Listing>,
    leg: Leg,
    /// As complete reports list it.
    booked: Booked,
    /// Whether the answer comes whole.
    whole: bool,
    /// When its prefill is taken to be done.
    prefilled_ns: Option<u64>,
}

/// All bookings of a VM.
#[derive(Debug, Default)]
pub struct Bookings {
    vm: u64,
    last: u64,
    /// The board that was swept last.
    swept: u8,
    /// Number of the last entry on a board.
    listed: u64,
    live: HashMap<u64, Live>,
    sums: Sums,
    /// The part of the sums that was taken out for VMs that are gone.
    written_off: Sums,
    /// Requests that wait, by ticket.
    queued: BTreeMap<u64, Queued>,
    outbox: Outbox,
    /// Whether the VM ends with the requests it has.
    leaving: bool,
}

impl Bookings {
    /// Names the VM in reports.
    pub fn set_vm(&mut self, vm: u64) {
        self.vm = vm;
        self.outbox.set_vm(vm);
    }

    /// Books a request with this much prefill to do and these blocks to hold, as far as they are
    /// tracked, and puts its prompt, where it is known, among the live ones.
    pub fn hold(
        &mut self,
        host: &impl Host,
        metrics: &mut Metrics,
        place: Place,
        tracking: Tracking,
        (prefill_tokens, blocks): (u32, u32),
        prompt: Option<&mut Glimpse>,
    ) -> Tentative {
        let prefill_tokens = if tracking.prefill_tokens {
            prefill_tokens
        } else {
            0
        };
        let blocks = if tracking.active_blocks { blocks } else { 0 };
        let (leg, delta) = Leg::book(prefill_tokens, blocks);
        let at_ns = host.unix_ns();
        let is_known = prompt.is_some();
        let listed = prompt.and_then(|prompt| {
            self.listed += 1;
            let id = EntryId {
                vm: self.vm,
                number: self.listed,
            };
            prompt.list(host, id, place.lane.name(), seconds(host))
        });
        if is_known && listed.is_none() {
            metrics.count(host, Event::Unlisted, 1);
        }
        let double = listed.map_or(0, |(_, shared)| shared.into());
        let delta = delta.plus(Delta::double(double));
        place.lane.wind(host, prefill_tokens);
        self.add(host, place, delta);
        Tentative {
            place,
            listing: listed.map(|(listing, _)| listing),
            leg,
            prefill_tokens,
            blocks,
            delta,
            at_ns,
        }
    }

    /// Another owner serves the request.
    pub fn relocate(&mut self, host: &impl Host, metrics: &mut Metrics, id: BookingId, to: Place) {
        let Some(mut live) = self.live.remove(&id.0) else {
            return;
        };
        let from = live.place();
        let at_ns = host.unix_ns();
        let moved = live
            .listing
            .and_then(|listing| listing.relocate(host, to.lane.name()));
        let (left, joined) = moved.unwrap_or_default();
        let left = Delta::double(-i64::from(left));
        self.add(host, from, live.leg.release().plus(left));
        from.lane.settle(host);
        let (mut leg, booked) = Leg::book(live.booked.prefill_tokens, live.booked.blocks);
        let joined = Delta::double(joined.into());
        if !live.booked.decoding {
            to.lane.wind(host, live.booked.prefill_tokens);
        }
        self.add(host, to, booked.plus(joined));
        if live.booked.decoding {
            let delta = leg.first_token();
            self.add(host, to, delta);
        }
        live.leg = leg;
        live.lane = to.lane;
        live.booked.owner = to.owner;
        self.live.insert(id.0, live);
        self.tell(host, metrics, to.owner, at_ns, || Step::Move {
            request: id.0,
            to: to.owner,
        });
    }

    /// The first token has come. Counts once.
    pub fn first_token(&mut self, host: &impl Host, metrics: &mut Metrics, id: BookingId) {
        let Some(live) = self.live.get_mut(&id.0).filter(|l| !l.booked.decoding) else {
            return;
        };
        live.booked.decoding = true;
        let (place, delta, whole) = (live.place(), live.leg.first_token(), live.whole);
        let at_ns = host.unix_ns();
        self.add(host, place, delta);
        place.lane.settle(host);
        let request = id.0;
        self.tell(host, metrics, place.owner, at_ns, || {
            if whole {
                Step::Prefilled { request }
            } else {
                Step::FirstToken { request }
            }
        });
    }

    /// Its worker has said what it found in its cache.
    pub fn cached(
        &mut self,
        host: &impl Host,
        metrics: &mut Metrics,
        id: BookingId,
        predicted: u32,
        found: u32,
    ) {
        let Some(live) = self.live.get(&id.0) else {
            return;
        };
        let owner = live.booked.owner;
        let at_ns = host.unix_ns();
        self.tell(host, metrics, owner, at_ns, || Step::Cached {
            request: id.0,
            predicted,
            found,
        });
    }

    /// The answer has filled blocks, and `left` of it is still to come.
    pub fn grow(
        &mut self,
        host: &impl Host,
        metrics: &mut Metrics,
        id: BookingId,
        blocks: u32,
        left: f32,
    ) {
        let Some(live) = self.live.get_mut(&id.0) else {
            return;
        };
        live.booked.blocks = live.booked.blocks.saturating_add(blocks);
        let (place, delta) = (live.place(), live.leg.grow(blocks));
        let at_ns = host.unix_ns();
        self.add(host, place, delta);
        self.tell(host, metrics, place.owner, at_ns, || Step::Grown {
            request: id.0,
            blocks,
            left,
        });
    }

    /// A worker has failed a request, booked or not.
    pub fn fail(
        &mut self,
        host: &impl Host,
        metrics: &mut Metrics,
        id: Option<BookingId>,
        owner: OwnerKey,
        failure: Failure,
    ) {
        metrics.count(host, Event::Failure, 1);
        let at_ns = host.unix_ns();
        self.tell(host, metrics, owner, at_ns, || Step::Failed {
            request: id.map_or(0, |id| id.0),
            owner,
            failure,
        });
    }

    /// Takes out of the lanes what VMs that are gone have left there.
    pub fn write_off(
        &mut self,
        host: &impl Host,
        metrics: &mut Metrics,
        left: &[Sum],
        place: impl Fn(OwnerKey) -> Option<Place>,
    ) {
        for sum in left {
            let Some(place) = place(sum.owner) else {
                continue;
            };
            self.add(host, place, sum.removal());
            let written_off = self.written_off.entry(sum.owner);
            let written_off = written_off.or_insert_with(|| Sum::new(sum.owner));
            written_off.add(sum.removal());
            let step = Step::WrittenOff(*written_off);
            self.outbox.push(host, metrics, step, host.unix_ns());
            metrics.count(host, Event::WrittenOff, 1);
        }
    }

    /// The request is over. Counts once.
    pub fn free(&mut self, host: &impl Host, metrics: &mut Metrics, id: BookingId) {
        let Some(mut live) = self.live.remove(&id.0) else {
            return;
        };
        let (place, delta) = (live.place(), live.leg.release());
        let at_ns = host.unix_ns();
        self.add(host, place, delta.plus(unlist(host, live.listing)));
        if !live.booked.decoding {
            place.lane.settle(host);
        }
        self.tell(host, metrics, place.owner, at_ns, || Step::Free {
            request: id.0,
        });
    }

    /// A request waits.
    pub fn queue(&mut self, host: &impl Host, metrics: &mut Metrics, queued: Queued) {
        let step = Step::Queued(Box::new(queued.clone()));
        self.queued.insert(queued.ticket, queued);
        self.outbox.push(host, metrics, step, host.unix_ns());
    }

    /// A request waits no more.
    pub fn unqueue(&mut self, host: &impl Host, metrics: &mut Metrics, ticket: u64) {
        if self.queued.remove(&ticket).is_some() {
            let step = Step::Unqueued { ticket };
            self.outbox.push(host, metrics, step, host.unix_ns());
        }
    }

    /// Whether requests wait somewhere, so that others want to know at once of what lightens a load.
    pub fn set_awaited(&mut self, is_awaited: bool) {
        self.outbox.set_awaited(is_awaited);
    }

    /// Whether no other proxy books on the same owners, so that bookings can wait.
    pub fn set_alone(&mut self, is_alone: bool) {
        self.outbox.set_alone(is_alone);
    }

    /// Reports what has happened, if it is time to.
    pub fn settle(&mut self, host: &impl Host) {
        if !self.outbox.is_pending() {
            return;
        }
        if self.leaving {
            self.report_leaving(host);
        } else {
            self.outbox.settle(host, &self.sums);
        }
    }

    /// Reports what has happened, and all bookings when that is due.
    pub fn on_tick(&mut self, host: &impl Host, metrics: &mut Metrics) {
        self.estimate(host, metrics);
        let live = self.live.values().map(|live| &live.booked);
        let state = self.written_off.values().copied().map(Step::WrittenOff);
        let queued = self.queued.values().filter(|q| q.pool != NO_POOL);
        let state = state.chain(queued.map(|q| Step::Queued(Box::new(q.clone()))));
        if self.outbox.tick(host, &self.sums, live, state) {
            metrics.count(host, Event::Complete, 1);
            self.stamp(host);
        }
    }

    /// Ends the prefill of those whose first token will not be seen, when it is time.
    fn estimate(&mut self, host: &impl Host, metrics: &mut Metrics) {
        let now_ns = host.now_ns();
        let is_due = |live: &Live| {
            let at_ns = live.prefilled_ns.filter(|_| !live.booked.decoding);
            at_ns.is_some_and(|at_ns| at_ns <= now_ns)
        };
        let due = self.live.iter().filter(|(_, live)| is_due(live));
        let due: Vec<u64> = due.map(|(id, _)| *id).collect();
        for id in due {
            metrics.count(host, Event::Estimated, 1);
            self.first_token(host, metrics, BookingId(id));
        }
    }

    /// The VM ends with the requests it has. It gets no more ticks: what happens from here on is
    /// reported at once.
    pub fn leave(&mut self, host: &impl Host) {
        self.leaving = true;
        self.report_leaving(host);
    }

    /// The VM goes on after all.
    pub fn stay(&mut self) {
        self.leaving = false;
    }

    fn report_leaving(&mut self, host: &impl Host) {
        let live = self.live.values().map(|live| &live.booked);
        let state = self.written_off.values().copied().map(Step::WrittenOff);
        self.outbox.leave(host, &self.sums, live, state);
    }

    /// Shows other VMs that the prompts of this one are live.
    fn stamp(&self, host: &impl Host) {
        let listings = self.live.values().filter_map(|live| live.listing);
        let live: HashSet<Listing> = listings.collect();
        let shards: BTreeSet<u8> = live.iter().map(|listing| listing.shard).collect();
        for shard in shards {
            let is_live = |id| live.contains(&Listing { shard, id });
            board::stamp(host, shard, seconds(host), is_live);
        }
    }

    /// Takes the prompts of VMs that are no more off some boards, the next ones each time. What
    /// others use of them counts once less.
    pub fn sweep(&mut self, host: &impl Host, place: impl Fn(u64) -> Option<Place>) {
        for _ in 0..SWEPT {
            self.swept = self.swept.wrapping_add(1);
            for (owner, shared) in board::expire(host, self.swept, seconds(host)) {
                if let Some(place) = place(owner) {
                    self.add(host, place, Delta::double(-i64::from(shared)));
                }
            }
        }
    }

    /// Reports what has happened, whenever the last report was.
    pub fn flush(&mut self, host: &impl Host) {
        self.outbox.flush(host, &self.sums, host.now_ns());
    }

    /// Follows pools to their positions in another table.
    pub fn follow(&mut self, before: &Table, after: &Table) {
        if self.sums.len() > MAX_SUMS {
            self.sums.retain(|_, sum| (sum.a, sum.b) != (0, 0));
        }
        let position = |name: &str| {
            let at = after.pools.iter().position(|pool| pool.name == name);
            at.and_then(|at| u16::try_from(at).ok()).unwrap_or(NO_POOL)
        };
        let moved: Vec<u16> = before.pools.iter().map(|p| position(&p.name)).collect();
        if moved.iter().zip(0..).all(|(to, from)| *to == from) {
            return;
        }
        let follow = |owner: OwnerKey| OwnerKey {
            pool: moved
                .get(usize::from(owner.pool))
                .copied()
                .unwrap_or(NO_POOL),
            ..owner
        };
        for sums in [&mut self.sums, &mut self.written_off] {
            let moved = std::mem::take(sums).into_values().map(|sum| Sum {
                owner: follow(sum.owner),
                ..sum
            });
            let kept = moved.filter(|sum| sum.owner.pool != NO_POOL);
            *sums = kept.map(|sum| (sum.owner, sum)).collect();
        }
        for live in self.live.values_mut() {
            live.booked.owner = follow(live.booked.owner);
        }
        for queued in self.queued.values_mut() {
            let at = usize::from(queued.pool);
            queued.pool = moved.get(at).copied().unwrap_or(NO_POOL);
        }
        self.outbox.forget();
    }

    /// The only way into a lane.
    fn add(&mut self, host: &impl Host, place: Place, delta: Delta) {
        place.lane.add(host, delta);
        let owner = place.owner;
        self.sums
            .entry(owner)
            .or_insert_with(|| Sum::new(owner))
            .add(delta);
        self.outbox.touch(owner);
    }

    fn tell(
        &mut self,
        host: &impl Host,
        metrics: &mut Metrics,
        owner: OwnerKey,
        at_ns: u64,
        step: impl FnOnce() -> Step,
    ) {
        if owner.pool != NO_POOL {
            self.outbox.push(host, metrics, step(), at_ns);
        }
    }
}

/// Takes a prompt off its board. What to add to the lanes for that.
fn unlist(host: &impl Host, listing: Option<Listing>) -> Delta {
    let removed = listing.and_then(|listing| listing.remove(host));
    Delta::double(removed.map_or(0, |(_, shared)| -i64::from(shared)))
}

/// Seconds of the process's clock.
#[must_use]
pub fn seconds(host: &impl Host) -> u32 {
    u32::try_from(host.now_ns() / 1_000_000_000).unwrap_or(u32::MAX)
}

impl Live {
    fn place(&self) -> Place {
        Place {
            lane: self.lane,
            owner: self.booked.owner,
        }
    }
}
