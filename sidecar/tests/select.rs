//! The select service without its socket.

use std::sync::Arc;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{Method, Request, StatusCode, header};
use kv_router::config::Config;
use kv_router::index::Service;
use kv_router::metrics::Metrics;
use kv_router::select::{Face, router};
use kv_router::state::Restored;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};
use tower::ServiceExt as _;

const YAML: &str = "
select: {}
policy: dynamo
models: [llama]
kv_cache_block_size: 4
active_request_expiry_secs: 1
workers:
  - {id: 1, endpoint: '127.0.0.1:20001', data_parallel_size: 2}
  - {id: 2, endpoint: '127.0.0.1:20002'}
";

/// The service, as long as the guard lives.
fn service(token: Option<&str>) -> (Router, Arc<Metrics>, DropGuard) {
    let config = Config::parse(YAML, &[]).expect("a configuration");
    let (control, controlled) = mpsc::channel(64);
    let (_arrivals, arrived) = mpsc::channel(1);
    let (requests, _) = mpsc::channel(1);
    let (registry, _asked) = mpsc::channel(1);
    let metrics = Arc::new(Metrics::default());
    let service = Service::new(&config, Restored::Absent, requests, Arc::clone(&metrics));
    let cancel = CancellationToken::new();
    tokio::spawn(service.run(controlled, arrived, cancel.clone()));
    let token = token.map(str::to_owned);
    let face = Face::new(control, registry, Arc::clone(&metrics), token);
    (router(face), metrics, cancel.drop_guard())
}

async fn ask(app: &Router, method: Method, path: &str, body: Value) -> (StatusCode, Value) {
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::CONTENT_TYPE, "application/json")
        .body(Body::from(body.to_string()))
        .expect("a request");
    answered(app, request).await
}

async fn answered(app: &Router, request: Request<Body>) -> (StatusCode, Value) {
    let answer = app.clone().oneshot(request).await.expect("an answer");
    let status = answer.status();
    let body = to_bytes(answer.into_body(), 1 << 20).await.expect("a body");
    let body = serde_json::from_slice(&body).unwrap_or_else(|e| panic!("{e}: {body:?}"));
    (status, body)
}

async fn post(app: &Router, path: &str, body: Value) -> (StatusCode, Value) {
    ask(app, Method::POST, path, body).await
}

fn reserve(id: &str) -> Value {
    json!({"model_name": "llama", "token_ids": [1, 2, 3, 4, 5, 6, 7, 8, 9], "selection_id": id})
}

async fn requests(app: &Router) -> u64 {
    let (_, loads) = ask(app, Method::GET, "/loads", json!({})).await;
    let loads = loads[0]["loads"].as_array().cloned().unwrap_or_default();
    loads
        .iter()
        .filter_map(|load| load["active_requests"].as_u64())
        .sum()
}

#[tokio::test]
async fn an_abandoned_reservation_expires_and_its_id_is_free_again() {
    let (app, metrics, _guard) = service(None);
    let (status, answer) = post(&app, "/select_and_reserve", reserve("a")).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let (status, again) = post(&app, "/select_and_reserve", reserve("a")).await;
    assert_eq!(status, StatusCode::CONFLICT, "{again}");
    while requests(&app).await > 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(metrics.expired.get(), 1);
    let (status, _) = post(&app, "/reservations/a/prefill_complete", json!({})).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    let (status, answer) = post(&app, "/select_and_reserve", reserve("a")).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
}

#[tokio::test]
async fn a_choice_is_booked_once() {
    let (app, _metrics, _guard) = service(None);
    let booking = json!({"model_name": "llama", "selection_id": "a"});
    post(&app, "/select", reserve("a")).await;
    let (status, answer) = post(&app, "/reservations", booking.clone()).await;
    assert_eq!(status, StatusCode::CREATED, "{answer}");
    let (status, _) = post(&app, "/reservations", booking).await;
    assert_eq!(status, StatusCode::NOT_FOUND, "it is used up");
    let (status, _) = ask(&app, Method::DELETE, "/reservations/a", json!({})).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(requests(&app).await, 0);
}

#[tokio::test]
async fn a_model_that_is_not_named_is_the_first_and_workers_of_the_file_stay() {
    let (app, _metrics, _guard) = service(None);
    let body = json!({"token_ids": [1, 2, 3, 4], "pinned_worker": {"worker_id": 1, "dp_rank": 1}});
    let (status, answer) = post(&app, "/select", body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(answer["endpoint"], "http://127.0.0.1:20001");
    assert_eq!(answer["overlap"]["dp"], json!({"0": 0, "1": 0}));
    let body = json!({"token_ids": [1], "model_name": "other"});
    let (status, answer) = post(&app, "/select", body).await;
    let none = "no schedulable workers for model=other routing_group=default";
    assert_eq!(
        (status, &answer["error"]),
        (StatusCode::SERVICE_UNAVAILABLE, &json!(none))
    );
    let worker = json!({"worker_id": 1, "endpoint": "http://elsewhere", "block_size": 4});
    for (method, path) in [
        (Method::POST, "/workers"),
        (Method::PATCH, "/workers/1"),
        (Method::DELETE, "/workers/1"),
    ] {
        let (status, _) = ask(&app, method, path, worker.clone()).await;
        assert_eq!(status, StatusCode::CONFLICT, "{path}");
    }
    let (_, workers) = ask(&app, Method::GET, "/workers?model_name=llama", json!({})).await;
    assert_eq!(workers.as_array().map(Vec::len), Some(2));
    assert_eq!(workers[0]["data_parallel_size"], 2);
}

#[tokio::test]
async fn without_the_token_nothing_is_told() {
    let (app, _metrics, _guard) = service(Some("secret"));
    let with = |path: &str, token: Option<&str>| {
        let mut request = Request::builder().uri(path.to_owned());
        if let Some(token) = token {
            request = request.header(header::AUTHORIZATION, token);
        }
        request.body(Body::empty()).expect("a request")
    };
    for token in [
        None,
        Some("Bearer secre"),
        Some("Bearer sEcret"),
        Some("secret"),
    ] {
        for path in ["/loads", "/workers", "/replica_sync/peers"] {
            let (status, _) = answered(&app, with(path, token)).await;
            assert_eq!(status, StatusCode::UNAUTHORIZED, "{path} {token:?}");
        }
    }
    let (status, _) = answered(&app, with("/loads", Some("Bearer secret"))).await;
    assert_eq!(status, StatusCode::OK);
    for path in ["/health", "/ready"] {
        let (status, _) = answered(&app, with(path, None)).await;
        assert_eq!(status, StatusCode::OK, "{path}");
    }
}
