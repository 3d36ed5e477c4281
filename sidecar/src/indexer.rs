//! The standalone indexer: Dynamo's HTTP interface to the index, on a port of its own.
//!
//! Paths, bodies and messages are those of Dynamo 1.6.1's `python -m dynamo.indexer`. It shows the
//! same index that requests are routed by. Workers may register to be indexed alone: nothing is
//! ever routed to them.

mod dump;
mod metrics;
mod query;
mod registry;
mod routes;

pub use metrics::IndexerMetrics;
pub(crate) use query::Held;
pub(crate) use registry::model_of;
pub use registry::{Ask, Listed, Registration, Registry, RegistryError, Unregistration};
pub(crate) use routes::failed;
pub use routes::{Face, router};

/// Routing group of what names none.
pub const DEFAULT_GROUP: &str = "default";
