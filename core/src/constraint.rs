//! What a request asks of the worker that it goes to, besides what its prompt speaks for.

use serde::{Deserialize, Serialize};

use crate::id::{DpRank, WorkerId};

/// Workers, or endpoints, that a request may list.
pub const MAX_ALLOWED: usize = 1024;
/// Taints of one kind that a request may list.
pub const MAX_TAINTS: usize = 32;
/// Longest taint, in bytes.
pub const MAX_TAINT: usize = 256;

/// The worker that a request names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    /// The worker.
    pub worker: WorkerId,
    /// Its data-parallel rank; without it any of the worker's.
    pub rank: Option<DpRank>,
}

/// All of a request's constraints. Lists are bounded by [`MAX_ALLOWED`] and [`MAX_TAINTS`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Constraints {
    /// The one worker that may have it.
    pub pin: Option<Pin>,
    /// The workers that may have it; `None` stands for all.
    pub workers: Option<Vec<WorkerId>>,
    /// The endpoints that may have it, each `ip` or `ip:port`; `None` stands for all.
    pub endpoints: Option<Vec<String>>,
    /// Taints that its worker must have, all of them.
    pub required_taints: Vec<String>,
    /// Taints that make a worker better by a weight above 0 or worse by one below.
    pub preferred_taints: Vec<(String, f32)>,
}

impl Constraints {
    /// Whether nothing is asked.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}
