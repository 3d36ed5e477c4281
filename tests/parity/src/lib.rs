//! Dynamo's own router code beside ours: what both say about the same events and requests.
//!
//! The crates of Dynamo 1.6.1 are the oracle. Nothing of the product depends on this workspace.

pub mod content;
pub mod history;
pub mod oracle;
pub mod workload;
