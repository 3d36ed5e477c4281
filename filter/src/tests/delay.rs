//! Choices by the predicted delay.

use super::reports::{Sidecar, run};
use super::*;
use crate::request::DECISION;
use kv_core::policy::Scoring;
use kv_core::report::Step;
use serde_json::Value;

/// Owners that take a millisecond to a token.
fn site(owners: u16, held: &[(usize, Slot, &[u32])]) -> Site {
    let mut site = Site::new();
    let mut table = table(owners, Mode::Kv);
    let policy = &mut table.pools[0].policy;
    policy.scoring = Scoring::PredictedDelay;
    policy.delay.prefill_ms_per_token = 1.0;
    site.publish(&table, held);
    site.tick();
    site
}

/// The candidates of a request's record, the chosen one first.
fn candidates(site: &mut Site, context: u32) -> Vec<Value> {
    site.host.enter(context);
    site.vm.on_response_headers(context);
    let record = site.host.text(Headers::Response, DECISION).unwrap();
    let record: Value = serde_json::from_str(&record).unwrap();
    record["candidates"].as_array().unwrap().clone()
}

#[test]
fn owners_that_cost_alike_take_turns() {
    let mut site = site(3, &[]);
    for round in 0..3 {
        let mut chosen = std::collections::HashSet::new();
        for _ in 0..3 {
            let context = site.complete(&body(&prompt(1 + round, 40)));
            chosen.insert(site.destination());
            site.over(context);
            site.host.advance_ms(1);
        }
        assert_eq!(chosen.len(), 3);
    }
}

#[test]
fn a_prompt_goes_elsewhere_until_the_backlog_before_its_blocks_has_drained() {
    let tokens = prompt(1, 40);
    let mut site = site(2, &[(0, Slot(0), &tokens)]);
    let other = [&tokens[..20], &prompt(2, 60)].concat();
    site.complete(&body(&other));
    assert_eq!(site.destination(), Some(endpoint(0)), "60 ms, not 80");

    let context = site.complete(&body(&tokens));
    assert_eq!(site.destination(), Some(endpoint(1)));
    let [chosen, holder] = candidates(&mut site, context).try_into().unwrap();
    assert_eq!(
        (&chosen["cost"], &chosen["backlog_ms"]),
        (&40.0.into(), &0.0.into())
    );
    let terms = [
        "backlog_ms",
        "prefill_ms",
        "waiting_ms",
        "decoding_ms",
        "request_ms",
    ];
    let terms = terms.map(|term| holder[term].as_f64().unwrap());
    assert_eq!(terms, [60.0, 4.0, 1.0, 0.0, 3.0]);
    assert_eq!(
        (&holder["waiting"], &holder["ms_per_token"]),
        (&1.into(), &1.0.into())
    );
    site.over(context);

    site.host.advance_ms(35);
    site.complete(&body(&tokens));
    assert_eq!(site.destination(), Some(endpoint(0)));
}

#[test]
fn what_requests_under_way_have_in_common_with_a_prompt_counts_as_cached() {
    let mut site = site(2, &[]);
    let context = site.complete(&body(&prompt(1, 41)));
    let first = site.destination();
    site.host.advance_ms(20);
    let follow_up = site.complete(&body(&prompt(1, 44)));
    assert_eq!(site.destination(), first);
    let candidates = candidates(&mut site, follow_up);
    assert_eq!(candidates[0]["overlap"], serde_json::json!([0, 0, 0, 0]));
    assert_eq!(candidates[0]["shared_blocks"], 10);
    assert_eq!(candidates[0]["prefill_ms"], 4.0);
    for context in [context, follow_up] {
        site.over(context);
    }
    site.assert_idle();
}

#[test]
fn a_raced_booking_that_is_undone_leaves_the_clock_as_it_was() {
    let tokens = prompt(1, 40);
    let mut site = site(2, &[(0, Slot(0), &tokens[..20])]);
    // Two owners, two lanes and a clock each are read before another thread books.
    let lane = "kv_router_lane_a.default.10.0";
    site.host.meanwhile(6, lane, (400 << 32) + (1 << 16));
    let context = site.complete(&body(&tokens));
    assert_eq!(site.destination(), Some(endpoint(1)));
    assert_eq!(site.host.named("kv_router_bookings_undone_total"), 1);
    let us = |worker: u64| {
        let clock = format!("kv_router_clock.default.{worker}.0");
        site.host.named(&clock).cast_signed() - (site.host.now_ns() / 1_000).cast_signed()
    };
    assert!(us(10) <= 0, "{}", us(10));
    assert_eq!(us(11), 40_000);
    site.over(context);
}

#[test]
fn reports_tell_what_a_delay_rests_on() {
    let mut site = site(2, &[]);
    site.complete(&body(&prompt(1, 40)));
    site.complete(&body(&prompt(2, 10)));
    run(&mut site, 100);
    let mut sidecar = Sidecar::default();
    sidecar.read(&[&site]);
    let paced = sidecar.steps().into_iter().filter_map(|step| match step {
        Step::Book(booked) => booked.evidence,
        _ => None,
    });
    let told: Vec<(u16, f64)> = paced
        .flat_map(|evidence| evidence.candidates)
        .map(|seen| seen.paced.unwrap())
        .map(|paced| (paced.waiting, paced.typical_ms))
        .collect();
    assert_eq!(told, [(0, 0.0), (0, 0.0), (0, 40.0), (1, 40.0)]);
}
