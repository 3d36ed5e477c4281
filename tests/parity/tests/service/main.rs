//! Our HTTP interfaces answer as Dynamo's services of the same names do.

mod indexer;
mod select;
mod sidecar;
