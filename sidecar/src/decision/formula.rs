//! The cost of a choice as one line.

use std::fmt;

use kv_core::decide::Price;
use kv_core::report::{Evidence, Weighed};

use super::shadow;
use crate::index::Field;

/// Of Dynamo's formula, `Formula for worker_1: 125.3 = 1.0 * 100.5 + 25.0 (cached_blocks: 15)`: the
/// weight of prefill times blocks to prefill, plus blocks in use with this request. A weight on the
/// number of requests adds its term.
///
/// Of a predicted delay, `Delay for worker_1: 41.0 = 20.0 + 15.0 + 4.0 + 1.0 + 1.0 ms
/// (cached_blocks: 15)`: the backlog, the prompt's own prefill, what it adds for requests that wait
/// and for those that decode, and what their number counts for.
///
/// What preferred taints multiply the sum by comes first, where that is not 1. A rank above 0 follows the worker after a dot; blocks that only a shared store has follow the
/// cached ones.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Formula {
    weighed: Weighed,
    scale: f64,
    price: Price,
    factor: f64,
}

impl Formula {
    /// Of a candidate as the filter weighed it.
    #[must_use]
    pub fn new(field: &Field, evidence: &Evidence, weighed: &Weighed) -> Self {
        let seen = shadow::scored_seen(field, evidence, weighed);
        Self {
            weighed: *weighed,
            scale: field.pool.policy.prefill_load_scale,
            price: seen.cost,
            factor: seen.candidate.factor,
        }
    }
}

impl fmt::Display for Formula {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Weighed {
            owner,
            overlap,
            shared_cache,
            ..
        } = self.weighed;
        let name = match self.price {
            Price::Blocks(_) => "Formula",
            Price::Delay(_) => "Delay",
        };
        write!(f, "{name} for worker_{}", owner.worker)?;
        if owner.rank > 0 {
            write!(f, ".{}", owner.rank)?;
        }
        write!(f, ": {:.1} = ", self.weighed.cost)?;
        if self.factor != 1.0 {
            write!(f, "{:.2} * ", self.factor)?;
        }
        match self.price {
            Price::Blocks(cost) => {
                let scale = self.scale;
                let prefill = cost.prefill_blocks;
                write!(f, "{scale:.1} * {prefill:.1} + {:.1}", cost.decode)?;
                if cost.requests > 0.0 {
                    write!(f, " + {:.1}", cost.requests)?;
                }
            }
            Price::Delay(delay) => {
                write!(f, "{:.1} + {:.1} + ", delay.backlog, delay.own)?;
                write!(f, "{:.1} + {:.1} + ", delay.waiting, delay.decoding)?;
                write!(f, "{:.1} ms", delay.requests)?;
            }
        }
        let cached: u64 = overlap.into_iter().map(u64::from).sum();
        write!(f, " (cached_blocks: {cached}")?;
        if shared_cache > 0 {
            write!(f, ", shared_cache: {shared_cache}")?;
        }
        write!(f, ")")
    }
}
