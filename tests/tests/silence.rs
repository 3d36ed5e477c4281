//! An engine that serves and publishes nothing, among others that do: it is noticed, its cache is
//! predicted, and what engines say of their caches is held against what was predicted.

use kv_core::event::{EventData, StorageTier, Stored, StoredBlock};
use kv_sim::engine::{Config, Engine};
use kv_sim::publish::{Encoding as SimEncoding, EventPlane};
use kv_tests::events::{Encoding, Publisher};
use kv_tests::nats::Nats;
use kv_tests::stack::{Setup, Stack};
use kv_tests::wait;
use serde_json::{Value, json};

const SILENT: u64 = 3;

fn prompt(conversation: u32) -> Vec<u32> {
    (0..160).map(|i| conversation * 1_000 + i).collect()
}

async fn engine(nats: &Nats, worker_id: u64) -> Engine {
    let subject = "kv-events.{worker_id}".to_owned();
    let events = (worker_id != SILENT).then(|| EventPlane {
        url: nats.url(),
        encoding: SimEncoding::Json { subject },
    });
    let config = Config {
        worker_id,
        instant: true,
        events,
        ..Config::default()
    };
    Engine::start(config).await.expect("an engine starts")
}

/// A worker as `/v1/workers` shows it.
async fn worker(stack: &Stack, id: u64) -> Result<Value, String> {
    let workers = stack.sidecar.workers().await?;
    let owners = workers["pools"][0]["owners"].as_array().cloned();
    let owner = owners.into_iter().flatten().find(|o| o["worker"] == id);
    owner.ok_or_else(|| workers.to_string())
}

/// Blocks of a prompt that a worker is taken to hold, once Envoy has everything.
async fn overlap(stack: &Stack, id: u64, tokens: &[u32]) -> Result<u64, String> {
    let (client, admin) = (&stack.client, stack.sidecar.admin);
    let explained = client
        .post(admin, "/v1/explain", &json!({"tokens": tokens}))
        .await?;
    // Asked after it, so that what was explained is what Envoy holds.
    let index = stack.sidecar.index().await?;
    let owners = explained["owners"].as_array().cloned().unwrap_or_default();
    let owner = owners.iter().find(|o| o["worker"] == id);
    let overlap = owner.and_then(|o| o["overlap"][0].as_u64());
    let settled = index["settled"] == true;
    overlap
        .filter(|_| settled)
        .ok_or_else(|| explained.to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_without_events_is_noticed_and_predicted_until_it_publishes() {
    let setup = Setup {
        threads: 2,
        workers: vec![],
        more: json!({}),
    };
    let mut stack = Stack::start(&setup).await;
    let mut engines = Vec::new();
    for id in 1..=3 {
        engines.push(engine(&stack.nats, id).await);
    }
    stack.serve(&engines).await;

    let mut conversation = 0;
    let noticed = wait::until("the silence", async || {
        conversation += 1;
        stack.complete(&prompt(conversation)).await?;
        let silent = worker(&stack, SILENT).await?;
        if silent["events"]["ailment"] == "silent" {
            Ok(silent)
        } else {
            Err(silent.to_string())
        }
    })
    .await;
    assert_eq!(noticed["knowledge"], "unknown");
    for id in [1, 2] {
        let well = worker(&stack, id).await.expect("an answer");
        assert_eq!(well["events"]["ailment"], json!(null), "{well}");
        assert_eq!(well["events"]["source"], "json");
    }

    // Each worker gets a prompt, and then the same one again and again.
    let mut homes = [None; 4];
    let mut next = 500_000;
    while homes[1..].iter().any(Option::is_none) {
        next += 1;
        let (_, decision) = stack.complete(&prompt(next)).await.expect("an answer");
        let id = decision["worker"].as_u64().expect("a worker");
        homes[usize::try_from(id).expect("a small id")].get_or_insert(next);
    }
    for id in 1..=3 {
        let tokens = prompt(homes[id as usize].expect("a prompt"));
        wait::until("the prompt's blocks", async || {
            let blocks = overlap(&stack, id, &tokens).await?;
            if blocks == 10 {
                Ok(())
            } else {
                Err(blocks.to_string())
            }
        })
        .await;
        for _ in 0..20 {
            let (answer, decision) = stack.complete(&tokens).await.expect("an answer");
            assert_eq!(decision["worker"], id, "{decision}");
            let cached = &answer["usage"]["prompt_tokens_details"]["cached_tokens"];
            assert_eq!(*cached, 144, "{answer}");
        }
        let accurate = async || {
            let worker = worker(&stack, id).await?;
            let accuracy = worker["events"]["accuracy"].as_f64();
            if accuracy > Some(0.9) {
                Ok(())
            } else {
                Err(worker.to_string())
            }
        };
        wait::until("accurate predictions", accurate).await;
    }

    // It publishes after all: what was predicted gives way to what it says.
    let tokens = prompt(homes[SILENT as usize].expect("a prompt"));
    let mut publisher = Publisher::connect(&stack.nats.url()).await;
    let stored = EventData::Stored(Stored {
        blocks: vec![StoredBlock {
            block_hash: 1,
            tokens_hash: kv_core::hash::Seed::default().block(&tokens[..16]),
            mm_extra_info: None,
        }],
        ..Stored::default()
    });
    publisher
        .publish(SILENT, StorageTier::Device, stored, Encoding::Json)
        .await;
    wait::until("its own word", async || {
        let blocks = overlap(&stack, SILENT, &tokens).await?;
        let well = worker(&stack, SILENT).await?;
        if blocks == 1 && well["events"]["ailment"] == json!(null) {
            Ok(())
        } else {
            Err(format!("{blocks}: {well}"))
        }
    })
    .await;
    stack.envoy.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_has_lost_its_cache_is_found_out_by_its_answers() {
    let setup = Setup {
        threads: 2,
        workers: vec![],
        more: json!({}),
    };
    let mut stack = Stack::start(&setup).await;
    let engines = vec![engine(&stack.nats, SILENT).await];
    stack.serve(&engines).await;
    // It holds nothing of what is said in its name.
    let mut publisher = Publisher::connect(&stack.nats.url()).await;
    let claimed: Vec<Vec<u32>> = (1..=40).map(prompt).collect();
    for (name, tokens) in (1..).zip(&claimed) {
        let blocks = tokens.chunks_exact(16).zip(0..);
        let block = |(tokens, i): (&[u32], u64)| StoredBlock {
            block_hash: 1000 * name + i,
            tokens_hash: kv_core::hash::Seed::default().block(tokens),
            mm_extra_info: None,
        };
        let stored = EventData::Stored(Stored {
            blocks: blocks.map(block).collect(),
            ..Stored::default()
        });
        publisher
            .publish(SILENT, StorageTier::Device, stored, Encoding::Dynamo)
            .await;
    }
    stack.sidecar.settled(40).await;
    for tokens in &claimed[..20] {
        stack.complete(tokens).await.expect("an answer");
    }
    wait::until("the contradiction", async || {
        let found_out = worker(&stack, SILENT).await?;
        let blocks = overlap(&stack, SILENT, &claimed[39]).await?;
        if found_out["events"]["ailment"] == "inaccurate" && blocks == 0 {
            Ok(())
        } else {
            Err(format!("{blocks}: {found_out}"))
        }
    })
    .await;
    let doubtful = worker(&stack, SILENT).await.expect("an answer");
    assert_eq!(doubtful["knowledge"], "partial", "{doubtful}");
    assert_eq!(doubtful["events"]["accuracy"], 0.0);
}
