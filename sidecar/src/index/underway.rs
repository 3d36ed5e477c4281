//! Requests that are running: what was predicted for them, since when their worker prefills, and
//! whether it has failed them.

use std::collections::HashMap;

use kv_core::id::OwnerId;
use kv_core::report::Booked;

/// Prompts that are too short tell of the network and not of the worker, in tokens.
const LEAST_TOKENS: u32 = 256;
/// Part of a rate that one request makes.
const SHARE: f64 = 0.2;
/// A rate is told when it is off by more than this part of what was told.
const TOLERANCE: f64 = 0.25;

/// A request of a VM.
type Request = (u64, u64);

/// All of them, and the rates learned of those that went before.
#[derive(Debug, Default)]
pub(super) struct Underway {
    requests: HashMap<Request, Entry>,
    /// Tokens that an owner prefills in a second, queueing included.
    rates: HashMap<OwnerId, f64>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    booked_ms: u64,
    prefill_tokens: u32,
    /// Leading blocks of the prompt that were predicted on its owner before it came; `None` where
    /// nothing is predicted.
    known: Option<usize>,
    /// Whether its first token has come, or its prefill is taken to be done.
    is_answered: bool,
    /// Whether a worker has failed it.
    is_failed: bool,
}

impl Underway {
    /// A request was booked.
    pub(super) fn begin(&mut self, vm: u64, booked: &Booked, now_ms: u64) {
        let entry = Entry {
            booked_ms: now_ms,
            prefill_tokens: booked.prefill_tokens,
            known: None,
            is_answered: booked.decoding,
            is_failed: false,
        };
        self.requests.insert((vm, booked.request), entry);
    }

    /// Its prompt was predicted on its owner, all but so many leading blocks for its sake.
    pub(super) fn predicted(&mut self, vm: u64, request: u64, known: usize) {
        if let Some(entry) = self.requests.get_mut(&(vm, request)) {
            entry.known = Some(known);
        }
    }

    /// Its owner did not get it: from which block on nothing speaks for the prediction.
    pub(super) fn missed(&mut self, vm: u64, request: u64) -> Option<usize> {
        self.requests.get_mut(&(vm, request))?.known.take()
    }

    /// Its first token has come from an owner.
    pub(super) fn first_token(&mut self, vm: u64, request: u64, owner: OwnerId, now_ms: u64) {
        let Some(entry) = self.answered(vm, request) else {
            return;
        };
        let took_ms = now_ms.saturating_sub(entry.booked_ms);
        if entry.prefill_tokens < LEAST_TOKENS || took_ms == 0 {
            return;
        }
        let rate = f64::from(entry.prefill_tokens) * 1_000.0 / took_ms as f64;
        let known = self.rates.entry(owner).or_insert(rate);
        *known += SHARE * (rate - *known);
    }

    /// Its prefill is done, and when its first token came is not known.
    pub(super) fn prefilled(&mut self, vm: u64, request: u64) {
        self.answered(vm, request);
    }

    fn answered(&mut self, vm: u64, request: u64) -> Option<Entry> {
        let entry = self.requests.get_mut(&(vm, request))?;
        let before = *entry;
        entry.is_answered = true;
        entry.known = None;
        (!before.is_answered).then_some(before)
    }

    /// A worker has failed it.
    pub(super) fn failed(&mut self, vm: u64, request: u64) {
        if let Some(entry) = self.requests.get_mut(&(vm, request)) {
            entry.is_failed = true;
        }
    }

    /// It is over. Whether it was answered to its end.
    pub(super) fn end(&mut self, vm: u64, request: u64) -> bool {
        let entry = self.requests.remove(&(vm, request));
        entry.is_some_and(|entry| entry.is_answered && !entry.is_failed)
    }

    /// Forgets requests that are not booked, and owners that have left.
    pub(super) fn keep(
        &mut self,
        is_booked: impl Fn(u64, u64) -> bool,
        is_known: impl Fn(&OwnerId) -> bool,
    ) {
        self.requests
            .retain(|(vm, request), _| is_booked(*vm, *request));
        self.rates.retain(|owner, _| is_known(owner));
    }

    /// The rate of an owner to be told where `told` was; 0 for none.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    pub(super) fn rate(&self, owner: OwnerId, told: u32) -> u32 {
        let Some(rate) = self.rates.get(&owner) else {
            return told;
        };
        let before = f64::from(told);
        if (rate - before).abs() <= TOLERANCE * before {
            return told;
        }
        rate.clamp(1.0, f64::from(u32::MAX)) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kv_core::report::OwnerKey;

    const OWNER: OwnerId = OwnerId { worker: 1, rank: 0 };

    fn booked(request: u64, prefill_tokens: u32) -> Booked {
        Booked {
            request,
            owner: OwnerKey { pool: 0, id: OWNER },
            decoding: false,
            prefill_tokens,
            blocks: 0,
            prefix: None,
            hashes: Vec::new(),
            evidence: None,
        }
    }

    #[test]
    fn rates_are_learned_of_long_prompts_and_told_when_they_differ() {
        let mut underway = Underway::default();
        underway.begin(7, &booked(1, 100), 0);
        underway.first_token(7, 1, OWNER, 1);
        assert_eq!(underway.rate(OWNER, 0), 0, "too short");
        underway.begin(7, &booked(2, 1_000), 0);
        underway.first_token(7, 2, OWNER, 500);
        assert_eq!(underway.rate(OWNER, 0), 2_000);
        underway.begin(7, &booked(3, 1_000), 0);
        underway.first_token(7, 3, OWNER, 250);
        assert_eq!(underway.rate(OWNER, 2_000), 2_000, "2,400 is near enough");
        assert_eq!(underway.rate(OWNER, 1_000), 2_400);
        underway.begin(7, &booked(4, 1_000), 0);
        underway.prefilled(7, 4);
        underway.first_token(7, 4, OWNER, 1);
        assert_eq!(underway.rate(OWNER, 1_000), 2_400, "its token is not seen");
        underway.keep(|_, _| false, |_| false);
        assert_eq!(underway.rate(OWNER, 9), 9);
        assert!(underway.requests.is_empty());
    }

    #[test]
    fn an_answer_counts_at_its_end_unless_it_broke_off() {
        let mut underway = Underway::default();
        for request in 1..=3 {
            underway.begin(7, &booked(request, 1), 0);
        }
        underway.first_token(7, 1, OWNER, 1);
        underway.prefilled(7, 2);
        underway.failed(7, 2);
        let ends = [1, 2, 3, 1].map(|request| underway.end(7, request));
        assert_eq!(ends, [true, false, false, false]);
    }

    #[test]
    fn a_prediction_is_taken_back_once_and_only_before_the_first_token() {
        let mut underway = Underway::default();
        underway.begin(7, &booked(1, 1), 0);
        assert_eq!(underway.missed(7, 1), None, "nothing is predicted");
        underway.predicted(7, 1, 3);
        assert_eq!(underway.missed(7, 1), Some(3));
        assert_eq!(underway.missed(7, 1), None);
        underway.predicted(7, 1, 3);
        underway.first_token(7, 1, OWNER, 0);
        assert_eq!(underway.missed(7, 1), None);
    }
}
