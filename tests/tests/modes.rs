//! The modes direct and device-aware-weighted, through Envoy.

use std::sync::atomic::Ordering;

use http::Request;
use http_body_util::Full;
use kv_tests::client::{json_request, uri};
use kv_tests::stack::{Setup, Stack};
use kv_tests::upstream::{self, Upstream};
use kv_tests::wait;
use serde_json::{Value, json};

async fn start(workers: u64, more: Value) -> (Stack, Vec<Upstream>) {
    let upstreams = Upstream::start_all(workers).await;
    let workers = upstream::workers(&upstreams);
    let stack = Stack::start(&Setup {
        threads: 2,
        workers,
        more,
    })
    .await;
    (stack, upstreams)
}

/// Sends a completion that names a worker by header and returns the answer's status and body.
async fn send(port: u16, stack: &Stack, worker: Option<&str>, nvext: Value) -> (u16, Value) {
    let body = json!({"model": "sim", "prompt": [1, 2, 3], "nvext": nvext});
    let mut request = json_request(port, "/v1/completions", &body).expect("a request");
    if let Some(worker) = worker {
        let name = http::HeaderName::from_static("x-dynamo-worker-instance-id");
        let worker = worker.parse().expect("a header's value");
        request.headers_mut().insert(name, worker);
    }
    let answer = stack.client.send(request).await.expect("an answer");
    let body = serde_json::from_slice(answer.body()).expect("JSON");
    (answer.status().as_u16(), body)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trusted_request_goes_to_the_worker_it_names() {
    let more = json!({"router_mode": "direct", "trust_hints": true});
    let (stack, _upstreams) = start(3, more).await;
    let port = stack.envoy.port;
    for i in 0..12_u64 {
        let worker = 1 + i % 3;
        let (status, answer) = if i % 2 == 0 {
            send(port, &stack, Some(&worker.to_string()), Value::Null).await
        } else {
            let nvext = json!({"backend_instance_id": worker});
            send(port, &stack, None, nvext).await
        };
        assert_eq!((status, &answer["worker"]), (200, &worker.into()));
    }
    let (status, answer) = send(port, &stack, None, Value::Null).await;
    assert_eq!(
        (status, &answer["error"]["code"]),
        (400, &"worker_missing".into())
    );
    let (status, answer) = send(port, &stack, Some("77"), Value::Null).await;
    assert_eq!(
        (status, &answer["error"]["code"]),
        (400, &"worker_unknown".into())
    );
    let message = answer["error"]["message"].as_str().unwrap_or_default();
    assert!(
        message.contains("77 does not identify a known worker"),
        "{message}"
    );
    // What is not for generation is sent to any.
    let request = Request::get(uri(port, "/v1/models")).body(Full::default());
    let answer = stack.client.send(request.expect("a request")).await;
    assert_eq!(answer.expect("an answer").status(), 200);
    assert_eq!(stack.envoy.total("kv_router_refused_total").await, 2);
    stack.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_route_that_says_so_trusts_its_clients() {
    let (stack, _upstreams) = start(3, json!({"router_mode": "direct"})).await;
    let (status, answer) = send(stack.envoy.port, &stack, Some("2"), Value::Null).await;
    assert_eq!(
        (status, &answer["error"]["code"]),
        (403, &"hint_untrusted".into())
    );
    // Another Envoy whose routes carry the metadata.
    let file = stack.dir().join("envoy.yaml");
    let bootstrap = std::fs::read_to_string(&file).expect("a bootstrap");
    let route = "- match: {prefix";
    assert!(bootstrap.contains(route));
    let trust =
        "- metadata: {filter_metadata: {kv: {trust: hints}}}\n                match: {prefix";
    std::fs::write(&file, bootstrap.replace(route, trust)).expect("a writable directory");
    let trusting = stack.another_envoy("second", 1, |filter| filter).await;
    for worker in 1..=3_u64 {
        let named = worker.to_string();
        let (status, answer) = send(trusting.port, &stack, Some(&named), Value::Null).await;
        assert_eq!((status, &answer["worker"]), (200, &worker.into()));
    }
    stack.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_divide_by_device() {
    let upstreams = Upstream::start_all(3).await;
    let worker = |(id, upstream): (u64, &Upstream)| {
        let device = if id == 3 { "cpu" } else { "accelerator" };
        json!({"id": id, "endpoint": upstream.address, "device": device})
    };
    let workers: Vec<Value> = (1..).zip(&upstreams).map(worker).collect();
    let more = json!({
        "router_mode": "device-aware-weighted",
        "encoder_cuda_to_cpu_ratio": 4,
        "workers": workers,
    });
    let stack = Stack::start(&Setup {
        threads: 2,
        workers: Vec::new(),
        more,
    })
    .await;
    for upstream in &upstreams {
        upstream.gate.send_replace(false);
    }
    let counts = || {
        let counts = upstreams.iter();
        let counts: Vec<u64> = counts.map(|u| u.requests.load(Ordering::Relaxed)).collect();
        counts
    };
    let before = counts();
    let mut running = Vec::new();
    for i in 0..18_u64 {
        let body = json!({"model": "sim", "prompt": [i, 2, 3]});
        let request = json_request(stack.envoy.port, "/v1/completions", &body);
        let (client, request) = (stack.client.clone(), request.expect("a request"));
        running.push(tokio::spawn(async move { client.send(request).await }));
        let arrived = async || {
            let now: u64 = counts().iter().sum::<u64>() - before.iter().sum::<u64>();
            if now > i { Ok(()) } else { Err(now) }
        };
        wait::until("the request at a worker", arrived).await;
    }
    let spread: Vec<u64> = counts().iter().zip(&before).map(|(n, b)| n - b).collect();
    assert_eq!(spread, [8, 8, 2]);
    for upstream in &upstreams {
        upstream.gate.send_replace(true);
    }
    for request in running {
        request.await.expect("a task").expect("an answer");
    }
    stack.idle().await;
}
