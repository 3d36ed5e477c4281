//! What requests say about their routing, from clients that are trusted and from others.

use super::*;
use crate::hints::{Hints, Kind, Malformed, Nvext};
use crate::metrics::Metrics;
use crate::request::DECISION;
use kv_core::constraint::Pin;
use kv_core::scan::Scanner;

const TRUST: &[u8] = b"xds\0route_metadata\0filter_metadata\0kv\0trust";

fn gather(host: &Fake, pool: Option<&Pool>, nvext: &[u8]) -> Hints {
    let mut scanner = Scanner::of(10, None);
    scanner.feed(nvext);
    let members = scanner.finish().unwrap_or_default().members;
    let headers = host.headers(Headers::Request).unwrap_or_default();
    let nvext = Nvext::read(nvext, &members);
    Hints::gather(host, &mut Metrics::default(), pool, &headers, &nvext)
}

fn ignored(host: &Fake, kind: Kind) -> u64 {
    let name = format!("kv_router_hints_ignored_total_kind=.={};.;", kind.name());
    host.named(&name)
}

const PRIVILEGED: [(&str, &[u8]); 17] = [
    ("x-dynamo-worker-instance-id", b"1"),
    ("x-worker-instance-id", b"1"),
    ("x-dynamo-prefill-instance-id", b"1"),
    ("x-prefill-instance-id", b"1"),
    ("x-dynamo-dp-rank", b"1"),
    ("x-dp-rank", b"1"),
    ("x-data-parallel-rank", b"1"),
    ("x-dynamo-prefill-dp-rank", b"1"),
    ("x-prefill-dp-rank", b"1"),
    ("x-dynamo-request-priority", b"1"),
    ("x-dynamo-request-strict-priority", b"1"),
    ("x-dynamo-meta-policy-class", b"gold"),
    ("x-tenant-id", b"a"),
    ("x-gateway-destination-endpoint-subset", b"10.0.0.1"),
    ("x-kv-allowed-workers", b"1, 2"),
    ("x-kv-required-taints", b"fast,big"),
    ("x-kv-preferred-taints", b"near, spot:-0.5"),
];

#[test]
fn nothing_privileged_is_left_of_a_client_that_is_not_trusted() {
    let host = Fake::default();
    host.client_header("x-request-id", b"7");
    for (name, value) in PRIVILEGED {
        host.client_header(name, value);
    }
    let nvext = br#"{"agent_hints": {"osl": 30, "priority": 5}, "cache_salt": "s", "dp_rank": 1}"#;
    let hints = gather(&host, Some(&Pool::default()), nvext);
    let expected = Hints {
        expected_output: 30,
        salt: Some("s".into()),
        is_untrusted_pin: true,
        ..Hints::default()
    };
    assert_eq!(hints, expected);
    let left = host.headers(Headers::Request).unwrap();
    let left: Vec<&[u8]> = left.iter().map(|(name, _)| name).collect();
    assert_eq!(left, [b"x-request-id"]);
    // The pool's name is read with the headers, before there is a pool whose word counts.
    for kind in Kind::ALL.into_iter().filter(|k| *k != Kind::Pool) {
        assert_eq!(ignored(&host, kind), 1, "{}", kind.name());
    }
}

#[test]
fn a_route_a_pool_or_an_address_makes_them_count() {
    let trusting = Pool {
        trusts_hints: true,
        ..Pool::default()
    };
    let sources = Pool {
        trusted_sources: vec!["10.1.0.0/16".parse().unwrap(), "fd00::/8".parse().unwrap()],
        ..Pool::default()
    };
    let cases: [(&Pool, &[u8], &[u8], bool); 9] = [
        (&Pool::default(), b"hints", b"", true),
        (&Pool::default(), b"hint", b"", false),
        (&trusting, b"", b"", true),
        (&sources, b"", b"10.1.9.9:4711", true),
        (&sources, b"", b"[::ffff:10.1.9.9]:1", true),
        (&sources, b"", b"[fd00::7]:1", true),
        (&sources, b"", b"10.2.0.1:4711", false),
        (&sources, b"", b"\xff", false),
        (&sources, b"", b"", false),
    ];
    for (pool, route, source, trusted) in cases {
        let host = Fake::default();
        host.say(TRUST, route);
        host.say(b"source\0address", source);
        for (name, value) in PRIVILEGED {
            host.client_header(name, value);
        }
        let hints = gather(&host, Some(pool), b"{}");
        assert_eq!(
            hints.constraints.pin.is_some(),
            trusted,
            "{route:?} {source:?}"
        );
        assert_eq!(ignored(&host, Kind::Worker), u64::from(!trusted));
        if !trusted {
            continue;
        }
        let asked = &hints.constraints;
        let pin = Pin {
            worker: 1,
            rank: Some(1),
        };
        assert_eq!(asked.pin, Some(pin));
        assert_eq!(asked.workers, Some(vec![1, 2]));
        assert_eq!(asked.endpoints, Some(vec!["10.0.0.1".to_owned()]));
        assert_eq!(asked.required_taints, ["fast", "big"]);
        let preferred = [("near".to_owned(), 1.0), ("spot".to_owned(), -0.5)];
        assert_eq!(asked.preferred_taints, preferred);
        assert_eq!(hints.salt.as_deref(), Some("a"));
        assert_eq!((hints.priority_jump, hints.strict_priority), (1.0, 1));
        assert_eq!(hints.policy_class.as_deref(), Some("gold"));
        assert_eq!((hints.is_rank_alone, hints.malformed), (false, None));
        let left = host.headers(Headers::Request).unwrap();
        assert_eq!(left.iter().count(), PRIVILEGED.len());
    }
}

#[test]
fn headers_count_before_the_body_and_the_first_that_can_be_read() {
    let host = Fake::default();
    host.say(TRUST, b"hints");
    let nvext = br#"{"backend_instance_id": 7, "dp_rank": 2, "other": [1]}"#;
    let pin = || {
        let pin = gather(&host, None, nvext).constraints.pin;
        pin.map(|pin| (pin.worker, pin.rank))
    };
    assert_eq!(pin(), Some((7, Some(2))));
    host.client_header("x-worker-instance-id", b" 9 ");
    assert_eq!(pin(), Some((9, Some(2))));
    host.client_header("x-dynamo-worker-instance-id", b"18446744073709551615");
    host.client_header("x-data-parallel-rank", b"1");
    assert_eq!(pin(), Some((u64::MAX, Some(1))));
    host.client_header("x-dynamo-worker-instance-id", b"-1");
    assert_eq!(pin(), Some((9, Some(1))));
}

#[test]
fn a_request_that_pushes_itself_back_needs_no_trust() {
    let host = Fake::default();
    host.client_header("x-dynamo-request-priority", b"-3");
    let hints = gather(&host, None, br#"{"agent_hints": {"priority": -3}}"#);
    assert_eq!(hints, Hints::default());
    assert_eq!(ignored(&host, Kind::Priority), 0);
    let left = host.headers(Headers::Request).unwrap();
    assert!(left.get("x-dynamo-request-priority").is_some());
}

#[test]
fn what_a_trusted_client_says_must_make_sense() {
    let cases: [(&str, &[u8], &[u8], &str); 7] = [
        (
            "x-kv-allowed-workers",
            b"1,x",
            b"{}",
            "x-kv-allowed-workers",
        ),
        (
            "x-kv-required-taints",
            b"\xff",
            b"{}",
            "x-kv-required-taints",
        ),
        (
            "x-kv-preferred-taints",
            b"a:b",
            b"{}",
            "x-kv-preferred-taints",
        ),
        (
            "x-kv-preferred-taints",
            b"a:inf",
            b"{}",
            "x-kv-preferred-taints",
        ),
        ("x-tenant-id", b"\xff", b"{}", "x-tenant-id"),
        ("", b"", br#"{"dp_rank": -1}"#, "nvext.dp_rank"),
        (
            "",
            b"",
            br#"{"allowed_worker_ids": 7}"#,
            "nvext.allowed_worker_ids",
        ),
    ];
    for (name, value, nvext, fault) in cases {
        let host = Fake::default();
        host.client_header(name, value);
        assert_eq!(gather(&host, None, nvext).malformed, None);
        host.client_header(name, value);
        host.say(TRUST, b"hints");
        assert_eq!(gather(&host, None, nvext).malformed, Some(Malformed(fault)));
    }
    let host = Fake::default();
    host.say(TRUST, b"hints");
    assert!(gather(&host, None, br#"{"dp_rank": 1}"#).is_rank_alone);
}

#[test]
fn a_trusted_tenant_has_blocks_of_its_own() {
    let mut site = Site::new();
    let tokens = prompt(1, 8);
    site.publish(&table(2, Mode::Kv), &[(0, Slot(1), &tokens)]);
    let overlap = |site: &mut Site, trust: &[u8]| {
        let context = site.request(&GENERATE);
        site.host.say(TRUST, trust);
        site.host.client_header("x-tenant-id", b"a");
        site.vm.on_request_headers(context, false);
        site.part(context, &body(&tokens), true);
        site.vm.on_response_headers(context);
        let record = site.host.text(Headers::Response, DECISION).unwrap();
        let record: serde_json::Value = serde_json::from_str(&record).unwrap();
        let candidates = record["candidates"].as_array().unwrap().iter();
        candidates
            .map(|c| c["overlap"][0].as_u64().unwrap())
            .sum::<u64>()
    };
    assert_eq!(overlap(&mut site, b""), 2);
    assert_eq!(overlap(&mut site, b"hints"), 0);
}

#[test]
fn hints_are_removed_whatever_becomes_of_the_request() {
    // No table, no body, a body that is no JSON.
    let mut site = Site::new();
    for published in [false, true] {
        if published {
            site.publish(&table(1, Mode::Kv), &[]);
        }
        for (end, part) in [(true, None), (false, Some(&b"x"[..]))] {
            let context = site.request(&GENERATE);
            site.host.client_header("x-kv-required-taints", b"a");
            if site.vm.on_request_headers(context, end) == Action::Pause {
                site.part(context, part.unwrap_or_default(), true);
            }
            let left = site.host.headers(Headers::Request).unwrap();
            assert_eq!(left.get("x-kv-required-taints"), None);
            site.over(context);
        }
    }
}
