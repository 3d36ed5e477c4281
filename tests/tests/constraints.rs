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
    post(stack, port, headers, &body).await
}

async fn post(
    stack: &Stack,
    port: u16,
    headers: &[(&'static str, &str)],
    body: &Value,
) -> (u16, Value, Value) {
    let mut request = json_request(port, "/v1/completions", body).expect("a request");
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

/// Headers of a request.
type Headers<'a> = &'a [(&'static str, &'a str)];

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

/// Workers 1 to 3, 4 with two ranks, and 5 that nobody can reach.
async fn constrained() -> (Stack, Vec<Upstream>) {
    let upstreams = Upstream::start_all(4).await;
    let gone = kv_tests::place::free_port();
    let at = |i: usize| json!(upstreams[i].address);
    let workers = json!([
        {"id": 1, "endpoint": at(0), "taints": ["fast"], "labels": {"zone": "a"}, "lora": ["sql"]},
        {"id": 2, "endpoint": at(1), "taints": ["fast", "spot"], "labels": {"zone": "b"}, "lora": ["chat"]},
        {"id": 3, "endpoint": at(2), "labels": {"zone": "a"}, "lora": ["chat"]},
        {"id": 4, "endpoint": at(3), "taints": ["ranked"], "data_parallel_size": 2, "lora": ["chat"]},
        {"id": 5, "endpoint": format!("127.0.0.1:{gone}"), "taints": ["gone"], "lora": ["chat"]},
    ]);
    let more = json!({
        "trust_hints": true,
        "models": ["sim"],
        "lora_adapters": ["sql", "chat"],
        "workers": workers,
    });
    let stack = Stack::start(&Setup {
        threads: 2,
        workers: Vec::new(),
        more,
    })
    .await;
    (stack, upstreams)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_goes_where_its_constraints_let_it() {
    let (stack, upstreams) = constrained().await;
    let port = stack.envoy.port;
    let second = upstreams[1].address.to_string();
    let none = Value::Null;
    let taints = |required: Value| json!({"routing_constraints": {"required_taints": required}});
    // Long enough that prefills differ by more than what counts as alike.
    let ask = async |model: &str, headers: &[(&'static str, &str)], nvext: &Value| {
        let prompt: Vec<u32> = (0..4_000).collect();
        let body = json!({"model": model, "prompt": prompt, "nvext": nvext});
        post(&stack, port, headers, &body).await
    };
    let preferred = json!({"routing_constraints": {"preferred_taints": {"spot": 5.0}}});
    let cases: [(&str, Headers<'_>, Value, &[u64]); 13] = [
        ("sim", &[("x-worker-instance-id", "3")], none.clone(), &[3]),
        (
            "sim",
            &[],
            json!({"decode_worker_id": 2, "backend_instance_id": 1}),
            &[2],
        ),
        (
            "sim",
            &[
                ("x-dynamo-prefill-instance-id", "1"),
                ("x-kv-allowed-workers", "3"),
            ],
            none.clone(),
            &[3],
        ),
        (
            "sim",
            &[("x-kv-allowed-workers", "1, 3")],
            json!({"allowed_worker_ids": [2]}),
            &[1, 3],
        ),
        ("sim", &[], json!({"allowed_worker_ids": [2]}), &[2]),
        (
            "sim",
            &[("x-gateway-destination-endpoint-subset", &second)],
            none.clone(),
            &[2],
        ),
        (
            "sim",
            &[("x-kv-required-taints", "spot,fast")],
            none.clone(),
            &[2],
        ),
        ("sim", &[], taints(json!(["fast"])), &[1, 2]),
        (
            "sim",
            &[],
            taints(json!(["dynamo.topology/zone=a"])),
            &[1, 3],
        ),
        (
            "sim",
            &[("x-kv-preferred-taints", "spot:5")],
            none.clone(),
            &[2],
        ),
        ("sim", &[], preferred, &[2]),
        ("sql", &[], none.clone(), &[1]),
        (
            "sql",
            &[("x-kv-required-taints", "spot")],
            none.clone(),
            &[2],
        ),
    ];
    for (model, headers, nvext, expected) in &cases {
        let (status, answer, decision) = ask(model, headers, nvext).await;
        let worker = answer["worker"].as_u64().unwrap_or(0);
        let told = format!("{headers:?} {nvext} {answer} {decision}");
        assert!(status == 200 && expected.contains(&worker), "{told}");
        assert!(decision["constraints"].is_object(), "{told}");
        assert_eq!(
            answer["headers"]["x-data-parallel-rank"],
            Value::Null,
            "{told}"
        );
        let candidates = decision["candidates"].as_array().expect("candidates");
        let fit = |c: &Value| c["worker"].as_u64().is_some_and(|w| expected.contains(&w));
        let is_preference = told.contains("preferred");
        assert!(is_preference || candidates.iter().all(fit), "{told}");
    }
    assert_eq!(stack.envoy.total("kv_router_lora_missing_total").await, 1);
    // The engine is told the rank.
    for rank in ["1", "0"] {
        let headers = [("x-worker-instance-id", "4"), ("x-dp-rank", rank)];
        let (_, answer, decision) = ask("sim", &headers, &none).await;
        assert_eq!(answer["headers"]["x-data-parallel-rank"], rank);
        assert_eq!(decision["rank"].to_string(), rank);
    }
    let (_, answer, _) = ask("sim", &[], &taints(json!(["ranked"]))).await;
    assert!(
        answer["headers"]["x-data-parallel-rank"].is_string(),
        "{answer}"
    );
    let refusals: [(Headers<'_>, Value, u16, &str); 5] = [
        (
            &[("x-worker-instance-id", "9")],
            none.clone(),
            400,
            "worker_unknown",
        ),
        (
            &[("x-worker-instance-id", "4"), ("x-dp-rank", "2")],
            none.clone(),
            400,
            "worker_unknown",
        ),
        (
            &[("x-worker-instance-id", "1"), ("x-kv-allowed-workers", "2")],
            none.clone(),
            400,
            "worker_not_allowed",
        ),
        (&[], taints(json!(["nobody's"])), 503, "no_worker_fits"),
        (&[], taints(json!("fast")), 400, "hint_malformed"),
    ];
    for (headers, nvext, expected, code) in refusals {
        let (status, answer, _) = ask("sim", headers, &nvext).await;
        assert_eq!(
            (status, &answer["error"]["code"]),
            (expected, &code.into()),
            "{headers:?} {nvext}"
        );
    }
    // One that nobody else may have is not sent to anybody else.
    let (status, ..) = ask("sim", &[], &taints(json!(["gone"]))).await;
    assert_eq!(status, 503);
    let (status, ..) = ask("sim", &[], &json!({"backend_instance_id": 5})).await;
    assert_eq!(status, 503);
    stack.idle().await;
    // The sidecar judges by the same constraints.
    let judged = async || {
        let report = stack
            .client
            .get(stack.sidecar.admin, "/v1/decisions?limit=1000")
            .await?;
        let decisions = report["decisions"].as_array().cloned().unwrap_or_default();
        if decisions.len() < cases.len() {
            return Err(report.to_string());
        }
        Ok(decisions)
    };
    for decision in kv_tests::wait::until("the decisions", judged).await {
        assert_ne!(decision["agree"], false, "{decision}");
    }
}
