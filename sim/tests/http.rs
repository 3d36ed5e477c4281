//! Engines and load over real sockets.

mod support;

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use kv_sim::WORKER_ID_HEADER;
use kv_sim::engine::{Config, Engine};
use kv_sim::load::{self, Format, LoadError, Options, Pace, Report, Workload};
use serde_json::{Value, json};
use support::eventually;

async fn engine(config: Config) -> Engine {
    Engine::start(config).await.expect("engine starts")
}

fn instant() -> Config {
    Config {
        instant: true,
        ..Config::default()
    }
}

async fn request(
    address: SocketAddr,
    method: Method,
    path: &str,
    body: impl Into<Bytes>,
) -> Response<Incoming> {
    let request = Request::builder()
        .method(method)
        .uri(format!("http://{address}{path}"))
        .body(Full::new(body.into()))
        .expect("a request");
    let client = Client::builder(TokioExecutor::new()).build_http();
    client.request(request).await.expect("an answer")
}

async fn post(engine: &Engine, path: &str, body: &Value) -> Response<Incoming> {
    request(engine.address(), Method::POST, path, body.to_string()).await
}

async fn text(response: Response<Incoming>) -> String {
    let body = response.into_body().collect().await.expect("a body");
    String::from_utf8(body.to_bytes().to_vec()).expect("text")
}

async fn document(response: Response<Incoming>) -> Value {
    serde_json::from_str(&text(response).await).expect("json")
}

/// The `data:` lines of a stream.
fn events(stream: &str) -> Vec<&str> {
    stream
        .split("\n\n")
        .filter(|event| !event.is_empty())
        .map(|event| event.strip_prefix("data: ").expect("a data line"))
        .collect()
}

#[tokio::test]
async fn completions_stream_one_token_a_chunk_then_usage_then_done() {
    let engine = engine(Config {
        worker_id: 42,
        ..instant()
    })
    .await;
    let prompt: Vec<u32> = (0..40).collect();
    let body = json!({
        "model": "sim", "prompt": prompt, "max_tokens": 3, "stream": true,
        "stream_options": {"include_usage": true}, "temperature": 0.5,
    });
    for cached in [0, 32] {
        let response = post(&engine, "/v1/completions", &body).await;
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()[WORKER_ID_HEADER], "42");
        let kind = response.headers()["content-type"].to_str().unwrap();
        assert!(kind.starts_with("text/event-stream"), "{kind}");
        let stream = text(response).await;
        let events = events(&stream);
        let (done, chunks) = events.split_last().expect("events");
        assert_eq!(*done, "[DONE]");
        let chunks: Vec<Value> = chunks
            .iter()
            .map(|chunk| serde_json::from_str(chunk).expect("json"))
            .collect();
        assert_eq!(chunks.len(), 4);
        for (at, chunk) in chunks[..3].iter().enumerate() {
            assert_eq!(chunk["object"], "text_completion");
            let text = chunk["choices"][0]["text"].as_str().unwrap();
            assert_eq!(text.split_whitespace().count(), 1);
            let finish = &chunk["choices"][0]["finish_reason"];
            assert_eq!(
                *finish,
                if at == 2 {
                    json!("length")
                } else {
                    Value::Null
                }
            );
        }
        assert_eq!(chunks[3]["choices"], json!([]));
        let usage = json!({
            "prompt_tokens": 40, "completion_tokens": 3, "total_tokens": 43,
            "prompt_tokens_details": {"cached_tokens": cached},
        });
        assert_eq!(chunks[3]["usage"], usage);
    }
    engine.shutdown().await;
}

#[tokio::test]
async fn usage_is_sent_in_streams_only_where_asked_for() {
    let engine = engine(instant()).await;
    let body = json!({"prompt": "a b c", "max_tokens": 1, "stream": true});
    let stream = text(post(&engine, "/v1/completions", &body).await).await;
    assert_eq!(events(&stream).len(), 2);
    assert!(!stream.contains("usage"));
}

#[tokio::test]
async fn chat_streams_deltas_and_answers_whole_alike() {
    let engine = engine(instant()).await;
    let ask = |stream: bool| {
        json!({
            "messages": [{"role": "system", "content": "be brief"},
                         {"role": "user", "content": "hello"}],
            "max_completion_tokens": 3, "stream": stream,
        })
    };
    let whole = document(post(&engine, "/v1/chat/completions", &ask(false)).await).await;
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["usage"]["prompt_tokens"], 6);
    let content = whole["choices"][0]["message"]["content"].as_str().unwrap();

    let stream = text(post(&engine, "/v1/chat/completions", &ask(true)).await).await;
    let mut streamed = String::new();
    for (at, event) in events(&stream).into_iter().take(3).enumerate() {
        let chunk: Value = serde_json::from_str(event).expect("json");
        assert_eq!(chunk["object"], "chat.completion.chunk");
        let delta = &chunk["choices"][0]["delta"];
        assert_eq!(delta.get("role").is_some(), at == 0);
        streamed.push_str(delta["content"].as_str().unwrap());
    }
    assert_eq!(streamed, content);
}

#[tokio::test]
async fn text_and_token_prompts_are_the_same_prompt() {
    let engine = engine(instant()).await;
    let ask = |prompt: Value| json!({"prompt": prompt, "max_tokens": 4});
    let mut answers = Vec::new();
    for prompt in [json!([300, 301]), json!([[300, 301]]), json!("qdaa qdab")] {
        let answer = document(post(&engine, "/v1/completions", &ask(prompt)).await).await;
        answers.push(answer["choices"][0]["text"].clone());
    }
    assert_eq!(answers[0], answers[1]);
    assert_eq!(answers[0], answers[2]);
}

#[tokio::test]
async fn prompts_are_tokenized_as_they_are_read() {
    let engine = engine(instant()).await;
    let body = json!({"model": "sim", "prompt": "qdaa qh", "add_special_tokens": false});
    let answer = document(post(&engine, "/tokenize", &body).await).await;
    assert_eq!(
        (&answer["count"], &answer["tokens"]),
        (&json!(2), &json!([300, 7]))
    );
}

#[tokio::test]
async fn a_salt_keeps_caches_apart() {
    let engine = engine(instant()).await;
    let prompt: Vec<u32> = (0..33).collect();
    let mut cached = Vec::new();
    for salt in ["a", "a", "b"] {
        let body = json!({"prompt": prompt, "max_tokens": 1, "cache_salt": salt});
        let answer = document(post(&engine, "/v1/completions", &body).await).await;
        cached.push(answer["usage"]["prompt_tokens_details"]["cached_tokens"].clone());
    }
    assert_eq!(cached, [json!(0), json!(32), json!(0)]);
}

#[tokio::test]
async fn bad_requests_get_errors_in_openais_shape() {
    let engine = engine(instant()).await;
    for (path, body, status, code) in [
        ("/v1/completions", "{", 400, Value::Null),
        ("/v1/completions", r#"{"prompt":[]}"#, 400, Value::Null),
        ("/v1/completions", r#"{"prompt":[-1]}"#, 400, Value::Null),
        (
            "/v1/completions",
            r#"{"prompt":[1],"n":2}"#,
            400,
            Value::Null,
        ),
        (
            "/v1/completions",
            r#"{"prompt":[1],"max_tokens":0}"#,
            400,
            Value::Null,
        ),
        (
            "/v1/chat/completions",
            r#"{"messages":[]}"#,
            400,
            Value::Null,
        ),
        (
            "/v1/completions",
            r#"{"prompt":[1],"max_tokens":49152}"#,
            400,
            json!("context_length_exceeded"),
        ),
        (
            "/v1/completions",
            r#"{"prompt":[1],"model":"other"}"#,
            404,
            json!("model_not_found"),
        ),
        ("/nowhere", "{}", 404, Value::Null),
        ("/v1/models", "{}", 405, Value::Null),
    ] {
        let response = request(engine.address(), Method::POST, path, body).await;
        assert_eq!(response.status().as_u16(), status, "{path} {body}");
        assert!(response.headers().contains_key(WORKER_ID_HEADER));
        let error = document(response).await["error"].clone();
        assert_eq!(error["code"], code, "{path} {body}");
        assert!(error["message"].is_string() && error["type"].is_string());
    }
    assert_eq!(engine.gauges().running, 0);
}

#[tokio::test]
async fn models_health_metrics_and_dump_answer() {
    let engine = engine(instant()).await;
    assert!(engine.store(&(0..32).collect::<Vec<u32>>()));
    let get = |path| request(engine.address(), Method::GET, path, "");
    let models = document(get("/v1/models").await).await;
    assert_eq!(models["data"][0]["id"], "sim");
    assert_eq!(get("/health").await.status(), StatusCode::OK);
    let metrics = text(get("/metrics").await).await;
    for name in [
        "vllm:num_requests_running{",
        "vllm:num_requests_waiting{",
        "vllm:kv_cache_usage_perc{",
        "vllm:gpu_cache_usage_perc{",
        "vllm:prefix_cache_queries_total{",
        "vllm:prefix_cache_hits_total{",
        "vllm:prompt_tokens_total{",
        "vllm:generation_tokens_total{",
        "vllm:time_to_first_token_seconds_bucket{",
    ] {
        assert!(metrics.contains(name), "{name} in {metrics}");
    }
    let dump = document(get("/sim/blocks").await).await;
    assert_eq!(dump["blocks"].as_array().map(Vec::len), Some(2));
    let cleared = request(engine.address(), Method::POST, "/sim/clear", "").await;
    assert_eq!(cleared.status(), StatusCode::NO_CONTENT);
    assert_eq!(engine.blocks(), []);
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_request() {
    let engine = engine(Config::default()).await;
    let body = json!({"prompt": [1, 2], "max_tokens": 40_000, "stream": true});
    let mut streaming = post(&engine, "/v1/completions", &body).await;
    streaming.frame().await.expect("a frame").expect("a token");
    let body = json!({"prompt": [1, 2], "max_tokens": 40_000}).to_string();
    let address = engine.address();
    let waiting = tokio::spawn(request(address, Method::POST, "/v1/completions", body));
    eventually("both to run", || async {
        (engine.gauges().running == 2).then_some(())
    })
    .await;
    drop(streaming);
    waiting.abort();
    eventually("both to be freed", || async {
        (engine.gauges().running == 0).then_some(())
    })
    .await;
    assert_eq!(engine.counters().requests_aborted, 2);
    assert_eq!(engine.gauges().blocks_pinned, 0);
    engine.shutdown().await;
}

#[tokio::test]
async fn a_stopped_engine_cuts_its_streams_and_frees_its_port() {
    let engine = engine(Config::default()).await;
    let address = engine.address();
    let body = json!({"prompt": [1, 2], "max_tokens": 40_000, "stream": true});
    let mut streaming = post(&engine, "/v1/completions", &body).await;
    streaming.frame().await.expect("a frame").expect("a token");
    let reading = tokio::spawn(streaming.into_body().collect());
    engine.shutdown().await;
    assert!(reading.await.expect("reader").is_err(), "a complete stream");
    let again = Engine::start(Config {
        listen: address,
        ..instant()
    });
    again.await.expect("the port is free").shutdown().await;
}

fn options(url: &str, workload: Workload) -> Options {
    Options {
        url: url.to_owned(),
        model: "sim".to_owned(),
        label: "test".to_owned(),
        workload,
        seed: 1,
        requests: 12,
        pace: Pace::Concurrency(3),
        format: Format::Tokens,
        timeout: Duration::from_secs(60),
    }
}

async fn run(options: &Options) -> Report {
    load::run(options, |_| {}).await.expect("a run")
}

#[tokio::test]
async fn a_seed_sends_the_same_bodies_whatever_the_pace_and_the_engine() {
    let small = engine(Config {
        blocks: 300,
        ..instant()
    })
    .await;
    let large = engine(instant()).await;
    let url = |engine: &Engine| format!("http://{}", engine.address());
    let first = run(&options(&url(&small), Workload::Agents)).await;
    let second = run(&Options {
        pace: Pace::Rate(500.0),
        ..options(&url(&large), Workload::Agents)
    })
    .await;
    let other = run(&Options {
        seed: 2,
        ..options(&url(&large), Workload::Agents)
    })
    .await;
    assert_eq!((first.ok, second.ok), (12, 12));
    assert_eq!(first.bodies, second.bodies);
    assert_ne!(first.bodies, other.bodies);
    assert_eq!(first.prompt_tokens, second.prompt_tokens);
}

#[tokio::test]
async fn the_report_agrees_with_the_engine() {
    let engine = engine(Config {
        worker_id: 5,
        ..instant()
    })
    .await;
    for format in [Format::Tokens, Format::Text] {
        engine.clear();
        let before = engine.counters();
        let report = run(&Options {
            format,
            ..options(&format!("http://{}/v1", engine.address()), Workload::Burst)
        })
        .await;
        let after = engine.counters();
        assert_eq!(report.ok, 12, "{:?}", report.first_failure);
        assert_eq!(
            report.prompt_tokens,
            after.prompt_tokens - before.prompt_tokens
        );
        assert_eq!(
            report.cached_tokens,
            Some(after.prefix_hits - before.prefix_hits)
        );
        assert_eq!(
            report.completion_tokens,
            after.generation_tokens - before.generation_tokens
        );
        assert_eq!(report.workers["5"], 12);
        assert!(report.ttft_ms.p50 > 0.0 && report.ttft_ms.p50 <= report.ttft_ms.p99);
    }
}

#[tokio::test]
async fn failures_are_told_by_reason() {
    let engine = engine(instant()).await;
    let url = format!("http://{}", engine.address());
    let unknown = run(&Options {
        model: "other".to_owned(),
        ..options(&url, Workload::Unique)
    })
    .await;
    assert_eq!(unknown.failed["status_404"], 12);
    assert!(
        unknown
            .first_failure
            .is_some_and(|text| text.contains("does not exist"))
    );
    engine.shutdown().await;
    let gone = run(&options(&url, Workload::Unique)).await;
    assert_eq!(gone.failed["connect"], 12);
    assert_eq!(gone.ok, 0);
}

#[tokio::test]
async fn options_that_make_no_run_are_refused() {
    let refused =
        |options: Options| async move { load::run(&options, |_| {}).await.expect_err("no run") };
    let good = options("http://127.0.0.1:1", Workload::Unique);
    let https = options("https://127.0.0.1:1", Workload::Unique);
    assert!(matches!(refused(https).await, LoadError::Url { .. }));
    for pace in [Pace::Rate(0.0), Pace::Concurrency(0)] {
        let options = Options {
            pace,
            ..good.clone()
        };
        assert!(matches!(refused(options).await, LoadError::Pace(_)));
    }
    let untimed = Options {
        pace: Pace::Trace,
        ..good
    };
    assert!(matches!(refused(untimed).await, LoadError::NoTimes(_)));
}
