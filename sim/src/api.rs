//! The engine's HTTP face: OpenAI's completions and chat, their token ids, and pages for tests.

mod answer;
mod request;

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderValue, StatusCode};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::json;

use self::answer::{Form, Reply};
use self::request::{ChatRequest, CompletionRequest, Options, Tokenized};
use crate::engine::{Refusal, Shared};

/// Header that names the engine on every response.
pub const WORKER_ID_HEADER: &str = "x-worker-id";

/// Bytes of a request body: a million token ids and room to spare.
const BODY_BYTES: usize = 64 * 1024 * 1024;

/// Output tokens where a request does not say, OpenAI's default for completions.
const DEFAULT_MAX_TOKENS: usize = 16;

/// The routes of one engine.
pub(crate) fn router(shared: Arc<Shared>) -> axum::Router {
    axum::Router::new()
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat))
        .route("/tokenize", post(tokenize))
        .route("/v1/completions/render", post(render_prompts))
        .route("/v1/chat/completions/render", post(render_chat))
        .route("/v1/models", get(models))
        .route("/health", get(|| async { StatusCode::OK }))
        .route("/metrics", get(metrics))
        .route("/sim/blocks", get(blocks))
        .route("/sim/clear", post(clear))
        .route("/sim/restart", post(restart))
        .route("/kv_cache_events", post(poll))
        .fallback(|| async { ApiError::not_found("no such path") })
        .method_not_allowed_fallback(|| async { ApiError::method_not_allowed() })
        .layer(DefaultBodyLimit::max(BODY_BYTES))
        .layer(middleware::map_response_with_state(
            Arc::clone(&shared),
            name_worker,
        ))
        .with_state(shared)
}

async fn name_worker(State(shared): State<Arc<Shared>>, mut response: Response) -> Response {
    let id = HeaderValue::from(shared.config.worker_id);
    response.headers_mut().insert(WORKER_ID_HEADER, id);
    response
}

async fn completions(
    State(shared): State<Arc<Shared>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let request: CompletionRequest = parse(body)?;
    let prompt = request.prompt.into_tokens();
    generate(&shared, Form::Completion, prompt, request.options).await
}

async fn chat(
    State(shared): State<Arc<Shared>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let request: ChatRequest = parse(body)?;
    if request.messages.is_empty() {
        return Err(ApiError::invalid("messages is empty", Some("messages")));
    }
    let prompt = request.tokens();
    generate(&shared, Form::Chat, prompt, request.options).await
}

/// vLLM's `/tokenize`.
async fn tokenize(
    State(shared): State<Arc<Shared>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let tokens = parse::<Tokenized>(body)?.into_tokens();
    let config = &shared.config;
    let longest = config.blocks * config.limits.block_size;
    let answer = json!({"count": tokens.len(), "max_model_len": longest, "tokens": tokens});
    Ok(Json(answer).into_response())
}

/// The ids of a completion that is not served, as vLLM renders it: a list of prompts.
async fn render_prompts(body: Result<Bytes, BytesRejection>) -> Result<Response, ApiError> {
    let tokens = parse::<Tokenized>(body)?.into_tokens();
    Ok(Json(json!([{"token_ids": tokens}])).into_response())
}

/// The ids of a chat that is not served, as vLLM renders it.
async fn render_chat(body: Result<Bytes, BytesRejection>) -> Result<Response, ApiError> {
    let tokens = parse::<Tokenized>(body)?.into_tokens();
    Ok(Json(json!({"token_ids": tokens})).into_response())
}

fn parse<T: serde::de::DeserializeOwned>(
    body: Result<Bytes, BytesRejection>,
) -> Result<T, ApiError> {
    let body = body.map_err(|rejection| ApiError {
        status: rejection.status(),
        ..ApiError::invalid(&rejection.body_text(), None)
    })?;
    serde_json::from_slice(&body).map_err(|error| ApiError::invalid(&error.to_string(), None))
}

async fn generate(
    shared: &Shared,
    form: Form,
    prompt: Vec<u32>,
    options: Options,
) -> Result<Response, ApiError> {
    let config = &shared.config;
    if let Some(model) = &options.model
        && *model != config.model
    {
        return Err(ApiError::unknown_model(model));
    }
    if options.n.is_some_and(|n| n != 1) {
        return Err(ApiError::invalid("n must be 1", Some("n")));
    }
    let prompt_tokens = prompt.len();
    let max_tokens = options.max_tokens().unwrap_or(DEFAULT_MAX_TOKENS);
    let salt = options.cache_salt.as_deref().unwrap_or_default();
    let tokens = shared.submit(prompt, max_tokens, salt)?;
    let reply = Reply::new(form, shared, prompt_tokens);
    if options.stream.unwrap_or(false) {
        Ok(reply.stream(tokens, options.include_usage()))
    } else {
        Ok(reply.whole(tokens).await?.into_response())
    }
}

async fn models(State(shared): State<Arc<Shared>>) -> Response {
    let config = &shared.config;
    Json(json!({
        "object": "list",
        "data": [{
            "id": config.model,
            "object": "model",
            "created": 0,
            "owned_by": "kv-sim",
            "max_model_len": config.blocks * config.limits.block_size,
        }],
    }))
    .into_response()
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    let kind = [("content-type", "text/plain; version=0.0.4")];
    (kind, shared.metrics()).into_response()
}

async fn blocks(State(shared): State<Arc<Shared>>) -> Response {
    let (event_id, blocks) = shared.blocks();
    Json(json!({
        "worker_id": shared.config.worker_id,
        "event_id": event_id,
        "blocks": blocks,
    }))
    .into_response()
}

async fn restart(State(shared): State<Arc<Shared>>) -> StatusCode {
    shared.restart();
    StatusCode::NO_CONTENT
}

async fn poll(State(shared): State<Arc<Shared>>) -> Result<Response, ApiError> {
    let events = shared.poll();
    let events = events.ok_or_else(|| ApiError::not_found("events are not kept to be polled"))?;
    Ok(Json(events).into_response())
}

async fn clear(State(shared): State<Arc<Shared>>) -> StatusCode {
    shared.clear();
    StatusCode::NO_CONTENT
}

/// An error in OpenAI's shape.
#[derive(Debug)]
pub(crate) struct ApiError {
    status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    param: Option<&'static str>,
    message: String,
}

impl ApiError {
    fn invalid(message: &str, param: Option<&'static str>) -> Self {
        Self {
            status: StatusCode::BAD_REQUEST,
            kind: "invalid_request_error",
            code: None,
            param,
            message: message.to_owned(),
        }
    }

    fn not_found(message: &str) -> Self {
        Self {
            status: StatusCode::NOT_FOUND,
            ..Self::invalid(message, None)
        }
    }

    fn unknown_model(model: &str) -> Self {
        Self {
            code: Some("model_not_found"),
            param: Some("model"),
            ..Self::not_found(&format!("the model {model:?} does not exist"))
        }
    }

    fn method_not_allowed() -> Self {
        Self {
            status: StatusCode::METHOD_NOT_ALLOWED,
            ..Self::invalid("method not allowed", None)
        }
    }

    fn stopped() -> Self {
        Self {
            status: StatusCode::SERVICE_UNAVAILABLE,
            kind: "server_error",
            ..Self::invalid("the engine is stopping", None)
        }
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let message = refusal.to_string();
        match refusal {
            Refusal::EmptyPrompt => Self::invalid(&message, Some("prompt")),
            Refusal::NoTokens => Self::invalid(&message, Some("max_tokens")),
            Refusal::TooLong { .. } => Self {
                code: Some("context_length_exceeded"),
                ..Self::invalid(&message, None)
            },
            Refusal::Stopping => Self::stopped(),
            Refusal::Busy(_) => Self {
                status: StatusCode::SERVICE_UNAVAILABLE,
                kind: "server_error",
                code: Some("overloaded"),
                ..Self::invalid(&message, None)
            },
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = json!({"error": {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }});
        (self.status, Json(body)).into_response()
    }
}
