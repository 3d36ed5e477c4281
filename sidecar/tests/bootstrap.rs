//! A fresh sidecar takes the index of a peer over.

mod support;

use kv_core::event::{Envelope, RouterEvent};
use serde_json::{Value, json};
use support::engine::{BLOCK, event, removed, stored, tokens};
use support::{Nats, Sidecar, eventually, free_port};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

fn config(nats: &str, more: &str) -> String {
    format!(
        "kv_cache_block_size: {BLOCK}\n\
         nats: {{url: '{nats}', dynamo: {{namespace: dynamo, component: backend}}}}\n\
         workers: [{{id: 1, endpoint: '1.1.1.1:1'}}, {{id: 2, endpoint: '1.1.1.1:2'}}]\n{more}"
    )
}

async fn overlaps(sidecar: &Sidecar, prompt: &[u32]) -> [u64; 2] {
    let answer = sidecar.explain(&json!({ "tokens": prompt })).await;
    let owners = answer["owners"].as_array().unwrap();
    [1, 2].map(|worker| {
        let owner = owners.iter().find(|o| o["worker"] == worker).unwrap();
        owner["overlap"][0].as_u64().unwrap()
    })
}

async fn become_overlaps(sidecar: &Sidecar, prompt: &[u32], expected: [u64; 2]) {
    let is_so = async || (overlaps(sidecar, prompt).await == expected).then_some(());
    eventually(&format!("{expected:?} blocks"), is_so).await;
}

/// `/v1/index` once the index counts as complete.
async fn ready(sidecar: &Sidecar) -> Value {
    let is_ready = async || {
        let index = sidecar.json("/v1/index").await;
        (index["ready"] == true).then_some(index)
    };
    eventually("the index is ready", is_ready).await
}

/// A publisher of Dynamo's plane.
struct Publisher {
    client: async_nats::Client,
    sequence: u64,
}

impl Publisher {
    async fn publish(&mut self, event: RouterEvent) {
        let envelope = Envelope {
            publisher_id: 7,
            sequence: self.sequence,
            published_at: 0,
            topic: "kv-events".into(),
            payload: rmp_serde::to_vec_named(&[event]).unwrap(),
        };
        self.sequence += 1;
        let bytes = rmp_serde::to_vec_named(&envelope).unwrap();
        let subject = "namespace.dynamo.component.backend.endpoint.generate.kv-events";
        self.client.publish(subject, bytes.into()).await.unwrap();
        self.client.flush().await.unwrap();
    }
}

async fn connected(sidecar: &Sidecar) {
    let is_connected = async || {
        let metrics = sidecar.get("/metrics").await.unwrap();
        metrics.contains("kv_router_nats_connected 1").then_some(())
    };
    eventually("nats is connected", is_connected).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fresh_sidecar_goes_on_where_its_peer_is() {
    let nats = Nats::start().await;
    let one = Sidecar::start(&config(&nats.url(), "")).await;
    connected(&one).await;
    let client = async_nats::connect(nats.url()).await.unwrap();
    let mut publisher = Publisher {
        client,
        sequence: 0,
    };
    // More than a part holds.
    let prompt = tokens(0, 5000);
    publisher
        .publish(event(1, 1, stored(&prompt, 0, 100_000)))
        .await;
    publisher
        .publish(event(2, 1, stored(&prompt[..40], 0, 500)))
        .await;
    publisher.publish(event(2, 2, removed(&[505]))).await;
    become_overlaps(&one, &prompt, [5000, 5]).await;

    let nobody = free_port();
    let peers = format!(
        "peers: ['http://127.0.0.1:{nobody}', 'http://127.0.0.1:{}']",
        one.admin_port()
    );
    let two = Sidecar::start(&config(&nats.url(), &peers)).await;
    become_overlaps(&two, &prompt, [5000, 5]).await;
    let index = ready(&two).await;
    assert_eq!(
        (&index["restored"], &index["bootstrapped"]),
        (&json!(false), &json!(true))
    );
    assert_eq!(index["stats"]["owner_blocks"], json!(5009));
    let metrics = two.get("/metrics").await.unwrap();
    assert!(
        metrics.contains("kv_router_bootstraps_total{kind=\"unreachable\"} 1"),
        "{metrics}"
    );
    assert!(
        metrics.contains("kv_router_bootstraps_total{kind=\"taken\"} 1"),
        "{metrics}"
    );
    // Names and cursors came along: the next events fit.
    publisher
        .publish(event(2, 3, stored(&prompt[..24], 5, 500)))
        .await;
    publisher.publish(event(1, 2, removed(&[100_002]))).await;
    for sidecar in [&one, &two] {
        become_overlaps(sidecar, &prompt, [2, 10]).await;
        let owners = sidecar.json("/v1/workers").await["pools"][0]["owners"].clone();
        let told: Vec<(&Value, &Value)> = owners
            .as_array()
            .unwrap()
            .iter()
            .map(|o| (&o["gaps"], &o["knowledge"]))
            .collect();
        assert_eq!(told, [(&json!(0), &json!("whole")); 2]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_answers_while_a_peer_does_not() {
    let nats = Nats::start().await;
    let peer = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let peers = format!("peers: ['http://{}']", peer.local_addr().unwrap());
    // It starts only when its API answers.
    let sidecar = Sidecar::start(&config(&nats.url(), &peers)).await;
    let (mut asked, _) = peer.accept().await.unwrap();
    let mut request = [0; 1024];
    assert!(asked.read(&mut request).await.unwrap() > 0);
    let pools = json!([{"name": "default", "block_size": BLOCK}]);
    let dump = json!({"dump": {"version": 1, "pools": pools}}).to_string() + "\n";
    let end = json!({"end": {"owners": 0, "blocks": 0}}).to_string() + "\n";
    let length = dump.len() + end.len();
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{dump}");
    asked.write_all(head.as_bytes()).await.unwrap();
    let index = sidecar.json("/v1/index").await;
    assert_eq!(
        (&index["ready"], &index["bootstrapped"]),
        (&json!(false), &json!(false))
    );
    asked.write_all(end.as_bytes()).await.unwrap();
    assert_eq!(ready(&sidecar).await["bootstrapped"], json!(true));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_peer_that_answers_it_starts_empty() {
    let nats = Nats::start().await;
    let peers = format!("peers: ['http://127.0.0.1:{}']", free_port());
    let sidecar = Sidecar::start(&config(&nats.url(), &peers)).await;
    let index = ready(&sidecar).await;
    assert_eq!(index["bootstrapped"], json!(false));
    let dump = sidecar.get("/v1/index/dump").await.unwrap();
    let lines: Vec<Value> = dump
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(
        lines[0]["dump"]["pools"],
        json!([{"name": "default", "block_size": BLOCK}])
    );
    assert_eq!(
        lines.last().unwrap()["end"],
        json!({"owners": 2, "blocks": 0})
    );
}

#[tokio::test]
async fn content_is_shown_to_other_machines_for_the_token_alone() {
    use tonic::codegen::Service as _;

    let (control, _) = tokio::sync::mpsc::channel(1);
    let admin = |token: Option<&str>| {
        let metrics = std::sync::Arc::new(kv_router::metrics::Metrics::default());
        let admin =
            kv_router::admin::Admin::new(control.clone(), std::sync::Arc::default(), metrics);
        kv_router::admin::router(admin.with_token(token.map(str::to_owned)))
    };
    // Nobody answers for the index: whoever is let in learns that.
    let cases = [
        (None, "10.0.0.9:1", None, 403),
        (None, "10.0.0.9:1", Some("Bearer "), 403),
        (Some("secret"), "10.0.0.9:1", None, 403),
        (Some("secret"), "10.0.0.9:1", Some("Bearer secre"), 403),
        (Some("secret"), "10.0.0.9:1", Some("Bearer secrets"), 403),
        (Some("secret"), "10.0.0.9:1", Some("secret"), 403),
        (Some("secret"), "10.0.0.9:1", Some("Bearer secret"), 503),
        (Some("secret"), "127.0.0.1:1", None, 503),
    ];
    for (token, from, shown, status) in cases {
        let from: std::net::SocketAddr = from.parse().unwrap();
        let mut request = http::Request::get("/v1/index/dump")
            .extension(axum::extract::ConnectInfo(from))
            .body(axum::body::Body::empty())
            .unwrap();
        if let Some(shown) = shown {
            let shown = shown.parse().unwrap();
            request.headers_mut().insert("authorization", shown);
        }
        let answer = admin(token).call(request).await.unwrap();
        assert_eq!(answer.status(), status, "{token:?} {from} {shown:?}");
    }
}
