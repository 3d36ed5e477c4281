use super::*;
use crate::id::{OwnerId, Role, Slot};
use crate::policy::Scoring;
use crate::table::{Metadata, Owner, Pool, Traits};

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
