//! Each source of events by itself: what one does wrong harms no other, every rank has a socket of
//! its own, and what can't be taken is told to who sent it.

use std::net::{Ipv4Addr, SocketAddr};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use kv_publisher::Settings;
use kv_sim::engine::{Config, Engine};
use kv_sim::own::{Faults, OwnEvents, Zmq};
use kv_tests::client::{json_request, uri};
use kv_tests::place;
use kv_tests::stack::{Setup, Stack};
use kv_tests::wait;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const BLOCK: usize = 16;
/// Most bytes of a post.
const POST_BYTES: usize = 16 << 20;
/// Bodies of posts that are read at a time.
const BODIES: usize = 16;

async fn stack(more: Value) -> Stack {
    Stack::start(&Setup {
        threads: 1,
        workers: Vec::new(),
        more,
    })
    .await
}

async fn engine(id: u64, blocks: usize, own: OwnEvents) -> Engine {
    let config = Config {
        worker_id: id,
        blocks,
        instant: true,
        own: Some(own),
        ..Config::default()
    };
    Engine::start(config).await.expect("an engine")
}

/// Sockets for events and for replays on these ports.
fn sockets(port: u16, replay: u16) -> Zmq {
    Zmq {
        listen: format!("tcp://127.0.0.1:{port}"),
        replay: Some(format!("tcp://127.0.0.1:{replay}")),
        ..Zmq::default()
    }
}

fn zmq() -> Zmq {
    sockets(place::free_port(), place::free_port())
}

fn events(zmq: &Zmq) -> Value {
    json!({"zmq": {"endpoint": zmq.listen, "replay_endpoint": zmq.replay, "topic": zmq.topic}})
}

fn worker(engine: &Engine, events: &Value) -> Value {
    json!({"id": engine.worker_id(), "endpoint": engine.address(), "events": events})
}

async fn serve(stack: &mut Stack, workers: Vec<Value>) {
    let version = stack.table_version().await;
    stack.configure(|config| config["workers"] = workers.into());
    stack.table_after(version).await;
}

/// Tokens of a prompt that shares no block with another one.
fn prompt(number: usize, blocks: usize) -> Vec<u32> {
    let token = |i: usize| u32::try_from(1 + (number * 7_919 + i) % 150_000).expect("a token id");
    (0..blocks * BLOCK).map(token).collect()
}

/// A worker's rank in `/v1/workers`.
async fn owner(stack: &Stack, worker: u64, rank: u64) -> Result<Value, String> {
    let workers = stack.sidecar.workers().await?;
    let pools = workers["pools"].as_array().into_iter().flatten();
    let mut owners = pools.flat_map(|pool| pool["owners"].as_array().into_iter().flatten());
    let found = owners.find(|owner| owner["worker"] == worker && owner["rank"] == rank);
    found.cloned().ok_or_else(|| workers.to_string())
}

/// Waits until the index holds as many blocks as the engine, of a stream that misses nothing.
async fn equal(stack: &Stack, engine: &Engine) {
    let compare = async || {
        let owner = owner(stack, engine.worker_id(), 0).await?;
        let held = engine.blocks().len();
        if owner["knowledge"] == "whole" && owner["blocks"] == held {
            Ok(())
        } else {
            Err(format!("{held} blocks held, {owner}"))
        }
    };
    wait::until("the index to hold what the engine holds", compare).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_at_one_door_neither_delays_nor_drops_others_events() {
    let mut stack = stack(json!({"event_bytes_per_second": 65_536})).await;
    let (loud, quiet) = (zmq(), zmq());
    let post = Settings::new(&uri(stack.sidecar.admin, "/v1/events"), 3);
    let flooding = engine(1, 1 << 16, OwnEvents::Zmq(loud.clone())).await;
    let beside = engine(2, 512, OwnEvents::Zmq(quiet.clone())).await;
    let posting = engine(3, 512, OwnEvents::Http(post)).await;
    let workers = vec![
        worker(&flooding, &events(&loud)),
        worker(&beside, &events(&quiet)),
        worker(&posting, &json!({"http": {"trust_loopback": true}})),
    ];
    serve(&mut stack, workers).await;
    // Minutes of its quota.
    for number in 0..400 {
        assert!(flooding.store(&prompt(number, 150)), "room for a prompt");
    }
    let throttled = async || match stack.sidecar.streams("zmq", "throttled").await {
        0 => Err(()),
        _ => Ok(()),
    };
    wait::until("the flood to be held back", throttled).await;
    for number in 0..20 {
        for engine in [&beside, &posting] {
            assert!(engine.store(&prompt(number, 3)), "room for a prompt");
            equal(&stack, engine).await;
        }
    }
    let behind = owner(&stack, 1, 0).await.expect("an owner");
    let indexed = behind["blocks"].as_u64().expect("a number");
    let held = flooding.blocks().len() as u64;
    assert!(indexed < held / 2, "the flood was over: {behind}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_reader_of_a_polled_engine_is_noticed() {
    let mut stack = stack(json!({})).await;
    let polled = engine(1, 512, OwnEvents::Poll { buffer: 100_000 }).await;
    // The first answer shows how much the engine's buffer can hold.
    for number in 0..40 {
        assert!(polled.store(&prompt(number, 2)), "room for a prompt");
    }
    let url = format!("http://{}/kv_cache_events", polled.address());
    let trtllm = json!({"trtllm": {"url": url, "poll_ms": 5}});
    serve(&mut stack, vec![worker(&polled, &trtllm)]).await;
    equal(&stack, &polled).await;
    assert_eq!(stack.sidecar.streams("poll", "second_reader").await, 0);
    assert_eq!(stack.sidecar.streams("poll", "gap").await, 0);
    let mut number = 40;
    let stolen = async || {
        assert!(polled.store(&prompt(number, 1)), "room for a prompt");
        let read = json_request(polled.address().port(), "/kv_cache_events", &json!({}));
        stack.client.send(read.map_err(|e| e.to_string())?).await?;
        assert!(polled.store(&prompt(number + 1, 1)), "room for a prompt");
        number += 2;
        match stack.sidecar.streams("poll", "second_reader").await {
            0 => Err("not noticed".to_owned()),
            _ => Ok(()),
        }
    };
    wait::until("the other reader to be noticed", stolen).await;
    assert!(stack.sidecar.streams("poll", "gap").await > 0);
    let owner = owner(&stack, 1, 0).await.expect("an owner");
    assert_eq!(owner["knowledge"], "partial", "{owner}");
}

/// The first of two free ports in a row.
fn free_pair() -> u16 {
    loop {
        let (first, next) = (place::free_port(), place::free_port());
        if next == first + 1 {
            return first;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_rank_is_heard_at_a_port_of_its_own_and_routed_to() {
    let mut stack = stack(json!({})).await;
    let (port, replay) = (free_pair(), free_pair());
    let nameless = |mut zmq: Zmq| {
        // The port alone says the rank.
        zmq.faults = Faults {
            short_batches: true,
            ..Faults::default()
        };
        OwnEvents::Zmq(zmq)
    };
    let first = engine(1, 512, nameless(sockets(port, replay))).await;
    let second = engine(2, 512, nameless(sockets(port + 1, replay + 1))).await;
    let mut ranks = worker(&first, &events(&sockets(port, replay)));
    ranks["data_parallel_size"] = 2.into();
    serve(&mut stack, vec![ranks]).await;
    assert!(first.store(&prompt(1, 5)) && second.store(&prompt(2, 12)));
    let heard = async |rank: u64, engine: &Engine| {
        let compare = async || {
            let owner = owner(&stack, 1, rank).await?;
            let held = engine.blocks().len();
            let index = stack.sidecar.index().await?;
            if owner["blocks"] == held && index["settled"] == true {
                Ok(())
            } else {
                Err(format!("{held} blocks held, {owner} {index}"))
            }
        };
        wait::until("the rank's blocks to be indexed", compare).await;
    };
    heard(0, &first).await;
    heard(1, &second).await;
    let mut number = 2;
    // Whoever gets a request holds its prompt from then on, so a next attempt takes another.
    let routed = async || {
        number += 1;
        let tokens = prompt(number, 12);
        assert!(second.store(&tokens), "room for a prompt");
        heard(1, &second).await;
        let (_, decision) = stack.complete(&tokens).await?;
        let candidates = decision["candidates"].as_array().cloned();
        let overlap = |rank: u64| {
            let mut all = candidates.iter().flatten();
            let found = all.find(|c| c["worker"] == 1 && c["rank"] == rank);
            found.map(|candidate| candidate["overlap"][0].clone())
        };
        match (overlap(0), overlap(1)) {
            (Some(none), Some(held)) if none == 0 && held == 12 => Ok(decision),
            _ => Err(decision.to_string()),
        }
    };
    let decision = wait::until("rank 1's blocks to count", routed).await;
    assert_eq!(
        (&decision["worker"], &decision["rank"]),
        (&json!(1), &json!(1))
    );
    stack.envoy.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_registers_at_the_indexer_is_listened_to() {
    let port = place::free_port();
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let stack = stack(json!({"indexer": {"listen": listen}})).await;
    let zmq = zmq();
    let own = OwnEvents::Zmq(zmq.clone());
    let engine = engine(7, 512, own).await;
    // What happened before it registers counts, too.
    let (before, after) = (prompt(1, 6), prompt(2, 4));
    assert!(engine.store(&before));
    let ask = async |path: &str, body: Value| -> Result<Response<Bytes>, String> {
        let request = json_request(port, path, &body).map_err(|e| e.to_string())?;
        stack.client.send(request).await
    };
    let registration = json!({
        "instance_id": 7, "endpoint": zmq.listen, "replay_endpoint": zmq.replay,
        "model_name": "llama", "block_size": BLOCK,
    });
    let answer = ask("/register", registration.clone())
        .await
        .expect("an answer");
    assert_eq!(answer.status(), 201, "{answer:?}");
    let again = ask("/register", registration).await.expect("an answer");
    assert_eq!(again.status(), 409);
    let query = |tokens: &[u32]| json!({"token_ids": tokens, "model_name": "llama"});
    let equal = async |tokens: &[u32]| {
        let held = engine.overlap(tokens) as u64;
        let compare = async || {
            let answer = ask("/query", query(tokens)).await?;
            let found: Value = serde_json::from_slice(answer.body()).map_err(|e| e.to_string())?;
            if found["scores"]["7"]["0"].as_u64().unwrap_or(0) == held {
                Ok(())
            } else {
                Err(format!("{held} tokens held: {found}"))
            }
        };
        wait::until("the indexer to know the engine", compare).await;
        held
    };
    assert_eq!(equal(&before).await, 96);
    assert!(engine.store(&after));
    assert_eq!(equal(&after).await, 64);
    engine.clear();
    assert_eq!(equal(&before).await, 0);
    assert!(engine.store(&after));
    assert_eq!(equal(&after).await, 64);
    let body = json!({"instance_id": 7, "model_name": "llama"});
    let answer = ask("/unregister", body).await.expect("an answer");
    assert_eq!(answer.status(), 200, "{answer:?}");
    let gone = async || match ask("/query", query(&after)).await?.status().as_u16() {
        404 => Ok(()),
        other => Err(other.to_string()),
    };
    wait::until("nobody to serve the model", gone).await;
}

/// A post that says more than it sends.
async fn hanging(admin: u16) -> TcpStream {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, admin));
    let mut stream = TcpStream::connect(address).await.expect("a listener");
    let head = "POST /v1/events HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n\
                connection: close\r\ncontent-length: 1000\r\n\r\n{";
    stream
        .write_all(head.as_bytes())
        .await
        .expect("a connection");
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn posts_that_are_too_long_too_slow_or_too_many_are_told_so() {
    let mut stack = stack(json!({})).await;
    let post = json!({"http": {"trust_loopback": true}});
    let worker = json!({"id": 1, "endpoint": "127.0.0.1:9", "events": post});
    serve(&mut stack, vec![worker]).await;
    let admin = stack.sidecar.admin;
    let send = async |body: Bytes| -> Result<(u16, Value), String> {
        let request = Request::post(uri(admin, "/v1/events"))
            .header("content-type", "application/json")
            .body(Full::from(body))
            .map_err(|e| e.to_string())?;
        let answer = stack.client.send(request).await?;
        let status = answer.status().as_u16();
        let retry = answer.headers().contains_key("retry-after");
        let body: Value = serde_json::from_slice(answer.body()).map_err(|e| e.to_string())?;
        Ok((status, json!([body["error"]["kind"], retry])))
    };
    let open = async || match send(Bytes::from_static(b"{}")).await {
        Ok((400, told)) => Ok(told),
        other => Err(other),
    };
    let told = wait::until("the door", open).await;
    assert_eq!(told, json!(["invalid_body", false]));
    let long = send(Bytes::from(vec![b' '; POST_BYTES + 1])).await;
    assert_eq!(long, Ok((413, json!(["long_body", false]))));

    let mut slow = Vec::new();
    for _ in 0..BODIES {
        slow.push(hanging(admin).await);
    }
    let full = async || match send(Bytes::from_static(b"{}")).await {
        Ok((429, told)) => Ok(told),
        other => Err(other),
    };
    let told = wait::until("no room for a body", full).await;
    assert_eq!(told, json!(["busy", true]));
    for mut stream in slow {
        let mut answer = String::new();
        let read = stream.read_to_string(&mut answer).await;
        read.expect("an answer");
        assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
        assert!(answer.contains("slow_body"), "{answer}");
    }
    // The room is free again.
    let body = json!({"worker_id": 1, "incarnation": "a", "sequence": 0, "events": []});
    let taken = send(body.to_string().into()).await.expect("an answer");
    assert_eq!(taken.0, 202);
}
