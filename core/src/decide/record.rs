//! Decisions as told to people and programs.

use serde::Serialize;

use super::{Price, Scored};
use crate::constraint::Shown;
use crate::cost::Demand;
use crate::id::{DpRank, Tier, WorkerId};
use crate::table::Pool;

/// Candidates that a record lists: the best by cost.
pub const RECORDED: usize = 8;

/// A decision as told to people and programs: `x-kv-router-decision`, `/v1/explain`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Record<'a> {
    /// Pool name.
    pub pool: &'a str,
    /// Why the request was routed this way.
    pub reason: &'a str,
    /// The chosen worker.
    pub worker: Option<WorkerId>,
    /// Its data-parallel rank.
    pub rank: Option<DpRank>,
    /// Its endpoint.
    pub endpoint: Option<&'a str>,
    /// Prompt tokens.
    pub tokens: u32,
    /// Complete prompt blocks.
    pub blocks: u32,
    /// What the request asked of its worker.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub constraints: Option<Shown<'a>>,
    /// The best candidates by cost, at most [`RECORDED`], and the chosen one among them.
    pub candidates: Vec<Considered<'a>>,
}

/// A candidate in a [`Record`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Considered<'a> {
    /// The worker.
    pub worker: WorkerId,
    /// Its data-parallel rank.
    pub rank: DpRank,
    /// Its endpoint.
    pub endpoint: &'a str,
    /// Blocks held, by tier: device, host, disk, external.
    pub overlap: [u32; Tier::COUNT],
    /// Blocks beyond them that a shared store has.
    pub shared_cache: u32,
    /// Prefill tokens booked there.
    pub prefill_tokens: u32,
    /// Blocks in use there.
    pub active_blocks: u32,
    /// Blocks of the request among them.
    pub shared_blocks: u32,
    /// Requests there.
    pub requests: u32,
    /// Terms of the cost.
    #[serde(flatten)]
    pub terms: Terms,
    /// What preferred taints multiply their sum by, where that is not 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub factor: Option<f64>,
    /// The cost that was compared: blocks, or milliseconds of a predicted delay.
    pub cost: f64,
}

/// The terms of a cost in records.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Terms {
    /// Of Dynamo's formula, in blocks.
    Blocks {
        /// Prefill term.
        prefill_cost: f64,
        /// Decode term.
        decode_cost: f64,
        /// Request term.
        request_cost: f64,
    },
    /// Of a predicted delay, in milliseconds.
    Delay {
        /// Prefill to be done there before.
        backlog_ms: f64,
        /// Prefill of this prompt.
        prefill_ms: f64,
        /// What it adds for requests that wait.
        waiting_ms: f64,
        /// What it adds for requests that decode.
        decoding_ms: f64,
        /// What the number of requests counts for.
        request_ms: f64,
        /// What a token takes there.
        ms_per_token: f64,
        /// Requests there that wait for their first token.
        waiting: u16,
    },
}

impl From<&Scored> for Terms {
    fn from(scored: &Scored) -> Self {
        match &scored.cost {
            Price::Blocks(cost) => Self::Blocks {
                prefill_cost: cost.prefill,
                decode_cost: cost.decode,
                request_cost: cost.requests,
            },
            Price::Delay(delay) => Self::Delay {
                backlog_ms: delay.backlog,
                prefill_ms: delay.own,
                waiting_ms: delay.waiting,
                decoding_ms: delay.decoding,
                request_ms: delay.requests,
                ms_per_token: scored.candidate.pace.ms_per_token,
                waiting: scored.candidate.load.waiting,
            },
        }
    }
}

impl<'a> Record<'a> {
    /// The record of a decision in `pool`.
    #[must_use]
    pub fn new(
        pool: &'a Pool,
        reason: &'a str,
        demand: Demand,
        scored: &[Scored],
        chosen: Option<usize>,
    ) -> Self {
        let owner = |s: &Scored| pool.owners.get(s.candidate.owner);
        let picked = chosen.and_then(|i| owner(scored.get(i)?));
        let mut order: Vec<usize> = (0..scored.len()).collect();
        let total = |i: &usize| scored.get(*i).map_or(f64::MAX, Scored::total);
        // The chosen one first, so that cutting the list never drops it.
        order.sort_by(|a, b| {
            (Some(*b) == chosen)
                .cmp(&(Some(*a) == chosen))
                .then(total(a).total_cmp(&total(b)))
        });
        order.truncate(RECORDED);
        let candidates = order.iter().filter_map(|i| {
            let s = scored.get(*i)?;
            let o = owner(s)?;
            Some(Considered {
                worker: o.id.worker,
                rank: o.id.rank,
                endpoint: &o.endpoint,
                overlap: s.candidate.overlap.by_tier(),
                shared_cache: s.candidate.overlap.shared_cache,
                prefill_tokens: s.candidate.load.prefill_tokens,
                active_blocks: s.candidate.load.blocks,
                shared_blocks: s.candidate.shared_blocks,
                requests: s.candidate.load.requests(),
                terms: s.into(),
                factor: Some(s.candidate.factor).filter(|factor| *factor != 1.0),
                cost: s.total(),
            })
        });
        Self {
            pool: &pool.name,
            reason,
            worker: picked.map(|o| o.id.worker),
            rank: picked.map(|o| o.id.rank),
            endpoint: picked.map(|o| o.endpoint.as_str()),
            tokens: demand.tokens,
            blocks: demand.blocks(),
            constraints: None,
            candidates: candidates.collect(),
        }
    }

    /// The record as one line of JSON.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }
}
