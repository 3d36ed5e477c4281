//! No bytes from anywhere make a VM panic, hang a request or leave a booking.

use super::reports::Sidecar;
use super::*;
use crate::host::Token;
use kv_core::loads::{Correction, LivePrefix, Loads, PoolLoads, WriteOff};
use proptest::collection::vec;
use proptest::prelude::*;

fn bytes(most: usize) -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 0..most)
}

/// Bytes, or true bytes with some of them changed.
fn damaged(sound: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let length = sound.len();
    let changes = vec((0..length.max(1), any::<u8>()), 0..4);
    let damaged = (changes, 0..=length).prop_map(move |(changes, cut)| {
        let mut damaged = sound.clone();
        for (at, byte) in changes {
            if let Some(old) = damaged.get_mut(at) {
                *old = byte;
            }
        }
        damaged.truncate(cut.max(length / 2));
        damaged
    });
    prop_oneof![damaged, bytes(300)]
}

fn loads() -> Loads {
    let correction = Correction {
        blocks: -7,
        decoding: 3,
        ..Correction::default()
    };
    let prefix = LivePrefix {
        hash: 9,
        depth: 2,
        slots: vec![Slot(0), Slot(2)],
    };
    Loads {
        epoch: EPOCH,
        version: 1,
        pools: vec![PoolLoads {
            corrections: vec![(Slot(1), correction)],
            prefixes: vec![prefix],
        }],
        write_off: WriteOff::default(),
        backlogs: vec![2],
        is_alone: true,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn broken_shared_data_routes_on(
        head in damaged(Head { epoch: EPOCH, level: 2, group: 8, ready: true, table_version: 1, beat: 1 }.encode().to_vec()),
        table in damaged(table(3, Mode::Kv).encode()),
        pages in vec(bytes(200), 4),
        lease in bytes(40),
        loads in damaged(loads().encode()),
        stream in bytes(10),
    ) {
        let mut site = Site::new();
        site.publish(&super::table(3, Mode::Kv), &[(0, Slot(1), &prompt(1, 64))]);
        site.put(&key::HEAD, &head);
        site.put(&key::TABLE, &table);
        site.put(&key::LEASE, &lease);
        site.put(&key::IDLE, &lease);
        site.put(&key::LOADS, &loads);
        site.put(&key::STREAM, &stream);
        for (id, page) in pages.iter().enumerate() {
            site.put(&key::page(u32::try_from(id).unwrap()), page);
        }
        for _ in 0..10 {
            site.tick();
        }
        let (context, action) = site.post();
        if action == Action::Pause {
            prop_assert_eq!(site.part(context, &body(&prompt(1, 64)), true), Action::Continue);
        }
        site.over(context);
        site.assert_idle();
    }

    #[test]
    fn damaged_pages_route_on(
        change in vec((0..400_usize, any::<u8>()), 1..6),
        id in 0..4_u32,
    ) {
        let tokens = prompt(1, 200);
        let mut site = Site::new();
        site.publish(&table(3, Mode::Kv), &[(0, Slot(1), &tokens), (0, Slot(2), &tokens[..90])]);
        let mut page = site.host.shared(&key::page(id)).unwrap().bytes;
        for (at, byte) in change {
            if let Some(old) = page.get_mut(at) {
                *old = byte;
            }
        }
        site.put(&key::page(id), &page);
        let context = site.complete(&body(&tokens));
        prop_assert!(site.destination().is_some());
        site.over(context);
        site.assert_idle();
    }

    #[test]
    fn any_request_is_routed_and_released(
        headers in vec((0..8_usize, bytes(30)), 0..6),
        parts in vec(bytes(2000), 0..5),
        prefix in prop_oneof![
            Just(&b""[..]),
            Just(&b"{\"prompt\":["[..]),
            Just(&b"{\"model\":\"\xff"[..])
        ],
        trailers in any::<bool>(),
    ) {
        const NAMES: [&str; 8] = [
            ":method", ":path", "content-type", "content-length", "upgrade", "connection",
            "content-encoding", crate::request::DESTINATION,
        ];
        let mut site = Site::new();
        site.publish(&table(2, Mode::Kv), &[]);
        let context = site.request(&GENERATE);
        for (name, value) in &headers {
            site.host.client_header(NAMES[*name], value);
        }
        site.vm.on_request_headers(context, false);
        site.part(context, prefix, false);
        for part in &parts {
            site.part(context, part, false);
        }
        let last = if trailers {
            site.vm.on_request_trailers(context)
        } else {
            site.part(context, b"", true)
        };
        prop_assert_eq!(last, Action::Continue);
        let destination = site.destination().unwrap();
        prop_assert!([endpoint(0), endpoint(1)].contains(&destination));
        site.over(context);
        site.assert_idle();
    }

    #[test]
    fn any_message_leaves_the_bridge_alive(messages in vec(damaged(kv_core::wire::encode(
        &kv_core::wire::Batch { seq: 1, writes: vec![kv_core::wire::Write { key: &key::HEAD, value: &[7; 24] }] }
    )), 1..5)) {
        let mut site = Site::new();
        site.tick();
        for message in messages {
            let streams = site.host.streams().len();
            let size = site.host.deliver(&message);
            site.vm.on_stream_message(ROOT, Token(u32::try_from(streams - 1).unwrap()), size);
            for _ in 0..60 {
                site.tick();
            }
            prop_assert!(site.host.streams().iter().any(|s| s.open));
        }
    }

    #[test]
    fn any_loads_and_upstreams_leave_the_lanes_exact(
        loads in damaged(loads().encode()),
        addresses in vec(prop_oneof![
            (0..6_u16).prop_map(endpoint),
            "[ -~]{0,20}",
        ], 1..6),
        attempt in any::<u64>(),
    ) {
        let tokens = prompt(1, 64);
        let mut site = Site::new();
        site.publish(&table(3, Mode::Kv), &[(0, Slot(1), &tokens)]);
        site.put(&key::LOADS, &loads);
        site.tick();
        let mut sidecar = Sidecar::default();
        for address in addresses {
            let context = site.complete(&body(&tokens));
            prop_assert!(site.destination().is_some());
            site.host.reach(&address, attempt);
            site.vm.on_response_headers(context);
            site.vm.on_response_body(context, 3, false);
            site.tick();
            sidecar.read(&[&site]);
            sidecar.assert_exact(&site);
            site.over(context);
            site.assert_idle();
        }
    }

    #[test]
    fn callbacks_of_two_vms_in_any_order_leave_no_booking_and_exact_reports(
        calls in vec((0..11_u8, 0..6_usize, 0..50_usize), 0..80)
    ) {
        let mut one = Site::new();
        one.publish(&table(4, Mode::Kv), &[(0, Slot(1), &prompt(1, 8))]);
        let mut two = one.beside();
        let mut contexts = Vec::new();
        for i in 0..6 {
            let site = if i % 2 == 0 { &mut one } else { &mut two };
            contexts.push(site.request(&GENERATE));
        }
        let mut sidecar = Sidecar::default();
        for (call, which, size) in calls {
            let context = contexts[which];
            let site = if which % 2 == 0 { &mut one } else { &mut two };
            site.host.enter(context);
            match call {
                0 => drop(site.vm.on_request_headers(context, size % 2 == 0)),
                1 => drop(site.part(context, &body(&prompt(1, 8)), size % 3 == 0)),
                2 => drop(site.vm.on_request_body(context, size, size % 2 == 0)),
                3 => drop(site.vm.on_request_trailers(context)),
                4 => site.vm.on_response_headers(context),
                5 => site.vm.on_response_body(context, size, false),
                6 => site.vm.on_log(context),
                7 => site.vm.on_done(context),
                8 => site.host.reach(&endpoint(u16::try_from(size % 5).unwrap()), 1),
                9 => site.host.advance_ms(size as u64 / 10),
                _ => site.tick(),
            }
            let streams = site.host.streams();
            if let Some(open) = streams.iter().position(|stream| stream.open)
                && size == 49
            {
                site.vm.on_stream_close(Token(u32::try_from(open).unwrap()));
            }
        }
        // Both VMs report, whichever of them is the bridge, and whenever it became that.
        for _ in 0..2 {
            for _ in 0..40 {
                two.tick();
                one.tick();
            }
            sidecar.read(&[&one, &two]);
            sidecar.assert_exact(&one);
            for (i, context) in contexts.iter().enumerate() {
                let site = if i % 2 == 0 { &mut one } else { &mut two };
                site.over(*context);
            }
            one.assert_idle();
        }
    }
}
