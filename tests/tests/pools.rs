//! Several pools on one listener; LoRA adapters and cache salts keep their blocks apart.

use kv_core::event::StorageTier;
use kv_core::hash::Seed;
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
