//! Dynamo's cost of sending a request to an owner, in blocks; lower is better.
//!
//! ```text
//! credit = overlap_score_credit x device + host_weight x host + disk_weight x (disk + external)
//!        + shared_cache_multiplier x shared_cache
//! cost   = prefill_load_scale x max(0, (active_prefill + isl) / block_size - credit)
//!        + active_blocks + request_blocks - blocks of it in use there already
//!        + decode_active_request_weight x active_requests
//! ```
//!
//! Where prefill tokens are not tracked, the prefill term falls away, and the credit is taken off
//! the blocks instead. Where blocks are not tracked, the request's own count for nothing.

use crate::load::Load;
use crate::overlap::Overlap;
use crate::policy::Policy;

/// The request's side of the cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    /// Prompt tokens; 0 where the prompt is not known.
    pub tokens: u32,
    /// Tokens to a block; 0 counts as 1.
    pub block_size: u32,
}

impl Demand {
    /// Complete blocks of the prompt: what the request will hold while it decodes.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        self.tokens / self.block_size.max(1)
    }

    /// Prompt tokens that an owner with this overlap still has to prefill.
    #[must_use]
    pub fn uncached_tokens(&self, overlap: &Overlap, policy: &Policy) -> u32 {
        self.tokens
            .saturating_sub(self.cached_tokens(overlap, policy))
    }

    /// Tokens that an owner with this overlap need not prefill. Tier weights above 1 can make them
    /// more than the prompt has.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    fn cached_tokens(&self, overlap: &Overlap, policy: &Policy) -> u32 {
        let cached = (overlap.effective(policy) * f64::from(self.block_size)).round();
        cached as u32
    }
}

/// The terms of a cost, in blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Prefill work, 0 where it is not tracked: what is booked there plus this prompt, less the credit, scaled.
    pub prefill: f64,
    /// Blocks to prefill, before scaling.
    pub prefill_blocks: f64,
    /// Credit for cached blocks, before scaling.
    pub credit: f64,
    /// Blocks in use there once this request is there too.
    pub decode: f64,
    /// The term for the number of requests.
    pub requests: f64,
}

impl Cost {
    /// The cost of one owner, on which `shared_blocks` of the request are in use already.
    #[must_use]
    pub fn new(
        demand: Demand,
        overlap: &Overlap,
        load: &Load,
        shared_blocks: u32,
        policy: &Policy,
    ) -> Self {
        let [device, host, disk, external] = overlap.by_tier().map(f64::from);
        let credit = policy.overlap_score_credit * device
            + policy.host_cache_hit_weight * host
            + policy.disk_cache_hit_weight * (disk + external)
            + policy.shared_cache_multiplier * f64::from(overlap.shared_cache);
        // Dynamo adds what is cached to what is not, which is the prompt unless weights exceed 1.
        let prompt = demand.tokens.max(demand.cached_tokens(overlap, policy));
        let queued = f64::from(load.prefill_tokens) + f64::from(prompt);
        let blocks = queued / f64::from(demand.block_size.max(1));
        // Prefixes in use are told a moment after the load that uses them has gone.
        let shared = shared_blocks.min(load.blocks);
        let own = if policy.tracking.active_blocks {
            demand.blocks().saturating_sub(shared)
        } else {
            0
        };
        let decode = f64::from(load.blocks) + f64::from(own);
        let prefill_blocks = (blocks - credit).max(0.0);
        let (prefill, decode) = if policy.tracking.prefill_tokens {
            (policy.prefill_load_scale * prefill_blocks, decode)
        } else if policy.overlap_score_credit > 0.0 {
            (0.0, (decode - credit).max(0.0))
        } else {
            (0.0, decode)
        };
        Self {
            prefill,
            prefill_blocks,
            credit,
            decode,
            requests: policy.decode_active_request_weight * f64::from(load.requests()),
        }
    }

    /// The sum that is compared.
    #[must_use]
    pub fn total(&self) -> f64 {
        self.prefill + self.decode + self.requests
    }
}

#[cfg(test)]
mod tests {
    use super::{Cost, Demand};
    use crate::load::Load;
    use crate::overlap::Overlap;
    use crate::policy::Policy;
    use crate::tracker::Tracking;

    const DEMAND: Demand = Demand {
        tokens: 64,
        block_size: 16,
    };

    fn total(device: u32, load: Load) -> f64 {
        let overlap = Overlap::new([device; 4]);
        Cost::new(DEMAND, &overlap, &load, 0, &Policy::default()).total()
    }

    #[test]
    fn worked_numbers_of_the_formula() {
        let a = total(
            3,
            Load {
                blocks: 10,
                ..Load::default()
            },
        );
        let b = total(
            0,
            Load {
                blocks: 5,
                ..Load::default()
            },
        );
        let b_busy = total(
            0,
            Load {
                blocks: 5,
                prefill_tokens: 64,
                ..Load::default()
            },
        );
        assert_eq!((a, b, b_busy), (15.0, 13.0, 17.0));
    }

    #[test]
    fn a_host_block_saves_three_quarters_of_its_prefill() {
        let overlap = Overlap::new([3, 4, 4, 4]);
        assert_eq!(DEMAND.uncached_tokens(&overlap, &Policy::default()), 4);
        assert_eq!(DEMAND.blocks(), 4);
    }

    #[test]
    fn a_block_of_a_shared_store_is_credited_and_still_counts_as_prefill() {
        let overlap = Overlap {
            shared_cache: 2,
            ..Overlap::new([1; 4])
        };
        let cost = Cost::new(DEMAND, &overlap, &Load::default(), 0, &Policy::default());
        assert_eq!((cost.credit, cost.prefill), (2.0, 2.0));
        assert_eq!(DEMAND.uncached_tokens(&overlap, &Policy::default()), 48);
    }

    #[test]
    fn credit_never_makes_prefill_negative() {
        let overlap = Overlap::new([4; 4]);
        let policy = Policy {
            overlap_score_credit: 3.0,
            ..Policy::default()
        };
        let cost = Cost::new(DEMAND, &overlap, &Load::default(), 0, &policy);
        assert_eq!((cost.prefill, cost.total()), (0.0, 4.0));
    }

    #[test]
    fn what_is_not_tracked_does_not_count() {
        let overlap = Overlap::new([3; 4]);
        let load = Load {
            prefill_tokens: 64,
            blocks: 10,
            ..Load::default()
        };
        let cost = |prefill_tokens, active_blocks, credit| {
            let policy = Policy {
                overlap_score_credit: credit,
                tracking: Tracking {
                    prefill_tokens,
                    active_blocks,
                    ..Tracking::default()
                },
                ..Policy::default()
            };
            Cost::new(DEMAND, &overlap, &load, 0, &policy).total()
        };
        assert_eq!(cost(true, true, 1.0), 5.0 + 14.0);
        assert_eq!(cost(false, true, 1.0), 14.0 - 3.0);
        assert_eq!(cost(false, true, 0.0), 14.0);
        assert_eq!(cost(true, false, 1.0), 5.0 + 10.0);
    }

    #[test]
    fn blocks_in_use_already_are_not_counted_twice() {
        let load = Load {
            blocks: 10,
            ..Load::default()
        };
        let decode = |shared| {
            let none = Overlap::default();
            Cost::new(DEMAND, &none, &load, shared, &Policy::default()).decode
        };
        assert_eq!([0, 3, 4, 9].map(decode), [14.0, 11.0, 10.0, 10.0]);
    }
}
