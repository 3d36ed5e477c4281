//! The sidecar's HTTP API: health, metrics and `/v1`.

mod busy;
mod dump;
mod error;
mod events;
mod explain;
mod fleet;

use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::{ConnectInfo, DefaultBodyLimit, Query, RawQuery, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use serde::Serialize;
use tokio::sync::{mpsc, oneshot};

use crate::ask::ask;
use crate::decision::{DecisionsReport, Wanted};
use crate::fleet::Front;
use crate::fleet::lease::Lease;
use crate::index::{Control, IndexReport, WorkersReport};
use crate::ingest::post::Desk;
use crate::load::RawReport;
use crate::metrics::{CONTENT_TYPE, Metrics};
use crate::queue::QueueReport;
use crate::token::Token;
use error::AdminError;

/// Longest body of `/v1/explain`, in bytes.
const LONGEST_BODY: usize = 64 << 20;

/// What the handlers work with.
#[derive(Clone, Debug)]
pub struct Admin {
    control: mpsc::Sender<Control>,
    desk: Arc<Desk>,
    metrics: Arc<Metrics>,
    /// Takes registrations, where somebody does.
    fleet: Option<Front>,
    /// What peers of other machines show to see content.
    token: Option<Token>,
}

impl Admin {
    /// Asks the index through `control` and hands posts to `desk`.
    #[must_use]
    pub fn new(control: mpsc::Sender<Control>, desk: Arc<Desk>, metrics: Arc<Metrics>) -> Self {
        Self {
            control,
            desk,
            metrics,
            fleet: None,
            token: None,
        }
    }

    /// Shows content to peers of other machines too, if they bring this token.
    #[must_use]
    pub fn with_token(mut self, token: Option<String>) -> Self {
        self.token = token.map(Token::new);
        self
    }

    /// Hands registrations of workers to `fleet`.
    #[must_use]
    pub fn with_fleet(mut self, fleet: Front) -> Self {
        self.fleet = Some(fleet);
        self
    }

    async fn ask<T>(
        &self,
        question: impl FnOnce(oneshot::Sender<T>) -> Control,
    ) -> Result<T, AdminError> {
        let answer = ask(&self.control, question).await;
        answer.ok_or(AdminError::ShuttingDown)
    }
}

/// The routes. `/v1` shows content, so it answers only peers on this machine and those with the
/// token, but for posts of events, which show whose they are; serve it with connection info.
pub fn router(admin: Admin) -> Router {
    let content = Router::new()
        .route("/v1/workers", get(workers).post(fleet::join))
        .route(
            "/v1/workers/{id}",
            put(fleet::renew).post(fleet::renew).delete(fleet::leave),
        )
        .route("/v1/queue", get(queue))
        .route("/busy_threshold", get(busy::list).post(busy::post))
        .route("/v1/index", get(index))
        .route("/v1/index/dump", get(dump::dump))
        .route("/v1/explain", post(explain::explain))
        .route("/v1/decisions", get(decisions))
        .route_layer(from_fn_with_state(admin.clone(), only_trusted));
    Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .route("/v1/events", post(events::post))
        .merge(content)
        .fallback(async || AdminError::NoSuchPath)
        .method_not_allowed_fallback(async || AdminError::WrongMethod)
        .layer(DefaultBodyLimit::max(LONGEST_BODY))
        .with_state(admin)
}

async fn only_trusted(
    State(admin): State<Admin>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    request: Request,
    next: Next,
) -> Result<Response, AdminError> {
    let is_known = admin
        .token
        .as_ref()
        .is_some_and(|token| token.is_shown(request.headers()));
    if is_known || peer.ip().to_canonical().is_loopback() {
        Ok(next.run(request).await)
    } else {
        Err(AdminError::NotLocal)
    }
}

async fn ready(State(admin): State<Admin>) -> Result<Response, AdminError> {
    let readiness = admin.ask(Control::Readiness).await?;
    let status = if readiness.missing.is_empty() {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    Ok((status, Json(readiness)).into_response())
}

async fn metrics(State(admin): State<Admin>) -> impl IntoResponse {
    (
        [(header::CONTENT_TYPE, CONTENT_TYPE)],
        admin.metrics.encode(),
    )
}

async fn index(State(admin): State<Admin>) -> Result<Json<IndexReport>, AdminError> {
    admin.ask(Control::Index).await.map(Json)
}

async fn queue(State(admin): State<Admin>) -> Result<Json<Vec<QueueReport>>, AdminError> {
    admin.ask(Control::Queue).await.map(Json)
}

async fn decisions(
    State(admin): State<Admin>,
    wanted: Result<Query<Wanted>, QueryRejection>,
) -> Result<Json<DecisionsReport>, AdminError> {
    let Query(wanted) = wanted.map_err(|e| AdminError::Query(e.body_text()))?;
    let ask = |reply| Control::Decisions(wanted, reply);
    admin.ask(ask).await.map(Json)
}

/// Answer of `/v1/workers`, with `?raw` the accounts of load too.
#[derive(Debug, Serialize)]
struct Workers {
    #[serde(flatten)]
    report: WorkersReport,
    /// Who is registered.
    leases: Vec<Lease>,
    #[serde(skip_serializing_if = "Option::is_none")]
    raw: Option<RawReport>,
}

async fn workers(
    State(admin): State<Admin>,
    RawQuery(query): RawQuery,
) -> Result<Json<Workers>, AdminError> {
    let is_raw = query.is_some_and(|query| query.split('&').any(|key| key == "raw"));
    let report = admin.ask(Control::Workers).await?;
    let raw = if is_raw {
        Some(admin.ask(Control::Raw).await?)
    } else {
        None
    };
    let leases = admin.fleet.as_ref().map_or_else(Vec::new, Front::leases);
    Ok(Json(Workers {
        report,
        leases,
        raw,
    }))
}
