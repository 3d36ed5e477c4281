//! The stream to Envoy, over a real Unix socket.

mod support;

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use kv_core::id::Slot;
use kv_core::wire::{self, Up, WINDOW};
use support::{Bridge, Sidecar, Wrote, eventually, subscribe};
use tonic::Code;

const TWO_WORKERS: &str =
    "workers: [{id: 1, endpoint: '1.1.1.1:1'}, {id: 2, endpoint: '1.1.1.1:2'}]";

#[tokio::test(flavor = "multi_thread")]
async fn a_subscriber_gets_all_pages_then_the_table_then_loads_then_the_head() {
    let sidecar = Sidecar::start(TWO_WORKERS).await;
    let mut bridge = Bridge::open(&sidecar.socket(), subscribe(1, 1))
        .await
        .unwrap();
    let writes = bridge.until(|head| head.ready).await;

    let pages = writes.iter().take_while(|w| w.is_page()).count();
    assert_eq!(writes.len(), pages + 3);
    let table = writes[pages].table().unwrap();
    let loads = writes[pages + 1].loads().unwrap();
    let head = writes[pages + 2].head().unwrap();
    assert_eq!((loads.epoch, loads.pools.len()), (head.epoch, 1));
    assert_eq!(pages, 1 << head.level);
    assert_eq!(
        (table.epoch, table.version),
        (head.epoch, head.table_version)
    );
    let owners: Vec<_> = table.pools[0]
        .owners
        .iter()
        .map(|o| (o.slot, o.id.worker))
        .collect();
    assert_eq!(owners, [(Slot(0), 1), (Slot(1), 2)]);

    let report = sidecar.index("settled", |i| i["settled"] == true).await;
    assert_eq!(report["subscribers"][0]["synced"], true);
    let ready: serde_json::Value = sidecar.json("/readyz").await;
    assert_eq!(ready["missing"], serde_json::json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_head_beats_while_nothing_changes() {
    let sidecar = Sidecar::start(TWO_WORKERS).await;
    let mut bridge = Bridge::open(&sidecar.socket(), subscribe(1, 1))
        .await
        .unwrap();
    let first = bridge
        .until(|_| true)
        .await
        .last()
        .and_then(Wrote::head)
        .unwrap();
    let later = bridge.until(|head| head.beat > first.beat).await;
    assert!(later.last().unwrap().head().unwrap().beat > first.beat);
    assert!(
        later.iter().all(|w| w.head().is_some()),
        "nothing but heads"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_term_ends_the_older_stream_and_an_older_one_is_refused() {
    let sidecar = Sidecar::start(TWO_WORKERS).await;
    let socket = sidecar.socket();
    let mut old = Bridge::open(&socket, subscribe(1, 4)).await.unwrap();
    let mut other = Bridge::open(&socket, subscribe(2, 1)).await.unwrap();
    let mut new = Bridge::open(&socket, subscribe(1, 5)).await.unwrap();
    while old.next().await.is_some() {}
    new.until(|head| head.ready).await;
    other.until(|head| head.ready).await;
    let refused = Bridge::open(&socket, subscribe(1, 3)).await.err().unwrap();
    assert_eq!(refused.code(), Code::Aborted);
    let metrics = sidecar.get("/metrics").await.unwrap();
    assert!(metrics.contains("kv_router_bridge_subscriptions_total{kind=\"term\"} 1"));
    assert!(metrics.contains("kv_router_bridge_subscribers 2"));
}

#[tokio::test(flavor = "multi_thread")]
async fn shutting_down_ends_streams() {
    let sidecar = Sidecar::start(TWO_WORKERS).await;
    let mut bridge = Bridge::open(&sidecar.socket(), subscribe(1, 1))
        .await
        .unwrap();
    bridge.until(|head| head.ready).await;
    let stopping = tokio::spawn(sidecar.stop());
    while bridge.next().await.is_some() {}
    drop(bridge);
    stopping.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_speaks_otherwise_is_refused_and_counted() {
    let sidecar = Sidecar::start(TWO_WORKERS).await;
    let socket = sidecar.socket();
    let mut first = wire::encode(&Up::Subscribe(subscribe(1, 1)));
    first[0] = 99;
    let version = Bridge::open_with(&socket, first.into())
        .await
        .err()
        .unwrap();
    assert_eq!(version.code(), Code::FailedPrecondition);
    assert!(version.message().contains("version 99"), "{version}");

    let mut who = subscribe(1, 1);
    who.format = 77;
    let format = Bridge::open(&socket, who).await.err().unwrap();
    assert_eq!(format.code(), Code::FailedPrecondition);
    assert!(format.message().contains("page format 77"), "{format}");

    let rubbish = Bridge::open_with(&socket, vec![1, 250, 250].into()).await;
    assert_eq!(rubbish.err().unwrap().code(), Code::FailedPrecondition);

    let metrics = sidecar.get("/metrics").await.unwrap();
    for kind in ["version", "format", "malformed"] {
        let line = format!("kv_router_bridge_subscriptions_total{{kind=\"{kind}\"}} 1");
        assert!(metrics.contains(&line), "{kind}: {metrics}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscriber_that_never_acknowledges_gets_one_window_and_holds_up_nobody() {
    let sidecar = Sidecar::start(TWO_WORKERS).await;
    let mut slow = Bridge::open(&sidecar.socket(), subscribe(1, 1))
        .await
        .unwrap();
    let mut quick = Bridge::open(&sidecar.socket(), subscribe(2, 1))
        .await
        .unwrap();
    let first = quick
        .until(|head| head.ready)
        .await
        .last()
        .and_then(Wrote::head)
        .unwrap();
    quick
        .until(|head| head.beat >= first.beat + WINDOW as u64 + 2)
        .await;
    for _ in 0..WINDOW {
        slow.next().await.unwrap();
    }
    assert!(slow.is_silent().await);
    let report = sidecar.json("/v1/index").await;
    let subscribers = report["subscribers"].as_array().unwrap();
    let slow_one = subscribers.iter().find(|s| s["process"] == 1).unwrap();
    assert_eq!(slow_one["unacked_batches"], WINDOW);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leaving_worker_goes_from_the_table_first_and_keeps_its_slot_from_a_newcomer() {
    let sidecar = Sidecar::start(TWO_WORKERS).await;
    let eds = sidecar.path("state/envoy/eds-default.yaml");
    let mut bridge = Bridge::open(&sidecar.socket(), subscribe(1, 1))
        .await
        .unwrap();
    let first = bridge.until(|head| head.ready).await;
    let before = first.iter().find_map(Wrote::table).unwrap().version;
    let hosts = |path: &Path| std::fs::read_to_string(path).unwrap();
    assert!(hosts(&eds).contains("port_value: 1}"));

    sidecar.configure("workers: [{id: 2, endpoint: '1.1.1.1:2'}, {id: 3, endpoint: '1.1.1.1:3'}]");
    let mut writes = Vec::new();
    let table = loop {
        // Not acknowledged yet: Envoy may still have the old table.
        writes.extend(bridge.next().await.unwrap());
        if let Some(table) = writes.iter().rev().find_map(Wrote::table) {
            break table;
        }
        bridge.ack().await;
    };
    assert!(table.version > before);
    let owners: Vec<_> = table.pools[0]
        .owners
        .iter()
        .map(|o| (o.slot, o.id.worker))
        .collect();
    assert_eq!(owners, [(Slot(1), 2), (Slot(2), 3)]);
    let held = hosts(&eds);
    assert!(
        held.contains("port_value: 1}"),
        "leaves after the table: {held}"
    );
    assert!(
        held.contains("port_value: 3}"),
        "joins before the table: {held}"
    );
    bridge.ack().await;
    let gone = async || (!hosts(&eds).contains("port_value: 1}")).then_some(());
    eventually("the leaving worker's endpoint goes", gone).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invalid_file_is_refused_and_the_sidecar_goes_on() {
    let sidecar = Sidecar::start(TWO_WORKERS).await;
    sidecar.configure("workers: [{id: 1}]");
    let refused = async || {
        let metrics = sidecar.get("/metrics").await.unwrap();
        metrics
            .contains("kv_router_config_reloads_total{kind=\"refused\"} 1")
            .then_some(())
    };
    eventually("the file is refused", refused).await;
    let workers = sidecar.json("/v1/workers").await;
    assert_eq!(workers["pools"][0]["owners"].as_array().unwrap().len(), 2);
    sidecar.configure("router_mode: random\nworkers: [{id: 1, endpoint: '1.1.1.1:1'}]");
    let applied = async || {
        let workers = sidecar.json("/v1/workers").await;
        (workers["pools"][0]["policy"]["mode"] == "random").then_some(workers)
    };
    let workers = eventually("the good file is applied", applied).await;
    assert_eq!(workers["pools"][0]["owners"].as_array().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_socket_is_private_and_only_a_dead_one_is_replaced() {
    let folder = tempfile::TempDir::new().unwrap();
    // Left by a process that is gone.
    drop(std::os::unix::net::UnixListener::bind(folder.path().join("bridge.sock")).unwrap());
    let sidecar = Sidecar::start_in(folder, TWO_WORKERS).await;
    let mode = std::fs::metadata(sidecar.socket())
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let second = kv_router::bridge::Bridge::bind(&sidecar.socket()).await;
    assert!(
        second
            .unwrap_err()
            .to_string()
            .contains("another process listens")
    );
    let socket = sidecar.socket();
    let _folder = sidecar.stop().await;
    assert!(!socket.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_of_the_api_are_json() {
    let sidecar = Sidecar::start(TWO_WORKERS).await;
    let missing = sidecar.json("/v1/nothing").await;
    assert_eq!(missing["error"]["kind"], "no_such_path");
    let text = serde_json::json!({"model": "m", "prompt": "words"});
    assert_eq!(sidecar.explain(&text).await["error"]["kind"], "no_tokens");
    let pool = serde_json::json!({"pool": "x", "tokens": [1]});
    assert_eq!(
        sidecar.explain(&pool).await["error"]["kind"],
        "no_such_pool"
    );
    let typo = serde_json::json!({"token": [1], "tokens": [1]});
    assert_eq!(
        sidecar.explain(&typo).await["error"]["kind"],
        "invalid_body"
    );
    let workers = sidecar.json("/v1/workers").await;
    assert_eq!(workers["load"]["available"], false);
    assert_eq!(
        workers["pools"][0]["owners"][0]["load"],
        serde_json::Value::Null
    );
}
