//! Which workers are left out because they fail, as the proxies say. Synchronous: time is
//! milliseconds of any clock that doesn't go back.
//!
//! A worker that was not reached is looked at, and left out if nothing listens there. One that
//! fails several requests in a row is left out without a look, and one that several looks in a row
//! found unwell. After a pause it is looked at, and comes back once it is well; each pause in a row
//! is twice the one before.

use std::collections::HashMap;

use kv_core::id::WorkerId;
use kv_core::report::Failure;

/// Failures in a row after which a worker is left out.
const STREAK: u32 = 3;
/// First and longest pause before a worker that was left out is looked at.
const PAUSE_MS: (u64, u64) = (1_000, 30_000);

/// What is known of the workers that have failed.
#[derive(Debug, Default)]
pub struct Ejection {
    workers: HashMap<WorkerId, Worker>,
}

#[derive(Debug, Default)]
struct Worker {
    /// Failures since it last answered a request to its end.
    streak: u32,
    /// Pauses in a row.
    pauses: u32,
    /// Until when it is left out at least; `None` while it takes requests.
    out_until_ms: Option<u64>,
    /// Looks in a row that found it unwell.
    unwell: u32,
    /// Whether somebody looks at it.
    is_probed: bool,
}

/// What somebody who looked at a worker has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// It is there, and well as far as was asked.
    Well,
    /// It is there and says that it is not well, or says nothing in time.
    Unwell,
    /// Nothing listens there.
    Gone,
}

/// What is to be done about a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// Look at it, and tell [`Ejection::looked`].
    Probe,
    /// Leave it out if others are enough, and tell [`Ejection::left_out`].
    LeaveOut(Why),
    /// Let it take requests again.
    TakeBack,
}

/// Why a worker is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Nothing listens at its endpoint.
    Unreachable,
    /// It has failed requests in a row.
    Failing,
    /// Looks in a row found it unwell.
    Unwell,
}

impl Why {
    /// Label for metrics.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::Unreachable => "unreachable",
            Self::Failing => "failing",
            Self::Unwell => "unwell",
        }
    }

    /// How many of so many workers have to be left, where `share` of them are to be. Where nothing
    /// listens, nothing is lost by leaving it out; errors may be the requests' fault.
    #[must_use]
    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_sign_loss,
        clippy::cast_possible_truncation
    )]
    pub fn floor(self, workers: usize, share: f64) -> usize {
        match self {
            Self::Unreachable => 1,
            Self::Failing | Self::Unwell => ((workers as f64 * share).ceil() as usize).max(1),
        }
    }
}

impl Ejection {
    /// A worker has failed a request.
    pub fn failed(&mut self, worker: WorkerId, failure: Failure) -> Option<Due> {
        let known = self.workers.entry(worker).or_default();
        if known.out_until_ms.is_some() {
            return None;
        }
        known.streak = known.streak.saturating_add(1);
        if known.streak >= STREAK {
            return Some(Due::LeaveOut(Why::Failing));
        }
        let is_due = failure == Failure::Unreached && !known.is_probed;
        known.is_probed |= is_due;
        is_due.then_some(Due::Probe)
    }

    /// A worker has answered a request to its end.
    pub fn answered(&mut self, worker: WorkerId) {
        // One that answers what it had before it was left out has to be looked at all the same.
        let is_in = |known: &&mut Worker| known.out_until_ms.is_none() && !known.is_probed;
        if let Some(known) = self.workers.get_mut(&worker).filter(is_in) {
            known.streak = 0;
            known.pauses = 0;
            if known.unwell == 0 {
                self.workers.remove(&worker);
            }
        }
    }

    /// Somebody begins to look at a worker that takes requests, unless somebody does already.
    pub fn begin_look(&mut self, worker: WorkerId) -> bool {
        let known = self.workers.entry(worker).or_default();
        known.out_until_ms.is_none() && !std::mem::replace(&mut known.is_probed, true)
    }

    /// Somebody has looked at a worker. It is left out after `unwell` looks in a row that found it
    /// so.
    pub fn looked(
        &mut self,
        worker: WorkerId,
        look: Look,
        unwell: u32,
        now_ms: u64,
    ) -> Option<Due> {
        let known = self.workers.get_mut(&worker)?;
        known.is_probed = false;
        if known.out_until_ms.is_some() {
            if look != Look::Well {
                known.pause(now_ms);
                return None;
            }
            known.out_until_ms = None;
            known.streak = 0;
            known.unwell = 0;
            return Some(Due::TakeBack);
        }
        match look {
            Look::Well => {
                known.unwell = 0;
                if known.streak == 0 && known.pauses == 0 {
                    self.workers.remove(&worker);
                }
                None
            }
            Look::Unwell => {
                known.unwell = known.unwell.saturating_add(1);
                (known.unwell >= unwell).then_some(Due::LeaveOut(Why::Unwell))
            }
            Look::Gone => Some(Due::LeaveOut(Why::Unreachable)),
        }
    }

    /// A worker is left out.
    pub fn left_out(&mut self, worker: WorkerId, now_ms: u64) {
        self.workers.entry(worker).or_default().pause(now_ms);
    }

    /// Workers whose pause is over. They are looked at next.
    pub fn due(&mut self, now_ms: u64) -> Vec<WorkerId> {
        let is_due = |known: &Worker| {
            let is_over = known.out_until_ms.is_some_and(|at| at <= now_ms);
            is_over && !known.is_probed
        };
        let workers = self.workers.iter_mut();
        let due = workers.filter(|(_, known)| is_due(known));
        due.map(|(worker, known)| {
            known.is_probed = true;
            *worker
        })
        .collect()
    }

    /// Whether a worker takes requests.
    #[must_use]
    pub fn is_in(&self, worker: WorkerId) -> bool {
        let known = self.workers.get(&worker);
        known.is_none_or(|known| known.out_until_ms.is_none())
    }

    /// Workers left out.
    #[must_use]
    pub fn out(&self) -> usize {
        let is_out = |known: &&Worker| known.out_until_ms.is_some();
        self.workers.values().filter(is_out).count()
    }

    /// Forgets workers that have left.
    pub fn keep(&mut self, is_known: impl Fn(WorkerId) -> bool) {
        self.workers.retain(|worker, _| is_known(*worker));
    }
}

impl Worker {
    fn pause(&mut self, now_ms: u64) {
        let (first, longest) = PAUSE_MS;
        let pause = first.saturating_mul(1 << self.pauses.min(16)).min(longest);
        self.pauses = self.pauses.saturating_add(1);
        self.out_until_ms = Some(now_ms.saturating_add(pause));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNREACHED: Failure = Failure::Unreached;
    const STATUS: Failure = Failure::Status;

    #[test]
    fn a_worker_that_is_gone_is_left_out_once_somebody_has_looked() {
        let mut ejection = Ejection::default();
        assert_eq!(ejection.failed(1, UNREACHED), Some(Due::Probe));
        assert_eq!(ejection.failed(1, UNREACHED), None, "it is being looked at");
        assert!(ejection.is_in(1));
        let gone = Some(Due::LeaveOut(Why::Unreachable));
        assert_eq!(ejection.looked(1, Look::Gone, 1, 0), gone);
        ejection.left_out(1, 0);
        assert!(!ejection.is_in(1));
        assert_eq!((ejection.out(), ejection.failed(1, UNREACHED)), (1, None));
    }

    #[test]
    fn one_that_refused_once_stays() {
        let mut ejection = Ejection::default();
        assert_eq!(ejection.failed(1, UNREACHED), Some(Due::Probe));
        assert_eq!(ejection.looked(1, Look::Well, 1, 0), None);
        ejection.answered(1);
        for _ in 0..2 {
            assert_eq!(ejection.failed(1, STATUS), None);
        }
        ejection.answered(1);
        assert_eq!(ejection.failed(1, STATUS), None);
        assert!(ejection.is_in(1));
    }

    #[test]
    fn failures_in_a_row_are_enough() {
        let mut ejection = Ejection::default();
        assert_eq!(ejection.failed(1, STATUS), None);
        assert_eq!(ejection.failed(1, Failure::Broken), None);
        let failing = Some(Due::LeaveOut(Why::Failing));
        assert_eq!(ejection.failed(1, STATUS), failing);
        // Too few others: it is asked for again.
        assert_eq!(ejection.failed(1, STATUS), failing);
    }

    #[test]
    fn pauses_grow_until_it_answers() {
        let mut ejection = Ejection::default();
        let mut now_ms = 0;
        let mut pauses = Vec::new();
        ejection.left_out(1, now_ms);
        for _ in 0..7 {
            let since = now_ms;
            while ejection.due(now_ms).is_empty() {
                now_ms += 500;
            }
            pauses.push(now_ms - since);
            assert!(ejection.due(now_ms).is_empty(), "it is being looked at");
            assert_eq!(ejection.looked(1, Look::Gone, 1, now_ms), None);
        }
        assert_eq!(pauses, [1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000]);
        now_ms += 30_000;
        assert_eq!(ejection.due(now_ms), [1]);
        ejection.answered(1);
        assert!(!ejection.is_in(1));
        assert_eq!(
            ejection.looked(1, Look::Well, 1, now_ms),
            Some(Due::TakeBack)
        );
        assert!(ejection.is_in(1));
        // Unless it answers, the next pause is as long.
        ejection.left_out(1, 0);
        assert!(ejection.due(29_999).is_empty());
        ejection.keep(|worker| worker != 1);
        assert_eq!(ejection.out(), 0);
    }

    #[test]
    fn looks_that_find_it_unwell_in_a_row_are_enough() {
        let mut ejection = Ejection::default();
        let mut look = |look| {
            assert!(ejection.begin_look(1));
            assert!(!ejection.begin_look(1), "it is being looked at");
            ejection.looked(1, look, 2, 0)
        };
        assert_eq!(look(Look::Unwell), None);
        assert_eq!(look(Look::Well), None);
        assert_eq!(look(Look::Unwell), None);
        let unwell = Some(Due::LeaveOut(Why::Unwell));
        assert_eq!(look(Look::Unwell), unwell);
        // Answers don't speak against it.
        ejection.answered(1);
        assert!(ejection.begin_look(1));
        assert_eq!(ejection.looked(1, Look::Unwell, 2, 0), unwell);
        ejection.left_out(1, 0);
        assert!(!ejection.begin_look(1) && !ejection.is_in(1));
        assert_eq!(ejection.due(1_000), [1]);
        assert_eq!(
            ejection.looked(1, Look::Well, 2, 1_000),
            Some(Due::TakeBack)
        );
    }

    #[test]
    fn enough_workers_are_left() {
        for why in [Why::Failing, Why::Unwell] {
            assert_eq!([1, 2, 3, 8].map(|n| why.floor(n, 0.5)), [1, 1, 2, 4]);
            assert_eq!([1, 4, 5].map(|n| why.floor(n, 0.75)), [1, 3, 4]);
            assert_eq!([0, 8].map(|n| why.floor(n, 0.0)), [1, 1]);
        }
        assert_eq!([1, 2, 8].map(|n| Why::Unreachable.floor(n, 0.5)), [1, 1, 1]);
    }
}
