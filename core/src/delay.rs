//! The predicted delay of sending a request to an owner, in milliseconds; lower is better.
//!
//! ```text
//! own     = uncached tokens x milliseconds to a token
//! backlog = what is left of prefill there, between backlog_floor of what is booked and all of it
//! cost    = backlog + own
//!         + own x waiting_delay_weight x requests without a first token      they wait for it
//!         + own x decoding_delay_weight x min(requests decoding, 64)         they stall for it
//!         + request_delay_weight x typical own x requests                    batches grow
//! ```
//!
//! Blocks that requests under way there use are cached whole. Of the blocks beyond them, each counts
//! by the part of its prefill that it saves: on the device `overlap_score_credit`, on the host
//! `host_cache_hit_weight`, on disk or in an external store `disk_cache_hit_weight`, in a store that
//! the workers share `shared_cache_multiplier`.

use serde::{Deserialize, Serialize};

use crate::cost::Demand;
use crate::load::Load;
use crate::overlap::Overlap;
use crate::policy::Policy;
use crate::table::Traits;

/// Requests decoding past which more of them stall no worse: engines run batches of bounded size.
const MOST_DECODING: u16 = 64;
/// Part of the typical own prefill that one decision makes.
const SHARE: f64 = 0.01;

/// Weights of the terms.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Weights {
    /// Part of the booked prefill that counts however long ago it was booked.
    pub backlog_floor: f64,
    /// Weight of each request that waits for its first token.
    pub waiting: f64,
    /// Weight of each request that decodes.
    pub decoding: f64,
    /// Weight of each request there, in typical prefills.
    pub requests: f64,
    /// Costs that differ by no more than this are alike, milliseconds.
    pub band_ms: f64,
    /// Milliseconds to prefill a token, of an owner of which nothing has been learned.
    pub prefill_ms_per_token: f64,
}

impl Default for Weights {
    fn default() -> Self {
        Self {
            backlog_floor: 0.3,
            waiting: 0.25,
            decoding: 0.03,
            requests: 0.05,
            band_ms: 2.0,
            prefill_ms_per_token: 0.05,
        }
    }
}

impl Weights {
    /// Nanoseconds that an owner takes to prefill a token, at least 1.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    pub fn prefill_ns(&self, traits: &Traits) -> u32 {
        match traits.prefill_ns_per_token {
            0 => (self.prefill_ms_per_token * 1e6) as u32,
            learned => learned,
        }
        .max(1)
    }
}

/// When an owner is taken to be done with its prefills, and how fast it is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pace {
    /// Milliseconds until then; negative since it was.
    pub finish_ms: f64,
    /// Milliseconds to prefill a token.
    pub ms_per_token: f64,
}

/// The terms of a predicted delay, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Delay {
    /// Prefill that is to be done there before.
    pub backlog: f64,
    /// Prefill of this prompt.
    pub own: f64,
    /// What it adds for requests that wait for their first token.
    pub waiting: f64,
    /// What it adds for requests that decode.
    pub decoding: f64,
    /// What the number of requests counts for.
    pub requests: f64,
}

impl Delay {
    /// The delay at an owner. `typical_ms` is what prompts of the pool usually take.
    #[must_use]
    pub fn new(
        demand: Demand,
        uncached_tokens: u32,
        load: &Load,
        pace: &Pace,
        typical_ms: f64,
        policy: &Policy,
    ) -> Self {
        let weights = &policy.delay;
        let own = f64::from(uncached_tokens.min(demand.tokens)) * pace.ms_per_token;
        let booked = f64::from(load.prefill_tokens) * pace.ms_per_token;
        let decoding = load.decoding.min(MOST_DECODING);
        Self {
            backlog: pace
                .finish_ms
                .clamp(weights.backlog_floor.min(1.0) * booked, booked),
            own,
            waiting: own * weights.waiting * f64::from(load.waiting),
            decoding: own * weights.decoding * f64::from(decoding),
            requests: weights.requests * typical_ms * f64::from(load.requests()),
        }
    }

    /// The sum that is compared.
    #[must_use]
    pub fn total(&self) -> f64 {
        self.backlog + self.own + self.waiting + self.decoding + self.requests
    }
}

/// Prompt tokens that an owner still has to prefill: all but the cached blocks, and never none,
/// because an engine computes at least the last token and with it the last block.
#[must_use]
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
pub fn uncached_tokens(
    demand: Demand,
    overlap: &Overlap,
    shared_blocks: u32,
    policy: &Policy,
) -> u32 {
    let block = demand.block_size.max(1);
    let weights = [
        policy.overlap_score_credit,
        policy.host_cache_hit_weight,
        policy.disk_cache_hit_weight,
        policy.disk_cache_hit_weight,
    ];
    let [.., held] = overlap.depth;
    let in_store = (
        held.saturating_add(overlap.shared_cache),
        policy.shared_cache_multiplier,
    );
    let depths = overlap.depth.into_iter().zip(weights);
    let mut known = shared_blocks;
    let mut credit = f64::from(shared_blocks);
    for (depth, weight) in depths.chain([in_store]) {
        credit += weight * f64::from(depth.saturating_sub(known));
        known = known.max(depth);
    }
    let usable = demand.tokens.saturating_sub(1) / block;
    let cached = credit.min(f64::from(usable));
    let cached = (cached * f64::from(block)).round() as u32;
    demand.tokens.saturating_sub(cached)
}

/// The typical own prefill after one more decision.
#[must_use]
pub fn typical(before: Option<f64>, own_ms: f64) -> f64 {
    before.map_or(own_ms, |before| before + SHARE * (own_ms - before))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEMAND: Demand = Demand {
        tokens: 1_000,
        block_size: 16,
    };

    fn delay(load: Load, finish_ms: f64) -> Delay {
        let pace = Pace {
            finish_ms,
            ms_per_token: 0.05,
        };
        Delay::new(DEMAND, 400, &load, &pace, 100.0, &Policy::default())
    }

    #[test]
    fn worked_numbers_of_each_term() {
        let load = Load {
            prefill_tokens: 2_000,
            waiting: 2,
            decoding: 10,
            blocks: 7,
        };
        let delay = delay(load, 60.0);
        assert!((delay.backlog - 60.0).abs() < 1e-9);
        assert!((delay.own - 20.0).abs() < 1e-9);
        assert!((delay.waiting - 10.0).abs() < 1e-9);
        assert!((delay.decoding - 6.0).abs() < 1e-9);
        assert!((delay.requests - 60.0).abs() < 1e-9);
        assert!((delay.total() - 156.0).abs() < 1e-9);
    }

    #[test]
    fn the_backlog_drains_and_neither_vanishes_nor_exceeds_what_is_booked() {
        let load = Load {
            prefill_tokens: 2_000,
            waiting: 1,
            ..Load::default()
        };
        let backlogs = [-5.0, 10.0, 60.0, 900.0].map(|finish| delay(load, finish).backlog);
        assert_eq!(backlogs, [30.0, 30.0, 60.0, 100.0]);
        assert_eq!(delay(Load::default(), 900.0).backlog, 0.0);
    }

    #[test]
    fn stalls_of_decoders_are_capped() {
        let decoding = |decoding| {
            let load = Load {
                decoding,
                ..Load::default()
            };
            delay(load, 0.0).decoding
        };
        assert!(decoding(64) > decoding(63));
        assert_eq!(decoding(64), decoding(640));
    }

    #[test]
    fn what_is_under_way_counts_as_cached_and_the_last_block_never_does() {
        let policy = Policy::default();
        let held = |device, host| Overlap::new([device, host, host, host]);
        let uncached = |overlap, shared| uncached_tokens(DEMAND, &overlap, shared, &policy);
        assert_eq!(uncached(held(10, 10), 0), 840);
        assert_eq!(uncached(held(10, 10), 20), 680);
        assert_eq!(uncached(held(10, 18), 0), 1_000 - 16 * 16);
        assert_eq!(uncached(held(10, 18), 14), 1_000 - 17 * 16);
        assert_eq!(uncached(held(62, 62), 0), 8);
        let whole = Demand {
            tokens: 64,
            block_size: 16,
        };
        assert_eq!(uncached_tokens(whole, &held(4, 4), 4, &policy), 16);
        let lost = policy.trusted(0.0);
        assert_eq!(uncached_tokens(DEMAND, &held(10, 10), 0, &lost), 1_000);
        assert_eq!(
            uncached_tokens(Demand::default(), &held(1, 1), 1, &policy),
            0
        );
    }

    #[test]
    fn a_block_of_a_slower_tier_saves_a_part_of_its_prefill() {
        let policy = Policy::default();
        let uncached = |depth, shared_cache, in_use| {
            let overlap = Overlap {
                depth,
                shared_cache,
            };
            uncached_tokens(DEMAND, &overlap, in_use, &policy)
        };
        assert_eq!(uncached([4, 8, 8, 8], 0, 0), 1_000 - 7 * 16);
        assert_eq!(uncached([4, 8, 12, 16], 0, 0), 1_000 - 9 * 16);
        assert_eq!(uncached([4, 4, 4, 4], 8, 0), 1_000 - 8 * 16);
        assert_eq!(uncached([4, 4, 4, 4], 8, 8), 1_000 - 10 * 16);
        assert_eq!(uncached([4, 4, 4, 4], 8, 20), 1_000 - 20 * 16);
    }

    #[test]
    fn what_is_learned_replaces_the_prior() {
        let weights = Weights::default();
        let traits = |prefill_ns_per_token| Traits {
            prefill_ns_per_token,
            ..Traits::default()
        };
        assert_eq!(weights.prefill_ns(&traits(0)), 50_000);
        assert_eq!(weights.prefill_ns(&traits(80_000)), 80_000);
    }

    #[test]
    fn the_typical_prefill_follows_slowly() {
        assert_eq!(typical(None, 40.0), 40.0);
        assert_eq!(typical(Some(40.0), 140.0), 41.0);
    }
}
