//! One routing decision: candidates are scored, one is chosen, and the record says why.
//!
//! The filter decides with it and the sidecar explains with it.

use serde::Serialize;

use crate::cost::{Cost, Demand};
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
}

/// A candidate and its cost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scored {
    /// The candidate.
    pub candidate: Candidate,
    /// Its cost, in blocks.
    pub cost: Cost,
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
}

/// Scores candidates. Owners whose lanes are saturated don't take part unless all are.
#[must_use]
pub fn score(candidates: &[Candidate], request: &Request, policy: &Policy) -> Vec<Scored> {
    let policy = policy.trusted(request.trust);
    let score = |c: &Candidate| Scored {
        candidate: *c,
        cost: Cost::new(
            request.demand,
            &c.overlap,
            &c.load,
            c.shared_blocks,
            &policy,
        ),
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
    let chosen = match policy.mode {
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

impl Scored {
    /// What a mode compares: the cost, or for modes that know no cost the number of requests.
    #[must_use]
    pub fn compared(&self, mode: Mode) -> f64 {
        match mode {
            Mode::Kv => self.cost.total(),
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
    /// Prefill term of the cost, in blocks.
    pub prefill_cost: f64,
    /// Decode term of the cost, in blocks.
    pub decode_cost: f64,
    /// Request term of the cost, in blocks.
    pub request_cost: f64,
    /// The cost that was compared, in blocks.
    pub cost: f64,
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
        let total = |i: &usize| scored.get(*i).map_or(f64::MAX, |s| s.cost.total());
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
                prefill_cost: s.cost.prefill,
                decode_cost: s.cost.decode,
                request_cost: s.cost.requests,
                cost: s.cost.total(),
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
    use crate::table::{Metadata, Owner, Traits};

    fn candidates(overlaps: &[u32]) -> Vec<Candidate> {
        let make = |(owner, depth): (usize, &u32)| Candidate {
            owner,
            overlap: Overlap::new([*depth; 4]),
            load: Load::default(),
            shared_blocks: 0,
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
