//! The sidecar of Envoy KV Router.
//!
//! It takes KV events in, keeps the index of which worker holds which blocks, and streams its pages
//! and the worker table into Envoy, where the filter decides with them.

pub mod admin;
mod ask;
pub mod bootstrap;
pub mod bridge;
pub mod check_events;
pub mod config;
pub mod decision;
pub mod dump;
pub mod ejection;
pub mod envoy;
pub mod fleet;
pub mod index;
pub mod indexer;
pub mod ingest;
pub mod load;
pub mod look;
pub mod metrics;
pub mod peers;
pub mod queue;
pub mod select;
pub mod serve;
pub mod state;
pub mod text;
pub mod token;
pub mod watch;
pub mod xds;
