//! Load is seen by every thread and every proxy at once, and returns to zero.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use futures::future::join_all;
use kv_tests::client::json_request;
use kv_tests::stack::{Setup, Stack, collect_loads};
use kv_tests::upstream::{self, Upstream};
use kv_tests::wait;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

async fn start(threads: u32, workers: u64, more: Value) -> (Stack, Vec<Upstream>) {
    let upstreams = Upstream::start_all(workers).await;
    let workers = upstream::workers(&upstreams);
    (
        Stack::start(&Setup {
            threads,
            workers,
            more,
        })
        .await,
        upstreams,
    )
}

fn prompt(request: u32) -> Vec<u32> {
    (0..200).map(|i| request * 1000 + i).collect()
}

fn counts(upstreams: &[Upstream]) -> Vec<u64> {
    upstreams
        .iter()
        .map(|u| u.requests.load(Ordering::Relaxed))
        .collect()
}

fn hold(upstreams: &[Upstream]) {
    upstreams.iter().for_each(|u| {
        u.gate.send_replace(false);
    });
}

fn open(upstreams: &[Upstream]) {
    upstreams.iter().for_each(|u| {
        u.gate.send_replace(true);
    });
}

/// Sends requests at once and returns how many each worker got, before any is answered.
async fn burst(stack: &Stack, ports: &[u16], upstreams: &[Upstream], requests: u32) -> Vec<u64> {
    hold(upstreams);
    let before: u64 = counts(upstreams).iter().sum();
    let send = async |i: u32| {
        let body = json!({"model": "sim", "prompt": prompt(i), "max_tokens": 1});
        let port = ports[i as usize % ports.len()];
        let request = json_request(port, "/v1/completions", &body).expect("a request");
        stack.client.send(request).await.expect("an answer")
    };
    let start = counts(upstreams);
    let all = join_all((0..requests).map(send));
    let arrived = async {
        let all_there = async || {
            let now: u64 = counts(upstreams).iter().sum();
            if now - before == u64::from(requests) {
                Ok(())
            } else {
                Err(now)
            }
        };
        wait::until("all requests at the workers", all_there).await;
        let now = counts(upstreams);
        open(upstreams);
        now
    };
    let (_, now) = tokio::join!(all, arrived);
    now.iter()
        .zip(start)
        .map(|(now, start)| now - start)
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_at_once_spread_evenly_over_threads() {
    let (stack, upstreams) = start(4, 8, json!({})).await;
    for _ in 0..3 {
        let spread = burst(&stack, &[stack.envoy.port], &upstreams, 64).await;
        assert!(spread.iter().all(|n| (7..=9).contains(n)), "{spread:?}");
        stack.idle().await;
    }
    stack.envoy.intended().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_at_once_spread_evenly_over_two_proxies() {
    let (stack, upstreams) = start(2, 8, json!({})).await;
    let other = stack.another_envoy("second", 2, |filter| filter).await;
    for _ in 0..3 {
        let ports = [stack.envoy.port, other.port];
        let spread = burst(&stack, &ports, &upstreams, 64).await;
        assert!(spread.iter().all(|n| (6..=10).contains(n)), "{spread:?}");
        stack.idle().await;
    }
    stack.envoy.intended().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_sees_what_another_booked() {
    // By blocks: a request that is taken to decode delays another by less than two milliseconds.
    let (stack, upstreams) = start(1, 2, json!({"policy": "dynamo"})).await;
    let other = stack.another_envoy("second", 1, |filter| filter).await;
    hold(&upstreams);
    let send = |port: u16, i: u32| {
        let body = json!({"model": "sim", "prompt": prompt(i), "max_tokens": 1});
        let request = json_request(port, "/v1/completions", &body).expect("a request");
        let client = stack.client.clone();
        tokio::spawn(async move { client.send(request).await.expect("an answer") })
    };
    let start = counts(&upstreams);
    let first = send(stack.envoy.port, 1);
    let known = async || {
        let workers = stack.sidecar.workers().await?;
        // Blocks, for what asked whether the other proxy decides may still be counted as a request.
        let owners = workers["pools"][0]["owners"]
            .as_array()
            .into_iter()
            .flatten();
        let blocks: u64 = owners.filter_map(|o| o["load"]["blocks"].as_u64()).sum();
        let index = stack.sidecar.index().await?;
        if blocks > 0 && index["settled"] == true {
            Ok(())
        } else {
            Err(format!("{workers} {index}"))
        }
    };
    wait::until("the first booking at the other proxy", known).await;
    let at_work = async || {
        let mut since = counts(&upstreams).into_iter().zip(&start);
        since
            .position(|(now, start)| now > *start)
            .ok_or("not there")
    };
    let busy = wait::until("the first request at a worker", at_work).await;
    // The other proxy has booked nothing itself, and still keeps away from the busy worker.
    let mut seen = Vec::new();
    for i in 2..5 {
        let before = counts(&upstreams);
        let request = send(other.port, i * 100);
        let arrived = async || {
            let now = counts(&upstreams);
            if now == before { Err(now) } else { Ok(()) }
        };
        wait::until("the request at a worker", arrived).await;
        seen.push(request);
        if i == 2 {
            let now = counts(&upstreams);
            assert_eq!(now[1 - busy], start[1 - busy] + 1, "{now:?}");
        }
    }
    open(&upstreams);
    for request in seen.into_iter().chain([first]) {
        request.await.expect("a task");
    }
    stack.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_one_after_the_other_reach_every_worker() {
    let (stack, _upstreams) = start(2, 8, json!({})).await;
    let mut spread: BTreeMap<u64, u32> = BTreeMap::new();
    for i in 0..300 {
        let (answer, _) = stack.complete(&prompt(i)).await.expect("an answer");
        *spread
            .entry(answer["worker"].as_u64().expect("a worker"))
            .or_default() += 1;
    }
    assert!(
        spread.len() == 8 && spread.values().all(|n| *n >= 15),
        "{spread:?}"
    );
    stack.idle().await;
    stack.envoy.intended().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_go_away_at_any_stage_leave_nothing_booked() {
    let (stack, upstreams) = start(2, 4, json!({})).await;
    let body = json!({"model": "sim", "prompt": prompt(1), "max_tokens": 1}).to_string();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    hold(&upstreams);
    for round in 0..40_usize {
        let mut stream = TcpStream::connect(("127.0.0.1", stack.envoy.port))
            .await
            .expect("Envoy");
        stream
            .write_all(head.as_bytes())
            .await
            .expect("an open socket");
        let sent = match round % 4 {
            0 => 0,
            1 => body.len() / 2,
            2 => body.len() - 1,
            _ => body.len(),
        };
        stream
            .write_all(&body.as_bytes()[..sent])
            .await
            .expect("an open socket");
        if round % 4 == 3 {
            let before = (round / 4) as u64;
            let arrived = async || {
                let now: u64 = counts(&upstreams).iter().sum();
                if now > before { Ok(()) } else { Err(now) }
            };
            wait::until("the request at a worker", arrived).await;
        }
    }
    open(&upstreams);
    stack.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_proxy_leaves_nothing_booked() {
    let (stack, upstreams) = start(1, 2, json!({})).await;
    let mut other = stack.another_envoy("second", 1, |filter| filter).await;
    hold(&upstreams);
    let requests = (0..6).map(|i| {
        let body = json!({"model": "sim", "prompt": prompt(i), "max_tokens": 1});
        let request = json_request(other.port, "/v1/completions", &body).expect("a request");
        let client = stack.client.clone();
        tokio::spawn(async move { client.send(request).await })
    });
    let requests: Vec<_> = requests.collect();
    let booked = async || {
        let workers = stack.client.get(stack.sidecar.admin, "/v1/workers").await?;
        let waiting: f64 = {
            let mut load = Vec::new();
            collect_loads(&workers, &mut load);
            load.iter().sum()
        };
        if waiting >= 6.0 {
            Ok(())
        } else {
            Err(workers.to_string())
        }
    };
    wait::until("six bookings", booked).await;
    other.process.kill();
    open(&upstreams);
    for request in requests {
        assert!(
            request.await.expect("a task").is_err(),
            "its proxy was killed"
        );
    }
    stack.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_sidecar_learns_the_load_from_the_proxies() {
    let (mut stack, upstreams) = start(2, 3, json!({})).await;
    hold(&upstreams);
    let requests = (0..9).map(|i| {
        let body = json!({"model": "sim", "prompt": prompt(i), "max_tokens": 1});
        let request = json_request(stack.envoy.port, "/v1/completions", &body);
        let (client, request) = (stack.client.clone(), request.expect("a request"));
        tokio::spawn(async move { client.send(request).await.expect("an answer") })
    });
    let requests: Vec<_> = requests.collect();
    let arrived = async || {
        let now: u64 = counts(&upstreams).iter().sum();
        if now == 9 { Ok(()) } else { Err(now) }
    };
    wait::until("all requests at the workers", arrived).await;
    stack.sidecar.restart();
    stack.sidecar.ready().await;
    let learned = async || {
        let workers = stack.client.get(stack.sidecar.admin, "/v1/workers").await?;
        let mut load = Vec::new();
        collect_loads(&workers, &mut load);
        if load.iter().sum::<f64>() >= 9.0 {
            Ok(())
        } else {
            Err(workers.to_string())
        }
    };
    wait::until("the live bookings", learned).await;
    open(&upstreams);
    for request in requests {
        request.await.expect("a task");
    }
    stack.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_kv_events_and_nats_conversations_still_stay_together() {
    let more = json!({"kv_events": false, "nats": null});
    let (stack, _upstreams) = start(2, 4, more).await;
    let mut homes: BTreeMap<u32, u64> = BTreeMap::new();
    for turn in 1..=3_u32 {
        for conversation in 0..8_u32 {
            let tokens: Vec<u32> = (0..turn * 160).map(|i| conversation * 10_000 + i).collect();
            let chosen = async || {
                let (answer, decision) = stack.complete(&tokens).await?;
                let worker = answer["worker"].as_u64().unwrap_or(0);
                Ok::<_, String>((worker, decision))
            };
            let (worker, decision) = chosen().await.expect("an answer");
            let home = *homes.entry(conversation).or_insert(worker);
            assert_eq!(worker, home, "turn {turn} of {conversation}: {decision}");
            // Predicted blocks reach Envoy a moment after the booking.
            let blocks = u64::from(turn * 160 / 16);
            let held = async || {
                let body = json!({"tokens": tokens});
                let admin = stack.sidecar.admin;
                let explained = stack.client.post(admin, "/v1/explain", &body).await?;
                let owners = explained["owners"].as_array().cloned().unwrap_or_default();
                let best = owners.iter().filter_map(|o| o["overlap"][0].as_u64()).max();
                let index = stack.sidecar.index().await?;
                let done = best >= Some(blocks) && index["settled"] == true;
                if done {
                    Ok(())
                } else {
                    Err(explained.to_string())
                }
            };
            wait::until("the predicted blocks", held).await;
        }
    }
    stack.idle().await;
}
