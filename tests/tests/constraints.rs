//! What requests say about their routing, through Envoy: whose word counts, and what it does.

use http::HeaderName;
use kv_tests::client::json_request;
use kv_tests::envoy::Envoy;
use kv_tests::stack::{Setup, Stack};
use kv_tests::upstream::Upstream;
use serde_json::{Value, json};

/// Another Envoy whose routes trust their clients.
async fn trusting(stack: &Stack, threads: u32) -> Envoy {
    let file = stack.dir().join("envoy.yaml");
    let bootstrap = std::fs::read_to_string(&file).expect("a bootstrap");
    let route = "- match: {prefix";
    assert!(bootstrap.contains(route));
    let trust =
        "- metadata: {filter_metadata: {kv: {trust: hints}}}\n                match: {prefix";
    std::fs::write(&file, bootstrap.replace(route, trust)).expect("a writable directory");
    stack
        .another_envoy("trusting", threads, |filter| filter)
        .await
}

/// Status, answer and decision of a completion with these headers and extensions.
async fn send(
    stack: &Stack,
    port: u16,
    headers: &[(&'static str, &str)],
    nvext: Value,
) -> (u16, Value, Value) {
    let body = json!({"model": "sim", "prompt": [1, 2, 3], "nvext": nvext});
    let mut request = json_request(port, "/v1/completions", &body).expect("a request");
    for (name, value) in headers {
        let value = value.parse().expect("a header's value");
        request
            .headers_mut()
            .insert(HeaderName::from_static(name), value);
    }
    let answer = stack.client.send(request).await.expect("an answer");
    let decision = answer.headers().get("x-kv-router-decision");
    let decision = decision.and_then(|d| serde_json::from_slice(d.as_bytes()).ok());
    let body = serde_json::from_slice(answer.body()).unwrap_or_default();
    (answer.status().as_u16(), body, decision.unwrap_or_default())
}

/// Headers that only trusted clients may send, and the kind of hint that each is.
const PRIVILEGED: [(&str, &str, &str); 11] = [
    ("x-dynamo-worker-instance-id", "1", "worker"),
    ("x-prefill-instance-id", "1", "worker"),
    ("x-data-parallel-rank", "0", "rank"),
    ("x-dynamo-request-priority", "5", "priority"),
    ("x-dynamo-request-strict-priority", "1", "strict_priority"),
    ("x-dynamo-meta-policy-class", "gold", "policy_class"),
    ("x-tenant-id", "a", "tenant"),
    (
        "x-gateway-destination-endpoint-subset",
        "127.0.0.1",
        "endpoints",
    ),
    ("x-kv-allowed-workers", "1, 2", "allowed_workers"),
    ("x-kv-required-taints", "fast", "required_taints"),
    ("x-kv-preferred-taints", "near:0.5", "preferred_taints"),
];

#[tokio::test(flavor = "multi_thread")]
async fn spoofed_hints_reach_no_worker() {
    let upstream = Upstream::start(1).await;
    // Clients come from here, and none is trusted for claiming to come from there.
    let stack = Stack::start(&Setup {
        threads: 2,
        workers: vec![(1, upstream.address)],
        more: json!({"trusted_sources": ["10.9.0.0/16"]}),
    })
    .await;
    let mut headers: Vec<(&'static str, &str)> = PRIVILEGED
        .iter()
        .map(|(name, value, _)| (*name, *value))
        .collect();
    headers.push(("x-forwarded-for", "10.9.0.1"));
    headers.push(("x-request-tag", "kept"));
    let nvext = json!({"allowed_worker_ids": [1], "agent_hints": {"priority": 3}});
    let (status, answer, _) = send(&stack, stack.envoy.port, &headers, nvext).await;
    assert_eq!(status, 200);
    for (name, ..) in PRIVILEGED {
        assert_eq!(answer["headers"][name], Value::Null, "{name}");
    }
    assert_eq!(answer["headers"]["x-request-tag"], "kept");
    let kinds: std::collections::BTreeSet<&str> = PRIVILEGED.iter().map(|p| p.2).collect();
    for kind in kinds {
        let ignored = format!("kv_router_hints_ignored_total_kind=.={kind};.;");
        assert_eq!(stack.envoy.total(&ignored).await, 1, "{kind}");
    }
    let trusting = trusting(&stack, 1).await;
    let headers: Vec<_> = PRIVILEGED
        .iter()
        .map(|(name, value, _)| (*name, *value))
        .collect();
    let nvext = json!({"agent_hints": {"priority": "high"}});
    let (status, answer, _) = send(&stack, trusting.port, &headers, nvext).await;
    assert_eq!(
        (status, &answer["error"]["code"]),
        (400, &"hint_malformed".into())
    );
    let rank = [("x-dp-rank", "1")];
    let (status, answer, _) = send(&stack, trusting.port, &rank, Value::Null).await;
    assert_eq!(
        (status, &answer["error"]["code"]),
        (400, &"rank_alone".into())
    );
    assert_eq!(trusting.total("kv_router_hints_ignored_total").await, 0);
    stack.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trusted_source_is_known_by_its_address() {
    let upstream = Upstream::start(1).await;
    let stack = Stack::start(&Setup {
        threads: 1,
        workers: vec![(1, upstream.address)],
        more: json!({"trusted_sources": ["127.0.0.0/8"]}),
    })
    .await;
    let tenant = [("x-tenant-id", "a"), ("x-forwarded-for", "10.9.0.1")];
    let (status, answer, _) = send(&stack, stack.envoy.port, &tenant, Value::Null).await;
    assert_eq!(
        (status, &answer["headers"]["x-tenant-id"]),
        (200, &"a".into())
    );
    stack.idle().await;
}
