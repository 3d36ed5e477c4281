//! The guide's examples do what they say, with nothing but Python's standard library.

use kv_router::config::Config;
use kv_tests::place;
use kv_tests::stack::{Setup, Stack};
use kv_tests::upstream::Upstream;
use serde_json::{Value, json};
use tokio::process::Command;

fn example(name: &str) -> std::path::PathBuf {
    place::root().join("docs/guide/examples").join(name)
}

/// Runs a script and returns its lines.
async fn run(name: &str, arguments: &[&str]) -> Vec<String> {
    let mut command = Command::new("python3");
    command.arg("-B").arg(example(name)).args(arguments);
    let output = command.output().await.expect("python3");
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name}: {told}");
    let lines = String::from_utf8_lossy(&output.stdout);
    lines.lines().map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_select_service_from_python_under_a_policy_of_ones_own() {
    let policy = std::fs::read_to_string(example("policy.yaml")).expect("the example");
    let config = Config::parse(&policy, &[]).expect("a configuration");
    let pool = &config.pools[0];
    let mut upstreams = Vec::new();
    for worker in &pool.workers {
        upstreams.push(Upstream::start(worker.id).await);
    }
    let workers = pool
        .workers
        .iter()
        .zip(&upstreams)
        .map(|(worker, upstream)| {
            let taints = &worker.metadata.taints;
            json!({"id": worker.id, "endpoint": upstream.address, "taints": taints})
        });
    let workers: Vec<Value> = workers.collect();
    let port = place::free_port();
    let weights = &pool.policy;
    let stack = Stack::start(&Setup {
        threads: 1,
        workers: Vec::new(),
        more: json!({
            "policy": "dynamo",
            "models": pool.models,
            "workers": workers,
            "overlap_score_credit": weights.overlap_score_credit,
            "host_cache_hit_weight": weights.host_cache_hit_weight,
            "disk_cache_hit_weight": weights.disk_cache_hit_weight,
            "prefill_load_scale": weights.prefill_load_scale,
            "decode_active_request_weight": weights.decode_active_request_weight,
            "select": {"listen": format!("127.0.0.1:{port}")},
        }),
    })
    .await;
    let select = format!("http://127.0.0.1:{port}");

    let tokens: Vec<u32> = (1..=64).collect();
    let told = run(
        "reserve.py",
        &[&select, "llama-8b", &json!(tokens).to_string()],
    )
    .await;
    let answer: Value = serde_json::from_str(&told[0]).expect("an answer");
    assert!(
        (1..=3).contains(&answer["worker"].as_u64().unwrap_or(0)),
        "{told:?}"
    );
    // It has said that it is over.
    let loads = stack.client.get(port, "/loads").await.expect("loads");
    for load in loads[0]["loads"].as_array().expect("ranks") {
        assert_eq!(load["active_requests"], 0, "{loads}");
    }

    let told = run("constraints.py", &[&select, "llama-8b"]).await;
    let expected = [
        "pinned: 2",
        "allowed: 3",
        "tainted: 3",
        "preferred, while it takes requests: 2",
        "refused: pinned worker 2 is not in allowed worker set",
    ];
    assert_eq!(told, expected);
    stack.idle().await;
}
