//! The sidecar's HTTP API: health, metrics and `/v1`.

mod error;
mod explain;
mod load;

use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::{ConnectInfo, DefaultBodyLimit, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use kv_core::id::OwnerId;
use serde::Serialize;
use tokio::sync::{mpsc, oneshot};

use crate::index::{Control, IndexReport, OwnerReport, PoolReport};
use crate::metrics::{CONTENT_TYPE, Metrics};
use error::AdminError;
use load::{Available, Envoy, LoadReport};

/// Longest body of `/v1/explain`, in bytes.
const LONGEST_BODY: usize = 64 << 20;

/// What the handlers work with.
#[derive(Clone, Debug)]
pub struct Admin {
    control: mpsc::Sender<Control>,
    metrics: Arc<Metrics>,
    envoy: Envoy,
}

impl Admin {
    /// Asks the index through `control`, and Envoy's admin interface for load.
    #[must_use]
    pub fn new(
        control: mpsc::Sender<Control>,
        metrics: Arc<Metrics>,
        envoy_admin: SocketAddr,
    ) -> Self {
        Self {
            control,
            metrics,
            envoy: Envoy::new(envoy_admin),
        }
    }

    async fn ask<T>(
        &self,
        question: impl FnOnce(oneshot::Sender<T>) -> Control,
    ) -> Result<T, AdminError> {
        let (reply, answer) = oneshot::channel();
        self.control
            .send(question(reply))
            .await
            .map_err(|_| AdminError::ShuttingDown)?;
        answer.await.map_err(|_| AdminError::ShuttingDown)
    }
}

/// The routes. `/v1` shows content, so it answers only peers on this machine; serve it with
/// connection info.
pub fn router(admin: Admin) -> Router {
    let content = Router::new()
        .route("/v1/workers", get(workers))
        .route("/v1/index", get(index))
        .route("/v1/explain", post(explain::explain))
        .route_layer(from_fn(only_local));
    Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .merge(content)
        .fallback(async || AdminError::NoSuchPath)
        .method_not_allowed_fallback(async || AdminError::WrongMethod)
        .layer(DefaultBodyLimit::max(LONGEST_BODY))
        .with_state(admin)
}

async fn only_local(
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    request: Request,
    next: Next,
) -> Result<Response, AdminError> {
    if peer.ip().to_canonical().is_loopback() {
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

/// Answer of `/v1/workers`.
#[derive(Debug, Serialize)]
struct Workers {
    /// Whether the load below could be had from Envoy.
    load: Available,
    pools: Vec<LoadedPool>,
}

#[derive(Debug, Serialize)]
struct LoadedPool {
    #[serde(flatten)]
    pool: PoolReport,
    owners: Vec<LoadedOwner>,
}

#[derive(Debug, Serialize)]
struct LoadedOwner {
    #[serde(flatten)]
    owner: OwnerReport,
    /// `null` when Envoy can't be asked.
    load: Option<LoadReport>,
}

async fn workers(State(admin): State<Admin>) -> Result<Json<Workers>, AdminError> {
    let pools = admin.ask(Control::Workers).await?;
    let loads = admin.envoy.loads().await;
    let pools = pools.into_iter().map(|mut pool| {
        let owners = std::mem::take(&mut pool.owners);
        let owners = owners.into_iter().map(|owner| {
            let id = OwnerId {
                worker: owner.worker,
                rank: owner.rank,
            };
            let load = loads.as_ref().ok().map(|loads| loads.of(&pool.pool, id));
            LoadedOwner {
                owner,
                load: load.map(LoadReport::from),
            }
        });
        LoadedPool {
            owners: owners.collect(),
            pool,
        }
    });
    Ok(Json(Workers {
        pools: pools.collect(),
        load: Available::of(&loads),
    }))
}
