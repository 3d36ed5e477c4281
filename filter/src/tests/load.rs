//! Load as decisions see it, and where requests really went.

use super::*;
use crate::request::DECISION;
use kv_core::loads::{Correction, LivePrefix, Loads, PoolLoads, WriteOff};

fn site(mode: Mode) -> Site {
    let site = Site::new();
    site.publish(&table(4, mode), &[]);
    site
}

/// Publishes loads and lets the head beat.
fn correct(site: &Site, epoch: u32, version: u64, pool: PoolLoads) {
    let loads = Loads {
        epoch,
        version,
        pools: vec![pool],
        write_off: WriteOff::default(),
        backlogs: Vec::new(),
        is_alone: false,
    };
    site.put(&key::LOADS, &loads.encode());
    let mut head = Head::decode(&site.host.shared(&key::HEAD).unwrap().bytes).unwrap();
    head.beat += 1;
    site.put(&key::HEAD, &head.encode());
}

/// Blocks added to the lanes of slots.
fn blocks(corrections: &[(u16, i64)]) -> PoolLoads {
    let correction = |(slot, blocks): &(u16, i64)| {
        let correction = Correction {
            blocks: *blocks,
            ..Correction::default()
        };
        (Slot(*slot), correction)
    };
    PoolLoads {
        corrections: corrections.iter().map(correction).collect(),
        ..PoolLoads::default()
    }
}

fn outcome(site: &Site, reason: &str) -> u64 {
    let name = format!("kv_router_missed_total_reason=.={reason};.;");
    site.host.named(&name)
}

fn intended(site: &Site) -> u64 {
    let all = site
        .host
        .metrics_with("kv_router_routed_as_intended_total_pool=.=default;");
    all.iter().map(|(_, n)| n).sum()
}

#[test]
fn decisions_see_the_lanes_corrected() {
    let mut site = site(Mode::Kv);
    correct(&site, EPOCH, 1, blocks(&[(0, 5), (2, 5), (3, 5)]));
    let context = site.complete(&body(&prompt(1, 8)));
    assert_eq!(site.destination(), Some(endpoint(1)));
    site.vm.on_response_headers(context);
    let record = site.host.text(Headers::Response, DECISION).unwrap();
    assert!(record.contains("\"active_blocks\":5"), "{record}");
    // What was booked meanwhile counts beside the correction; what is gone counts nothing.
    correct(&site, EPOCH, 2, blocks(&[(0, 3), (2, 5), (3, -9)]));
    site.complete(&body(&prompt(2, 8)));
    assert_eq!(site.destination(), Some(endpoint(3)));
}

#[test]
fn corrections_count_only_while_they_are_fresh_and_of_the_tables_epoch() {
    let mut site = site(Mode::Kv);
    let against = blocks(&[(0, 900), (1, 900), (2, 900)]);
    let spread = |site: &mut Site| {
        let mut chosen = std::collections::HashSet::new();
        for _ in 0..40 {
            let context = site.complete(b"{}");
            chosen.insert(site.destination());
            site.over(context);
        }
        chosen.len()
    };
    correct(&site, EPOCH, 1, against.clone());
    assert_eq!(spread(&mut site), 1);
    for _ in 0..101 {
        site.tick();
    }
    assert_eq!(spread(&mut site), 4, "stale");
    correct(&site, EPOCH, 2, against.clone());
    assert_eq!(spread(&mut site), 1);
    correct(&site, EPOCH + 1, 3, against);
    assert_eq!(spread(&mut site), 4, "another epoch");
}

#[test]
fn blocks_in_use_already_count_once() {
    let mut site = site(Mode::Kv);
    let tokens = prompt(1, 40);
    let hashes = sequence_hashes(&tokens, Hashing::new(BLOCK as usize, Seed::default()));
    let prefixes = vec![LivePrefix {
        hash: hashes[7],
        depth: 8,
        slots: vec![Slot(2)],
    }];
    // The owner has eight blocks in use, and the prompt shares them all; the others have five.
    let pool = PoolLoads {
        prefixes,
        ..blocks(&[(0, 5), (1, 5), (2, 8), (3, 5)])
    };
    correct(&site, EPOCH, 1, pool);
    let context = site.complete(&body(&tokens));
    assert_eq!(site.destination(), Some(endpoint(2)));
    assert_eq!(site.lanes(12).load().blocks, 10, "all are booked");
    site.vm.on_response_headers(context);
    let record = site.host.text(Headers::Response, DECISION).unwrap();
    let record: serde_json::Value = serde_json::from_str(&record).unwrap();
    assert_eq!(record["candidates"][0]["shared_blocks"], 8);
    assert_eq!(record["candidates"][0]["decode_cost"], 10.0);
    site.over(context);
    // Another prompt shares none.
    site.complete(&body(&prompt(2, 40)));
    assert_ne!(site.destination(), Some(endpoint(2)));
}

/// Another thread's booking of `tokens` prefill tokens on a worker.
fn elsewhere(worker: u64, tokens: i64) -> (String, i64) {
    let lane = format!("kv_router_lane_a.default.{worker}.0");
    (lane, (tokens << 32) + (1 << 16))
}

#[test]
fn a_booking_that_was_raced_is_made_again_where_that_is_better() {
    let mut site = Site::new();
    let tokens = prompt(1, 40);
    site.publish(&table(2, Mode::Kv), &[(0, Slot(0), &tokens[..20])]);
    site.tick();
    // Two owners, two lanes each are read; then the booking is read back.
    let (lane, delta) = elsewhere(10, 400);
    site.host.meanwhile(4, &lane, delta);
    let context = site.complete(&body(&tokens));
    assert_eq!(site.destination(), Some(endpoint(1)));
    assert_eq!(site.host.named("kv_router_bookings_raced_total"), 1);
    assert_eq!(site.host.named("kv_router_bookings_undone_total"), 1);
    assert_eq!(site.load(10).prefill_tokens, 400);
    assert_eq!(site.load(11).prefill_tokens, 40);
    site.over(context);
    assert_eq!(site.load(11), Load::default());
    assert_eq!(site.lanes(10).a, delta.unsigned_abs());
}

#[test]
fn a_booking_that_was_raced_stands_where_it_is_still_good() {
    let mut site = Site::new();
    let tokens = prompt(1, 40);
    site.publish(&table(2, Mode::Kv), &[(0, Slot(0), &tokens)]);
    site.tick();
    let (lane, delta) = elsewhere(10, 8);
    site.host.meanwhile(4, &lane, delta);
    site.complete(&body(&tokens));
    assert_eq!(site.destination(), Some(endpoint(0)));
    assert_eq!(site.host.named("kv_router_bookings_raced_total"), 1);
    assert_eq!(site.host.named("kv_router_bookings_undone_total"), 0);
}

#[test]
fn a_booking_is_undone_at_most_twice() {
    let mut site = Site::new();
    site.publish(&table(2, Mode::Kv), &[]);
    site.tick();
    for i in 0..40 {
        for worker in [10, 11] {
            let (lane, delta) = elsewhere(worker, 4_000 * (i + 1));
            site.host.meanwhile(0, &lane, delta);
        }
    }
    let context = site.complete(&body(&prompt(1, 40)));
    assert!(site.destination().is_some());
    assert!(site.host.named("kv_router_bookings_undone_total") <= 2);
    let held = [10, 11].map(|worker| site.load(worker).blocks);
    assert_eq!(held.iter().sum::<u32>(), 10);
    site.over(context);
    assert_eq!([10, 11].map(|worker| site.load(worker).blocks), [0, 0]);
}

#[test]
fn a_request_that_went_elsewhere_is_booked_there() {
    for (attempt, reason) in [(1, "override_missed"), (2, "retried")] {
        let mut site = Site::new();
        let tokens = prompt(1, 40);
        site.publish(&table(4, Mode::Kv), &[(0, Slot(1), &tokens[..20])]);
        let context = site.complete(&body(&tokens));
        let booked = site.lanes(11);
        site.host.reach(&endpoint(3), attempt);
        site.vm.on_response_headers(context);
        assert_eq!(site.load(11), Load::default());
        assert_eq!(site.lanes(13), booked);
        assert_eq!((outcome(&site, reason), intended(&site)), (1, 0));
        site.vm.on_response_body(context, 5, false);
        assert_eq!(site.load(13).decoding, 1);
        site.over(context);
        site.assert_idle();
        assert_eq!(outcome(&site, "unanswered"), 0);
    }
}

#[test]
fn a_request_that_went_to_a_stranger_loads_nobody() {
    let mut site = site(Mode::Kv);
    let context = site.complete(&body(&prompt(1, 40)));
    site.host.reach("10.9.9.9:1", 1);
    site.vm.on_response_headers(context);
    site.assert_idle();
    site.vm.on_response_body(context, 5, false);
    site.over(context);
    site.assert_idle();
}

#[test]
fn a_request_without_a_choice_is_booked_where_it_went() {
    let mut table = table(4, Mode::Kv);
    for owner in &mut table.pools[0].owners {
        owner.accepting = false;
    }
    let mut site = Site::new();
    site.publish(&table, &[]);
    let context = site.complete(&body(&prompt(1, 40)));
    assert_eq!(site.destination(), None);
    site.host.reach(&endpoint(2), 1);
    site.vm.on_response_headers(context);
    let load = Load {
        prefill_tokens: 40,
        waiting: 1,
        decoding: 0,
        blocks: 10,
    };
    assert_eq!(site.load(12), load);
    assert_eq!(outcome(&site, "unattributed"), 1);
    site.over(context);
    site.assert_idle();
}

#[test]
fn each_request_either_went_as_intended_or_says_why_not() {
    let mut site = site(Mode::Kv);
    let tokens = body(&prompt(1, 40));
    for i in 0..10 {
        let context = site.complete(&tokens);
        if i < 7 {
            site.host.reach(&site.destination().unwrap(), 1);
        }
        site.vm.on_response_headers(context);
        site.over(context);
    }
    assert_eq!((intended(&site), outcome(&site, "unanswered")), (7, 3));
    assert_eq!(site.routed("default", "kv"), 10);
    let mut bare = Site::new();
    let context = bare.request(&GENERATE);
    bare.vm.on_request_headers(context, false);
    bare.host.reach(&endpoint(1), 1);
    bare.vm.on_response_headers(context);
    bare.over(context);
    assert_eq!(outcome(&bare, "unattributed"), 1);
}

#[test]
fn the_second_choice_is_the_next_best_at_another_endpoint() {
    let mut site = Site::new();
    let tokens = prompt(1, 40);
    let mut table = table(4, Mode::Kv);
    // Two ranks of one worker.
    table.pools[0].owners[3].endpoint = endpoint(2);
    let held: [(usize, Slot, &[u32]); 3] = [
        (0, Slot(1), &tokens[..20]),
        (0, Slot(2), &tokens),
        (0, Slot(3), &tokens[..32]),
    ];
    site.publish(&table, &held);
    site.complete(&body(&tokens));
    assert_eq!(site.destinations(), [endpoint(2), endpoint(1)]);
    table.pools[0].owners.truncate(1);
    table.version = 2;
    site.publish(&table, &[]);
    site.complete(&body(&tokens));
    assert_eq!(site.destinations(), [endpoint(0)]);
}

#[test]
fn least_loaded_counts_requests_and_power_of_two_never_takes_the_fullest() {
    let mut least = site(Mode::LeastLoaded);
    let mut chosen = std::collections::HashMap::new();
    for i in 0..40 {
        least.complete(&body(&prompt(i, 4 + (i % 7) * 8)));
        *chosen.entry(least.destination().unwrap()).or_insert(0) += 1;
    }
    assert_eq!(chosen.values().copied().collect::<Vec<_>>(), [10; 4]);
    assert_eq!(least.routed("default", "least-loaded"), 40);

    let mut two = site(Mode::PowerOfTwo);
    let full = |blocks| Correction {
        decoding: blocks,
        ..Correction::default()
    };
    let corrections = (0..4).map(|slot| (Slot(slot), full(i64::from(slot) * 100)));
    let pool = PoolLoads {
        corrections: corrections.collect(),
        ..PoolLoads::default()
    };
    correct(&two, EPOCH, 1, pool);
    for _ in 0..60 {
        let context = two.complete(b"{}");
        assert_ne!(two.destination(), Some(endpoint(3)));
        two.over(context);
    }
    assert_eq!(two.routed("default", "power-of-two"), 60);
}
