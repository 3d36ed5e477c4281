//! One routing decision: candidates are scored, one is chosen, and the record says why.
//!
//! The filter decides with it and the sidecar explains with it.

use serde::Serialize;

use crate::constraint::Shown;
use crate::cost::{Cost, Demand};
use crate::delay::{self, Delay, Pace};
use crate::id::{DpRank, Tier, WorkerId};
use crate::load::Load;
use crate::overlap::Overlap;
use crate::pick::{lesser_of_two, pick};
use crate::policy::{Mode, Policy};
use crate::rng::Rng;
use crate::table::Pool;

/// Candidates that a record lists: the best by cost.
pub const RECORDED: usize = 8;

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
    let least = least_prefill(candidates);
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

/// The fewest prefill tokens on any candidate.
#[must_use]
pub fn least_prefill(candidates: &[Candidate]) -> u32 {
    let queued = candidates.iter().map(|c| c.load.prefill_tokens);
    queued.min().unwrap_or(0)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{OwnerId, Role, Slot};
    use crate::policy::Scoring;
    use crate::table::{Metadata, Owner, Traits};

    fn candidates(overlaps: &[u32]) -> Vec<Candidate> {
        let make = |(owner, depth): (usize, &u32)| Candidate {
            owner,
            overlap: Overlap::new([*depth; 4]),
            load: Load::default(),
            shared_blocks: 0,
            pace: Pace::default(),
            factor: 1.0,
        };
        overlaps.iter().enumerate().map(make).collect()
    }

    const REQUEST: Request = Request {
        demand: Demand {
            tokens: 160,
            block_size: 16,
        },
        trust: 1.0,
        turn: 5,
        typical_ms: 0.0,
        bound: None,
    };

    fn choose(list: &[Candidate], request: &Request, mode: Mode) -> usize {
        let policy = Policy {
            mode,
            ..Policy::default()
        };
        let (scored, chosen) = decide(list, request, &policy, &mut Rng::new(3));
        scored[chosen.unwrap()].candidate.owner
    }

    #[test]
    fn kv_takes_the_longest_overlap_when_load_is_equal() {
        let list = candidates(&[2, 9, 4]);
        assert_eq!(choose(&list, &REQUEST, Mode::Kv), 1);
        assert_eq!(choose(&list, &REQUEST, Mode::RoundRobin), 2);
    }

    #[test]
    fn modes_by_requests_look_at_nothing_else() {
        let mut list = candidates(&[9, 2, 0]);
        for (candidate, decoding) in list.iter_mut().zip([3, 1, 2]) {
            candidate.load.decoding = decoding;
        }
        list[1].load.blocks = 1_000;
        assert_eq!(choose(&list, &REQUEST, Mode::LeastLoaded), 1);
        assert_ne!(choose(&list, &REQUEST, Mode::PowerOfTwo), 0);
    }

    #[test]
    fn the_second_is_the_best_of_the_others_that_fit() {
        let list = candidates(&[8, 9, 4, 8]);
        let policy = Policy::default();
        let mut rng = Rng::new(3);
        let (scored, chosen) = decide(&list, &REQUEST, &policy, &mut rng);
        assert_eq!(chosen, Some(1));
        let mut seconds = [0; 4];
        for _ in 0..100 {
            let i = second(&scored, 1, Mode::Kv, &mut rng, |_| true).unwrap();
            seconds[i] += 1;
        }
        assert!(seconds[0] > 20 && seconds[3] > 20, "{seconds:?}");
        let fits = |c: &Candidate| c.owner == 2;
        assert_eq!(second(&scored, 1, Mode::Kv, &mut rng, fits), Some(2));
        assert_eq!(second(&scored, 1, Mode::Kv, &mut rng, |_| false), None);
    }

    #[test]
    fn blocks_in_use_already_make_an_owner_cheaper() {
        let mut list = candidates(&[0, 0]);
        list[1].shared_blocks = 3;
        assert_eq!(choose(&list, &REQUEST, Mode::Kv), 1);
    }

    #[test]
    fn of_delays_that_are_alike_the_owner_that_is_done_for_longest_is_taken() {
        let mut list = candidates(&[9, 9, 8, 2]);
        for (candidate, finish_ms) in list.iter_mut().zip([-5.0, -9.0, -99.0, -999.0]) {
            candidate.pace = Pace {
                finish_ms,
                ms_per_token: 0.1,
            };
        }
        let policy = Policy {
            scoring: Scoring::PredictedDelay,
            ..Policy::default()
        };
        let chosen = |list: &[Candidate]| decide(list, &REQUEST, &policy, &mut Rng::new(3)).1;
        // A block takes 1.6 ms, so the third is alike and the fourth is not.
        assert_eq!(chosen(&list), Some(2));
        list[2].overlap.depth = [7; 4];
        assert_eq!(chosen(&list), Some(1));
        list[1].load.prefill_tokens = 1_000;
        assert_eq!(chosen(&list), Some(0));
    }

    #[test]
    fn preferred_taints_scale_what_is_compared() {
        let mut list = candidates(&[9, 2]);
        assert_eq!(choose(&list, &REQUEST, Mode::Kv), 0);
        // Costs of 11 and 18.
        list[1].factor = 0.6;
        assert_eq!(choose(&list, &REQUEST, Mode::Kv), 1);
    }

    #[test]
    fn a_bound_owner_is_taken_up_to_its_slack() {
        let list = candidates(&[9, 2]);
        let bound = |owner, slack, mode| {
            let request = Request {
                bound: Some((owner, slack)),
                ..REQUEST
            };
            choose(&list, &request, mode)
        };
        assert_eq!(bound(1, 2.0, Mode::Kv), 1);
        assert_eq!(bound(1, 1.5, Mode::Kv), 0);
        assert_eq!(bound(7, 9.0, Mode::Kv), 0);
        assert_eq!(bound(1, 1.0, Mode::RoundRobin), 1);
    }

    #[test]
    fn saturated_owners_are_left_out_unless_all_are() {
        let mut list = candidates(&[9, 2]);
        list[0].load.waiting = u16::MAX;
        assert_eq!(choose(&list, &REQUEST, Mode::Kv), 1);
        list[1].load.waiting = u16::MAX;
        assert_eq!(choose(&list, &REQUEST, Mode::Kv), 0);
    }

    #[test]
    fn a_stale_index_fades_to_load_alone() {
        assert_eq!(
            [0, 30_000, 45_000, 60_000, 99_000].map(trust),
            [1.0, 1.0, 0.5, 0.0, 0.0]
        );
        let mut list = candidates(&[10, 0]);
        list[0].load.blocks = 5;
        assert_eq!(choose(&list, &REQUEST, Mode::Kv), 0);
        let lost = Request {
            trust: 0.0,
            ..REQUEST
        };
        assert_eq!(choose(&list, &lost, Mode::Kv), 1);
    }

    #[test]
    fn the_record_lists_the_chosen_first_and_is_cut() {
        let owners = (0..20).map(|i| Owner {
            slot: Slot(i),
            id: OwnerId {
                worker: u64::from(i) + 100,
                rank: 0,
            },
            role: Role::Aggregated,
            endpoint: format!("10.0.0.{i}:8000"),
            accepting: true,
            traits: Traits::default(),
            metadata: Metadata::default(),
        });
        let pool = Pool {
            name: "p".into(),
            owners: owners.collect(),
            ..Pool::default()
        };
        let list = candidates(&(0..20).collect::<Vec<_>>());
        let (scored, _) = decide(&list, &REQUEST, &Policy::default(), &mut Rng::new(0));
        let record = Record::new(&pool, "random", REQUEST.demand, &scored, Some(0));
        assert_eq!(record.worker, Some(100));
        assert_eq!(record.candidates.len(), RECORDED);
        assert_eq!(record.candidates[0].worker, 100);
        assert_eq!(record.candidates[1].worker, 110);
        assert!(record.to_json().contains("\"endpoint\":\"10.0.0.0:8000\""));
    }
}
