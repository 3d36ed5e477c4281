//! Requests that break things: none traps a VM, hangs, or is refused that should pass, and a
//! client can't choose its worker.

use bytes::Bytes;
use futures::StreamExt as _;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::Frame;
use hyper_util::client::legacy::Client as Hyper;
use hyper_util::rt::TokioExecutor;
use kv_tests::client::{raw, uri};
use kv_tests::stack::{Setup, Stack};
use kv_tests::upstream::{self, Echo, Upstream};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::{Duration, timeout};

const BODY_LIMIT: usize = 16 << 20;

struct Hostile {
    stack: Stack,
    _upstreams: Vec<Upstream>,
}

impl Hostile {
    async fn start(threads: u32) -> Self {
        let upstreams = Upstream::start_all(3).await;
        let workers = upstream::workers(&upstreams);
        let more = json!({"body_limit_bytes": BODY_LIMIT});
        let stack = Stack::start(&Setup {
            threads,
            workers,
            more,
        })
        .await;
        Self {
            stack,
            _upstreams: upstreams,
        }
    }

    async fn post(&self, headers: &[(&str, &[u8])], body: impl Into<Bytes>) -> Response<Bytes> {
        let mut request = Request::post(uri(self.stack.envoy.port, "/v1/completions"));
        if !headers.iter().any(|(name, _)| *name == "content-type") {
            request = request.header("content-type", "application/json");
        }
        for (name, value) in headers {
            request = request.header(
                *name,
                http::HeaderValue::from_bytes(value).expect("a value"),
            );
        }
        let request = request.body(Full::new(body.into())).expect("a request");
        self.stack.client.send(request).await.expect("an answer")
    }

    /// Reads until the raw answer has its whole body.
    async fn raw(&self, pieces: &[&[u8]]) -> String {
        raw(self.stack.envoy.port, pieces, |answer| {
            answer.contains("\"worker\"") && answer.trim_end().ends_with('}')
                || answer.ends_with("0\r\n\r\n")
        })
        .await
    }

    /// All threads still route by cost, and nothing is booked any more.
    async fn unharmed(&self) {
        for _ in 0..40 {
            let (_, decision) = self.stack.complete(&[1; 64]).await.expect("an answer");
            assert_eq!(decision["reason"], "kv", "{decision}");
        }
        self.stack.envoy.idle().await;
        let log = self.stack.envoy.process.output();
        for sign in ["panicked", "VM failed", "Uncaught", "RuntimeError"] {
            assert!(!log.contains(sign), "{sign} in Envoy's log");
        }
    }
}

fn reason(answer: &Response<Bytes>) -> Value {
    let header = answer
        .headers()
        .get("x-kv-router-decision")
        .map(http::HeaderValue::as_bytes);
    let record: Option<Value> = header.and_then(|h| serde_json::from_slice(h).ok());
    record.map_or(Value::Null, |r| r["reason"].clone())
}

fn seen(answer: &Response<Bytes>) -> Value {
    serde_json::from_slice(answer.body()).unwrap_or(Value::Null)
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_bodies_are_routed_by_load() {
    let hostile = Hostile::start(2).await;
    let deep = "[".repeat(100_000);
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (b"{\"prompt\": [1, 2".to_vec(), "bad_json"),
        (b"{\"prompt\": [1, 2]".to_vec(), "bad_json"),
        (b"not json".to_vec(), "bad_json"),
        (b"\xff\xfe\x00{".to_vec(), "bad_json"),
        (b"[1,2,3]".to_vec(), "bad_json"),
        (format!("{{\"x\": {deep}").into_bytes(), "bad_json"),
        (b"{\"prompt\": [1, -2]}".to_vec(), "no_prompt"),
        (b"{\"prompt\": [1.5]}".to_vec(), "no_prompt"),
        (
            b"{\"prompt\": [99999999999999999999999]}".to_vec(),
            "no_prompt",
        ),
        (b"{\"prompt\": null}".to_vec(), "no_prompt"),
        (b"{}".to_vec(), "no_prompt"),
        (b"{\"prompt\": \"text\"}".to_vec(), "text"),
        (b"{\"prompt\": []}".to_vec(), "kv"),
    ];
    for (body, expected) in cases {
        let shown = String::from_utf8_lossy(&body[..body.len().min(60)]).into_owned();
        let length = body.len();
        let answer = hostile.post(&[], body).await;
        assert_eq!(answer.status(), 200, "{shown}");
        assert_eq!(seen(&answer)["bytes"], length, "{shown}");
        let reason = reason(&answer);
        assert_eq!(reason, expected, "{shown}");
    }
    hostile.unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_bytes_in_headers_reach_the_worker() {
    let hostile = Hostile::start(2).await;
    for name in [
        "content-type",
        "content-encoding",
        "x-gateway-destination-endpoint",
        "x-kv-pool",
        "x-kv-router-decision",
        "x-anything",
        "user-agent",
    ] {
        let answer = hostile
            .post(&[(name, b"\xff\xfe")], "{\"prompt\": [1]}")
            .await;
        assert_eq!(answer.status(), 200, "{name}");
    }
    // Envoy itself refuses these; what matters is that nobody dies of it.
    for head in [
        &b"POST /v1/completions\xff HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"[..],
        b"P\xffST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nhost: \xff\r\ncontent-type: application/json\r\ncontent-length: \xff\r\n\r\n{}",
    ] {
        let answer = hostile.raw(&[head]).await;
        assert!(answer.starts_with("HTTP/1.1 "), "{answer}");
    }
    hostile.unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_million_token_ids_are_routed_by_cost() {
    let hostile = Hostile::start(2).await;
    let ids: Vec<u32> = (0..1_000_000).map(|i| i % 100_000).collect();
    let body = json!({"prompt": ids}).to_string();
    let length = body.len();
    let answer = hostile.post(&[], body).await;
    assert_eq!(
        (answer.status().as_u16(), reason(&answer)),
        (200, "kv".into())
    );
    assert_eq!(seen(&answer)["bytes"], length);
    hostile.unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_above_the_limit_passes_whole() {
    let hostile = Hostile::start(1).await;
    let body = format!(
        "{{\"pad\": \"{}\", \"prompt\": [1]}}",
        "x".repeat(BODY_LIMIT)
    );
    let length = body.len();
    let answer = hostile.post(&[], body.clone()).await;
    assert_eq!(
        (answer.status().as_u16(), reason(&answer)),
        (200, "too_long".into())
    );
    assert_eq!(seen(&answer)["bytes"], length);

    let head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
        transfer-encoding: chunked\r\n\r\n";
    let chunk = format!("{:x}\r\n{body}\r\n", body.len());
    let answer = hostile.raw(&[head, chunk.as_bytes(), b"0\r\n\r\n"]).await;
    assert!(answer.contains("\"reason\":\"too_long\""), "{answer}");
    assert!(answer.contains(&format!("\"bytes\":{length}")), "{answer}");
    hostile.unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_trailers_and_expectations_are_held_and_routed_by_cost() {
    let hostile = Hostile::start(1).await;
    let head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n";
    let chunked = [&head[..], b"transfer-encoding: chunked\r\n\r\n"].concat();
    let pieces: [&[u8]; 4] = [
        &chunked,
        b"c\r\n{\"prompt\": [\r\n",
        b"2\r\n1,\r\n",
        b"3\r\n2]}\r\n",
    ];
    let ended = [&pieces[..], &[b"0\r\n\r\n"]].concat();
    let answer = hostile.raw(&ended).await;
    assert!(
        answer.contains("\"reason\":\"kv\"") && answer.contains("\"tokens\":2"),
        "{answer}"
    );

    let trailers = [&pieces[..], &[b"0\r\nx-trailer: 1\r\n\r\n"]].concat();
    let answer = hostile.raw(&trailers).await;
    assert!(
        answer.contains("\"reason\":\"kv\"") && answer.contains("\"tokens\":2"),
        "{answer}"
    );

    let expecting = [
        &head[..],
        b"expect: 100-continue\r\ncontent-length: 17\r\n\r\n",
    ]
    .concat();
    let answer = hostile.raw(&[&expecting, b"{\"prompt\": [1,2]}"]).await;
    assert!(
        answer.contains("\"reason\":\"kv\"") && answer.contains("\"tokens\":2"),
        "{answer}"
    );
    hostile.unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_generation_request_passes_at_once() {
    let hostile = Hostile::start(1).await;
    let port = hostile.stack.envoy.port;
    for (method, path) in [
        ("GET", "/v1/models"),
        ("DELETE", "/x"),
        ("POST", "/v1/completions"),
    ] {
        let request = Request::builder().method(method).uri(uri(port, path));
        let request = request.header("content-type", "application/json");
        let request = request.body(Full::default()).expect("a request");
        let answer = hostile.stack.client.send(request).await.expect("an answer");
        assert_eq!(
            (answer.status().as_u16(), reason(&answer)),
            (200, "passed".into())
        );
    }
    let multipart = b"multipart/form-data; boundary=x".as_slice();
    let answer = hostile.post(&[("content-type", multipart)], "--x--").await;
    assert_eq!(
        (answer.status().as_u16(), reason(&answer)),
        (200, "passed".into())
    );
    let answer = hostile
        .post(&[("content-encoding", b"compress")], "\x1f")
        .await;
    assert_eq!(
        (answer.status().as_u16(), reason(&answer)),
        (200, "compressed".into())
    );
    hostile.unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_cannot_choose_its_worker() {
    let hostile = Hostile::start(2).await;
    let victim = hostile.stack.config["workers"][1]["endpoint"].clone();
    let victim = victim.as_str().expect("an endpoint").as_bytes().to_vec();
    let mut chosen = std::collections::BTreeSet::new();
    for i in 0..60 {
        let spoofed = [
            ("x-gateway-destination-endpoint", victim.as_slice()),
            ("x-gateway-destination-endpoint", b"127.0.0.1:1"),
            ("x-kv-pool", b"other"),
            ("x-kv-router-decision", b"{}"),
        ];
        let (headers, body) = match i % 3 {
            0 => (spoofed.to_vec(), "{\"prompt\": [1]}"),
            1 => (
                [&spoofed[..], &[("content-encoding", b"compress")]].concat(),
                "x",
            ),
            _ => (spoofed.to_vec(), "broken"),
        };
        let answer = hostile.post(&headers, body).await;
        let (seen, record) = (seen(&answer), &answer.headers()["x-kv-router-decision"]);
        let record: Value = serde_json::from_slice(record.as_bytes()).expect("a record");
        assert_eq!(seen["worker"], record["worker"], "{seen}");
        // The chosen worker, and the one to try after it.
        let sent = seen["headers"]["x-gateway-destination-endpoint"].as_str();
        let first = sent.and_then(|sent| sent.split(',').next());
        assert_eq!(first, record["endpoint"].as_str(), "{seen}");
        assert_eq!(seen["headers"]["x-kv-pool"], "default");
        chosen.insert(seen["worker"].as_u64());
    }
    assert_eq!(chosen.len(), 3, "not the spoofed worker alone: {chosen:?}");
    hostile.unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_passes_both_ways() {
    let echo = Echo::of_upgrades().await;
    let workers = vec![(1, echo.address)];
    let stack = Stack::start(&Setup {
        threads: 1,
        workers,
        more: json!({}),
    })
    .await;
    let head = b"GET /v1/realtime HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\n\
        upgrade: websocket\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
        sec-websocket-version: 13\r\n\r\n";
    let answer = raw(stack.envoy.port, &[head, b"ping"], |answer| {
        answer.ends_with("ping")
    })
    .await;
    assert!(answer.starts_with("HTTP/1.1 101"), "{answer}");
    stack.envoy.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bidirectional_grpc_stream_is_never_held() {
    let echo = Echo::of_streams().await;
    let workers = vec![(1, echo.address)];
    let stack = Stack::start(&Setup {
        threads: 1,
        workers,
        more: json!({}),
    })
    .await;
    let (send, receive) = mpsc::channel::<Bytes>(1);
    let frames = futures::stream::unfold(receive, |mut receive| async {
        let part = receive.recv().await?;
        Some((
            Ok::<_, std::convert::Infallible>(Frame::data(part)),
            receive,
        ))
    });
    let client = Hyper::builder(TokioExecutor::new())
        .http2_only(true)
        .build_http();
    let request = Request::post(uri(stack.envoy.port, "/v1/completions"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(StreamBody::new(frames.boxed()))
        .expect("a request");
    let exchange = async {
        send.send(Bytes::from("first"))
            .await
            .expect("an open stream");
        let mut answer = client
            .request(request)
            .await
            .expect("an answer")
            .into_body();
        for part in ["first", "second"] {
            let frame = answer
                .frame()
                .await
                .expect("a part")
                .expect("a sound stream");
            assert_eq!(frame.into_data().expect("data"), part.as_bytes());
            send.send(Bytes::from("second"))
                .await
                .expect("an open stream");
        }
        drop(send);
        while answer.frame().await.is_some() {}
    };
    timeout(Duration::from_secs(10), exchange)
        .await
        .expect("no hang");
    stack.envoy.idle().await;
}
