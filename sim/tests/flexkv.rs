//! An engine with `FlexKV` that publishes its events itself.

use std::time::Duration;

use bytes::Bytes;
use kv_core::family::{FamilyHasher, Namespace, Scheme};
use kv_core::id::Family;
use kv_sim::Limits;
use kv_sim::engine::{Config, Engine};
use kv_sim::flexkv::{self, LevelConfig};
use kv_sim::own::{Dialect, OwnEvents, Zmq};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use zeromq::{DealerSocket, Socket as _, SocketRecv as _, SocketSend as _, ZmqMessage};

const BLOCK: u32 = 4;

async fn engine(blocks: usize, cpu: usize, ssd: usize) -> Engine {
    let level = |blocks| LevelConfig {
        blocks,
        load_per_block: Duration::ZERO,
    };
    let default = Config::default();
    let config = Config {
        blocks,
        limits: Limits {
            block_size: BLOCK as usize,
            ..default.limits.clone()
        },
        instant: true,
        own: Some(OwnEvents::Zmq(Zmq {
            replay: Some("tcp://127.0.0.1:0".to_owned()),
            dialect: Dialect::VllmLists,
            ..Zmq::default()
        })),
        flexkv: Some(flexkv::Config {
            cpu: level(cpu),
            ssd: level(ssd),
        }),
        ..default
    };
    Engine::start(config).await.expect("an engine")
}

/// All events published so far, asked for as a replay.
async fn published(engine: &Engine) -> Vec<Value> {
    let (_, replay) = engine.event_addresses();
    let mut socket = DealerSocket::new();
    let connected = socket.connect(&replay.expect("a replay socket")).await;
    connected.expect("a connection");
    let start = Bytes::copy_from_slice(&0_u64.to_be_bytes());
    let request = ZmqMessage::try_from(vec![Bytes::new(), start]).expect("a request");
    socket.send(request).await.expect("a socket");
    let mut all = Vec::new();
    loop {
        let frames = socket.recv().await.expect("an answer").into_vec();
        let [.., payload] = frames.as_slice() else {
            panic!("{frames:?}");
        };
        if payload.is_empty() {
            return all;
        }
        let batch: (f64, Vec<Value>, u32) = rmp_serde::from_slice(payload).expect("a batch");
        all.extend(batch.1);
    }
}

/// All events, once so many of them are about this medium and of this kind.
async fn until(engine: &Engine, kind: &str, medium: &str, count: usize) -> Vec<Value> {
    let is_it = |event: &&Value| {
        let fields = event.as_array().expect("a list");
        fields[0] == kind && fields.iter().any(|field| field == medium)
    };
    loop {
        let all = published(engine).await;
        if all.iter().filter(is_it).count() >= count {
            return all;
        }
        tokio::task::yield_now().await;
    }
}

async fn complete(engine: &Engine, prompt: &[u32]) -> u64 {
    let body = json!({"model": "sim", "prompt": prompt, "max_tokens": 1}).to_string();
    let mut stream = TcpStream::connect(engine.address())
        .await
        .expect("a connection");
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: sim\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.expect("a socket");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("an answer");
    let (_, body) = answer.split_once("\r\n\r\n").expect("a body");
    let body: Value = serde_json::from_str(body).expect("json");
    let cached = &body["usage"]["prompt_tokens_details"]["cached_tokens"];
    cached.as_u64().unwrap_or_else(|| panic!("{body}"))
}

fn hashes(tokens: &[u32]) -> Vec<u64> {
    let scheme = Scheme {
        family: Family::FlexKv,
        block_size: BLOCK,
        hash_seed: String::new(),
    };
    let mut hasher = FamilyHasher::new(&scheme, Namespace::default()).expect("a hasher");
    hasher.push(tokens);
    hasher.into_hashes()
}

#[tokio::test]
async fn events_carry_tokens_for_the_cache_and_hashes_alone_for_flexkv() {
    let engine = engine(64, 64, 64).await;
    let prompt: Vec<u32> = (0..10).collect();
    assert_eq!(complete(&engine, &prompt).await, 0);
    let events = until(&engine, "BlockStored", "SSD", 1).await;
    let gpu = &events[0];
    assert_eq!(gpu[0], "BlockStored");
    assert_eq!(
        (&gpu[2], &gpu[3], &gpu[4]),
        (&Value::Null, &json!(&prompt[..8]), &json!(BLOCK))
    );
    assert_eq!(gpu[1].as_array().map(Vec::len), Some(2));
    assert_eq!(gpu[6], "GPU");
    for (event, medium) in events[events.len() - 2..].iter().zip(["CPU", "SSD"]) {
        let expected = json!([
            "BlockStored",
            hashes(&prompt),
            null,
            [],
            BLOCK,
            null,
            medium
        ]);
        assert_eq!(*event, expected);
    }
    // A longer prompt: FlexKV tells its whole prefix.
    let longer: Vec<u32> = (0..14).collect();
    assert_eq!(complete(&engine, &longer).await, 8);
    let events = until(&engine, "BlockStored", "SSD", 2).await;
    assert_eq!(events.last().expect("an event")[1], json!(hashes(&longer)));
}

#[tokio::test]
async fn what_the_cache_forgot_is_loaded_and_dropped_hashes_are_signed() {
    let engine = engine(6, 5, 0).await;
    let first: Vec<u32> = (0..17).collect();
    let second: Vec<u32> = (100..117).collect();
    assert_eq!(complete(&engine, &first).await, 0);
    assert_eq!(complete(&engine, &second).await, 0);
    assert!(
        engine.overlap(&first) < 16,
        "the second prompt takes most of the cache"
    );
    let events = until(&engine, "BlockRemoved", "CPU", 1).await;
    let is_removal = |e: &&Value| e[0] == "BlockRemoved" && e[2] == "CPU";
    let removed = events.iter().find(is_removal).expect("a removal");
    let signed: Vec<i64> = hashes(&first)[1..]
        .iter()
        .rev()
        .map(|h| h.cast_signed())
        .collect();
    assert_eq!(removed[1], json!(signed));
    // One block of the first prompt is left in host memory, none of its end anywhere.
    assert_eq!(complete(&engine, &first).await, 4);
}
