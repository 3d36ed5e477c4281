//! Whether what is known of a worker's cache agrees with what the worker does.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

/// Requests whose blocks the worker should have published, without any event, that make it mute.
const UNHEARD: u32 = 8;
/// How long events may take to come.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a kind of rejection is remembered as going on.
const DROPPING: Duration = Duration::from_secs(60);
/// Answers that predictions are held against.
const ANSWERS: usize = 32;
/// Of these at least so many, with so many tokens in all, before anything is said.
const LEAST_ANSWERS: usize = 16;
const LEAST_TOKENS: u64 = 512;
/// Accuracy below which a worker is inaccurate, and above which it is accurate again.
const POOR: f64 = 0.5;
const FAIR: f64 = 0.7;
/// How long a worker that was inaccurate stays on predictions at first; doubled each time.
const PROBATION: Duration = Duration::from_secs(60);
/// Times it is doubled.
const MAX_DOUBLINGS: u32 = 4;

/// What is wrong with a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ailment {
    /// It serves and publishes nothing.
    Silent,
    /// It serves, and all that it publishes is dropped, mostly for this reason.
    Dropped(&'static str),
    /// What it finds in its cache is not what was predicted.
    Inaccurate {
        /// Whether it finds less.
        is_over: bool,
    },
}

impl Ailment {
    /// All labels.
    pub(super) const KINDS: [&'static str; 3] = ["silent", "dropped", "inaccurate"];

    /// Label for metrics.
    pub(super) fn kind(self) -> &'static str {
        match self {
            Self::Silent => "silent",
            Self::Dropped(_) => "dropped",
            Self::Inaccurate { .. } => "inaccurate",
        }
    }
}

/// A change that is worth a line in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// It fell ill.
    Fell(Ailment),
    /// It is well again, or is given another chance.
    Recovered(Ailment),
}

/// Dropped events of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Dropped {
    times: u64,
    /// Since an event of the worker was last applied.
    unheard: u64,
    last: Instant,
}

/// A worker's health.
#[derive(Clone, Debug, Default)]
pub(super) struct Health {
    /// Requests without an event of theirs, and since when.
    unheard: u32,
    unheard_since: Option<Instant>,
    dropped: BTreeMap<&'static str, Dropped>,
    /// Predicted and found tokens of the last answers.
    answers: VecDeque<(u32, u32)>,
    ailment: Option<Ailment>,
    /// When an inaccurate worker gets another chance.
    until: Option<Instant>,
    doublings: u32,
}

impl Health {
    /// What is wrong, if anything.
    pub(super) fn ailment(&self) -> Option<Ailment> {
        self.ailment
    }

    /// A prompt was computed of which no event has come.
    pub(super) fn served_unheard(&mut self, at: Instant) {
        self.unheard = self.unheard.saturating_add(1);
        self.unheard_since.get_or_insert(at);
    }

    /// An event was applied.
    pub(super) fn heard(&mut self) -> Option<Change> {
        if self.unheard_since.take().is_some() {
            self.unheard = 0;
        }
        for dropped in self.dropped.values_mut() {
            dropped.unheard = 0;
        }
        let ailment = self.ailment?;
        if matches!(ailment, Ailment::Inaccurate { .. }) {
            return None;
        }
        self.ailment = None;
        Some(Change::Recovered(ailment))
    }

    /// An event was dropped; `true` if this kind was not being dropped before.
    pub(super) fn dropped(&mut self, kind: &'static str, at: Instant) -> bool {
        let fresh = Dropped {
            times: 0,
            unheard: 0,
            last: at,
        };
        let dropped = self.dropped.entry(kind).or_insert(fresh);
        let begins = dropped.times == 0 || at >= dropped.last + DROPPING;
        dropped.times += 1;
        dropped.unheard += 1;
        dropped.last = at;
        begins
    }

    /// Dropped events by kind.
    pub(super) fn all_dropped(&self) -> BTreeMap<&'static str, u64> {
        let dropped = self.dropped.iter();
        dropped
            .map(|(kind, dropped)| (*kind, dropped.times))
            .collect()
    }

    /// Whether events of some kind are being dropped.
    pub(super) fn is_dropping(&self, at: Instant) -> bool {
        self.dropped.values().any(|d| at < d.last + DROPPING)
    }

    /// A worker has said what it found in its cache.
    pub(super) fn answered(&mut self, predicted: u32, found: u32) {
        if self.answers.len() == ANSWERS {
            self.answers.pop_front();
        }
        self.answers.push_back((predicted, found));
    }

    /// What was predicted rightly of all that was predicted or found, 0 to 1; `None` where there
    /// is nothing to judge by.
    pub(super) fn accuracy(&self) -> Option<f64> {
        let sum = |of: fn(u32, u32) -> u32| -> u64 {
            self.answers
                .iter()
                .map(|(p, f)| u64::from(of(*p, *f)))
                .sum()
        };
        let all = sum(u32::max);
        (all > 0).then(|| sum(u32::min) as f64 / all as f64)
    }

    fn tokens(&self) -> (u64, u64) {
        let add = |(p, f): (u64, u64), (q, g): &(u32, u32)| (p + u64::from(*q), f + u64::from(*g));
        self.answers.iter().fold((0, 0), add)
    }

    /// Looks at what has gathered. `is_audible` says whether events of the worker could have come.
    pub(super) fn judge(&mut self, at: Instant, is_audible: bool) -> Option<Change> {
        match self.ailment {
            None => {
                let ailment = self
                    .muteness(at, is_audible)
                    .or_else(|| self.inaccuracy())?;
                self.ailment = Some(ailment);
                if matches!(ailment, Ailment::Inaccurate { .. }) {
                    self.until = Some(at + PROBATION * 2_u32.pow(self.doublings));
                    self.doublings = (self.doublings + 1).min(MAX_DOUBLINGS);
                }
                Some(Change::Fell(ailment))
            }
            Some(ailment @ Ailment::Inaccurate { .. }) if self.until.is_some_and(|u| at >= u) => {
                self.ailment = None;
                self.until = None;
                self.answers.clear();
                Some(Change::Recovered(ailment))
            }
            Some(_) => None,
        }
    }

    fn muteness(&self, at: Instant, is_audible: bool) -> Option<Ailment> {
        let since = self.unheard_since?;
        if self.unheard < UNHEARD || at < since + PATIENCE || !is_audible {
            return None;
        }
        let unheard = self.dropped.iter().filter(|(_, d)| d.unheard > 0);
        let most = unheard.max_by_key(|(_, dropped)| dropped.unheard);
        Some(most.map_or(Ailment::Silent, |(kind, _)| Ailment::Dropped(kind)))
    }

    fn inaccuracy(&mut self) -> Option<Ailment> {
        let (predicted, found) = self.tokens();
        if self.answers.len() < LEAST_ANSWERS || predicted.max(found) < LEAST_TOKENS {
            return None;
        }
        let accuracy = self.accuracy()?;
        if accuracy > FAIR && self.answers.len() == ANSWERS {
            self.doublings = 0;
        }
        let is_over = predicted > found;
        (accuracy < POOR).then_some(Ailment::Inaccurate { is_over })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_serves_and_publishes_nothing_is_silent_until_it_is_heard() {
        let (mut health, at) = (Health::default(), Instant::now());
        for _ in 0..UNHEARD {
            health.served_unheard(at);
        }
        assert_eq!(health.judge(at, true), None);
        assert_eq!(health.judge(at + PATIENCE, false), None);
        let fell = Change::Fell(Ailment::Silent);
        assert_eq!(health.judge(at + PATIENCE, true), Some(fell));
        assert_eq!(health.judge(at + 2 * PATIENCE, true), None);
        assert_eq!(health.heard(), Some(Change::Recovered(Ailment::Silent)));
        assert_eq!(health.heard(), None);
        assert_eq!(health.judge(at + 3 * PATIENCE, true), None);
    }

    #[test]
    fn one_event_between_requests_is_enough_to_be_well() {
        let (mut health, at) = (Health::default(), Instant::now());
        for second in 0..60 {
            let at = at + Duration::from_secs(second);
            health.served_unheard(at);
            if second % 4 == 0 {
                assert_eq!(health.heard(), None);
            }
            assert_eq!(health.judge(at, true), None);
        }
    }

    #[test]
    fn a_worker_whose_events_are_all_dropped_is_told_apart_by_the_commonest_reason() {
        let (mut health, at) = (Health::default(), Instant::now());
        for i in 0..20 {
            health.served_unheard(at);
            assert_eq!(health.dropped("unknown_medium", at), i == 0);
        }
        assert!(health.dropped("malformed", at));
        let fell = Change::Fell(Ailment::Dropped("unknown_medium"));
        assert_eq!(health.judge(at + PATIENCE, true), Some(fell));
        assert!(health.is_dropping(at) && !health.is_dropping(at + DROPPING));
        assert!(health.dropped("malformed", at + DROPPING));
    }

    #[test]
    fn predictions_that_answers_contradict_make_a_worker_inaccurate_for_a_while() {
        let (mut health, at) = (Health::default(), Instant::now());
        for _ in 0..LEAST_ANSWERS - 1 {
            health.answered(160, 32);
        }
        assert_eq!(health.judge(at, true), None);
        health.answered(160, 32);
        assert_eq!(health.accuracy(), Some(0.2));
        let ailment = Ailment::Inaccurate { is_over: true };
        assert_eq!(health.judge(at, true), Some(Change::Fell(ailment)));
        assert_eq!(health.heard(), None);
        let recovered = Some(Change::Recovered(ailment));
        assert_eq!(health.judge(at + PROBATION, true), recovered);
        for _ in 0..ANSWERS {
            health.answered(0, 320);
        }
        let ailment = Ailment::Inaccurate { is_over: false };
        assert_eq!(
            health.judge(at + PROBATION, true),
            Some(Change::Fell(ailment))
        );
        assert_eq!(health.judge(at + 2 * PROBATION, true), None);
        let recovered = Some(Change::Recovered(ailment));
        assert_eq!(health.judge(at + 3 * PROBATION, true), recovered);
    }

    #[test]
    fn few_or_empty_answers_say_nothing() {
        let (mut health, at) = (Health::default(), Instant::now());
        for _ in 0..100 {
            health.answered(0, 0);
        }
        assert_eq!((health.accuracy(), health.judge(at, true)), (None, None));
        for _ in 0..ANSWERS {
            health.answered(16, 0);
            health.answered(160, 160);
        }
        assert_eq!(health.judge(at, true), None);
    }
}
