//! `POST /v1/events`: engines post what happens in their caches.

use std::net::SocketAddr;
use std::time::Duration;

use axum::Json;
use axum::body::{Body, to_bytes};
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::Admin;
use super::error::AdminError;
use crate::ingest::engine::Encoding;
use crate::ingest::post::{POST_BYTES, PostError, Taken};

/// How long a body may take to come.
const BODY: Duration = Duration::from_secs(10);

pub(super) async fn post(
    State(admin): State<Admin>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    request: Request,
) -> Result<(StatusCode, Json<Taken>), AdminError> {
    let (head, body) = request.into_parts();
    let encoding = encoding(&head.headers)?;
    let poster = admin.desk.poster(token(&head.headers), peer.ip()).await?;
    let read = tokio::time::timeout(BODY, read(body)).await;
    let body = read.map_err(|_| AdminError::SlowBody)??;
    let taken = poster.post(body, encoding).await?;
    Ok((StatusCode::ACCEPTED, Json(taken)))
}

async fn read(body: Body) -> Result<bytes::Bytes, AdminError> {
    let read = to_bytes(body, POST_BYTES).await;
    read.map_err(|_| AdminError::LongBody(POST_BYTES))
}

fn encoding(headers: &HeaderMap) -> Result<Encoding, AdminError> {
    let kind = headers
        .get(header::CONTENT_TYPE)
        .and_then(|v| v.to_str().ok());
    let kind = kind
        .unwrap_or_default()
        .split(';')
        .next()
        .unwrap_or_default();
    match kind.trim().to_ascii_lowercase().as_str() {
        "application/json" => Ok(Encoding::Json),
        "application/msgpack" | "application/x-msgpack" | "application/vnd.msgpack" => {
            Ok(Encoding::MsgPack)
        }
        _ => Err(AdminError::ContentType),
    }
}

fn token(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

pub(super) fn status(error: &PostError) -> StatusCode {
    match error {
        PostError::Token => StatusCode::UNAUTHORIZED,
        PostError::Worker(_) => StatusCode::FORBIDDEN,
        PostError::NoSuchWorker(_) | PostError::NoSuchStream { .. } => StatusCode::NOT_FOUND,
        PostError::Body(_) => StatusCode::BAD_REQUEST,
        PostError::Gap { .. } => StatusCode::CONFLICT,
        PostError::Quota { .. } | PostError::Busy => StatusCode::TOO_MANY_REQUESTS,
        PostError::Gone => StatusCode::SERVICE_UNAVAILABLE,
    }
}

/// The answer to a post that is not taken: besides the error the number that is expected, or when
/// to come again.
pub(super) fn refusal(error: &PostError) -> Response {
    let mut body = serde_json::json!({
        "error": { "kind": error.kind(), "message": error.to_string() }
    });
    if let (PostError::Gap { expected }, Some(body)) = (error, body.as_object_mut()) {
        body.insert("expected".into(), (*expected).into());
    }
    let mut response = (status(error), Json(body)).into_response();
    let seconds = match error {
        PostError::Quota { wait } => wait.as_secs_f64().ceil() as u64,
        PostError::Busy => 1,
        _ => return response,
    };
    let headers = response.headers_mut();
    headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    response
}
