//! Paths, bodies and answers.

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use kv_core::id::{DpRank, OwnerId};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::dump;
use super::metrics::IndexerMetrics;
use super::query::{self, QueryError};
use super::registry::{Ask, Listed, Registration, RegistryError, Unregistration};
use crate::ask::ask;
use crate::index::{Control, Partition};
use crate::token::Token;

/// Longest body of a query, as Dynamo has it: a million tokens as text.
const LONGEST_QUERY: usize = 8 << 20;

/// What the handlers work with.
#[derive(Clone, Debug)]
pub struct Face {
    control: mpsc::Sender<Control>,
    registry: mpsc::Sender<Ask>,
    metrics: Arc<IndexerMetrics>,
    token: Option<Token>,
}

/// The sidecar is shutting down.
#[derive(Debug)]
pub(super) struct Gone;

impl Face {
    /// Asks the index through `control` and the keeper of the configuration through `registry`.
    /// With a token, only clients that show it are answered.
    #[must_use]
    pub fn new(
        control: mpsc::Sender<Control>,
        registry: mpsc::Sender<Ask>,
        token: Option<String>,
    ) -> Self {
        Self {
            control,
            registry,
            metrics: Arc::default(),
            token: token.map(Token::new),
        }
    }

    pub(super) async fn ask<T>(
        &self,
        question: impl FnOnce(oneshot::Sender<T>) -> Control,
    ) -> Result<T, Gone> {
        ask(&self.control, question).await.ok_or(Gone)
    }

    async fn ask_registry<T>(
        &self,
        question: impl FnOnce(oneshot::Sender<T>) -> Ask,
    ) -> Result<T, Gone> {
        ask(&self.registry, question).await.ok_or(Gone)
    }

    /// Owners whose events come in.
    async fn connected(&self) -> Result<BTreeSet<OwnerId>, Gone> {
        let report = self.ask(Control::Workers).await?;
        let owners = report.pools.iter().flat_map(|pool| &pool.owners);
        let connected = owners.filter(|owner| owner.events.connected);
        let ids = connected.map(|owner| OwnerId {
            worker: owner.worker,
            rank: owner.rank,
        });
        Ok(ids.collect())
    }

    pub(super) async fn partition(
        &self,
        model: &str,
        group: &str,
    ) -> Result<Partition, QueryError> {
        let partitions = self.ask(Control::Partitions).await?;
        let found = partitions.into_iter().find(|p| p.is(model, group));
        found.ok_or_else(|| QueryError::NoIndexer {
            model: model.to_owned(),
            group: group.to_owned(),
        })
    }
}

/// The routes.
pub fn router(face: Face) -> Router {
    let query = DefaultBodyLimit::max(LONGEST_QUERY);
    let routes = Router::new()
        .route("/register", post(register))
        .route("/unregister", post(unregister))
        .route("/workers", get(workers))
        .route("/query", post(query::by_tokens).layer(query))
        .route("/query_by_hash", post(query::by_hash).layer(query))
        .route("/dump", get(dump::dump))
        .route_layer(from_fn_with_state(face.clone(), authorised))
        .route("/health", get(async || StatusCode::OK))
        .route_layer(from_fn_with_state(face.clone(), counted));
    routes.route("/metrics", get(metrics)).with_state(face)
}

async fn authorised(State(face): State<Face>, request: Request, next: Next) -> Response {
    if face
        .token
        .as_ref()
        .is_some_and(|token| !token.is_shown(request.headers()))
    {
        return failed(StatusCode::UNAUTHORIZED, "the token is missing or wrong");
    }
    next.run(request).await
}

async fn counted(State(face): State<Face>, request: Request, next: Next) -> Response {
    // One of the routes: others don't come here.
    let endpoint = request.uri().path().to_owned();
    let method = request.method().as_str().to_owned();
    let at = Instant::now();
    let response = next.run(request).await;
    face.metrics
        .count(endpoint, method, at.elapsed(), response.status());
    response
}

pub(crate) fn failed(status: StatusCode, why: impl std::fmt::Display) -> Response {
    (status, Json(json!({ "error": why.to_string() }))).into_response()
}

impl IntoResponse for Gone {
    fn into_response(self) -> Response {
        failed(
            StatusCode::SERVICE_UNAVAILABLE,
            "the indexer is shutting down",
        )
    }
}

/// Body of `/register`. `tenant_id` and `additionalsalt` are taken and mean nothing.
#[derive(Deserialize)]
struct RegisterRequest {
    instance_id: u64,
    endpoint: String,
    model_name: String,
    #[serde(default = "super::query::default_group")]
    routing_group: String,
    block_size: u32,
    dp_rank: Option<u32>,
    replay_endpoint: Option<String>,
}

async fn register(
    State(face): State<Face>,
    Json(request): Json<RegisterRequest>,
) -> Result<Response, Gone> {
    let registration = Registration {
        instance: request.instance_id,
        rank: request.dp_rank.unwrap_or(0),
        model: request.model_name,
        group: request.routing_group,
        block_size: request.block_size,
        endpoint: request.endpoint,
        replay: request.replay_endpoint,
    };
    let taken = face.ask_registry(|reply| Ask::Register(registration, reply));
    Ok(match taken.await? {
        Ok(()) => (StatusCode::CREATED, ok()).into_response(),
        Err(why) => failed(status(&why), why),
    })
}

/// Body of `/unregister`.
#[derive(Deserialize)]
struct UnregisterRequest {
    instance_id: u64,
    model_name: String,
    routing_group: Option<String>,
    dp_rank: Option<u32>,
}

async fn unregister(
    State(face): State<Face>,
    Json(request): Json<UnregisterRequest>,
) -> Result<Response, Gone> {
    let unregistration = Unregistration {
        instance: request.instance_id,
        model: request.model_name,
        group: request.routing_group,
        rank: request.dp_rank,
    };
    let gone = face.ask_registry(|reply| Ask::Unregister(unregistration, reply));
    Ok(match gone.await? {
        Ok(()) => ok().into_response(),
        Err(why) => failed(status(&why), why),
    })
}

fn ok() -> Json<Value> {
    Json(json!({ "status": "ok" }))
}

fn status(why: &RegistryError) -> StatusCode {
    use RegistryError as E;
    match why {
        E::Endpoint(_) | E::ReplayEndpoint(_) | E::BlockSize(_) | E::Rank(_) => {
            StatusCode::BAD_REQUEST
        }
        E::Elsewhere { .. } | E::Taken { .. } | E::OtherBlockSize { .. } | E::Full(_) => {
            StatusCode::CONFLICT
        }
        E::NoInstance(_) | E::OtherPartition { .. } | E::NoRank { .. } => StatusCode::NOT_FOUND,
    }
}

/// Which workers are asked for; without either, all.
#[derive(Deserialize)]
struct Filter {
    model_name: Option<String>,
    routing_group: Option<String>,
}

async fn workers(
    State(face): State<Face>,
    Query(filter): Query<Filter>,
) -> Result<Json<Vec<Value>>, Gone> {
    let is_wanted = |worker: &Listed| {
        filter
            .model_name
            .as_ref()
            .is_none_or(|m| *m == worker.model_name)
            && filter
                .routing_group
                .as_ref()
                .is_none_or(|g| *g == worker.routing_group)
    };
    let listed = face.ask_registry(Ask::Workers).await?;
    let connected = face.connected().await?;
    let wanted = listed.iter().filter(|worker| is_wanted(worker));
    let shown = wanted.map(|worker| show(worker, &connected));
    Ok(Json(shown.collect()))
}

/// A worker with the state of its streams. One that can't be read is tried again for ever: none is
/// ever paused or failed.
fn show(worker: &Listed, connected: &BTreeSet<OwnerId>) -> Value {
    let status = |rank| {
        let owner = OwnerId {
            worker: worker.instance_id,
            rank,
        };
        if connected.contains(&owner) {
            "active"
        } else {
            "pending"
        }
    };
    let listener = |(rank, endpoint): (&DpRank, &String)| {
        let listener = json!({ "endpoint": endpoint, "status": status(*rank) });
        (rank.to_string(), listener)
    };
    let listeners: serde_json::Map<String, Value> = worker.endpoints.iter().map(listener).collect();
    let pending = worker.endpoints.keys().map(|rank| status(*rank));
    let status = pending.min_by_key(|status| *status == "active");
    let status = status.unwrap_or("active");
    let mut shown = json!(worker);
    shown["status"] = status.into();
    shown["listeners"] = listeners.into();
    shown
}

async fn metrics(State(face): State<Face>) -> Result<Response, Gone> {
    let partitions = face.ask(Control::Partitions).await?;
    let listed = face.ask_registry(Ask::Workers).await?;
    let connected = face.connected().await?;
    let streams = listed.iter().flat_map(|worker| {
        let ranks = worker.endpoints.keys();
        ranks.map(|rank| OwnerId {
            worker: worker.instance_id,
            rank: *rank,
        })
    });
    let (active, pending): (Vec<OwnerId>, Vec<OwnerId>) =
        streams.partition(|id| connected.contains(id));
    let listeners = [("active", active.len()), ("pending", pending.len())];
    face.metrics
        .measure(partitions.len(), listed.len(), listeners);
    let content_type = [(header::CONTENT_TYPE, crate::metrics::CONTENT_TYPE)];
    Ok((content_type, Body::from(face.metrics.encode())).into_response())
}
