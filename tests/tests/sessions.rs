//! Sessions stay where they are bound, over threads, Envoys and restarts of the sidecar.

use std::collections::BTreeMap;

use http::HeaderName;
use kv_tests::client::{Client, json_request};
use kv_tests::stack::{Setup, Stack};
use kv_tests::upstream::{self, Upstream};
use kv_tests::wait;
use serde_json::{Value, json};

const SESSIONS: usize = 12;

async fn start(workers: u64, threads: u32, more: Value) -> (Stack, Vec<Upstream>) {
    let upstreams = Upstream::start_all(workers).await;
    let workers = upstream::workers(&upstreams);
    let stack = Stack::start(&Setup {
        threads,
        workers,
        more,
    })
    .await;
    (stack, upstreams)
}

/// The worker that answers a request with a prompt of its own on a connection of its own.
async fn ask(port: u16, headers: &[(&'static str, &str)], number: usize, tokens: u32) -> u64 {
    let first = u32::try_from(number).expect("a small number") * 10_000;
    let prompt: Vec<u32> = (first..first + tokens).collect();
    let body = json!({"model": "sim", "prompt": prompt});
    let mut request = json_request(port, "/v1/completions", &body).expect("a request");
    for (name, value) in headers {
        let value = value.parse().expect("a header's value");
        request
            .headers_mut()
            .insert(HeaderName::from_static(name), value);
    }
    let answer = Client::default().send(request).await.expect("an answer");
    let answer: Value = serde_json::from_slice(answer.body()).expect("JSON");
    answer["worker"].as_u64().expect("a worker")
}

/// Where each session's requests go: six at a time of all of them.
async fn workers_of(port: u16, round: usize) -> BTreeMap<usize, u64> {
    let mut running = Vec::new();
    for i in 0..6 * SESSIONS {
        let session = i % SESSIONS;
        let number = 1_000 * round + i;
        running.push(tokio::spawn(async move {
            let id = format!("s{session}");
            (
                session,
                ask(port, &[("x-session-id", &id)], number, 200).await,
            )
        }));
    }
    let mut workers = BTreeMap::new();
    for request in running {
        let (session, worker) = request.await.expect("a task");
        let before = *workers.entry(session).or_insert(worker);
        assert_eq!(worker, before, "session {session} is on two workers");
    }
    workers
}

/// Waits until the sidecar has bound so many sessions and Envoy holds what it knows.
async fn bound(stack: &Stack, sessions: usize) {
    let told = async || {
        let text = stack.sidecar.metrics().await?;
        let line = format!("kv_router_bound_sessions {sessions}");
        let index = stack.sidecar.index().await?;
        let is_told = text.lines().any(|l| l == line) && index["settled"] == true;
        if is_told {
            Ok(())
        } else {
            Err(index.to_string())
        }
    };
    wait::until("the sessions", told).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_stays_on_its_worker_over_threads_envoys_and_restarts() {
    let more = json!({"router_session_affinity_ttl_secs": 600});
    let (mut stack, _upstreams) = start(4, 4, more).await;
    let port = stack.envoy.port;
    let mut first = BTreeMap::new();
    for session in 0..SESSIONS {
        let id = format!("s{session}");
        let worker = ask(port, &[("x-session-id", &id)], session, 200).await;
        first.insert(session, worker);
    }
    assert!(
        first.values().any(|worker| *worker != first[&0]),
        "{first:?}"
    );
    assert_eq!(workers_of(port, 1).await, first);
    let kept = stack.envoy.total("kv_router_sessions_kept_total").await;
    assert_eq!(kept, 6 * SESSIONS as u64);
    bound(&stack, SESSIONS).await;
    let second = stack.another_envoy("second", 2, |filter| filter).await;
    assert_eq!(workers_of(second.port, 2).await, first);
    // Bound by one, known by the other.
    let headers = [("x-claude-code-session-id", "agent")];
    let worker = ask(second.port, &headers, 50, 200).await;
    bound(&stack, SESSIONS + 1).await;
    for number in 51..57 {
        assert_eq!(ask(port, &headers, number, 200).await, worker);
    }
    stack.idle().await;
    let file = kv_router::state::file(&stack.dir().join("state"));
    let is_saved = async || match kv_router::state::load(&file) {
        Ok(Some(state)) if state.sessions.len() == SESSIONS + 1 => Ok(()),
        _ => Err("not saved"),
    };
    wait::until("the saved sessions", is_saved).await;
    stack.sidecar.process.kill();
    assert_eq!(workers_of(port, 3).await, first);
    stack.sidecar.restart();
    stack.sidecar.ready().await;
    bound(&stack, SESSIONS + 1).await;
    assert_eq!(workers_of(second.port, 4).await, first);
    // A worker leaves: its sessions have another one together, the others stay.
    let left = first[&0];
    let version = stack.table_version().await;
    stack.configure(|config| {
        let workers = config["workers"].as_array_mut().expect("workers");
        workers.retain(|worker| worker["id"] != left);
    });
    stack.table_after(version).await;
    for (session, worker) in first.clone() {
        let id = format!("s{session}");
        let now = ask(port, &[("x-session-id", &id)], 60 + session, 200).await;
        assert_eq!(now == worker, worker != left, "{session}");
        first.insert(session, now);
    }
    assert_eq!(workers_of(port, 5).await, first);
    stack.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_soft_session_leaves_for_load_and_comes_back() {
    let more = json!({
        "router_session_affinity_ttl_secs": 600,
        "router_session_affinity_mode": "soft",
        "session_headers": ["x-chat"],
        "trust_hints": true,
    });
    let (stack, upstreams) = start(2, 2, more).await;
    let port = stack.envoy.port;
    let chat = [("x-chat", "c")];
    let home = ask(port, &chat, 1, 400).await;
    for number in 2..6 {
        assert_eq!(ask(port, &chat, number, 400).await, home);
    }
    stack.idle().await;
    bound(&stack, 1).await;
    let gate = &upstreams[usize::try_from(home).expect("an index") - 1].gate;
    gate.send_replace(false);
    let held = tokio::spawn(async move {
        let home = home.to_string();
        ask(port, &[("x-worker-instance-id", &home)], 7, 8_000).await
    });
    let is_loaded = async || {
        let total = stack.envoy.total("kv_router_lane_a").await;
        if total > 0 { Ok(()) } else { Err(total) }
    };
    wait::until("load", is_loaded).await;
    assert_ne!(ask(port, &chat, 8, 400).await, home);
    assert_eq!(stack.envoy.total("kv_router_sessions_left_total").await, 1);
    gate.send_replace(true);
    assert_eq!(held.await.expect("a task"), home);
    stack.idle().await;
    assert_eq!(ask(port, &chat, 9, 400).await, home);
    stack.idle().await;
}
