//! Which workers are left out because they fail, as the proxies say. Synchronous: time is
//! milliseconds of any clock that doesn't go back.
//!
//! A worker that was not reached is looked at, and left out if nothing listens there. One that
//! fails several requests in a row is left out without a look. After a pause it is looked at, and
//! comes back once something listens; each pause in a row is twice the one before.

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
    /// Whether somebody looks whether it is there.
    is_probed: bool,
}

/// What is to be done about a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// Look whether it is there, and tell [`Ejection::probed`].
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
}

impl Why {
    /// Label for metrics.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::Unreachable => "unreachable",
            Self::Failing => "failing",
        }
    }

    /// How many of so many workers have to be left. Where nothing listens, nothing is lost by
    /// leaving it out; errors may be the requests' fault.
    #[must_use]
    pub fn floor(self, workers: usize) -> usize {
        match self {
            Self::Unreachable => 1,
            Self::Failing => workers.div_ceil(2).max(1),
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
        let is_in = |known: &Worker| known.out_until_ms.is_none() && !known.is_probed;
        if self.workers.get(&worker).is_some_and(is_in) {
            self.workers.remove(&worker);
        }
    }

    /// Somebody has looked whether a worker is there.
    pub fn probed(&mut self, worker: WorkerId, is_there: bool, now_ms: u64) -> Option<Due> {
        let known = self.workers.get_mut(&worker)?;
        known.is_probed = false;
        match (known.out_until_ms, is_there) {
            (None, true) => None,
            (None, false) => Some(Due::LeaveOut(Why::Unreachable)),
            (Some(_), true) => {
                known.out_until_ms = None;
                known.streak = 0;
                Some(Due::TakeBack)
            }
            (Some(_), false) => {
                known.pause(now_ms);
                None
            }
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
        assert_eq!(ejection.probed(1, false, 0), gone);
        ejection.left_out(1, 0);
        assert!(!ejection.is_in(1));
        assert_eq!((ejection.out(), ejection.failed(1, UNREACHED)), (1, None));
    }

    #[test]
    fn one_that_refused_once_stays() {
        let mut ejection = Ejection::default();
        assert_eq!(ejection.failed(1, UNREACHED), Some(Due::Probe));
        assert_eq!(ejection.probed(1, true, 0), None);
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
            assert_eq!(ejection.probed(1, false, now_ms), None);
        }
        assert_eq!(pauses, [1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000]);
        now_ms += 30_000;
        assert_eq!(ejection.due(now_ms), [1]);
        ejection.answered(1);
        assert!(!ejection.is_in(1));
        assert_eq!(ejection.probed(1, true, now_ms), Some(Due::TakeBack));
        assert!(ejection.is_in(1));
        // Unless it answers, the next pause is as long.
        ejection.left_out(1, 0);
        assert!(ejection.due(29_999).is_empty());
        ejection.keep(|worker| worker != 1);
        assert_eq!(ejection.out(), 0);
    }

    #[test]
    fn enough_workers_are_left() {
        assert_eq!([1, 2, 3, 8].map(|n| Why::Failing.floor(n)), [1, 1, 2, 4]);
        assert_eq!([1, 2, 8].map(|n| Why::Unreachable.floor(n)), [1, 1, 1]);
    }
}
