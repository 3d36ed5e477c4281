//! Workers that fail are left out, by the filters' word and the sidecar's decision, and come back.

use kv_tests::client::json_request;
use kv_tests::rude::{Manner, Rude};
use kv_tests::stack::{Setup, Stack};
use kv_tests::wait;
use serde_json::{Value, json};

async fn start(workers: u64) -> (Stack, Vec<Rude>) {
    start_with(workers, json!({})).await
}

async fn start_with(workers: u64, more: Value) -> (Stack, Vec<Rude>) {
    let mut keys = json!({"router_mode": "least-loaded"});
    keys.as_object_mut()
        .expect("a map")
        .extend(more.as_object().expect("a map").clone());
    let mut rude = Vec::new();
    for id in 1..=workers {
        rude.push(Rude::start(id).await);
    }
    let workers = (1..).zip(rude.iter().map(|r| r.address)).collect();
    let stack = Stack::start(&Setup {
        threads: 2,
        workers,
        more: keys,
    })
    .await;
    (stack, rude)
}

/// Sends a request and returns the answer's status and the worker that the filter chose.
async fn send(stack: &Stack, i: u32) -> (u16, Value) {
    let body = json!({"model": "sim", "prompt": [i, 2, 3], "stream": true});
    let request = json_request(stack.envoy.port, "/v1/completions", &body);
    let answer = stack.client.send(request.expect("a request")).await;
    let answer = answer.expect("an answer");
    let record = answer.headers().get("x-kv-router-decision");
    let record = record.and_then(|r| serde_json::from_slice::<Value>(r.as_bytes()).ok());
    (answer.status().as_u16(), record.unwrap_or(Value::Null))
}

/// The workers that take requests.
async fn accepting(stack: &Stack) -> Result<Vec<u64>, String> {
    let workers = stack.sidecar.workers().await?;
    let owners = workers["pools"][0]["owners"].as_array().cloned();
    let owners = owners.unwrap_or_default().into_iter();
    let accepting = owners.filter(|owner| owner["accepting"] == true);
    Ok(accepting.filter_map(|o| o["worker"].as_u64()).collect())
}

/// Waits until Envoy knows that just these workers take requests.
async fn until_accepting(stack: &Stack, expected: &[u64]) {
    let is_so = async || {
        let accepting = accepting(stack).await?;
        let index = stack.sidecar.index().await?;
        let done = accepting == expected && index["settled"] == true;
        if done {
            Ok(())
        } else {
            Err(format!("{accepting:?} {index}"))
        }
    };
    wait::until("the workers that take requests", is_so).await;
}

/// Sends requests until the filter's failures are as many as this, and none any more.
async fn until_failed(stack: &Stack, failures: u64) {
    let mut i = 0;
    let failed = async || {
        send(stack, i).await;
        i += 1;
        let now = stack.envoy.total("kv_router_worker_failures_total").await;
        if now >= failures { Ok(()) } else { Err(now) }
    };
    wait::until("failures", failed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_gone_is_left_out_no_request_fails_and_it_comes_back() {
    let (stack, mut rude) = start(3).await;
    rude[1].go().await;
    let mut i = 0;
    let left_out = async || {
        i += 1;
        assert_eq!(send(&stack, i).await.0, 200, "another worker takes it");
        let accepting = accepting(&stack).await?;
        if accepting == [1, 3] {
            Ok(())
        } else {
            Err(format!("{accepting:?}"))
        }
    };
    wait::until("the worker to be left out", left_out).await;
    until_accepting(&stack, &[1, 3]).await;
    let failures = stack.envoy.total("kv_router_worker_failures_total").await;
    assert!(
        (1..=3).contains(&failures),
        "left out after {failures} failures"
    );
    for i in 0..40 {
        let (status, record) = send(&stack, i).await;
        assert_eq!(status, 200);
        assert_ne!(record["worker"], 2, "{record}");
    }
    rude[1].come_back().await;
    until_accepting(&stack, &[1, 2, 3]).await;
    let again = async || {
        let (_, record) = send(&stack, 0).await;
        if record["worker"] == 2 {
            Ok(())
        } else {
            Err(record)
        }
    };
    wait::until("a request for the worker", again).await;
    stack.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_answers_errors_is_left_out_after_three_and_given_another_chance() {
    let (stack, rude) = start(3).await;
    rude[0].manner.send_replace(Manner::Error);
    until_failed(&stack, 3).await;
    until_accepting(&stack, &[2, 3]).await;
    rude[0].manner.send_replace(Manner::Serve);
    until_accepting(&stack, &[1, 2, 3]).await;
    stack.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_breaks_off_its_answers_is_left_out() {
    let (stack, rude) = start(3).await;
    rude[2].manner.send_replace(Manner::Break);
    let body = json!({"model": "sim", "prompt": [1, 2, 3], "stream": true});
    let broken = async || {
        let request = json_request(stack.envoy.port, "/v1/completions", &body);
        let _ = stack.client.send(request.expect("a request")).await;
        let accepting = accepting(&stack).await?;
        if accepting == [1, 2] {
            Ok(())
        } else {
            Err(format!("{accepting:?}"))
        }
    };
    wait::until("the worker to be left out", broken).await;
    stack.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn half_of_the_workers_stay_though_all_answer_errors() {
    let (stack, rude) = start(4).await;
    for rude in &rude {
        rude.manner.send_replace(Manner::Error);
    }
    let two_left = async || {
        for i in 0..12 {
            send(&stack, i).await;
        }
        let accepting = accepting(&stack).await?;
        if accepting.len() == 2 {
            Ok(())
        } else {
            Err(format!("{accepting:?}"))
        }
    };
    wait::until("two workers to be left out", two_left).await;
    for i in 0..20 {
        assert_eq!(send(&stack, i).await.0, 500);
    }
    assert!(accepting(&stack).await.expect("an answer").len() >= 2);
    stack.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_worker_alone_is_never_left_out() {
    let (stack, mut rude) = start(1).await;
    rude[0].go().await;
    for i in 0..5 {
        assert_eq!(send(&stack, i).await.0, 503);
    }
    until_failed(&stack, 5).await;
    assert_eq!(accepting(&stack).await, Ok(vec![1]));
    rude[0].come_back().await;
    let served = async || {
        let (status, _) = send(&stack, 0).await;
        if status == 200 { Ok(()) } else { Err(status) }
    };
    wait::until("an answer", served).await;
    stack.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_that_say_they_are_unwell_are_left_out_before_a_request_fails_down_to_the_floor() {
    let check = json!({"interval_secs": 0.1, "timeout_secs": 10, "unwell_after": 2});
    let more = json!({"health_check": check, "eject_floor": 0.75});
    let (stack, rude) = start_with(4, more).await;
    rude[1].manner.send_replace(Manner::Error);
    until_accepting(&stack, &[1, 3, 4]).await;
    for i in 0..20 {
        assert_eq!(send(&stack, i).await.0, 200);
    }
    // The others have to stay.
    for rude in &rude {
        rude.manner.send_replace(Manner::Error);
    }
    let spared = async || {
        let metrics = stack.sidecar.metrics().await?;
        let spared = "kv_router_worker_changes_total{kind=\"spared\"}";
        let accepting = accepting(&stack).await?;
        assert_eq!(accepting.len(), 3, "{accepting:?}");
        if metrics.contains(spared) {
            Ok(())
        } else {
            Err(accepting.len().to_string())
        }
    };
    wait::until("workers to be spared", spared).await;
    for rude in &rude {
        rude.manner.send_replace(Manner::Serve);
    }
    until_accepting(&stack, &[1, 2, 3, 4]).await;
    stack.idle().await;
}
