//! Response bodies, streamed token by token or whole.

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::body::{Body, Bytes};
use axum::response::{IntoResponse as _, Response};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::ApiError;
use crate::engine::Shared;
use crate::scheduler::Output;
use crate::token;

/// Which endpoint's shape an answer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Completion,
    Chat,
}

/// The answer to one request.
pub(super) struct Reply {
    form: Form,
    id: String,
    model: String,
    created: u64,
    prompt_tokens: usize,
}

struct Stream {
    reply: Reply,
    tokens: mpsc::Receiver<Output>,
    include_usage: bool,
    sent: usize,
    ended: bool,
}

impl Reply {
    pub(super) fn new(form: Form, shared: &Shared, prompt_tokens: usize) -> Self {
        let prefix = match form {
            Form::Completion => "cmpl",
            Form::Chat => "chatcmpl",
        };
        Self {
            form,
            id: format!(
                "{prefix}-{}-{}",
                shared.config.worker_id,
                shared.next_request_number()
            ),
            model: shared.config.model.clone(),
            created: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |age| age.as_secs()),
            prompt_tokens,
        }
    }

    /// Server-sent events: one chunk per token, the usage if asked for, `[DONE]`.
    pub(super) fn stream(self, tokens: mpsc::Receiver<Output>, include_usage: bool) -> Response {
        let stream = Stream {
            reply: self,
            tokens,
            include_usage,
            sent: 0,
            ended: false,
        };
        let body = futures::stream::unfold(stream, |mut stream| async move {
            let next = stream.next().await?;
            Some((next, stream))
        });
        let headers = [
            ("content-type", "text/event-stream; charset=utf-8"),
            ("cache-control", "no-cache"),
        ];
        (headers, Body::from_stream(body)).into_response()
    }

    /// One JSON document when the last token is there.
    pub(super) async fn whole(
        self,
        mut tokens: mpsc::Receiver<Output>,
    ) -> Result<Json<Value>, ApiError> {
        let (mut text, mut count) = (String::new(), 0);
        loop {
            let output = tokens.recv().await.ok_or_else(ApiError::stopped)?;
            text.push_str(&token::decode(output.token));
            count += 1;
            if output.last {
                let choice = self.choice(&text, Some("length"), "message", true);
                let mut body = self.envelope(&[choice], false);
                body["usage"] = self.usage(count, output.cached_tokens);
                return Ok(Json(body));
            }
        }
    }

    fn choice(&self, text: &str, finish: Option<&str>, holder: &str, opens: bool) -> Value {
        match self.form {
            Form::Completion => json!({
                "index": 0,
                "text": text,
                "logprobs": null,
                "finish_reason": finish,
            }),
            Form::Chat => {
                let mut choice = json!({
                    "index": 0,
                    "logprobs": null,
                    "finish_reason": finish,
                });
                choice[holder] = if opens {
                    json!({"role": "assistant", "content": text})
                } else {
                    json!({"content": text})
                };
                choice
            }
        }
    }

    fn envelope(&self, choices: &[Value], chunk: bool) -> Value {
        let object = match (self.form, chunk) {
            (Form::Completion, _) => "text_completion",
            (Form::Chat, true) => "chat.completion.chunk",
            (Form::Chat, false) => "chat.completion",
        };
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        })
    }

    fn usage(&self, completion_tokens: usize, cached_tokens: usize) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        })
    }
}

impl Stream {
    /// The next bytes; an error, which cuts the connection, when the engine gave the request up.
    async fn next(&mut self) -> Option<Result<Bytes, io::Error>> {
        if self.ended {
            return None;
        }
        let Some(output) = self.tokens.recv().await else {
            self.ended = true;
            return Some(Err(io::Error::other("the engine is stopping")));
        };
        let finish = output.last.then_some("length");
        let text = token::decode(output.token);
        let choice = self.reply.choice(&text, finish, "delta", self.sent == 0);
        let mut bytes = sse(&self.reply.envelope(&[choice], true));
        self.sent += 1;
        if output.last {
            self.ended = true;
            if self.include_usage {
                let mut usage = self.reply.envelope(&[], true);
                usage["usage"] = self.reply.usage(self.sent, output.cached_tokens);
                bytes.push_str(&sse(&usage));
            }
            bytes.push_str("data: [DONE]\n\n");
        }
        Some(Ok(bytes.into()))
    }
}

fn sse(value: &Value) -> String {
    format!("data: {value}\n\n")
}
