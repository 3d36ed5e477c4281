//! Several pools on one listener, by model, route, listener or client; LoRA adapters and cache salts
//! keep their blocks apart.

use kv_core::event::StorageTier;
use kv_core::hash::Seed;
use kv_tests::client::json_request;
use kv_tests::envoy::Envoy;
use kv_tests::events::{Encoding, Publisher, stored};
use kv_tests::stack::{Setup, Stack};
use kv_tests::upstream::Upstream;
use serde_json::{Value, json};

fn overlap(decision: &Value, worker: u64) -> u64 {
    let candidates = decision["candidates"].as_array().expect("candidates");
    let candidate = candidates
        .iter()
        .find(|c| c["worker"] == worker)
        .expect("the worker");
    candidate["overlap"][0].as_u64().expect("blocks")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_model_selects_the_pool_its_block_size_and_its_policy() {
    let upstreams = Upstream::start_all(4).await;
    let workers = |ids: std::ops::Range<usize>| -> Vec<Value> {
        ids.map(|i| json!({"id": i + 1, "endpoint": upstreams[i].address}))
            .collect()
    };
    let more = json!({"pools": [
        {"name": "small", "models": ["llama-8b"], "workers": workers(0..2)},
        {
            "name": "large",
            "models": ["llama-70b"],
            "lora_adapters": ["sql"],
            "kv_cache_block_size": 32,
            "workers": workers(2..4),
        },
    ]});
    let stack = Stack::start(&Setup {
        threads: 1,
        workers: vec![],
        more,
    })
    .await;
    let mut publisher = Publisher::connect(&stack.nats.url()).await;
    let prompt: Vec<u32> = (0..256).collect();
    let device = StorageTier::Device;
    // The same tokens: plain on worker 2, plain and as the adapter on worker 3, salted on 4.
    for (worker, size, seed) in [
        (2, 16, Seed::default()),
        (3, 32, Seed::default()),
        (3, 32, Seed::new("sql", "")),
        (4, 32, Seed::new("", "tenant-1")),
    ] {
        let data = stored(&prompt, size, seed);
        publisher
            .publish(worker, device, data, Encoding::Json)
            .await;
    }
    stack.sidecar.settled(4).await;

    let ask = async |extra: Value| {
        let mut body = json!({"prompt": prompt, "max_tokens": 1});
        let (Value::Object(all), Value::Object(extra)) = (&mut body, extra) else {
            panic!()
        };
        all.extend(extra);
        let (answer, decision) = stack.send(&body).await.expect("an answer");
        assert_eq!(answer["worker"], decision["worker"]);
        decision
    };
    let small = ask(json!({"model": "llama-8b"})).await;
    assert_eq!(
        (&small["pool"], &small["worker"]),
        (&json!("small"), &json!(2)),
        "{small}"
    );
    assert_eq!((overlap(&small, 1), overlap(&small, 2)), (0, 16));

    let large = ask(json!({"model": "llama-70b"})).await;
    assert_eq!(
        (&large["pool"], &large["worker"]),
        (&json!("large"), &json!(3)),
        "{large}"
    );
    assert_eq!((overlap(&large, 3), overlap(&large, 4)), (8, 0));

    let salted = ask(json!({"model": "llama-70b", "cache_salt": "tenant-1"})).await;
    assert_eq!(
        (overlap(&salted, 3), overlap(&salted, 4)),
        (0, 8),
        "{salted}"
    );

    let adapter = ask(json!({"model": "sql"})).await;
    assert_eq!(
        (overlap(&adapter, 3), overlap(&adapter, 4)),
        (8, 0),
        "{adapter}"
    );
    let both = ask(json!({"model": "sql", "cache_salt": "tenant-1"})).await;
    assert_eq!((overlap(&both, 3), overlap(&both, 4)), (0, 0), "{both}");

    let unknown = stack.send(&json!({"model": "gpt", "prompt": prompt})).await;
    let unknown = unknown.expect_err("a refusal");
    assert!(unknown.starts_with("404"), "{unknown}");
    assert!(unknown.contains("model_not_found"), "{unknown}");
    let list = stack.client.get(stack.envoy.port, "/v1/models").await;
    let list = list.expect("a list");
    let ids = list["data"]
        .as_array()
        .expect("models")
        .iter()
        .map(|m| &m["id"]);
    assert_eq!(ids.collect::<Vec<_>>(), ["llama-8b", "llama-70b", "sql"]);
    assert_eq!(stack.envoy.total("kv_router_unknown_model").await, 1);
    stack.envoy.idle().await;
    stack.envoy.intended().await;
}

/// Another Envoy whose bootstrap is changed: what comes in place of what.
async fn changed(stack: &Stack, name: &str, what: &str, with: &str) -> Envoy {
    let file = stack.dir().join("envoy.yaml");
    let bootstrap = std::fs::read_to_string(&file).expect("a bootstrap");
    assert!(bootstrap.contains(what));
    std::fs::write(&file, bootstrap.replacen(what, with, 1)).expect("a writable directory");
    let envoy = stack.another_envoy(name, 1, |filter| filter).await;
    std::fs::write(&file, bootstrap).expect("a writable directory");
    envoy
}

#[tokio::test(flavor = "multi_thread")]
async fn a_route_a_listener_or_a_trusted_client_names_the_pool() {
    let upstreams = Upstream::start_all(3).await;
    let worker = |i: usize| json!([{"id": i + 1, "endpoint": upstreams[i].address}]);
    // Three pools for one model: only the first lists it.
    let more = json!({"pools": [
        {"name": "all", "models": ["m"], "workers": worker(0)},
        {"name": "research", "workers": worker(1)},
        {"name": "partners", "trusted_sources": ["127.0.0.0/8"], "workers": worker(2)},
    ]});
    let setup = Setup {
        threads: 1,
        workers: vec![],
        more,
    };
    let stack = Stack::start(&setup).await;
    let pool = async |port: u16, headers: &[(&'static str, &str)], model: &str| {
        let body = json!({"model": model, "prompt": [1, 2, 3], "max_tokens": 1});
        let mut request = json_request(port, "/v1/completions", &body).expect("a request");
        for (name, value) in headers {
            let value = value.parse().expect("a header's value");
            request.headers_mut().insert(*name, value);
        }
        let answer = stack.client.send(request).await.expect("an answer");
        if answer.status() != 200 {
            return answer.status().as_u16().to_string();
        }
        let decision = answer.headers().get("x-kv-router-decision");
        let decision: Value =
            serde_json::from_slice(decision.expect("a decision").as_bytes()).expect("json");
        let answer: Value = serde_json::from_slice(answer.body()).expect("json");
        assert_eq!(answer["worker"], decision["worker"]);
        decision["pool"].as_str().expect("a pool").to_owned()
    };
    let first = stack.envoy.port;
    assert_eq!(pool(first, &[], "m").await, "all");
    assert_eq!(pool(first, &[], "other").await, "404");
    assert_eq!(
        pool(first, &[("x-kv-pool", "partners")], "m").await,
        "partners"
    );
    assert_eq!(pool(first, &[("x-kv-pool", "research")], "m").await, "all");
    assert_eq!(pool(first, &[("x-kv-pool", "nobody")], "m").await, "all");
    assert_eq!(stack.envoy.total("kv_router_unknown_pool_total").await, 1);

    // As the guide has it.
    let route = r#"              routes:
              - match: {prefix: "/", headers: [{name: x-team, string_match: {exact: research}}]}
                metadata: {filter_metadata: {kv: {pool: research}}}
                route: {cluster: kv_router_pool_research, timeout: 0s}
"#;
    let routed = changed(&stack, "routed", "              routes:\n", route).await;
    assert_eq!(pool(routed.port, &[], "m").await, "all");
    let team = ("x-team", "research");
    assert_eq!(pool(routed.port, &[team], "m").await, "research");
    assert_eq!(pool(routed.port, &[team], "other").await, "research");
    let both = [team, ("x-kv-pool", "partners")];
    assert_eq!(pool(routed.port, &both, "m").await, "research");

    let listener = "  - name: kv_router\n    address:";
    let named = "  - name: kv_router\n    metadata: {filter_metadata: {kv: {pool: partners}}}\n    address:";
    let listening = changed(&stack, "listening", listener, named).await;
    assert_eq!(pool(listening.port, &[], "m").await, "partners");
    stack.idle().await;
}
