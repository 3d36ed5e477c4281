//! What the benches share: contents for the index, a fleet of the real parts to measure, a client
//! that costs little, and honest statistics.
//!
//! A bench prints tables, sets each number that has a target beside it, and writes both into
//! `target/bench/NAME.json`. A missed target is printed as missed; it is no failure.

pub mod chat;
pub mod corpus;
pub mod cpu;
pub mod feed;
pub mod fleet;
pub mod histogram;
pub mod http;
pub mod lookups;
pub mod modes;
pub mod noop;
pub mod plain;
pub mod prompt;
pub mod report;
pub mod sink;
pub mod spread;
