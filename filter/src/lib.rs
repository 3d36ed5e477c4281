//! The Envoy filter of Envoy KV Router.
//!
//! A Proxy-Wasm module that holds a generation request until its prompt is read, looks up which
//! workers have how much of it cached, and names the cheapest one in
//! `x-gateway-destination-endpoint`. One VM per Envoy thread runs it; what they share stands in
//! Envoy's shared data (pages, worker table) and in its gauges (load).
//!
//! The decisions are made in `kv_core`. This crate is what connects them to Envoy:
//!
//! - [`host`]: everything that is asked of Envoy, behind one trait; `abi` implements it.
//! - [`vm`]: what one VM is made of, and the callbacks that Envoy calls; `plugin` is their way
//!   through the SDK.
//! - [`request`], [`hold`], [`choose`], [`routed`], [`record`]: the life of a request.
//! - [`text`]: what the sidecar is asked about prompts that are text; [`models`], [`refusal`]: what is
//!   answered here.
//! - [`world`], [`fleet`], [`lanes`], [`correction`]: pages, worker table and load as this VM sees
//!   them.
//! - [`waiting`], [`mailbox`]: requests that wait for a worker to have room.
//! - [`board`]: the live prompts of all VMs.
//! - [`bookings`], [`outbox`]: what this VM has added to the load, and its reports of it.
//! - [`bridge`], [`relay`]: the one VM of a process that copies the sidecar's writes into shared
//!   data and passes the reports of all VMs on to it.
//!
//! A panic would take a whole Envoy thread out of routing, so nothing here can panic.

#![cfg_attr(
    not(test),
    deny(
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::unwrap_used
    )
)]

#[cfg(target_arch = "wasm32")]
mod abi;
pub mod answer;
pub mod board;
pub mod bookings;
pub mod bridge;
#[cfg(feature = "chaos")]
pub mod chaos;
pub mod choose;
pub mod config;
pub mod correction;
pub mod fleet;
pub mod header_map;
pub mod hints;
pub mod hold;
pub mod host;
pub mod inquiries;
pub mod lanes;
pub mod link;
pub mod mailbox;
pub mod metrics;
pub mod models;
pub mod outbox;
mod placement;
#[cfg(target_arch = "wasm32")]
mod plugin;
pub mod reason;
pub mod record;
pub mod refusal;
pub mod relay;
pub mod request;
pub mod routed;
pub mod session;
mod text;
pub mod usage;
pub mod vm;
pub mod waiting;
pub mod watchdog;
pub mod world;

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;
