//! Errors of the HTTP API.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use super::{events, fleet};
use crate::fleet::outcome::RegisterError;
use crate::index::NotDumped;
use crate::ingest::post::PostError;

/// Why a request isn't answered.
#[derive(Debug, thiserror::Error)]
pub(super) enum AdminError {
    #[error("no such path")]
    NoSuchPath,
    #[error("the path does not take this method")]
    WrongMethod,
    #[error("this path answers only peers on this machine, or with the admin token")]
    NotLocal,
    #[error("the sidecar is shutting down")]
    ShuttingDown,
    #[error("{0}")]
    NotDumped(#[from] NotDumped),
    #[error("the body is not valid: {0}")]
    Body(String),
    #[error("the query is not valid: {0}")]
    Query(String),
    #[error("no pool {0:?}")]
    NoSuchPool(String),
    #[error("the prompt is not token ids: {0}")]
    NoTokens(&'static str),
    #[error("the content type must be application/json or application/msgpack")]
    ContentType,
    #[error("the body did not come in time")]
    SlowBody,
    #[error("the body is broken off or above {0} bytes")]
    LongBody(usize),
    #[error(transparent)]
    Post(#[from] PostError),
    #[error(transparent)]
    Register(#[from] RegisterError),
}

impl AdminError {
    fn kind(&self) -> &'static str {
        match self {
            Self::NoSuchPath => "no_such_path",
            Self::WrongMethod => "wrong_method",
            Self::NotLocal => "not_local",
            Self::ShuttingDown => "shutting_down",
            Self::NotDumped(NotDumped::NotReady) => "not_ready",
            Self::NotDumped(NotDumped::TooMany) => "too_many_dumps",
            Self::Body(_) => "invalid_body",
            Self::Query(_) => "invalid_query",
            Self::NoSuchPool(_) => "no_such_pool",
            Self::NoTokens(_) => "no_tokens",
            Self::ContentType => "content_type",
            Self::SlowBody => "slow_body",
            Self::LongBody(_) => "long_body",
            Self::Post(error) => error.kind(),
            Self::Register(error) => error.kind(),
        }
    }

    fn status(&self) -> StatusCode {
        match self {
            Self::NoSuchPath => StatusCode::NOT_FOUND,
            Self::WrongMethod => StatusCode::METHOD_NOT_ALLOWED,
            Self::NotLocal => StatusCode::FORBIDDEN,
            Self::ShuttingDown | Self::NotDumped(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::NoSuchPool(_) => StatusCode::NOT_FOUND,
            Self::Body(_) | Self::Query(_) => StatusCode::BAD_REQUEST,
            Self::NoTokens(_) => StatusCode::UNPROCESSABLE_ENTITY,
            Self::ContentType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::SlowBody => StatusCode::REQUEST_TIMEOUT,
            Self::LongBody(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Post(error) => events::status(error),
            Self::Register(error) => fleet::status(error),
        }
    }
}

impl IntoResponse for AdminError {
    /// `{"error": {"kind": ..., "message": ...}}`.
    fn into_response(self) -> Response {
        if let Self::Post(error) = &self {
            return events::refusal(error);
        }
        let body = serde_json::json!({
            "error": { "kind": self.kind(), "message": self.to_string() }
        });
        (self.status(), Json(body)).into_response()
    }
}
