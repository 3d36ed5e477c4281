//! KV events over a real NATS server, in both encodings.

mod nats_server;
mod support;

use std::collections::HashMap;

use futures::StreamExt as _;
use kv_core::event::{Envelope, EventData, RouterEvent, SnapshotPart};
use kv_core::hash::Seed;
use kv_sim::engine::{Config, Engine};
use kv_sim::load::{self, Format, Options, Pace, Workload};
use kv_sim::publish::{Encoding, EventPlane};
use nats_server::Nats;
use support::eventually;

type Content = HashMap<u64, (u64, Option<u64>)>;

async fn engine(nats: &Nats, worker_id: u64, encoding: Encoding) -> Engine {
    Engine::start(Config {
        worker_id,
        blocks: 512,
        instant: true,
        events: Some(EventPlane {
            url: nats.url.clone(),
            encoding,
        }),
        ..Config::default()
    })
    .await
    .expect("engine starts")
}

fn json() -> Encoding {
    Encoding::Json {
        subject: "kv-events.{worker_id}".to_owned(),
    }
}

fn content(engine: &Engine) -> Content {
    let blocks = engine.blocks().into_iter();
    blocks
        .map(|key| (key.engine_hash, (key.tokens_hash, key.parent)))
        .collect()
}

fn apply(content: &mut Content, event: &RouterEvent) {
    match &event.event.data {
        EventData::Stored(stored) => {
            let mut parent = stored.parent_hash;
            for block in &stored.blocks {
                content.insert(block.block_hash, (block.tokens_hash, parent));
                parent = Some(block.block_hash);
            }
        }
        EventData::Removed(removed) => {
            for hash in &removed.block_hashes {
                assert!(content.remove(hash).is_some(), "removed, never stored");
            }
        }
        EventData::Cleared => content.clear(),
    }
}

/// Traffic that stores, evicts, makes holes and clears.
async fn disturb(engine: &Engine) {
    let options = Options {
        url: format!("http://{}", engine.address()),
        model: "sim".to_owned(),
        label: "test".to_owned(),
        workload: Workload::Agents,
        seed: 3,
        requests: 20,
        pace: Pace::Concurrency(2),
        format: Format::Tokens,
        timeout: std::time::Duration::from_secs(60),
    };
    for round in 0..2 {
        let report = load::run(&options, |_| {}).await.expect("a run");
        assert_eq!(report.ok, 20, "{:?}", report.first_failure);
        let mut names: Vec<u64> = content(engine).into_keys().collect();
        names.sort_unstable();
        assert_eq!(engine.remove(&names[..5]), 5);
        assert_eq!(engine.evict(7), 7);
        if round == 0 {
            engine.clear();
        }
    }
}

/// Reads messages until the event with this id, checking that ids leave no gap.
async fn replay(
    messages: &mut async_nats::Subscriber,
    last_event_id: u64,
    mut decode: impl FnMut(&[u8]) -> Vec<RouterEvent>,
) -> Content {
    let mut replayed = Content::new();
    let mut seen = 0;
    while seen < last_event_id {
        let message = messages.next().await.expect("subscription lives");
        for event in decode(&message.payload) {
            seen += 1;
            assert_eq!(event.event.event_id, seen);
            apply(&mut replayed, &event);
        }
    }
    replayed
}

#[tokio::test]
async fn dynamo_envelopes_replay_to_the_cache() {
    let nats = Nats::start("dynamo").await;
    let client = async_nats::connect(&nats.url).await.expect("connects");
    let subject = "namespace.dynamo.component.backend.endpoint.generate.kv-events";
    let mut messages = client.subscribe(subject).await.expect("subscribes");
    client.flush().await.expect("flushes");
    let encoding = Encoding::Dynamo {
        namespace: "dynamo".to_owned(),
        component: "backend".to_owned(),
        endpoint: "generate".to_owned(),
    };
    let engine = engine(&nats, 9, encoding).await;
    disturb(&engine).await;
    let mut sequence = 0;
    let mut publisher = None;
    let replayed = replay(&mut messages, engine.last_event_id(), |bytes| {
        let envelope: Envelope = rmp_serde::from_slice(bytes).expect("an envelope");
        assert_eq!(envelope.topic, "kv-events");
        assert_eq!(envelope.sequence, sequence);
        assert_eq!(
            *publisher.get_or_insert(envelope.publisher_id),
            envelope.publisher_id
        );
        assert!(envelope.publisher_id < 1 << 53);
        sequence += 1;
        let events: Vec<RouterEvent> = rmp_serde::from_slice(&envelope.payload).expect("events");
        assert!(events.len() <= 128);
        assert!(events.iter().all(|event| event.worker_id == 9));
        events
    })
    .await;
    assert_eq!(replayed, content(&engine));
    engine.shutdown().await;
}

#[tokio::test]
async fn json_events_replay_to_the_cache_and_the_snapshot_equals_it() {
    let nats = Nats::start("json").await;
    let client = async_nats::connect(&nats.url).await.expect("connects");
    let mut messages = client.subscribe("kv-events.7").await.expect("subscribes");
    let inbox = client.new_inbox();
    let mut answers = client.subscribe(inbox.clone()).await.expect("subscribes");
    client.flush().await.expect("flushes");
    let engine = engine(&nats, 7, json()).await;
    disturb(&engine).await;
    let replayed = replay(&mut messages, engine.last_event_id(), |bytes| {
        serde_json::from_slice(bytes).expect("events")
    })
    .await;
    assert_eq!(replayed, content(&engine));

    client
        .publish_with_reply("kv-events.7.snapshot", inbox, "".into())
        .await
        .expect("asks");
    let mut snapshot = Content::new();
    let mut next = 0;
    loop {
        let answer = answers.next().await.expect("an answer");
        assert!(answer.payload.len() < 512 * 1024);
        let part: SnapshotPart = serde_json::from_slice(&answer.payload).expect("a part");
        assert_eq!((part.part, part.worker_id), (next, 7));
        assert_eq!(part.event_id, engine.last_event_id());
        part.events
            .iter()
            .for_each(|event| apply(&mut snapshot, event));
        next += 1;
        if next == part.parts {
            break;
        }
    }
    assert_eq!(snapshot, content(&engine));
    engine.shutdown().await;
}

#[tokio::test]
async fn engines_name_equal_blocks_differently_and_hash_their_tokens_equally() {
    let config = |worker_id| Config {
        worker_id,
        instant: true,
        ..Config::default()
    };
    let one = Engine::start(config(1)).await.expect("starts");
    let two = Engine::start(config(2)).await.expect("starts");
    let tokens: Vec<u32> = (0..40).collect();
    assert!(one.store(&tokens) && two.store(&tokens));
    let mut hashes = Vec::new();
    for engine in [&one, &two] {
        let mut blocks = engine.blocks();
        blocks.sort_by_key(|key| key.parent.is_some());
        hashes.push(blocks);
    }
    assert_eq!(hashes[0].len(), 2);
    for (mine, other) in hashes[0].iter().zip(&hashes[1]) {
        assert_eq!(mine.tokens_hash, other.tokens_hash);
        assert_ne!(mine.engine_hash, other.engine_hash);
    }
    let seed = Seed::new("", "");
    assert_eq!(hashes[0][0].tokens_hash, seed.block(&tokens[..16]));
    assert_eq!(one.overlap(&tokens), 32);
}

#[tokio::test]
async fn an_engine_started_before_nats_answers_once_it_is_there() {
    // A port that was free a moment ago; nothing listens there until NATS does.
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("a free port")
        .port();
    let engine = Engine::start(Config {
        instant: true,
        events: Some(EventPlane {
            url: format!("nats://127.0.0.1:{port}"),
            encoding: json(),
        }),
        ..Config::default()
    })
    .await
    .expect("starts without nats");
    assert!(engine.store(&(0..64).collect::<Vec<u32>>()));
    let nats = Nats::start_on("late", port).await;
    let client = async_nats::connect(&nats.url).await.expect("connects");
    let snapshot = eventually("a snapshot", || async {
        let request = client.request("kv-events.1.snapshot", "".into());
        request.await.ok()
    })
    .await;
    let part: SnapshotPart = serde_json::from_slice(&snapshot.payload).expect("a part");
    assert_eq!(part.event_id, engine.last_event_id());
    engine.shutdown().await;
}

#[tokio::test]
async fn an_engine_comes_back_after_nats_restarts() {
    let nats = Nats::start("first").await;
    let port = nats
        .url
        .rsplit(':')
        .next()
        .and_then(|port| port.parse().ok());
    let engine = engine(&nats, 4, json()).await;
    assert!(engine.store(&(0..64).collect::<Vec<u32>>()));
    drop(nats);
    assert!(engine.store(&(100..164).collect::<Vec<u32>>()));

    let nats = Nats::start_on("second", port.expect("a port")).await;
    let client = async_nats::connect(&nats.url).await.expect("connects");
    let mut messages = client.subscribe("kv-events.4").await.expect("subscribes");
    let answer = eventually("a snapshot", || async {
        let request = client.request("kv-events.4.snapshot", "".into());
        request.await.ok()
    })
    .await;
    let part: SnapshotPart = serde_json::from_slice(&answer.payload).expect("a part");
    let mut known = Content::new();
    part.events
        .iter()
        .for_each(|event| apply(&mut known, event));
    assert_eq!(known, content(&engine));

    // What follows the snapshot arrives live; what it includes may arrive late and is skipped.
    assert!(engine.store(&(200..264).collect::<Vec<u32>>()));
    let mut last = part.event_id;
    while last < engine.last_event_id() {
        let message = messages.next().await.expect("subscription lives");
        let events: Vec<RouterEvent> = serde_json::from_slice(&message.payload).expect("events");
        for event in events
            .iter()
            .filter(|event| event.event.event_id > part.event_id)
        {
            last += 1;
            assert_eq!(event.event.event_id, last);
            apply(&mut known, event);
        }
    }
    assert_eq!(known, content(&engine));
    engine.shutdown().await;
}
