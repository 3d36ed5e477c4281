//! Dynamo's own simulated engines, published over NATS and over ZMQ, are indexed without a dropped
//! event and as Dynamo's own indexer has them.
//!
//! Needs `MOCKER_ENV`, a virtual environment with Dynamo's packages, and `NATS_SERVER`; `make
//! parity-mocker` sees to both.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::{Request, header};
use dynamo_kv_router::RoutingPartitionId;
use dynamo_kv_router::protocols::RouterEvent;
use dynamo_kv_router::services::indexer::server::{AppState, create_router};
use futures::StreamExt as _;
use http_body_util::BodyExt as _;
use kv_core::event::Envelope;
use kv_core::rng::Rng;
use kv_router::config::Config;
use kv_router::serve;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

const MODEL: &str = "tiny";
const BLOCK_SIZE: u32 = 16;
const SUBJECT: &str = "namespace.dynamo.component.backend.endpoint.generate.kv-events";
/// How long programs may take to come up, and what was sent to arrive.
const PATIENCE: Duration = Duration::from_secs(120);

/// A program that ends with this.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(command: &mut Command, log: &Path) -> Program {
    let log = std::fs::File::create(log).unwrap();
    let child = command
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn();
    Program(child.unwrap_or_else(|e| panic!("{command:?}: {e}")))
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn variable(name: &str) -> PathBuf {
    let value = std::env::var_os(name).unwrap_or_else(|| panic!("{name}: run make parity-mocker"));
    value.into()
}

/// Waits until there is something.
async fn until<T, F: Future<Output = Option<T>>>(what: &str, mut check: impl FnMut() -> F) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = check().await {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn post(url: &str, body: &Value) -> Result<Value, reqwest::Error> {
    let client = reqwest::Client::new();
    let answer = client
        .post(url)
        .header(header::CONTENT_TYPE, "application/json")
        .body(body.to_string())
        .send()
        .await?
        .error_for_status()?;
    Ok(serde_json::from_slice(&answer.bytes().await?).unwrap())
}

async fn get(url: &str) -> Option<Value> {
    let answer = reqwest::get(url).await.ok()?;
    serde_json::from_slice(&answer.bytes().await.ok()?).ok()
}

/// Values in the files of a folder of Dynamo's discovery.
fn discovered(folder: &Path, part: &str) -> Vec<(String, Value)> {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let files = entries.filter_map(|entry| {
        let entry = entry.ok()?;
        let name = entry.file_name().into_string().ok()?;
        let text = std::fs::read(entry.path()).ok()?;
        Some((name, serde_json::from_slice(&text).ok()?))
    });
    files.filter(|(name, _)| name.contains(part)).collect()
}

/// What was published, as it came.
#[derive(Clone, Default)]
struct Capture(Arc<Mutex<Vec<RouterEvent>>>);

impl Capture {
    fn take(&self, envelope: &[u8]) {
        let envelope: Envelope = rmp_serde::from_slice(envelope).unwrap();
        let events: Vec<RouterEvent> = rmp_serde::from_slice(&envelope.payload).unwrap();
        self.0.lock().unwrap().extend(events);
    }

    fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}

/// Dynamo's engines and frontend.
struct Dynamo {
    frontend: String,
    workers: Vec<u64>,
    /// Sockets of the event plane over ZMQ.
    sockets: Vec<String>,
    nats: String,
    _programs: Vec<Program>,
    folder: tempfile::TempDir,
}

impl Dynamo {
    async fn start(plane: &str) -> Self {
        let folder = tempfile::TempDir::new().unwrap();
        let python = variable("MOCKER_ENV").join("bin/python");
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/mocker.py");
        let model = folder.path().join("model");
        let made = Command::new(&python)
            .arg(script)
            .arg("model")
            .arg(&model)
            .status();
        assert!(made.unwrap().success());
        let discovery = folder.path().join("discovery");
        std::fs::create_dir(&discovery).unwrap();
        let (nats_port, http_port) = (free_port().to_string(), free_port().to_string());
        let nats = format!("nats://127.0.0.1:{nats_port}");
        let module = |name: &str| {
            let mut command = Command::new(&python);
            command
                .args(["-m", name])
                .env("DYN_DISCOVERY_BACKEND", "file")
                .env("DYN_FILE_KV", &discovery)
                .env("DYN_REQUEST_PLANE", "tcp")
                .env("DYN_EVENT_PLANE", plane)
                .env("NATS_SERVER", &nats)
                .env("DYN_LOG", "warn")
                .env("HF_HUB_OFFLINE", "1");
            for host in [
                "DYN_EVENT_PLANE_HOST",
                "DYN_TCP_RPC_HOST",
                "DYN_TCP_RESPONSE_STREAM_HOST",
            ] {
                command.env(host, "127.0.0.1");
            }
            command
        };
        let mut programs = Vec::new();
        let log = |name: &str| folder.path().join(name);
        if plane == "nats" {
            let mut server = Command::new(variable("NATS_SERVER"));
            server.args(["-a", "127.0.0.1", "-p", &nats_port]);
            programs.push(start(&mut server, &log("nats.log")));
        }
        let mut mocker = module("dynamo.mocker");
        mocker.arg("--model-path").arg(&model).args([
            "--model-name",
            MODEL,
            "--num-workers",
            "2",
            "--block-size",
            "16",
            // Few, so that blocks are dropped.
            "--num-gpu-blocks-override",
            "256",
            "--speedup-ratio",
            "10",
            "--discovery-backend",
            "file",
            "--request-plane",
            "tcp",
            "--event-plane",
            plane,
        ]);
        programs.push(start(&mut mocker, &log("mocker.log")));
        let mut server = module("dynamo.frontend");
        server.args(["--http-host", "127.0.0.1", "--http-port", &http_port]);
        server.args(["--router-mode", "kv"]);
        programs.push(start(&mut server, &log("frontend.log")));
        let frontend = format!("http://127.0.0.1:{http_port}");
        let models = format!("{frontend}/v1/models");
        until("the model at the frontend", || async {
            let models = get(&models).await?;
            (models["data"][0]["id"] == MODEL).then_some(())
        })
        .await;
        let v1 = discovery.join("v1");
        let workers = until("two workers", || async {
            let found = discovered(&v1.join("event_sources"), "kv%2Devents");
            let ids = found
                .iter()
                .filter_map(|(_, source)| source["metadata"]["worker"]["worker_id"].as_u64());
            let ids: Vec<u64> = ids.collect();
            (ids.len() == 2).then_some(ids)
        })
        .await;
        let channels = discovered(&v1.join("event_channels"), "kv%2Devents");
        let sockets = channels.iter().filter_map(|(_, channel)| {
            let endpoint = channel["transport"]["config"]["endpoint"].as_str();
            endpoint.map(str::to_owned)
        });
        Self {
            frontend,
            workers,
            sockets: sockets.collect(),
            nats,
            _programs: programs,
            folder,
        }
    }
}

/// A running sidecar.
struct Sidecar {
    admin: SocketAddr,
    indexer: SocketAddr,
    _cancel: tokio_util::sync::DropGuard,
}

impl Sidecar {
    fn start(dynamo: &Dynamo, source: &str) -> Self {
        let address = || SocketAddr::from(([127, 0, 0, 1], free_port()));
        let (admin, indexer) = (address(), address());
        let workers = dynamo.workers.iter().zip(1..);
        let workers =
            workers.map(|(id, n)| format!("  - {{id: {id}, endpoint: '127.0.0.1:{n}'}}\n"));
        let folder = dynamo.folder.path().display();
        let text = format!(
            "admin: {admin}\nsocket: {folder}/bridge.sock\nindexer: {{listen: '{indexer}'}}\n{source}\n\
             models: [{MODEL}]\nkv_cache_block_size: {BLOCK_SIZE}\nworkers:\n{}",
            workers.collect::<String>()
        );
        let file = dynamo.folder.path().join("kv-router.yaml");
        std::fs::write(&file, &text).unwrap();
        let config = Config::parse(&text, &[]).unwrap();
        let source = serve::Source {
            file,
            layers: Vec::new(),
            envoy_files: None,
        };
        let cancel = CancellationToken::new();
        let serving = serve::run(config, source, cancel.clone());
        tokio::spawn(async move { serving.await.unwrap() });
        Self {
            admin,
            indexer,
            _cancel: cancel.drop_guard(),
        }
    }

    async fn index(&self) -> Option<Value> {
        get(&format!("http://{}/v1/index", self.admin)).await
    }

    /// Events applied on Dynamo's plane.
    async fn applied(&self) -> Option<u64> {
        let index = self.index().await?;
        let events = index["planes"]["dynamo"]["events"].as_object()?;
        Some(events.values().filter_map(Value::as_u64).sum())
    }
}

/// Token ids of a prompt that shares its beginning with others.
fn prompt(rng: &mut Rng) -> Vec<u32> {
    let (family, branch) = (rng.below(6), rng.below(4));
    let length = 40 + rng.below(500);
    let word = |i: usize| {
        let seed = if i < 160 {
            family
        } else {
            100 + 10 * family + branch
        };
        3 + ((seed * 7919 + i * 104_729) % 990) as u32
    };
    (0..length).map(word).collect()
}

async fn indexes_as_dynamo(dynamo: &Dynamo, sidecar: &Sidecar, capture: &Capture) {
    let mut rng = Rng::new(5);
    let completions = format!("{}/v1/completions", dynamo.frontend);
    for _ in 0..200 {
        let body = json!({"model": MODEL, "prompt": prompt(&mut rng), "max_tokens": 4});
        post(&completions, &body).await.unwrap();
    }
    let mut last = (0, 0);
    until("all events, and no more", || {
        let before = last;
        let sidecar = &sidecar;
        let captured = capture.len();
        // As long again as nothing has changed.
        last = if captured == before.0 {
            (captured, before.1 + 1)
        } else {
            (captured, 0)
        };
        let quiet = last.1 > 20;
        async move { (quiet && sidecar.applied().await? == captured as u64).then_some(()) }
    })
    .await;
    let index = sidecar.index().await.unwrap();
    let plane = &index["planes"]["dynamo"];
    assert_eq!(plane["rejected"], json!({}), "{index:#}");
    assert_eq!(index["gaps"], 0, "{index:#}");
    assert_eq!(
        index["blocks"]["orphaned"].as_u64().unwrap_or(0),
        0,
        "{index:#}"
    );
    assert!(plane["events"]["removed"].as_u64() > Some(10), "{index:#}");

    let state = Arc::new(AppState::new(1).unwrap());
    let partition = RoutingPartitionId::new(MODEL, "default");
    let indexer = state.registry.get_or_create_indexer(partition, BLOCK_SIZE);
    let events = capture.0.lock().unwrap().clone();
    for event in events {
        indexer.apply_event_routed(event).await.unwrap();
    }
    indexer.dump_events().await.unwrap();
    let theirs = create_router(state);
    let mut held = 0;
    for _ in 0..300 {
        let body = json!({"model_name": MODEL, "token_ids": prompt(&mut rng)});
        let request = Request::post("/query").header(header::CONTENT_TYPE, "application/json");
        let request = request.body(Body::from(body.to_string())).unwrap();
        let answer = theirs.clone().oneshot(request).await.unwrap();
        let them = answer.into_body().collect().await.unwrap().to_bytes();
        let them: Value = serde_json::from_slice(&them).unwrap();
        let us = post(&format!("http://{}/query", sidecar.indexer), &body)
            .await
            .unwrap();
        assert_eq!(us, them, "{body}");
        held += usize::from(us["scores"] != json!({}));
    }
    println!(
        "{} events; {held} of 300 prompts held somewhere",
        capture.len()
    );
    assert!(held > 100, "{held}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Dynamo's packages: make parity-mocker"]
async fn engines_on_nats_are_indexed_as_dynamo_has_them() {
    let dynamo = Dynamo::start("nats").await;
    let capture = Capture::default();
    let client = async_nats::connect(&dynamo.nats).await.unwrap();
    let mut messages = client.subscribe(SUBJECT).await.unwrap();
    client.flush().await.unwrap();
    let taker = capture.clone();
    tokio::spawn(async move {
        while let Some(message) = messages.next().await {
            taker.take(&message.payload);
        }
    });
    let plane = "dynamo: {namespace: dynamo, component: backend}";
    let sidecar = Sidecar::start(
        &dynamo,
        &format!("nats: {{url: '{}', {plane}}}", dynamo.nats),
    );
    let ready = format!("http://{}/metrics", sidecar.admin);
    until("nats", || async {
        let text = reqwest::get(&ready).await.ok()?.text().await.ok()?;
        text.contains("kv_router_nats_connected 1").then_some(())
    })
    .await;
    indexes_as_dynamo(&dynamo, &sidecar, &capture).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Dynamo's packages: make parity-mocker"]
async fn engines_on_zmq_are_indexed_as_dynamo_has_them() {
    let dynamo = Dynamo::start("zmq").await;
    assert_eq!(dynamo.sockets.len(), 2);
    let capture = Capture::default();
    let context = zmq::Context::new();
    for socket in &dynamo.sockets {
        let subscriber = context.socket(zmq::SUB).unwrap();
        subscriber.set_subscribe(b"").unwrap();
        subscriber.connect(socket).unwrap();
        let taker = capture.clone();
        std::thread::spawn(move || {
            // Ends with the test's process.
            while let Ok(frames) = subscriber.recv_multipart(0) {
                taker.take(&frames[3][5..]);
            }
        });
    }
    let sockets = json!(dynamo.sockets);
    let sidecar = Sidecar::start(&dynamo, &format!("dynamo_zmq: {sockets}"));
    // A first request, until both have heard of it: a subscription takes a moment.
    let warm = format!("{}/v1/completions", dynamo.frontend);
    let ready = format!("http://{}/metrics", sidecar.admin);
    until("both sockets", || async {
        let text = reqwest::get(&ready).await.ok()?.text().await.ok()?;
        let opened = r#"kv_router_streams_total{plane="dynamo",kind="opened"} 2"#;
        text.contains(opened).then_some(())
    })
    .await;
    let mut rng = Rng::new(1);
    until("events at both", || {
        let body = json!({"model": MODEL, "prompt": prompt(&mut rng), "max_tokens": 1});
        let (warm, sidecar, capture) = (&warm, &sidecar, &capture);
        async move {
            post(warm, &body).await.unwrap();
            (capture.len() > 0 && sidecar.applied().await? > 0).then_some(())
        }
    })
    .await;
    indexes_as_dynamo(&dynamo, &sidecar, &capture).await;
}
