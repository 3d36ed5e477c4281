//! Continuous batching: which tokens of which sequence each step computes.
//!
//! A step first serves the running sequences in order of arrival, then admits waiting ones, until
//! the token budget is spent. Long prefills are cut into chunks and share steps with decodes. Of a
//! cached prompt at least one token is computed again. A running sequence that finds no block
//! preempts the newest one, which starts over; a waiting one waits. With `FlexKV`, what its levels
//! have of a prompt beyond the cache is loaded as the sequence is admitted, which the step takes
//! longer for, and what a sequence has computed is stored there at its end.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::cache::{Cache, Lease};
use crate::chain::Chain;
use crate::flexkv::FlexKv;
use crate::metrics::Counters;
use crate::token::Answer;

/// Limits and speed of one engine.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Tokens per block.
    pub block_size: usize,
    /// Tokens computed in one step.
    pub max_batched_tokens: usize,
    /// Sequences running at once.
    pub max_seqs: usize,
    /// Time of a step before anything is computed.
    pub step: Duration,
    /// Time per prompt token computed.
    pub prefill_per_token: Duration,
    /// Time per sequence that decodes in a step.
    pub decode_per_seq: Duration,
}

/// One token for a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Output {
    /// The token.
    pub token: u32,
    /// Prompt tokens that were in the cache when the request was admitted.
    pub cached_tokens: usize,
    /// Whether it is the last one.
    pub last: bool,
}

/// A request from arrival to its last token.
#[derive(Debug)]
pub(crate) struct Sequence {
    tokens: Vec<u32>,
    prompt_len: usize,
    max_tokens: usize,
    answer: Answer,
    chain: Chain,
    /// `FlexKV`'s hashes of the prompt.
    outside: Vec<u64>,
    lease: Lease,
    computed: usize,
    planned: usize,
    cached_tokens: Option<usize>,
    arrived: Duration,
    out: mpsc::Sender<Output>,
}

/// The waiting and the running, and the cache they share.
#[derive(Debug)]
pub(crate) struct Scheduler {
    limits: Limits,
    cache: Cache,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    counters: Counters,
    flexkv: Option<FlexKv>,
    /// Time of the loads of the step under way.
    loading: Duration,
}

// === impl Sequence ===

impl Sequence {
    /// A request for `max_tokens` tokens after `prompt`, arrived `arrived` after the engine's
    /// start. Its tokens go to `out`, which must have room for all of them; a closed `out` aborts
    /// it.
    #[must_use]
    pub(crate) fn new(
        prompt: Vec<u32>,
        max_tokens: usize,
        mut chain: Chain,
        arrived: Duration,
        out: mpsc::Sender<Output>,
    ) -> Self {
        chain.extend(&prompt);
        Self {
            prompt_len: prompt.len(),
            answer: Answer::to(&prompt),
            tokens: prompt,
            max_tokens,
            chain,
            outside: Vec::new(),
            lease: Lease::default(),
            computed: 0,
            planned: 0,
            cached_tokens: None,
            arrived,
            out,
        }
    }

    fn uncomputed(&self) -> usize {
        self.tokens.len() - self.computed
    }

    fn is_decoding(&self) -> bool {
        self.tokens.len() > self.prompt_len && self.uncomputed() == 1
    }
}

// === impl Scheduler ===

impl Scheduler {
    /// An idle engine with `blocks` blocks.
    #[must_use]
    pub(crate) fn new(limits: Limits, blocks: usize) -> Self {
        Self {
            limits,
            cache: Cache::new(blocks),
            waiting: VecDeque::new(),
            running: Vec::new(),
            counters: Counters::default(),
            flexkv: None,
            loading: Duration::ZERO,
        }
    }

    /// Puts further levels under the cache.
    pub(crate) fn offload_to(&mut self, flexkv: FlexKv) {
        self.flexkv = Some(flexkv);
    }

    /// The levels under the cache.
    pub(crate) fn flexkv_mut(&mut self) -> Option<&mut FlexKv> {
        self.flexkv.as_mut()
    }

    /// The cache.
    #[must_use]
    pub(crate) fn cache(&self) -> &Cache {
        &self.cache
    }

    /// The cache, to change it from outside the schedule.
    pub(crate) fn cache_mut(&mut self) -> &mut Cache {
        &mut self.cache
    }

    /// Totals since the start.
    #[must_use]
    pub(crate) fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Sequences that run.
    #[must_use]
    pub(crate) fn running(&self) -> usize {
        self.running.len()
    }

    /// Sequences that wait for room.
    #[must_use]
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Queues a request.
    pub(crate) fn submit(&mut self, mut sequence: Sequence) {
        if let Some(flexkv) = &self.flexkv {
            sequence.outside = flexkv.hashes(&sequence.tokens);
        }
        self.waiting.push_back(sequence);
    }

    /// Plans a step; `None` when there is nothing to do. Blocks that the step fills are named at
    /// once, so a sequence admitted later in the same step hits them. Returns the step's duration.
    pub(crate) fn begin_step(&mut self) -> Option<Duration> {
        self.drop_abandoned();
        let mut budget = self.limits.max_batched_tokens;
        let preempted = self.plan_running(&mut budget);
        if !preempted {
            self.admit_waiting(&mut budget);
        }
        if self.running.is_empty() {
            return None;
        }
        let (mut prefill, mut decodes) = (0, 0);
        for sequence in &self.running {
            if sequence.is_decoding() {
                decodes += sequence.planned;
            } else {
                prefill += sequence.planned;
            }
        }
        let part = |each: Duration, count: usize| {
            each.saturating_mul(u32::try_from(count).unwrap_or(u32::MAX))
        };
        Some(
            self.limits.step
                + std::mem::take(&mut self.loading)
                + part(self.limits.prefill_per_token, prefill)
                + part(self.limits.decode_per_seq, decodes),
        )
    }

    /// Ends the step: every sequence computed to its end gives its next token.
    pub(crate) fn end_step(&mut self, now: Duration) {
        let mut at = 0;
        while at < self.running.len() {
            if self.finish_step_of(at, now) {
                let done = self.running.remove(at);
                if let Some(flexkv) = &mut self.flexkv {
                    let hashes = flexkv.hashes(&done.tokens[..done.computed]);
                    flexkv.store(&hashes);
                }
                self.cache.release(done.lease);
            } else {
                at += 1;
            }
        }
    }

    /// Drops every request; their clients see their streams end early.
    pub(crate) fn abort_all(&mut self) {
        self.waiting.clear();
        for sequence in std::mem::take(&mut self.running) {
            self.cache.release(sequence.lease);
        }
    }

    fn drop_abandoned(&mut self) {
        let before = self.waiting.len() + self.running.len();
        self.waiting.retain(|sequence| !sequence.out.is_closed());
        let (kept, gone) = std::mem::take(&mut self.running)
            .into_iter()
            .partition(|sequence| !sequence.out.is_closed());
        self.running = kept;
        for sequence in gone {
            self.cache.release(sequence.lease);
        }
        let aborted = before - self.waiting.len() - self.running.len();
        self.counters.requests_aborted += aborted as u64;
    }

    /// Returns whether a sequence was preempted.
    fn plan_running(&mut self, budget: &mut usize) -> bool {
        let mut preempted = false;
        let mut at = 0;
        while at < self.running.len() {
            let sequence = &mut self.running[at];
            let planned = sequence.uncomputed().min(*budget);
            let needed = blocks_for(sequence.computed + planned, self.limits.block_size);
            let missing = needed.saturating_sub(sequence.lease.len());
            if self.cache.grow(&mut sequence.lease, missing) {
                sequence.planned = planned;
                *budget -= planned;
                name_planned(&mut self.cache, sequence, self.limits.block_size);
                at += 1;
            } else {
                preempted = true;
                self.preempt_newest();
            }
        }
        preempted
    }

    fn preempt_newest(&mut self) {
        if let Some(mut newest) = self.running.pop() {
            self.cache.release(std::mem::take(&mut newest.lease));
            newest.computed = 0;
            newest.planned = 0;
            self.waiting.push_front(newest);
            self.counters.preemptions += 1;
        }
    }

    fn admit_waiting(&mut self, budget: &mut usize) {
        while *budget > 0 && self.running.len() < self.limits.max_seqs {
            let Some(next) = self.waiting.front() else {
                return;
            };
            let block_size = self.limits.block_size;
            let reusable = (next.tokens.len() - 1) / block_size;
            let keys = &next.chain.keys()[..reusable.min(next.chain.keys().len())];
            let hits = self.cache.overlap(keys);
            let outside = next.outside.get(hits..keys.len()).unwrap_or(&[]);
            let flexkv = self.flexkv.as_ref();
            let (loaded, time) = flexkv.map_or((0, Duration::ZERO), |f| f.find(outside));
            let cached = (hits + loaded) * block_size;
            let planned = (next.tokens.len() - cached).min(*budget);
            let needed = blocks_for(cached + planned, block_size);
            let Some((lease, _)) = self.cache.admit(keys, needed) else {
                return;
            };
            let Some(mut sequence) = self.waiting.pop_front() else {
                return;
            };
            sequence.lease = lease;
            sequence.computed = cached;
            sequence.planned = planned;
            *budget -= planned;
            self.loading += time;
            if sequence.cached_tokens.is_none() {
                sequence.cached_tokens = Some(cached);
                self.counters.prefix_queries += sequence.prompt_len as u64;
                self.counters.prefix_hits += cached as u64;
            }
            name_planned(&mut self.cache, &mut sequence, block_size);
            self.running.push(sequence);
        }
    }

    /// Returns whether the sequence has given its last token.
    fn finish_step_of(&mut self, at: usize, now: Duration) -> bool {
        let sequence = &mut self.running[at];
        sequence.computed += std::mem::take(&mut sequence.planned);
        if sequence.uncomputed() > 0 {
            return false;
        }
        let position = sequence.tokens.len() - sequence.prompt_len;
        let output = Output {
            token: sequence.answer.token(position),
            cached_tokens: sequence.cached_tokens.unwrap_or(0),
            last: position + 1 == sequence.max_tokens,
        };
        if position == 0 {
            self.counters.prompt_tokens += sequence.prompt_len as u64;
            self.counters
                .time_to_first_token
                .observe(now.saturating_sub(sequence.arrived));
        }
        self.counters.generation_tokens += 1;
        sequence.tokens.push(output.token);
        sequence.chain.extend(&sequence.tokens);
        // A closed channel is an abandoned request, dropped at the next step.
        let _abandoned = sequence.out.try_send(output);
        if output.last {
            self.counters.requests_finished += 1;
        }
        output.last
    }
}

fn name_planned(cache: &mut Cache, sequence: &mut Sequence, block_size: usize) {
    let full = (sequence.computed + sequence.planned) / block_size;
    let keys = sequence.chain.keys();
    cache.commit(&mut sequence.lease, &keys[..full.min(keys.len())]);
}

/// Blocks that hold `tokens` tokens.
#[must_use]
pub(crate) fn blocks_for(tokens: usize, block_size: usize) -> usize {
    tokens.div_ceil(block_size)
}

#[cfg(test)]
#[path = "scheduler_tests.rs"]
mod tests;
