//! Decisions of filters, each held against the exact state as it was when it was made.

mod formula;
mod past;
mod shadow;

use std::collections::VecDeque;

use kv_core::cost::Demand;
use kv_core::decide::{RECORDED, Terms};
use kv_core::id::{DpRank, OwnerId, Tier, WorkerId};
use kv_core::report::{Booked, Evidence, Weighed};
use serde::{Deserialize, Serialize};

use crate::index::Field;
use crate::load::ProxyId;

pub use formula::Formula;
pub use past::Past;
pub use shadow::{Shadow, Verdict, judge};

/// Decisions kept.
pub const KEPT: usize = 1_000;
/// Longest reason kept, in bytes; filters' reasons are far shorter.
const LONGEST_REASON: usize = 32;

/// A decision with all it rested on, as a filter saw it and as it was.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Decision {
    /// Numbers decisions from 1.
    pub number: u64,
    /// When the loads were read, Unix nanoseconds by Envoy's clock.
    pub at_ns: u64,
    /// Who decided.
    #[serde(flatten)]
    pub proxy: ProxyId,
    /// Nonce of the VM.
    pub vm: u64,
    /// The VM's number for the request.
    pub request: u64,
    /// Name of the pool.
    pub pool: String,
    /// The chosen worker.
    pub worker: WorkerId,
    /// Its data-parallel rank.
    pub rank: DpRank,
    /// Why the request was routed as it was.
    pub reason: String,
    /// Prompt tokens.
    pub tokens: u32,
    /// Complete blocks of the prompt.
    pub blocks: u32,
    /// Share of the overlap that counted.
    pub trust: f32,
    /// What the exact state says.
    pub verdict: Verdict,
    /// Whether it agrees; `null` where there is nothing to agree with.
    pub agree: Option<bool>,
    /// Cost of the choice less the least cost, both exact: blocks, or milliseconds of a
    /// predicted delay.
    pub regret: Option<f64>,
    /// The choice that the exact state asks for.
    pub best: Option<Best>,
    /// The candidates, the chosen one first.
    pub candidates: Vec<Compared>,
}

/// An owner of least cost.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Best {
    /// The worker.
    pub worker: WorkerId,
    /// Its data-parallel rank.
    pub rank: DpRank,
    /// Its cost: blocks, or milliseconds of a predicted delay.
    pub cost: f64,
}

/// A candidate twice.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Compared {
    /// The worker.
    pub worker: WorkerId,
    /// Its data-parallel rank.
    pub rank: DpRank,
    /// As the filter weighed it; `null` if it did not, or not among the best.
    pub seen: Option<Side>,
    /// As it was; `null` if it takes no requests.
    pub exact: Option<Side>,
}

/// What a cost is made of.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Side {
    /// Blocks held by tier: device, host, disk, external.
    pub overlap: [u32; Tier::COUNT],
    /// Blocks beyond them in a shared store.
    pub shared_cache: u32,
    /// Prefill tokens there.
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
    /// The cost: blocks, or milliseconds of a predicted delay.
    pub cost: f64,
}

impl Side {
    /// As the filter weighed it.
    fn seen(field: &Field, evidence: &Evidence, weighed: &Weighed) -> Self {
        Self {
            overlap: weighed.overlap,
            shared_cache: weighed.shared_cache,
            prefill_tokens: weighed.prefill_tokens,
            active_blocks: weighed.active_blocks,
            shared_blocks: weighed.shared_blocks,
            requests: weighed.requests,
            terms: (&shadow::scored_seen(field, evidence, weighed)).into(),
            cost: weighed.cost,
        }
    }
}

/// Who decided.
#[derive(Clone, Debug)]
pub struct Origin {
    /// The proxy.
    pub proxy: ProxyId,
    /// Nonce of the VM.
    pub vm: u64,
}

impl Decision {
    /// The record of a booking whose evidence was judged.
    #[must_use]
    pub fn new(
        origin: Origin,
        field: &Field,
        booked: &Booked,
        evidence: &Evidence,
        shadow: &Shadow,
    ) -> Self {
        let demand = Demand {
            tokens: evidence.tokens,
            block_size: field.pool.block_size,
        };
        let mut reason = evidence.reason.clone();
        reason.truncate(reason.floor_char_boundary(LONGEST_REASON));
        let seen = evidence.candidates.iter().take(RECORDED);
        let mut candidates: Vec<Compared> = seen
            .map(|weighed| {
                let side = Side::seen(field, evidence, weighed);
                compared(weighed.owner, Some(side), field, shadow)
            })
            .collect();
        let is_listed = |best: &OwnerId| {
            let is_it = |c: &Compared| c.worker == best.worker && c.rank == best.rank;
            candidates.iter().any(is_it)
        };
        if let Some(best) = shadow.best(field).filter(|best| !is_listed(best)) {
            candidates.push(compared(best, None, field, shadow));
        }
        Self {
            number: 0,
            at_ns: evidence.at_ns,
            proxy: origin.proxy,
            vm: origin.vm,
            request: booked.request,
            pool: field.pool.name.clone(),
            worker: booked.owner.id.worker,
            rank: booked.owner.id.rank,
            reason,
            tokens: evidence.tokens,
            blocks: demand.blocks(),
            trust: evidence.trust,
            verdict: shadow.verdict,
            agree: shadow.verdict.agrees(),
            regret: shadow.regret,
            best: shadow
                .best(field)
                .zip(shadow.least)
                .map(|(best, cost)| Best {
                    worker: best.worker,
                    rank: best.rank,
                    cost,
                }),
            candidates,
        }
    }
}

fn compared(owner: OwnerId, seen: Option<Side>, field: &Field, shadow: &Shadow) -> Compared {
    Compared {
        worker: owner.worker,
        rank: owner.rank,
        seen,
        exact: shadow.side(field, owner),
    }
}

/// The last decisions.
#[derive(Debug, Default)]
pub struct Decisions {
    kept: VecDeque<Decision>,
    made: u64,
}

/// Which decisions to show.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    /// Of this worker alone.
    pub worker: Option<WorkerId>,
    /// For this reason alone.
    pub reason: Option<String>,
    /// Those that agree with the exact state, or those that don't.
    pub agree: Option<bool>,
    /// At most so many, 100 unless given.
    pub limit: Option<usize>,
}

/// Answer of `/v1/decisions`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DecisionsReport {
    /// Decisions made since the start.
    pub made: u64,
    /// Decisions kept.
    pub kept: usize,
    /// Those asked for, the last one first.
    pub decisions: Vec<Decision>,
}

impl Decisions {
    /// Shown unless a limit is given.
    const SHOWN: usize = 100;

    /// Keeps a decision, and gives it its number.
    pub fn keep(&mut self, decision: Decision) {
        self.made += 1;
        if self.kept.len() >= KEPT {
            self.kept.pop_front();
        }
        let number = self.made;
        self.kept.push_back(Decision { number, ..decision });
    }

    /// Those that are wanted, the last one first.
    #[must_use]
    pub fn report(&self, wanted: &Wanted) -> DecisionsReport {
        let is_wanted = |d: &&Decision| {
            wanted.worker.is_none_or(|worker| d.worker == worker)
                && wanted.reason.as_ref().is_none_or(|r| d.reason == *r)
                && wanted.agree.is_none_or(|agree| d.agree == Some(agree))
        };
        let found = self.kept.iter().rev().filter(is_wanted);
        DecisionsReport {
            made: self.made,
            kept: self.kept.len(),
            decisions: found
                .take(wanted.limit.unwrap_or(Self::SHOWN))
                .cloned()
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests;
