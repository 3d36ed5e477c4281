//! Whatever door an engine's events come through, the index holds what the engine holds; also after
//! messages were lost and engines, the sidecar or NATS were restarted.

use std::collections::{BTreeMap, BTreeSet};

use http_body_util::Full;
use kv_core::event::{
    Envelope, EventData, KvCacheEvent, RouterEvent, StorageTier, Stored, StoredBlock,
};
use kv_core::rng::Rng;
use kv_publisher::Settings;
use kv_sim::engine::{Config, Engine};
use kv_sim::own::{Dialect, Faults, OwnEvents, Zmq};
use kv_sim::publish::{Encoding, EventPlane};
use kv_tests::client::uri;
use kv_tests::place;
use kv_tests::stack::{Setup, Stack};
use kv_tests::wait;
use serde_json::{Value, json};
use zeromq::{PubSocket, Socket as _, SocketSend as _};

const BLOCK: usize = 16;

async fn stack(more: Value) -> Stack {
    Stack::start(&Setup {
        threads: 1,
        workers: Vec::new(),
        more,
    })
    .await
}

async fn engine(id: u64, events: Option<EventPlane>, own: Option<OwnEvents>) -> Engine {
    let config = Config {
        worker_id: id,
        blocks: 512,
        instant: true,
        events,
        own,
        ..Config::default()
    };
    Engine::start(config).await.expect("an engine")
}

fn zmq(dialect: Dialect, faults: Faults) -> Zmq {
    Zmq {
        listen: format!("tcp://127.0.0.1:{}", place::free_port()),
        replay: Some(format!("tcp://127.0.0.1:{}", place::free_port())),
        dialect,
        faults,
        ..Zmq::default()
    }
}

fn zmq_events(zmq: &Zmq) -> Value {
    json!({"zmq": {"endpoint": zmq.listen, "replay_endpoint": zmq.replay, "topic": zmq.topic}})
}

fn worker(engine: &Engine, events: &Value) -> Value {
    let mut worker = json!({"id": engine.worker_id(), "endpoint": engine.address()});
    if !events.is_null() {
        worker["events"] = events.clone();
    }
    worker
}

async fn serve(stack: &mut Stack, workers: Vec<Value>) {
    let version = stack.table_version().await;
    stack.configure(|config| config["workers"] = workers.into());
    stack.table_after(version).await;
}

/// Of each worker, each block's sequence hash by the engine's name.
type Content = BTreeMap<u64, BTreeMap<u64, u64>>;

async fn dump(stack: &Stack) -> Result<Content, String> {
    let request = http::Request::get(uri(stack.sidecar.admin, "/v1/index/dump"));
    let request = request.body(Full::default()).map_err(|e| e.to_string())?;
    let answer = stack.client.send(request).await?;
    let text = String::from_utf8_lossy(answer.body()).into_owned();
    if !answer.status().is_success() {
        return Err(format!("{}: {text}", answer.status()));
    }
    let mut content = Content::new();
    for line in text.lines() {
        let line: Value = serde_json::from_str(line).map_err(|e| e.to_string())?;
        let part = &line["blocks"];
        let Some(worker) = part["worker"].as_u64() else {
            continue;
        };
        let blocks = content.entry(worker).or_default();
        for block in part["blocks"].as_array().into_iter().flatten() {
            if let (Some(sequence), Some(name)) = (block[0].as_u64(), block[2].as_u64()) {
                blocks.insert(name, sequence);
            }
        }
    }
    Ok(content)
}

fn names(engine: &Engine) -> BTreeSet<u64> {
    engine.blocks().iter().map(|key| key.engine_hash).collect()
}

/// Waits until the index holds what the engines hold.
async fn equal(stack: &Stack, engines: &[&Engine]) -> Content {
    let compare = async || {
        let content = dump(stack).await?;
        for engine in engines {
            let id = engine.worker_id();
            let indexed = content.get(&id).cloned().unwrap_or_default();
            let indexed: BTreeSet<u64> = indexed.into_keys().collect();
            let held = names(engine);
            if indexed != held {
                let missing = held.difference(&indexed).count();
                let left = indexed.difference(&held).count();
                let planes = stack.sidecar.index().await?["planes"].to_string();
                return Err(format!(
                    "worker {id}: {missing} blocks missing, {left} left over of {}; {planes}",
                    held.len()
                ));
            }
        }
        Ok(content)
    };
    wait::until("the index to hold what engines hold", compare).await
}

/// A prompt of one of a few conversations.
fn prompt(rng: &mut Rng) -> Vec<u32> {
    let (system, branch) = (rng.below(3), rng.below(5));
    let length = BLOCK * (1 + rng.below(30)) + rng.below(BLOCK);
    let token = |i: usize| {
        let number = if i < 160 {
            system * 1_000
        } else {
            branch * 9_000 + system
        };
        u32::try_from(number + i).expect("a token id")
    };
    (0..length).map(token).collect()
}

/// Does the same to each cache.
fn change(rng: &mut Rng, engines: &[&Engine]) {
    let tokens = prompt(rng);
    let choice = rng.below(20);
    let count = rng.below(12);
    for engine in engines {
        match choice {
            0 => engine.clear(),
            1..6 => {
                let _fewer_where_it_is_small = engine.evict(count);
            }
            _ => assert!(engine.store(&tokens), "room for a prompt"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_door_gives_the_same_index_and_decisions() {
    let mut stack = stack(json!({})).await;
    let token_file = stack.dir().join("token");
    std::fs::write(&token_file, "open sesame\n").expect("a writable directory");
    let nats = |encoding| {
        Some(EventPlane {
            url: stack.nats.url(),
            encoding,
        })
    };
    let bytes = Faults {
        bytes_hashes: true,
        ..Faults::default()
    };
    let short = Faults {
        short_batches: true,
        ..Faults::default()
    };
    let maps = zmq(Dialect::VllmMaps, Faults::default());
    let lists = zmq(Dialect::VllmLists, bytes);
    let sglang = zmq(Dialect::Sglang, short);
    let mut post = Settings::new(&uri(stack.sidecar.admin, "/v1/events"), 4);
    post.token = Some("open sesame".to_owned());
    let json = Encoding::Json {
        subject: "kv-events.{worker_id}".to_owned(),
    };
    let dynamo = Encoding::Dynamo {
        namespace: "dynamo".to_owned(),
        component: "backend".to_owned(),
        endpoint: "generate".to_owned(),
    };
    let poll = OwnEvents::Poll { buffer: 100_000 };
    let engines = [
        engine(1, None, Some(OwnEvents::Zmq(maps.clone()))).await,
        engine(2, None, Some(OwnEvents::Zmq(lists.clone()))).await,
        engine(3, None, Some(OwnEvents::Zmq(sglang.clone()))).await,
        engine(4, None, Some(OwnEvents::Http(post))).await,
        engine(5, None, Some(poll)).await,
        engine(6, nats(json), None).await,
        engine(7, nats(dynamo), None).await,
    ];
    let all: Vec<&Engine> = engines.iter().collect();
    let mut rng = Rng::new(1);
    // What happened before anyone listened. Dynamo's plane keeps nothing of it.
    for _ in 0..30 {
        change(&mut rng, &all[..6]);
    }
    all[6].clear();
    let polled = format!("http://{}/kv_cache_events", engines[4].address());
    let events = [
        zmq_events(&maps),
        zmq_events(&lists),
        zmq_events(&sglang),
        json!({"http": {"token_file": token_file}}),
        json!({"trtllm": {"url": polled, "poll_ms": 5}}),
        Value::Null,
        Value::Null,
    ];
    let workers = all.iter().zip(&events).map(|(e, events)| worker(e, events));
    let workers: Vec<Value> = workers.collect();
    serve(&mut stack, workers).await;
    equal(&stack, &all[..6]).await;
    for engine in &all {
        engine.clear();
    }
    for _ in 0..200 {
        change(&mut rng, &all);
    }
    let content = equal(&stack, &all).await;
    // Engines name blocks as they like; what the blocks are is the same.
    let sequences = |id: u64| -> BTreeSet<u64> { content[&id].values().copied().collect() };
    let first = sequences(1);
    assert!(first.len() > 50, "{} blocks", first.len());
    for id in 2..=7 {
        assert_eq!(sequences(id), first, "worker {id}");
    }
    let settled = async || {
        let index = stack.sidecar.index().await?;
        let is_settled = index["settled"] == true;
        if is_settled {
            Ok(())
        } else {
            Err(index.to_string())
        }
    };
    wait::until("Envoy to hold the index", settled).await;
    let mut hits = 0;
    for _ in 0..10 {
        let tokens = prompt(&mut rng);
        // The engine that answers may store and evict.
        let expected = all.iter().map(|e| e.overlap(&tokens) / BLOCK);
        let expected: Vec<usize> = expected.collect();
        let (_, decision) = stack.complete(&tokens).await.expect("an answer");
        for candidate in decision["candidates"].as_array().expect("candidates") {
            let id = candidate["worker"].as_u64().expect("a worker");
            let held = expected[usize::try_from(id).expect("small") - 1];
            assert_eq!(candidate["overlap"][0], held, "worker {id}: {decision}");
            hits += usize::from(held > 0);
        }
        equal(&stack, &all).await;
        wait::until("Envoy to hold the index", settled).await;
    }
    assert!(hits > 10, "{hits} candidates held something");
    stack.envoy.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_messages_and_restarts_leave_no_trace() {
    let mut stack = stack(json!({})).await;
    let lossy = Faults {
        drop: (0..400).filter(|n| n % 7 == 3 || n % 50 < 4).collect(),
        ..Faults::default()
    };
    let first = zmq(Dialect::VllmMaps, lossy.clone());
    let second = zmq(Dialect::VllmLists, lossy);
    let post = Settings::new(&uri(stack.sidecar.admin, "/v1/events"), 3);
    let mut restarted = engine(1, None, Some(OwnEvents::Zmq(first.clone()))).await;
    let silent = engine(2, None, Some(OwnEvents::Zmq(second.clone()))).await;
    let posting = engine(3, None, Some(OwnEvents::Http(post))).await;
    let polled = engine(4, None, Some(OwnEvents::Poll { buffer: 100_000 })).await;
    let url = format!("http://{}/kv_cache_events", polled.address());
    let events = [
        zmq_events(&first),
        zmq_events(&second),
        json!({"http": {"trust_loopback": true}}),
        json!({"trtllm": {"url": url, "poll_ms": 5}}),
    ];
    let engines = [&restarted, &silent, &posting, &polled];
    let workers = engines.iter().zip(&events).map(|(e, v)| worker(e, v));
    let workers: Vec<Value> = workers.collect();
    serve(&mut stack, workers.clone()).await;
    let mut rng = Rng::new(2);
    let some = |rng: &mut Rng, engines: &[&Engine]| {
        for _ in 0..40 {
            change(rng, engines);
        }
    };
    some(&mut rng, &engines);
    equal(&stack, &engines).await;

    // The numbers begin anew on the same connection.
    silent.restart_events();
    polled.restart_events();
    some(&mut rng, &engines);
    equal(&stack, &engines).await;

    // The process ends, and another listens on its ports.
    let address = restarted.address();
    restarted.shutdown().await;
    let config = Config {
        listen: address,
        worker_id: 1,
        blocks: 512,
        instant: true,
        own: Some(OwnEvents::Zmq(first)),
        ..Config::default()
    };
    restarted = wait::until("the ports", async || Engine::start(config.clone()).await).await;
    let engines = [&restarted, &silent, &posting, &polled];
    some(&mut rng, &engines);
    equal(&stack, &engines).await;

    let count = async |plane: &str, kind: &str| stack.sidecar.streams(plane, kind).await;
    assert!(count("zmq", "replay").await > 5, "messages were lost");
    // Once for each stream that nothing is known of, and for each restart.
    assert_eq!(count("zmq", "restarted").await, 4);
    assert_eq!(count("poll", "restarted").await, 2);
    assert_eq!(count("zmq", "gap").await, 0);

    // The sidecar is away while things happen.
    stack.sidecar.process.kill();
    some(&mut rng, &engines);
    stack.sidecar.restart();
    stack.sidecar.ready().await;
    some(&mut rng, &engines);
    equal(&stack, &engines).await;
    assert_eq!(stack.sidecar.streams("zmq", "gap").await, 0);
    stack.envoy.idle().await;
}

/// A post with a worker's token.
fn post(stack: &Stack, token: &str, body: &Value) -> http::Request<Full<bytes::Bytes>> {
    http::Request::post(uri(stack.sidecar.admin, "/v1/events"))
        .header("content-type", "application/json")
        .header("authorization", format!("Bearer {token}"))
        .body(Full::from(body.to_string()))
        .expect("a request")
}

#[tokio::test(flavor = "multi_thread")]
async fn posts_are_taken_in_order_from_who_may() {
    let mut stack = stack(json!({"event_bytes_per_second": 65_536})).await;
    let token = |name: &str| {
        let file = stack.dir().join(name);
        std::fs::write(&file, format!("{name}\n")).expect("a writable directory");
        json!({"http": {"token_file": file}})
    };
    let (one, two) = (token("one"), token("two"));
    let workers = vec![
        json!({"id": 1, "endpoint": "127.0.0.1:9", "events": one}),
        json!({"id": 2, "endpoint": "127.0.0.1:10", "events": two}),
        json!({"id": 3, "endpoint": "127.0.0.1:11"}),
    ];
    serve(&mut stack, workers).await;
    let body = |worker: u64, run: &str, sequence: u64, hash: u64| {
        let tokens: Vec<u64> = (hash..hash + 16).collect();
        json!({"worker_id": worker, "incarnation": run, "sequence": sequence, "events": [
            {"type": "BlockStored", "block_hashes": [hash], "parent_block_hash": null,
             "token_ids": tokens, "block_size": 16},
            {"type": "NoSuchThing"},
        ]})
    };
    let send = async |token: &str, body: Value| {
        let answer = stack.client.send(post(&stack, token, &body)).await;
        let answer = answer.expect("an answer");
        let status = answer.status().as_u16();
        let body: Value = serde_json::from_slice(answer.body()).expect("JSON");
        (status, body)
    };
    // The door opens after Envoy has the table.
    let opened = async || match send("one", body(1, "a", 0, 100)).await {
        (202, body) => Ok(body),
        other => Err(other),
    };
    let taken = wait::until("the door", opened).await;
    let expected = json!({"next": 1, "changes": 1, "rejected": 1, "duplicate": false});
    assert_eq!(taken, expected);
    assert_eq!(send("none", body(1, "a", 1, 200)).await.0, 401);
    assert_eq!(send("two", body(1, "a", 1, 200)).await.0, 403);
    assert_eq!(send("one", body(3, "a", 1, 200)).await.0, 404);
    let (status, refused) = send("one", body(1, "a", 3, 300)).await;
    assert_eq!((status, &refused["expected"]), (409, &json!(1)));
    assert_eq!(refused["error"]["kind"], "gap");
    let (status, taken) = send("one", body(1, "a", 0, 100)).await;
    assert_eq!((status, &taken["duplicate"]), (202, &json!(true)));
    assert_eq!(send("one", body(1, "a", 1, 200)).await.1["next"], 2);
    let holds = async |expected: &[u64]| {
        let compare = async || {
            let content = dump(&stack).await?;
            let held = content.get(&1).cloned().unwrap_or_default();
            let held: Vec<u64> = held.into_keys().collect();
            if held == expected {
                Ok(())
            } else {
                Err(format!("{held:?}"))
            }
        };
        wait::until("the index", compare).await;
    };
    holds(&[100, 200]).await;
    let (status, refused) = send("one", body(1, "b", 1, 300)).await;
    assert_eq!((status, &refused["expected"]), (409, &json!(0)));
    assert_eq!(send("one", body(1, "b", 0, 300)).await.0, 202);
    holds(&[300]).await;
    assert_eq!(send("one", json!({"worker_id": 1})).await.0, 400);

    // Who says too much waits; the other does not.
    let mut large = body(1, "b", 1, 400);
    large["padding"] = "x".repeat(2_000_000).into();
    assert_eq!(send("one", large).await.0, 202);
    let more = post(&stack, "one", &body(1, "b", 2, 500));
    let answer = stack.client.send(more).await.expect("an answer");
    assert_eq!(answer.status(), 429);
    assert!(answer.headers().contains_key("retry-after"));
    assert_eq!(send("two", body(2, "b", 0, 500)).await.0, 202);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_python_example_tells_what_it_holds() {
    let mut stack = stack(json!({})).await;
    let events = json!({"http": {"trust_loopback": true}});
    let worker = json!({"id": 1, "endpoint": "127.0.0.1:9", "events": events});
    serve(&mut stack, vec![worker]).await;
    let open = async || {
        let body = json!({"worker_id": 1});
        let answer = stack.client.send(post(&stack, "", &body)).await?;
        let status = answer.status();
        if status == 400 {
            Ok(())
        } else {
            Err(status.to_string())
        }
    };
    wait::until("the door", open).await;
    let script = place::root().join("docs/guide/examples/post_events.py");
    let url = uri(stack.sidecar.admin, "/v1/events");
    let mut python = tokio::process::Command::new("python3");
    let output = python.arg(script).arg(url).output().await.expect("python3");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let compare = async || {
        let content = dump(&stack).await?;
        let held = content.get(&1).cloned().unwrap_or_default();
        let held: Vec<u64> = held.into_keys().collect();
        if held == [501, 502] {
            Ok(())
        } else {
            Err(format!("{held:?}"))
        }
    };
    wait::until("the index", compare).await;
}

/// A message of Dynamo's plane over ZMQ: the store of one block.
fn dynamo_message(sequence: u64) -> zeromq::ZmqMessage {
    let block = StoredBlock {
        block_hash: sequence,
        tokens_hash: 7 + sequence,
        mm_extra_info: None,
    };
    let event = RouterEvent {
        worker_id: 1,
        storage_tier: StorageTier::Device,
        residency_domain: None,
        event: KvCacheEvent {
            event_id: sequence,
            data: EventData::Stored(Stored {
                blocks: vec![block],
                ..Stored::default()
            }),
            dp_rank: 0,
        },
        session_id: None,
    };
    let envelope = Envelope {
        publisher_id: 7,
        sequence,
        published_at: 1,
        topic: "kv-events".to_owned(),
        payload: rmp_serde::to_vec_named(&[event]).expect("serialisable"),
    };
    let envelope = rmp_serde::to_vec_named(&envelope).expect("serialisable");
    let length = u32::try_from(envelope.len()).expect("small");
    let mut frame = vec![1];
    frame.extend(length.to_be_bytes());
    frame.extend(&envelope);
    let number = |n: u64| bytes::Bytes::copy_from_slice(&n.to_be_bytes());
    let frames = vec![
        "kv-events".into(),
        number(7),
        number(sequence),
        frame.into(),
    ];
    zeromq::ZmqMessage::try_from(frames).expect("frames")
}

#[tokio::test(flavor = "multi_thread")]
async fn dynamo_publishes_over_zmq() {
    let address = format!("tcp://127.0.0.1:{}", place::free_port());
    let mut socket = PubSocket::new();
    socket.bind(&address).await.expect("a free port");
    let worker = json!({"id": 1, "endpoint": "127.0.0.1:9"});
    let more = json!({"nats": null, "dynamo_zmq": [&address], "workers": [worker]});
    let stack = stack(more).await;
    let mut sequence = 0_u64;
    // What is published before the subscription has come through is lost.
    let published = async || {
        sequence += 1;
        let message = dynamo_message(sequence);
        socket.send(message).await.map_err(|e| e.to_string())?;
        let content = dump(&stack).await?;
        let held = content.get(&1).map_or(0, BTreeMap::len);
        if held >= 3 {
            Ok(())
        } else {
            Err(format!("{held} blocks"))
        }
    };
    wait::until("the index", published).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_keeps_what_happens_while_the_sidecar_or_nats_is_away() {
    let more = |url: &str| {
        json!({"nats": {
            "url": url,
            "json_subject": "kv-events.{worker_id}",
            "json_stream": "KV",
        }})
    };
    // The stack's own NATS is not known before it runs.
    let mut stack = stack(json!({})).await;
    let context = async_nats::connect(stack.nats.url()).await.expect("NATS");
    let context = async_nats::jetstream::new(context);
    let stream = async_nats::jetstream::stream::Config {
        name: "KV".to_owned(),
        subjects: vec!["kv-events.*".to_owned()],
        ..Default::default()
    };
    context.create_stream(stream).await.expect("a stream");
    let plane = || {
        Some(EventPlane {
            url: stack.nats.url(),
            encoding: Encoding::Json {
                subject: "kv-events.{worker_id}".to_owned(),
            },
        })
    };
    let one = engine(1, plane(), None).await;
    let two = engine(2, plane(), None).await;
    let engines = [&one, &two];
    let mut rng = Rng::new(3);
    let some = |rng: &mut Rng| {
        for _ in 0..40 {
            change(rng, &engines);
        }
    };
    some(&mut rng);
    let workers: Vec<Value> = engines.iter().map(|e| worker(e, &Value::Null)).collect();
    let url = stack.nats.url();
    stack.sidecar.process.kill();
    stack.configure(|config| {
        config["nats"] = more(&url)["nats"].clone();
        config["workers"] = workers[..1].to_vec().into();
    });
    stack.sidecar.restart();
    stack.sidecar.ready().await;
    equal(&stack, &engines[..1]).await;
    // Who joins later is read from the beginning.
    serve(&mut stack, workers).await;
    equal(&stack, &engines).await;

    stack.sidecar.process.kill();
    some(&mut rng);
    stack.sidecar.restart();
    stack.sidecar.ready().await;
    equal(&stack, &engines).await;

    stack.nats.restart().await;
    some(&mut rng);
    equal(&stack, &engines).await;
}
