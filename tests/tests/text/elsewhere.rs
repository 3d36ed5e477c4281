//! Texts in pools without the model's files, in the hashes of other caches, and as token ids that are
//! handed over.

use std::sync::atomic::Ordering;

use bytes::Bytes;
use kv_core::family::{FamilyHasher, Namespace, Scheme};
use kv_core::hash::Seed;
use kv_core::id::Family;
use kv_core::rng::Rng;
use kv_core::surface::Surface;
use kv_router::text::Model;
use kv_sim::engine::{Config, Engine};
use kv_sim::publish::{Encoding, EventPlane};
use kv_tests::client::json_request;
use kv_tests::stack::{Setup, Stack};
use kv_tests::upstream::{self, Upstream, checksum};
use kv_tests::wait;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{BLOCK, ids, model, overlaps, said};

/// Sends a request; the answer's body and the decision.
async fn send(stack: &Stack, path: &str, body: &Value) -> (Value, Value) {
    let request = json_request(stack.envoy.port, path, body).expect("a request");
    let answer = stack.client.send(request).await.expect("an answer");
    let decision = answer.headers().get("x-kv-router-decision");
    let decision = decision.map(|d| serde_json::from_slice(d.as_bytes()).expect("json"));
    let body = serde_json::from_slice(answer.body()).expect("json");
    (body, decision.unwrap_or(Value::Null))
}

/// Engines that tell their KV events.
async fn engines(stack: &mut Stack) -> Vec<Engine> {
    let mut engines = Vec::new();
    for worker_id in 1..=3 {
        let events = EventPlane {
            url: stack.nats.url(),
            encoding: Encoding::Json {
                subject: "kv-events.{worker_id}".to_owned(),
            },
        };
        let config = Config {
            worker_id,
            instant: true,
            events: Some(events),
            ..Config::default()
        };
        engines.push(Engine::start(config).await.expect("an engine"));
    }
    stack.serve(&engines).await;
    engines
}

/// Asks again until the answering worker is said to hold this many blocks of the prompt.
async fn held(stack: &Stack, path: &str, body: &Value, blocks: u64) -> (Value, Value) {
    let holds = async || {
        let (answer, decision) = send(stack, path, body).await;
        let all = overlaps(&decision);
        let worker = &decision["worker"];
        let here = all.iter().find(|(id, _)| json!(id) == *worker);
        let is_held = here.is_some_and(|(_, by_tier)| by_tier[0] == blocks);
        if is_held {
            Ok((answer, decision))
        } else {
            Err(decision.to_string())
        }
    };
    wait::until("blocks at a worker", holds).await
}

#[tokio::test(flavor = "multi_thread")]
async fn without_tokenizer_and_events_a_conversation_stays_where_it_was() {
    let upstreams = Upstream::start_all(3).await;
    let stack = Stack::start(&Setup {
        threads: 2,
        workers: upstream::workers(&upstreams),
        more: json!({"kv_events": false}),
    })
    .await;
    let mut rng = Rng::new(21);
    let path = "/v1/chat/completions";
    let mut messages = vec![json!({"role": "system", "content": said(&mut rng, 200)})];
    let mut home = Value::Null;
    for turn in 0..4 {
        messages.push(json!({"role": "user", "content": said(&mut rng, 100)}));
        let body = json!({"model": "m", "messages": messages});
        let (answer, decision) = send(&stack, path, &body).await;
        assert_eq!(decision["reason"], "kv_text", "{decision}");
        let text = json!(messages).to_string().len();
        assert_eq!(decision["tokens"], text / 4, "{decision}");
        if turn > 0 {
            assert_eq!(answer["worker"], home, "{decision}");
        }
        home = answer["worker"].clone();
        let predicted = async || {
            let workers = stack.sidecar.workers().await?;
            let settled = stack.sidecar.index().await?["settled"] == true;
            let owners = workers["pools"][0]["owners"].as_array();
            let mut owners = owners.into_iter().flatten();
            let owner = owners.find(|o| o["worker"] == home);
            if settled && owner.is_some_and(|o| o["blocks"] == text / 4 / BLOCK) {
                Ok(())
            } else {
                Err(workers.to_string())
            }
        };
        wait::until("the prediction", predicted).await;
        // What was sent is looked up by the same chunks.
        let (again, _) = held(&stack, path, &body, (text / 4 / BLOCK) as u64).await;
        assert_eq!(again["worker"], home);
    }
    // Other tools stand before the same messages: nothing is shared.
    let other = json!({"model": "m", "messages": messages, "tools": [{"type": "function"}]});
    let (_, decision) = send(&stack, path, &other).await;
    let all = overlaps(&decision);
    assert!(all.iter().all(|(_, by_tier)| by_tier[0] == 0), "{decision}");
    stack.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn engines_tell_the_ids_of_models_whose_files_are_not_here() {
    for face in ["tokenize", "render"] {
        let mut stack = Stack::start(&Setup {
            threads: 1,
            workers: vec![],
            more: json!({"tokenizer": {"engine": face, "budget_ms": 5_000}}),
        })
        .await;
        let engines = engines(&mut stack).await;
        let mut rng = Rng::new(22);
        let text = said(&mut rng, 300);
        let chat = json!({"model": "sim", "max_tokens": 1, "messages": [
            {"role": "system", "content": text},
            {"role": "user", "content": "and then?"},
        ]});
        let completion = json!({"model": "sim", "max_tokens": 1, "prompt": text});
        let cases = [
            ("/v1/chat/completions", chat),
            ("/v1/completions", completion),
        ];
        for (path, body) in cases {
            let (answer, decision) = send(&stack, path, &body).await;
            assert_eq!(decision["reason"], "kv", "{face}: {decision}");
            // The engine that answers counts the same tokens, and tells of their blocks.
            let tokens = answer["usage"]["prompt_tokens"].as_u64().expect("tokens");
            assert_eq!(decision["tokens"], tokens, "{face}");
            held(&stack, path, &body, tokens / BLOCK as u64).await;
        }
        drop(engines);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn engines_that_tell_no_ids_hold_nothing_up() {
    let upstream = Upstream::start(1).await;
    let stack = Stack::start(&Setup {
        threads: 1,
        workers: vec![(1, upstream.address)],
        more: json!({"tokenizer": {"engine": "tokenize", "budget_ms": 5_000}}),
    })
    .await;
    let body = json!({"model": "m", "prompt": "the worker"});
    let (answer, decision) = send(&stack, "/v1/completions", &body).await;
    assert_eq!(decision["reason"], "text_failed", "{decision}");
    assert_eq!(answer["worker"], 1);
    // What engines can't be asked about they are not.
    let (asked, body) = (upstream.requests.load(Ordering::Relaxed), image());
    let (_, decision) = send(&stack, "/v1/chat/completions", &body).await;
    assert_eq!(decision["reason"], "text", "{decision}");
    assert_eq!(upstream.requests.load(Ordering::Relaxed), asked + 1);
    stack.idle().await;
}

fn image() -> Value {
    let part = json!({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}});
    json!({"model": "m", "messages": [{"role": "user", "content": [part]}]})
}

#[tokio::test(flavor = "multi_thread")]
async fn a_text_is_found_by_the_hashes_of_other_caches() {
    let dir = TempDir::new().expect("a temporary directory");
    let folder = model::model(dir.path());
    let mut upstreams = Vec::new();
    let mut workers = Vec::new();
    for id in 1..=3 {
        let upstream = Upstream::start(id).await;
        let events = json!({"http": {"trust_loopback": true}});
        workers.push(json!({"id": id, "endpoint": upstream.address, "events": events}));
        upstreams.push(upstream);
    }
    let family = json!({"family": "hi-cache", "block_size": 32, "media": ["EXTERNAL"]});
    let stack = Stack::start(&Setup {
        threads: 1,
        workers: Vec::new(),
        more: json!({
            "workers": workers,
            "families": [family],
            "tokenizer": {"path": folder, "budget_ms": 5_000},
        }),
    })
    .await;
    let body = json!({"model": "m", "prompt": said(&mut Rng::new(23), 200)});
    let files = Model::load(&folder, 1 << 20, 1).expect("a model");
    let prompt = ids(&files, Surface::Completions, &body);
    let scheme = Scheme {
        family: Family::HiCache,
        block_size: 32,
        hash_seed: String::new(),
    };
    let mut hasher = FamilyHasher::new(&scheme, Namespace::default()).expect("a hasher");
    hasher.push(&prompt);
    let names = hasher.into_hashes();
    let event = json!({
        "type": "BlockStored", "block_hashes": names, "parent_block_hash": null,
        "token_ids": [], "block_size": 32, "medium": "EXTERNAL",
    });
    let post = json!({"worker_id": 2, "incarnation": "first", "sequence": 0, "events": [event]});
    let request = json_request(stack.sidecar.admin, "/v1/events", &post).expect("a request");
    let answer = stack.client.send(request).await.expect("an answer");
    assert!(answer.status().is_success(), "{answer:?}");
    stack.sidecar.settled(1).await;
    let (_, decision) = send(&stack, "/v1/completions", &body).await;
    assert_eq!(decision["reason"], "kv", "{decision}");
    let held = overlaps(&decision)[1].1.clone();
    assert_eq!(held[3], 2 * names.len(), "{decision}");
}

/// The head of a PNG of 640 by 480 pixels, which Qwen2-VL sees as 391 tokens.
const PNG: &str = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAoAAAAHgCAYAAAAAAAAA";
const SEEN_AS: usize = 391;

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_known_counts_as_the_engine_sees_it() {
    let dir = TempDir::new().expect("a temporary directory");
    let (folder, placeholder) = model::seeing(dir.path());
    let upstreams = [Upstream::start(1).await, Upstream::start(2).await];
    let worker = |(id, upstream): (u64, &Upstream)| {
        let events = json!({"http": {"trust_loopback": true}});
        json!({"id": id, "endpoint": upstream.address, "events": events})
    };
    let stack = Stack::start(&Setup {
        threads: 1,
        workers: Vec::new(),
        more: json!({
            "workers": (1..).zip(&upstreams).map(worker).collect::<Vec<_>>(),
            "image_token_id": placeholder,
            "tokenizer": {"path": folder, "budget_ms": 5_000},
        }),
    })
    .await;
    let mut rng = Rng::new(25);
    let (before, after) = (said(&mut rng, 40), said(&mut rng, 60));
    let body = |url: &str, name: &str| {
        let image = json!({"type": "image_url", "image_url": {"url": url}, "uuid": name});
        json!({"model": "m", "messages": [
            {"role": "system", "content": before},
            {"role": "user", "content": [image, {"type": "text", "text": after}]},
        ]})
    };
    // What an engine makes of it, as its events tell.
    let text = format!(
        "<|im_start|>system\n{before}<|im_end|>\n<|im_start|>user\n{}{after}<|im_end|>\n",
        model::PLACEHOLDER.repeat(SEEN_AS)
    );
    let files = Model::load(&folder, 1 << 20, 1).expect("a model");
    let prompt = files.tokens.encoder().whole(&text).expect("ids");
    let blocks = prompt.chunks_exact(BLOCK);
    let (names, keys): (Vec<usize>, Vec<Value>) = blocks
        .enumerate()
        .map(|(name, block)| match block.contains(&placeholder) {
            true => (name, json!([["img-1", 0]])),
            false => (name, Value::Null),
        })
        .unzip();
    let event = json!({
        "type": "BlockStored", "block_hashes": names, "parent_block_hash": null,
        "token_ids": prompt[..names.len() * BLOCK], "block_size": BLOCK, "extra_keys": keys,
    });
    let post = json!({"worker_id": 2, "incarnation": "first", "sequence": 0, "events": [event]});
    let request = json_request(stack.sidecar.admin, "/v1/events", &post).expect("a request");
    let answer = stack.client.send(request).await.expect("an answer");
    assert!(answer.status().is_success(), "{answer:?}");
    stack.sidecar.settled(1).await;
    let path = "/v1/chat/completions";
    let (answer, decision) = send(&stack, path, &body(PNG, "img-1")).await;
    assert_eq!(decision["reason"], "kv", "{decision}");
    assert_eq!(decision["tokens"], prompt.len(), "{decision}");
    assert_eq!(overlaps(&decision)[1].1[0], names.len(), "{decision}");
    assert_eq!(answer["worker"], 2);
    // Another image shares what comes before it.
    let (_, decision) = send(&stack, path, &body(PNG, "img-2")).await;
    let first = prompt.iter().position(|id| *id == placeholder);
    let shared = first.expect("an image") / BLOCK;
    assert_eq!(decision["reason"], "kv", "{decision}");
    assert_eq!(overlaps(&decision)[1].1[0], shared, "{decision}");
    // Of one that is fetched by the engine the size is not known.
    let (_, decision) = send(&stack, path, &body("https://example.org/a.png", "img-1")).await;
    assert_eq!(decision["reason"], "kv_before_media", "{decision}");
    stack.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn token_ids_are_handed_over_to_engines_that_take_them() {
    let dir = TempDir::new().expect("a temporary directory");
    let folder = model::model(dir.path());
    let tokenizer = json!({"path": folder, "budget_ms": 5_000, "hand_over": "field"});
    let mut stack = Stack::start(&Setup {
        threads: 2,
        workers: vec![],
        more: json!({"tokenizer": tokenizer}),
    })
    .await;
    let _engines = engines(&mut stack).await;
    let files = Model::load(&folder, 1 << 20, 1).expect("a model");
    let mut rng = Rng::new(24);
    for words in [3, 200, 20_000] {
        let prompt = said(&mut rng, words);
        let body = json!({"model": "sim", "prompt": prompt, "max_tokens": 1});
        let tokens = ids(&files, Surface::Completions, &body).len();
        let (answer, decision) = send(&stack, "/v1/completions", &body).await;
        assert_eq!(decision["reason"], "kv", "{decision}");
        // The engine's own tokenizer makes one token of a word.
        assert_eq!(answer["usage"]["prompt_tokens"], tokens);
        // What it tells of is found by the text.
        held(&stack, "/v1/completions", &body, (tokens / BLOCK) as u64).await;
    }
    // A chat has no place for ids, and is passed on as it came.
    let chat = json!({"model": "sim", "max_tokens": 1,
        "messages": [{"role": "user", "content": "the worker"}]});
    let (answer, _) = send(&stack, "/v1/chat/completions", &chat).await;
    assert_eq!(answer["usage"]["prompt_tokens"], 4);
    stack.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn token_ids_are_handed_over_after_a_wait_in_the_queue_too() {
    let dir = TempDir::new().expect("a temporary directory");
    let folder = model::model(dir.path());
    let upstream = Upstream::start(1).await;
    upstream.gate.send_replace(false);
    let endpoint = upstream.address;
    let stack = Stack::start(&Setup {
        threads: 1,
        workers: vec![],
        more: json!({
            "workers": [{"id": 1, "endpoint": endpoint, "max_num_batched_tokens": 1000}],
            "queue": {"threshold": 0.1, "max_wait_secs": 60},
            "tokenizer": {"path": folder, "budget_ms": 5_000, "hand_over": "field"},
        }),
    })
    .await;
    let files = Model::load(&folder, 1 << 20, 1).expect("a model");
    let mut rng = Rng::new(25);
    let mut answers = Vec::new();
    for wanted in [(1, 0), (1, 1)] {
        let body = json!({"model": "sim", "prompt": said(&mut rng, 300), "max_tokens": 1});
        let given = ids(&files, Surface::Completions, &body);
        let text = body["prompt"].to_string();
        let expected = body.to_string().replace(&text, &json!(given).to_string());
        let request = json_request(stack.envoy.port, "/v1/completions", &body).expect("a request");
        let client = stack.client.clone();
        let answer = tokio::spawn(async move { client.send(request).await.expect("an answer") });
        answers.push((expected, answer));
        // The first makes the worker busy, so that the second waits.
        let there = async || {
            let queues = stack.client.get(stack.sidecar.admin, "/v1/queue").await?;
            let classes = queues[0]["classes"].as_array().into_iter().flatten();
            let depth: u64 = classes.filter_map(|c| c["requests"].as_u64()).sum();
            let state = (upstream.requests.load(Ordering::Relaxed), depth);
            if state == wanted {
                Ok(())
            } else {
                Err(format!("{state:?}"))
            }
        };
        wait::until("one at the worker, the other in the queue", there).await;
    }
    upstream.gate.send_replace(true);
    for (expected, answer) in answers {
        let answer = answer.await.expect("an exchange");
        let seen: Value = serde_json::from_slice(answer.body()).expect("json");
        let expected = Bytes::from(expected);
        let hash = Seed::default().block(&checksum(&expected));
        assert_eq!(
            (&seen["bytes"], &seen["hash"]),
            (&json!(expected.len()), &json!(hash))
        );
    }
    stack.idle().await;
}
