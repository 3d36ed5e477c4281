//! `kv-router check-events` at real doors: a ZMQ socket, NATS, a polled endpoint.

use std::process::{Command, Output};
use std::time::Duration;

use bytes::Bytes;
use kv_tests::nats::Nats;
use kv_tests::place;
use serde_json::{Value, json};
use zeromq::{PubSocket, Socket as _, SocketSend as _, ZmqMessage};

/// A step that vLLM published: two removes and a store of two blocks.
const STEP: &[u8] = include_bytes!("../../sidecar/tests/fixtures/vllm/11_mixed_step.bin");

/// Runs the command, and `publish` again and again until it has ended.
async fn check(arguments: Vec<String>, mut publish: impl AsyncFnMut()) -> (Output, Value) {
    let mut watching = tokio::task::spawn_blocking(move || {
        let mut command = Command::new(place::kv_router());
        command.args(["check-events", "--json", "--seconds", "3"]);
        command.args(arguments).output().expect("the command")
    });
    let output = loop {
        let mut pause = tokio::time::interval(Duration::from_millis(20));
        pause.tick().await;
        tokio::select! {
            output = &mut watching => break output.expect("no panic"),
            () = async { publish().await; pause.tick().await; } => {}
        }
    };
    let report = serde_json::from_slice(&output.stdout).unwrap_or_default();
    (output, report)
}

fn words(arguments: &[&str]) -> Vec<String> {
    arguments.iter().map(|&a| a.to_owned()).collect()
}

#[tokio::test]
async fn a_socket_is_watched_and_its_numbers_are_followed() {
    let endpoint = format!("tcp://127.0.0.1:{}", place::free_port());
    let mut socket = PubSocket::new();
    socket.bind(&endpoint).await.expect("a free port");
    let mut number = 0_u64;
    let publish = async || {
        let mut message = ZmqMessage::from("kv-events");
        message.push_back(Bytes::copy_from_slice(&number.to_be_bytes()));
        message.push_back(Bytes::from_static(STEP));
        socket.send(message).await.expect("a socket");
        // Every other number is passed over.
        number += 2;
    };
    let (output, report) = check(words(&["--zmq", &endpoint]), publish).await;
    assert!(output.status.success(), "{output:?}");
    let messages = report["messages"].as_u64().unwrap();
    assert!(messages > 1, "{report:#}");
    assert_eq!(report["sequences"]["missing"], messages - 1);
    assert_eq!(report["sequences"]["restarts"], 0);
    assert_eq!(report["indexed"]["stored_blocks"]["device"], 2 * messages);
    assert_eq!(report["kv_cache_block_size"], 16);
    let advice = report["advice"].to_string();
    assert!(advice.contains("replay endpoint"), "{advice}");
}

#[tokio::test]
async fn a_subject_is_watched() {
    let folder = tempfile::tempdir().unwrap();
    let nats = Nats::start(folder.path()).await;
    let client = async_nats::connect(nats.url()).await.expect("NATS");
    let event = json!({"worker_id": 7, "event": {"event_id": 1, "data": {"stored": {
        "parent_hash": null, "blocks": [{"block_hash": 1, "tokens_hash": 2}]}}}});
    let publish = async || {
        let payload = event.to_string().into();
        client.publish("kv-events.7", payload).await.expect("NATS");
    };
    let arguments = words(&["--nats", &nats.url(), "--subject", "kv-events.*"]);
    let (output, report) = check(arguments, publish).await;
    assert!(output.status.success(), "{output:?}");
    assert_eq!(
        report["indexed"]["stored_blocks"]["device"],
        report["messages"]
    );
}

#[tokio::test]
async fn a_polled_endpoint_is_watched_as_configured() {
    let answer = async || {
        let event = json!({"event_id": 1, "data": {"type": "removed", "block_hashes": [1, 2]}});
        axum::Json(json!([event]))
    };
    let app = axum::Router::new().route("/kv_cache_events", axum::routing::post(answer));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await });
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("kv-router.yaml");
    let trtllm = json!({"url": format!("http://{address}/kv_cache_events")});
    let worker = json!({"id": 5, "endpoint": "127.0.0.1:9", "events": {"trtllm": trtllm}});
    let text = json!({"kv_cache_block_size": 32, "workers": [worker]}).to_string();
    std::fs::write(&config, text).unwrap();
    let arguments = words(&["--config", config.to_str().unwrap(), "--worker", "5"]);
    let (output, report) = check(arguments, async || {}).await;
    assert!(output.status.success(), "{output:?}");
    assert_eq!(report["engine"], "TensorRT-LLM, its polled endpoint");
    assert_eq!(report["kv_cache_block_size"], 32);
    let removed = report["indexed"]["removed_blocks"]["device"].as_u64();
    assert!(removed > Some(3), "{report:#}");
}

#[tokio::test]
async fn a_door_where_nobody_is_fails_with_its_address() {
    let endpoint = format!("tcp://127.0.0.1:{}", place::free_port());
    let (output, _) = check(words(&["--zmq", &endpoint]), async || {}).await;
    assert!(!output.status.success());
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        told.contains(endpoint.trim_start_matches("tcp://")),
        "{told}"
    );
}
