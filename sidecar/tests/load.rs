//! Load: what VMs report over real streams, what their proxies are told, what `/v1/workers` says.

mod support;

use kv_core::id::Slot;
use kv_core::load::Load;
use kv_core::loads::Loads;
use kv_core::wire::{self, Up};
use serde_json::{Value, json};
use support::proxy::{Proxy, load};
use support::vm::{Vm, owner};
use support::{Bridge, Sidecar, eventually, subscribe};

const TWO_WORKERS: &str =
    "workers: [{id: 1, endpoint: '1.1.1.1:1'}, {id: 2, endpoint: '1.1.1.1:2'}]";

/// The load of a worker in `/v1/workers`.
async fn truth(sidecar: &Sidecar, worker: usize) -> Value {
    let workers = sidecar.json("/v1/workers").await;
    workers["pools"][0]["owners"][worker - 1]["load"].clone()
}

async fn becomes(sidecar: &Sidecar, worker: usize, load: Load) {
    let expected = json!({
        "prefill_tokens": load.prefill_tokens, "waiting": load.waiting,
        "decoding": load.decoding, "blocks": load.blocks,
    });
    let what = format!("worker {worker} with {expected}");
    let is_so = async || (truth(sidecar, worker).await == expected).then_some(());
    eventually(&what, is_so).await;
}

/// Waits until nothing is left anywhere: bookings, lanes as shown, ledgers, corrections.
async fn all_zero(sidecar: &Sidecar, proxies: &[&Proxy]) {
    for proxy in proxies {
        proxy.bridge.send(&proxy.gauges.shown()).await;
    }
    let is_zero = async || {
        let raw = sidecar.json("/v1/workers?raw").await["raw"].clone();
        let zero = json!({"prefill_tokens": 0, "waiting": 0, "decoding": 0, "blocks": 0});
        let lanes = raw["proxies"].as_array().unwrap().iter();
        let lanes = lanes.flat_map(|p| p["owners"].as_array().unwrap());
        let columns = ["lanes", "booked", "load", "correction"];
        let clean = lanes.clone().all(|o| columns.iter().all(|c| o[c] == zero));
        (raw["bookings"] == 0 && clean && lanes.count() > 0).then_some(())
    };
    eventually("lanes, ledgers, load and corrections are zero", is_zero).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_processes_see_the_same_load_and_shared_blocks_once() {
    let sidecar = Sidecar::start(TWO_WORKERS).await;
    let mut one = Proxy::start(&sidecar.socket(), 1).await;
    let mut two = Proxy::start(&sidecar.socket(), 2).await;

    one.vm.book(1, 1, &[11, 12, 13]);
    one.report().await;
    two.sees(1, load(48, 1, 0, 3)).await;
    two.vm.book(1, 1, &[11, 12, 99]);
    two.report().await;
    let both = load(96, 2, 0, 4);
    one.sees(1, both).await;
    two.sees(1, both).await;
    becomes(&sidecar, 1, both).await;
    let workers = sidecar.json("/v1/workers").await;
    assert_eq!(workers["load"], json!({"available": true}));
    let requests = &workers["pools"][0]["owners"][0]["requests"];
    let expected = json!([
        {"process": 1, "vm_id": "kv_router", "requests": 1},
        {"process": 2, "vm_id": "kv_router", "requests": 1},
    ]);
    assert_eq!(*requests, expected);

    one.vm.first_token(1);
    one.report().await;
    two.sees(1, load(48, 1, 1, 4)).await;
    two.vm.move_to(1, 2);
    two.report().await;
    one.sees(1, load(0, 0, 1, 3)).await;
    becomes(&sidecar, 2, load(48, 1, 0, 3)).await;

    one.vm.free(1);
    two.vm.free(1);
    one.report().await;
    two.report().await;
    all_zero(&sidecar, &[&one, &two]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn live_prefixes_of_other_proxies_are_published_shared_ones_first() {
    let sidecar = Sidecar::start(TWO_WORKERS).await;
    let mut proxy = Proxy::start(&sidecar.socket(), 1).await;
    let mut other = Proxy::start(&sidecar.socket(), 2).await;
    proxy.vm.book(1, 1, &[1, 2, 3, 4]);
    proxy.vm.book(2, 1, &[1, 2, 3, 5]);
    proxy.vm.book(3, 2, &[1, 2, 3, 6]);
    proxy.report().await;
    let is_shared = |loads: &Loads| loads.pools[0].prefixes.len() == 4;
    let loads = other.bridge.loads("live prefixes", is_shared).await;
    let prefixes: Vec<_> = loads.pools[0]
        .prefixes
        .iter()
        .map(|p| (p.hash, p.depth, p.slots.clone()))
        .collect();
    let shared = (3, 3, vec![Slot(0), Slot(1)]);
    let whole = [(6, 1), (5, 0), (4, 0)].map(|(hash, slot)| (hash, 4, vec![Slot(slot)]));
    assert_eq!(prefixes[0], shared);
    assert_eq!(prefixes[1..], whole);
    proxy.vm.free(1);
    proxy.vm.free(2);
    proxy.report().await;
    let is_whole = |loads: &Loads| {
        let prefixes = &loads.pools[0].prefixes;
        matches!(prefixes.as_slice(), [only] if (only.hash, only.depth) == (6, 4))
    };
    other.bridge.loads("the one that is left", is_whole).await;
    // Who shares its own prompts knows of them.
    other.vm.book(1, 2, &[1, 2, 3, 6, 7]);
    other.report().await;
    let loads = proxy
        .bridge
        .loads("the other's", |l| !l.pools[0].prefixes.is_empty());
    let told = loads.await.pools.remove(0).prefixes;
    let told: Vec<_> = told.iter().map(|p| (p.hash, p.slots.clone())).collect();
    assert_eq!(told, [(6, vec![Slot(1)]), (7, vec![Slot(1)])]);
    proxy.vm.free(3);
    proxy.report().await;
    other.vm.free(1);
    other.report().await;
    all_zero(&sidecar, &[&proxy, &other]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_report_is_made_good_by_a_complete_one() {
    let sidecar = Sidecar::start(TWO_WORKERS).await;
    let mut proxy = Proxy::start(&sidecar.socket(), 1).await;
    proxy.vm.book(1, 1, &[1]);
    proxy.vm.book(2, 2, &[2]);
    proxy.report().await;
    becomes(&sidecar, 2, load(16, 1, 0, 1)).await;
    proxy.vm.free(1);
    proxy.vm.book(3, 2, &[3]);
    let lost = proxy.vm.report();
    proxy.vm.first_token(2);
    proxy.report().await;
    // What came applies; what was lost is missing, and the correction hides no load of its own.
    becomes(&sidecar, 2, load(0, 0, 1, 1)).await;
    becomes(&sidecar, 1, load(16, 1, 0, 1)).await;
    let metrics = sidecar.get("/metrics").await.unwrap();
    assert!(metrics.contains("kv_router_reports_total{kind=\"gap\"} 1"));

    let whole = proxy.vm.whole();
    proxy.bridge.report(&[whole]).await;
    becomes(&sidecar, 1, load(0, 0, 0, 0)).await;
    becomes(&sidecar, 2, load(16, 1, 1, 2)).await;
    // Late and again: nothing happens.
    proxy.bridge.report(&[lost]).await;
    proxy.vm.free(2);
    proxy.vm.free(3);
    let last = proxy.vm.report();
    proxy.bridge.report(&[last.clone(), last]).await;
    all_zero(&sidecar, &[&proxy]).await;
    let metrics = sidecar.get("/metrics").await.unwrap();
    assert!(metrics.contains("kv_router_reports_total{kind=\"repeated\"} 2"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_dies_is_retired_and_its_lanes_are_corrected() {
    let sidecar = Sidecar::start(TWO_WORKERS).await;
    let mut proxy = Proxy::start(&sidecar.socket(), 1).await;
    proxy.vm.book(1, 1, &[1, 2]);
    proxy.report().await;
    // Never reported: the VM traps at once.
    proxy.vm.book(2, 1, &[3, 4, 5]);
    becomes(&sidecar, 1, load(32, 1, 0, 2)).await;
    let mut successor = Vm::new(777, &proxy.gauges);
    let whole = successor.whole();
    proxy.bridge.report(&[whole]).await;

    let is_retired = async || {
        proxy.bridge.send(&proxy.gauges.shown()).await;
        let whole = successor.whole();
        proxy.bridge.report(&[whole]).await;
        let raw = sidecar.json("/v1/workers?raw").await["raw"].clone();
        (raw["bookings"] == 0).then_some(())
    };
    eventually("the dead VM's booking goes", is_retired).await;
    let is_leak_found = |loads: &Loads| {
        let correction = loads.pools[0].correction(Slot(0));
        correction.waiting == -2 && correction.blocks == -5
    };
    // The lanes stay as the dead VM left them, and the correction says so.
    proxy
        .bridge
        .loads("the leak's correction", is_leak_found)
        .await;
    assert_eq!(proxy.gauges.load(owner(1)), load(80, 2, 0, 5));
    becomes(&sidecar, 1, load(0, 0, 0, 0)).await;
    let metrics = sidecar.get("/metrics").await.unwrap();
    assert!(metrics.contains("kv_router_retired_vms_total 1"));
    assert!(metrics.contains("kv_router_lane_leaks_total 1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn bookings_survive_a_change_of_stream_and_go_with_the_process() {
    let sidecar = Sidecar::start(TWO_WORKERS).await;
    let mut proxy = Proxy::start(&sidecar.socket(), 1).await;
    proxy.vm.book(1, 1, &[1, 2]);
    proxy.report().await;
    becomes(&sidecar, 1, load(32, 1, 0, 2)).await;
    // The next leader's stream, with the same VMs.
    let next = Bridge::open(&sidecar.socket(), subscribe(1, 2)).await;
    proxy.bridge = next.unwrap();
    let whole = proxy.vm.whole();
    proxy.bridge.report(&[whole]).await;
    becomes(&sidecar, 1, load(32, 1, 0, 2)).await;
    let workers = sidecar.json("/v1/workers?raw").await;
    assert_eq!(workers["raw"]["proxies"].as_array().unwrap().len(), 1);
    assert_eq!(workers["raw"]["proxies"][0]["connected"], true);

    let Proxy { bridge, .. } = proxy;
    drop(bridge);
    let is_gone = async || {
        let workers = sidecar.json("/v1/workers?raw").await;
        let is_empty = workers["raw"]["proxies"] == json!([]);
        is_empty.then_some(workers)
    };
    let workers = eventually("the process is given up", is_gone).await;
    assert_eq!(workers["raw"]["bookings"], 0);
    assert_eq!(workers["load"]["available"], false);
    assert_eq!(workers["pools"][0]["owners"][0]["load"], Value::Null);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_sidecar_learns_what_is_booked_and_what_leaked() {
    let sidecar = Sidecar::start(TWO_WORKERS).await;
    let mut proxy = Proxy::start(&sidecar.socket(), 1).await;
    proxy.vm.book(1, 1, &[1, 2]);
    proxy.report().await;
    becomes(&sidecar, 1, load(32, 1, 0, 2)).await;
    let folder = sidecar.stop().await;
    // While nobody listens: a request ends, one begins, and a VM dies.
    proxy.vm.free(1);
    proxy.vm.book(2, 2, &[3]);
    proxy.vm.report();
    Vm::new(55, &proxy.gauges).book(1, 2, &[9, 9, 9]);

    let sidecar = Sidecar::start_in(folder, TWO_WORKERS).await;
    let bridge = Bridge::open(&sidecar.socket(), subscribe(1, 2)).await;
    proxy.bridge = bridge.unwrap();
    // What the dead VM left counts until it is known for what it is.
    let whole = proxy.vm.whole();
    proxy.bridge.report(&[whole]).await;
    becomes(&sidecar, 2, load(16, 1, 0, 1)).await;
    let is_found = async || {
        proxy.bridge.send(&proxy.gauges.shown()).await;
        let metrics = sidecar.get("/metrics").await.unwrap();
        metrics
            .contains("kv_router_lane_leaks_total 1")
            .then_some(())
    };
    eventually("the leak is found", is_found).await;
    proxy.sees(2, load(16, 1, 0, 1)).await;
    becomes(&sidecar, 1, load(0, 0, 0, 0)).await;
    assert_eq!(proxy.gauges.load(owner(2)), load(64, 2, 0, 4));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_filter_of_protocol_1_is_served_without_loads() {
    let sidecar = Sidecar::start(TWO_WORKERS).await;
    let first = wire::encode_for(1, &Up::Subscribe(subscribe(1, 1)));
    let mut bridge = Bridge::open_with(&sidecar.socket(), first.into())
        .await
        .unwrap();
    // The bridge of these tests checks each message's version.
    let first = bridge.until(|head| head.ready).await;
    let mut other = Proxy::start(&sidecar.socket(), 2).await;
    other.vm.book(1, 1, &[1]);
    other.report().await;
    other.sees(1, load(16, 1, 0, 1)).await;
    let beat = first.last().and_then(support::Wrote::head).unwrap().beat;
    let later = bridge.until(|head| head.beat > beat + 2).await;
    let writes = first.iter().chain(&later);
    assert!(writes.clone().any(|w| w.table().is_some()));
    assert!(writes.clone().all(|w| w.loads().is_none()));
    let report = sidecar.json("/v1/index").await;
    let protocols = report["subscribers"].as_array().unwrap().iter();
    let protocols: Vec<_> = protocols.map(|s| s["protocol"].clone()).collect();
    assert_eq!(protocols, [1, kv_core::wire::PROTOCOL]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreadable_report_costs_nothing_but_itself() {
    let sidecar = Sidecar::start(TWO_WORKERS).await;
    let mut proxy = Proxy::start(&sidecar.socket(), 1).await;
    proxy.vm.book(1, 1, &[1]);
    let report = wire::encode(&proxy.vm.report());
    let garbage = vec![vec![], vec![9, 9], vec![2, 255, 255], report];
    proxy.bridge.send(&Up::Reports(garbage)).await;
    becomes(&sidecar, 1, load(16, 1, 0, 1)).await;
    let metrics = sidecar.get("/metrics").await.unwrap();
    for kind in ["empty", "version", "malformed"] {
        let line = format!("kv_router_reports_total{{kind=\"{kind}\"}} 1");
        assert!(metrics.contains(&line), "{kind}: {metrics}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_tracked_is_corrected_away() {
    let yaml =
        format!("router_track_prefill_tokens: false\nrouter_assume_kv_reuse: false\n{TWO_WORKERS}");
    let sidecar = Sidecar::start(&yaml).await;
    let mut proxy = Proxy::start(&sidecar.socket(), 1).await;
    proxy.vm.book(1, 1, &[1, 2]);
    proxy.vm.book(2, 1, &[1, 2]);
    proxy.report().await;
    proxy.sees(1, load(0, 2, 0, 4)).await;
    proxy.vm.free(1);
    proxy.vm.free(2);
    proxy.report().await;
    all_zero(&sidecar, &[&proxy]).await;
}
