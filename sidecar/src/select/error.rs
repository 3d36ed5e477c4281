//! Why there is no answer.

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use kv_core::id::WorkerId;

use crate::indexer::failed;

/// The messages are Dynamo's where Dynamo has the case.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SelectError {
    /// Nobody at all takes requests.
    #[error("no schedulable workers are available")]
    NoWorkers,
    /// Nobody of the model does.
    #[error("no schedulable workers for model={model} routing_group={group}")]
    NoneFor {
        /// The model.
        model: String,
        /// The routing group.
        group: String,
    },
    /// None of those that do may take this request.
    #[error("no endpoints available to route work")]
    NoEndpoints,
    /// Those that may take it have as many requests as they take.
    #[error("all eligible workers are overloaded")]
    Overloaded,
    /// The request asks for a worker and excludes it.
    #[error("pinned worker {0} is not in allowed worker set")]
    PinnedNotAllowed(WorkerId),
    /// A key of the body is missing.
    #[error("{0} is required without token_ids")]
    Missing(&'static str),
    /// A prompt of nothing.
    #[error("isl_tokens must be greater than 0")]
    NoTokens,
    /// Two lists that belong together.
    #[error("block_hashes length {blocks} must match sequence_hashes length {sequences}")]
    Lengths {
        /// Of the one.
        blocks: usize,
        /// Of the other.
        sequences: usize,
    },
    /// More is to be computed than there is.
    #[error("effective_prefill_tokens ({effective}) must not exceed isl_tokens ({tokens})")]
    Effective {
        /// To be computed.
        effective: u64,
        /// There is.
        tokens: u32,
    },
    /// No share of anything.
    #[error("decay_fraction must be between 0.0 and 1.0")]
    Decay,
    /// A key that can't mean what it says.
    #[error("{0}")]
    Invalid(String),
    /// The id is in use.
    #[error("selection {0} is already reserved or being reserved")]
    Reserved(String),
    /// There is nothing to reserve under this id.
    #[error(
        "no pending selection {id} for model={model} routing_group={group} (expired, already used, or never selected)"
    )]
    NotPending {
        /// The id.
        id: String,
        /// The model.
        model: String,
        /// The routing group.
        group: String,
    },
    /// The worker takes no requests.
    #[error("schedulable worker {worker} not found for model={model} routing_group={group}")]
    NotSchedulable {
        /// The worker.
        worker: WorkerId,
        /// The model.
        model: String,
        /// The routing group.
        group: String,
    },
    /// Nothing is reserved under this id.
    #[error("reservation {0} not found")]
    NotReserved(String),
    /// No such worker has registered.
    #[error("worker {0} not found")]
    NoWorker(WorkerId),
    /// The file has it.
    #[error("worker {0} is of the configuration")]
    Configured(WorkerId),
    /// Load is exchanged in another way.
    #[error("replica sync is not enabled")]
    NoReplicaSync,
    /// There is no room.
    #[error("{0} requests are booked already")]
    Full(usize),
    /// The sidecar ends.
    #[error("the select service is shutting down")]
    Gone,
}

impl SelectError {
    /// Label for metrics.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::NoWorkers | Self::NoneFor { .. } => "not_ready",
            Self::NoEndpoints => "no_endpoints",
            Self::Overloaded => "overloaded",
            Self::PinnedNotAllowed(_)
            | Self::Missing(_)
            | Self::NoTokens
            | Self::Lengths { .. }
            | Self::Effective { .. }
            | Self::Decay
            | Self::Invalid(_) => "bad_request",
            Self::Reserved(_) | Self::Configured(_) | Self::NoReplicaSync => "conflict",
            Self::NotPending { .. }
            | Self::NotSchedulable { .. }
            | Self::NotReserved(_)
            | Self::NoWorker(_) => "not_found",
            Self::Full(_) => "full",
            Self::Gone => "shutting_down",
        }
    }

    fn status(&self) -> StatusCode {
        match self.kind() {
            "bad_request" => StatusCode::BAD_REQUEST,
            "conflict" => StatusCode::CONFLICT,
            "not_found" => StatusCode::NOT_FOUND,
            "full" | "overloaded" => StatusCode::TOO_MANY_REQUESTS,
            _ => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

impl IntoResponse for SelectError {
    fn into_response(self) -> Response {
        failed(self.status(), self)
    }
}
