//! Workers that serve and say nothing, or something else than what they do.

mod support;

use kv_core::hash::{Hashing, Seed, sequence_hashes};
use kv_core::report::Step;
use serde_json::{Value, json};
use support::engine::{BLOCK, Engine, stored, tokens};
use support::service::Scripted;
use support::vm::{Gauges, Vm};
use support::{Bridge, Nats, Sidecar, eventually, subscribe};

fn config(nats: &str) -> String {
    format!(
        "kv_cache_block_size: {BLOCK}\nnats: {{url: '{nats}', json_subject: 'kv-events.{{worker_id}}'}}\n\
         workers: [{{id: 1, endpoint: '1.1.1.1:1'}}, {{id: 2, endpoint: '1.1.1.1:2'}}]"
    )
}

fn hashes(tokens: &[u32]) -> Vec<u64> {
    sequence_hashes(tokens, Hashing::new(BLOCK as usize, Seed::new("", "")))
}

async fn overlap(sidecar: &Sidecar, worker: u64, prompt: &[u32]) -> u64 {
    let answer = sidecar.explain(&json!({ "tokens": prompt })).await;
    let owners = answer["owners"].as_array().unwrap();
    let owner = owners.iter().find(|o| o["worker"] == worker).unwrap();
    owner["overlap"][0].as_u64().unwrap()
}

async fn owner(sidecar: &Sidecar, worker: usize) -> Value {
    sidecar.json("/v1/workers").await["pools"][0]["owners"][worker - 1].clone()
}

async fn is_told(sidecar: &Sidecar, line: &str) {
    let look = async || {
        let metrics = sidecar.get("/metrics").await.unwrap();
        metrics.contains(line).then_some(())
    };
    eventually(line, look).await;
}

async fn ailment_becomes(sidecar: &Sidecar, worker: usize, ailment: Value) -> Value {
    let look = async || {
        let owner = owner(sidecar, worker).await;
        (owner["events"]["ailment"] == ailment).then_some(owner)
    };
    eventually(&format!("worker {worker} is {ailment}"), look).await
}

struct Installation {
    sidecar: Sidecar,
    engines: [Engine; 2],
    bridge: Bridge,
    vm: Vm,
    _nats: Nats,
}

impl Installation {
    /// Two workers of the JSON plane with empty caches.
    async fn start() -> Self {
        let nats = Nats::start().await;
        let engines = [
            Engine::start(&nats.url(), 1).await,
            Engine::start(&nats.url(), 2).await,
        ];
        for engine in &engines {
            engine.answer(0, vec![vec![]]);
        }
        let sidecar = Sidecar::start(&config(&nats.url())).await;
        sidecar
            .index("the first snapshots", |i| {
                i["ready"] == true && i["repairs"] == 0
            })
            .await;
        let bridge = Bridge::open(&sidecar.socket(), subscribe(1, 1))
            .await
            .unwrap();
        Self {
            sidecar,
            engines,
            bridge,
            vm: Vm::new(5, &Gauges::default()),
            _nats: nats,
        }
    }

    /// A request for a prompt runs through on a worker.
    async fn serve(
        &mut self,
        request: u64,
        worker: u64,
        prompt: &[u32],
        cached: Option<(u32, u32)>,
    ) {
        self.vm.book(request, worker, &hashes(prompt));
        self.vm.first_token(request);
        if let Some((predicted, found)) = cached {
            self.vm.say(Step::Cached {
                request,
                predicted,
                found,
            });
        }
        self.vm.free(request);
        let report = self.vm.report();
        self.bridge.report(&[report]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_publishes_nothing_is_predicted_until_it_is_heard() {
    let mut at = Installation::start().await;
    for request in 1..20 {
        let prompt = tokens(1000 * u32::try_from(request).unwrap(), 4);
        at.serve(request, 1, &prompt, None).await;
        // The other one says what it stores.
        at.engines[1]
            .publish(request, stored(&prompt, 0, 1000 * request))
            .await;
        at.serve(100 + request, 2, &prompt, None).await;
    }
    let prompt = tokens(100_000, 4);
    ailment_becomes(&at.sidecar, 1, json!("silent")).await;
    assert_eq!(
        owner(&at.sidecar, 2).await["events"]["ailment"],
        json!(null)
    );
    is_told(&at.sidecar, "kv_router_unwell_workers{kind=\"silent\"} 1").await;
    at.serve(50, 1, &prompt, None).await;
    let predicted = async || (overlap(&at.sidecar, 1, &prompt).await == 4).then_some(());
    eventually("its prompt is predicted", predicted).await;
    at.serve(51, 2, &prompt, None).await;

    let other = tokens(200_000, 2);
    at.engines[0].publish(1, stored(&other, 0, 7)).await;
    ailment_becomes(&at.sidecar, 1, json!(null)).await;
    assert_eq!(overlap(&at.sidecar, 1, &other).await, 2);
    assert_eq!(overlap(&at.sidecar, 1, &prompt).await, 0);
    assert_eq!(overlap(&at.sidecar, 2, &prompt).await, 0);
    is_told(&at.sidecar, "kv_router_unwell_workers{kind=\"silent\"} 0").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_blocks_have_another_size_is_predicted_as_well() {
    let mut at = Installation::start().await;
    for request in 1..20 {
        let prompt = tokens(1000 * u32::try_from(request).unwrap(), 4);
        // It tells of blocks that begin with other tokens.
        let other = tokens(1 + 1000 * u32::try_from(request).unwrap(), 4);
        at.engines[0]
            .publish(request, stored(&other, 0, 1000 * request))
            .await;
        at.serve(request, 1, &prompt, None).await;
    }
    let ill = ailment_becomes(&at.sidecar, 1, json!("mismatched")).await;
    assert_eq!(ill["knowledge"], "whole");
    let prompt = tokens(100_000, 4);
    at.serve(50, 1, &prompt, None).await;
    let predicted = async || (overlap(&at.sidecar, 1, &prompt).await == 4).then_some(());
    eventually("its prompt is predicted", predicted).await;
    assert_eq!(overlap(&at.sidecar, 1, &tokens(1001, 4)).await, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_contradict_events_make_a_worker_inaccurate() {
    let mut at = Installation::start().await;
    let prompt = tokens(0, 16);
    for engine in &at.engines {
        engine.publish(1, stored(&prompt, 0, 100)).await;
    }
    let held = async || (overlap(&at.sidecar, 1, &prompt).await == 16).then_some(());
    eventually("both are heard", held).await;
    // The first one has lost what it said it has.
    at.engines[0].answer(1, vec![vec![]]);
    for request in 1..20 {
        at.serve(request, 1, &prompt, Some((60, 0))).await;
        at.serve(100 + request, 2, &prompt, Some((60, 56))).await;
    }
    let ill = ailment_becomes(&at.sidecar, 1, json!("inaccurate")).await;
    assert_eq!(ill["events"]["accuracy"], json!(0.0));
    let well = owner(&at.sidecar, 2).await;
    assert_eq!(well["events"]["ailment"], json!(null));
    assert!(well["events"]["accuracy"].as_f64().unwrap() > 0.9);
    let repaired = async || (overlap(&at.sidecar, 1, &prompt).await == 0).then_some(());
    eventually("what it said counts no more", repaired).await;
    is_told(
        &at.sidecar,
        "kv_router_unwell_workers{kind=\"inaccurate\"} 1",
    )
    .await;
    is_told(
        &at.sidecar,
        "kv_router_prediction_accuracy{pool=\"default\",worker=\"1\"} 0.0",
    )
    .await;
    let found = "kv_router_found_cached_tokens_total{pool=\"default\",worker=\"2\"} 1064";
    is_told(&at.sidecar, found).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_events_are_all_dropped_says_why() {
    let mut at = Installation::start().await;
    for request in 1..20 {
        let prompt = tokens(1000 * u32::try_from(request).unwrap(), 4);
        at.serve(request, 1, &prompt, None).await;
        let mut event = support::engine::event(1, request, stored(&prompt, 0, 1000 * request));
        event.event.dp_rank = 9;
        let event = serde_json::to_vec(&event).unwrap();
        at.engines[0].send("kv-events.1", event).await;
    }
    let ill = ailment_becomes(&at.sidecar, 1, json!("dropped")).await;
    assert_eq!(ill["events"]["dropped_as"], "unknown_rank");
    assert_eq!(ill["events"]["rejected"], json!({"unknown_rank": 19}));
    is_told(&at.sidecar, "kv_router_unwell_workers{kind=\"dropping\"} 1").await;
}

#[tokio::test]
async fn readiness_waits_for_the_first_workers_once() {
    let yaml = |workers: &str| format!("router_min_initial_workers: 2\nworkers: [{workers}]");
    let one = "{id: 1, endpoint: '1.1.1.1:1'}";
    let scripted = Scripted::start(&yaml(one));
    let missing = scripted.readiness().await["missing"].to_string();
    assert!(missing.contains("1 of 2 workers are there"), "{missing}");
    let both = format!("{one}, {{id: 2, endpoint: '1.1.1.1:2'}}");
    scripted.configure(&yaml(&both)).await;
    let there = async || {
        let missing = scripted.readiness().await["missing"].to_string();
        (!missing.contains("workers are there")).then_some(())
    };
    eventually("both workers", &there).await;
    // Who leaves later does not count.
    scripted.configure(&yaml("")).await;
    assert_eq!(there().await, Some(()));
}
