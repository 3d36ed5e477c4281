//! The load as it was, some time ago.
//!
//! Reports of different VMs arrive in another order than that in which things happened. Changes
//! wait here for those that happened before them and are on their way, and are then made in the
//! order of their times; questions wait with them. Synchronous: arrivals are milliseconds of any
//! clock that doesn't go back.

use std::collections::{BTreeMap, HashMap};

use kv_core::tracker::{Change, Tracker};

/// How long changes wait for earlier ones: a VM may leave its last steps to its next tick.
const LAG_MS: u64 = 250;
/// Changes and questions that wait, at most.
const MAX_WAITING: usize = 1 << 16;
/// How long a source is remembered without changes.
const MEMORY_MS: u64 = 60_000;

/// A tracker that is behind, and what it is yet to see.
#[derive(Debug)]
pub struct Past<Q> {
    tracker: Tracker,
    /// By time and order of arrival.
    waiting: BTreeMap<(u64, u64), Waiting<Q>>,
    arrivals: u64,
    /// The latest time of each source's changes: those of one booking keep their order, whatever
    /// a wall clock does.
    sources: HashMap<u64, Source>,
}

#[derive(Debug)]
struct Waiting<Q> {
    arrived_ms: u64,
    what: What<Q>,
}

#[derive(Debug)]
enum What<Q> {
    Change(Change),
    Question(Q),
}

#[derive(Clone, Copy, Debug, Default)]
struct Source {
    latest_ns: u64,
    arrived_ms: u64,
}

impl<Q> Past<Q> {
    /// The past of an empty tracker.
    #[must_use]
    pub fn new(tracker: Tracker) -> Self {
        Self {
            tracker,
            waiting: BTreeMap::new(),
            arrivals: 0,
            sources: HashMap::new(),
        }
    }

    /// Something changed at `at_ns`.
    pub fn change(&mut self, change: Change, at_ns: u64, now_ms: u64) {
        let source = self.sources.entry(source(&change)).or_default();
        source.latest_ns = source.latest_ns.max(at_ns);
        source.arrived_ms = now_ms;
        let at_ns = source.latest_ns;
        self.wait(at_ns, What::Change(change), now_ms);
    }

    /// Something is to be known as of `at_ns`.
    pub fn ask(&mut self, question: Q, at_ns: u64, now_ms: u64) {
        self.wait(at_ns, What::Question(question), now_ms);
    }

    fn wait(&mut self, at_ns: u64, what: What<Q>, now_ms: u64) {
        self.arrivals += 1;
        let waiting = Waiting {
            arrived_ms: now_ms,
            what,
        };
        self.waiting.insert((at_ns, self.arrivals), waiting);
    }

    /// Goes on to the next question that has waited long enough: [`Past::tracker`] is then as it
    /// was at its time.
    pub fn next(&mut self, now_ms: u64) -> Option<Q> {
        loop {
            let (_, first) = self.waiting.first_key_value()?;
            let is_due = now_ms.saturating_sub(first.arrived_ms) >= LAG_MS;
            if !is_due && self.waiting.len() <= MAX_WAITING {
                return None;
            }
            match self.waiting.pop_first()?.1.what {
                What::Question(question) => return Some(question),
                What::Change(change) => {
                    // One that can't be made could not be made then either.
                    self.tracker.apply(change, now_ms);
                }
            }
        }
    }

    /// Forgets sources without changes.
    pub fn sweep(&mut self, now_ms: u64) {
        let is_remembered = |s: &Source| now_ms.saturating_sub(s.arrived_ms) < MEMORY_MS;
        self.sources.retain(|_, source| is_remembered(source));
    }

    /// The load as it was.
    #[must_use]
    pub fn tracker(&self) -> &Tracker {
        &self.tracker
    }
}

fn source(change: &Change) -> u64 {
    match change {
        Change::Book(id, ..)
        | Change::Relocate(id, _)
        | Change::FirstToken(id)
        | Change::Grow(id, ..)
        | Change::Free(id) => id.source,
    }
}

#[cfg(test)]
mod tests {
    use kv_core::id::OwnerId;
    use kv_core::report::OwnerKey;
    use kv_core::tracker::{Booking, BookingId, Tracking};

    use super::*;

    const OWNER: OwnerKey = OwnerKey {
        pool: 0,
        id: OwnerId { worker: 1, rank: 0 },
    };

    fn past() -> Past<&'static str> {
        Past::new(Tracker::new(Tracking::default(), 1 << 20))
    }

    fn id(source: u64, request: u64) -> BookingId {
        BookingId { source, request }
    }

    fn book(id: BookingId) -> Change {
        Change::Book(id, OWNER, Box::default())
    }

    #[test]
    fn what_two_vms_say_is_put_in_the_order_in_which_it_happened() {
        let mut past = past();
        past.change(book(id(1, 1)), 10, 0);
        past.ask("before the second", 20, 0);
        past.change(book(id(1, 2)), 30, 0);
        past.ask("after it", 40, 0);
        // Another VM's report comes last and tells of earlier things.
        past.change(book(id(2, 1)), 15, LAG_MS - 1);
        past.change(Change::Free(id(2, 1)), 25, LAG_MS - 1);
        assert_eq!(past.next(LAG_MS - 1), None);
        let waiting = |past: &Past<_>| past.tracker().load(&OWNER).waiting;
        // What is late is waited for like the rest.
        assert_eq!(past.next(LAG_MS), None);
        assert_eq!(past.next(2 * LAG_MS), Some("before the second"));
        assert_eq!(waiting(&past), 2);
        assert_eq!(past.next(2 * LAG_MS), Some("after it"));
        assert_eq!(waiting(&past), 2);
        assert_eq!(past.next(2 * LAG_MS), None);
    }

    #[test]
    fn steps_of_one_vm_keep_their_order_though_its_clock_goes_back() {
        let mut past = past();
        past.change(book(id(1, 1)), 1_000, 0);
        past.change(Change::Free(id(1, 1)), 10, 0);
        assert_eq!(past.next(LAG_MS), None);
        assert!(past.tracker().is_empty());
        past.sweep(MEMORY_MS);
        assert!(past.sources.is_empty());
    }

    #[test]
    fn no_more_than_so_much_waits() {
        let mut past = past();
        past.ask("first", 0, 0);
        for request in 0..=MAX_WAITING as u64 {
            past.change(book(id(1, request)), 1 + request, 0);
        }
        assert_eq!(past.next(0), Some("first"));
        assert_eq!(past.next(0), None);
        assert_eq!(past.waiting.len(), MAX_WAITING);
        let booking = past.tracker().get(&id(1, 0));
        assert_eq!(booking, Some((OWNER, &Booking::default())));
    }
}
