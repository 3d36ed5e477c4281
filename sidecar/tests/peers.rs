//! Several sidecars on one NATS: their messages to the bit, and their load in each other's answers.

mod support;

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use kv_core::event::Envelope;
use kv_core::load::Load;
use kv_core::replica::{
    ActiveSequenceEvent, ActiveSequenceEventBatch, ActiveSequenceEventData, MAX_BATCH_EVENTS,
    PrefillLoadHint, WorkerWithDpRank,
};
use kv_router::config::{Config, Problem};
use kv_router::peers::{Dropped, codec};
use serde_json::{Value, json};
use support::proxy::{Proxy, load};
use support::{Nats, eventually, free_port};
use tempfile::TempDir;

const SUBJECT: &str =
    "namespace.dynamo.component.backend.endpoint.generate.active_sequences_events";

const ADD: &str = "85aa726571756573745f6964a27231a6776f726b657282a9776f726b65725f696407a764705f72616e6b01a46461746181aa4164645265717565737484ae746f6b656e5f73657175656e6365920102b4747261636b5f70726566696c6c5f746f6b656e73c3b665787065637465645f6f75747075745f746f6b656e73cc80b170726566696c6c5f6c6f61645f68696e7482d920696e697469616c5f6566666563746976655f70726566696c6c5f746f6b656e73cd0200b965787065637465645f70726566696c6c5f6475726174696f6e82a47365637300a56e616e6f73ce0ee6b280a9726f757465725f69642aa96c6f72615f6e616d65c0";
const FREE_BATCH: &str = "81a66576656e74739185aa726571756573745f6964a27231a6776f726b657282a9776f726b65725f696407a764705f72616e6b01a464617461a446726565a9726f757465725f69642aa96c6f72615f6e616d65c0";

fn bytes(hex: &str) -> Vec<u8> {
    let digits = |i: usize| u8::from_str_radix(&hex[i..i + 2], 16).unwrap();
    (0..hex.len()).step_by(2).map(digits).collect()
}

fn event(request: &str, worker_id: u64, data: ActiveSequenceEventData) -> ActiveSequenceEvent {
    ActiveSequenceEvent {
        request_id: request.into(),
        worker: WorkerWithDpRank {
            worker_id,
            dp_rank: 0,
        },
        data,
        router_id: 42,
        lora_name: None,
    }
}

fn add(blocks: &[u64], tokens: u64) -> ActiveSequenceEventData {
    ActiveSequenceEventData::AddRequest {
        token_sequence: Some(blocks.to_vec()),
        track_prefill_tokens: true,
        expected_output_tokens: None,
        prefill_load_hint: Some(PrefillLoadHint {
            initial_effective_prefill_tokens: tokens,
            expected_prefill_duration: None,
        }),
    }
}

#[test]
fn bytes_are_those_of_the_specification() {
    let booked = ActiveSequenceEvent {
        worker: WorkerWithDpRank {
            worker_id: 7,
            dp_rank: 1,
        },
        data: ActiveSequenceEventData::AddRequest {
            token_sequence: Some(vec![1, 2]),
            track_prefill_tokens: true,
            expected_output_tokens: Some(128),
            prefill_load_hint: Some(PrefillLoadHint {
                initial_effective_prefill_tokens: 512,
                expected_prefill_duration: Some(Duration::from_millis(250)),
            }),
        },
        ..event("r1", 7, ActiveSequenceEventData::Free)
    };
    assert_eq!(rmp_serde::to_vec_named(&booked).unwrap(), bytes(ADD));
    let read: ActiveSequenceEvent = rmp_serde::from_slice(&bytes(ADD)).unwrap();
    assert_eq!(read, booked);

    let batch = ActiveSequenceEventBatch {
        events: vec![ActiveSequenceEvent {
            data: ActiveSequenceEventData::Free,
            ..booked
        }],
    };
    assert_eq!(rmp_serde::to_vec_named(&batch).unwrap(), bytes(FREE_BATCH));
    let read: ActiveSequenceEventBatch = rmp_serde::from_slice(&bytes(FREE_BATCH)).unwrap();
    assert_eq!(read, batch);
    // In its envelope, there and back.
    let message = codec::encode(7, 3, 1_700_000_000_000, batch.events.clone()).unwrap();
    let envelope: Envelope = rmp_serde::from_slice(&message).unwrap();
    assert_eq!(envelope.payload, bytes(FREE_BATCH));
    let decoded = codec::decode(&message).unwrap();
    assert_eq!((decoded.publisher, decoded.sequence), (7, 3));
    assert_eq!((decoded.events, decoded.malformed), (batch.events, 0));
}

#[test]
fn captured_marks_of_workers_are_read_and_written_to_the_bit() {
    let captures = [
        include_bytes!("fixtures/nats_active_sequences_events_1.bin").as_slice(),
        include_bytes!("fixtures/nats_active_sequences_events_2.bin").as_slice(),
    ];
    let requests = [
        "2a3a1332-5f4c-4819-92fb-a736746900c1",
        "5193d377-5237-4451-8f4f-ec9a22b6ebc0",
    ];
    for (number, (capture, request)) in (0_u64..).zip(captures.into_iter().zip(requests)) {
        let decoded = codec::decode(capture).unwrap();
        assert_eq!(decoded.publisher, 1_666_336_715_606_539);
        assert_eq!((decoded.sequence, decoded.malformed), (number, 0));
        let worker = 6_022_108_633_765_374_755;
        let expected = ActiveSequenceEvent {
            router_id: worker,
            ..event(
                request,
                worker,
                ActiveSequenceEventData::MarkPrefillCompleted,
            )
        };
        assert_eq!(decoded.events, [expected]);

        let mut envelope: Envelope = rmp_serde::from_slice(capture).unwrap();
        envelope.payload = rmp_serde::to_vec_named(&decoded.events[0]).unwrap();
        assert_eq!(rmp_serde::to_vec_named(&envelope).unwrap(), capture);
    }
}

#[test]
fn a_broken_event_costs_only_itself() {
    let good = event("good", 1, ActiveSequenceEventData::Free);
    let mut payload = vec![0x81, 0xa6];
    payload.extend(b"events");
    payload.push(0x93);
    payload.extend(rmp_serde::to_vec_named(&json!({"request_id": 5})).unwrap());
    payload.extend(rmp_serde::to_vec_named(&good).unwrap());
    // A string that ends too early.
    payload.extend([0xa9, b'x']);
    let message = |topic: &str, payload: &[u8]| {
        rmp_serde::to_vec_named(&Envelope {
            publisher_id: 1,
            sequence: 0,
            published_at: 0,
            topic: topic.into(),
            payload: payload.into(),
        })
        .unwrap()
    };
    let decoded = codec::decode(&message("active_sequences_events", &payload)).unwrap();
    assert_eq!((decoded.events, decoded.malformed), (vec![good], 2));
    for broken in [&[][..], &[0xc0], &[0x80], &[0x81, 0xa6]] {
        let message = message("active_sequences_events", broken);
        assert_eq!(codec::decode(&message), Err(Dropped::Malformed));
    }
    assert_eq!(codec::decode(b"x"), Err(Dropped::Malformed));
    let other = message("kv-events", &payload);
    assert_eq!(codec::decode(&other), Err(Dropped::WrongTopic));
}

#[test]
fn batches_are_bounded_in_events_and_bytes() {
    let free = event("r", 1, ActiveSequenceEventData::Free);
    let mut events = vec![free; MAX_BATCH_EVENTS + 1];
    assert_eq!(codec::batch(&mut events).len(), MAX_BATCH_EVENTS);
    assert_eq!(codec::batch(&mut events).len(), 1);
    assert!(codec::batch(&mut events).is_empty());

    let blocks = vec![u64::MAX; codec::MAX_BATCH_BLOCKS];
    let mut events = vec![
        event("long", 1, add(&blocks, 1)),
        event("b", 1, add(&[1], 1)),
    ];
    let long = codec::batch(&mut events);
    assert_eq!((long.len(), events.len()), (1, 1));
    let message = codec::encode(u64::MAX, u64::MAX, u64::MAX, long).unwrap();
    assert!(message.len() < 1 << 20, "{} bytes", message.len());
}

#[test]
fn load_is_exchanged_only_where_there_are_subjects_for_it() {
    let nats = "nats: {url: 'nats://h', json_subject: 'kv-events.{worker_id}', replica_sync: true}";
    let errors = Config::parse(nats, &[]).unwrap_err();
    let paths = errors.problems().map(|problem| match problem {
        Problem::Value { path, .. } => path.as_str(),
        other => panic!("{other}"),
    });
    assert_eq!(paths.collect::<Vec<_>>(), ["nats.replica_sync"]);

    let dynamo = "nats: {url: 'nats://h', dynamo: {namespace: a, component: b}}";
    assert!(
        !Config::parse(dynamo, &[])
            .unwrap()
            .nats
            .unwrap()
            .replica_sync
    );
    let name = "DYN_ROUTER_REPLICA_SYNC";
    let set =
        |text: &str| kv_router::config::from_environment([(name.to_owned(), text.to_owned())]);
    for (text, expected) in [("true", true), ("false", false)] {
        let nats = Config::parse(dynamo, &set(text)).unwrap().nats.unwrap();
        assert_eq!(nats.replica_sync, expected);
    }
}

/// A `kv-router serve` of its own process, with two workers.
struct Router {
    process: Child,
    folder: TempDir,
    admin: u16,
}

impl Router {
    async fn start(nats: &Nats) -> Self {
        let (folder, admin) = (TempDir::new().unwrap(), free_port());
        let at = |name: &str| folder.path().join(name);
        let config = json!({
            "admin": format!("127.0.0.1:{admin}"),
            "envoy_admin": "127.0.0.1:1",
            "socket": at("bridge.sock"),
            "nats": {
                "url": nats.url(),
                "dynamo": {"namespace": "dynamo", "component": "backend"},
                "replica_sync": true,
            },
            "workers": [
                {"id": 1, "endpoint": "1.1.1.1:1"},
                {"id": 2, "endpoint": "1.1.1.1:2"},
            ],
        });
        std::fs::write(at("config.yaml"), config.to_string()).unwrap();
        let log = std::fs::File::create(at("log")).unwrap();
        let process = Command::new(env!("CARGO_BIN_EXE_kv-router"))
            .args(["serve", "--config"])
            .arg(at("config.yaml"))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let router = Self {
            process,
            folder,
            admin,
        };
        let answers = async || router.get("/healthz").await.ok();
        eventually("the sidecar answers", answers).await;
        router
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("bridge.sock")
    }

    async fn get(&self, path: &str) -> anyhow::Result<String> {
        let stream = tokio::net::TcpStream::connect(("127.0.0.1", self.admin)).await?;
        let io = TokioIo::new(stream);
        let (mut send, connection) = hyper::client::conn::http1::handshake(io).await?;
        let connection = tokio::spawn(connection);
        let request = http::Request::get(path)
            .header("host", "sidecar")
            .body(Full::new(Bytes::new()))?;
        let body = send.send_request(request).await?.into_body();
        let bytes = body.collect().await?.to_bytes();
        drop(send);
        connection.await??;
        Ok(String::from_utf8(bytes.to_vec())?)
    }

    async fn owner(&self, worker: usize) -> Value {
        let workers = self.get("/v1/workers").await.unwrap();
        let workers: Value = serde_json::from_str(&workers).unwrap();
        workers["pools"][0]["owners"][worker - 1].clone()
    }

    /// Waits until the load of a worker is this.
    async fn becomes(&self, worker: usize, load: Load) {
        let expected = json!({
            "prefill_tokens": load.prefill_tokens, "waiting": load.waiting,
            "decoding": load.decoding, "blocks": load.blocks,
        });
        let what = format!("worker {worker} with {expected}");
        let is_so = async || (self.owner(worker).await["load"] == expected).then_some(());
        eventually(&what, is_so).await;
    }

    /// Requests on a worker that peers booked.
    async fn of_peers(&self, worker: usize) -> u64 {
        let owner = self.owner(worker).await;
        let peers = owner["peers"].as_array().unwrap().iter();
        peers.map(|peer| peer["requests"].as_u64().unwrap()).sum()
    }

    /// Value of a metric; 0 while there is none.
    async fn metric(&self, name: &str) -> u64 {
        let metrics = self.get("/metrics").await.unwrap();
        let line = metrics.lines().find_map(|l| l.strip_prefix(name));
        line.map_or(0, |value| value.trim().parse().unwrap())
    }

    async fn counts(&self, name: &str, at_least: u64) {
        let what = format!("{name} of at least {at_least}");
        let is_so = async || (self.metric(name).await >= at_least).then_some(());
        eventually(&what, is_so).await;
    }

    /// Waits until nothing is booked, here or by what proxies are told.
    async fn is_empty(&self) {
        let is_so = async || {
            let raw = self.get("/v1/workers?raw").await.unwrap();
            let raw: Value = serde_json::from_str(&raw).unwrap();
            let raw = &raw["raw"];
            let zero = json!({"prefill_tokens": 0, "waiting": 0, "decoding": 0, "blocks": 0});
            let proxies = raw["proxies"].as_array().unwrap().iter();
            let mut lanes = proxies.flat_map(|p| p["owners"].as_array().unwrap());
            let clean = lanes.all(|o| o["load"] == zero && o["correction"] == zero);
            (raw["bookings"] == 0 && clean).then_some(())
        };
        eventually("no load", is_so).await;
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        let _already_dead = self.process.kill();
        let _reaped = self.process.wait();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.folder.path().join("log"));
            eprintln!("--- sidecar\n{}", log.unwrap_or_default());
        }
    }
}

/// Waits until sidecars know each other.
async fn acquainted(routers: &[&Router]) {
    for router in routers {
        let others = routers.len() as u64 - 1;
        router.counts("kv_router_peers ", others).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn proxies_of_two_sidecars_see_the_same_load_and_shared_blocks_once() {
    let nats = Nats::start().await;
    let (left, right) = (Router::start(&nats).await, Router::start(&nats).await);
    acquainted(&[&left, &right]).await;
    let mut one = Proxy::start(&left.socket(), 1).await;
    let mut two = Proxy::start(&right.socket(), 2).await;

    one.vm.book(1, 1, &[11, 12, 13]);
    one.report().await;
    two.sees(1, load(48, 1, 0, 3)).await;
    two.vm.book(1, 1, &[11, 12, 99]);
    two.report().await;
    let both = load(96, 2, 0, 4);
    one.sees(1, both).await;
    left.becomes(1, both).await;
    right.becomes(1, both).await;
    assert_eq!((left.of_peers(1).await, right.of_peers(1).await), (1, 1));
    assert_eq!((left.of_peers(2).await, right.of_peers(2).await), (0, 0));

    one.vm.first_token(1);
    one.report().await;
    two.sees(1, load(48, 1, 1, 4)).await;
    two.vm.move_to(1, 2);
    two.report().await;
    one.sees(1, load(0, 0, 1, 3)).await;
    left.becomes(2, load(48, 1, 0, 3)).await;
    // And back to where it was before.
    two.vm.move_to(1, 1);
    two.report().await;
    left.becomes(1, load(48, 1, 1, 4)).await;

    one.vm.free(1);
    two.vm.free(1);
    one.report().await;
    two.report().await;
    left.is_empty().await;
    right.is_empty().await;
    for router in [&left, &right] {
        let metrics = router.get("/metrics").await.unwrap();
        let dropped = metrics
            .lines()
            .find(|l| l.starts_with("kv_router_peer_dropped_total{"));
        assert_eq!(dropped, None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sidecar_that_starts_late_learns_what_is_live() {
    let nats = Nats::start().await;
    let early = Router::start(&nats).await;
    let mut proxy = Proxy::start(&early.socket(), 1).await;
    // More than one message holds.
    for request in 0..600 {
        let worker = 1 + request % 2;
        proxy.vm.book(request, worker, &[5, 1_000 + request]);
        if request % 3 == 0 {
            proxy.vm.first_token(request);
        }
    }
    proxy.report().await;
    let expected = [load(6_400, 200, 100, 301), load(6_400, 200, 100, 301)];
    early.becomes(1, expected[0]).await;
    let late = Router::start(&nats).await;
    late.becomes(1, expected[0]).await;
    late.becomes(2, expected[1]).await;
    assert_eq!(late.of_peers(1).await + late.of_peers(2).await, 600);
    assert!(
        early
            .metric("kv_router_peer_snapshots_total{kind=\"answered\"} ")
            .await
            >= 1
    );
    (0..600).for_each(|request| proxy.vm.free(request));
    proxy.report().await;
    late.is_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_sidecar_leaves_no_load_behind() {
    let nats = Nats::start().await;
    let (left, mut right) = (Router::start(&nats).await, Router::start(&nats).await);
    acquainted(&[&left, &right]).await;
    let mut watching = Proxy::start(&left.socket(), 1).await;
    let mut proxy = Proxy::start(&right.socket(), 2).await;
    proxy.vm.book(1, 1, &[1, 2, 3]);
    proxy.vm.book(2, 2, &[1, 2, 3]);
    proxy.report().await;
    watching.sees(2, load(48, 1, 0, 3)).await;
    left.becomes(1, load(48, 1, 0, 3)).await;
    right.process.kill().unwrap();
    left.is_empty().await;
    assert_eq!(left.metric("kv_router_lost_peers_total ").await, 1);
    assert_eq!(left.metric("kv_router_peers ").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn load_while_nats_is_away_is_told_afterwards() {
    let nats = Nats::start().await;
    let port = nats.port;
    let (left, right) = (Router::start(&nats).await, Router::start(&nats).await);
    acquainted(&[&left, &right]).await;
    let mut proxy = Proxy::start(&right.socket(), 2).await;
    proxy.vm.book(1, 1, &[1]);
    proxy.vm.book(2, 1, &[2]);
    proxy.report().await;
    left.becomes(1, load(32, 2, 0, 2)).await;
    drop(nats);
    let is_away = async || (right.metric("kv_router_nats_connected ").await == 0).then_some(());
    eventually("nats is away", is_away).await;
    proxy.vm.free(1);
    proxy.vm.first_token(2);
    proxy.vm.book(3, 2, &[3]);
    proxy.report().await;
    right.becomes(2, load(16, 1, 0, 1)).await;
    let _nats = Nats::start_on(port).await;
    left.becomes(1, load(0, 0, 1, 1)).await;
    left.becomes(2, load(16, 1, 0, 1)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_of_dynamo_is_understood_and_can_understand() {
    let nats = Nats::start().await;
    let router = Router::start(&nats).await;
    router.counts("kv_router_nats_connected ", 1).await;
    let client = async_nats::connect(nats.url()).await.unwrap();
    let mut heard = client.subscribe(SUBJECT).await.unwrap();
    client.flush().await.unwrap();
    let send = async |sequence: u64, events: Vec<ActiveSequenceEvent>| {
        let message = codec::encode(9, sequence, 0, events).unwrap();
        client.publish(SUBJECT, message.into()).await.unwrap();
        client.flush().await.unwrap();
    };
    let events = vec![
        event("a", 1, add(&[1, 2], 512)),
        event("b", 2, add(&[1, 2], 256)),
        event("c", 77, add(&[3], 16)),
    ];
    // The subscription may not be there yet: the request is told until it is booked.
    let booked = async || {
        send(0, events.clone()).await;
        let is_so = router.owner(1).await["load"]["waiting"] == 1;
        is_so.then_some(())
    };
    eventually("the router's request", booked).await;
    router.becomes(1, load(512, 1, 0, 2)).await;
    router
        .counts("kv_router_peer_dropped_total{kind=\"unknown_worker\"} ", 1)
        .await;
    // A worker tells of its own first token: one event, no batch.
    let mark = ActiveSequenceEvent {
        router_id: 1,
        ..event("a", 1, ActiveSequenceEventData::MarkPrefillCompleted)
    };
    let envelope = Envelope {
        publisher_id: 5,
        sequence: 0,
        published_at: 0,
        topic: "active_sequences_events".into(),
        payload: rmp_serde::to_vec_named(&mark).unwrap(),
    };
    let message = rmp_serde::to_vec_named(&envelope).unwrap();
    client.publish(SUBJECT, message.into()).await.unwrap();
    router.becomes(1, load(0, 0, 1, 2)).await;
    send(1, vec![event("b", 2, ActiveSequenceEventData::Free)]).await;
    router.becomes(2, load(0, 0, 0, 0)).await;

    let mut proxy = Proxy::start(&router.socket(), 1).await;
    proxy.vm.book(1, 2, &[21, 22]);
    proxy.report().await;
    let mut own = async |events: usize| {
        let mut got: Vec<ActiveSequenceEvent> = Vec::new();
        while got.len() < events {
            let message = tokio::time::timeout(Duration::from_secs(20), heard.next());
            let message = message.await.expect("a message").unwrap();
            let envelope: Envelope = rmp_serde::from_slice(&message.payload).unwrap();
            if ![9, 5].contains(&envelope.publisher_id) {
                let batch: ActiveSequenceEventBatch =
                    rmp_serde::from_slice(&envelope.payload).unwrap();
                assert!(
                    batch
                        .events
                        .iter()
                        .all(|e| e.router_id == envelope.publisher_id)
                );
                got.extend(batch.events);
            }
        }
        got
    };
    let told = own(1).await;
    assert!(told[0].router_id < 1 << 53);
    assert_eq!(
        (told[0].worker.worker_id, &told[0].data),
        (2, &add(&[21, 22], 32))
    );
    // A move is another request: what a router of Dynamo has freed it books no more.
    proxy.vm.move_to(1, 1);
    proxy.report().await;
    let moved = own(2).await;
    assert_eq!(moved[0].request_id, told[0].request_id);
    assert_eq!(moved[0].data, ActiveSequenceEventData::Free);
    assert_ne!(moved[1].request_id, told[0].request_id);
    assert_eq!(
        (moved[1].worker.worker_id, &moved[1].data),
        (1, &add(&[21, 22], 32))
    );
    proxy.vm.first_token(1);
    proxy.vm.free(1);
    proxy.report().await;
    let ended = own(1).await;
    assert_eq!(ended[0].request_id, moved[1].request_id);
    assert_eq!(ended[0].data, ActiveSequenceEventData::Free);
}
