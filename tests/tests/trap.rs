//! A filter VM that traps is replaced without an operator. Needs a module with the feature `chaos`,
//! which `KV_FILTER_CHAOS_WASM` names.

use std::time::Duration;

use kv_tests::client::uri;
use kv_tests::place;
use kv_tests::stack::{Setup, Stack};
use kv_tests::upstream::{self, Upstream};
use kv_tests::wait;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// Whether a request gets a decision, over a connection of its own: a thread of its own, by chance.
async fn is_decided(stack: &Stack) -> Result<bool, String> {
    let attempt = async {
        let mut stream = TcpStream::connect(("127.0.0.1", stack.envoy.port)).await?;
        let request = b"GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        stream.write_all(request).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    };
    let answer = attempt.await.map_err(|e| e.to_string())?;
    if answer.starts_with("HTTP/1.1 200") {
        Ok(answer.contains("x-kv-router-decision"))
    } else {
        Err(answer)
    }
}

/// Waits until many requests in a row are all decided: every thread has a living VM.
async fn all_decided(stack: &Stack) {
    let all = async || {
        for i in 0..40 {
            if !is_decided(stack).await? {
                return Err(format!("request {i} was not decided"));
            }
        }
        Ok(())
    };
    wait::until("decisions on every thread", all).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trapped_vm_is_replaced_and_its_load_forgotten() {
    let upstreams = Upstream::start_all(3).await;
    let workers = upstream::workers(&upstreams);
    let more = json!({"filter_wasm": place::chaos_filter()});
    let stack = Stack::start(&Setup {
        threads: 2,
        workers,
        more,
    })
    .await;
    all_decided(&stack).await;

    // Requests that are running on the VM when it traps leave their bookings in the lanes, and what
    // they share on the boards.
    let tokens: Vec<u32> = (0..320).collect();
    let body = json!({"model": "sim", "prompt": tokens, "max_tokens": 1}).to_string();
    let request = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
         connection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    upstreams.iter().for_each(|u| {
        u.gate.send_replace(false);
    });
    let running: Vec<_> = (0..8)
        .map(|_| {
            let (port, request) = (stack.envoy.port, request.clone());
            tokio::spawn(async move {
                let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
                stream.write_all(request.as_bytes()).await?;
                let mut answer = String::new();
                stream.read_to_string(&mut answer).await?;
                Ok::<_, std::io::Error>(answer)
            })
        })
        .collect();
    let before: u64 = 40;
    let arrived = async || {
        let now: u64 = upstreams
            .iter()
            .map(|u| u.requests.load(std::sync::atomic::Ordering::Relaxed))
            .sum();
        if now >= before + 8 { Ok(()) } else { Err(now) }
    };
    wait::until("the running requests", arrived).await;

    let request =
        http::Request::get(uri(stack.envoy.port, "/v1/models")).header("x-kv-chaos", "trap");
    let request = request
        .body(http_body_util::Full::default())
        .expect("a request");
    let trapped = tokio::spawn({
        let client = stack.client.clone();
        async move { client.send(request).await }
    });
    let logged = async || {
        let log = stack.envoy.process.output();
        if log.contains("VM failed") || log.contains("unreachable") {
            Ok(())
        } else {
            Err(log)
        }
    };
    wait::until("the trap", logged).await;
    upstreams.iter().for_each(|u| {
        u.gate.send_replace(true);
    });
    for request in running {
        let answer = request.await.expect("a task").expect("an answer");
        assert!(
            answer.starts_with("HTTP/1.1 200"),
            "a running request lives on: {answer}"
        );
    }
    let answer = trapped.await.expect("a task").expect("an answer");
    assert_eq!(
        answer.status(),
        200,
        "the trapping request passes the filter by"
    );

    tokio::time::timeout(Duration::from_secs(25), all_decided(&stack))
        .await
        .expect("a new VM");
    // What the trapped VM had booked is gone from the lanes too.
    stack.idle().await;
}
