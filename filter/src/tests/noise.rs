//! No bytes from anywhere make a VM panic, hang a request or leave a booking.

use super::*;
use crate::host::Token;
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn broken_shared_data_routes_on(
        head in damaged(Head { epoch: EPOCH, level: 2, group: 8, ready: true, table_version: 1, beat: 1 }.encode().to_vec()),
        table in damaged(table(3, Mode::Kv).encode()),
        pages in vec(bytes(200), 4),
        lease in bytes(40),
    ) {
        let mut site = Site::new();
        site.publish(&super::table(3, Mode::Kv), &[(0, Slot(1), &prompt(1, 64))]);
        site.put(&key::HEAD, &head);
        site.put(&key::TABLE, &table);
        site.put(&key::LEASE, &lease);
        site.put(&key::IDLE, &lease);
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
    fn callbacks_in_any_order_never_leave_a_booking(calls in vec((0..9_u8, 0..4_u32, 0..50_usize), 0..60)) {
        let mut site = Site::new();
        site.publish(&table(2, Mode::Kv), &[]);
        let contexts = [(); 4].map(|()| site.request(&GENERATE));
        for (call, which, size) in calls {
            let context = contexts[which as usize];
            site.host.enter(context);
            match call {
                0 => drop(site.vm.on_request_headers(context, size % 2 == 0)),
                1 => drop(site.part(context, &body(&prompt(1, 8)), size % 3 == 0)),
                2 => drop(site.vm.on_request_body(context, size, size % 2 == 0)),
                3 => drop(site.vm.on_request_trailers(context)),
                4 => site.vm.on_response_headers(context),
                5 => site.vm.on_response_body(context, size),
                6 => site.vm.on_log(context),
                7 => site.vm.on_done(context),
                _ => site.tick(),
            }
        }
        for context in contexts {
            site.over(context);
        }
        site.assert_idle();
    }
}
