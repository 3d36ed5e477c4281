//! What has been read of a prompt, in blocks.

use kv_core::family::Namespace;
use kv_core::hash::{Hashing, Seed, sequence_hashes};
use kv_core::holdings::{self, Named};
use kv_core::text::{Answer, Ask, Blocks, Extent, Further, Wanted};

/// The blocks of a prompt, as far as it was read.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Blockwise {
    tokens: usize,
    extent: Extent,
    hashes: Vec<u64>,
    families: Vec<Named>,
    /// As a JSON array, where they are wanted.
    ids: Vec<u8>,
}

impl Blockwise {
    /// The blocks of these ids. `tokens` are those of the whole prompt.
    pub(super) fn new(
        ask: &Ask<'_>,
        wanted: &Wanted<'_>,
        tokens: usize,
        extent: Extent,
        ids: &[u32],
    ) -> Self {
        let namespace = Namespace {
            lora: wanted.lora,
            salt: wanted.salt,
        };
        let block_size = usize::try_from(ask.block_size).unwrap_or_default();
        let handed_over = if wanted.ids && extent == Extent::Whole {
            serde_json::to_vec(ids).unwrap_or_default()
        } else {
            Vec::new()
        };
        Self {
            tokens,
            extent,
            hashes: sequence_hashes(ids, Hashing::new(block_size, Seed(ask.seed))),
            families: holdings::named(&wanted.families, ask.block_size, ids, namespace),
            ids: handed_over,
        }
    }

    /// How far the prompt was read.
    pub(super) fn extent(&self) -> Extent {
        self.extent
    }

    /// The answer.
    pub(super) fn encode(self) -> Vec<u8> {
        let hashes: Vec<u8> = self.hashes.iter().flat_map(|h| h.to_le_bytes()).collect();
        let blocks = Blocks {
            tokens: u32::try_from(self.tokens).unwrap_or(u32::MAX),
            extent: self.extent,
            hashes: &hashes,
        };
        Answer::Read(blocks).encode(&Further {
            families: self.families,
            ids: &self.ids,
        })
    }
}
