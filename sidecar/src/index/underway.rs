//! Requests that are running: what was predicted for them, since when their worker prefills, and
//! whether it has failed them.

use std::collections::HashMap;

use kv_core::id::OwnerId;
use kv_core::report::Booked;

/// Prompts that are too short tell of the network and not of the worker, in tokens.
const LEAST_TOKENS: u32 = 256;
/// Part of a rate that one request makes.
const SHARE: f64 = 0.2;
/// Tokens after which what was learned of a prefill's time counts for a third.
const MEMORY_TOKENS: f64 = 50_000.0;
/// Tokens that a pool's prior weighs.
const PRIOR_TOKENS: f64 = 200.0;
/// Tokens that the pool's time weighs against an owner's own.
const POOL_TOKENS: f64 = 16_000.0;
/// A time is told when it is off by more than this part of what was told.
const TIME_TOLERANCE: f64 = 0.1;
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
    prefills: HashMap<OwnerId, Prefills>,
}

/// Prefills of an owner that were seen, the older the less they count.
#[derive(Clone, Copy, Debug, Default)]
struct Prefills {
    tokens: f64,
    took_ms: f64,
    /// When the last first token came.
    last_ms: u64,
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
        self.prefills
            .entry(owner)
            .or_default()
            .add(entry.prefill_tokens, entry.booked_ms, now_ms);
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
        self.prefills.retain(|owner, _| is_known(owner));
    }

    /// Milliseconds to a token that owners of a pool take, together with a prior.
    pub(super) fn pool_time(&self, owners: impl Iterator<Item = OwnerId>, prior_ms: f64) -> f64 {
        let mut sum = (PRIOR_TOKENS, PRIOR_TOKENS * prior_ms);
        for seen in owners.filter_map(|owner| self.prefills.get(&owner)) {
            sum = (sum.0 + seen.tokens, sum.1 + seen.took_ms);
        }
        sum.1 / sum.0
    }

    /// Nanoseconds to a token of an owner, whose pool takes `pool_ms`, to be told where `told` was;
    /// 0 for none.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    pub(super) fn prefill_ns(&self, owner: OwnerId, pool_ms: f64, told: u32) -> u32 {
        let Some(seen) = self.prefills.get(&owner) else {
            return told;
        };
        let took_ms = seen.took_ms + POOL_TOKENS * pool_ms;
        let time_ns = took_ms / (seen.tokens + POOL_TOKENS) * 1e6;
        let before = f64::from(told);
        if (time_ns - before).abs() <= TIME_TOLERANCE * before {
            return told;
        }
        time_ns.clamp(1.0, f64::from(u32::MAX)) as u32
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

impl Prefills {
    /// A first token has come. Engines prefill in the order of arrival, about: its prefill began
    /// when it was booked, or with the first token before it.
    fn add(&mut self, tokens: u32, booked_ms: u64, now_ms: u64) {
        let took_ms = now_ms.saturating_sub(booked_ms.max(self.last_ms));
        self.last_ms = now_ms;
        if tokens < LEAST_TOKENS {
            return;
        }
        let kept = (-f64::from(tokens) / MEMORY_TOKENS).exp();
        self.tokens = kept * self.tokens + f64::from(tokens);
        self.took_ms = kept * self.took_ms + took_ms as f64;
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
            session: None,
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
    fn the_time_of_a_token_leaves_queueing_out_and_leans_on_the_pool() {
        let mut underway = Underway::default();
        let pool = |underway: &Underway| underway.pool_time([OWNER].into_iter(), 0.05);
        assert_eq!(underway.prefill_ns(OWNER, pool(&underway), 0), 0);
        // Twenty at once, each of which waits for those before it.
        for request in 0..20 {
            underway.begin(7, &booked(request, 10_000), 0);
        }
        for request in 0..20 {
            underway.first_token(7, request, OWNER, 1_000 * (request + 1));
        }
        let pool_ms = pool(&underway);
        assert!((0.099..0.1).contains(&pool_ms), "{pool_ms}");
        let time_ns = underway.prefill_ns(OWNER, pool_ms, 0);
        assert!((99_000..=100_000).contains(&time_ns), "{time_ns}");
        assert_eq!(underway.prefill_ns(OWNER, pool_ms, 95_000), 95_000);
        let slow = underway.prefill_ns(OWNER, 0.3, 0);
        assert!((140_000..160_000).contains(&slow), "{slow}");
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
