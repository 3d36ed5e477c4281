//! What changed in a cache, before it is put into anybody's words.

use kv_core::event::{EventData, Removed, Stored, StoredBlock};

use crate::chain::Key;

/// A change of a cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// Blocks were stored, each the child of the one before it; never empty.
    Stored(Vec<Key>),
    /// Blocks were dropped, by the engine's names.
    Removed(Vec<u64>),
    /// Everything was dropped.
    Cleared,
}

impl Change {
    /// Blocks that it is about.
    #[must_use]
    pub(crate) fn blocks(&self) -> usize {
        match self {
            Self::Stored(run) => run.len(),
            Self::Removed(run) => run.len(),
            Self::Cleared => 0,
        }
    }

    /// The change as the router's own events say it.
    #[must_use]
    pub(crate) fn data(&self) -> EventData {
        match self {
            Self::Stored(run) => EventData::Stored(Stored {
                parent_hash: run.first().and_then(|first| first.parent),
                start_position: None,
                blocks: run.iter().map(block).collect(),
            }),
            Self::Removed(run) => EventData::Removed(Removed {
                block_hashes: run.clone(),
            }),
            Self::Cleared => EventData::Cleared,
        }
    }
}

fn block(key: &Key) -> StoredBlock {
    StoredBlock {
        block_hash: key.engine_hash,
        tokens_hash: key.tokens_hash,
        mm_extra_info: None,
    }
}
