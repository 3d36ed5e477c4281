//! Whether what is known of a worker's cache agrees with what the worker does.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use kv_core::id::Slot;
use tokio::time::Instant;

/// Prompts in a row of whose last block no event has come that make a worker mute.
const MISSED: u32 = 8;
/// How long an event may take to come.
const PATIENCE: Duration = Duration::from_secs(5);
/// Prompts that are waited for at a time; others are not looked at.
const AWAITED: usize = 16;
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
    /// It publishes, but never what it computes.
    Mismatched,
    /// What it finds in its cache is not what was predicted.
    Inaccurate {
        /// Whether it finds less.
        is_over: bool,
    },
}

impl Ailment {
    /// All labels.
    pub(super) const KINDS: [&'static str; 4] = ["silent", "dropped", "mismatched", "inaccurate"];

    /// Label for metrics.
    pub(super) fn kind(self) -> &'static str {
        match self {
            Self::Silent => "silent",
            Self::Dropped(_) => "dropped",
            Self::Mismatched => "mismatched",
            Self::Inaccurate { .. } => "inaccurate",
        }
    }

    /// Whether the next event ends it; else time does.
    fn is_mute(self) -> bool {
        matches!(self, Self::Silent | Self::Dropped(_))
    }

    /// Whether blocks that are known of the worker may be gone.
    pub(super) fn is_stale(self) -> bool {
        self.is_mute() || self == Self::Inaccurate { is_over: true }
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
    /// Last blocks of prompts that the worker has computed, and when; `None` for one or more in
    /// between of which an event has come.
    awaited: VecDeque<Option<(Slot, u64, Instant)>>,
    /// Of how many in a row no event has come, and when the first of them was computed.
    missed: Option<(u32, Instant)>,
    /// When an event was last applied.
    heard: Option<Instant>,
    dropped: BTreeMap<&'static str, Dropped>,
    /// Predicted and found tokens of the last answers.
    answers: VecDeque<(u32, u32)>,
    ailment: Option<Ailment>,
    /// When one that is not mute gets another chance.
    until: Option<Instant>,
    doublings: u32,
}

impl Health {
    /// What is wrong, if anything.
    pub(super) fn ailment(&self) -> Option<Ailment> {
        self.ailment
    }

    /// A prompt was computed: an event is to say that its last block is there, and mostly has
    /// (`is_held`).
    pub(super) fn computed(&mut self, slot: Slot, last: u64, is_held: bool, at: Instant) {
        if is_held {
            self.missed = None;
            if self.awaited.back().is_some_and(Option::is_some) {
                self.awaited.push_back(None);
            }
        } else if self.ailment.is_none() && self.awaited.len() < AWAITED {
            self.awaited.push_back(Some((slot, last, at)));
        }
    }

    /// An event was applied.
    pub(super) fn heard(&mut self, at: Instant) -> Option<Change> {
        self.heard = Some(at);
        for dropped in self.dropped.values_mut() {
            dropped.unheard = 0;
        }
        let ailment = self.ailment.filter(|ailment| ailment.is_mute())?;
        Some(self.recover(ailment))
    }

    fn recover(&mut self, ailment: Ailment) -> Change {
        self.ailment = None;
        self.until = None;
        self.missed = None;
        self.answers.clear();
        Change::Recovered(ailment)
    }

    /// Looks for the prompts that are waited for: at each judgement, since a busy worker may have
    /// evicted a block again long before its patience is over.
    fn look(&mut self, at: Instant, is_held: impl Fn(Slot, u64) -> bool) {
        let awaited = self.awaited.len();
        self.awaited
            .retain(|prompt| !prompt.is_some_and(|(slot, last, _)| is_held(slot, last)));
        if self.awaited.len() < awaited {
            self.missed = None;
        }
        let is_due = |prompt: &mut Option<(Slot, u64, Instant)>| {
            prompt.is_none_or(|(_, _, computed)| at >= computed + PATIENCE)
        };
        while self.missed.is_none_or(|(missed, _)| missed < MISSED)
            && let Some(prompt) = self.awaited.pop_front_if(is_due)
        {
            self.missed = prompt.map(|(_, _, computed)| {
                let (missed, since) = self.missed.unwrap_or((0, computed));
                (missed + 1, since)
            });
        }
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

    /// Looks at what has gathered. `is_audible` says whether events of the worker could have come,
    /// `is_held` whether one has said that a rank holds a block.
    pub(super) fn judge(
        &mut self,
        at: Instant,
        is_audible: bool,
        is_held: impl Fn(Slot, u64) -> bool,
    ) -> Option<Change> {
        match self.ailment {
            None => {
                self.look(at, is_held);
                let ailment = self.muteness(is_audible).or_else(|| self.inaccuracy())?;
                self.ailment = Some(ailment);
                self.awaited.clear();
                if !ailment.is_mute() {
                    self.until = Some(at + PROBATION * 2_u32.pow(self.doublings));
                    self.doublings = (self.doublings + 1).min(MAX_DOUBLINGS);
                }
                Some(Change::Fell(ailment))
            }
            Some(ailment) => {
                let is_over = self.until.is_some_and(|until| at >= until);
                is_over.then(|| self.recover(ailment))
            }
        }
    }

    fn muteness(&self, is_audible: bool) -> Option<Ailment> {
        let (missed, since) = self.missed?;
        if missed < MISSED || !is_audible {
            return None;
        }
        if self.heard.is_some_and(|heard| heard >= since) {
            return Some(Ailment::Mismatched);
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

    const SLOT: Slot = Slot(1);

    fn nothing(_: Slot, _: u64) -> bool {
        false
    }

    /// Computes so many prompts.
    fn compute(health: &mut Health, prompts: u32, at: Instant) {
        for last in 0..prompts {
            health.computed(SLOT, u64::from(last), false, at);
        }
    }

    #[test]
    fn a_worker_that_serves_and_publishes_nothing_is_silent_until_it_is_heard() {
        let (mut health, at) = (Health::default(), Instant::now());
        compute(&mut health, MISSED, at);
        assert_eq!(health.judge(at, true, nothing), None);
        let later = at + PATIENCE;
        assert_eq!(health.judge(later, false, nothing), None);
        let fell = Change::Fell(Ailment::Silent);
        assert_eq!(health.judge(later, true, nothing), Some(fell));
        compute(&mut health, MISSED, later);
        assert_eq!(health.judge(later + PATIENCE, true, nothing), None);
        let recovered = Change::Recovered(Ailment::Silent);
        assert_eq!(health.heard(later), Some(recovered));
        assert_eq!(health.heard(later), None);
        assert_eq!(health.judge(later + 2 * PATIENCE, true, nothing), None);
    }

    #[test]
    fn one_prompt_in_a_few_that_is_heard_of_is_enough_to_be_well() {
        let (mut health, at) = (Health::default(), Instant::now());
        for second in 0..100 {
            let at = at + Duration::from_secs(second);
            health.computed(SLOT, second, false, at);
            let is_held = |slot, last| slot == SLOT && last % 7 == 0;
            assert_eq!(health.judge(at, true, is_held), None);
        }
    }

    #[test]
    fn prompts_that_come_due_together_are_no_row_if_others_between_them_were_heard_of() {
        let (mut health, at) = (Health::default(), Instant::now());
        for last in 0..u64::from(2 * MISSED) {
            health.computed(SLOT, last, last % 2 == 0, at);
        }
        assert_eq!(health.judge(at + PATIENCE, true, nothing), None);
        compute(&mut health, MISSED, at + PATIENCE);
        health.computed(SLOT, 0, true, at + PATIENCE);
        compute(&mut health, 1, at + PATIENCE);
        let fell = Change::Fell(Ailment::Silent);
        assert_eq!(health.judge(at + 2 * PATIENCE, true, nothing), Some(fell));
    }

    #[test]
    fn a_block_that_is_evicted_soon_after_its_event_was_heard_of() {
        let (mut health, at) = (Health::default(), Instant::now());
        compute(&mut health, MISSED, at);
        assert_eq!(health.judge(at + PATIENCE / 5, true, |_, _| true), None);
        assert_eq!(health.judge(at + PATIENCE, true, nothing), None);
        compute(&mut health, MISSED - 1, at + PATIENCE);
        assert_eq!(health.judge(at + 2 * PATIENCE, true, nothing), None);
        health.computed(SLOT, 1, true, at + 2 * PATIENCE);
        compute(&mut health, 1, at + 2 * PATIENCE);
        assert_eq!(health.judge(at + 3 * PATIENCE, true, nothing), None);
    }

    #[test]
    fn a_worker_that_publishes_other_blocks_than_it_computes_is_mismatched_for_a_while() {
        let (mut health, at) = (Health::default(), Instant::now());
        compute(&mut health, MISSED, at);
        assert_eq!(health.heard(at), None);
        let fell = Change::Fell(Ailment::Mismatched);
        assert_eq!(health.judge(at + PATIENCE, true, nothing), Some(fell));
        assert_eq!(health.heard(at + PATIENCE), None);
        let recovered = Change::Recovered(Ailment::Mismatched);
        let later = at + PATIENCE + PROBATION;
        assert_eq!(health.judge(later, true, nothing), Some(recovered));
        assert_eq!(health.judge(later, true, nothing), None);
    }

    #[test]
    fn a_worker_whose_events_are_all_dropped_is_told_apart_by_the_commonest_reason() {
        let (mut health, at) = (Health::default(), Instant::now());
        for i in 0..20 {
            compute(&mut health, 1, at);
            assert_eq!(health.dropped("unknown_medium", at), i == 0);
        }
        assert!(health.dropped("malformed", at));
        let fell = Change::Fell(Ailment::Dropped("unknown_medium"));
        assert_eq!(health.judge(at + PATIENCE, true, nothing), Some(fell));
        assert!(health.is_dropping(at) && !health.is_dropping(at + DROPPING));
        assert!(health.dropped("malformed", at + DROPPING));
    }

    #[test]
    fn predictions_that_answers_contradict_make_a_worker_inaccurate_for_a_while() {
        let (mut health, at) = (Health::default(), Instant::now());
        for _ in 0..LEAST_ANSWERS - 1 {
            health.answered(160, 32);
        }
        assert_eq!(health.judge(at, true, nothing), None);
        health.answered(160, 32);
        assert_eq!(health.accuracy(), Some(0.2));
        let ailment = Ailment::Inaccurate { is_over: true };
        assert_eq!(health.judge(at, true, nothing), Some(Change::Fell(ailment)));
        assert_eq!(health.heard(at), None);
        let recovered = Some(Change::Recovered(ailment));
        assert_eq!(health.judge(at + PROBATION, true, nothing), recovered);
        for _ in 0..ANSWERS {
            health.answered(0, 320);
        }
        let ailment = Ailment::Inaccurate { is_over: false };
        assert_eq!(
            health.judge(at + PROBATION, true, nothing),
            Some(Change::Fell(ailment))
        );
        assert_eq!(health.judge(at + 2 * PROBATION, true, nothing), None);
        let recovered = Some(Change::Recovered(ailment));
        assert_eq!(health.judge(at + 3 * PROBATION, true, nothing), recovered);
    }

    #[test]
    fn few_or_empty_answers_say_nothing() {
        let (mut health, at) = (Health::default(), Instant::now());
        for _ in 0..100 {
            health.answered(0, 0);
        }
        assert_eq!(
            (health.accuracy(), health.judge(at, true, nothing)),
            (None, None)
        );
        for _ in 0..ANSWERS {
            health.answered(16, 0);
            health.answered(160, 160);
        }
        assert_eq!(health.judge(at, true, nothing), None);
    }
}
