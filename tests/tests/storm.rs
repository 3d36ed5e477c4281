//! After every storm nothing is left booked. `KV_STORM_SECONDS` makes the long one longer.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use kv_core::rng::Rng;
use kv_sim::engine::{Config, Engine};
use kv_tests::client::json_request;
use kv_tests::rude::{Manner, Rude};
use kv_tests::stack::{Setup, Stack};
use kv_tests::wait;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::Instant;

/// Clients at a time.
const CLIENTS: u64 = 24;

async fn start(threads: u32, workers: u64, more: Value) -> (Stack, Vec<Rude>) {
    let mut rude = Vec::new();
    for id in 1..=workers {
        rude.push(Rude::start(id).await);
    }
    let workers = (1..).zip(rude.iter().map(|r| r.address)).collect();
    let stack = Stack::start(&Setup {
        threads,
        workers,
        more,
    })
    .await;
    (stack, rude)
}

fn body(rng: &mut Rng) -> Value {
    let (first, length) = (rng.below(20) * 10_000, 16 + rng.below(600));
    let tokens: Vec<usize> = (first..first + length).collect();
    json!({"model": "sim", "prompt": tokens, "stream": true})
}

/// Where a client breaks off, if it does.
#[derive(Clone, Copy, Debug)]
enum Stage {
    Head,
    Body,
    Request,
    Answer,
    Never,
}

impl Stage {
    fn random(rng: &mut Rng) -> Self {
        [
            Self::Head,
            Self::Body,
            Self::Request,
            Self::Answer,
            Self::Never,
        ][rng.below(5)]
    }
}

/// One request over a connection of its own, left at a stage. Whatever comes of it.
async fn visit(port: u16, body: String, stage: Stage) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
         connection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let (head, body) = (head.as_bytes(), body.as_bytes());
    let (head, body) = match stage {
        Stage::Head => (&head[..head.len() / 2], &body[..0]),
        Stage::Body => (head, &body[..body.len() / 2]),
        Stage::Request | Stage::Answer | Stage::Never => (head, body),
    };
    stream.write_all(head).await?;
    stream.write_all(body).await?;
    match stage {
        Stage::Answer => {
            stream.read_u8().await?;
        }
        Stage::Never => {
            stream.read_to_end(&mut Vec::new()).await?;
        }
        Stage::Head | Stage::Body | Stage::Request => {}
    }
    Ok(())
}

/// Clients that come and go until so many visits were made.
async fn visits(ports: &[u16], count: u64, seed: u64) {
    let mut rng = Rng::new(seed);
    let mut running = FuturesUnordered::new();
    for i in 0..count {
        if running.len() as u64 >= CLIENTS {
            running.next().await;
        }
        let port = ports[i as usize % ports.len()];
        let visit = visit(port, body(&mut rng).to_string(), Stage::random(&mut rng));
        running.push(tokio::time::timeout(Duration::from_secs(5), visit));
    }
    while running.next().await.is_some() {}
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_and_workers_that_break_off_in_every_way_leave_nothing_booked() {
    let (stack, rude) = start(2, 4, json!({"router_track_output_blocks": true})).await;
    let manners = [
        Manner::Serve,
        Manner::Error,
        Manner::Reset,
        Manner::Break,
        Manner::Serve,
    ];
    for round in 0..manners.len() {
        for (worker, rude) in rude.iter().enumerate() {
            rude.manner
                .send_replace(manners[(round + worker) % manners.len()]);
        }
        visits(&[stack.envoy.port], 120, round as u64).await;
    }
    let failures = stack.envoy.total("kv_router_worker_failures_total").await;
    assert!(failures > 0, "workers have failed");
    stack.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_that_come_and_go_leave_nothing_booked() {
    let (stack, mut rude) = start(2, 4, json!({})).await;
    let port = [stack.envoy.port];
    for round in 0..6_usize {
        let storm = visits(&port, 80, round as u64);
        let restart = async {
            let worker = &mut rude[round % 4];
            let before = worker.read();
            let busy = async || {
                if worker.read() > before {
                    Ok(())
                } else {
                    Err(())
                }
            };
            let _ =
                tokio::time::timeout(Duration::from_secs(1), wait::until("traffic", busy)).await;
            worker.go().await;
        };
        tokio::join!(storm, restart);
        rude[round % 4].come_back().await;
    }
    stack.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_envoy_killed_in_a_storm_leaves_nothing_booked() {
    let (stack, rude) = start(1, 3, json!({})).await;
    let mut other = stack.another_envoy("second", 2, |filter| filter).await;
    let ports = [stack.envoy.port, other.port];
    let storm = visits(&ports, 300, 1);
    let kill = async {
        let served = async || {
            let read: u64 = rude.iter().map(Rude::read).sum();
            if read > 60 { Ok(()) } else { Err(read) }
        };
        wait::until("the storm", served).await;
        other.process.kill();
    };
    tokio::join!(storm, kill);
    stack.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sidecar_killed_in_a_storm_fails_no_request_and_leaves_nothing_booked() {
    let (mut stack, rude) = start(2, 3, json!({})).await;
    let port = stack.envoy.port;
    let client = stack.client.clone();
    let running = tokio::spawn(async move {
        let mut rng = Rng::new(1);
        let mut running = FuturesUnordered::new();
        let mut answered = 0;
        for _ in 0..600 {
            if running.len() >= 8 {
                let done: Result<http::Response<bytes::Bytes>, String> =
                    running.next().await.expect("a request");
                assert_eq!(done.expect("an answer").status(), 200);
                answered += 1;
            }
            let request = json_request(port, "/v1/completions", &body(&mut rng));
            running.push(client.send(request.expect("a request")));
        }
        while let Some(done) = running.next().await {
            assert_eq!(done.expect("an answer").status(), 200);
            answered += 1;
        }
        answered
    });
    for kill in 1..=3 {
        let served = async || {
            let read: u64 = rude.iter().map(Rude::read).sum();
            if read > kill * 120 { Ok(()) } else { Err(read) }
        };
        wait::until("the storm", served).await;
        stack.sidecar.restart();
    }
    assert_eq!(running.await.expect("the storm"), 600);
    stack.sidecar.ready().await;
    stack.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_overload_leaves_nothing_booked() {
    let seconds = std::env::var("KV_STORM_SECONDS").ok();
    let seconds = seconds.map_or(8, |s| s.parse().expect("KV_STORM_SECONDS in seconds"));
    let mut engines = Vec::new();
    for worker_id in 1..=3 {
        let mut config = Config {
            worker_id,
            ..Config::default()
        };
        config.limits.max_seqs = 4;
        config.limits.step = Duration::from_millis(10);
        engines.push(Engine::start(config).await.expect("an engine"));
    }
    let workers = engines
        .iter()
        .map(|e| (e.worker_id(), e.address()))
        .collect();
    let stack = Stack::start(&Setup {
        threads: 2,
        workers,
        more: json!({"router_track_output_blocks": true}),
    })
    .await;
    // The engines finish some 50 requests a second of 20 tokens each; ten times that come, and
    // leave when they have waited for a while.
    let (answered, mut rng) = (AtomicU64::new(0), Rng::new(7));
    let mut running = FuturesUnordered::new();
    let mut pace = tokio::time::interval(Duration::from_millis(20));
    let until = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < until {
        pace.tick().await;
        for _ in 0..10 {
            let mut body = body(&mut rng);
            body["max_tokens"] = 20.into();
            body["nvext"] = json!({"agent_hints": {"osl": 20}});
            let request = json_request(stack.envoy.port, "/v1/completions", &body);
            let send = stack.client.send(request.expect("a request"));
            let patience = Duration::from_millis(500 + rng.below(1500) as u64);
            let answered = &answered;
            running.push(async move {
                if let Ok(Ok(answer)) = tokio::time::timeout(patience, send).await {
                    answered.fetch_add(answer.status().is_success().into(), Ordering::Relaxed);
                }
            });
        }
        while let Some(Some(())) = futures::FutureExt::now_or_never(running.next()) {}
    }
    drop(running);
    // Few are answered in time, which is what an overload is.
    let routed = stack.envoy.total("kv_router_requests_total").await;
    assert!(
        routed > 50 * seconds,
        "{routed} requests, {answered:?} answered in time"
    );
    stack.idle().await;
}
