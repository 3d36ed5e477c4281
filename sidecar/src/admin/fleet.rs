//! `/v1/workers`: workers register under a lease, extend it and leave.

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use kv_core::id::WorkerId;
use tokio::sync::oneshot;

use super::Admin;
use super::error::AdminError;
use crate::fleet::outcome::{Outcome, RegisterError};
use crate::fleet::said::Said;
use crate::fleet::{Ask, Joined};

/// `POST /v1/workers`: 201 for a worker that was not there, 200 for any other.
pub(super) async fn join(
    State(admin): State<Admin>,
    body: Bytes,
) -> Result<(StatusCode, Json<Joined>), AdminError> {
    let said = Box::new(Said::read(&body)?);
    answer(ask(&admin, |reply| Ask::Join(said, reply)).await??)
}

/// `PUT /v1/workers/ID`: the same, or without a body a mere sign of life.
pub(super) async fn renew(
    State(admin): State<Admin>,
    Path(id): Path<WorkerId>,
    body: Bytes,
) -> Result<(StatusCode, Json<Joined>), AdminError> {
    if body.is_empty() {
        return answer(ask(&admin, |reply| Ask::Renew(id, reply)).await??);
    }
    let said = Box::new(Said::read_of(&body, id)?);
    answer(ask(&admin, |reply| Ask::Join(said, reply)).await??)
}

/// `DELETE /v1/workers/ID`: 204 once no Envoy sends it requests any more; those that it has run on.
pub(super) async fn leave(
    State(admin): State<Admin>,
    Path(id): Path<WorkerId>,
) -> Result<StatusCode, AdminError> {
    ask(&admin, |reply| Ask::Leave(id, reply)).await??;
    Ok(StatusCode::NO_CONTENT)
}

async fn ask<T>(
    admin: &Admin,
    question: impl FnOnce(oneshot::Sender<T>) -> Ask,
) -> Result<T, AdminError> {
    let fleet = admin.fleet.as_ref().ok_or(RegisterError::Off)?;
    let answer = crate::ask::ask(fleet.asks(), question).await;
    answer.ok_or(AdminError::ShuttingDown)
}

fn answer(joined: Joined) -> Result<(StatusCode, Json<Joined>), AdminError> {
    let status = match joined.outcome {
        Outcome::Joined => StatusCode::CREATED,
        Outcome::Changed | Outcome::Renewed => StatusCode::OK,
    };
    Ok((status, Json(joined)))
}

pub(super) fn status(error: &RegisterError) -> StatusCode {
    match error {
        RegisterError::Off | RegisterError::Network(_) | RegisterError::Events => {
            StatusCode::FORBIDDEN
        }
        RegisterError::Body(_)
        | RegisterError::OtherWorker { .. }
        | RegisterError::BlockSize { .. }
        | RegisterError::Ttl { .. } => StatusCode::BAD_REQUEST,
        RegisterError::NoPool(_) | RegisterError::NotRegistered(_) => StatusCode::NOT_FOUND,
        RegisterError::OfFile(_) | RegisterError::EndpointTaken { .. } => StatusCode::CONFLICT,
        RegisterError::Full(_) | RegisterError::ShuttingDown => StatusCode::SERVICE_UNAVAILABLE,
    }
}
