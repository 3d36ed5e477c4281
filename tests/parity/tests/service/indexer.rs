//! The standalone indexer answers as Dynamo's own service does, byte for byte where both say the
//! same.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Method, Request, StatusCode, header};
use dynamo_kv_router::RoutingPartitionId;
use dynamo_kv_router::services::indexer::backend::Indexer;
use dynamo_kv_router::services::indexer::registry::WorkerRegistry;
use dynamo_kv_router::services::indexer::server::{AppState, create_router};
use http_body_util::BodyExt as _;
use kv_core::event::{EventData, RouterEvent};
use kv_core::id::{OwnerId, Tier};
use kv_parity::history::{History, Manners, Step};
use kv_parity::oracle::{Oracle, router_event};
use kv_router::indexer::{Face, router};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tower::ServiceExt as _;

use crate::sidecar::Sidecar;

const MODEL: &str = "tiny";
const BLOCK_SIZE: u32 = 16;

/// An answer.
#[derive(Debug, PartialEq)]
struct Answer {
    status: StatusCode,
    content_type: Option<String>,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

async fn ask(app: &Router, method: Method, path: &str, body: impl Into<Body>) -> Answer {
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::CONTENT_TYPE, "application/json")
        .body(body.into())
        .unwrap();
    answered(app, request).await
}

async fn answered(app: &Router, request: Request<Body>) -> Answer {
    let response = app.clone().oneshot(request).await.unwrap();
    let status = response.status();
    let content_type = response.headers().get(header::CONTENT_TYPE);
    let content_type = content_type.map(|v| v.to_str().unwrap().to_owned());
    let body = response.into_body().collect().await.unwrap().to_bytes();
    Answer {
        status,
        content_type,
        body: String::from_utf8(body.to_vec()).unwrap(),
    }
}

async fn post(app: &Router, path: &str, body: &Value) -> Answer {
    ask(app, Method::POST, path, body.to_string()).await
}

async fn get(app: &Router, path: &str) -> Answer {
    ask(app, Method::GET, path, Body::empty()).await
}

/// Dynamo's service.
struct Theirs {
    app: Router,
    registry: Arc<WorkerRegistry>,
}

impl Theirs {
    fn new() -> Self {
        let state = Arc::new(AppState::new(1).unwrap());
        state.registry.signal_ready();
        let registry = Arc::clone(&state.registry);
        Self {
            app: create_router(state),
            registry,
        }
    }

    fn indexer(&self) -> Indexer {
        let partition = RoutingPartitionId::new(MODEL, "default");
        self.registry.get_or_create_indexer(partition, BLOCK_SIZE)
    }

    async fn apply(&self, step: &Step) {
        match step {
            Step::Event(owner, tier, data) => {
                let event = router_event(*owner, *tier, data);
                self.indexer().apply_event_routed(event).await.unwrap();
            }
            Step::Leave(owner) => {
                let reset = self.indexer();
                reset
                    .reset_worker_dp_rank_and_wait(owner.worker, owner.rank)
                    .await
                    .unwrap();
            }
        }
    }
}

/// Our service behind the same routes.
struct Ours {
    app: Router,
    sidecar: Sidecar,
}

impl Ours {
    fn new(yaml: &str) -> Self {
        let sidecar = Sidecar::new(yaml);
        let face = Face::new(sidecar.control.clone(), sidecar.registry.clone(), None);
        Self {
            app: router(face),
            sidecar,
        }
    }

    async fn apply(&mut self, step: &Step) {
        self.sidecar.apply(step).await;
    }

    async fn settle(&self) {
        self.sidecar.settle().await;
    }
}

fn three_workers() -> String {
    let workers = (7..10).map(|id| {
        format!(
            "  - {{id: {id}, endpoint: '127.0.0.1:{}', data_parallel_size: 2}}\n",
            20_000 + id
        )
    });
    let workers: String = workers.collect();
    format!(
        "indexer: {{}}\nmodels: [{MODEL}]\nkv_cache_block_size: {BLOCK_SIZE}\nworkers:\n{workers}"
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn queries_are_answered_alike() {
    let (mut compared, mut credited) = (0, 0);
    for seed in 0..200 {
        let mut history = History::new(seed, Manners::Orderly);
        let (theirs, mut ours) = (Theirs::new(), Ours::new(&three_workers()));
        theirs.indexer();
        for _ in 0..48 {
            let step = history.step();
            theirs.apply(&step).await;
            ours.apply(&step).await;
        }
        // A dump waits for all that was sent before.
        theirs.indexer().dump_events().await.unwrap();
        ours.settle().await;
        for _ in 0..8 {
            let prompt = history.prompt();
            let is_alike = history.contents.values().all(|content| {
                let [device, ..] = content.reachable(&prompt.names);
                content.reachable(&prompt.names) == content.walked(&prompt.names, device)
            });
            if !is_alike {
                continue;
            }
            let hashes: Vec<i64> = prompt.tokens.iter().map(|t| t.cast_signed()).collect();
            let body = json!({"block_hashes": hashes, "model_name": MODEL});
            let them = post(&theirs.app, "/query_by_hash", &body).await;
            let us = post(&ours.app, "/query_by_hash", &body).await;
            assert_eq!(us, them, "seed {seed}");
            compared += 1;
            credited += usize::from(us.json()["instances"] != json!({}));
        }
    }
    assert!(compared > 1_000 && credited > 500, "{compared} {credited}");
}

#[tokio::test]
async fn a_query_by_tokens_knows_adapter_and_salt() {
    let tokens: Vec<u32> = (0..64).collect();
    let owner = OwnerId { worker: 7, rank: 1 };
    for (lora, salt) in [("", ""), ("adapter-a", ""), ("", "tenant-1"), ("a", "b")] {
        let (theirs, mut ours) = (Theirs::new(), Ours::new(&three_workers()));
        let seed = kv_core::hash::Seed::new(lora, salt);
        let blocks = tokens[..48].chunks(16).zip(101..);
        let blocks = blocks.map(|(block, name)| kv_core::event::StoredBlock {
            block_hash: name,
            tokens_hash: seed.block(block),
            mm_extra_info: None,
        });
        let stored = kv_core::event::Stored {
            blocks: blocks.collect(),
            ..Default::default()
        };
        let step = Step::Event(owner, Tier::Device, EventData::Stored(stored));
        theirs.apply(&step).await;
        ours.apply(&step).await;
        theirs.indexer().dump_events().await.unwrap();
        ours.settle().await;
        let body = json!({
            "token_ids": tokens, "model_name": MODEL, "lora_name": lora, "cache_salt": salt,
            "tenant_id": "anything",
        });
        let them = post(&theirs.app, "/query", &body).await;
        let us = post(&ours.app, "/query", &body).await;
        assert_eq!(us, them);
        assert_eq!(us.json()["scores"], json!({"7": {"1": 48}}));
        let other = json!({"token_ids": tokens, "model_name": MODEL, "lora_name": "other"});
        let them = post(&theirs.app, "/query", &other).await;
        assert_eq!(post(&ours.app, "/query", &other).await, them);
    }
}

#[tokio::test]
async fn what_is_wrong_with_a_request_is_told_alike() {
    let (theirs, ours) = (Theirs::new(), Ours::new(&three_workers()));
    theirs.indexer();
    let long = format!(
        r#"{{"token_ids":[{}0],"model_name":"{MODEL}"}}"#,
        "0,".repeat(4 << 20)
    );
    let cases = [
        (
            Method::POST,
            "/query",
            r#"{"token_ids":[1],"model_name":"other"}"#.into(),
        ),
        (
            Method::POST,
            "/query",
            r#"{"token_ids":[1],"model_name":"tiny","routing_group":"b"}"#.into(),
        ),
        (Method::POST, "/query", r#"{"token_ids":[1]}"#.into()),
        (
            Method::POST,
            "/query",
            r#"{"token_ids":[-1],"model_name":"tiny"}"#.into(),
        ),
        (Method::POST, "/query", r#"{"token_ids":"#.into()),
        (
            Method::POST,
            "/query",
            r#"{"token_ids":[],"model_name":"tiny"}"#.into(),
        ),
        (Method::POST, "/query", long),
        (Method::GET, "/query", String::new()),
        (
            Method::POST,
            "/query_by_hash",
            r#"{"block_hashes":[1],"model_name":"tiny","cache_salt":"x"}"#.into(),
        ),
        (
            Method::POST,
            "/query_by_hash",
            r#"{"block_hashes":[1],"model_name":"tiny","cache_salt":null}"#.into(),
        ),
        (
            Method::POST,
            "/query_by_hash",
            r#"{"block_hashes":[18446744073709551615],"model_name":"tiny"}"#.into(),
        ),
        (Method::GET, "/health", String::new()),
        (Method::GET, "/nowhere", String::new()),
        (Method::POST, "/register", r#"{"instance_id":1}"#.into()),
        (
            Method::POST,
            "/unregister",
            r#"{"instance_id":1,"model_name":"m"}"#.into(),
        ),
        (Method::GET, "/workers?model_name=nobody", String::new()),
    ];
    for (method, path, body) in cases {
        let them = ask(&theirs.app, method.clone(), path, body.clone()).await;
        let us = ask(&ours.app, method, path, body.clone()).await;
        assert_eq!(us, them, "{path} {}", &body[..body.len().min(80)]);
    }
    let untyped = || {
        let request = Request::builder().method(Method::POST).uri("/query");
        request.body(Body::from("{}")).unwrap()
    };
    let them = answered(&theirs.app, untyped()).await;
    assert_eq!(answered(&ours.app, untyped()).await, them);
}

#[tokio::test]
async fn registrations_are_answered_alike() {
    let (theirs, ours) = (Theirs::new(), Ours::new("indexer: {}\n"));
    let register = |id: u64, model: &str, extra: Value| {
        let mut body = json!({
            "instance_id": id, "endpoint": "tcp://127.0.0.1:9", "model_name": model, "block_size": 16,
        });
        let extra = extra.as_object().unwrap().clone();
        body.as_object_mut().unwrap().extend(extra);
        ("/register", body)
    };
    let unregister = |body: Value| ("/unregister", body);
    let steps = [
        register(1, "m", json!({"endpoint": "udp://h:1"})),
        register(1, "m", json!({"endpoint": "tcp://h"})),
        register(1, "m", json!({"tenant_id": "t", "additionalsalt": "s"})),
        register(1, "m", json!({})),
        register(
            1,
            "m",
            json!({"dp_rank": 2, "endpoint": "tcp://elsewhere:77"}),
        ),
        register(1, "m", json!({"dp_rank": 2})),
        register(1, "other", json!({"dp_rank": 1})),
        register(1, "m", json!({"dp_rank": 1, "routing_group": "b"})),
        register(2, "m", json!({"block_size": 32})),
        register(2, "m", json!({"block_size": 32, "routing_group": "b"})),
        register(3, "n", json!({"block_size": 1})),
        unregister(json!({"instance_id": 9, "model_name": "m"})),
        unregister(json!({"instance_id": 1, "model_name": "n"})),
        unregister(json!({"instance_id": 1, "model_name": "m", "routing_group": "b"})),
        unregister(
            json!({"instance_id": 1, "model_name": "m", "routing_group": "default", "dp_rank": 5}),
        ),
        unregister(
            json!({"instance_id": 1, "model_name": "m", "routing_group": "default", "dp_rank": 0}),
        ),
        unregister(json!({"instance_id": 2, "model_name": "m", "routing_group": "b"})),
        unregister(json!({"instance_id": 3, "model_name": "n", "dp_rank": 7})),
        // Nobody of the model is left, so blocks may have another size.
        register(4, "n", json!({"block_size": 64})),
    ];
    for (path, body) in steps {
        let them = post(&theirs.app, path, &body).await;
        let us = post(&ours.app, path, &body).await;
        let is_endpoint = them.status == StatusCode::BAD_REQUEST;
        if is_endpoint {
            // They say in more detail what is wrong with it.
            assert_eq!(us.status, them.status, "{body}");
        } else {
            assert_eq!(us, them, "{path} {body}");
        }
        let listed = |workers: Value| {
            let mut workers: Vec<Value> = workers.as_array().unwrap().clone();
            workers.sort_by_key(|worker| worker["instance_id"].as_u64());
            for worker in &mut workers {
                // Whether the stream can be read is a matter of time.
                worker["status"].take();
                let listeners = worker["listeners"].as_object_mut().unwrap();
                listeners
                    .values_mut()
                    .for_each(|l| *l = l["endpoint"].take());
            }
            workers
        };
        let them = get(&theirs.app, "/workers").await;
        let us = get(&ours.app, "/workers").await;
        assert_eq!(listed(us.json()), listed(them.json()));
        for group in ["default", "b"] {
            for model in ["m", "n"] {
                let body = json!({"token_ids": [], "model_name": model, "routing_group": group});
                let them = post(&theirs.app, "/query", &body).await;
                assert_eq!(post(&ours.app, "/query", &body).await, them);
            }
        }
    }
}

/// Dynamo's peers take a dump over by applying its events.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dump_rebuilds_the_index_at_dynamo() {
    let mut events = 0;
    for seed in 0..100 {
        let mut history = History::new(seed, Manners::Orderly);
        let mut ours = Ours::new(&three_workers());
        let mut all = Oracle::new();
        for _ in 0..48 {
            let step = history.step();
            ours.apply(&step).await;
            match &step {
                Step::Event(owner, tier, data) => all.apply(*owner, *tier, data),
                Step::Leave(owner) => all.remove(*owner),
            }
        }
        ours.settle().await;
        let dump = get(&ours.app, "/dump").await.json();
        let partition = &dump[format!("{MODEL}:default")];
        assert_eq!(partition["block_size"], json!(BLOCK_SIZE));
        // Read by their types, as a peer does.
        let theirs: Vec<dynamo_kv_router::RouterEvent> =
            serde_json::from_value(partition["events"].clone()).unwrap();
        let read: Vec<RouterEvent> = serde_json::from_value(partition["events"].clone()).unwrap();
        assert_eq!(theirs.len(), read.len());
        events += read.len();
        let mut rebuilt = Oracle::new();
        for event in read {
            let owner = OwnerId {
                worker: event.worker_id,
                rank: event.event.dp_rank,
            };
            rebuilt.apply(owner, event.storage_tier.into(), &event.event.data);
        }
        for _ in 0..8 {
            let prompt = history.prompt();
            assert_eq!(
                rebuilt.depths(&prompt.tokens),
                all.depths(&prompt.tokens),
                "seed {seed}"
            );
        }
    }
    assert!(events > 1_000, "{events}");
}

#[tokio::test]
async fn without_the_token_nothing_is_told() {
    let (control, _controlled) = mpsc::channel(1);
    let (registry, _asked) = mpsc::channel(1);
    let app = router(Face::new(control, registry, Some("secret".into())));
    let with = |path: &str, token: Option<&str>| {
        let mut request = Request::builder().uri(path.to_owned());
        if let Some(token) = token {
            request = request.header(header::AUTHORIZATION, token);
        }
        request.body(Body::empty()).unwrap()
    };
    for token in [
        None,
        Some("Bearer secre"),
        Some("Bearer secrets"),
        Some("Bearer sEcret"),
        Some("secret"),
    ] {
        for path in ["/dump", "/workers"] {
            let refused = answered(&app, with(path, token)).await;
            assert_eq!(refused.status, StatusCode::UNAUTHORIZED, "{path} {token:?}");
        }
    }
    assert_eq!(
        answered(&app, with("/health", None)).await.status,
        StatusCode::OK
    );
    let asks = app.oneshot(with("/dump", Some("Bearer secret")));
    // It passes, and waits for an index that isn't there.
    let waits = tokio::time::timeout(Duration::from_millis(50), asks).await;
    assert!(waits.is_err());
}
