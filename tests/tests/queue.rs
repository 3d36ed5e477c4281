//! Requests wait while all workers are busy, and go as the queue's policy says.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _};
use http::Response;
use kv_core::rng::Rng;
use kv_sim::engine::{Config, Engine};
use kv_tests::client::{Client, json_request};
use kv_tests::process::Process;
use kv_tests::stack::{Setup, Stack};
use kv_tests::upstream::Upstream;
use kv_tests::wait;
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// Prompt tokens of every request: one on a worker makes it busy.
const TOKENS: u32 = 200;

/// Workers whose gates are closed, and an Envoy whose requests wait when each has one.
async fn start(threads: u32, workers: u64, queue: Value, more: Value) -> (Stack, Vec<Upstream>) {
    let upstreams = Upstream::start_all(workers).await;
    for upstream in &upstreams {
        upstream.gate.send_replace(false);
    }
    let worker = |(id, upstream): (usize, &Upstream)| json!({"id": id + 1, "endpoint": upstream.address, "max_num_batched_tokens": 1000});
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

/// Sends requests with prompts of their own.
struct Sender {
    port: u16,
    client: Client,
}

impl Sender {
    fn new(stack: &Stack) -> Self {
        Self {
            port: stack.envoy.port,
            client: stack.client.clone(),
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
        let client = self.client.clone();
        tokio::spawn(async move { client.send(request).await.expect("an answer") })
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

/// Waits until the sidecar knows of so many requests at the workers: whom it lets go depends on it.
async fn known(stack: &Stack, wanted: u64) {
    let there = async || {
        let workers = stack.sidecar.workers().await?;
        let owners = workers["pools"][0]["owners"].as_array();
        let waiting = owners.into_iter().flatten().map(|o| &o["load"]["waiting"]);
        let count: u64 = waiting.filter_map(Value::as_u64).sum();
        if count == wanted {
            Ok(())
        } else {
            Err(workers.to_string())
        }
    };
    wait::until("requests that the sidecar knows of", there).await;
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
    known(&stack, 1).await;
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
    // One at a time: tier, deadline, priority, arrival.
    for (task, place) in tasks.into_iter().zip([0, 4, 5, 3, 1, 2]) {
        let answer = task.await.expect("no panic");
        assert_eq!(answer.status(), 200);
        let body: Value = serde_json::from_slice(answer.body()).expect("JSON");
        assert_eq!(body["order"], place, "{body}");
    }
    stack.idle().await;
    stack.envoy.intended().await;
}

/// What a refused request was told.
fn refusal(answer: &Response<Bytes>) -> (u16, String, Value) {
    let header = |name: &str| {
        let value = answer.headers().get(name).expect(name).as_bytes();
        String::from_utf8_lossy(value).into_owned()
    };
    assert_eq!(header("retry-after"), "3");
    let body: Value = serde_json::from_slice(answer.body()).expect("JSON");
    let reason = header("x-kv-router-reason");
    assert_eq!(body["error"]["code"], *reason);
    assert!(body["error"]["message"].is_string() && body["error"]["type"].is_string());
    (answer.status().as_u16(), reason, body["error"].clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_refused_by_limit_deadline_and_busy_threshold() {
    let queue = json!({
        "default_policy_family": "chat",
        "uncached_isl_buckets": [{"bucket": "all"}],
        "policy_classes": [
            {"name": "chat", "policy_family": "chat", "cache_bucket": "all",
             "request_queue_limit_per_worker": 1},
            {"name": "now or never", "raw_isl_token_queue_limit_per_worker": 0},
        ],
    });
    let (mut stack, upstreams) = start(1, 1, queue, json!({"retry_after_secs": 3})).await;
    let sender = Sender::new(&stack);
    let busy = sender.send(1, &[]);
    arrived(&upstreams, 1).await;
    let first = sender.send(2, &[]);
    waiting(&stack, 1).await;

    let second = sender.send(3, &[]).await.expect("no panic");
    let (status, reason, error) = refusal(&second);
    assert_eq!((status, &*reason), (529, "queue_full"));
    let details = json!({"limit_kind": "requests", "current": 1, "limit": 1});
    assert_eq!(error["details"], details);
    let never = [("x-dynamo-meta-policy-class", "now or never")];
    let never = sender.send(4, &never).await.expect("no panic");
    let (status, reason, error) = refusal(&never);
    assert_eq!((status, &*reason), (529, "queue_full"));
    assert_eq!(error["details"]["limit_kind"], "raw_isl_tokens");

    // A client that leaves makes room for another.
    first.abort();
    waiting(&stack, 0).await;
    let late = sender.send(5, &[("x-kv-router-deadline-ms", "300")]);
    let (status, reason, _) = refusal(&late.await.expect("no panic"));
    assert_eq!((status, &*reason), (429, "queue_late"));
    waiting(&stack, 0).await;

    // Thresholds at run time, as Dynamo's frontend has them.
    let admin = stack.sidecar.admin;
    let read = async || stack.client.get(admin, "/busy_threshold").await;
    assert_eq!(read().await.expect("JSON"), json!({"thresholds": []}));
    let version = stack.table_version().await;
    let change = json!({"model": "sim", "active_prefill_tokens_threshold": 150});
    let set = stack.client.post(admin, "/busy_threshold", &change).await;
    let expected = json!({
        "model": "sim",
        "active_decode_blocks_threshold": null,
        "active_prefill_tokens_threshold": 150,
        "active_prefill_tokens_threshold_frac": null,
    });
    assert_eq!(set.expect("JSON"), expected);
    stack.table_after(version).await;
    let only = json!({"model": "sim"});
    let same = stack.client.post(admin, "/busy_threshold", &only);
    assert_eq!(same.await.expect("JSON"), expected);
    for wrong in [
        json!({"model": "sim", "active_decode_blocks_threshold": 2}),
        json!({}),
    ] {
        let answer = stack.client.post(admin, "/busy_threshold", &wrong).await;
        let status = answer.expect_err("a refusal");
        assert!(
            status.starts_with("400") || status.starts_with("422"),
            "{status}"
        );
    }
    let over = sender.send(6, &[]).await.expect("no panic");
    let (status, reason, _) = refusal(&over);
    assert_eq!((status, &*reason), (529, "overloaded"));

    // The configuration says otherwise: the threshold is another, and so is the status.
    let version = stack.table_version().await;
    stack.configure(|config| {
        config["active_prefill_tokens_threshold"] = json!(100_000);
        config["overload_status"] = json!(503);
    });
    stack.table_after(version).await;
    let waits = sender.send(7, &[]);
    waiting(&stack, 1).await;
    let full = sender.send(8, &[]).await.expect("no panic");
    assert_eq!(refusal(&full).0, 503);
    // A higher threshold lets those go who wait.
    stack.configure(|config| config["queue"]["threshold"] = json!(100.0));
    arrived(&upstreams, 2).await;

    open(&upstreams);
    for task in [busy, waits] {
        assert_eq!(task.await.expect("no panic").status(), 200);
    }
    for (reason, count) in [("queue_full", 3), ("queue_late", 1), ("overloaded", 1)] {
        let name = format!("kv_router_refused_total.*{reason}");
        assert_eq!(stack.envoy.total(&name).await, count, "{reason}");
    }
    stack.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_sidecar_those_who_wait_go_in_the_order_they_came() {
    let (mut stack, upstreams) = start(1, 1, json!({}), json!({})).await;
    let sender = Sender::new(&stack);
    let mut tasks = vec![sender.send(1, &[])];
    arrived(&upstreams, 1).await;
    for number in 2..=6 {
        // Priority is the sidecar's to see.
        let priority = number.to_string();
        tasks.push(sender.send(number, &[("x-dynamo-request-priority", &priority)]));
        waiting(&stack, u64::from(number) - 1).await;
    }
    stack.sidecar.process.kill();
    arrived(&upstreams, 6).await;
    // Nobody waits for a sidecar that is not there.
    tasks.push(sender.send(7, &[]));
    arrived(&upstreams, 7).await;
    open(&upstreams);
    for (before, task) in tasks.into_iter().enumerate() {
        let answer = task.await.expect("no panic");
        assert_eq!(answer.status(), 200);
        // One after the other, each has seen those before it booked.
        let decision = answer.headers()["x-kv-router-decision"].as_bytes();
        let decision: Value = serde_json::from_slice(decision).expect("JSON");
        assert_eq!(decision["candidates"][0]["requests"], before, "{decision}");
    }
    assert_eq!(stack.envoy.total("kv_router_held_released_total").await, 5);
    stack.envoy.idle().await;
    stack.sidecar.restart();
    stack.sidecar.ready().await;
    stack.idle().await;
}

/// Statuses of answers, and how often each came.
#[derive(Debug, Default)]
struct Statuses(BTreeMap<u16, u64>);

impl Statuses {
    fn add(&mut self, answer: &Response<Bytes>) {
        *self.0.entry(answer.status().as_u16()).or_default() += 1;
    }

    fn of(&self, status: u16) -> u64 {
        self.0.get(&status).copied().unwrap_or(0)
    }

    fn all(&self) -> u64 {
        self.0.values().sum()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_times_the_load_is_served_by_class_or_refused() {
    let seconds = std::env::var("KV_STORM_SECONDS").ok();
    let seconds = seconds.map_or(6, |s| s.parse().expect("KV_STORM_SECONDS in seconds"));
    let mut engines = Vec::new();
    for worker_id in 1..=3 {
        let mut config = Config {
            worker_id,
            ..Config::default()
        };
        // Some 20 prompts a second each.
        config.limits.prefill_per_token = Duration::from_micros(250);
        engines.push(Engine::start(config).await.expect("an engine"));
    }
    let worker = |e: &Engine| json!({"id": e.worker_id(), "endpoint": e.address(), "max_num_batched_tokens": 1000});
    let queue = json!({
        "threshold": 0.3,
        "max_wait_secs": 3,
        "default_policy_family": "bulk",
        "uncached_isl_buckets": [{"bucket": "all"}],
        "policy_classes": [
            {"name": "bulk", "policy_family": "bulk", "cache_bucket": "all", "quantum": 100,
             "request_queue_limit_per_worker": 100},
            {"name": "vip", "quantum": 300},
        ],
    });
    let setup = Setup {
        threads: 2,
        workers: Vec::new(),
        more: json!({
            "workers": engines.iter().map(worker).collect::<Vec<_>>(),
            "queue": queue,
            "trust_hints": true,
        }),
    };
    let stack = Stack::start(&setup).await;
    let sender = Sender::new(&stack);
    let processes = [&stack.envoy.process, &stack.sidecar.process];
    let (mut number, mut rng, mut memory) = (0, Rng::new(3), None);
    let mut running = FuturesUnordered::new();
    let (mut bulk, mut vip) = (Statuses::default(), Statuses::default());
    let mut pace = tokio::time::interval(Duration::from_millis(20));
    let start = Instant::now();
    let length = Duration::from_secs(seconds);
    while start.elapsed() < length {
        pace.tick().await;
        for _ in 0..12 {
            number += 1;
            let is_vip = number % 24 == 0;
            let class = [("x-dynamo-meta-policy-class", "vip")];
            let task = sender.send(number, if is_vip { &class } else { &[] });
            // Some leave when they have waited for a while.
            let leaves = !is_vip && rng.below(8) == 0;
            let patience = Duration::from_millis(if leaves { 100 } else { 20_000 });
            running.push(async move {
                let abort = task.abort_handle();
                let answer = tokio::time::timeout(patience, task).await;
                abort.abort();
                (is_vip, answer.ok())
            });
        }
        while let Some(Some((is_vip, answer))) = running.next().now_or_never() {
            if let Some(answer) = answer {
                let statuses = if is_vip { &mut vip } else { &mut bulk };
                statuses.add(&answer.expect("no panic"));
            }
        }
        if memory.is_none() && start.elapsed() > length / 2 {
            memory = Some(processes.map(Process::memory));
        }
    }
    let after = processes.map(Process::memory);
    while let Some((is_vip, answer)) = running.next().await {
        if let Some(answer) = answer {
            let statuses = if is_vip { &mut vip } else { &mut bulk };
            statuses.add(&answer.expect("no panic"));
        }
    }
    // Everyone is answered or refused in time, by class, and nobody starves.
    let known = [200, 429, 529].map(|status| bulk.of(status));
    assert_eq!(known.iter().sum::<u64>(), bulk.all(), "{bulk:?}");
    assert!(bulk.of(200) > 0 && bulk.of(529) > bulk.of(200), "{bulk:?}");
    assert_eq!(vip.of(200) + vip.of(429), vip.all(), "{vip:?}");
    assert!(
        vip.of(200) * bulk.all() > 2 * bulk.of(200) * vip.all(),
        "{vip:?} {bulk:?}"
    );
    for (before, after) in memory.expect("the middle").into_iter().zip(after) {
        assert!(
            after < before + before / 2,
            "{before} kB grew to {after} kB"
        );
    }
    waiting(&stack, 0).await;
    stack.idle().await;
}
