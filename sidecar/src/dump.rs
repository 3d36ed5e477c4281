//! The index as one sidecar hands it to another: JSON, one [`Line`] to a line.
//!
//! First [`Line::Dump`], then the workers' own streams, then each owner and after it its blocks in
//! any number of parts, at last [`Line::End`]. Numbers of 64 bits are written as JSON numbers.

use kv_core::id::{Family, OwnerId};
use kv_core::index::Held;
use serde::{Deserialize, Serialize};

use crate::state::{OwnerState, StreamState};

/// Version of the lines.
pub const VERSION: u32 = 1;
/// Content type of a dump.
pub const CONTENT_TYPE: &str = "application/x-ndjson";

/// One line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// The first.
    Dump {
        /// [`VERSION`].
        version: u32,
        /// The pools; others refer to them by position.
        pools: Vec<PoolLine>,
    },
    /// Where a worker's own stream has come to.
    Stream(StreamState),
    /// An owner, without its blocks.
    Owner {
        /// Position of its pool.
        pool: usize,
        /// What is known of it.
        #[serde(flatten)]
        state: OwnerState,
    },
    /// More blocks of an owner, in no order.
    Blocks {
        /// Position of its pool.
        pool: usize,
        /// The owner.
        #[serde(flatten)]
        id: OwnerId,
        /// `[sequence hash, parent's sequence hash, engine's name, bit per tier]`.
        blocks: Vec<Block>,
    },
    /// The last.
    End {
        /// Owners in all.
        owners: u64,
        /// Blocks in all, counted once for each owner.
        blocks: u64,
    },
}

/// A pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolLine {
    /// Its name.
    pub name: String,
    /// Tokens to a block.
    pub block_size: u32,
}

/// A [`Held`] as an array.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block(u64, Option<u64>, Option<u64>, u8, #[serde(default)] Family);

impl From<Held> for Block {
    fn from(held: Held) -> Self {
        let Held {
            family,
            sequence,
            parent,
            name,
            tiers,
        } = held;
        Self(sequence, parent, name, tiers, family)
    }
}

impl From<Block> for Held {
    fn from(Block(sequence, parent, name, tiers, family): Block) -> Self {
        Self {
            family,
            sequence,
            parent,
            name,
            tiers,
        }
    }
}

impl Line {
    /// The line with its end.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        // Serialising plain values to memory cannot fail.
        let mut bytes = serde_json::to_vec(self).unwrap_or_default();
        bytes.push(b'\n');
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::{Cursor, Knowledge};

    #[test]
    fn lines_survive_being_written() {
        let id = OwnerId {
            worker: u64::MAX,
            rank: 3,
        };
        let held = Held {
            family: Family::LmCache,
            sequence: u64::MAX,
            parent: Some(u64::MAX - 1),
            name: None,
            tiers: 5,
        };
        let lines = [
            Line::Owner {
                pool: 1,
                state: OwnerState {
                    id,
                    dynamo: Cursor::after(Some(u64::MAX)),
                    json: Cursor::default(),
                    knowledge: Knowledge::Partial,
                    blocks: Vec::new(),
                    doubtful: vec![held],
                },
            },
            Line::Blocks {
                pool: 1,
                id,
                blocks: vec![held.into()],
            },
        ];
        for line in lines {
            let bytes = line.encode();
            assert_eq!(bytes.iter().filter(|b| **b == b'\n').count(), 1);
            assert_eq!(serde_json::from_slice::<Line>(&bytes).unwrap(), line);
        }
        assert_eq!(Held::from(Block::from(held)), held);
    }
}
