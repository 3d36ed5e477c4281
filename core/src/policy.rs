//! How a pool chooses workers: mode and weights. The sidecar's configuration is made of these
//! types, and the worker table carries them to the filter.

use serde::{Deserialize, Serialize};

use crate::cost::Demand;
use crate::delay::Weights;
use crate::load::Load;
use crate::tracker::Tracking;

/// How a worker is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// By cost: prefill still to do plus blocks being decoded.
    #[default]
    Kv,
    /// Each worker in turn.
    RoundRobin,
    /// Any worker with equal chance.
    Random,
    /// The worker with the fewest requests.
    LeastLoaded,
    /// Of two workers at random, the one with fewer requests.
    PowerOfTwo,
    /// The worker that the request names.
    Direct,
    /// The least loaded worker of one of two groups, by device.
    DeviceAwareWeighted,
}

impl Mode {
    /// The mode's name in configuration, metrics and decision records.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kv => "kv",
            Self::RoundRobin => "round-robin",
            Self::Random => "random",
            Self::LeastLoaded => "least-loaded",
            Self::PowerOfTwo => "power-of-two",
            Self::Direct => "direct",
            Self::DeviceAwareWeighted => "device-aware-weighted",
        }
    }
}

/// What the mode `kv` compares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Scoring {
    /// Dynamo's formula, in blocks.
    #[default]
    Dynamo,
    /// The predicted delay, in milliseconds.
    PredictedDelay,
}

/// Mode and weights of one pool. Weights are finite and not negative.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Policy {
    /// How a worker is chosen.
    pub mode: Mode,
    /// Softmax temperature over normalised costs; 0 takes the minimum.
    pub temperature: f64,
    /// Weight of prefill blocks against blocks being decoded.
    pub prefill_load_scale: f64,
    /// Credit for a block on the device tier, in blocks.
    pub overlap_score_credit: f64,
    /// Credit for a block on the host tier, in blocks.
    pub host_cache_hit_weight: f64,
    /// Credit for a block on the disk or external tier, in blocks.
    pub disk_cache_hit_weight: f64,
    /// Cost of one active request, in blocks.
    pub decode_active_request_weight: f64,
    /// Part of the device credit that is lost with prefill queued there: it is divided by one more
    /// than this times the queue, less the shortest one, in prompts. The worker table carries it
    /// apart, as it does all that follows.
    #[serde(skip)]
    pub overlap_score_credit_decay: f64,
    /// What the mode `kv` compares.
    #[serde(skip)]
    pub scoring: Scoring,
    /// Weights of the predicted delay.
    #[serde(skip)]
    pub delay: Weights,
    /// Which parts of the load count. The worker table carries it apart.
    #[serde(skip)]
    pub tracking: Tracking,
    /// Credit for a block beyond a worker's own that a shared store has, in blocks. The worker
    /// table carries it apart.
    #[serde(skip)]
    pub shared_cache_multiplier: f64,
}

impl Default for Policy {
    /// Dynamo's defaults; its multiplier for shared stores is that of a pool which has one.
    fn default() -> Self {
        Self {
            mode: Mode::Kv,
            temperature: 0.0,
            prefill_load_scale: 1.0,
            overlap_score_credit: 1.0,
            host_cache_hit_weight: 0.75,
            disk_cache_hit_weight: 0.25,
            shared_cache_multiplier: 0.5,
            decode_active_request_weight: 0.0,
            overlap_score_credit_decay: 0.0,
            scoring: Scoring::Dynamo,
            delay: Weights::default(),
            tracking: Tracking::default(),
        }
    }
}

impl Policy {
    /// Whether the predicted delay is what is compared.
    #[must_use]
    pub fn predicts_delay(&self) -> bool {
        self.mode == Mode::Kv && self.scoring == Scoring::PredictedDelay
    }

    /// The policy for an owner with this load, with its device credit decayed. `least_prefill` are
    /// the fewest prefill tokens on any candidate.
    #[must_use]
    pub fn decayed(&self, demand: Demand, load: &Load, least_prefill: u32) -> Self {
        if self.overlap_score_credit_decay <= 0.0 || !self.tracking.prefill_tokens {
            return *self;
        }
        let block = demand.block_size.max(1);
        let more = load.prefill_tokens.saturating_sub(least_prefill);
        let prompt = demand.tokens.div_ceil(block).max(1);
        let queued = f64::from(more) / f64::from(block) / f64::from(prompt);
        let divisor = 1.0 + self.overlap_score_credit_decay * queued;
        Self {
            overlap_score_credit: self.overlap_score_credit / divisor,
            ..*self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Policy;
    use crate::cost::Demand;
    use crate::load::Load;

    #[test]
    fn the_credit_decays_with_the_queue_beyond_the_shortest_one() {
        let demand = Demand {
            tokens: 60,
            block_size: 16,
        };
        let load = Load {
            prefill_tokens: 192,
            ..Load::default()
        };
        let credit = |decay, least| {
            let policy = Policy {
                overlap_score_credit_decay: decay,
                ..Policy::default()
            };
            policy.decayed(demand, &load, least).overlap_score_credit
        };
        assert_eq!(credit(0.0, 0), 1.0);
        // Eight blocks more than the least loaded, of a prompt of four.
        assert_eq!(credit(0.5, 64), 0.5);
        assert_eq!(credit(0.5, 192), 1.0);
    }
}
