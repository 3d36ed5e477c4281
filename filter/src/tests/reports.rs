//! What the sidecar is told of requests and lanes.

use super::*;
use crate::host::Token;
use kv_core::ledger::{Continuity, Ledger};
use kv_core::loads::Loads;
use kv_core::report::{Booked, OwnerKey, Report, Step, Sum};
use kv_core::wire::{self, Up};

/// What a sidecar makes of the streams of some VMs.
#[derive(Default)]
pub(super) struct Sidecar {
    pub(super) ledger: Ledger,
    pub(super) reports: Vec<Report>,
    pub(super) lanes: Vec<Sum>,
    /// Messages read, by VM and stream.
    read: std::collections::HashMap<(usize, usize), usize>,
}

impl Sidecar {
    /// Reads what has come from these VMs.
    pub(super) fn read(&mut self, sites: &[&Site]) {
        for (vm, site) in sites.iter().enumerate() {
            for (number, stream) in site.host.streams().iter().enumerate() {
                let read = self.read.entry((vm, number)).or_default();
                for message in &stream.sent[*read..] {
                    match wire::decode(message).unwrap() {
                        Up::Reports(reports) => {
                            for report in reports {
                                let report = Report::decode(&report).unwrap();
                                let most = if report.complete { 2 << 20 } else { 33 << 10 };
                                assert!(message.len() < most, "{}", message.len());
                                self.ledger.report(&report, 0);
                                self.reports.push(report);
                            }
                        }
                        Up::Lanes(lanes) => self.lanes.extend(lanes),
                        Up::Subscribe(_) | Up::Ack(_) => {}
                    }
                }
                *read = stream.sent.len();
            }
        }
    }

    /// Asserts that what was reported is what the lanes of workers 10 to 13 hold.
    pub(super) fn assert_exact(&self, site: &Site) {
        for worker in 10..14 {
            let booked = self.ledger.booked(&key_of(worker));
            assert_eq!(booked, site.lanes(worker), "worker {worker}");
        }
    }

    pub(super) fn steps(&self) -> Vec<Step> {
        let steps = self.reports.iter().filter(|r| !r.complete);
        steps.flat_map(|r| r.steps.clone()).collect()
    }

    pub(super) fn last_complete(&self) -> &Report {
        self.reports.iter().rfind(|r| r.complete).unwrap()
    }
}

pub(super) fn key_of(worker: u64) -> OwnerKey {
    OwnerKey {
        pool: 0,
        id: OwnerId { worker, rank: 0 },
    }
}

fn booked(step: &Step) -> &Booked {
    let Step::Book(booked) = step else {
        panic!("{step:?} books nothing");
    };
    booked
}

/// Four workers, and a bridge with a stream.
pub(super) fn site() -> Site {
    let mut site = Site::new();
    site.publish(&table(4, Mode::Kv), &[]);
    site.tick();
    site
}

/// Ticks a VM whose sidecar writes once a second.
pub(super) fn run(site: &mut Site, ms: u64) {
    for tick in 0..ms / 50 {
        if tick % 20 == 0 {
            hear(site);
        }
        site.tick();
    }
}

/// The sidecar says something.
pub(super) fn hear(site: &mut Site) {
    let streams = site.host.streams();
    let Some(open) = streams.iter().position(|stream| stream.open) else {
        return;
    };
    let message = wire::encode(&wire::Batch {
        seq: 1,
        writes: Vec::new(),
    });
    let size = site.host.deliver(&message);
    let open = Token(u32::try_from(open).unwrap());
    site.vm.on_stream_message(ROOT, open, size);
}

#[test]
fn the_steps_of_a_request_are_told_in_order_with_their_evidence() {
    let mut site = Site::new();
    let tokens = prompt(1, 43);
    site.publish(
        &table(4, Mode::Kv),
        &[(0, Slot(1), &tokens[..8]), (0, Slot(2), &tokens[..32])],
    );
    site.tick();
    let context = site.complete(&body(&tokens));
    site.vm.on_response_headers(context);
    site.vm.on_response_body(context, 9, false);
    site.vm.on_response_body(context, 9, false);
    site.over(context);
    site.tick();
    let mut sidecar = Sidecar::default();
    sidecar.read(&[&site]);
    let steps = sidecar.steps();
    let request = 1;
    assert_eq!(
        steps[1..],
        [Step::Prefilled { request }, Step::Free { request }]
    );
    let booked = booked(&steps[0]);
    let hashes = sequence_hashes(&tokens, Hashing::new(BLOCK as usize, Seed::default()));
    assert_eq!((booked.owner, booked.request), (key_of(12), request));
    assert_eq!((booked.prefill_tokens, booked.blocks), (11, 10));
    assert_eq!(booked.prefix, Some((8, hashes[7])));
    assert_eq!(booked.hashes, hashes[8..]);
    let evidence = booked.evidence.as_ref().unwrap();
    assert_eq!((evidence.reason.as_str(), evidence.tokens), ("kv", 43));
    assert_eq!(evidence.candidates[0].owner.worker, 12);
    assert_eq!(evidence.candidates[0].overlap, [8, 0, 0, 0]);
    assert_eq!(evidence.candidates.len(), 4);
}

#[test]
fn a_prompt_that_nobody_holds_is_named_whole() {
    let mut site = site();
    let tokens = prompt(1, 40);
    site.complete(&body(&tokens));
    site.tick();
    let mut sidecar = Sidecar::default();
    sidecar.read(&[&site]);
    let steps = sidecar.steps();
    let hashes = sequence_hashes(&tokens, Hashing::new(BLOCK as usize, Seed::default()));
    assert_eq!(booked(&steps[0]).prefix, None);
    assert_eq!(booked(&steps[0]).hashes, hashes);
}

#[test]
fn reported_sums_are_the_lanes_whenever_a_request_ends() {
    let mut site = site();
    let mut sidecar = Sidecar::default();
    let tokens = body(&prompt(1, 100));
    for stage in 0..7 {
        let (context, _) = site.post();
        if stage > 0 {
            site.part(context, &tokens[..20], false);
        }
        if stage > 1 {
            site.part(context, &tokens[20..], true);
            site.host.reach(&endpoint(stage % 4), 1);
        }
        if stage > 2 {
            site.vm.on_response_headers(context);
        }
        if stage > 3 {
            site.vm.on_response_body(context, 10, false);
        }
        for _ in 4..stage {
            site.tick();
        }
        site.tick();
        sidecar.read(&[&site]);
        sidecar.assert_exact(&site);
        site.over(context);
        site.tick();
        sidecar.read(&[&site]);
        sidecar.assert_exact(&site);
        site.assert_idle();
    }
    assert!(sidecar.last_complete().steps.is_empty());
}

#[test]
fn what_a_worker_found_in_its_cache_is_told_beside_what_was_predicted() {
    let mut site = Site::new();
    let tokens: Vec<u32> = (0..12).collect();
    site.publish(&table(4, Mode::Kv), &[(0, Slot(2), &tokens[..8])]);
    site.tick();
    let mut sidecar = Sidecar::default();
    let answer = br#"{"usage":{"prompt_tokens_details":{"cached_tokens":4}}}"#;

    for reaches in [2, 3, 2].map(endpoint) {
        let context = site.complete(&body(&tokens));
        site.host.reach(&reaches, 1);
        site.vm.on_response_headers(context);
        let size = site.host.answered(answer);
        site.vm.on_response_body(context, size, false);
        site.over(context);
    }
    site.tick();
    sidecar.read(&[&site]);
    let told = sidecar.steps().into_iter().filter_map(|step| match step {
        Step::Cached {
            request,
            predicted,
            found,
        } => Some((request, predicted, found)),
        _ => None,
    });
    // Another worker than the chosen one answered the second.
    assert_eq!(told.collect::<Vec<_>>(), [(1, 8, 4), (3, 8, 4)]);
    site.assert_idle();
}

#[test]
fn a_step_is_told_at_once_and_more_of_them_together() {
    let mut site = site();
    site.host.advance_ms(5);
    assert_eq!(site.host.queued(QUEUE), 0);
    let contexts = [(); 30].map(|()| site.complete(&body(&prompt(1, 8))));
    assert_eq!(site.host.queued(QUEUE), 1, "the first at once");
    for context in &contexts {
        site.vm.on_response_body(*context, 1, false);
    }
    assert_eq!(site.host.queued(QUEUE), 1);
    for context in &contexts[..10] {
        site.vm.on_log(*context);
    }
    assert_eq!(site.host.queued(QUEUE), 2, "a full report");
    site.host.advance_ms(1);
    site.vm.on_log(contexts[10]);
    assert_eq!(site.host.queued(QUEUE), 2, "what lightens a load can wait");
    site.complete(&body(&prompt(1, 8)));
    assert_eq!(site.host.queued(QUEUE), 3, "a booking a millisecond later");
    site.vm.on_log(contexts[11]);
    site.host.advance_ms(5);
    site.vm.on_log(contexts[12]);
    assert_eq!(site.host.queued(QUEUE), 4, "five milliseconds later");
    let mut sidecar = Sidecar::default();
    site.told();
    assert_eq!(site.host.queued(QUEUE), 0);
    sidecar.read(&[&site]);
    let sizes: Vec<_> = sidecar.reports.iter().map(|r| r.steps.len()).collect();
    assert_eq!(sizes, [0, 1, 64, 7, 2]);
    sidecar.assert_exact(&site);
}

#[test]
fn where_no_other_proxy_is_a_booking_can_wait() {
    let mut site = site();
    let loads = Loads {
        epoch: EPOCH,
        is_alone: true,
        ..Loads::default()
    };
    site.put(&key::LOADS, &loads.encode());
    let mut head = Head::decode(&site.host.shared(&key::HEAD).unwrap().bytes).unwrap();
    head.beat += 1;
    site.put(&key::HEAD, &head.encode());
    site.tick();
    site.told();
    site.host.advance_ms(20);
    let context = site.complete(&body(&prompt(1, 8)));
    assert_eq!(site.host.queued(QUEUE), 1, "the first at once");
    site.host.advance_ms(19);
    site.complete(&body(&prompt(1, 8)));
    assert_eq!(site.host.queued(QUEUE), 1);
    site.host.advance_ms(1);
    site.vm.on_log(context);
    assert_eq!(site.host.queued(QUEUE), 2, "twenty milliseconds later");
}

#[test]
fn two_vms_report_their_own_shares() {
    let mut one = site();
    let mut two = one.beside();
    two.tick();
    let mut sidecar = Sidecar::default();
    let mut contexts = Vec::new();
    for i in 0..20 {
        contexts.push(one.complete(&body(&prompt(i, 40))));
        two.complete(&body(&prompt(i, 60)));
    }
    two.tick();
    one.tick();
    sidecar.read(&[&one, &two]);
    sidecar.assert_exact(&one);
    assert_eq!(sidecar.ledger.vms().count(), 2);
    for context in contexts {
        one.over(context);
    }
    two.tick();
    one.tick();
    sidecar.read(&[&one, &two]);
    sidecar.assert_exact(&one);
    assert_ne!(one.load(10), Load::default());
}

#[test]
fn a_complete_report_comes_with_a_stream_and_every_two_seconds() {
    let mut site = site();
    let (held, over) = (
        site.complete(&body(&prompt(1, 40))),
        site.complete(&body(&prompt(2, 40))),
    );
    site.vm.on_response_body(held, 3, false);
    site.over(over);
    let mut sidecar = Sidecar::default();
    run(&mut site, 2_100);
    sidecar.read(&[&site]);
    let complete = |sidecar: &Sidecar| sidecar.reports.iter().filter(|r| r.complete).count();
    assert_eq!(complete(&sidecar), 2);
    let last = sidecar.last_complete();
    let [step] = &last.steps[..] else {
        panic!("{:?}", last.steps);
    };
    let listed = booked(step);
    assert_eq!((listed.request, listed.decoding), (1, true));
    assert_eq!((listed.hashes.len(), listed.evidence.is_none()), (10, true));
    assert!(!last.sums.is_empty());
    site.vm.on_stream_close(Token(0));
    for _ in 0..5 {
        site.tick();
    }
    sidecar.read(&[&site]);
    assert_eq!(complete(&sidecar), 3);
    site.tick();
    sidecar.read(&[&site]);
    assert_eq!(complete(&sidecar), 3);
}

#[test]
fn reports_without_a_listener_are_dropped_and_made_up_for() {
    let mut site = Site::new();
    site.host.refuse_streams(true);
    site.publish(&table(4, Mode::Kv), &[]);
    site.tick();
    let context = site.complete(&body(&prompt(1, 40)));
    site.tick();
    assert_eq!(site.host.queued(QUEUE), 0);
    assert!(site.host.named("kv_router_reports_dropped_total") > 0);
    site.host.refuse_streams(false);
    for _ in 0..50 {
        site.tick();
    }
    let mut sidecar = Sidecar::default();
    sidecar.read(&[&site]);
    sidecar.assert_exact(&site);
    assert_eq!(booked(&sidecar.last_complete().steps[0]).request, 1);
    // A sidecar that says nothing for long takes nothing, and what comes then is no gap.
    for _ in 0..200 {
        site.tick();
    }
    let before = site.host.streams()[0].sent.len();
    site.over(context);
    site.tick();
    assert_eq!(site.host.streams()[0].sent.len(), before);
    run(&mut site, 5_100);
    sidecar.read(&[&site]);
    sidecar.assert_exact(&site);
}

#[test]
fn steps_that_nobody_takes_are_bounded_and_made_up_for() {
    let mut site = Site::new();
    site.publish(&table(4, Mode::Kv), &[]);
    // No tick: no bridge, no queue.
    let mut kept = Vec::new();
    for i in 0..5_000 {
        let context = site.complete(b"{}");
        if i % 1_000 == 0 {
            kept.push(context);
        } else {
            site.over(context);
        }
    }
    assert!(site.host.named("kv_router_report_steps_dropped_total") > 4_000);
    // A VM with traffic is in no hurry to become the bridge.
    run(&mut site, 1_200);
    let mut sidecar = Sidecar::default();
    sidecar.read(&[&site]);
    sidecar.assert_exact(&site);
    assert_eq!(sidecar.last_complete().steps.len(), kept.len());
    let mut ledger = Ledger::default();
    let last = sidecar.reports.last().unwrap();
    assert_eq!(ledger.report(last, 0), Continuity::Next);
}

#[test]
fn a_large_backlog_is_sent_in_reports_and_messages_of_bounded_size() {
    let mut site = Site::new();
    let mut table = table(4, Mode::Kv);
    table.settings.body_limit = 1 << 20;
    table.settings.token_limit = 10_000;
    site.publish(&table, &[]);
    for i in 0..60 {
        site.complete(&body(&prompt(i, 4_000)));
    }
    run(&mut site, 1_200);
    let mut sidecar = Sidecar::default();
    sidecar.read(&[&site]);
    let steps = sidecar.steps();
    assert_eq!(steps.len(), 60);
    assert_eq!(booked(&steps[59]).hashes.len(), 1_000);
    sidecar.assert_exact(&site);
}

#[test]
fn a_new_leader_finds_the_backlog() {
    let mut one = site();
    let mut two = one.beside();
    two.tick();
    assert!(one.host.is_told_of(QUEUE));
    let mut sidecar = Sidecar::default();
    sidecar.read(&[&one, &two]);
    // The leader's thread is blocked while the other VM serves requests.
    for i in 0..20 {
        two.complete(&body(&prompt(i, 40)));
        two.tick();
    }
    assert!(two.host.is_told_of(QUEUE));
    assert!(!two.host.streams().is_empty());
    let backlog = one.host.queued(QUEUE);
    sidecar.read(&[&one, &two]);
    sidecar.assert_exact(&one);
    assert_eq!((backlog, sidecar.steps().len()), (0, 20));
    let mut sequence = 0;
    for report in sidecar.reports.iter().filter(|r| !r.steps.is_empty()) {
        assert!(report.sequence > sequence);
        sequence = report.sequence;
    }
    // Back again, it takes nothing.
    two.complete(&body(&prompt(1, 40)));
    two.host.advance_ms(2);
    one.vm.on_queue_ready(ROOT, Queue(0));
    two.tick();
    sidecar.read(&[&one, &two]);
    sidecar.assert_exact(&one);
}

#[test]
fn a_vm_that_shuts_down_reports_what_waits() {
    let mut one = site();
    let mut two = one.beside();
    two.tick();
    for _ in 0..2 {
        let context = two.complete(&body(&prompt(1, 40)));
        two.over(context);
    }
    two.vm.on_done(ROOT);
    one.tick();
    let mut sidecar = Sidecar::default();
    sidecar.read(&[&one]);
    sidecar.assert_exact(&one);
    assert_eq!(sidecar.steps().len(), 4);
}

#[test]
fn lanes_are_shown_each_second_and_once_more_when_they_are_empty() {
    let mut site = site();
    for _ in 0..40 {
        site.tick();
    }
    let mut sidecar = Sidecar::default();
    sidecar.read(&[&site]);
    // Once all, because the leader before may have shown others; then none.
    assert_eq!(sidecar.lanes.len(), 4);
    assert!(sidecar.lanes.iter().all(|sum| (sum.a, sum.b) == (0, 0)));
    sidecar.lanes.clear();
    let context = site.complete(&body(&prompt(1, 40)));
    for _ in 0..20 {
        site.tick();
    }
    sidecar.read(&[&site]);
    // A VM that has had traffic may have handed over to itself, and shown all again.
    let loaded: Vec<Sum> = sidecar
        .lanes
        .iter()
        .filter(|sum| sum.a != 0)
        .copied()
        .collect();
    let [shown, ..] = loaded[..] else {
        panic!("{:?}", sidecar.lanes);
    };
    assert!(loaded.iter().all(|sum| sum == &shown), "{loaded:?}");
    assert_eq!(shown.a, site.lanes(shown.owner.id.worker).a);
    site.over(context);
    for _ in 0..60 {
        site.tick();
    }
    sidecar.lanes.clear();
    sidecar.read(&[&site]);
    let after: Vec<Sum> = sidecar
        .lanes
        .iter()
        .filter(|s| s.owner == shown.owner)
        .copied()
        .collect();
    assert_eq!(after.len(), 1);
    assert_eq!((after[0].a, after[0].b), (0, 0));
}

#[test]
fn gauges_are_there_before_the_first_request_and_with_each_new_owner() {
    let mut site = site();
    let lanes = |site: &Site| site.host.metrics_with("kv_router_lane_").len();
    assert_eq!(lanes(&site), 8);
    let mut more = table(5, Mode::Kv);
    more.version = 2;
    site.publish(&more, &[]);
    site.tick();
    assert_eq!(lanes(&site), 10);
}

#[test]
fn pools_that_change_places_are_reported_whole_at_their_new_ones() {
    let mut site = site();
    site.complete(&body(&prompt(1, 40)));
    site.tick();
    let mut sidecar = Sidecar::default();
    sidecar.read(&[&site]);
    let mut other = table(4, Mode::Kv);
    other.version = 2;
    other.pools.insert(
        0,
        Pool {
            name: "first".into(),
            ..pool(0, Mode::Kv)
        },
    );
    site.publish(&other, &[]);
    site.tick();
    let mut sidecar = Sidecar::default();
    sidecar.read(&[&site]);
    let last = sidecar.last_complete();
    assert_eq!(booked(&last.steps[0]).owner.pool, 1);
    assert_eq!(last.sums[0].owner.pool, 1);
}
