//! Simulated LLM engines and a load generator, for fleets without accelerators.
//!
//! An [`engine::Engine`] serves OpenAI's API over a paged KV cache with eviction, takes the time a
//! real engine would, and publishes real KV events, on NATS or as vLLM does on a socket of its own.
//! Its cache may have further levels ([`flexkv`]). [`load`] sends reproducible workloads
//! to any OpenAI endpoint and reports what clients and engines saw.

#![forbid(unsafe_code)]

mod api;
mod cache;
pub mod chain;
mod change;
pub mod engine;
pub mod flexkv;
pub mod load;
pub mod metrics;
pub mod own;
pub mod publish;
pub mod rng;
mod scheduler;
mod snapshot;
pub mod token;

pub use api::WORKER_ID_HEADER;
pub use scheduler::Limits;
