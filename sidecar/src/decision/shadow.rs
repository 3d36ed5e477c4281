//! What would have been chosen from the exact state, and why it was not.

use kv_core::cost::Demand;
use kv_core::decide::{self, Candidate, Price, RECORDED, Request, Scored};
use kv_core::delay::Pace;
use kv_core::id::{OwnerId, Tier};
use kv_core::load::Load;
use kv_core::overlap::Overlap;
use kv_core::policy::{Mode, Policy};
use kv_core::report::{Evidence, Weighed};
use serde::{Serialize, Serializer};

use super::Side;
use crate::index::Field;

/// What the exact state says of a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// It is the one owner of least cost.
    Agree,
    /// It is one of several of least cost.
    Tie,
    /// What the filter took for the overlaps made the difference.
    Overlap,
    /// What it took for the loads did.
    Load,
    /// Both did, or only both together.
    OverlapAndLoad,
    /// The choice takes no requests, or the best owner was not known to the filter.
    Membership,
    /// The best owner is not among those that a filter reports.
    Unlisted,
    /// The choice is not the least by what the filter itself reports: a defect.
    NotLeast,
    /// A temperature above 0 chose another than the best.
    Sampled,
    /// The session was bound to the choice.
    Bound,
    /// The mode compares nothing, or the filter, of a release before, compares something else.
    Unchecked,
    /// The prompt is not known any more, so overlaps can't be told.
    UnknownPrompt,
}

impl Verdict {
    /// Label for metrics and records.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Agree => "agree",
            Self::Tie => "tie",
            Self::Overlap => "overlap",
            Self::Load => "load",
            Self::OverlapAndLoad => "overlap_and_load",
            Self::Membership => "membership",
            Self::Unlisted => "unlisted",
            Self::NotLeast => "not_least",
            Self::Sampled => "sampled",
            Self::Bound => "bound",
            Self::Unchecked => "unchecked",
            Self::UnknownPrompt => "unknown_prompt",
        }
    }

    /// Whether the choice agrees; `None` where there is nothing to agree with.
    #[must_use]
    pub fn agrees(self) -> Option<bool> {
        match self {
            Self::Agree | Self::Tie => Some(true),
            Self::Sampled | Self::Bound | Self::Unchecked | Self::UnknownPrompt => None,
            _ => Some(false),
        }
    }
}

impl Serialize for Verdict {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// The exact state of a decision.
#[derive(Clone, Debug, PartialEq)]
pub struct Shadow {
    /// What it says.
    pub verdict: Verdict,
    /// Cost of the choice less the least.
    pub regret: Option<f64>,
    /// The least cost.
    pub least: Option<f64>,
    scored: Vec<Scored>,
    best: Option<usize>,
}

impl Shadow {
    /// An owner of least cost.
    #[must_use]
    pub fn best(&self, field: &Field) -> Option<OwnerId> {
        let scored = self.scored.get(self.best?)?;
        let owner = field.pool.owners.get(scored.candidate.owner)?;
        Some(owner.id)
    }

    /// What an owner's exact cost is made of.
    #[must_use]
    pub fn side(&self, field: &Field, owner: OwnerId) -> Option<Side> {
        let scored = self.scored.get(position(&self.scored, field, owner)?)?;
        let Candidate {
            overlap,
            load,
            shared_blocks,
            ..
        } = scored.candidate;
        Some(Side {
            overlap: overlap.by_tier(),
            shared_cache: overlap.shared_cache,
            prefill_tokens: load.prefill_tokens,
            active_blocks: load.blocks,
            shared_blocks,
            requests: load.requests(),
            terms: scored.into(),
            cost: scored.total(),
        })
    }
}

/// Holds a choice against the exact state. `is_prompt_known` says whether the field's overlaps are
/// those of the request.
#[must_use]
pub fn judge(field: &Field, chosen: OwnerId, evidence: &Evidence, is_prompt_known: bool) -> Shadow {
    let policy = &field.pool.policy;
    let scored = scored(field, evidence);
    let compared = |s: &Scored| s.compared(policy.mode);
    let least = scored.iter().map(compared).reduce(f64::min);
    let best = scored.iter().position(|s| Some(compared(s)) == least);
    let own = position(&scored, field, chosen).and_then(|at| scored.get(at));
    let is_compared = match policy.mode {
        Mode::Kv => is_prompt_known,
        Mode::LeastLoaded => true,
        Mode::RoundRobin
        | Mode::Random
        | Mode::PowerOfTwo
        | Mode::Direct
        | Mode::DeviceAwareWeighted => false,
    };
    let is_compared = is_compared && compares_alike(policy, evidence);
    let regret = own.zip(least).map(|(own, least)| compared(own) - least);
    let verdict = match (policy.mode, regret) {
        (Mode::Kv, _) if !is_prompt_known => Verdict::UnknownPrompt,
        _ if !is_compared => Verdict::Unchecked,
        (_, Some(regret)) if regret <= 0.0 => {
            let ties = scored.iter().filter(|s| Some(compared(s)) == least);
            if ties.count() > 1 {
                Verdict::Tie
            } else {
                Verdict::Agree
            }
        }
        (_, Some(_)) if is_bound(chosen, evidence) => Verdict::Bound,
        (Mode::Kv, Some(_)) if policy.temperature > 0.0 => Verdict::Sampled,
        (Mode::Kv, Some(regret)) if policy.band().is_some_and(|band| regret <= band) => {
            Verdict::Tie
        }
        (_, None) => Verdict::Membership,
        (_, Some(_)) => {
            let best = best.and_then(|at| scored.get(at));
            match (own, best) {
                (Some(own), Some(best)) => cause(field, evidence, own, best),
                _ => Verdict::Membership,
            }
        }
    };
    Shadow {
        verdict,
        regret: regret.filter(|_| is_compared),
        least,
        scored,
        best,
    }
}

/// Whether the request's session was bound to the choice, which need not be the best then.
fn is_bound(chosen: OwnerId, evidence: &Evidence) -> bool {
    let bound = evidence.constraints.bound;
    bound.is_some_and(|bound| bound.owner == chosen)
}

/// Whether the filter compares what its pool's policy says: one of a release that can't predict
/// delays compares blocks.
fn compares_alike(policy: &Policy, evidence: &Evidence) -> bool {
    let mut seen = evidence.candidates.iter();
    !policy.predicts_delay() || seen.all(|seen| seen.paced.is_some())
}

/// All owners that take requests, at their exact cost.
fn scored(field: &Field, evidence: &Evidence) -> Vec<Scored> {
    let mut candidates = field.candidates(&evidence.constraints);
    leave_out(&mut candidates, field, evidence);
    if !field.pool.families.is_empty() {
        take_overlaps_as_seen(&mut candidates, field, evidence);
    }
    take_pace_as_seen(&mut candidates, field, evidence);
    let request = Request {
        demand: demand(field, evidence),
        trust: 1.0,
        turn: 0,
        typical_ms: typical_seen(evidence),
        bound: None,
    };
    decide::score(&candidates, &request, &field.pool.policy)
}

/// An owner that takes so many requests and no more, or gets a part of its share yet, may have been
/// left out by the filter: then it was no choice.
fn leave_out(candidates: &mut Vec<Candidate>, field: &Field, evidence: &Evidence) {
    let pool = &field.pool;
    candidates.retain(|candidate| {
        let Some(owner) = pool.owners.get(candidate.owner) else {
            return false;
        };
        let is_warming = pool.slow_start_ms > 0 && owner.traits.since_ms > 0;
        let may_be_left_out = is_warming || owner.metadata.max_requests > 0;
        !may_be_left_out || seen_of(field, evidence, candidate).is_some()
    });
}

/// What the filter saw of a candidate, if it lists it.
fn seen_of<'a>(
    field: &Field,
    evidence: &'a Evidence,
    candidate: &Candidate,
) -> Option<&'a Weighed> {
    let owner = field.pool.owners.get(candidate.owner)?;
    let mut listed = evidence.candidates.iter();
    listed.find(|seen| seen.owner == owner.id)
}

/// Bookings name a prompt's blocks in Dynamo's family alone: where others count too, the filter's
/// word is taken for the overlaps of the owners that it lists.
fn take_overlaps_as_seen(candidates: &mut [Candidate], field: &Field, evidence: &Evidence) {
    for candidate in candidates {
        if let Some(seen) = seen_of(field, evidence, candidate) {
            candidate.overlap = overlap(seen);
        }
    }
}

/// The clocks are the proxy's: of the owners that it lists, its word is taken, within what the
/// exact load allows.
fn take_pace_as_seen(candidates: &mut [Candidate], field: &Field, evidence: &Evidence) {
    for candidate in candidates {
        let seen = seen_of(field, evidence, candidate);
        if let Some(seen) = seen.filter(|seen| seen.paced.is_some()) {
            candidate.pace = pace(seen);
        }
    }
}

/// Why a choice was made that is not the best.
fn cause(field: &Field, evidence: &Evidence, own: &Scored, best: &Scored) -> Verdict {
    let seen = |s: &Scored| seen_of(field, evidence, &s.candidate);
    let (Some(seen_own), Some(seen_best)) = (seen(own), seen(best)) else {
        // A short list leaves nobody out.
        let is_whole = evidence.candidates.len() < RECORDED;
        return if is_whole {
            Verdict::Membership
        } else {
            Verdict::Unlisted
        };
    };
    let mode = field.pool.policy.mode;
    let seen_least = evidence
        .candidates
        .iter()
        .map(|weighed| by(mode, weighed))
        .reduce(f64::min);
    let band = field.pool.policy.band().unwrap_or(0.0);
    if seen_least.is_some_and(|least| by(mode, seen_own) - band > least) {
        return Verdict::NotLeast;
    }
    let mixed =
        |s: &Scored, seen: &Weighed, exact: (bool, bool)| mixed(field, evidence, s, seen, exact);
    let is_better = |exact| mixed(best, seen_best, exact) < mixed(own, seen_own, exact);
    match (is_better((true, false)), is_better((false, true))) {
        (true, false) => Verdict::Overlap,
        (false, true) => Verdict::Load,
        _ => Verdict::OverlapAndLoad,
    }
}

/// What a mode compares, as the filter saw it.
fn by(mode: Mode, weighed: &Weighed) -> f64 {
    if mode == Mode::Kv {
        weighed.cost
    } else {
        f64::from(weighed.requests)
    }
}

/// What is compared of an owner whose overlap or load is exact, and the other as it was seen.
fn mixed(
    field: &Field,
    evidence: &Evidence,
    exact: &Scored,
    seen: &Weighed,
    (is_overlap_exact, is_load_exact): (bool, bool),
) -> f64 {
    let policy = &field.pool.policy;
    let (overlap, policy) = if is_overlap_exact {
        (exact.candidate.overlap, *policy)
    } else {
        (overlap(seen), trusted(policy, evidence))
    };
    let (load, shared_blocks) = if is_load_exact {
        (exact.candidate.load, exact.candidate.shared_blocks)
    } else {
        (load(seen), seen.shared_blocks)
    };
    let candidate = Candidate {
        overlap,
        load,
        shared_blocks,
        ..exact.candidate
    };
    let least = least_seen(evidence);
    let typical_ms = typical_seen(evidence);
    let cost = Price::new(
        &candidate,
        demand(field, evidence),
        least,
        typical_ms,
        &policy,
    );
    Scored { candidate, cost }.compared(policy.mode)
}

fn demand(field: &Field, evidence: &Evidence) -> Demand {
    Demand {
        tokens: evidence.tokens,
        block_size: field.pool.block_size,
    }
}

/// The policy that the filter applied.
fn trusted(policy: &Policy, evidence: &Evidence) -> Policy {
    policy.trusted(f64::from(evidence.trust))
}

/// The overlap that the filter saw.
fn overlap(seen: &Weighed) -> Overlap {
    let mut depth = [0; Tier::COUNT];
    let mut sum = 0_u32;
    for (depth, blocks) in depth.iter_mut().zip(seen.overlap) {
        sum = sum.saturating_add(blocks);
        *depth = sum;
    }
    Overlap {
        depth,
        shared_cache: seen.shared_cache,
    }
}

/// The fewest prefill tokens that the filter saw, of those that it lists.
fn least_seen(evidence: &Evidence) -> u32 {
    let queued = evidence.candidates.iter().map(|seen| seen.prefill_tokens);
    queued.min().unwrap_or(0)
}

/// What the filter took prompts to take usually, milliseconds.
fn typical_seen(evidence: &Evidence) -> f64 {
    let paced = evidence.candidates.iter().find_map(|seen| seen.paced);
    paced.map_or(0.0, |paced| paced.typical_ms)
}

/// The pace that the filter saw.
fn pace(seen: &Weighed) -> Pace {
    seen.paced.map_or_else(Pace::default, |paced| Pace {
        finish_ms: paced.finish_ms,
        ms_per_token: paced.ms_per_token,
    })
}

/// A candidate and its cost as the filter saw them.
pub(super) fn scored_seen(field: &Field, evidence: &Evidence, seen: &Weighed) -> Scored {
    let mut candidate = candidate(seen);
    let mut owners = field.pool.owners.iter();
    let owner = owners.find(|owner| owner.id == seen.owner);
    candidate.factor = owner.map_or(1.0, |owner| evidence.constraints.factor(owner));
    let cost = Price::new(
        &candidate,
        demand(field, evidence),
        least_seen(evidence),
        typical_seen(evidence),
        &trusted(&field.pool.policy, evidence),
    );
    Scored { candidate, cost }
}

/// A candidate as the filter saw it.
fn candidate(seen: &Weighed) -> Candidate {
    Candidate {
        owner: 0,
        overlap: overlap(seen),
        load: load(seen),
        shared_blocks: seen.shared_blocks,
        pace: pace(seen),
        factor: 1.0,
    }
}

/// The load that the filter saw; all requests count as waiting where it did not say.
fn load(seen: &Weighed) -> Load {
    let waiting = match seen.paced {
        Some(paced) => paced.waiting,
        None => u16::try_from(seen.requests).unwrap_or(u16::MAX),
    };
    let decoding = seen.requests.saturating_sub(waiting.into());
    Load {
        prefill_tokens: seen.prefill_tokens,
        waiting,
        decoding: u16::try_from(decoding).unwrap_or(u16::MAX),
        blocks: seen.active_blocks,
    }
}

fn position(scored: &[Scored], field: &Field, owner: OwnerId) -> Option<usize> {
    let owners = &field.pool.owners;
    let is_it = |s: &Scored| owners.get(s.candidate.owner).is_some_and(|o| o.id == owner);
    scored.iter().position(is_it)
}
