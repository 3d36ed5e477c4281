//! Compressed bodies: Envoy unpacks them before they are read, and what does not unpack whole is
//! refused.

use std::io::Write as _;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use http::{Request, Response};
use http_body_util::Full;
use kv_core::event::StorageTier;
use kv_core::hash::Seed;
use kv_tests::client::uri;
use kv_tests::events::{Encoding, Publisher, stored};
use kv_tests::stack::{Setup, Stack};
use kv_tests::upstream::{self, Upstream, checksum};
use kv_tests::wait;
use serde_json::{Value, json};

/// Bytes of the largest body that is held.
const BODY_LIMIT: u64 = 4 << 20;

async fn start() -> (Stack, Vec<Upstream>) {
    let upstreams = Upstream::start_all(2).await;
    let workers = upstream::workers(&upstreams);
    let setup = Setup {
        threads: 2,
        workers,
        more: json!({"body_limit_bytes": BODY_LIMIT}),
    };
    (Stack::start(&setup).await, upstreams)
}

fn gzip(body: &[u8]) -> Vec<u8> {
    let mut packed = GzEncoder::new(Vec::new(), Compression::best());
    packed.write_all(body).expect("memory");
    packed.finish().expect("memory")
}

/// A Zstandard frame (RFC 8878) of one block that is stored as it is.
fn zstd(body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len()).expect("a short body");
    // One segment, its size in four bytes.
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0xa0];
    frame.extend(size.to_le_bytes());
    let block = (size << 3) | 1;
    frame.extend(&block.to_le_bytes()[..3]);
    frame.extend(body);
    frame
}

/// A Brotli stream (RFC 7932) of one meta-block that is stored as it is.
fn brotli(body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len() - 1).expect("a short body");
    assert!(size < 1 << 16);
    // A window of 64 KiB, not the last one, four nibbles of size, stored.
    let head = (size << 4) | (1 << 20);
    let mut stream = head.to_le_bytes()[..3].to_vec();
    stream.extend(body);
    // The last one, empty.
    stream.push(0b11);
    stream
}

async fn post(stack: &Stack, encoding: &str, body: Vec<u8>) -> Response<Bytes> {
    let request = Request::post(uri(stack.envoy.port, "/v1/chat/completions"))
        .header("content-type", "application/json")
        .header("content-encoding", encoding)
        // Nobody but Envoy may say so.
        .header("x-kv-packed", "spoofed")
        .body(Full::from(body));
    let answer = stack.client.send(request.expect("a request")).await;
    answer.expect("an answer")
}

fn decision(answer: &Response<Bytes>) -> Value {
    let record = &answer.headers()["x-kv-router-decision"];
    serde_json::from_slice(record.as_bytes()).expect("a record")
}

/// Packs bytes.
type Pack = fn(&[u8]) -> Vec<u8>;

#[tokio::test(flavor = "multi_thread")]
async fn a_compressed_chat_is_routed_by_its_prefix_and_reaches_its_worker_unpacked() {
    let (stack, _upstreams) = start().await;
    let mut publisher = Publisher::connect(&stack.nats.url()).await;
    let prompt: Vec<u32> = (0..320).collect();
    let stored = stored(&prompt, 16, Seed::default());
    publisher
        .publish(2, StorageTier::Device, stored, Encoding::Dynamo)
        .await;
    stack.sidecar.settled(1).await;
    let body = json!({
        "model": "sim",
        "messages": [{"role": "user", "content": "what the tokens say"}],
        "nvext": {"token_data": prompt},
    });
    let body = body.to_string().into_bytes();
    let packings: [(&str, Pack); 3] = [("gzip", gzip), ("zstd", zstd), ("br", brotli)];
    for (encoding, pack) in packings {
        let answer = post(&stack, encoding, pack(&body)).await;
        assert_eq!(answer.status(), 200, "{encoding}: {answer:?}");
        let decision = decision(&answer);
        assert_eq!(decision["reason"], "kv", "{encoding}: {decision}");
        assert_eq!(decision["worker"], 2, "{encoding}: {decision}");
        assert_eq!(decision["candidates"][0]["overlap"][0], 20, "{decision}");
        let seen: Value = serde_json::from_slice(answer.body()).expect("JSON");
        assert_eq!(seen["bytes"], body.len(), "{encoding}");
        let hash = Seed::default().block(&checksum(&body.clone().into()));
        assert_eq!(seen["hash"], hash, "{encoding}");
        for gone in ["content-encoding", "content-length", "x-kv-packed"] {
            assert!(seen["headers"].get(gone).is_none(), "{encoding}: {seen}");
        }
    }

    // What Envoy does not unpack goes by load, as it is.
    let answer = post(&stack, "compress", b"\x1f\x9d".to_vec()).await;
    assert_eq!(decision(&answer)["reason"], "compressed");
    let seen: Value = serde_json::from_slice(answer.body()).expect("JSON");
    let kept = (&seen["bytes"], &seen["headers"]["content-encoding"]);
    assert_eq!(kept, (&json!(2), &json!("compress")));
    let counted = async || match stack
        .envoy
        .total("requests_total.*reason=.=compressed")
        .await
    {
        1 => Ok(()),
        n => Err(n),
    };
    wait::until("the count", counted).await;
    stack.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_unpack_whole_is_refused_within_bounded_memory() {
    let (stack, upstreams) = start().await;
    let requests = || -> u64 {
        let requests = upstreams.iter().map(|u| u.requests.load(Ordering::Relaxed));
        requests.sum()
    };
    let before = requests();
    // 16 MiB in 16 KiB.
    let bomb = gzip(format!(r#"{{"prompt": "{}"}}"#, "a".repeat(16 << 20)).as_bytes());
    // A prompt that grows thirty times, beyond what is held.
    let line = |i: u32| {
        format!(
            "{:032x}{}",
            u128::from(i).wrapping_mul(0x9e37_79b9_7f4a_7c15),
            "b".repeat(900)
        )
    };
    let lines: String = (0..6000).map(line).collect();
    let long = gzip(format!(r#"{{"prompt": "{lines}"}}"#).as_bytes());
    let cut = gzip(br#"{"prompt": "and so on"}"#);
    let cases = [
        ("gzip", bomb.clone(), 400, "body_broken"),
        ("gzip", long, 413, "body_too_long"),
        ("gzip", cut[..20].to_vec(), 400, "body_broken"),
        ("gzip", b"{}".to_vec(), 400, "body_broken"),
        ("zstd", b"{}".to_vec(), 400, "body_broken"),
        ("br", b"not brotli at all".to_vec(), 400, "body_broken"),
    ];
    for (encoding, body, status, code) in cases {
        let answer = post(&stack, encoding, body).await;
        let error: Value = serde_json::from_slice(answer.body()).expect("JSON");
        let found = (answer.status().as_u16(), &error["error"]["code"]);
        assert_eq!(found, (status, &json!(code)), "{encoding}");
    }
    let bombs = (0..20).map(|_| post(&stack, "gzip", bomb.clone()));
    for answer in futures::future::join_all(bombs).await {
        assert_eq!(answer.status(), 400);
    }
    assert_eq!(requests(), before, "no worker has seen any of them");
    let memory = stack.client.get(stack.envoy.admin, "/memory").await;
    let memory = memory.expect("Envoy's memory");
    let heap: u64 = memory["heap_size"]
        .as_str()
        .and_then(|bytes| bytes.parse().ok())
        .expect("bytes");
    assert!(heap < 256 << 20, "{memory}");
    assert_eq!(stack.envoy.total("kv_router_refused_total").await, 26);
    stack.idle().await;
}
