//! One routing decision: candidates are scored, one is chosen, and the record says why.
//!
//! The filter decides with it and the sidecar explains with it.

mod record;

use crate::cost::{Cost, Demand};
use crate::delay::{self, Delay, Pace};
use crate::load::Load;
use crate::overlap::Overlap;
use crate::pick::{lesser_of_two, pick};
use crate::policy::{Mode, Policy};
use crate::rng::Rng;

pub use record::{Considered, RECORDED, Record, Terms};

/// An owner that may be chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Position in [`Pool::owners`].
    pub owner: usize,
    /// What it holds of the prompt.
    pub overlap: Overlap,
    /// Its load.
    pub load: Load,
    /// Blocks of the request that are in use there already.
    pub shared_blocks: u32,
    /// How it gets on with its prefills.
    pub pace: Pace,
    /// What the request's preferred taints multiply its cost by; 1 where there are none.
    pub factor: f64,
}

/// A candidate and its cost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scored {
    /// The candidate.
    pub candidate: Candidate,
    /// Its cost.
    pub cost: Price,
}

/// What a candidate costs, by what its pool compares.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Price {
    /// Dynamo's formula, in blocks.
    Blocks(Cost),
    /// The predicted delay, in milliseconds.
    Delay(Delay),
}

/// What a decision rests on besides the candidates.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Size of the prompt.
    pub demand: Demand,
    /// Share of the overlap that still counts, 1 for a fresh index, 0 for a lost one.
    pub trust: f64,
    /// Cursor of the round-robin mode.
    pub turn: u64,
    /// Milliseconds that prompts of the pool usually take to prefill.
    pub typical_ms: f64,
    /// The owner that the request's session is bound to, and how many times the least cost its own
    /// may be.
    pub bound: Option<(usize, f64)>,
}

/// Scores candidates. Owners whose lanes are saturated don't take part unless all are.
#[must_use]
pub fn score(candidates: &[Candidate], request: &Request, policy: &Policy) -> Vec<Scored> {
    let policy = policy.trusted(request.trust);
    let queued = candidates.iter().map(|c| c.load.prefill_tokens);
    let least = queued.min().unwrap_or(0);
    let score = |c: &Candidate| Scored {
        candidate: *c,
        cost: Price::new(c, request.demand, least, request.typical_ms, &policy),
    };
    let fit = |c: &&Candidate| !c.load.is_saturated();
    let scored: Vec<Scored> = candidates.iter().filter(fit).map(score).collect();
    if scored.is_empty() {
        return candidates.iter().map(score).collect();
    }
    scored
}

/// Scores candidates and chooses one. Returns the chosen position in the returned list.
#[must_use]
pub fn decide(
    candidates: &[Candidate],
    request: &Request,
    policy: &Policy,
    rng: &mut Rng,
) -> (Vec<Scored>, Option<usize>) {
    let scored = score(candidates, request, policy);
    let compared = || -> Vec<f64> { scored.iter().map(|s| s.compared(policy.mode)).collect() };
    if let Some(bound) = bound(&scored, request, policy.mode) {
        return (scored, Some(bound));
    }
    let chosen = match policy.mode {
        Mode::Kv if policy.band().is_some() => longest_done(&scored, policy, rng),
        Mode::Kv => pick(&compared(), policy.temperature, rng),
        Mode::RoundRobin => request
            .turn
            .checked_rem(scored.len() as u64)
            .and_then(|i| usize::try_from(i).ok()),
        Mode::Random => (!scored.is_empty()).then(|| rng.below(scored.len())),
        Mode::LeastLoaded | Mode::Direct | Mode::DeviceAwareWeighted => pick(&compared(), 0.0, rng),
        Mode::PowerOfTwo => lesser_of_two(&compared(), rng),
    };
    (scored, chosen)
}

/// Position of the owner that the request's session is bound to, where its cost lets it stay. Modes
/// that know no cost let it.
#[must_use]
pub fn bound(scored: &[Scored], request: &Request, mode: Mode) -> Option<usize> {
    let (owner, slack) = request.bound?;
    let position = scored.iter().position(|s| s.candidate.owner == owner)?;
    let own = scored.get(position)?.total();
    let least = scored
        .iter()
        .map(Scored::total)
        .fold(f64::INFINITY, f64::min);
    let stays = mode != Mode::Kv || own <= least.max(0.0) * slack;
    stays.then_some(position)
}

/// Of the candidates that cost about the least, the one that has been done with its prefills for
/// longest.
fn longest_done(scored: &[Scored], policy: &Policy, rng: &mut Rng) -> Option<usize> {
    let costs = || scored.iter().map(Scored::total);
    let bound = costs().reduce(f64::min)? + policy.band().unwrap_or(0.0);
    let finish = scored.iter().map(|s| match s.total() {
        cost if cost <= bound => s.candidate.pace.finish_ms,
        _ => f64::INFINITY,
    });
    let finish: Vec<f64> = finish.collect();
    if finish.iter().all(|ms| ms.is_infinite()) {
        return pick(&costs().collect::<Vec<_>>(), 0.0, rng);
    }
    pick(&finish, 0.0, rng)
}

/// Position of the best candidate other than the chosen one, among those for which `fits` holds.
/// Ties share.
#[must_use]
pub fn second(
    scored: &[Scored],
    chosen: usize,
    mode: Mode,
    rng: &mut Rng,
    mut fits: impl FnMut(&Candidate) -> bool,
) -> Option<usize> {
    let (positions, costs): (Vec<usize>, Vec<f64>) = scored
        .iter()
        .enumerate()
        .filter(|(i, s)| *i != chosen && fits(&s.candidate))
        .map(|(i, s)| (i, s.compared(mode)))
        .unzip();
    positions.get(pick(&costs, 0.0, rng)?).copied()
}

impl Price {
    /// The price of a candidate. `least_prefill` are the fewest prefill tokens on any of them.
    #[must_use]
    pub fn new(
        candidate: &Candidate,
        demand: Demand,
        least_prefill: u32,
        typical_ms: f64,
        policy: &Policy,
    ) -> Self {
        let Candidate {
            overlap,
            load,
            shared_blocks,
            pace,
            ..
        } = candidate;
        if policy.predicts_delay() {
            let uncached = delay::uncached_tokens(demand, overlap, *shared_blocks, policy);
            let delay = Delay::new(demand, uncached, load, pace, typical_ms, policy);
            return Self::Delay(delay);
        }
        let policy = policy.decayed(demand, load, least_prefill);
        Self::Blocks(Cost::new(demand, overlap, load, *shared_blocks, &policy))
    }

    /// The sum that is compared.
    #[must_use]
    pub fn total(&self) -> f64 {
        match self {
            Self::Blocks(cost) => cost.total(),
            Self::Delay(delay) => delay.total(),
        }
    }
}

impl Candidate {
    /// Prompt tokens that it still has to prefill.
    #[must_use]
    pub fn uncached_tokens(&self, demand: Demand, policy: &Policy) -> u32 {
        if policy.predicts_delay() {
            delay::uncached_tokens(demand, &self.overlap, self.shared_blocks, policy)
        } else {
            demand.uncached_tokens(&self.overlap, policy)
        }
    }
}

impl Scored {
    /// The cost with what preferred taints make of it.
    #[must_use]
    pub fn total(&self) -> f64 {
        self.cost.total() * self.candidate.factor
    }

    /// What a mode compares: the cost, or for modes that know no cost the number of requests.
    #[must_use]
    pub fn compared(&self, mode: Mode) -> f64 {
        match mode {
            Mode::Kv => self.total(),
            Mode::RoundRobin
            | Mode::Random
            | Mode::LeastLoaded
            | Mode::PowerOfTwo
            | Mode::Direct
            | Mode::DeviceAwareWeighted => f64::from(self.candidate.load.requests()),
        }
    }
}

impl Policy {
    /// By how much costs may differ and still be alike; `None` where only equal ones are.
    #[must_use]
    pub fn band(&self) -> Option<f64> {
        let takes_least = self.temperature <= 0.0;
        (self.predicts_delay() && takes_least).then_some(self.delay.band_ms)
    }

    /// Whether the choice is the least of what was compared, so that it can be told from the
    /// loads alone whether it is still good.
    #[must_use]
    pub fn takes_least(&self) -> bool {
        match self.mode {
            Mode::Kv => self.temperature <= 0.0,
            Mode::LeastLoaded | Mode::DeviceAwareWeighted => true,
            Mode::RoundRobin | Mode::Random | Mode::PowerOfTwo | Mode::Direct => false,
        }
    }

    /// The policy with its overlap credits scaled by `trust`.
    #[must_use]
    pub fn trusted(&self, trust: f64) -> Self {
        Self {
            overlap_score_credit: self.overlap_score_credit * trust,
            host_cache_hit_weight: self.host_cache_hit_weight * trust,
            disk_cache_hit_weight: self.disk_cache_hit_weight * trust,
            shared_cache_multiplier: self.shared_cache_multiplier * trust,
            ..*self
        }
    }
}

/// How much the overlap counts when the head has not changed for `age_ms`: all of it for 30 s,
/// nothing after 60 s.
#[must_use]
#[allow(clippy::cast_precision_loss)]
pub fn trust(age_ms: u64) -> f64 {
    (2.0 - age_ms as f64 / 30_000.0).clamp(0.0, 1.0)
}

#[cfg(test)]
mod tests;
