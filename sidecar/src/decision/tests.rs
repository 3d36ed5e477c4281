use std::sync::Arc;

use kv_core::id::{Role, Slot};
use kv_core::overlap::Overlap;
use kv_core::policy::{Mode, Policy, Scoring};
use kv_core::report::{OwnerKey, Paced};
use kv_core::table;
use kv_core::tracker::ActiveLoad;

use super::*;
use crate::index::Standing;

const BLOCK: u32 = 16;

fn id(worker: u64) -> OwnerId {
    OwnerId { worker, rank: 0 }
}

/// A pool whose worker n holds, and has in use, so many blocks.
fn field(mode: Mode, workers: &[(u32, u64)]) -> Field {
    let owners = (0_u16..).zip(workers).map(|(n, _)| table::Owner {
        slot: Slot(n),
        id: id(n.into()),
        role: Role::Aggregated,
        endpoint: String::new(),
        accepting: true,
        traits: table::Traits::default(),
        metadata: table::Metadata::default(),
    });
    let standing = |(held, blocks): &(u32, u64)| Standing {
        overlap: Overlap::new([*held; 4]),
        load: ActiveLoad {
            blocks: *blocks,
            decoding: u32::try_from(*blocks).unwrap(),
            ..ActiveLoad::default()
        },
        shared_blocks: 0,
    };
    Field {
        pool: Arc::new(table::Pool {
            name: "p".into(),
            block_size: BLOCK,
            policy: Policy {
                mode,
                ..Policy::default()
            },
            owners: owners.collect(),
            ..table::Pool::default()
        }),
        is_load_known: true,
        standings: workers.iter().map(standing).collect(),
    }
}

/// What a filter saw that took the workers to hold and use so many blocks; the first is chosen.
/// The prompt has ten blocks.
fn evidence(workers: &[(u64, u32, u32)]) -> Evidence {
    let weighed = |(worker, held, blocks): &(u64, u32, u32)| Weighed {
        owner: id(*worker),
        overlap: [*held, 0, 0, 0],
        shared_cache: 0,
        prefill_tokens: 0,
        active_blocks: *blocks,
        shared_blocks: 0,
        requests: *blocks,
        cost: f64::from(10 - held + blocks + 10),
        paced: None,
    };
    Evidence {
        at_ns: 7,
        reason: "kv".into(),
        tokens: 10 * BLOCK,
        trust: 1.0,
        candidates: workers.iter().map(weighed).collect(),
        constraints: Default::default(),
    }
}

fn verdict(exact: &[(u32, u64)], seen: &[(u64, u32, u32)]) -> (Verdict, Option<f64>) {
    let shadow = judge(
        &field(Mode::Kv, exact),
        id(seen[0].0),
        &evidence(seen),
        true,
    );
    (shadow.verdict, shadow.regret)
}

#[test]
fn a_choice_of_least_exact_cost_agrees() {
    let seen = [(1, 4, 0), (0, 0, 0)];
    assert_eq!(
        verdict(&[(0, 0), (4, 0)], &seen),
        (Verdict::Agree, Some(0.0))
    );
    assert_eq!(verdict(&[(4, 0), (4, 0)], &seen), (Verdict::Tie, Some(0.0)));
    // What the filter saw was wrong, and did not matter.
    assert_eq!(
        verdict(&[(0, 9), (3, 2)], &seen),
        (Verdict::Agree, Some(0.0))
    );
}

#[test]
fn a_difference_is_laid_to_what_made_it() {
    let seen = [(1, 4, 0), (0, 0, 0)];
    let of = |exact: &[(u32, u64)]| verdict(exact, &seen);
    assert_eq!(of(&[(6, 0), (4, 0)]), (Verdict::Overlap, Some(2.0)));
    assert_eq!(of(&[(0, 0), (4, 7)]), (Verdict::Load, Some(3.0)));
    assert_eq!(of(&[(6, 0), (4, 7)]), (Verdict::OverlapAndLoad, Some(9.0)));
    // Neither alone would have done it.
    assert_eq!(of(&[(3, 0), (4, 3)]), (Verdict::OverlapAndLoad, Some(2.0)));
    let listed_others = [(1, 4, 0)];
    let missing = verdict(&[(9, 0), (4, 0)], &listed_others);
    assert_eq!(missing, (Verdict::Membership, Some(5.0)));
    let gone = verdict(&[(0, 0)], &[(5, 4, 0)]);
    assert_eq!(gone, (Verdict::Membership, None));
    let against_itself = verdict(&[(6, 0), (4, 0)], &[(1, 4, 0), (0, 6, 0)]);
    assert_eq!(against_itself, (Verdict::NotLeast, Some(2.0)));
}

#[test]
fn a_long_list_may_leave_the_best_out() {
    let seen: Vec<_> = (1..=RECORDED as u64).map(|n| (n, 4, 0)).collect();
    let mut exact = vec![(4, 0); 20];
    exact[15] = (8, 0);
    assert_eq!(verdict(&exact, &seen), (Verdict::Unlisted, Some(4.0)));
}

#[test]
fn what_compares_nothing_is_not_judged() {
    let seen = evidence(&[(1, 0, 5), (0, 0, 0)]);
    let judge_in = |mode, is_known| judge(&field(mode, &[(0, 0), (0, 5)]), id(1), &seen, is_known);
    assert_eq!(judge_in(Mode::RoundRobin, true).verdict, Verdict::Unchecked);
    assert_eq!(judge_in(Mode::RoundRobin, true).regret, None);
    assert_eq!(judge_in(Mode::Kv, false).verdict, Verdict::UnknownPrompt);
    let by_requests = judge_in(Mode::LeastLoaded, false);
    assert_eq!(by_requests.verdict, Verdict::NotLeast);
    assert_eq!(by_requests.regret, Some(5.0));
    let mut warm = field(Mode::Kv, &[(0, 0), (0, 5)]);
    Arc::make_mut(&mut warm.pool).policy.temperature = 0.5;
    let sampled = judge(&warm, id(1), &seen, true);
    assert_eq!(sampled.verdict, Verdict::Sampled);
    assert_eq!(sampled.verdict.agrees(), None);
}

fn booked(request: u64, worker: u64) -> Booked {
    Booked {
        request,
        owner: OwnerKey {
            pool: 0,
            id: id(worker),
        },
        decoding: false,
        prefill_tokens: 0,
        blocks: 10,
        prefix: None,
        hashes: Vec::new(),
        evidence: None,
        session: None,
    }
}

fn decision(request: u64, worker: u64, exact: &[(u32, u64)]) -> Decision {
    let other = 1 - worker;
    let (field, seen) = (
        field(Mode::Kv, exact),
        evidence(&[(worker, 4, 0), (other, 0, 0)]),
    );
    let shadow = judge(&field, id(worker), &seen, true);
    let origin = Origin {
        proxy: ProxyId {
            process: 3,
            vm_id: "v".into(),
        },
        vm: 4,
    };
    Decision::new(origin, &field, &booked(request, worker), &seen, &shadow)
}

#[test]
fn a_record_shows_both_sides_and_the_best() {
    let record = decision(9, 1, &[(6, 0), (4, 0)]);
    let json = serde_json::to_value(&record).unwrap();
    assert_eq!(json["worker"], 1);
    assert_eq!((&json["process"], &json["vm"]), (&3.into(), &4.into()));
    assert_eq!(json["verdict"], "overlap");
    assert_eq!(json["agree"], false);
    assert_eq!(json["regret"], 2.0);
    assert_eq!(
        json["best"],
        serde_json::json!({"worker": 0, "rank": 0, "cost": 14.0})
    );
    let candidates = &json["candidates"];
    assert_eq!(candidates[0]["worker"], 1);
    assert_eq!(candidates[0]["seen"]["cost"], 16.0);
    assert_eq!(candidates[1]["seen"]["overlap"][0], 0);
    assert_eq!(candidates[1]["exact"]["overlap"][0], 6);
    assert_eq!(candidates[1]["exact"]["cost"], 14.0);
}

#[test]
fn the_last_decisions_are_kept_and_filtered() {
    let mut decisions = Decisions::default();
    for request in 0..1_500 {
        let exact = [(if request % 3 == 0 { 6 } else { 0 }, 0), (4, 0)];
        decisions.keep(decision(request, request % 2, &exact));
    }
    let report = |wanted: Wanted| decisions.report(&wanted);
    let all = report(Wanted {
        limit: Some(5_000),
        ..Wanted::default()
    });
    assert_eq!(
        (all.made, all.kept, all.decisions.len()),
        (1_500, KEPT, KEPT)
    );
    assert_eq!(all.decisions[0].number, 1_500);
    assert_eq!(report(Wanted::default()).decisions.len(), 100);
    let worker = Some(1);
    let of_one = report(Wanted {
        worker,
        agree: Some(false),
        limit: Some(3),
        ..Wanted::default()
    });
    let requests: Vec<u64> = of_one.decisions.iter().map(|d| d.request).collect();
    assert_eq!(requests, [1_497, 1_491, 1_485]);
    let reason = Some("text".into());
    let none = report(Wanted {
        reason,
        ..Wanted::default()
    });
    assert_eq!(none.decisions, []);
}

#[test]
fn the_formula_shows_each_term() {
    let mut field = field(Mode::Kv, &[(0, 0), (0, 0)]);
    let seen = Weighed {
        owner: id(1),
        overlap: [6, 4, 0, 0],
        shared_cache: 0,
        prefill_tokens: 1_448,
        active_blocks: 15,
        shared_blocks: 0,
        requests: 3,
        cost: 116.5,
        paced: None,
    };
    let evidence = Evidence {
        candidates: vec![seen],
        ..evidence(&[(1, 0, 0)])
    };
    let line = Formula::new(&field, &evidence, &seen).to_string();
    let expected = "Formula for worker_1: 116.5 = 1.0 * 91.5 + 25.0 (cached_blocks: 10)";
    assert_eq!(line, expected);
    Arc::make_mut(&mut field.pool)
        .policy
        .decode_active_request_weight = 0.5;
    let ranked = Weighed {
        owner: OwnerId { worker: 1, rank: 2 },
        cost: 118.0,
        ..seen
    };
    let line = Formula::new(&field, &evidence, &ranked).to_string();
    let expected = "Formula for worker_1.2: 118.0 = 1.0 * 91.5 + 25.0 + 1.5 (cached_blocks: 10)";
    assert_eq!(line, expected);
}

/// The same, of a pool that compares predicted delays.
fn delayed(workers: &[(u32, u64)]) -> Field {
    let mut field = field(Mode::Kv, workers);
    Arc::make_mut(&mut field.pool).policy.scoring = Scoring::PredictedDelay;
    field
}

/// What a filter saw that predicts delays: of each worker the blocks it holds and the prefill
/// tokens there, of which so many milliseconds are left. Tokens take 0.1 ms, prompts usually 5.
fn evidence_of_delays(workers: &[(u64, u32, u32, f64)]) -> Evidence {
    let field = delayed(&[]);
    let mut evidence = evidence(&[]);
    for (worker, held, prefill_tokens, finish_ms) in workers {
        let requests = u32::from(*prefill_tokens > 0);
        let mut seen = Weighed {
            owner: id(*worker),
            overlap: [*held, 0, 0, 0],
            shared_cache: 0,
            prefill_tokens: *prefill_tokens,
            active_blocks: 0,
            shared_blocks: 0,
            requests,
            cost: 0.0,
            paced: Some(Paced {
                waiting: 1,
                finish_ms: *finish_ms,
                ms_per_token: 0.1,
                typical_ms: 5.0,
            }),
        };
        if let Some(paced) = &mut seen.paced {
            paced.waiting = u16::try_from(requests).unwrap();
        }
        seen.cost = shadow::scored_seen(&field, &evidence, &seen).cost.total();
        evidence.candidates.push(seen);
    }
    evidence
}

#[test]
fn delays_within_the_band_are_ties_and_the_clocks_are_the_filters() {
    // Worker 0 has 400 tokens booked, of which 20 ms are left, and no block.
    let mut field = delayed(&[(0, 0), (2, 0), (0, 0)]);
    field.standings[0].load.prefill_tokens = 400;
    let seen = [(1, 2, 0, -9.0), (0, 0, 400, 20.0), (2, 0, 0, -9.0)];
    let evidence = evidence_of_delays(&seen);
    let shadow = judge(&field, id(1), &evidence, true);
    assert_eq!((shadow.verdict, shadow.regret), (Verdict::Agree, Some(0.0)));
    let side = shadow.side(&field, id(0)).unwrap();
    assert_eq!(side.cost, 20.0 + 16.0);
    // Two of ten blocks save 3.2 ms, which is beyond the band; one saves less than that.
    let shadow = judge(&field, id(2), &evidence, true);
    assert_eq!(shadow.verdict, Verdict::NotLeast);
    field.standings[1].overlap = Overlap::new([1; 4]);
    let shadow = judge(&field, id(2), &evidence, true);
    assert_eq!(shadow.verdict, Verdict::Tie);
    assert!((shadow.regret.unwrap() - 1.6).abs() < 1e-9);
    // What is not booked any more is not waited for.
    field.standings[0].load.prefill_tokens = 50;
    assert_eq!(
        judge(&field, id(1), &evidence, true)
            .side(&field, id(0))
            .unwrap()
            .cost,
        5.0 + 16.0
    );
}

#[test]
fn a_filter_that_compares_blocks_is_not_judged_by_delays() {
    let field = delayed(&[(0, 0), (4, 0)]);
    let shadow = judge(&field, id(0), &evidence(&[(0, 0, 0), (1, 4, 0)]), true);
    assert_eq!(shadow.verdict, Verdict::Unchecked);
    assert_eq!(shadow.regret, None);
}

#[test]
fn a_delays_line_shows_each_term_and_what_only_a_shared_store_has() {
    let field = delayed(&[(0, 0), (0, 0)]);
    let seen = Weighed {
        shared_cache: 2,
        requests: 11,
        ..evidence_of_delays(&[(1, 5, 200, 12.0)]).candidates[0]
    };
    let evidence = Evidence {
        candidates: vec![seen],
        ..evidence(&[])
    };
    let cost = shadow::scored_seen(&field, &evidence, &seen).cost.total();
    let line = Formula::new(&field, &evidence, &Weighed { cost, ..seen }).to_string();
    // Ten blocks less five and half of two; one request waits, ten decode.
    let expected = "Delay for worker_1: 24.7 = 12.0 + 6.4 + 1.6 + 1.9 + 2.8 ms (cached_blocks: 5, \
                    shared_cache: 2)";
    assert_eq!(line, expected);
}
