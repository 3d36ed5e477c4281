//! Prompts that are text, through the real Envoy: routed as the same conversation's token ids,
//! whatever becomes of the one who reads them.

mod elsewhere;
mod model;

use std::path::{Path, PathBuf};
use std::process::Command;

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use kv_core::event::StorageTier;
use kv_core::hash::Seed;
use kv_core::rng::Rng;
use kv_core::surface::Surface;
use kv_router::text::{Model, Prompt};
use kv_tests::client::{json_request, uri};
use kv_tests::events::{Encoding, Publisher, stored};
use kv_tests::stack::{Setup, Stack};
use kv_tests::upstream::{self, Upstream};
use serde_json::{Value, json};
use tempfile::TempDir;

use model::WORDS;

const WORKERS: u64 = 3;
const BLOCK: usize = 16;
/// Workers, everything in front of them, and the same model as they have.
struct Texts {
    stack: Stack,
    model: Model,
    _upstreams: Vec<Upstream>,
    _dir: TempDir,
}

impl Texts {
    async fn start(threads: u32, tokenizer: Value) -> Self {
        Self::of(model::model, threads, tokenizer).await
    }

    /// The same with a model of other files.
    async fn of(model: fn(&Path) -> PathBuf, threads: u32, tokenizer: Value) -> Self {
        let upstreams = Upstream::start_all(WORKERS).await;
        let dir = TempDir::new().expect("a temporary directory");
        let folder = model(dir.path());
        let mut settings = json!({"path": folder});
        let (Value::Object(all), Value::Object(more)) = (&mut settings, tokenizer) else {
            panic!("settings must be a map");
        };
        all.extend(more);
        let workers = upstream::workers(&upstreams);
        let setup = Setup {
            threads,
            workers,
            more: json!({"tokenizer": settings}),
        };
        Self {
            stack: Stack::start(&setup).await,
            model: Model::load(&folder, 1 << 20, 1).expect("a model"),
            _upstreams: upstreams,
            _dir: dir,
        }
    }

    /// Sends a request; its status, its worker and its decision.
    async fn send(&self, path: &str, body: &Value) -> (Value, Value) {
        let request = json_request(self.stack.envoy.port, path, body).expect("a request");
        self.exchange(request).await
    }

    async fn exchange(&self, request: Request<Full<Bytes>>) -> (Value, Value) {
        let answer = self.stack.client.send(request).await.expect("an answer");
        let decision = answer.headers().get("x-kv-router-decision");
        let decision = decision.map(|d| serde_json::from_slice(d.as_bytes()).expect("json"));
        let body = serde_json::from_slice(answer.body()).expect("json");
        (body, decision.unwrap_or(Value::Null))
    }

    /// Lets a worker hold these ids, and waits until Envoy knows of it.
    async fn hold(&self, publisher: &mut Publisher, worker: u64, ids: &[u32]) {
        let held = stored(ids, BLOCK, Seed::default());
        publisher
            .publish(worker, StorageTier::Device, held, Encoding::Json)
            .await;
        self.stack.sidecar.settled(publisher.published).await;
    }

    /// Token ids that the worker makes of a body.
    fn ids(&self, surface: Surface, body: &Value) -> Vec<u32> {
        ids(&self.model, surface, body)
    }
}

/// Token ids that a worker makes of a body.
fn ids(model: &Model, surface: Surface, body: &Value) -> Vec<u32> {
    let body = body.to_string();
    let text = match Prompt::parse(surface, body.as_bytes()).expect("a prompt") {
        Prompt::Text { text, .. } => text,
        Prompt::Chat(chat) => {
            let template = model.template.as_ref().expect("a template");
            template.render(&chat.into_chat(false)).expect("a text")
        }
    };
    model.tokens.encoder().whole(&text).expect("ids")
}

fn said(rng: &mut Rng, words: usize) -> String {
    let words = (0..words).map(|_| WORDS[rng.below(WORDS.len())]);
    words.collect::<Vec<_>>().join(" ")
}

/// Overlaps by worker.
fn overlaps(decision: &Value) -> Vec<(u64, Value)> {
    let candidates = decision["candidates"].as_array().expect("candidates");
    let mut overlaps: Vec<(u64, Value)> = candidates
        .iter()
        .map(|c| {
            (
                c["worker"].as_u64().expect("a worker"),
                c["overlap"].clone(),
            )
        })
        .collect();
    overlaps.sort_by_key(|(worker, _)| *worker);
    overlaps
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_is_routed_as_its_token_ids() {
    // Time enough for a build without optimisation.
    let texts = Texts::start(2, json!({"budget_ms": 5_000})).await;
    let mut publisher = Publisher::connect(&texts.stack.nats.url()).await;
    let mut rng = Rng::new(7);
    let system = said(&mut rng, 150);
    for conversation in 0..4 {
        let mut messages = vec![json!({"role": "system", "content": system})];
        for turn in 0..5 {
            messages.push(json!({"role": "user", "content": said(&mut rng, 60)}));
            let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {}}}]);
            let mut body = json!({"model": "m", "messages": messages, "max_tokens": 1});
            if conversation == 3 {
                body["tools"] = tools;
            }
            let ids = texts.ids(Surface::Chat, &body);
            let (_, by_text) = texts.send("/v1/chat/completions", &body).await;
            let by_ids = json!({"model": "m", "prompt": ids, "max_tokens": 1});
            let (_, by_ids) = texts.send("/v1/completions", &by_ids).await;
            assert_eq!(by_text["reason"], "kv", "{by_text}");
            assert_eq!(by_text["tokens"], by_ids["tokens"]);
            assert_eq!(overlaps(&by_text), overlaps(&by_ids), "turn {turn}");
            if turn > 0 {
                assert_eq!(by_text["worker"], by_ids["worker"], "{by_text} {by_ids}");
            }
            // The worker that is to serve the conversation has this turn, and the answer.
            messages.push(json!({"role": "assistant", "content": said(&mut rng, 20)}));
            let worker = 1 + conversation % WORKERS;
            texts.hold(&mut publisher, worker, &ids).await;
        }
    }
    // Once its VM has a stream a question goes there.
    let streamed = async || {
        let calls = async || texts.stack.envoy.total("kv_router_text_calls_total").await;
        let before = calls().await;
        let body = json!({"messages": [{"role": "user", "content": system}]});
        let (_, decision) = texts.send("/v1/chat/completions", &body).await;
        let by_call = calls().await - before;
        if decision["reason"] == "kv" && by_call == 0 {
            Ok(())
        } else {
            Err(format!("{decision}, {by_call} calls"))
        }
    };
    kv_tests::wait::until("a question on the stream", streamed).await;
    texts.stack.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn other_apis_are_routed_as_their_token_ids() {
    let texts = Texts::of(model::tiktoken, 1, json!({"budget_ms": 5_000})).await;
    let mut publisher = Publisher::connect(&texts.stack.nats.url()).await;
    let mut rng = Rng::new(8);
    let text = said(&mut rng, 100);
    let cases = [
        (Surface::Completions, json!({"prompt": text})),
        (Surface::Completions, json!({"prompt": [text]})),
        (Surface::Generate, json!({"text": text})),
        (Surface::Responses, json!({"input": text})),
        (
            Surface::Messages,
            json!({"max_tokens": 1, "system": "s", "messages": [{"role": "user", "content": text}]}),
        ),
    ];
    for (surface, body) in cases {
        let ids = texts.ids(surface, &body);
        texts.hold(&mut publisher, 2, &ids).await;
        let (answer, decision) = texts.send(surface.path(), &body).await;
        assert_eq!(decision["reason"], "kv", "{decision}");
        assert_eq!(answer["worker"], 2, "{decision}");
        let blocks = ids.len() / BLOCK;
        assert_eq!(overlaps(&decision)[1].1[0], blocks, "{decision}");
    }
    texts.stack.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_text_before_an_image_counts() {
    let texts = Texts::start(1, json!({"budget_ms": 5_000})).await;
    let mut publisher = Publisher::connect(&texts.stack.nats.url()).await;
    let mut rng = Rng::new(9);
    let before = json!({"role": "system", "content": said(&mut rng, 200)});
    let image = json!({"role": "user", "content": [
        {"type": "text", "text": "what is this"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    ]});
    let ids = texts.ids(Surface::Chat, &json!({"messages": [before]}));
    texts.hold(&mut publisher, 3, &ids).await;
    let body = json!({"messages": [before, image]});
    let (answer, decision) = texts.send("/v1/chat/completions", &body).await;
    assert_eq!(decision["reason"], "kv_before_media", "{decision}");
    assert_eq!(answer["worker"], 3, "{decision}");
}

/// Sends a signal to the sidecar.
fn signal(stack: &Stack, name: &str) {
    let id = stack.sidecar.process.id().to_string();
    let sent = Command::new("kill").args([name, &id]).status();
    assert!(sent.expect("kill").success());
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_go_on_when_nobody_reads() {
    let mut texts = Texts::start(2, json!({"budget_ms": 300})).await;
    let body = json!({"messages": [{"role": "user", "content": "the worker"}]});
    let reason = async |texts: &Texts| {
        let (answer, decision) = texts.send("/v1/chat/completions", &body).await;
        assert!(answer["worker"].is_u64(), "{answer}");
        decision["reason"].as_str().expect("a reason").to_owned()
    };
    signal(&texts.stack, "-STOP");
    let many = (0..20).map(|_| reason(&texts));
    for reason in futures::future::join_all(many).await {
        assert_eq!(reason, "text_late");
    }
    signal(&texts.stack, "-CONT");
    texts.stack.sidecar.process.kill();
    assert_eq!(reason(&texts).await, "text_failed");
    texts.stack.sidecar.restart();
    texts.stack.sidecar.ready().await;
    let read = async || match reason(&texts).await.as_str() {
        "kv" => Ok(()),
        other => Err(other.to_owned()),
    };
    kv_tests::wait::until("a text that is read", read).await;
    texts.stack.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_others_keep_all_threads_busy_a_conversation_is_found_by_its_beginning() {
    let settings = json!({"budget_ms": 300, "budget_ms_per_1000_words": 0});
    let texts = &Texts::start(2, settings).await;
    let mut publisher = Publisher::connect(&texts.stack.nats.url()).await;
    let mut rng = Rng::new(11);
    let first = said(&mut rng, 300);
    let body = |last: &str| {
        let turns = [("user", first.as_str()), ("user", last)];
        let turns = turns.map(|(role, said)| json!({"role": role, "content": said}));
        json!({"messages": turns, "max_tokens": 1})
    };
    let ids = texts.ids(Surface::Chat, &body("so?"));
    texts.hold(&mut publisher, 2, &ids).await;
    // Its text can't be cut: a thread has it until it is done.
    let endless = json!({"messages": [{"role": "user", "content": "a".repeat(2 << 20)}]});
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let beginning = async || {
        // Remembered, whatever has become of it meanwhile.
        let (_, whole) = texts.send("/v1/chat/completions", &body("so?")).await;
        let blockers = (0..2 * threads).map(|_| texts.send("/v1/chat/completions", &endless));
        let long = body(&said(&mut rng, 2_000));
        let next = texts.send("/v1/chat/completions", &long);
        let (_, (_, decision)) = futures::join!(futures::future::join_all(blockers), next);
        if whole["reason"] == "kv" && decision["reason"] == "kv_beginning" {
            Ok(decision)
        } else {
            Err(format!("{whole}, {decision}"))
        }
    };
    let beginning = kv_tests::wait::until("a prompt that no thread reads", beginning).await;
    // Who gets it depends on what the others have booked.
    let held = overlaps(&beginning);
    let held = held.iter().map(|(_, held)| held[0].as_u64());
    let held: Vec<u64> = held.map(Option::unwrap_or_default).collect();
    assert!(held[1] > 10 && held[0] + held[2] == 0, "{beginning}");
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_texts_pass_by_load() {
    let texts = Texts::start(2, json!({"budget_ms": 2_000})).await;
    let user = |content: &str| format!(r#"{{"messages":[{{"role":"user","content":{content}}}]}}"#);
    let deep = format!("{}{}", "[".repeat(400), "]".repeat(400));
    let nested = format!(
        "{}{}",
        "{\"a\":".repeat(300),
        "1}".to_owned() + &"}".repeat(299)
    );
    let many = r#"{"role":"user","content":"x"},"#.repeat(100_000);
    let cases: Vec<(Vec<u8>, &[&str])> = vec![
        (user(&deep).into_bytes(), &["text_refused"]),
        (
            format!(r#"{{"messages":[{{"role":"user","content":"x"}}],"tools":[{nested}]}}"#)
                .into_bytes(),
            &["text_refused"],
        ),
        (
            user(&format!("\"{}\"", "a".repeat(3 << 20))).into_bytes(),
            &["kv", "kv_beginning", "text_late"],
        ),
        (
            user(&format!("\"{}\"", " ".repeat(5 << 20))).into_bytes(),
            &["too_long"],
        ),
        (
            format!(r#"{{"messages":[{many}{{"role":"user","content":"x"}}]}}"#).into_bytes(),
            &["text_refused"],
        ),
        (
            b"{\"messages\":[{\"role\":\"user\",\"content\":\"\xff\xfe\"}]}".to_vec(),
            &["text_refused"],
        ),
        (
            br#"{"messages":[{"role":"forbidden","content":"x"}]}"#.to_vec(),
            &["text_refused"],
        ),
        (
            br#"{"messages":"x","messages":[{"role":"user","content":"x"}]}"#.to_vec(),
            &["kv"],
        ),
        (
            br#"{"messages":[{"role":"user","content":{}}]}"#.to_vec(),
            &["text_refused"],
        ),
        (
            user(r#""{{ 7 * 7 }}{% for i in range(99999999) %}""#).into_bytes(),
            &["kv"],
        ),
    ];
    for (body, reasons) in cases {
        let shown = String::from_utf8_lossy(&body[..body.len().min(80)]).into_owned();
        let length = body.len();
        let request = Request::post(uri(texts.stack.envoy.port, "/v1/chat/completions"))
            .header("content-type", "application/json")
            .body(Full::from(body))
            .expect("a request");
        let (answer, decision) = texts.exchange(request).await;
        assert_eq!(answer["bytes"], length, "{shown}");
        let reason = decision["reason"].as_str().expect("a reason");
        assert!(reasons.contains(&reason), "{reason}: {shown}");
    }
    texts.stack.idle().await;
}
