//! How much load is too much.

use serde::{Deserialize, Serialize};

use crate::load::Load;

/// Tokens that an engine batches where it is not known, as Dynamo takes it.
const UNKNOWN_BATCH: u32 = 10_000_000;

/// What an owner can do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capacity {
    /// Prompt tokens of one batch; 0 where not known, which counts as ten million.
    pub batched_tokens: u32,
    /// KV blocks; 0 where not known.
    pub blocks: u32,
}

impl Capacity {
    /// Prompt tokens of one batch.
    #[must_use]
    pub fn batch(&self) -> f64 {
        f64::from(match self.batched_tokens {
            0 => UNKNOWN_BATCH,
            known => known,
        })
    }
}

/// Loads past which an owner takes no more requests, whoever sends them. A worker is overloaded
/// where all its owners are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Thresholds {
    /// Blocks in use as a share of all; nothing where those are not known.
    pub decode_blocks: Option<f64>,
    /// Prompt tokens still to be prefilled.
    pub prefill_tokens: Option<u64>,
    /// The same as a share of a batch.
    pub prefill_share: Option<f64>,
}

impl Thresholds {
    /// Whether there are none.
    #[must_use]
    pub fn is_unset(&self) -> bool {
        *self == Self::default()
    }

    /// Whether a load is past any of them.
    #[must_use]
    pub fn is_over(&self, load: &Load, capacity: Capacity) -> bool {
        let prefill = load.prefill_tokens;
        let tokens = self.prefill_tokens.is_some_and(|t| u64::from(prefill) > t);
        let share = self.prefill_share;
        let share = share.is_some_and(|share| f64::from(prefill) > share * capacity.batch());
        let blocks = self.decode_blocks.filter(|_| capacity.blocks > 0);
        let blocks =
            blocks.is_some_and(|share| f64::from(load.blocks) > share * f64::from(capacity.blocks));
        tokens || share || blocks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_is_over_a_threshold_only_past_it() {
        let load = Load {
            prefill_tokens: 1_000,
            blocks: 90,
            ..Load::default()
        };
        let capacity = Capacity {
            batched_tokens: 500,
            blocks: 100,
        };
        let over = |thresholds: Thresholds, capacity| thresholds.is_over(&load, capacity);
        let of = |decode_blocks, prefill_tokens, prefill_share| Thresholds {
            decode_blocks,
            prefill_tokens,
            prefill_share,
        };
        assert!(of(None, None, None).is_unset());
        assert!(!over(of(None, None, None), capacity));
        assert!(over(of(None, Some(999), None), capacity));
        assert!(!over(of(None, Some(1_000), None), capacity));
        assert!(over(of(None, None, Some(1.9)), capacity));
        assert!(!over(of(None, None, Some(2.0)), capacity));
        assert!(over(of(Some(0.89), None, None), capacity));
        assert!(!over(of(Some(0.9), None, None), capacity));
        let unknown = Capacity::default();
        assert!(!over(of(Some(0.0), None, None), unknown));
        assert!(!over(of(None, None, Some(0.000_1)), unknown));
        assert!(over(of(None, None, Some(0.000_09)), unknown));
    }
}
