//! What the sidecar tells a proxy about load: corrections to its lanes, and prefixes in use.
//!
//! The lanes of a proxy hold what its own VMs booked. The truth is the tracker's: distinct blocks,
//! every proxy's requests, nothing of VMs that died. The difference is published per owner, so that
//! lane plus correction is the truth plus exactly what has not been reported yet.

use serde::{Deserialize, Serialize};

use crate::id::Slot;
use crate::key;
use crate::load::Load;
use crate::report::Sum;
use crate::tracker::ActiveLoad;

/// Live prefixes of a pool, at most.
pub const MAX_PREFIXES: usize = 256;

/// Corrections and live prefixes, by pool in the order of the worker table.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Loads {
    /// Epoch of the table whose slots are meant.
    pub epoch: u32,
    /// Grows with every change.
    pub version: u64,
    /// By position of the pool in the table.
    pub pools: Vec<PoolLoads>,
    /// What the lanes still hold of VMs that are gone.
    pub write_off: WriteOff,
    /// By position of the pool: the classes of its queue in which requests wait, as bits. Stands
    /// behind what earlier filters read.
    #[serde(skip)]
    pub backlogs: Vec<u64>,
    /// Whether nobody has to know soon what is booked: no other proxy books on the same owners, and
    /// nothing is predicted from bookings. Stands behind the backlogs.
    #[serde(skip)]
    pub is_alone: bool,
}

/// What one VM, the bridge's, is to take out of the lanes, once.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteOff {
    /// Tells it from others; 0 for none.
    pub number: u64,
    /// What the lanes hold of nobody, by owner.
    pub sums: Vec<Sum>,
}

/// Load of one pool's owners.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PoolLoads {
    /// Corrections that are not zero, ascending by slot.
    pub corrections: Vec<(Slot, Correction)>,
    /// Prefixes of live requests that the next one may share: those that two or more have in common,
    /// those that end where earlier prompts went on differently, and whole prompts.
    pub prefixes: Vec<LivePrefix>,
}

/// What to add to an owner's lanes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Correction {
    /// Prefill tokens.
    pub prefill_tokens: i64,
    /// Requests without a first token.
    pub waiting: i64,
    /// Requests past their first token.
    pub decoding: i64,
    /// Blocks.
    pub blocks: i64,
}

/// A prefix in use.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LivePrefix {
    /// Sequence hash of its last block.
    pub hash: u64,
    /// Its blocks.
    pub depth: u32,
    /// Owners on which it is in use.
    pub slots: Vec<Slot>,
}

impl Loads {
    /// Version byte and the loads.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        key::encode(&(self, &self.backlogs, self.is_alone))
    }

    /// The inverse of [`Loads::encode`]; `None` for another version or broken bytes. What earlier
    /// releases wrote ends before the backlogs, or behind them.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (loads, backlogs, is_alone) = key::decode(bytes)
            .or_else(|| {
                let (loads, backlogs) = key::decode(bytes)?;
                Some((loads, backlogs, false))
            })
            .or_else(|| Some((key::decode(bytes)?, Vec::new(), false)))?;
        Some(Self {
            backlogs,
            is_alone,
            ..loads
        })
    }

    /// The classes of a pool in which requests wait, as bits.
    #[must_use]
    pub fn backlog(&self, pool: usize) -> u64 {
        self.backlogs.get(pool).copied().unwrap_or(0)
    }

    /// Epoch and version of encoded loads, without decoding the rest.
    #[must_use]
    pub fn peek(bytes: &[u8]) -> Option<(u32, u64)> {
        key::decode(bytes)
    }
}

impl PoolLoads {
    /// The correction of an owner.
    #[must_use]
    pub fn correction(&self, slot: Slot) -> Correction {
        Self::find(&self.corrections, slot)
    }

    /// The correction of an owner in a list that is ascending by slot.
    #[must_use]
    pub fn find(corrections: &[(Slot, Correction)], slot: Slot) -> Correction {
        let at = corrections.binary_search_by_key(&slot, |(s, _)| *s);
        let found = at.ok().and_then(|at| corrections.get(at));
        found.map_or_else(Correction::default, |(_, correction)| *correction)
    }

    /// Leading blocks of a prompt that are in use on each owner that uses any.
    #[must_use]
    pub fn in_use(&self, prompt: &[u64]) -> Vec<(Slot, u32)> {
        let mut found: Vec<(Slot, u32)> = Vec::new();
        for prefix in &self.prefixes {
            let last = (prefix.depth as usize).checked_sub(1);
            if last.and_then(|last| prompt.get(last)) != Some(&prefix.hash) {
                continue;
            }
            for slot in &prefix.slots {
                match found.iter_mut().find(|(s, _)| s == slot) {
                    Some((_, depth)) => *depth = prefix.depth.max(*depth),
                    None => found.push((*slot, prefix.depth)),
                }
            }
        }
        found
    }
}

impl Correction {
    /// What turns the lanes of a proxy into the true load.
    #[must_use]
    pub fn between(truth: &ActiveLoad, lanes: &Load) -> Self {
        let signed = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        Self {
            prefill_tokens: signed(truth.prefill_tokens) - i64::from(lanes.prefill_tokens),
            waiting: i64::from(truth.waiting) - i64::from(lanes.waiting),
            decoding: i64::from(truth.decoding) - i64::from(lanes.decoding),
            blocks: signed(truth.blocks) - i64::from(lanes.blocks),
        }
    }

    /// Whether nothing is to be added.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        *self == Self::default()
    }

    /// Lanes with the correction added; no field falls below zero.
    #[must_use]
    pub fn apply(&self, lanes: &Load) -> Load {
        let wide = |n: u32, by: i64| {
            let sum = i64::from(n).saturating_add(by).max(0);
            u32::try_from(sum).unwrap_or(u32::MAX)
        };
        let narrow = |n: u16, by: i64| {
            let sum = i64::from(n).saturating_add(by).max(0);
            u16::try_from(sum).unwrap_or(u16::MAX)
        };
        Load {
            prefill_tokens: wide(lanes.prefill_tokens, self.prefill_tokens),
            waiting: narrow(lanes.waiting, self.waiting),
            decoding: narrow(lanes.decoding, self.decoding),
            blocks: wide(lanes.blocks, self.blocks),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lane_plus_correction_is_the_truth() {
        let lanes = Load {
            prefill_tokens: 100,
            waiting: 3,
            decoding: 1,
            blocks: 70,
        };
        let truth = ActiveLoad {
            prefill_tokens: 160,
            waiting: 2,
            decoding: 4,
            blocks: 50,
        };
        let correction = Correction::between(&truth, &lanes);
        let load = Load {
            prefill_tokens: 160,
            waiting: 2,
            decoding: 4,
            blocks: 50,
        };
        assert_eq!(correction.apply(&lanes), load);
        // What is released before the correction follows leaves nothing below zero.
        assert_eq!(correction.apply(&Load::default()).blocks, 0);
    }

    #[test]
    fn the_longest_live_prefix_of_a_prompt_counts() {
        let prefix = |depth: u32, hash, slots: &[u16]| LivePrefix {
            hash,
            depth,
            slots: slots.iter().copied().map(Slot).collect(),
        };
        let pool = PoolLoads {
            corrections: vec![(
                Slot(3),
                Correction {
                    blocks: -4,
                    ..Correction::default()
                },
            )],
            prefixes: vec![
                prefix(2, 22, &[1, 2]),
                prefix(3, 33, &[2]),
                prefix(3, 99, &[7]),
            ],
        };
        let loads = Loads {
            epoch: 1,
            version: 2,
            pools: vec![pool.clone()],
            write_off: WriteOff::default(),
            backlogs: vec![0, 5],
            is_alone: true,
        };
        assert_eq!(Loads::peek(&loads.encode()), Some((1, 2)));
        assert_eq!(Loads::decode(&loads.encode()), Some(loads.clone()));
        let before = Loads {
            is_alone: false,
            ..loads
        };
        let bytes = key::encode(&(&before, &before.backlogs));
        assert_eq!(Loads::decode(&bytes), Some(before.clone()));
        let bytes = key::encode(&before);
        let first = Loads {
            backlogs: Vec::new(),
            ..before
        };
        assert_eq!(Loads::decode(&bytes), Some(first));
        assert_eq!(pool.in_use(&[11, 22, 33, 44]), [(Slot(1), 2), (Slot(2), 3)]);
        assert_eq!(pool.in_use(&[11]), []);
        assert_eq!(pool.correction(Slot(3)).blocks, -4);
        assert!(pool.correction(Slot(4)).is_zero());
    }
}
