//! The cost of a choice as one line.

use std::fmt;

use kv_core::cost::Cost;
use kv_core::report::{Evidence, Weighed};

use super::shadow;
use crate::index::Field;

/// Shows as `Formula for worker_1: 125.3 = 1.0 * 100.5 + 25.0 (cached_blocks: 15)`: the weight of
/// prefill times blocks to prefill, plus blocks in use with this request. A weight on the number of
/// requests adds its term; a rank above 0 follows the worker after a dot.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Formula {
    weighed: Weighed,
    scale: f64,
    prefill_blocks: f64,
    decode_blocks: f64,
    requests: f64,
}

impl Formula {
    /// Of a candidate as the filter weighed it.
    #[must_use]
    pub fn new(field: &Field, evidence: &Evidence, weighed: &Weighed) -> Self {
        let policy = shadow::trusted(&field.pool.policy, evidence);
        let demand = shadow::demand(field, evidence);
        let (overlap, load) = (shadow::overlap(weighed), shadow::load(weighed));
        let cost = Cost::new(demand, &overlap, &load, weighed.shared_blocks, &policy);
        let queued = f64::from(weighed.prefill_tokens) + f64::from(demand.tokens);
        let blocks = queued / f64::from(demand.block_size.max(1));
        Self {
            weighed: *weighed,
            scale: policy.prefill_load_scale,
            prefill_blocks: (blocks - cost.credit).max(0.0),
            decode_blocks: cost.decode,
            requests: cost.requests,
        }
    }
}

impl fmt::Display for Formula {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Weighed { owner, overlap, .. } = self.weighed;
        write!(f, "Formula for worker_{}", owner.worker)?;
        if owner.rank > 0 {
            write!(f, ".{}", owner.rank)?;
        }
        let (cost, scale) = (self.weighed.cost, self.scale);
        let (prefill, decode) = (self.prefill_blocks, self.decode_blocks);
        write!(f, ": {cost:.1} = {scale:.1} * {prefill:.1} + {decode:.1}")?;
        if self.requests > 0.0 {
            write!(f, " + {:.1}", self.requests)?;
        }
        let cached: u64 = overlap.into_iter().map(u64::from).sum();
        write!(f, " (cached_blocks: {cached})")
    }
}
