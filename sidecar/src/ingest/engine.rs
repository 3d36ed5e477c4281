//! Events as engines publish them themselves.

pub mod media;
