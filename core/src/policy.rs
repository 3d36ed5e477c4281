//! How a pool chooses workers: mode and weights. The sidecar's configuration is made of these
//! types, and the worker table carries them to the filter.

use serde::{Deserialize, Serialize};

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
            tracking: Tracking::default(),
        }
    }
}
