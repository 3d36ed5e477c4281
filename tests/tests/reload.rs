//! What decides changes in the file while requests run, and Envoy is left alone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kv_core::event::StorageTier;
use kv_core::hash::Seed;
use kv_tests::client::{Client, json_request};
use kv_tests::events::{Encoding, Publisher, stored};
use kv_tests::stack::{Setup, Stack};
use kv_tests::upstream::{self, Upstream};
use kv_tests::wait;
use serde_json::{Value, json};

fn prompt(conversation: u32) -> Vec<u32> {
    (0..320).map(|i| conversation * 1000 + i).collect()
}

async fn start() -> (Stack, Vec<Upstream>) {
    let upstreams = Upstream::start_all(2).await;
    let workers = upstream::workers(&upstreams);
    let setup = Setup {
        threads: 2,
        workers,
        more: json!({}),
    };
    (Stack::start(&setup).await, upstreams)
}

/// Changes the file and waits until Envoy has the table.
async fn change(stack: &mut Stack, change: impl FnOnce(&mut Value)) {
    let version = stack.table_version().await;
    stack.configure(change);
    stack.table_after(version).await;
}

async fn decision(stack: &Stack, tokens: &[u32]) -> Value {
    stack.complete(tokens).await.expect("an answer").1
}

/// Waits for a decision about a prompt that is as it should be.
async fn decided(stack: &Stack, tokens: &[u32], what: &str, is: impl Fn(&Value) -> bool) -> Value {
    let right = async || {
        let decision = decision(stack, tokens).await;
        if is(&decision) {
            Ok(decision)
        } else {
            Err(decision)
        }
    };
    wait::until(what, right).await
}

/// The candidate with a worker's number.
fn candidate(decision: &Value, worker: u64) -> &Value {
    let candidates = decision["candidates"].as_array().expect("candidates");
    let found = candidates.iter().find(|c| c["worker"] == worker);
    found.unwrap_or_else(|| panic!("{decision}"))
}

fn overlap(decision: &Value, worker: u64) -> u64 {
    candidate(decision, worker)["overlap"][0]
        .as_u64()
        .expect("blocks")
}

/// What Envoy counts when its configuration changes, and the files that it watches.
async fn untouched(stack: &Stack) -> (BTreeMap<String, u64>, BTreeMap<String, String>) {
    let names = "(config_reload|listener_modified|cluster_modified|cluster_added|update_success)$";
    let stats = stack.envoy.stats(names).await.expect("stats");
    let folder = std::fs::read_dir(stack.dir().join("state/envoy")).expect("a folder");
    let files = folder.map(|file| {
        let path = file.expect("a file").path();
        let text = std::fs::read_to_string(&path).expect("a text");
        (path.to_string_lossy().into_owned(), text)
    });
    (stats.into_iter().collect(), files.collect())
}

/// Sends requests until told to stop; returns how many, and each that did not go as it should.
async fn traffic(client: Client, port: u16, stop: Arc<AtomicBool>) -> (u32, Vec<String>) {
    let (mut sent, mut wrong) = (0, Vec::new());
    while !stop.load(Ordering::Relaxed) {
        sent += 1;
        let body = json!({"model": "sim", "prompt": prompt(10_000 + sent), "max_tokens": 1});
        let request = json_request(port, "/v1/completions", &body).expect("a request");
        match client.send(request).await {
            Ok(answer) if answer.status() == 200 => {
                let decision = answer.headers().get("x-kv-router-decision");
                let decision: Value = decision
                    .and_then(|d| serde_json::from_slice(d.as_bytes()).ok())
                    .unwrap_or_default();
                let workers = decision["candidates"].as_array().map_or(0, Vec::len);
                if workers != 2 {
                    wrong.push(decision.to_string());
                }
            }
            Ok(answer) => wrong.push(answer.status().to_string()),
            Err(error) => wrong.push(error),
        }
    }
    (sent, wrong)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_decides_changes_while_requests_run_and_envoy_is_left_alone() {
    let (mut stack, upstreams) = start().await;
    let mut publisher = Publisher::connect(&stack.nats.url()).await;
    let known = stored(&prompt(1), 16, Seed::default());
    publisher
        .publish(1, StorageTier::Device, known, Encoding::Dynamo)
        .await;
    stack.sidecar.settled(1).await;
    let before = untouched(&stack).await;
    let stop = Arc::new(AtomicBool::new(false));
    let requests = traffic(stack.client.clone(), stack.envoy.port, Arc::clone(&stop));
    let requests = tokio::spawn(requests);

    // What is compared, and its weights.
    change(&mut stack, |config| config["policy"] = json!("dynamo")).await;
    let cost = |d: &Value, worker| candidate(d, worker)["prefill_cost"].as_f64();
    // A request of the others may be under way on the one that holds the prompt.
    let is_in_blocks = |d: &Value| {
        let costs = cost(d, 1).zip(cost(d, 2));
        costs.is_some_and(|(held, not)| held + 10.0 < not)
    };
    let decision = decided(&stack, &prompt(1), "costs in blocks", is_in_blocks).await;
    assert_eq!(overlap(&decision, 1), 20, "{decision}");
    change(&mut stack, |config| config["prefill_load_scale"] = json!(0)).await;
    let is_free = |d: &Value| cost(d, 1) == Some(0.0) && cost(d, 2) == Some(0.0);
    decided(&stack, &prompt(1), "prefill that costs nothing", is_free).await;

    // Modes.
    for mode in ["random", "round-robin", "kv"] {
        change(&mut stack, |config| config["router_mode"] = json!(mode)).await;
        decided(&stack, &prompt(1), mode, |d| d["reason"] == mode).await;
    }

    stop.store(true, Ordering::Relaxed);
    let (sent, wrong) = requests.await.expect("a task");
    assert!(sent > 0 && wrong.is_empty(), "{sent} sent: {wrong:?}");

    // How load is tracked.
    assert_eq!(blocks_of_one_request(&stack, &upstreams, 2).await, 20);
    change(&mut stack, |config| {
        config["router_track_active_blocks"] = json!(false);
    })
    .await;
    assert_eq!(blocks_of_one_request(&stack, &upstreams, 3).await, 0);

    // Block sizes: what was known is forgotten, and what follows is read in the other size.
    change(&mut stack, |config| {
        config["kv_cache_block_size"] = json!(32);
    })
    .await;
    decided(&stack, &prompt(1), "an index begun anew", |d| {
        d["blocks"] == 10 && overlap(d, 1) == 0
    })
    .await;
    let known = stored(&prompt(1), 32, Seed::default());
    publisher
        .publish(1, StorageTier::Device, known, Encoding::Dynamo)
        .await;
    decided(&stack, &prompt(1), "larger blocks", |d| overlap(d, 1) == 10).await;

    // Without events what was sent is predicted.
    change(&mut stack, |config| config["kv_events"] = json!(false)).await;
    let first = decision_of(&stack, 9).await;
    decided(&stack, &prompt(9), "a prediction", |d| {
        overlap(d, first) == 10
    })
    .await;

    assert_eq!(untouched(&stack).await, before);
    stack.idle().await;
    stack.envoy.intended().await;
}

/// The blocks that count as load while one request runs.
async fn blocks_of_one_request(stack: &Stack, upstreams: &[Upstream], conversation: u32) -> u64 {
    stack.idle().await;
    for upstream in upstreams {
        upstream.gate.send_replace(false);
    }
    let body = json!({"model": "sim", "prompt": prompt(conversation), "max_tokens": 1});
    let request = json_request(stack.envoy.port, "/v1/completions", &body);
    let (client, request) = (stack.client.clone(), request.expect("a request"));
    let running = tokio::spawn(async move { client.send(request).await });
    let booked = async || {
        let workers = stack.sidecar.workers().await?;
        let mut loads = Vec::new();
        loads_of(&workers, &mut loads);
        let sum = |key: &str| {
            loads
                .iter()
                .filter_map(|load| load[key].as_u64())
                .sum::<u64>()
        };
        if sum("waiting") + sum("decoding") == 1 {
            Ok(sum("blocks"))
        } else {
            Err(workers.to_string())
        }
    };
    let blocks = wait::until("the request", booked).await;
    for upstream in upstreams {
        upstream.gate.send_replace(true);
    }
    running.await.expect("a task").expect("an answer");
    blocks
}

/// Loads of the workers in an answer.
fn loads_of<'v>(value: &'v Value, into: &mut Vec<&'v Value>) {
    match value {
        Value::Object(map) => {
            into.extend(map.get("load"));
            map.values().for_each(|value| loads_of(value, into));
        }
        Value::Array(list) => list.iter().for_each(|value| loads_of(value, into)),
        _ => {}
    }
}

async fn decision_of(stack: &Stack, conversation: u32) -> u64 {
    let decision = decision(stack, &prompt(conversation)).await;
    decision["worker"].as_u64().expect("a worker")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_or_needs_a_restart_is_told_and_the_rest_goes_on() {
    let (mut stack, _upstreams) = start().await;
    let refused = r#"kv_router_config_reloads_total{kind="refused"}"#;
    let pending = "kv_router_configuration_pending";
    let version = stack.table_version().await;
    stack.configure(|config| config["router_temperature"] = json!(-1));
    let counted = async || match stack.sidecar.metric(refused).await {
        1 => Ok(()),
        n => Err(n),
    };
    wait::until("the refusal", counted).await;
    assert_eq!(stack.sidecar.metric(pending).await, 1);
    let log = stack.sidecar.process.output();
    assert!(
        log.contains("router_temperature: must be at least 0"),
        "{log}"
    );
    assert_eq!(stack.table_version().await, version);
    assert_eq!(decision(&stack, &prompt(1)).await["reason"], "kv");

    // The mode is taken over, and the port is not.
    let port = stack.config["http_port"].clone();
    change(&mut stack, |config| {
        config["router_temperature"] = json!(0);
        config["router_mode"] = json!("random");
        config["http_port"] = json!(1);
    })
    .await;
    decided(&stack, &prompt(1), "the mode", |d| d["reason"] == "random").await;
    assert_eq!(stack.sidecar.metric(pending).await, 1);
    let log = stack.sidecar.process.output();
    assert!(
        log.contains("a change of http_port needs a restart"),
        "{log}"
    );

    stack.configure(|config| config["http_port"] = port);
    let in_effect = async || match stack.sidecar.metric(pending).await {
        0 => Ok(()),
        n => Err(n),
    };
    wait::until("a file that is in effect", in_effect).await;
}
