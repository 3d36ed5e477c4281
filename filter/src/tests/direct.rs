//! The modes direct and device-aware-weighted.

use super::*;
use kv_core::id::Device;

const TRUST: &[u8] = b"xds\0route_metadata\0filter_metadata\0kv\0trust";

fn site() -> Site {
    let site = Site::new();
    site.publish(&table(3, Mode::Direct), &[]);
    site
}

/// A generation request with this body and header, on a route of this trust.
fn send(site: &mut Site, trust: &[u8], header: Option<&[u8]>, body: &[u8]) -> (u32, Action) {
    let context = site.request(&GENERATE);
    site.host.say(TRUST, trust);
    if let Some(header) = header {
        let name = "x-dynamo-worker-instance-id";
        site.host.client_header(name, header);
    }
    assert_eq!(site.vm.on_request_headers(context, false), Action::Pause);
    let action = site.part(context, body, true);
    (context, action)
}

fn refused(site: &Site, reason: &str) -> u64 {
    let name = format!("kv_router_refused_total_reason=.={reason};.;");
    site.host.named(&name)
}

#[test]
fn the_worker_that_a_trusted_request_names_gets_it_alone() {
    let mut site = site();
    let nvext = br#"{"prompt":[1,2,3,4],"nvext":{"backend_instance_id":12}}"#;
    for (header, slot) in [(Some(&b"11"[..]), 1), (None, 2)] {
        let (context, action) = send(&mut site, b"hints", header, nvext);
        assert_eq!(action, Action::Continue);
        assert_eq!(site.destinations(), [endpoint(slot)]);
        assert_eq!(site.load(u64::from(slot) + 10).waiting, 1);
        site.over(context);
    }
    assert_eq!(site.routed("default", "direct"), 2);
    site.assert_idle();
}

#[test]
fn requests_that_name_no_worker_or_may_not_are_answered_with_an_error() {
    let mut site = site();
    let plain = body(&prompt(1, 8));
    let cases = [
        ("hints", None, "worker_missing", 400),
        ("hints", Some(&b"99"[..]), "worker_unknown", 400),
        ("", Some(b"11"), "hint_untrusted", 403),
        ("all", Some(b"11"), "hint_untrusted", 403),
    ];
    for (trust, header, reason, status) in cases {
        let before = refused(&site, reason);
        let (context, action) = send(&mut site, trust.as_bytes(), header, &plain);
        assert_eq!(action, Action::Pause, "{reason}");
        let (answered, json) = site.host.replied().unwrap();
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!((answered, &json["error"]["code"]), (status, &reason.into()));
        assert_eq!(refused(&site, reason), before + 1);
        assert_eq!(site.destination(), None);
        // Envoy runs its own answer through the filter.
        site.vm.on_response_headers(context);
        site.vm.on_response_body(context, 10, false);
        site.over(context);
    }
    assert_eq!(site.routed("default", "refused"), 4);
    assert_eq!(
        site.host
            .named("kv_router_hints_ignored_total_kind=.=worker;.;"),
        2
    );
    site.assert_idle();
}

#[test]
fn a_pool_may_trust_all_and_a_rank_must_exist() {
    let mut site = Site::new();
    let mut table = table(3, Mode::Direct);
    table.pools[0].trusts_hints = true;
    site.publish(&table, &[]);
    let named = |rank: u32| format!(r#"{{"nvext":{{"backend_instance_id":11,"dp_rank":{rank}}}}}"#);
    let (context, action) = send(&mut site, b"", None, named(0).as_bytes());
    assert_eq!(
        (action, site.destinations()),
        (Action::Continue, vec![endpoint(1)])
    );
    site.over(context);
    let (_, action) = send(&mut site, b"", None, named(7).as_bytes());
    assert_eq!(action, Action::Pause);
    assert_eq!(refused(&site, "worker_unknown"), 1);
}

#[test]
fn what_is_not_for_generation_needs_no_name() {
    let mut site = site();
    let context = site.request(&[(":method", b"GET"), (":path", b"/v1/models")]);
    assert_eq!(site.vm.on_request_headers(context, true), Action::Continue);
    assert!(site.destination().is_some());
    assert_eq!(site.routed("default", "passed"), 1);
}

#[test]
fn a_worker_that_takes_no_requests_is_sent_those_that_name_it() {
    let mut site = Site::new();
    let mut table = table(2, Mode::Direct);
    table.pools[0].owners[1].accepting = false;
    site.publish(&table, &[]);
    send(&mut site, b"hints", Some(b"11"), b"{}");
    assert_eq!(site.destinations(), [endpoint(1)]);
}

#[test]
fn names_count_in_other_modes_but_are_not_needed() {
    for mode in [Mode::Kv, Mode::LeastLoaded, Mode::RoundRobin] {
        let mut site = Site::new();
        site.publish(&table(3, mode), &[]);
        for trust in [&b"hints"[..], b""] {
            for _ in 0..3 {
                let (_, action) = send(&mut site, trust, Some(b"11"), &body(&prompt(1, 8)));
                assert_eq!(action, Action::Continue);
            }
            if trust == b"hints" {
                assert_eq!(site.load(11).waiting, 3, "{mode:?}");
                assert_eq!(
                    site.host
                        .text(Headers::Request, "x-envoy-max-retries")
                        .unwrap(),
                    "0"
                );
            }
        }
        assert!(site.load(11).waiting < 6, "{mode:?}");
    }
}

#[test]
fn devices_share_requests_by_their_weight() {
    let mut site = Site::new();
    let mut table = table(3, Mode::DeviceAwareWeighted);
    table.pools[0].device_ratio = 2;
    table.pools[0].owners[2].traits.device = Device::Cpu;
    site.publish(&table, &[]);
    for i in 0..10 {
        site.complete(&body(&prompt(i, 8)));
    }
    let waiting = [10, 11, 12].map(|worker| site.load(worker).waiting);
    assert_eq!(waiting, [4, 4, 2]);
    assert_eq!(site.routed("default", "device-aware-weighted"), 10);
}
