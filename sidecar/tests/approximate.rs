//! Pools without KV events: blocks predicted from bookings, and decisions held against them.

mod support;

use kv_core::hash::{Hashing, Seed, sequence_hashes};
use kv_core::report::{Evidence, Weighed};
use kv_core::wire::Up;
use serde_json::{Value, json};
use support::engine::{BLOCK, tokens};
use support::vm::{Gauges, Vm, owner};
use support::{Bridge, Sidecar, eventually, subscribe};

fn config(ttl_secs: u32) -> String {
    format!(
        "policy: dynamo\nkv_cache_block_size: {BLOCK}\nkv_events: false\n\
         router_ttl_secs: {ttl_secs}\n\
         workers: [{{id: 1, endpoint: '1.1.1.1:1'}}, {{id: 2, endpoint: '1.1.1.1:2'}}]"
    )
}

fn hashes(tokens: &[u32]) -> Vec<u64> {
    sequence_hashes(tokens, Hashing::new(BLOCK as usize, Seed::new("", "")))
}

/// Device blocks of a prompt on workers 1 and 2.
async fn overlaps(sidecar: &Sidecar, tokens: &[u32]) -> [u64; 2] {
    let explained = sidecar.explain(&json!({"tokens": tokens})).await;
    let owners = explained["owners"].as_array().unwrap();
    [1, 2].map(|worker| {
        let owner = owners.iter().find(|o| o["worker"] == worker).unwrap();
        owner["overlap"][0].as_u64().unwrap()
    })
}

async fn become_overlaps(sidecar: &Sidecar, tokens: &[u32], expected: [u64; 2]) {
    let what = format!("{expected:?} blocks");
    let is_so = async || (overlaps(sidecar, tokens).await == expected).then_some(());
    eventually(&what, is_so).await;
}

struct Proxy {
    bridge: Bridge,
    vm: Vm,
    gauges: Gauges,
}

impl Proxy {
    async fn start(sidecar: &Sidecar) -> Self {
        let bridge = Bridge::open(&sidecar.socket(), subscribe(1, 1)).await;
        let gauges = Gauges::default();
        Self {
            bridge: bridge.unwrap(),
            vm: Vm::new(5, &gauges),
            gauges,
        }
    }

    async fn report(&mut self) {
        let report = self.vm.report();
        self.bridge.report(&[report]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_sent_to_a_worker_is_predicted_there_until_it_expires() {
    let sidecar = Sidecar::start(&config(2)).await;
    let mut proxy = Proxy::start(&sidecar).await;
    let writes = proxy.bridge.until(|head| head.ready).await;
    assert!(writes.iter().any(support::Wrote::is_page));
    let prompt = tokens(0, 6);
    proxy.vm.book(1, 1, &hashes(&prompt[..4 * BLOCK as usize]));
    proxy.report().await;
    become_overlaps(&sidecar, &prompt, [4, 0]).await;
    // The index has the prefix, so the report need not list it.
    let known = hashes(&prompt);
    proxy
        .vm
        .book_with(2, 1, Some((4, known[3])), &known[4..], None);
    proxy.report().await;
    become_overlaps(&sidecar, &prompt, [6, 0]).await;
    let workers = sidecar.json("/v1/workers").await;
    assert_eq!(workers["pools"][0]["owners"][0]["load"]["blocks"], 6);
    // Another worker serves it: what was predicted for its sake alone is not at the first.
    proxy.vm.move_to(2, 2);
    proxy.report().await;
    become_overlaps(&sidecar, &prompt, [4, 6]).await;
    // The pages that filters read have the blocks too.
    let is_held = |writes: &[support::Wrote]| {
        let pages = writes.iter().filter(|w| w.is_page());
        pages.map(|page| page.value.len()).max() > Some(20)
    };
    let mut written = proxy.bridge.until(|_| true).await;
    while !is_held(&written) {
        written.extend(proxy.bridge.until(|_| true).await);
    }
    // Predictions are those of routing: a request that runs on keeps none alive.
    become_overlaps(&sidecar, &prompt, [0, 0]).await;
    proxy.vm.free(1);
    proxy.vm.free(2);
    proxy.report().await;
    proxy.bridge.send(&proxy.gauges.shown()).await;
    let is_empty = async || {
        let index = sidecar.json("/v1/index").await;
        let raw = sidecar.json("/v1/workers?raw").await;
        (index["stats"]["blocks"] == 0 && raw["raw"]["bookings"] == 0).then_some(())
    };
    eventually("nothing is left", is_empty).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn predictions_for_a_worker_leave_with_it() {
    let sidecar = Sidecar::start(&config(1000)).await;
    let mut proxy = Proxy::start(&sidecar).await;
    let prompt = tokens(0, 3);
    proxy.vm.book(1, 1, &hashes(&prompt));
    proxy.vm.book(2, 2, &hashes(&prompt));
    proxy.report().await;
    become_overlaps(&sidecar, &prompt, [3, 3]).await;
    let both = config(1000);
    sidecar.configure(&both.replace("{id: 1, endpoint: '1.1.1.1:1'}, ", ""));
    let blocks = async |expected: Value| {
        let is_so = async || {
            let workers = sidecar.json("/v1/workers").await;
            let owners = workers["pools"][0]["owners"].as_array().unwrap().clone();
            let blocks: Vec<_> = owners.iter().map(|o| o["blocks"].clone()).collect();
            (json!(blocks) == expected).then_some(())
        };
        eventually("the workers' blocks", is_so).await;
    };
    blocks(json!([3])).await;
    sidecar.configure(&both);
    blocks(json!([0, 3])).await;
}

fn evidence(tokens: u32, candidates: &[(u64, u32, f64)]) -> Evidence {
    let weighed = |(worker, held, cost): &(u64, u32, f64)| Weighed {
        owner: owner(*worker).id,
        overlap: [*held, 0, 0, 0],
        shared_cache: 0,
        prefill_tokens: 0,
        active_blocks: 0,
        shared_blocks: 0,
        requests: 0,
        cost: *cost,
        paced: None,
    };
    Evidence {
        at_ns: 1,
        reason: "kv".into(),
        tokens,
        trust: 1.0,
        candidates: candidates.iter().map(weighed).collect(),
        constraints: Default::default(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn decisions_are_kept_with_what_the_exact_state_says() {
    let sidecar = Sidecar::start(&config(1000)).await;
    let mut proxy = Proxy::start(&sidecar).await;
    let prompt = tokens(0, 4);
    let hashes = hashes(&prompt);
    let size = u32::try_from(prompt.len()).unwrap();
    let vm = &mut proxy.vm;
    // Nobody holds anything.
    let first = evidence(size, &[(1, 0, 8.0), (2, 0, 8.0)]);
    vm.book_with(1, 1, None, &hashes, Some(first));
    vm.free(1);
    // Worker 1 holds the prompt.
    let second = evidence(size, &[(1, 4, 4.0), (2, 0, 8.0)]);
    vm.book_with(2, 1, None, &hashes, Some(second));
    vm.free(2);
    // A filter that has not heard of it.
    let third = evidence(size, &[(2, 0, 8.0), (1, 0, 8.0)]);
    vm.book_with(3, 2, None, &hashes, Some(third));
    vm.free(3);
    proxy.report().await;

    let made = async || {
        let report = sidecar.json("/v1/decisions").await;
        (report["made"] == 3).then_some(report)
    };
    let report = eventually("three decisions", made).await;
    let verdicts: Vec<&Value> = report["decisions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|d| &d["verdict"])
        .collect();
    assert_eq!(verdicts, ["overlap", "agree", "tie"]);
    let missed = &report["decisions"][0];
    assert_eq!(
        (&missed["regret"], &missed["agree"]),
        (&json!(4.0), &json!(false))
    );
    assert_eq!(missed["best"], json!({"worker": 1, "rank": 0, "cost": 4.0}));
    assert_eq!(
        missed["candidates"][1]["seen"]["overlap"],
        json!([0, 0, 0, 0])
    );
    assert_eq!(
        missed["candidates"][1]["exact"]["overlap"],
        json!([4, 0, 0, 0])
    );

    let count = async |query: &str| {
        let report = sidecar.json(&format!("/v1/decisions?{query}")).await;
        report["decisions"].as_array().map(Vec::len)
    };
    assert_eq!(count("agree=true").await, Some(2));
    assert_eq!(count("worker=2&reason=kv").await, Some(1));
    assert_eq!(count("reason=text").await, Some(0));
    assert_eq!(count("limit=2").await, Some(2));
    let error = sidecar.json("/v1/decisions?wroker=2").await;
    assert_eq!(error["error"]["kind"], "invalid_query");
    let metrics = sidecar.get("/metrics").await.unwrap();
    for outcome in ["agree", "tie", "overlap"] {
        let line = format!("kv_router_shadow_total{{outcome=\"{outcome}\"}} 1");
        assert!(metrics.contains(&line), "{outcome}: {metrics}");
    }
    assert!(
        metrics.contains("kv_router_regret_blocks_sum 4.0"),
        "{metrics}"
    );
    assert!(
        metrics.contains("kv_router_regret_blocks_count 3"),
        "{metrics}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefix_that_the_index_lost_counts_as_nobody_elses() {
    let sidecar = Sidecar::start(&config(1000)).await;
    let mut proxy = Proxy::start(&sidecar).await;
    let seen = evidence(20, &[(1, 3, 7.0), (2, 0, 10.0)]);
    proxy.vm.book_with(1, 1, Some((3, 77)), &[8, 9], Some(seen));
    proxy.report().await;
    let is_booked = async || {
        let workers = sidecar.json("/v1/workers").await;
        (workers["pools"][0]["owners"][0]["load"]["blocks"] == 5).then_some(())
    };
    eventually("five blocks", is_booked).await;
    let metrics = sidecar.get("/metrics").await.unwrap();
    assert!(
        metrics.contains("kv_router_unknown_prefixes_total 1"),
        "{metrics}"
    );
    let is_judged = async || {
        let metrics = sidecar.get("/metrics").await.unwrap();
        let line = "kv_router_shadow_total{outcome=\"unknown_prompt\"} 1";
        metrics.contains(line).then_some(())
    };
    eventually("a verdict", is_judged).await;
    assert_eq!(overlaps(&sidecar, &tokens(0, 3)).await, [0, 0]);
    let gauges = async || {
        let metrics = sidecar.get("/metrics").await.unwrap();
        let labels = "{pool=\"default\",worker=\"1\",rank=\"0\"}";
        let is_so = ["active_blocks", "active_prefill_tokens", "active_requests"]
            .iter()
            .zip([5, 32, 1])
            .all(|(name, n)| metrics.contains(&format!("kv_router_{name}{labels} {n}\n")));
        is_so.then_some(())
    };
    eventually("the gauges", gauges).await;
    proxy.bridge.send(&Up::Lanes(Vec::new())).await;
}
