//! The filter decides on approximations of the truth, and is checked against it all the time.

use futures::stream::{self, StreamExt as _};
use kv_sim::engine::{Config, Engine};
use kv_sim::publish::{Encoding, EventPlane};
use kv_tests::client::json_request;
use kv_tests::stack::{Setup, Stack};
use kv_tests::verdicts::Verdicts;
use kv_tests::wait;
use serde_json::{Value, json};

const REQUESTS: usize = 2000;

/// Turn by turn of sixty conversations below four system prompts.
fn prompt(request: usize) -> Vec<u32> {
    let (conversation, turn) = (request % 60, request / 60);
    let (system, length) = (conversation % 4, 320 + 32 * turn);
    let token = |i: usize| {
        if i < 256 {
            system * 10_000 + i
        } else {
            conversation * 1_000_000 + i
        }
    };
    (0..length)
        .map(|i| u32::try_from(token(i)).expect("a token id"))
        .collect()
}

async fn start(threads: u32, instant: bool) -> (Stack, Vec<Engine>) {
    let mut stack = Stack::start(&Setup {
        threads,
        workers: vec![],
        more: json!({"policy": "dynamo"}),
    })
    .await;
    let mut engines = Vec::new();
    for worker_id in 1..=4 {
        let encoding = Encoding::Json {
            subject: "kv-events.{worker_id}".to_owned(),
        };
        let events = Some(EventPlane {
            url: stack.nats.url(),
            encoding,
        });
        let config = Config {
            worker_id,
            instant,
            blocks: 6000,
            events,
            ..Config::default()
        };
        engines.push(Engine::start(config).await.expect("an engine starts"));
    }
    stack.serve(&engines).await;
    (stack, engines)
}

/// The record's first candidate is the chosen one and the cheapest of those listed.
fn is_least(record: &Value) -> bool {
    let candidates = record["candidates"].as_array().expect("candidates");
    let costs: Vec<f64> = candidates
        .iter()
        .filter_map(|c| c["cost"].as_f64())
        .collect();
    let least = costs.iter().copied().fold(f64::INFINITY, f64::min);
    candidates[0]["worker"] == record["worker"] && costs[0] <= least + 1e-9
}

async fn one_at_a_time(threads: u32) {
    let (stack, _engines) = start(threads, true).await;
    for request in 0..REQUESTS {
        // What the last one stored is visible before the next is sent.
        let quiet = async || {
            let index = stack.sidecar.index().await?;
            if index["settled"] == true {
                Ok(())
            } else {
                Err(index.to_string())
            }
        };
        wait::until("a settled index", quiet).await;
        let (_, record) = stack.complete(&prompt(request)).await.expect("an answer");
        assert!(is_least(&record), "{record}");
    }
    let verdicts = Verdicts::of(&stack.sidecar, REQUESTS as u64).await;
    verdicts.agree(100);
    stack.envoy.intended().await;
    stack.envoy.idle().await;
}

async fn thirty_two_at_a_time(threads: u32) {
    let (stack, _engines) = start(threads, false).await;
    let send = async |request: usize| {
        let body = json!({"model": "sim", "prompt": prompt(request), "max_tokens": 16});
        let http = json_request(stack.envoy.port, "/v1/completions", &body).expect("a request");
        let answer = stack.client.send(http).await.expect("an answer");
        assert_eq!(answer.status(), 200);
        let record = &answer.headers()["x-kv-router-decision"];
        let record: Value = serde_json::from_slice(record.as_bytes()).expect("a record");
        assert!(is_least(&record), "{record}");
    };
    stream::iter(0..REQUESTS)
        .map(send)
        .buffer_unordered(32)
        .collect::<Vec<()>>()
        .await;
    // A report under way to a bridge that is replaced is lost, and its decisions with it.
    let verdicts = Verdicts::of(&stack.sidecar, REQUESTS as u64 * 98 / 100).await;
    verdicts.agree(98);
    stack.envoy.intended().await;
    stack.envoy.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_request_at_a_time_agrees_with_the_exact_state_on_one_thread() {
    one_at_a_time(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_request_at_a_time_agrees_with_the_exact_state_on_four_threads() {
    one_at_a_time(4).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_requests_at_a_time_agree_with_the_exact_state_on_one_thread() {
    thirty_two_at_a_time(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_requests_at_a_time_agree_with_the_exact_state_on_four_threads() {
    thirty_two_at_a_time(4).await;
}
