//! What registrations come to.

use std::net::SocketAddr;

use kv_core::id::WorkerId;
use serde::Serialize;

/// What a registration did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The worker is there for the first time.
    Joined,
    /// It says something else than before.
    Changed,
    /// Its lease is extended.
    Renewed,
}

impl Outcome {
    /// Label for metrics.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::Joined => "joined",
            Self::Changed => "changed",
            Self::Renewed => "renewed",
        }
    }
}

/// Why a registration is refused.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RegisterError {
    /// The configuration takes none.
    #[error("workers can't register: the configuration has no `registration`")]
    Off,
    /// It is not what a worker says.
    #[error("the registration is not valid: {0}")]
    Body(String),
    /// Another worker than the path or the subject names.
    #[error("the registration is of worker {said}, not of {expected}")]
    OtherWorker {
        /// Whom the body names.
        said: WorkerId,
        /// Whom the path or the subject names.
        expected: WorkerId,
    },
    /// An address outside the configured networks, or none.
    #[error("{0} is not an address inside registration.networks")]
    Network(String),
    /// A source of events that only the configuration file may name.
    #[error("events.http can't be registered: it belongs into the configuration file")]
    Events,
    /// The pool or the model is not known.
    #[error("no pool {0}")]
    NoPool(String),
    /// Its blocks are of another size.
    #[error("block_size must be {expected}, which pool {pool:?} has, not {said}")]
    BlockSize {
        /// The pool.
        pool: String,
        /// Its block size.
        expected: u32,
        /// What was said.
        said: u32,
    },
    /// A lease that is too short or too long.
    #[error("ttl_secs must be from 1 to {longest}, not {said}")]
    Ttl {
        /// The longest.
        longest: f64,
        /// What was said.
        said: f64,
    },
    /// The configuration file has this worker.
    #[error("worker {0} is in the configuration file")]
    OfFile(WorkerId),
    /// Another worker has the endpoint.
    #[error("endpoint {endpoint} is worker {other}'s")]
    EndpointTaken {
        /// The endpoint.
        endpoint: SocketAddr,
        /// Whose it is.
        other: WorkerId,
    },
    /// There is no room.
    #[error("too many {0}")]
    Full(&'static str),
    /// No such worker has registered.
    #[error("worker {0} is not registered")]
    NotRegistered(WorkerId),
    /// The sidecar is shutting down.
    #[error("the sidecar is shutting down")]
    ShuttingDown,
}

impl RegisterError {
    /// Label for metrics and answers.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Off => "registration_off",
            Self::Body(_) => "invalid_body",
            Self::OtherWorker { .. } => "other_worker",
            Self::Network(_) => "network",
            Self::Events => "events",
            Self::NoPool(_) => "no_such_pool",
            Self::BlockSize { .. } => "block_size",
            Self::Ttl { .. } => "ttl",
            Self::OfFile(_) => "of_file",
            Self::EndpointTaken { .. } => "endpoint_taken",
            Self::Full(_) => "full",
            Self::NotRegistered(_) => "not_registered",
            Self::ShuttingDown => "shutting_down",
        }
    }
}
