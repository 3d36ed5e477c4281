//! The parts of a running installation, as tests start them: real NATS, real `kv-router`, real
//! Envoy with the real filter, and engines that are simulated or merely answer.
//!
//! Everything listens on loopback, on ports chosen at run time, and dies with its value.

pub mod client;
pub mod envoy;
pub mod events;
pub mod nats;
pub mod place;
pub mod process;
pub mod rude;
pub mod sidecar;
pub mod stack;
pub mod upstream;
pub mod verdicts;
pub mod wait;
