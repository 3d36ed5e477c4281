//! Both event planes over a real NATS server, into the index and out to a bridge.

mod support;

use serde_json::{Value, json};
use support::engine::{BLOCK, Engine, event, removed, stored, tokens};
use support::{Bridge, Nats, Sidecar, eventually, free_port, subscribe};

fn config(nats: &str, workers: &str) -> String {
    format!(
        "kv_cache_block_size: {BLOCK}\nnats: {{url: '{nats}', json_subject: 'kv-events.{{worker_id}}'}}\n\
         workers: [{workers}]"
    )
}

const ONE: &str = "{id: 1, endpoint: '1.1.1.1:1'}";
const TWO: &str = "{id: 1, endpoint: '1.1.1.1:1'}, {id: 2, endpoint: '1.1.1.1:2'}";

/// Device blocks that a worker holds of a prompt, by the exact index.
async fn overlap(sidecar: &Sidecar, worker: u64, prompt: &[u32]) -> u64 {
    let answer = sidecar.explain(&json!({ "tokens": prompt })).await;
    let owners = answer["owners"].as_array().unwrap();
    let owner = owners.iter().find(|o| o["worker"] == worker).unwrap();
    owner["overlap"][0].as_u64().unwrap()
}

async fn overlap_becomes(sidecar: &Sidecar, worker: u64, prompt: &[u32], blocks: u64) {
    let what = format!("worker {worker} holds {blocks} blocks");
    let look = async || (overlap(sidecar, worker, prompt).await == blocks).then_some(());
    eventually(&what, look).await;
}

/// Waits until the worker's start-up snapshot is over one way or the other.
async fn connected(sidecar: &Sidecar) {
    let is_over = |i: &Value| i["ready"] == true && i["repairs"] == 0;
    sidecar.index("the first snapshots are over", is_over).await;
    let is_connected = async || {
        let metrics = sidecar.get("/metrics").await.unwrap();
        metrics.contains("kv_router_nats_connected 1").then_some(())
    };
    eventually("nats is connected", is_connected).await;
}

async fn owner(sidecar: &Sidecar) -> Value {
    sidecar.json("/v1/workers").await["pools"][0]["owners"][0].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn events_become_overlaps_and_pages_that_envoy_has() {
    let nats = Nats::start().await;
    let engine = Engine::start(&nats.url(), 1).await;
    engine.answer(0, vec![vec![]]);
    let sidecar = Sidecar::start(&config(&nats.url(), TWO)).await;
    let mut bridge = Bridge::open(&sidecar.socket(), subscribe(1, 1))
        .await
        .unwrap();
    bridge.until(|head| head.ready).await;
    connected(&sidecar).await;

    let prompt = tokens(0, 5);
    engine.publish(1, stored(&prompt, 0, 100)).await;
    let mut pages = 0;
    while pages == 0 {
        let writes = bridge.until(|_| true).await;
        pages = writes.iter().filter(|w| w.is_page()).count();
    }
    assert_eq!(overlap(&sidecar, 1, &prompt).await, 5);
    assert_eq!(overlap(&sidecar, 2, &prompt).await, 0);
    let answer = sidecar
        .explain(&json!({ "prompt": prompt, "model": "m" }))
        .await;
    assert_eq!(answer["decision"]["worker"], 1);
    assert_eq!(answer["load"]["available"], true);
    // The last block is computed again.
    assert_eq!(answer["owners"][0]["cost"], 0.2);

    engine.publish(2, removed(&[103])).await;
    overlap_becomes(&sidecar, 1, &prompt, 3).await;
    let report = sidecar
        .index("two events", |i| i["planes"]["json"]["messages"] == 2)
        .await;
    assert_eq!(
        report["planes"]["json"]["events"],
        json!({"stored": 1, "removed": 1})
    );
    bridge.until(|_| true).await;
    let metrics = sidecar.get("/metrics").await.unwrap();
    assert!(
        !metrics.contains("kv_router_publish_seconds_count 0"),
        "{metrics}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_event_is_counted_by_reason_and_loses_nothing_else() {
    let nats = Nats::start().await;
    let engine = Engine::start(&nats.url(), 1).await;
    engine.answer(0, vec![vec![]]);
    let sidecar = Sidecar::start(&config(&nats.url(), ONE)).await;
    connected(&sidecar).await;
    let prompt = tokens(0, 2);
    let good = serde_json::to_value(event(1, 1, stored(&prompt, 0, 100))).unwrap();
    let mut of_rank = good.clone();
    of_rank["event"]["dp_rank"] = 7.into();
    let other = serde_json::to_value(event(2, 1, stored(&prompt, 0, 100))).unwrap();
    let batch = json!([{"worker_id": 1}, other, of_rank, good]);
    engine
        .send("kv-events.1", batch.to_string().into_bytes())
        .await;
    engine.send("kv-events.1", b"{broken".to_vec()).await;
    engine
        .send(
            "kv-events.99",
            json!(event(99, 1, stored(&prompt, 0, 1)))
                .to_string()
                .into_bytes(),
        )
        .await;
    engine.send("kv-events.what", b"[]".to_vec()).await;
    let report = sidecar
        .index("four messages", |i| i["planes"]["json"]["messages"] == 4)
        .await;
    assert_eq!(
        report["planes"]["json"]["rejected"],
        json!({"malformed": 2, "unknown_rank": 1, "unknown_worker": 1, "worker_mismatch": 2})
    );
    assert_eq!(overlap(&sidecar, 1, &prompt).await, 2);
    assert_eq!(owner(&sidecar).await["partial"], false);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_takes_over_what_the_engine_holds() {
    let nats = Nats::start().await;
    let engine = Engine::start(&nats.url(), 1).await;
    let (a, b) = (tokens(0, 4), tokens(500, 2));
    engine.answer(40, vec![vec![stored(&a, 0, 100)], vec![stored(&b, 0, 200)]]);
    let sidecar = Sidecar::start(&config(&nats.url(), ONE)).await;
    connected(&sidecar).await;
    overlap_becomes(&sidecar, 1, &a, 4).await;
    overlap_becomes(&sidecar, 1, &b, 2).await;
    let owner = owner(&sidecar).await;
    assert_eq!(
        (&owner["partial"], &owner["last_event_id"]),
        (&json!(false), &json!(40))
    );
    assert_eq!(owner["blocks"], 6);
    // The next event follows without another snapshot.
    engine.publish(41, removed(&[201])).await;
    overlap_becomes(&sidecar, 1, &b, 1).await;
    assert_eq!(engine.asked(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gap_is_repaired_and_later_events_apply_on_top() {
    let nats = Nats::start().await;
    let engine = Engine::start(&nats.url(), 1).await;
    engine.answer(0, vec![vec![]]);
    let sidecar = Sidecar::start(&config(&nats.url(), ONE)).await;
    connected(&sidecar).await;
    let prompt = tokens(0, 6);
    engine.publish(1, stored(&prompt[..8], 0, 100)).await;
    overlap_becomes(&sidecar, 1, &prompt, 2).await;
    // Event 2, which extended the chain, is lost. Event 3 is in the snapshot, event 4 is not.
    engine.answer(3, vec![vec![stored(&prompt[..16], 0, 100)]]);
    engine.publish(3, removed(&[150])).await;
    engine.publish(4, stored(&prompt, 4, 100)).await;
    overlap_becomes(&sidecar, 1, &prompt, 6).await;
    let owner = owner(&sidecar).await;
    assert_eq!(
        (&owner["gaps"], &owner["partial"]),
        (&json!(1), &json!(false))
    );
    assert_eq!(owner["last_event_id"], 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_engine_loses_what_it_held() {
    let nats = Nats::start().await;
    let engine = Engine::start(&nats.url(), 1).await;
    engine.answer(0, vec![vec![]]);
    let sidecar = Sidecar::start(&config(&nats.url(), ONE)).await;
    connected(&sidecar).await;
    let (before, after) = (tokens(0, 3), tokens(900, 3));
    engine.publish(1, stored(&before, 0, 100)).await;
    engine.publish(2, removed(&[777])).await;
    overlap_becomes(&sidecar, 1, &before, 3).await;
    engine.answer(1, vec![vec![stored(&after, 0, 300)]]);
    engine.publish(1, stored(&after, 0, 300)).await;
    overlap_becomes(&sidecar, 1, &after, 3).await;
    assert_eq!(overlap(&sidecar, 1, &before).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_whose_ids_make_no_sense_is_not_asked_with_every_event() {
    let nats = Nats::start().await;
    let engine = Engine::start(&nats.url(), 1).await;
    engine.answer(5, vec![vec![]]);
    let sidecar = Sidecar::start(&config(&nats.url(), ONE)).await;
    connected(&sidecar).await;
    let started = std::time::Instant::now();
    for _ in 0..200 {
        engine.publish(3, removed(&[1])).await;
    }
    sidecar
        .index("all have come", |i| i["planes"]["json"]["messages"] == 200)
        .await;
    let seconds = u32::try_from(started.elapsed().as_secs()).unwrap();
    assert!(engine.asked() <= 2 + seconds, "{} times", engine.asked());
}

#[tokio::test(flavor = "multi_thread")]
async fn without_an_answer_live_events_go_on_and_the_owner_is_shown_as_partial() {
    let nats = Nats::start().await;
    let sidecar = Sidecar::start(&config(&nats.url(), ONE)).await;
    connected(&sidecar).await;
    // Nobody answers requests for a snapshot: it only publishes.
    let silent = async_nats::connect(nats.url()).await.unwrap();
    let prompt = tokens(0, 3);
    let late = serde_json::to_vec(&event(1, 9, stored(&prompt, 0, 100))).unwrap();
    silent.publish("kv-events.1", late.into()).await.unwrap();
    silent.flush().await.unwrap();
    overlap_becomes(&sidecar, 1, &prompt, 3).await;
    assert_eq!(owner(&sidecar).await["partial"], true);
    let metrics = sidecar.get("/metrics").await.unwrap();
    assert!(metrics.contains("kv_router_snapshots_total{kind=\"no_responders\"} 2"));
    let is_counted = async || {
        let metrics = sidecar.get("/metrics").await.unwrap();
        metrics.contains("kv_router_partial_owners 1").then_some(())
    };
    eventually("the owner is counted", is_counted).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leaving_workers_pages_are_written_before_the_table_that_drops_it() {
    let nats = Nats::start().await;
    let engine = Engine::start(&nats.url(), 1).await;
    let prompt = tokens(0, 40);
    engine.answer(3, vec![vec![stored(&prompt, 0, 100)]]);
    let sidecar = Sidecar::start(&config(&nats.url(), TWO)).await;
    connected(&sidecar).await;
    overlap_becomes(&sidecar, 1, &prompt, 40).await;
    let mut bridge = Bridge::open(&sidecar.socket(), subscribe(1, 1))
        .await
        .unwrap();
    let first = bridge.until(|head| head.ready).await;
    let old: std::collections::HashMap<_, _> =
        first.into_iter().map(|w| (w.key, w.value)).collect();

    let two = "{id: 2, endpoint: '1.1.1.1:2'}";
    sidecar.configure(&config(&nats.url(), two));
    let mut writes = Vec::new();
    while !writes.iter().any(|w: &support::Wrote| w.table().is_some()) {
        writes.extend(bridge.until(|_| true).await);
    }
    let table = writes.iter().position(|w| w.table().is_some()).unwrap();
    let emptied = writes[..table].iter().filter(|w| w.is_page());
    let emptied: Vec<_> = emptied.map(|w| (&w.key, w.value.len())).collect();
    assert!(!emptied.is_empty());
    for (key, len) in emptied {
        assert!(len < old[key].len(), "the page holds nothing any more");
    }
    assert!(!writes[table..].iter().any(support::Wrote::is_page));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_server_is_found_again_and_what_was_missed_is_repaired() {
    let port = free_port();
    let url = format!("nats://127.0.0.1:{port}");
    let sidecar = Sidecar::start(&config(&url, ONE)).await;
    let waiting = sidecar.json("/readyz").await["missing"].to_string();
    assert!(waiting.contains("nats is not connected"), "{waiting}");

    let nats = Nats::start_on(port).await;
    let engine = Engine::start(&url, 1).await;
    let prompt = tokens(0, 4);
    engine.answer(7, vec![vec![stored(&prompt, 0, 100)]]);
    connected(&sidecar).await;
    engine.publish(7, removed(&[5])).await;
    overlap_becomes(&sidecar, 1, &prompt, 4).await;

    drop(nats);
    let lost = async || {
        let metrics = sidecar.get("/metrics").await.unwrap();
        metrics.contains("kv_router_nats_connected 0").then_some(())
    };
    eventually("the loss is noticed", lost).await;
    assert_eq!(
        overlap(&sidecar, 1, &prompt).await,
        4,
        "the last state serves on"
    );
    engine.answer(9, vec![vec![stored(&prompt[..8], 0, 100)]]);
    let _nats = Nats::start_on(port).await;
    connected(&sidecar).await;
    // The engine may come back later than the sidecar: its next event shows the gap.
    engine.publish(10, stored(&prompt[..12], 2, 100)).await;
    overlap_becomes(&sidecar, 1, &prompt, 3).await;
    assert_eq!(owner(&sidecar).await["partial"], false);
}

#[tokio::test(flavor = "multi_thread")]
async fn dynamo_workers_are_heard_on_their_event_plane() {
    let nats = Nats::start().await;
    let worker = 6_022_108_633_765_374_755_u64;
    let yaml = format!(
        "nats: {{url: '{}', dynamo: {{namespace: dynamo, component: backend}}}}\n\
         workers: [{{id: {worker}, endpoint: '1.1.1.1:1'}}]",
        nats.url()
    );
    let sidecar = Sidecar::start(&yaml).await;
    connected(&sidecar).await;
    let publisher = async_nats::connect(nats.url()).await.unwrap();
    let scope = "namespace.dynamo.component.backend.endpoint.generate";
    let captured: [(&str, &[u8]); 4] = [
        (
            "kv-events",
            include_bytes!("fixtures/nats_kv_events_stored_1.bin"),
        ),
        (
            "kv_metrics",
            include_bytes!("fixtures/nats_kv_metrics_1.bin"),
        ),
        (
            "kv-events",
            include_bytes!("fixtures/nats_kv_events_stored_2.bin"),
        ),
        (
            "kv-events",
            include_bytes!("fixtures/nats_kv_events_stored_2.bin"),
        ),
    ];
    for (topic, bytes) in captured {
        let subject = format!("{scope}.{topic}");
        publisher.publish(subject, bytes.into()).await.unwrap();
    }
    publisher.flush().await.unwrap();
    let report = sidecar
        .index("three messages", |i| i["planes"]["dynamo"]["messages"] == 3)
        .await;
    assert_eq!(report["planes"]["dynamo"]["events"], json!({"stored": 2}));
    assert_eq!(
        report["planes"]["dynamo"]["rejected"],
        json!({"duplicate_id": 1})
    );
    assert_eq!(report["stats"]["owner_blocks"], 14);
    let owner = owner(&sidecar).await;
    assert_eq!(
        (&owner["last_event_id"], &owner["partial"]),
        (&json!(2), &json!(false))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_sidecar_takes_up_epoch_slots_and_blocks() {
    let nats = Nats::start().await;
    let engine = Engine::start(&nats.url(), 2).await;
    let prompt = tokens(0, 4);
    engine.answer(3, vec![vec![stored(&prompt, 0, 100)]]);
    let sidecar = Sidecar::start(&config(&nats.url(), TWO)).await;
    connected(&sidecar).await;
    overlap_becomes(&sidecar, 2, &prompt, 4).await;
    let epoch = sidecar.json("/v1/index").await["epoch"].clone();
    let folder = sidecar.stop().await;
    drop(engine);
    drop(nats);

    // Without worker 1, and with NATS away.
    let yaml = config("nats://127.0.0.1:1", "{id: 2, endpoint: '1.1.1.1:2'}");
    let sidecar = Sidecar::start_in(folder, &yaml).await;
    let report = sidecar.json("/v1/index").await;
    assert_eq!(
        (&report["epoch"], &report["restored"]),
        (&epoch, &json!(true))
    );
    assert_eq!(report["ready"], true);
    assert_eq!(overlap(&sidecar, 2, &prompt).await, 4);
    let owner = owner(&sidecar).await;
    assert_eq!(
        (&owner["slot"], &owner["last_event_id"]),
        (&json!(1), &json!(3))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_corrupt_state_file_is_moved_aside_and_counted() {
    let folder = Sidecar::start(ONE_WITHOUT_NATS).await.stop().await;
    let file = folder.path().join("state/index.state");
    let mut bytes = std::fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&file, &bytes).unwrap();
    let sidecar = Sidecar::start_in(folder, ONE_WITHOUT_NATS).await;
    assert_eq!(sidecar.json("/v1/index").await["restored"], false);
    assert_eq!(
        std::fs::read(sidecar.path("state/index.state.corrupt")).unwrap(),
        bytes
    );
    let metrics = sidecar.get("/metrics").await.unwrap();
    assert!(metrics.contains("kv_router_state_restores_total{kind=\"corrupt\"} 1"));
}

const ONE_WITHOUT_NATS: &str = "workers: [{id: 1, endpoint: '1.1.1.1:1'}]";

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_without_events_indexes_none() {
    let nats = Nats::start().await;
    let engine = Engine::start(&nats.url(), 1).await;
    let yaml = format!("{}\nkv_events: false", config(&nats.url(), ONE));
    let sidecar = Sidecar::start(&yaml).await;
    connected(&sidecar).await;
    engine.publish(1, stored(&tokens(0, 3), 0, 100)).await;
    let report = sidecar
        .index("a message", |i| i["planes"]["json"]["messages"] == 1)
        .await;
    assert_eq!(
        report["planes"]["json"]["rejected"],
        json!({"events_off": 1})
    );
    assert_eq!(report["stats"]["owner_blocks"], 0);
    assert_eq!(engine.asked(), 0);
}
