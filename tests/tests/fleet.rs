//! Workers come and go at run time: under a lease, over HTTP and NATS, with many of them at once.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::{Method, Request};
use kv_tests::client::{Client, json_request, uri};
use kv_tests::rude::{Manner, Rude};
use kv_tests::stack::{Setup, Stack};
use kv_tests::wait;
use serde_json::{Value, json};
use tokio::time::Instant;

/// Seconds of comings and goings, unless `KV_CHURN_SECONDS` says otherwise.
const CHURN_SECONDS: u64 = 8;
/// A worker comes and one goes this often.
const STEP: Duration = Duration::from_millis(200);
/// Clients of each Envoy.
const CLIENTS: u32 = 4;

async fn start(workers: &[&Rude], more: Value) -> Stack {
    let mut keys = json!({
        "registration": {"networks": ["127.0.0.0/8"]},
        "router_mode": "least-loaded",
    });
    keys.as_object_mut()
        .expect("a map")
        .extend(more.as_object().expect("a map").clone());
    let workers = (1..).zip(workers.iter().map(|w| w.address)).collect();
    Stack::start(&Setup {
        threads: 2,
        workers,
        more: keys,
    })
    .await
}

/// Asks the sidecar; the answer's status and body.
async fn ask(stack: &Stack, method: Method, path: &str, body: &Value) -> (u16, Value) {
    let body = if body.is_null() {
        String::new()
    } else {
        body.to_string()
    };
    let request = Request::builder()
        .method(method)
        .uri(uri(stack.sidecar.admin, path))
        .body(body.into());
    let answer = stack.client.send(request.expect("a request")).await;
    let answer = answer.expect("an answer");
    let body = serde_json::from_slice(answer.body()).unwrap_or(Value::Null);
    (answer.status().as_u16(), body)
}

async fn register(stack: &Stack, id: u64, endpoint: SocketAddr, ttl_secs: f64) -> u16 {
    let said = json!({"id": id, "endpoint": endpoint, "ttl_secs": ttl_secs});
    ask(stack, Method::POST, "/v1/workers", &said).await.0
}

async fn leave(stack: &Stack, id: u64) -> u16 {
    let path = format!("/v1/workers/{id}");
    ask(stack, Method::DELETE, &path, &Value::Null).await.0
}

/// Workers by id, as `key` of `/v1/workers` says of them.
async fn owners(stack: &Stack, key: &str) -> BTreeMap<u64, Value> {
    let workers = stack.sidecar.workers().await.expect("workers");
    let owners = workers["pools"][0]["owners"].as_array().cloned();
    let owners = owners.unwrap_or_default().into_iter();
    owners
        .map(|o| (o["worker"].as_u64().expect("an id"), o[key].clone()))
        .collect()
}

/// Waits until just these workers are there.
async fn until_there(stack: &Stack, expected: &[u64]) {
    let there = async || {
        let there: Vec<u64> = owners(stack, "worker").await.into_keys().collect();
        if there == expected {
            Ok(())
        } else {
            Err(there)
        }
    };
    wait::until("the workers", there).await;
}

/// Sends requests until this worker has read one more.
async fn until_served(stack: &Stack, worker: &Rude) {
    let before = worker.read();
    let mut i = 0;
    let served = async || {
        i += 1;
        let (status, decision) = send(&stack.client, stack.envoy.port, i).await;
        assert_eq!(status, 200, "{decision}");
        let read = worker.read();
        if read > before { Ok(()) } else { Err(decision) }
    };
    wait::until("a request for the worker", served).await;
}

/// Sends a request and returns the answer's status, 0 for one that broke off, and the decision.
async fn send(client: &Client, port: u16, i: u32) -> (u16, Value) {
    let body = json!({"model": "sim", "prompt": [i, 2, 3], "stream": true});
    let request = json_request(port, "/v1/completions", &body);
    match client.receive(request.expect("a request")).await {
        Ok(answer) => {
            let record = answer.headers().get("x-kv-router-decision");
            let record = record.and_then(|r| serde_json::from_slice(r.as_bytes()).ok());
            let is_whole = answer.body().is_ok();
            let status = if is_whole {
                answer.status().as_u16()
            } else {
                0
            };
            (status, record.unwrap_or(Value::Null))
        }
        Err(error) => (0, error.into()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_runs_out_unless_it_is_renewed_and_a_worker_that_leaves_is_gone() {
    let [of_file, held, lost] = [
        Rude::start(1).await,
        Rude::start(2).await,
        Rude::start(3).await,
    ];
    let stack = start(&[&of_file], json!({})).await;
    assert_eq!(register(&stack, 2, held.address, 600.0).await, 201);
    assert_eq!(register(&stack, 3, lost.address, 1.0).await, 201);
    let sources = owners(&stack, "source").await;
    assert_eq!(
        (&sources[&1], &sources[&2]),
        (&json!("file"), &json!("registered"))
    );
    until_served(&stack, &held).await;
    until_there(&stack, &[1, 2]).await;
    let (status, joined) = ask(&stack, Method::PUT, "/v1/workers/2", &Value::Null).await;
    assert_eq!((status, &joined["outcome"]), (200, &json!("renewed")));
    let workers = stack.sidecar.workers().await.expect("workers");
    assert_eq!(workers["leases"][0]["worker"], 2, "{workers}");
    assert_eq!(workers["leases"][0]["ttl_secs"], 600.0);

    for (said, status, kind) in [
        (json!({"id": 4, "endpoint": "10.0.0.1:80"}), 403, "network"),
        (json!({"id": 1, "endpoint": "127.0.0.9:80"}), 409, "of_file"),
        (
            json!({"id": 4, "endpoint": held.address}),
            409,
            "endpoint_taken",
        ),
        (
            json!({"id": 4, "endpoint": "127.0.0.9:80", "pool": "x"}),
            404,
            "no_such_pool",
        ),
        (json!({"id": 4}), 400, "invalid_body"),
    ] {
        let refused = ask(&stack, Method::POST, "/v1/workers", &said).await;
        let expected = (status, &json!(kind));
        assert_eq!((refused.0, &refused.1["error"]["kind"]), expected, "{said}");
    }

    // It gets nothing more from the answer on.
    assert_eq!(leave(&stack, 2).await, 204);
    let read = held.read();
    for i in 0..20 {
        assert_eq!(send(&stack.client, stack.envoy.port, i).await.0, 200);
    }
    assert_eq!(held.read(), read);
    assert_eq!((leave(&stack, 2).await, leave(&stack, 1).await), (404, 409));
    stack.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_sidecar_serves_those_who_were_registered_for_one_lease_more() {
    let [of_file, long, short] = [
        Rude::start(1).await,
        Rude::start(2).await,
        Rude::start(3).await,
    ];
    let mut stack = start(&[&of_file], json!({})).await;
    assert_eq!(register(&stack, 2, long.address, 600.0).await, 201);
    assert_eq!(register(&stack, 3, short.address, 3.0).await, 201);
    stack.sidecar.restart();
    stack.sidecar.ready().await;
    until_served(&stack, &long).await;
    let leases = stack.sidecar.workers().await.expect("workers")["leases"].clone();
    let held = leases.as_array().expect("leases").iter();
    assert!(held.clone().any(|lease| lease["worker"] == 2), "{leases}");
    // Nobody has renewed it for a whole lease.
    until_there(&stack, &[1, 2]).await;
    stack.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_register_over_nats_each_for_itself() {
    let [of_file, other] = [Rude::start(1).await, Rude::start(21).await];
    let stack = start(&[&of_file], json!({"nats": null})).await;
    let mut stack = stack;
    let url = stack.nats.url();
    // What concerns NATS is read at the start.
    stack.configure(|config| {
        config["nats"] = json!({"url": url, "workers_subject": "kv-workers.{worker_id}"});
    });
    stack.sidecar.restart();
    let nats = async_nats::connect(&url).await.expect("NATS");
    let say = async |subject: &'static str, said: String| {
        let answered = async || {
            // Until the sidecar has subscribed, nobody answers.
            let answer = nats.request(subject, said.clone().into()).await;
            let answer = answer.map_err(|e| e.to_string())?;
            serde_json::from_slice::<Value>(&answer.payload).map_err(|e| e.to_string())
        };
        wait::until("an answer", answered).await
    };
    let said = json!({"id": 21, "endpoint": other.address, "taints": ["spot"]});
    let refused = say("kv-workers.22", said.to_string()).await;
    assert_eq!(refused["error"]["kind"], "other_worker", "{refused}");
    let joined = say("kv-workers.21", said.to_string()).await;
    assert_eq!(joined["pool"], "default", "{joined}");
    stack.sidecar.settled(0).await;
    until_served(&stack, &other).await;
    assert_eq!(
        owners(&stack, "metadata").await[&21]["taints"],
        json!(["spot"])
    );
    say("kv-workers.21", String::new()).await;
    until_there(&stack, &[1]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_of_a_name_is_a_worker() {
    let engine = Rude::start(1).await;
    let port = engine.address.port();
    let dns = json!({"dns": [{"name": "localhost", "port": port}]});
    let stack = start(&[], dns).await;
    let served = async || {
        let (_, decision) = send(&stack.client, stack.envoy.port, 1).await;
        if engine.read() > 0 {
            Ok(())
        } else {
            Err(decision)
        }
    };
    wait::until("a request for the address", served).await;
    let endpoints = owners(&stack, "endpoint").await;
    let is_there = endpoints.values().any(|e| *e == engine.address.to_string());
    assert!(is_there, "{endpoints:?}");
    stack.envoy.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draining_worker_finishes_what_it_runs_and_gets_nothing_more() {
    let [of_file, other] = [Rude::start(1).await, Rude::start(2).await];
    let stack = start(&[&of_file], json!({})).await;
    assert_eq!(register(&stack, 2, other.address, 600.0).await, 201);
    other.manner.send_replace(Manner::Hang);
    let mut running = tokio::task::JoinSet::new();
    for i in 0..8 {
        let (client, port) = (stack.client.clone(), stack.envoy.port);
        running.spawn(async move { send(&client, port, i).await });
    }
    let read = async || {
        if other.read() > 0 {
            Ok(())
        } else {
            Err("none")
        }
    };
    wait::until("requests on the worker", read).await;
    let said = json!({"id": 2, "endpoint": other.address, "ttl_secs": 600, "draining": true});
    let (status, joined) = ask(&stack, Method::POST, "/v1/workers", &said).await;
    assert_eq!((status, &joined["outcome"]), (200, &json!("changed")));
    let there = owners(&stack, "accepting").await;
    assert_eq!((&there[&1], &there[&2]), (&json!(true), &json!(false)));
    // Those that hang were sent before.
    let before = other.read();
    for i in 0..20 {
        assert_eq!(send(&stack.client, stack.envoy.port, i).await.0, 200);
    }
    assert_eq!(other.read(), before);
    other.manner.send_replace(Manner::Serve);
    while let Some(outcome) = running.join_next().await {
        let (status, record) = outcome.expect("a client");
        assert_eq!(status, 200, "{record}");
    }
    let said = json!({"id": 2, "endpoint": other.address, "ttl_secs": 600});
    assert_eq!(
        ask(&stack, Method::PUT, "/v1/workers/2", &said).await.0,
        200
    );
    until_served(&stack, &other).await;
    stack.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_get_no_more_requests_than_they_take_over_all_threads() {
    const MOST: u64 = 3;
    let workers = [Rude::start(1).await, Rude::start(2).await];
    let capped = |id: u64| json!({"id": id, "endpoint": workers[id as usize - 1].address, "max_requests": MOST});
    let stack = Stack::start(&Setup {
        threads: 4,
        workers: Vec::new(),
        more: json!({"workers": [capped(1), capped(2)]}),
    })
    .await;
    for worker in &workers {
        worker.manner.send_replace(Manner::Hang);
    }
    let mut sent = tokio::task::JoinSet::new();
    let (mut i, mut refused) = (0, 0);
    while workers.iter().map(Rude::read).sum::<u64>() < 2 * MOST {
        for _ in 0..16 {
            i += 1;
            // A connection of its own each: they come in on all threads.
            let port = stack.envoy.port;
            sent.spawn(async move { send(&Client::default(), port, i).await });
        }
        // Those that got no place have their answer; the others wait for theirs.
        let settled = async || {
            let on_workers = workers.iter().map(Rude::read).sum::<u64>();
            while let Some(outcome) = sent.try_join_next() {
                let (status, _) = outcome.expect("a client");
                assert_eq!(status, 503);
                refused += 1;
            }
            let waiting = sent.len() as u64;
            if waiting == on_workers {
                Ok(())
            } else {
                Err((waiting, on_workers))
            }
        };
        wait::until("answers to those without a place", settled).await;
        for worker in &workers {
            assert!(worker.read() <= MOST, "{} requests", worker.read());
        }
    }
    assert!(refused >= 10);
    for worker in &workers {
        worker.manner.send_replace(Manner::Serve);
    }
    while let Some(outcome) = sent.join_next().await {
        assert_eq!(outcome.expect("a client").0, 200);
    }
    stack.idle().await;
    assert_eq!(send(&stack.client, stack.envoy.port, 0).await.0, 200);
    let reasons = stack.envoy.stats("kv_router_refused_total").await;
    let reasons = reasons.expect("stats");
    assert!(
        reasons
            .iter()
            .any(|(name, n)| name.contains("workers_full") && *n == refused)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_joins_gets_a_part_of_its_share_at_first() {
    let [of_file, cold] = [Rude::start(1).await, Rude::start(2).await];
    let more = json!({"router_mode": "round-robin", "slow_start_secs": 3600});
    let stack = start(&[&of_file], more).await;
    assert_eq!(register(&stack, 2, cold.address, 600.0).await, 201);
    for i in 0..400 {
        assert_eq!(send(&stack.client, stack.envoy.port, i).await.0, 200);
    }
    // By turns it takes part in a tenth of the decisions and gets half of those: 20 of 400.
    assert!((1..=100).contains(&cold.read()), "{} requests", cold.read());
    stack.idle().await;
}

/// What clients have seen.
#[derive(Debug, Default)]
struct Seen {
    sent: AtomicU64,
    /// Failed requests: status, and the worker that was chosen.
    failed: Mutex<Vec<(u16, Value)>>,
    is_over: AtomicBool,
}

async fn client(seen: Arc<Seen>, port: u16, number: u32) {
    let client = Client::default();
    let mut i = number << 16;
    while !seen.is_over.load(Ordering::Relaxed) {
        i += 1;
        let (status, decision) = send(&client, port, i).await;
        seen.sent.fetch_add(1, Ordering::Relaxed);
        if status != 200 {
            let mut failed = seen.failed.lock().expect("no panic");
            failed.push((status, decision));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_come_and_go_five_times_a_second_and_only_dying_ones_fail_requests() {
    let [one, two] = [Rude::start(1).await, Rude::start(2).await];
    let stack = start(&[&one, &two], json!({})).await;
    let other = stack.another_envoy("other", 2, |filter| filter).await;
    let seen = Arc::new(Seen::default());
    let mut clients = Vec::new();
    for number in 0..CLIENTS {
        for port in [stack.envoy.port, other.port] {
            clients.push(tokio::spawn(client(Arc::clone(&seen), port, number)));
        }
    }
    let seconds = std::env::var("KV_CHURN_SECONDS").ok();
    let seconds = seconds.map_or(CHURN_SECONDS, |s| s.parse().expect("seconds"));
    let over = Instant::now() + Duration::from_secs(seconds);
    let mut steps = tokio::time::interval(STEP);
    let (mut there, mut gone, mut dying) = (VecDeque::new(), Vec::new(), BTreeSet::new());
    let mut id = 100;
    while Instant::now() < over {
        steps.tick().await;
        id += 1;
        let worker = Rude::start(id).await;
        assert_eq!(register(&stack, id, worker.address, 600.0).await, 201);
        let served = async || if worker.read() > 0 { Ok(()) } else { Err(id) };
        wait::until("a request for a worker that has joined", served).await;
        there.push_back((id, worker));
        if there.len() <= 3 {
            continue;
        }
        let (leaving, mut worker) = there.pop_front().expect("four of them");
        if id % 7 == 0 {
            // It dies with what it has.
            dying.insert(leaving);
            worker.go().await;
        }
        assert_eq!(leave(&stack, leaving).await, 204);
        // What it runs, it finishes.
        gone.push(worker);
    }
    seen.is_over.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.expect("a client");
    }
    let failed = std::mem::take(&mut *seen.failed.lock().expect("no panic"));
    let is_dying = |record: &Value| {
        record["worker"]
            .as_u64()
            .is_some_and(|w| dying.contains(&w))
    };
    let unexpected: Vec<_> = failed
        .iter()
        .filter(|(_, record)| !is_dying(record))
        .collect();
    let sent = seen.sent.load(Ordering::Relaxed);
    eprintln!(
        "{} workers, {sent} requests, {} failed on dying workers",
        id - 100,
        failed.len()
    );
    assert!(unexpected.is_empty(), "{unexpected:?}");
    assert!(!dying.is_empty(), "none has died in {seconds} s");
    stack.idle().await;
    // Envoys took every version of the endpoints.
    let metrics = stack.sidecar.process.output();
    assert!(!metrics.contains("refuses its endpoints"), "{metrics}");
}
