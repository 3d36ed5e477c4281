//! Requests wait while all workers are busy, and go as the queue's policy says.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use http::Response;
use kv_tests::client::json_request;
use kv_tests::stack::{Setup, Stack};
use kv_tests::upstream::Upstream;
use kv_tests::wait;
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

/// Prompt tokens of every request: one on a worker makes it busy.
const TOKENS: u32 = 200;

/// Workers whose gates are closed, and an Envoy whose requests wait when each has one.
async fn start(threads: u32, workers: u64, queue: Value, more: Value) -> (Stack, Vec<Upstream>) {
    let mut upstreams = Vec::new();
    for id in 1..=workers {
        let upstream = Upstream::start(id).await;
        upstream.gate.send_replace(false);
        upstreams.push(upstream);
    }
    let worker = |(id, upstream): (usize, &Upstream)| {
        json!({"id": id + 1, "endpoint": upstream.address, "max_num_batched_tokens": 1000})
    };
    let workers: Vec<Value> = upstreams.iter().enumerate().map(worker).collect();
    let mut all = json!({
        "workers": workers,
        "queue": {"threshold": 0.1, "max_wait_secs": 60},
        "trust_hints": true,
    });
    merge(&mut all, &json!({"queue": queue}));
    merge(&mut all, &more);
    let setup = Setup {
        threads,
        workers: Vec::new(),
        more: all,
    };
    (Stack::start(&setup).await, upstreams)
}

fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from.clone(),
    }
}

/// A request of its own prompt, as a task, that notes its number when it is answered.
struct Sender {
    port: u16,
    client: kv_tests::client::Client,
    answered: Arc<Mutex<Vec<u32>>>,
}

impl Sender {
    fn new(stack: &Stack) -> Self {
        Self {
            port: stack.envoy.port,
            client: stack.client.clone(),
            answered: Arc::default(),
        }
    }

    fn send(&self, number: u32, headers: &[(&'static str, &str)]) -> JoinHandle<Response<Bytes>> {
        let prompt: Vec<u32> = (0..TOKENS).map(|i| number * 1000 + i).collect();
        let body = json!({"model": "sim", "prompt": prompt, "max_tokens": 1});
        let mut request = json_request(self.port, "/v1/completions", &body).expect("a request");
        for (name, value) in headers {
            let value = http::HeaderValue::from_str(value).expect("a header");
            request.headers_mut().insert(*name, value);
        }
        let (client, answered) = (self.client.clone(), Arc::clone(&self.answered));
        tokio::spawn(async move {
            let answer = client.send(request).await.expect("an answer");
            answered.lock().await.push(number);
            answer
        })
    }
}

/// Waits until so many requests wait in the queue, over all classes.
async fn waiting(stack: &Stack, wanted: u64) {
    let there = async || {
        let queues = stack.client.get(stack.sidecar.admin, "/v1/queue").await?;
        let classes = queues[0]["classes"].as_array().into_iter().flatten();
        let depth: u64 = classes.filter_map(|c| c["requests"].as_u64()).sum();
        if depth == wanted {
            Ok(())
        } else {
            Err(queues.to_string())
        }
    };
    wait::until("requests in the queue", there).await;
}

/// Waits until so many requests have reached the workers.
async fn arrived(upstreams: &[Upstream], wanted: u64) {
    let there = async || {
        let counts = upstreams.iter().map(|u| u.requests.load(Ordering::Relaxed));
        let count: u64 = counts.sum();
        if count == wanted { Ok(()) } else { Err(count) }
    };
    wait::until("requests at the workers", there).await;
}

fn open(upstreams: &[Upstream]) {
    for upstream in upstreams {
        upstream.gate.send_replace(true);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_wait_and_go_by_tier_and_priority() {
    let (stack, upstreams) = start(2, 1, json!({}), json!({})).await;
    let sender = Sender::new(&stack);
    let mut tasks = vec![sender.send(1, &[])];
    arrived(&upstreams, 1).await;
    let later: [&[(&'static str, &str)]; 5] = [
        &[],
        &[("x-dynamo-request-priority", "0")],
        &[("x-dynamo-request-priority", "900")],
        &[("x-dynamo-request-strict-priority", "1")],
        &[("x-kv-router-deadline-ms", "50000")],
    ];
    for (number, headers) in (2..).zip(later) {
        tasks.push(sender.send(number, headers));
        waiting(&stack, u64::from(number) - 1).await;
    }
    assert_eq!(upstreams[0].requests.load(Ordering::Relaxed), 1);
    open(&upstreams);
    for task in tasks {
        assert_eq!(task.await.expect("no panic").status(), 200);
    }
    // Tier, deadline, priority, arrival.
    assert_eq!(*sender.answered.lock().await, [1, 5, 6, 4, 2, 3]);
    stack.idle().await;
    stack.envoy.intended().await;
}
