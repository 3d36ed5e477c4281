//! The loop closes: engines publish what they cache, and the next request with the same prefix
//! goes to the engine that has it.

use std::collections::HashMap;

use kv_sim::engine::{Config, Engine};
use kv_sim::publish::{Encoding, EventPlane};
use kv_tests::nats::Nats;
use kv_tests::stack::{Setup, Stack};
use serde_json::{Value, json};

fn prompt(conversation: u32, tokens: u32) -> Vec<u32> {
    (0..tokens).map(|i| conversation * 1_000_000 + i).collect()
}

async fn engine(nats: &Nats, worker_id: u64, encoding: Encoding) -> Engine {
    let events = EventPlane {
        url: nats.url(),
        encoding,
    };
    let config = Config {
        worker_id,
        instant: true,
        events: Some(events),
        ..Config::default()
    };
    Engine::start(config).await.expect("an engine starts")
}

fn dynamo() -> Encoding {
    Encoding::Dynamo {
        namespace: "dynamo".to_owned(),
        component: "backend".to_owned(),
        endpoint: "generate".to_owned(),
    }
}

fn json_plane() -> Encoding {
    Encoding::Json {
        subject: "kv-events.{worker_id}".to_owned(),
    }
}

fn cached(answer: &Value) -> u64 {
    answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        .as_u64()
        .unwrap_or(0)
}

/// An installation whose engines were given its NATS before its sidecar knew them.
async fn stack_with_engines(threads: u32, mode: &str) -> (Stack, Vec<Engine>) {
    let setup = Setup {
        threads,
        workers: vec![],
        more: json!({"router_mode": mode}),
    };
    let mut stack = Stack::start(&setup).await;
    let mut engines = Vec::new();
    for id in 1..=4 {
        let encoding = if id % 2 == 0 { dynamo() } else { json_plane() };
        engines.push(engine(&stack.nats, id, encoding).await);
    }
    stack.serve(&engines).await;
    (stack, engines)
}

async fn conversations_stay_where_their_blocks_are(threads: u32) {
    let (stack, _engines) = stack_with_engines(threads, "kv").await;
    let mut homes = HashMap::new();
    for turn in 1..=3 {
        for conversation in 1..=12 {
            let tokens = prompt(conversation, turn * 160);
            let (answer, decision) = stack.complete(&tokens).await.expect("an answer");
            assert_eq!(decision["reason"], "kv", "{decision}");
            let worker = decision["worker"].as_u64().expect("a chosen worker");
            let home = *homes.entry(conversation).or_insert(worker);
            assert_eq!(worker, home, "turn {turn} of {conversation}: {decision}");
            let before = u64::from((turn - 1) * 160);
            assert!(
                cached(&answer) >= before,
                "turn {turn} of {conversation}: {answer}"
            );
            // One request at a time, so that the next one sees what this one stored.
            let held = async || {
                let body = json!({"tokens": tokens});
                let explained = stack
                    .client
                    .post(stack.sidecar.admin, "/v1/explain", &body)
                    .await?;
                let candidates = explained["owners"].as_array().cloned().unwrap_or_default();
                let best = candidates
                    .iter()
                    .filter_map(|c| c["overlap"][0].as_u64())
                    .max();
                let index = stack.sidecar.index().await?;
                if best >= Some(u64::from(turn * 160 / 16)) && index["settled"] == true {
                    Ok(())
                } else {
                    Err(format!("{explained} {index}"))
                }
            };
            kv_tests::wait::until("the stored blocks", held).await;
        }
    }
    let mut spread: HashMap<u64, u32> = HashMap::new();
    homes
        .values()
        .for_each(|w| *spread.entry(*w).or_default() += 1);
    assert!(
        spread.len() >= 3,
        "conversations spread over workers: {spread:?}"
    );
    stack.envoy.idle().await;
    stack.envoy.intended().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn conversations_stay_where_their_blocks_are_on_one_thread() {
    conversations_stay_where_their_blocks_are(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn conversations_stay_where_their_blocks_are_on_four_threads() {
    conversations_stay_where_their_blocks_are(4).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn round_robin_takes_each_worker_in_turn() {
    let (stack, _engines) = stack_with_engines(1, "round-robin").await;
    let mut counts: HashMap<u64, u32> = HashMap::new();
    for _ in 0..20 {
        let (_, decision) = stack.complete(&prompt(1, 64)).await.expect("an answer");
        assert_eq!(decision["reason"], "round-robin");
        *counts
            .entry(decision["worker"].as_u64().expect("a worker"))
            .or_default() += 1;
    }
    assert_eq!(counts, HashMap::from([(1, 5), (2, 5), (3, 5), (4, 5)]));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_mode_changes_without_touching_envoy() {
    let (mut stack, _engines) = stack_with_engines(1, "round-robin").await;
    let version = stack.table_version().await;
    stack.configure(|config| config["router_mode"] = "random".into());
    stack.table_after(version).await;
    let (_, decision) = stack.complete(&prompt(1, 64)).await.expect("an answer");
    assert_eq!(decision["reason"], "random");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_of_a_million_tokens_is_indexed_without_a_gap() {
    let setup = Setup {
        threads: 1,
        workers: vec![],
        more: json!({"router_mode": "round-robin"}),
    };
    let mut stack = Stack::start(&setup).await;
    let mut engines = Vec::new();
    for (id, encoding) in [(1, dynamo()), (2, json_plane())] {
        let events = Some(EventPlane {
            url: stack.nats.url(),
            encoding,
        });
        let blocks = 70_000;
        let config = Config {
            worker_id: id,
            instant: true,
            blocks,
            events,
            ..Config::default()
        };
        engines.push(Engine::start(config).await.expect("an engine starts"));
    }
    stack.serve(&engines).await;
    let tokens: Vec<u32> = (0..1_000_000).collect();
    let (first, second) = tokio::join!(stack.complete(&tokens), stack.complete(&tokens));
    let worker = |r: Result<(Value, Value), String>| r.expect("an answer").1["worker"].clone();
    assert_ne!(worker(first), worker(second));
    let whole = async || {
        let index = stack.sidecar.index().await?;
        let held = index["stats"]["owner_blocks"].as_u64();
        if held >= Some(2 * 62_500) {
            Ok(index)
        } else {
            Err(index.to_string())
        }
    };
    let index = kv_tests::wait::until("all blocks", whole).await;
    assert_eq!(
        (&index["gaps"], &index["repairs"]),
        (&json!(0), &json!(0)),
        "{index}"
    );
}
