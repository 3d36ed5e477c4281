//! Election and bridge between VMs of one process.

use super::*;
use crate::host::Token;
use kv_core::wire::{Ack, Batch, Subscribe, Up, Write, decode, encode};

/// Ticks all VMs for so many milliseconds.
fn run(sites: &mut [&mut Site], ms: u64) {
    for _ in 0..ms / 50 {
        sites[0].host.advance_ms(50);
        for site in sites.iter_mut() {
            site.vm.on_tick(ROOT);
        }
    }
}

fn open(site: &Site) -> Option<Token> {
    let streams = site.host.streams();
    assert!(streams.iter().filter(|s| s.open).count() <= 1);
    let at = streams.iter().position(|s| s.open)?;
    Some(Token(u32::try_from(at).unwrap()))
}

/// What was sent on a stream besides reports.
fn sent(site: &Site, stream: Token) -> Vec<Up> {
    let sent = site.host.streams()[stream.0 as usize].sent.clone();
    let sent = sent.iter().map(|m| decode(m).unwrap());
    sent.filter(|m| !matches!(m, Up::Reports(_) | Up::Lanes(_)))
        .collect()
}

fn deliver(site: &mut Site, stream: Token, message: &[u8]) {
    let size = site.host.deliver(message);
    site.vm.on_stream_message(ROOT, stream, size);
}

fn batch(seq: u64, writes: &[(&[u8], &[u8])]) -> Vec<u8> {
    let writes = writes.iter().map(|(key, value)| Write { key, value });
    encode(&Batch {
        seq,
        writes: writes.collect(),
    })
}

#[test]
fn the_canary_writes_seeds_and_opens_nothing() {
    let site = Site::new();
    assert!(site.host.shared(&key::LEASE).is_some());
    assert!(site.host.shared(&key::PROCESS).is_some());
    assert!(site.host.streams().is_empty());
}

#[test]
fn one_vm_subscribes_with_what_envoy_holds() {
    let mut one = Site::new();
    let mut two = one.beside();
    one.publish(&table(1, Mode::Kv), &[]);
    run(&mut [&mut one, &mut two], 1_000);
    let stream = open(&one).unwrap();
    assert_eq!(open(&two), None);
    let process = one.host.shared(&key::PROCESS).unwrap().bytes;
    let subscribe = Subscribe {
        format: key::FORMAT,
        process: u64::from_le_bytes(process.try_into().unwrap()),
        vm_id: "kv-router".into(),
        term: 1,
        epoch: Some(EPOCH),
        level: 2,
    };
    assert_eq!(sent(&one, stream), [Up::Subscribe(subscribe)]);
}

#[test]
fn writes_are_copied_in_order_and_acknowledged() {
    let mut site = Site::new();
    run(&mut [&mut site], 100);
    let stream = open(&site).unwrap();
    let page = key::page(9);
    let message = batch(
        5,
        &[
            (&page, b"old"),
            (&page, b"page"),
            (&key::LEASE, b"stolen"),
            (&key::HEAD, b"head"),
        ],
    );
    deliver(&mut site, stream, &message);
    assert_eq!(site.host.shared(&page).unwrap().bytes, b"page");
    assert_eq!(site.host.shared(&key::HEAD).unwrap().bytes, b"head");
    let ack = Ack {
        seq: 5,
        written_at_ns: site.host.unix_ns(),
        refused: 1,
    };
    assert_eq!(sent(&site, stream)[1..], [Up::Ack(ack)]);
    assert_eq!(site.host.named("kv_router_bridge_writes_total"), 3);
    assert_eq!(site.host.named("kv_router_bridge_refused_total"), 1);
    run(&mut [&mut site], 500);
    assert_eq!(open(&site), Some(stream), "the lease is untouched");
}

#[test]
fn a_silent_leader_is_replaced_and_fenced() {
    let mut one = Site::new();
    let mut two = one.beside();
    run(&mut [&mut one, &mut two], 500);
    let stream = open(&one).unwrap();
    // The first VM's thread is blocked.
    run(&mut [&mut two], 400);
    let taken = open(&two).unwrap();
    let Up::Subscribe(subscribe) = sent(&two, taken).remove(0) else {
        panic!("no subscription");
    };
    assert_eq!(subscribe.term, 2);
    // It comes back to a backlog.
    for seq in 1..4 {
        deliver(&mut one, stream, &batch(seq, &[(&key::HEAD, b"old")]));
    }
    assert_eq!(one.host.shared(&key::HEAD), None);
    assert_eq!(one.faults("fenced"), 1);
    run(&mut [&mut one, &mut two], 500);
    assert_eq!((open(&one), open(&two)), (None, Some(taken)));
}

#[test]
fn a_vm_with_traffic_hands_the_bridge_to_an_idle_one() {
    let mut one = Site::new();
    let mut two = one.beside();
    run(&mut [&mut one], 500);
    let context = one.request(&GENERATE);
    one.vm.on_request_headers(context, true);
    run(&mut [&mut one, &mut two], 1_400);
    assert!(open(&one).is_some());
    run(&mut [&mut one, &mut two], 1_000);
    assert_eq!(open(&one), None);
    assert!(open(&two).is_some());
    run(&mut [&mut one, &mut two], 10_000);
    assert!(open(&two).is_some());
    assert_eq!(one.host.named("kv_router_bridge_leases_total"), 2);
}

#[test]
fn the_newest_root_of_a_vm_runs_the_bridge() {
    let mut site = Site::new();
    run(&mut [&mut site], 500);
    let old = open(&site).unwrap();
    site.vm.on_create(50, 0);
    assert!(site.vm.on_start());
    assert!(site.vm.on_configure(50));
    for _ in 0..3 {
        site.host.advance_ms(50);
        site.vm.on_tick(ROOT);
        site.vm.on_tick(50);
    }
    let new = open(&site).unwrap();
    assert_ne!(new, old);
    site.vm
        .on_stream_message(50, new, site.host.deliver(&batch(1, &[(&key::HEAD, b"h")])));
    assert!(site.host.shared(&key::HEAD).is_some());
    site.vm.on_done(ROOT);
    site.vm.on_delete(ROOT);
    site.host.advance_ms(50);
    site.vm.on_tick(50);
    assert_eq!(open(&site), Some(new));
}

#[test]
fn a_refused_configuration_leaves_the_old_root_in_charge() {
    let mut site = Site::new();
    run(&mut [&mut site], 200);
    let stream = open(&site);
    site.host.configure(b"{\"tick_ms\": 0}");
    site.vm.on_create(50, 0);
    assert!(!site.vm.on_configure(50));
    assert_eq!(site.host.logged(crate::host::Level::Error).len(), 1);
    run(&mut [&mut site], 200);
    assert_eq!(open(&site), stream);
}

#[test]
fn a_lost_stream_is_opened_again_with_growing_waits() {
    let mut site = Site::new();
    site.host.refuse_streams(true);
    run(&mut [&mut site], 30_000);
    // 100, 200, 400, 800, 1600 ms, then every 2 s.
    let attempts = site.faults("connect");
    assert!((15..=20).contains(&attempts), "{attempts}");
    site.host.refuse_streams(false);
    run(&mut [&mut site], 2_100);
    let first = open(&site).unwrap();
    deliver(&mut site, first, &batch(1, &[]));
    site.vm.on_stream_close(first);
    assert_eq!(open(&site), None);
    run(&mut [&mut site], 50);
    assert_eq!(open(&site), None);
    run(&mut [&mut site], 100);
    assert!(open(&site).is_some_and(|second| second != first));
}

#[test]
fn a_message_that_can_not_be_read_ends_the_stream() {
    let mut site = Site::new();
    run(&mut [&mut site], 100);
    let mut version = batch(1, &[]);
    version[0] = 99;
    for (message, kind) in [
        (&b""[..], "empty"),
        (&version[..], "version"),
        (b"\x01\xff", "malformed"),
    ] {
        let stream = open(&site).unwrap();
        deliver(&mut site, stream, message);
        assert_eq!(site.faults(kind), 1, "{kind}");
        assert!(open(&site).is_some(), "never reset during a callback");
        deliver(&mut site, stream, &batch(2, &[(&key::HEAD, b"late")]));
        run(&mut [&mut site], 50);
        assert_eq!(open(&site), None);
        run(&mut [&mut site], 2_100);
    }
    assert_eq!(site.host.shared(&key::HEAD), None);
}

#[test]
fn a_vm_that_shuts_down_hands_over_at_once() {
    let mut one = Site::new();
    let mut two = one.beside();
    run(&mut [&mut one, &mut two], 500);
    one.vm.on_done(ROOT);
    assert_eq!(open(&one), None);
    run(&mut [&mut two], 50);
    assert!(open(&two).is_some());
}
