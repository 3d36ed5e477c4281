//! The decision core of Envoy KV Router.
//!
//! Everything here is pure: no I/O, no clock, no environment, no threads. Time, randomness and ids
//! come in as arguments. The crate is compiled twice, to wasm32 for the Envoy filter and natively
//! for the sidecar, and both must agree bit for bit.

#![cfg_attr(
    not(test),
    deny(
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::unwrap_used
    )
)]
#![forbid(unsafe_code)]

pub mod affinity;
pub mod approximate;
pub mod board;
pub mod chunk;
pub mod constraint;
pub mod cost;
pub mod decide;
pub mod delay;
pub mod device;
pub mod event;
pub mod family;
pub mod handover;
pub mod hash;
pub mod head;
pub mod holdings;
pub mod id;
pub mod index;
pub mod key;
pub mod lease;
pub mod ledger;
pub mod load;
pub mod loads;
pub mod naive;
pub mod overlap;
pub mod page;
pub mod pick;
pub mod policy;
pub mod queue;
pub mod reader;
pub mod replica;
pub mod report;
pub mod rng;
pub mod scan;
pub mod surface;
pub mod table;
pub mod text;
pub mod tracker;
pub mod wire;
