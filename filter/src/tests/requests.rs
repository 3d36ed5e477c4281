//! The life of requests: what is held, what is chosen, what is booked.

use super::*;
use crate::request::{DECISION, DESTINATION, PACKED, POOL};

fn site(mode: Mode) -> Site {
    let site = Site::new();
    site.publish(&table(4, mode), &[]);
    site
}

#[test]
fn the_longest_overlap_wins_and_the_request_is_booked_there() {
    let mut site = Site::new();
    let tokens = prompt(1, 43);
    site.publish(
        &table(4, Mode::Kv),
        &[(0, Slot(1), &tokens[..20]), (0, Slot(2), &tokens[..40])],
    );
    let context = site.complete(&body(&tokens));
    assert_eq!(site.destination(), Some(endpoint(2)));
    assert_eq!(site.host.text(Headers::Request, POOL).unwrap(), "default");
    assert_eq!(site.routed("default", "kv"), 1);
    let booked = Load {
        prefill_tokens: 3,
        waiting: 1,
        decoding: 0,
        blocks: 10,
    };
    assert_eq!(site.load(12), booked);
    site.vm.on_response_headers(context);
    let record = site.host.text(Headers::Response, DECISION).unwrap();
    let record: serde_json::Value = serde_json::from_str(&record).unwrap();
    assert_eq!(record["worker"], 12);
    assert_eq!(record["candidates"][0]["overlap"][0], 10);
    site.vm.on_response_body(context, 0, false);
    assert_eq!(site.load(12), booked);
    site.vm.on_response_body(context, 30, false);
    site.vm.on_response_body(context, 30, false);
    let load = site.load(12);
    assert_eq!(
        (load.prefill_tokens, load.waiting, load.decoding),
        (0, 0, 1)
    );
    site.over(context);
    site.assert_idle();
}

#[test]
fn a_body_in_parts_decides_as_a_whole_one_and_only_at_its_end() {
    let tokens = prompt(1, 64);
    let body = body(&tokens);
    for size in [1, 7, 50, 1000] {
        let mut site = Site::new();
        site.publish(&table(4, Mode::Kv), &[(0, Slot(3), &tokens)]);
        let (context, action) = site.post();
        assert_eq!(action, Action::Pause);
        for part in body.chunks(size) {
            assert_eq!(site.part(context, part, false), Action::Pause);
        }
        assert_eq!(site.destination(), None);
        assert_eq!(site.part(context, b"", true), Action::Continue);
        assert_eq!(site.destination(), Some(endpoint(3)));
        assert_eq!(site.load(13).blocks, 16);
    }
}

#[test]
fn a_packed_body_that_does_not_unpack_whole_is_refused() {
    let long = vec![b' '; BODY_LIMIT + 1];
    let cases = [
        (&br#"{"prompt": [1, 2"#[..], 400, "body_broken"),
        (b"", 400, "body_broken"),
        (&long, 413, "body_too_long"),
    ];
    for (body, status, code) in cases {
        let mut site = site(Mode::Kv);
        for packed in [true, false] {
            let context = site.request(&GENERATE);
            if packed {
                site.host.client_header(PACKED, b"gzip");
            }
            assert_eq!(site.vm.on_request_headers(context, false), Action::Pause);
            let action = site.part(context, body, true);
            if packed {
                assert_eq!(action, Action::Pause);
                let (found, error) = site.host.replied().unwrap();
                let error: serde_json::Value = serde_json::from_slice(&error).unwrap();
                assert_eq!((found, &error["error"]["code"]), (status, &code.into()));
            } else {
                assert_eq!(action, Action::Continue);
            }
            site.over(context);
            site.assert_idle();
        }
        assert_eq!(site.routed("default", "refused"), 1);
    }
}

#[test]
fn trailers_end_a_body() {
    let mut site = site(Mode::Kv);
    let (context, _) = site.post();
    site.part(context, &body(&prompt(1, 8)), false);
    assert_eq!(site.vm.on_request_trailers(context), Action::Continue);
    assert!(site.destination().is_some());
    assert_eq!(site.routed("default", "kv"), 1);

    let (context, _) = site.post();
    assert_eq!(site.vm.on_request_trailers(context), Action::Continue);
    assert_eq!(site.routed("default", "bad_json"), 1);
}

#[test]
fn a_spoofed_destination_never_takes_effect() {
    let spoofed: [(&str, &[u8]); 3] = [
        (DESTINATION, b"6.6.6.6:66"),
        (POOL, b"evil"),
        (DECISION, b"lies\xff"),
    ];
    // Without a table, so nothing of ours replaces the headers.
    let mut bare = Site::new();
    for (end, first) in [(true, "GET"), (false, "POST")] {
        let context = bare.request(&spoofed);
        bare.host.client_header(":method", first.as_bytes());
        assert_eq!(bare.vm.on_request_headers(context, end), Action::Continue);
        for (name, _) in spoofed {
            assert_eq!(bare.host.header(Headers::Request, name), None);
        }
    }
    assert_eq!(bare.routed("none", "no_table"), 2);
    // While held, before anything is chosen.
    let mut site = site(Mode::Kv);
    let context = site.request(&GENERATE);
    for (name, value) in spoofed {
        site.host.client_header(name, value);
    }
    assert_eq!(site.vm.on_request_headers(context, false), Action::Pause);
    for (name, _) in spoofed {
        assert_eq!(site.host.header(Headers::Request, name), None);
    }
}

#[test]
fn what_is_no_generation_request_is_routed_at_once_by_load() {
    let mut site = site(Mode::Kv);
    let cases: [(&str, &[u8], bool, &str); 6] = [
        (":method", b"GET", true, "passed"),
        (":path", b"/v1/models", false, "passed"),
        (":method", b"CONNECT", false, "passed"),
        ("upgrade", b"websocket", false, "passed"),
        ("content-type", b"application/grpc", false, "passed"),
        ("content-length", b"4097", false, "too_long"),
    ];
    let mut contexts = Vec::new();
    for (name, value, end, reason) in cases {
        let context = site.request(&GENERATE);
        site.host.client_header(name, value);
        let before = site.routed("default", reason);
        assert_eq!(site.vm.on_request_headers(context, end), Action::Continue);
        assert_eq!(site.routed("default", reason), before + 1, "{name}");
        assert!(site.destination().is_some());
        // A body that comes all the same flows on.
        assert_eq!(site.part(context, b"{}", false), Action::Continue);
        contexts.push(context);
    }
    for context in contexts {
        site.over(context);
    }
    site.assert_idle();
}

#[test]
fn an_unannounced_long_body_is_routed_by_load_once_it_is_too_long() {
    let mut site = site(Mode::Kv);
    let (context, _) = site.post();
    let part = vec![b' '; BODY_LIMIT];
    assert_eq!(site.part(context, &part, false), Action::Pause);
    assert_eq!(site.part(context, b" ", false), Action::Continue);
    assert_eq!(site.routed("default", "too_long"), 1);
    let destination = site.destination();
    assert!(destination.is_some());
    assert_eq!(site.part(context, &part, true), Action::Continue);
    assert_eq!(site.destination(), destination);
    site.over(context);
    site.assert_idle();
}

#[test]
fn bodies_without_usable_ids_are_routed_by_load_and_say_why() {
    let cases: [(&[u8], &str); 10] = [
        (br#"{"prompt": [1, 2], "cache_salt": 7}"#, "no_prompt"),
        (br#"{"prompt": "hello"}"#, "text"),
        (br#"{"prompt": [[1, 2], [3, 4]]}"#, "no_prompt"),
        (br#"{"prompt": 5}"#, "no_prompt"),
        (b"{}", "no_prompt"),
        (b"", "bad_json"),
        (b"{\"prompt\": [1, 2", "bad_json"),
        (b"\xff\xfe", "bad_json"),
        (br#"{"prompt": [1, 99999999999]}"#, "no_prompt"),
        (br#"{"prompt": [1, -2]}"#, "no_prompt"),
    ];
    let mut site = site(Mode::Kv);
    for (body, reason) in cases {
        let before = site.routed("default", reason);
        let context = site.complete(body);
        let text = String::from_utf8_lossy(body).into_owned();
        assert_eq!(site.routed("default", reason), before + 1, "{text}");
        assert!(site.destination().is_some(), "{text}");
        site.over(context);
    }
    let context = site.complete(&body(&[1; 1001]));
    assert_eq!(site.routed("default", "too_many_tokens"), 1);
    site.over(context);
    let context = site.request(&GENERATE);
    site.host.client_header(":path", b"/v1/chat/completions");
    site.vm.on_request_headers(context, false);
    site.part(context, br#"{"messages": []}"#, true);
    assert_eq!(site.routed("default", "text"), 2);
    site.over(context);
    site.assert_idle();
}

#[test]
fn every_end_of_a_request_releases_exactly_what_it_booked() {
    let mut site = site(Mode::Kv);
    let tokens = body(&prompt(1, 100));
    // Gone before its headers, while held, and half sent.
    let context = site.request(&GENERATE);
    site.over(context);
    let (context, _) = site.post();
    site.over(context);
    let (context, _) = site.post();
    site.part(context, &tokens[..20], false);
    site.over(context);
    site.assert_idle();
    // After the decision; after response headers; in mid-stream; after the log without deletion.
    for stage in 0..4 {
        let context = site.complete(&tokens);
        assert!(
            !site
                .host
                .metrics_with("kv_router_lane_")
                .iter()
                .all(|(_, v)| *v == 0)
        );
        if stage > 0 {
            site.vm.on_response_headers(context);
        }
        if stage > 1 {
            site.vm.on_response_body(context, 10, false);
        }
        site.vm.on_log(context);
        site.assert_idle();
        site.vm.on_response_body(context, 10, false);
        site.vm.on_request_body(context, 10, true);
        site.vm.on_log(context);
        site.assert_idle();
        if stage < 3 {
            site.over(context);
        }
    }
    site.assert_idle();
}

#[test]
fn vms_see_each_others_load_and_spread() {
    let mut one = site(Mode::Kv);
    let mut two = one.beside();
    let tokens = body(&prompt(1, 100));
    let mut chosen = std::collections::HashSet::new();
    for _ in 0..2 {
        one.complete(&tokens);
        chosen.insert(one.destination());
        two.complete(&tokens);
        chosen.insert(two.destination());
    }
    assert_eq!(chosen.len(), 4);
}

#[test]
fn round_robin_takes_turns_across_vms_and_random_reaches_all() {
    let mut one = site(Mode::RoundRobin);
    let mut two = one.beside();
    let mut chosen = std::collections::HashMap::new();
    for _ in 0..6 {
        for site in [&mut one, &mut two] {
            let context = site.complete(&body(&prompt(1, 8)));
            *chosen.entry(site.destination().unwrap()).or_insert(0) += 1;
            site.over(context);
        }
    }
    assert_eq!(chosen.len(), 4);
    assert!(chosen.values().all(|n| *n == 3), "{chosen:?}");
    assert_eq!(one.routed("default", "round-robin"), 12);

    let mut site = site(Mode::Random);
    let mut chosen = std::collections::HashSet::new();
    for _ in 0..100 {
        let context = site.complete(b"{}");
        chosen.insert(site.destination());
        site.over(context);
    }
    assert_eq!(chosen.len(), 4);
    assert_eq!(site.routed("default", "random"), 100);
}

#[test]
fn the_model_chooses_pool_and_hashing_wherever_its_key_stands() {
    let tokens = prompt(1, 40);
    let mut table = table(2, Mode::Kv);
    table.pools.push(Pool {
        name: "large".into(),
        models: vec!["big".into()],
        owners: (4..6).map(owner).collect(),
        ..pool(0, Mode::Kv)
    });
    let mut site = Site::new();
    site.publish(&table, &[(1, Slot(5), &tokens)]);
    for body in [
        format!("{{\"model\":\"big\",\"prompt\":{tokens:?}}}"),
        format!("{{\"prompt\":{tokens:?},\"model\":\"big\"}}"),
    ] {
        let context = site.complete(body.as_bytes());
        assert_eq!(site.destination(), Some(endpoint(5)));
        assert_eq!(site.host.text(Headers::Request, POOL).unwrap(), "large");
        site.over(context);
    }
    // A salted prompt shares nothing with an unsalted one.
    let salted = format!("{{\"prompt\":{tokens:?},\"cache_salt\":\"s\",\"model\":\"big\"}}");
    let context = site.complete(salted.as_bytes());
    let load = [14, 15].map(|worker| {
        let name = format!("kv_router_lane_a.large.{worker}.0");
        site.host.named(&name) >> 32
    });
    assert_eq!(load.iter().sum::<u64>(), 40);
    site.over(context);
    // A pool without a list of models takes any name; one with a list only its own.
    let unknown = "kv_router_unknown_model_total";
    site.complete(br#"{"model":"what","prompt":[1]}"#);
    assert_eq!(site.host.named(unknown), 0);
    table.pools[0].models = vec!["small".into()];
    table.version += 1;
    site.publish(&table, &[]);
    let (context, _) = site.post();
    let action = site.part(context, br#"{"model":"what","prompt":[1]}"#, true);
    assert_eq!(action, Action::Pause);
    assert_eq!(site.host.replied().map(|(status, _)| status), Some(404));
    assert_eq!(site.host.named(unknown), 1);
    site.complete(br#"{"prompt":[1]}"#);
    assert_eq!(site.host.text(Headers::Request, POOL).unwrap(), "default");
}

#[test]
fn a_body_cut_for_its_length_still_reaches_the_pool_it_named() {
    let mut table = table(2, Mode::Kv);
    table.pools.push(Pool {
        name: "large".into(),
        models: vec!["big".into()],
        owners: vec![owner(9)],
        ..pool(0, Mode::Kv)
    });
    let mut site = Site::new();
    site.publish(&table, &[]);
    let (context, _) = site.post();
    site.part(context, br#"{"model":"big","prompt":["#, false);
    site.part(context, &[b' '; BODY_LIMIT], false);
    assert_eq!(site.destination(), Some(endpoint(9)));
    assert_eq!(site.routed("large", "too_long"), 1);
}

#[test]
fn owners_that_take_no_requests_get_none() {
    let mut table = table(3, Mode::Kv);
    table.pools[0].owners[0].accepting = false;
    table.pools[0].owners[1].endpoint = "10.0.0.1:80\r\nx-evil: 1".into();
    let mut site = Site::new();
    site.publish(&table, &[]);
    for _ in 0..20 {
        site.complete(&body(&prompt(1, 40)));
        assert_eq!(site.destination(), Some(endpoint(2)));
    }
    assert_eq!(site.faults("endpoint"), 1);
    table.pools[0].owners[2].role = Role::Decode;
    table.version = 2;
    site.publish(&table, &[]);
    site.complete(&body(&prompt(1, 40)));
    assert_eq!(site.destination(), None);
    assert_eq!(site.routed("default", "no_owner"), 1);
}

#[test]
fn a_large_pool_scores_the_holders_and_a_sample() {
    let tokens = prompt(1, 400);
    let mut site = Site::new();
    let held: Vec<_> = (100..200).map(|i| (0, Slot(i), &tokens[..200])).collect();
    let mut held: Vec<(usize, Slot, &[u32])> = held;
    held.push((0, Slot(777), &tokens));
    site.publish(&table(1000, Mode::Kv), &held);
    let context = site.complete(&body(&tokens));
    assert_eq!(site.destination(), Some(endpoint(777)));
    assert_eq!(site.load(787).prefill_tokens, 0);
    site.over(context);
    site.assert_idle();
}

#[test]
fn missing_body_callbacks_are_noticed_and_slow_clients_are_not_blamed() {
    let mut site = site(Mode::Kv);
    let (slow, _) = site.post();
    for _ in 0..40 {
        site.tick();
    }
    assert_eq!(site.host.resumed(slow), 0, "no byte of its body has come");
    site.host.enter(slow);
    site.host.receive(b"{\"prompt\":");
    let (young, _) = site.post();
    site.tick();
    for context in [slow, young] {
        assert_eq!(site.host.resumed(context), 1);
        site.host.enter(context);
        assert!(site.destination().is_some());
    }
    let (_, action) = site.post();
    assert_eq!(action, Action::Continue);
    assert_eq!(site.routed("default", "unheld"), 3);
    assert_eq!(site.faults("unheld"), 1);
    for _ in 0..40 {
        site.tick();
    }
    assert_eq!(site.host.logged(crate::host::Level::Error).len(), 1);
    assert_eq!(site.host.resumed(slow), 1);
}

#[test]
fn one_body_callback_calms_the_watchdog_for_good() {
    let mut site = site(Mode::Kv);
    let context = site.complete(b"{}");
    site.over(context);
    let (held, _) = site.post();
    site.host.receive(b"{\"prompt\":");
    for _ in 0..100 {
        site.tick();
    }
    assert_eq!(site.host.resumed(held), 0);
}

#[test]
fn a_body_that_envoy_does_not_hand_out_is_no_prompt() {
    let mut site = site(Mode::Kv);
    let (context, _) = site.post();
    site.host.receive(&body(&prompt(1, 8)));
    let action = site.vm.on_request_body(context, 500, true);
    assert_eq!(action, Action::Continue);
    assert_eq!(site.routed("default", "bad_json"), 1);
    assert_eq!(site.faults("body"), 1);
}
