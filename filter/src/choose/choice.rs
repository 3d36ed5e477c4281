//! What a choice comes to.

use kv_core::cost::Demand;
use kv_core::decide::Scored;
use kv_core::id::OwnerId;

use crate::bookings::Tentative;
use crate::reason::Reason;

/// Where a request goes.
#[derive(Debug)]
pub struct Choice {
    /// Endpoints of the chosen worker and of the one to try after it; `None` leaves the choice to
    /// Envoy.
    pub endpoints: Option<String>,
    /// Position of the chosen owner in its pool.
    pub owner: Option<usize>,
    /// Position of the owner to try after it.
    pub second: Option<usize>,
    /// Why.
    pub reason: Reason,
    /// Whether nobody was chosen because all have as many requests as they take.
    pub is_full: bool,
    /// What was booked.
    pub booking: Option<Tentative>,
    /// The longest prefix of the prompt that some owner holds: its blocks, and the hash of the last.
    pub prefix: Option<(u32, u64)>,
    /// Share of the overlaps that counted.
    pub trust: f64,
    /// When the loads were read, Unix nanoseconds.
    pub read_ns: u64,
    /// What was weighed.
    pub weighed: Weighed,
}

/// The candidates of a decision.
#[derive(Debug, Default)]
pub struct Weighed {
    /// Size of the prompt.
    pub demand: Demand,
    /// All that were scored.
    pub scored: Vec<Scored>,
    /// Position of the chosen one.
    pub chosen: Option<usize>,
    /// What prompts of the pool usually take to prefill, milliseconds; 0 where nothing predicts.
    pub typical_ms: f64,
}

impl Weighed {
    /// The chosen one.
    #[must_use]
    pub fn picked(&self) -> Option<&Scored> {
        self.scored.get(self.chosen?)
    }
}

/// Why a request is not sent to any worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Barred {
    /// All that could take it are busy, or others of its class wait.
    Busy(Busy),
    /// All that could take it have more load than they are to have.
    Overloaded,
}

/// A request that is to wait.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Busy {
    /// Position of its class.
    pub class: usize,
    /// Prompt tokens that the best owner has cached.
    pub cached_tokens: u32,
    /// The only owners that can take it; empty for any of the pool.
    pub owners: Vec<OwnerId>,
}
