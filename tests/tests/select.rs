//! The select service: it chooses by what Envoy's filters choose by, and what it reserves is load
//! that they see.

use std::net::{Ipv4Addr, SocketAddr};

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::Full;
use kv_sim::engine::{Config, Engine};
use kv_sim::own::{OwnEvents, Zmq};
use kv_tests::client::{Client, uri};
use kv_tests::place;
use kv_tests::stack::{Setup, Stack};
use kv_tests::wait;
use serde_json::{Value, json};

const BLOCK: usize = 16;

/// The service.
struct Select<'s> {
    client: &'s Client,
    port: u16,
}

impl Select<'_> {
    async fn ask(&self, method: Method, path: &str, body: Value) -> (StatusCode, Value) {
        let request = Request::builder()
            .method(method)
            .uri(uri(self.port, path))
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body.to_string())))
            .expect("a request");
        let answer = self.client.send(request).await.expect("an answer");
        let body = serde_json::from_slice(answer.body());
        (
            answer.status(),
            body.unwrap_or_else(|e| panic!("{e}: {answer:?}")),
        )
    }

    async fn post(&self, path: &str, body: Value) -> (StatusCode, Value) {
        self.ask(Method::POST, path, body).await
    }

    async fn get(&self, path: &str) -> (StatusCode, Value) {
        self.ask(Method::GET, path, json!({})).await
    }
}

async fn engine(id: u64, own: Option<OwnEvents>) -> Engine {
    let config = Config {
        worker_id: id,
        blocks: 512,
        instant: true,
        own,
        ..Config::default()
    };
    Engine::start(config).await.expect("an engine")
}

/// Tokens of a prompt that shares no block with another one.
fn prompt(number: usize, blocks: usize) -> Vec<u32> {
    let token = |i: usize| u32::try_from(1 + (number * 7_919 + i) % 150_000).expect("a token id");
    (0..blocks * BLOCK).map(token).collect()
}

/// What Envoy takes to be booked on a worker: prefill tokens, blocks, requests.
async fn seen(stack: &Stack, worker: u64, number: usize) -> Result<[u64; 3], String> {
    let (_, decision) = stack.complete(&prompt(number, 1)).await?;
    let mut candidates = decision["candidates"].as_array().into_iter().flatten();
    let found = candidates.find(|c| c["worker"] == worker);
    let found = found.ok_or_else(|| decision.to_string())?;
    let keys = ["prefill_tokens", "active_blocks", "requests"];
    Ok(keys.map(|key| found[key].as_u64().unwrap_or(u64::MAX)))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_reserved_is_load_to_envoy_until_it_is_over() {
    let engines = [engine(1, None).await, engine(2, None).await];
    let workers = engines
        .iter()
        .map(|e| json!({"id": e.worker_id(), "endpoint": e.address()}));
    let port = place::free_port();
    let mut stack = Stack::start(&Setup {
        threads: 2,
        workers: Vec::new(),
        more: json!({
            "policy": "dynamo",
            "models": ["sim"],
            "workers": workers.collect::<Vec<_>>(),
            "select": {"listen": SocketAddr::from((Ipv4Addr::LOCALHOST, port))},
        }),
    })
    .await;
    let client = Client::default();
    let select = Select {
        client: &client,
        port,
    };
    let (status, ready) = select.get("/ready").await;
    assert_eq!(
        (status, &ready["schedulable_workers"]),
        (StatusCode::OK, &json!(2))
    );

    // Reserved on a worker that it names.
    let pinned = json!({"worker_id": 1, "dp_rank": 0});
    let body = json!({
        "model_name": "sim", "token_ids": prompt(1, 64), "selection_id": "a",
        "pinned_worker": pinned,
    });
    let (status, answer) = select.post("/select_and_reserve", body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(
        answer["endpoint"],
        format!("http://{}", engines[0].address())
    );
    let mut number = 100;
    let mut until = async |what: &str, expected: [u64; 3]| {
        let equal = async || {
            number += 1;
            match seen(&stack, 1, number).await? {
                found if found == expected => Ok(()),
                other => Err(format!("{other:?}")),
            }
        };
        wait::until(what, equal).await;
    };
    until("the reservation in Envoy", [1_024, 64, 1]).await;
    // Envoy and the service choose alike, both by load.
    let (_, decision) = stack.complete(&prompt(2, 8)).await.expect("an answer");
    assert_eq!(decision["worker"], 2, "{decision}");
    let body = json!({"model_name": "sim", "token_ids": prompt(3, 8)});
    let (_, answer) = select.post("/select", body).await;
    assert_eq!(answer["worker_id"], 2, "{answer}");

    let (status, _) = select
        .post("/reservations/a/prefill_complete", json!({}))
        .await;
    assert_eq!(status, StatusCode::OK);
    until("its prefill to be done", [0, 64, 1]).await;
    let half = json!({"decay_fraction": 0.5});
    let (status, _) = select.post("/reservations/a/output_block", half).await;
    assert_eq!(status, StatusCode::OK);
    until("half of its blocks", [0, 33, 1]).await;

    let (status, _) = select
        .ask(Method::DELETE, "/reservations/a", json!({}))
        .await;
    assert_eq!(status, StatusCode::OK);
    until("nothing to be left", [0, 0, 0]).await;

    // A worker of no Envoy: selected by its cache, and sent nothing.
    let zmq = Zmq {
        listen: format!("tcp://127.0.0.1:{}", place::free_port()),
        replay: Some(format!("tcp://127.0.0.1:{}", place::free_port())),
        ..Zmq::default()
    };
    let alone = engine(7, Some(OwnEvents::Zmq(zmq.clone()))).await;
    let held = prompt(5, 12);
    assert!(alone.store(&held), "room for a prompt");
    let endpoint = format!("http://{}", alone.address());
    let worker = json!({
        "worker_id": 7, "model_name": "sim", "endpoint": endpoint, "block_size": BLOCK,
        "kv_events_endpoint": zmq.listen, "replay_endpoint": zmq.replay,
    });
    let (status, record) = select.post("/workers", worker).await;
    assert_eq!(
        (status, &record["lifecycle"]),
        (StatusCode::CREATED, &json!("schedulable"))
    );
    let chosen = async || {
        let body = json!({"model_name": "sim", "token_ids": held});
        let (_, answer) = select.post("/select", body).await;
        if answer["worker_id"] == 7 && answer["overlap"]["gpu"] == 192 {
            Ok(answer)
        } else {
            Err(answer.to_string())
        }
    };
    let answer = wait::until("the worker's cache to count", chosen).await;
    assert_eq!(answer["endpoint"], endpoint);
    let (_, decision) = stack.complete(&held).await.expect("an answer");
    let candidates = decision["candidates"].as_array().expect("candidates");
    assert!(candidates.iter().all(|c| c["worker"] != 7), "{decision}");
    let (status, record) = select.ask(Method::DELETE, "/workers/7", json!({})).await;
    assert_eq!(
        (status, &record["lifecycle"]),
        (StatusCode::OK, &json!("unschedulable"))
    );
    let body = json!({"model_name": "sim", "token_ids": held, "allowed_worker_ids": [7]});
    let (status, answer) = select.post("/select", body).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{answer}");

    // A restarted sidecar has forgotten what was reserved.
    let body = json!({"model_name": "sim", "token_ids": prompt(6, 16), "selection_id": "c"});
    select.post("/select_and_reserve", body).await;
    stack.sidecar.restart();
    stack.sidecar.ready().await;
    let forgotten = async || {
        let request = Request::get(uri(port, "/ready")).body(Full::default());
        let answer = select
            .client
            .send(request.map_err(|e| e.to_string())?)
            .await?;
        if answer.status() == StatusCode::OK {
            Ok(())
        } else {
            Err(format!("{answer:?}"))
        }
    };
    wait::until("the service to be back", forgotten).await;
    let (status, _) = select
        .ask(Method::DELETE, "/reservations/c", json!({}))
        .await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    stack.idle().await;
}
