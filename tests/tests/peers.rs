//! Two sidecars, each with an Envoy of its own, in front of the same workers.

use std::sync::atomic::Ordering;

use bytes::Bytes;
use http::Response;
use kv_tests::client::json_request;
use kv_tests::nats::Nats;
use kv_tests::stack::{Setup, Stack};
use kv_tests::upstream::{self, Upstream};
use kv_tests::wait;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

/// Sidecars with an Envoy each, that know each other.
struct Installation {
    left: Stack,
    right: Stack,
    upstreams: Vec<Upstream>,
    _nats: Nats,
    _dir: tempfile::TempDir,
}

impl Installation {
    async fn start() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let nats = Nats::start(dir.path()).await;
        let upstreams = [Upstream::start(1).await, Upstream::start(2).await];
        let workers = upstream::workers(&upstreams);
        let setup = Setup {
            threads: 1,
            workers,
            more: json!({"nats": {
                "url": nats.url(),
                "dynamo": {"namespace": "dynamo", "component": "backend"},
                "replica_sync": true,
            }}),
        };
        let (left, right) = (Stack::start(&setup).await, Stack::start(&setup).await);
        for stack in [&left, &right] {
            let knows = async || {
                let metrics = stack.sidecar.metrics().await?;
                let is_so = metrics.lines().any(|l| l == "kv_router_peers 1");
                if is_so {
                    Ok(())
                } else {
                    Err("no peer".to_owned())
                }
            };
            wait::until("the other sidecar", knows).await;
        }
        Self {
            left,
            right,
            upstreams: upstreams.into(),
            _nats: nats,
            _dir: dir,
        }
    }

    fn counts(&self) -> Vec<u64> {
        let counts = self.upstreams.iter();
        counts.map(|u| u.requests.load(Ordering::Relaxed)).collect()
    }

    fn answers(&self, flow: bool) {
        for upstream in &self.upstreams {
            upstream.gate.send_replace(flow);
        }
    }

    /// Sends a request that will wait at a worker, and returns which worker it reached.
    async fn held(&self, stack: &Stack, prompt: u32) -> (usize, Answer) {
        let before = self.counts();
        let tokens: Vec<u32> = (0..200).map(|i| prompt * 1000 + i).collect();
        let body = json!({"model": "sim", "prompt": tokens, "max_tokens": 1});
        let request = json_request(stack.envoy.port, "/v1/completions", &body);
        let (client, request) = (stack.client.clone(), request.expect("a request"));
        let answer = tokio::spawn(async move { client.send(request).await });
        let arrived = async || {
            let now = self.counts();
            let at = now
                .iter()
                .zip(&before)
                .position(|(now, before)| now > before);
            at.ok_or(now)
        };
        (
            wait::until("the request at a worker", arrived).await,
            answer,
        )
    }
}

type Answer = JoinHandle<Result<Response<Bytes>, String>>;

/// Waits until a sidecar knows of this many requests, by all proxies and peers.
async fn knows(stack: &Stack, requests: u64) {
    let known = async || {
        let workers = stack.sidecar.workers().await?;
        let owners = workers["pools"][0]["owners"].as_array().cloned();
        let count = |owner: &Value| {
            let load = &owner["load"];
            load["waiting"].as_u64().unwrap_or(0) + load["decoding"].as_u64().unwrap_or(0)
        };
        let sum: u64 = owners.iter().flatten().map(count).sum();
        if sum == requests {
            Ok(())
        } else {
            Err(workers.to_string())
        }
    };
    wait::until("the requests", known).await;
}

/// Waits until a sidecar and its Envoy's lanes hold nothing, and no correction is left.
async fn is_empty(stack: &Stack) {
    stack.envoy.idle().await;
    let empty = async || {
        let path = "/v1/workers?raw";
        let raw = stack.client.get(stack.sidecar.admin, path).await?["raw"].clone();
        let zero = json!({"prefill_tokens": 0, "waiting": 0, "decoding": 0, "blocks": 0});
        let proxies = raw["proxies"].as_array().cloned().unwrap_or_default();
        let owners = proxies.iter().filter_map(|p| p["owners"].as_array());
        let columns = ["booked", "load", "correction"];
        let clean = owners
            .flatten()
            .all(|owner| columns.iter().all(|column| owner[*column] == zero));
        if raw["bookings"] == 0 && clean && !proxies.is_empty() {
            Ok(())
        } else {
            Err(raw.to_string())
        }
    };
    wait::until("no load", empty).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_envoy_keeps_away_from_a_worker_that_another_sidecars_envoy_made_busy() {
    let all = Installation::start().await;
    all.answers(false);
    let mut answers = Vec::new();
    // Ties are broken at random: what is no accident happens each time.
    for round in 0..6 {
        let (busy, first) = all.held(&all.left, 2 * round).await;
        knows(&all.right, 2 * u64::from(round) + 1).await;
        let is_told = async || {
            let index = all.right.sidecar.index().await?;
            if index["settled"] == true {
                Ok(())
            } else {
                Err(index.to_string())
            }
        };
        wait::until("the correction in Envoy", is_told).await;
        let (other, second) = all.held(&all.right, 2 * round + 1).await;
        assert_eq!(other, 1 - busy, "round {round}");
        knows(&all.left, 2 * u64::from(round) + 2).await;
        answers.extend([first, second]);
    }
    all.answers(true);
    for answer in answers {
        answer.await.expect("a task").expect("an answer");
    }
    is_empty(&all.left).await;
    is_empty(&all.right).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_sidecar_and_its_envoy_leave_nothing_booked_elsewhere() {
    let mut all = Installation::start().await;
    all.answers(false);
    let mut answers = Vec::new();
    for prompt in 0..6 {
        answers.push(all.held(&all.right, prompt).await.1);
    }
    knows(&all.left, 6).await;
    all.right.sidecar.process.kill();
    all.right.envoy.process.kill();
    all.answers(true);
    for answer in answers {
        let answer = answer.await.expect("a task");
        assert!(answer.is_err(), "its proxy was killed");
    }
    is_empty(&all.left).await;
    // What is left serves on.
    let (_, answer) = all.held(&all.left, 7).await;
    answer.await.expect("a task").expect("an answer");
    is_empty(&all.left).await;
}
