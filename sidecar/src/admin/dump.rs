//! `GET /v1/index/dump`: the whole index, for a sidecar that starts.

use std::convert::Infallible;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures::StreamExt as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::Admin;
use super::error::AdminError;
use crate::dump::{CONTENT_TYPE, Line};
use crate::index::Control;

/// Lines that wait for the reader.
const LINES: usize = 16;

pub(super) async fn dump(State(admin): State<Admin>) -> Result<Response, AdminError> {
    let (out, lines) = mpsc::channel(LINES);
    admin.ask(|reply| Control::Dump { out, reply }).await??;
    let lines = ReceiverStream::new(lines);
    let lines = lines.map(|line: Line| Ok::<_, Infallible>(Bytes::from(line.encode())));
    let kind = [(header::CONTENT_TYPE, CONTENT_TYPE)];
    Ok((kind, Body::from_stream(lines)).into_response())
}
