//! Workers that fail, and VMs that end.

use super::reports::{Sidecar, key_of, run, site};
use super::*;
use kv_core::loads::{Loads, PoolLoads, WriteOff};
use kv_core::report::{Failure, OwnerKey, Report, Step};

/// Response flags: remote reset, connection failure, downstream termination.
const RESET: u64 = 0x10;
const REFUSED: u64 = 0x20;
const CLIENT_LEFT: u64 = 0x4000;

/// A request under way, and the slots it names.
fn named(site: &mut Site) -> (u32, Vec<u64>) {
    let context = site.complete(&body(&prompt(1, 8)));
    let worker = |endpoint: &String| {
        let slot = (0..4).find(|slot| super::endpoint(*slot) == *endpoint);
        u64::from(slot.unwrap()) + 10
    };
    let workers = site.destinations().iter().map(worker).collect();
    (context, workers)
}

fn end(site: &mut Site, context: u32, flags: u64) {
    site.host.say(b"response\0flags", &flags.to_le_bytes());
    site.over(context);
    run(site, 100);
}

/// The failures told so far.
fn failures(site: &Site) -> Vec<(OwnerKey, Failure)> {
    let mut sidecar = Sidecar::default();
    sidecar.read(&[site]);
    let failed = sidecar.steps().into_iter().filter_map(|step| match step {
        Step::Failed { owner, failure, .. } => Some((owner, failure)),
        _ => None,
    });
    failed.collect()
}

fn endpoint_of(worker: u64) -> String {
    endpoint(u16::try_from(worker - 10).unwrap())
}

#[test]
fn workers_that_were_not_reached_before_another_answered_are_told() {
    let mut site = site();
    let (context, workers) = named(&mut site);
    site.host.reach(&endpoint_of(workers[1]), 2);
    site.vm.on_response_headers(context);
    end(&mut site, context, 0);
    let expected = [(key_of(workers[0]), Failure::Unreached)];
    assert_eq!(failures(&site), expected);
}

#[test]
fn envoys_own_answer_tells_of_all_that_were_tried() {
    let mut site = site();
    let (context, workers) = named(&mut site);
    site.host.reach(&endpoint_of(workers[1]), 2);
    site.host.worker_header(":status", b"503");
    let details = b"upstream_reset_before_response_started{connection_failure}";
    site.host.say(b"response\0code_details", details);
    site.vm.on_response_headers(context);
    site.vm.on_response_body(context, 90, false);
    end(&mut site, context, REFUSED);
    let expected = [workers[0], workers[1]].map(|w| (key_of(w), Failure::Unreached));
    assert_eq!(failures(&site), expected);
    let unanswered = "kv_router_missed_total_reason=.=unanswered;.;";
    assert_eq!(site.host.named(unanswered), 1);
    site.assert_idle();
}

#[test]
fn an_answer_that_breaks_off_and_an_error_of_the_worker_are_told() {
    let mut site = site();
    let (context, workers) = named(&mut site);
    site.host.reach(&endpoint_of(workers[0]), 1);
    site.vm.on_response_headers(context);
    site.vm.on_response_body(context, 90, false);
    end(&mut site, context, RESET);
    assert_eq!(failures(&site), [(key_of(workers[0]), Failure::Broken)]);

    let (context, workers) = named(&mut site);
    site.host.reach(&endpoint_of(workers[0]), 1);
    site.host.worker_header(":status", b"500");
    site.host.say(b"response\0code_details", b"via_upstream");
    site.vm.on_response_headers(context);
    assert_eq!(site.load(workers[0]).waiting, 1);
    site.vm.on_response_body(context, 90, false);
    assert_eq!(
        site.load(workers[0]).waiting,
        1,
        "an error has no first token"
    );
    end(&mut site, context, 0);
    let expected = (key_of(workers[0]), Failure::Status);
    assert_eq!(failures(&site).last(), Some(&expected));
}

#[test]
fn clients_that_leave_are_nobodys_failure() {
    let mut site = site();
    let (context, _) = named(&mut site);
    end(&mut site, context, CLIENT_LEFT);
    let (context, workers) = named(&mut site);
    site.host.reach(&endpoint_of(workers[0]), 1);
    site.vm.on_response_headers(context);
    end(&mut site, context, CLIENT_LEFT);
    assert_eq!(failures(&site), []);
    assert_eq!(site.host.named("kv_router_worker_failures_total"), 0);
}

/// Publishes a write-off and lets the head beat.
fn write_off(site: &Site, version: u64, write_off: WriteOff) {
    let loads = Loads {
        epoch: EPOCH,
        version,
        pools: vec![PoolLoads::default()],
        write_off,
        backlogs: Vec::new(),
        is_alone: false,
    };
    site.put(&key::LOADS, &loads.encode());
    let mut head = Head::decode(&site.host.shared(&key::HEAD).unwrap().bytes).unwrap();
    head.beat += 1;
    site.put(&key::HEAD, &head.encode());
}

#[test]
fn the_bridge_takes_out_of_the_lanes_what_a_trapped_vm_left_once() {
    let mut leader = site();
    let mut other = leader.beside();
    other.vm.on_tick(ROOT);
    leader.host.advance_ms(5);
    let _trapped = other.complete(&body(&prompt(1, 8)));
    let (own, _) = named(&mut leader);
    let mut sidecar = Sidecar::default();
    run(&mut leader, 100);
    sidecar.read(&[&leader]);
    sidecar.assert_exact(&leader);
    // The other one is heard of no more.
    let booking = |r: &&Report| !r.complete && r.steps.iter().any(|s| matches!(s, Step::Book(_)));
    let first = sidecar.reports.iter().find(booking).unwrap();
    let left = first.sums.clone();
    assert_eq!(left.len(), 1);
    let order = WriteOff {
        number: 5,
        sums: left,
    };
    write_off(&leader, 1, order.clone());
    run(&mut leader, 200);
    write_off(&leader, 2, order);
    run(&mut leader, 200);
    assert_eq!(leader.host.named("kv_router_written_off_total"), 1);
    sidecar.read(&[&leader]);
    sidecar.assert_exact(&leader);
    leader.over(own);
    run(&mut leader, 2_100);
    leader.assert_idle();
    sidecar.read(&[&leader]);
    sidecar.assert_exact(&leader);
    let steps = &sidecar.last_complete().steps;
    assert!(
        matches!(steps.as_slice(), [Step::WrittenOff(_)]),
        "{steps:?}"
    );
}

#[test]
fn a_vm_that_ends_says_so_and_reports_the_requests_it_has() {
    let mut leader = site();
    let mut ending = leader.beside();
    ending.vm.on_tick(ROOT);
    let context = ending.complete(&body(&prompt(1, 8)));
    ending.vm.on_done(ROOT);
    run(&mut leader, 100);
    let mut sidecar = Sidecar::default();
    sidecar.read(&[&leader]);
    let is_leaving = |r: &&Report| r.complete && r.steps.contains(&Step::Leave);
    let leaving = sidecar.reports.iter().rfind(is_leaving).unwrap();
    assert!(matches!(
        leaving.steps.as_slice(),
        [Step::Book(_), Step::Leave]
    ));
    sidecar.assert_exact(&leader);
    assert_eq!(sidecar.ledger.vms().count(), 2, "its request is running");
    ending.over(context);
    run(&mut leader, 100);
    sidecar.read(&[&leader]);
    sidecar.assert_exact(&leader);
    assert_eq!(sidecar.last_complete().steps, [Step::Leave]);
    assert_eq!(sidecar.ledger.vms().count(), 1, "the leader alone reports");
    leader.assert_idle();
}
