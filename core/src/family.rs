//! Hash families: how other systems than Dynamo name the blocks of a prompt.
//!
//! Some caches tell what they hold by hash alone, without token ids. Their blocks can be found only
//! by computing the same hash of a request's tokens. The definitions, for blocks of `n` tokens; a
//! partial tail has no hash, and the 64 bits of a digest are what events carry:
//!
//! | family | digest of a block | 64 bits |
//! |---|---|---|
//! | `flex-kv` | XXH64, seed 0, of all tokens from the prompt's first to the block's last as `i64` LE; before them, each as `i64` LE too, the bytes of LoRA adapter and salt joined by NUL | all |
//! | `hi-cache` | SHA-256 of the digest before it, none for the first, and the tokens as `u32` LE | first 8 bytes, BE |
//! | `vllm-sha256-cbor` | SHA-256 of canonical CBOR of `[digest before it, [tokens], extra keys]` | last 8 bytes, BE |
//! | `vllm-xxhash-cbor` | XXH3-128 of the same | last 8 bytes, BE |
//! | `lm-cache` | BLAKE3 of the digest before it and the tokens as `u32` BE | first 8 bytes, BE |
//!
//! vLLM's extra keys are `null` or an array of the LoRA adapter and, in the first block, the salt;
//! its digest before the first block is that of CBOR of `PYTHONHASHSEED`'s text. `LMCache`'s is BLAKE3
//! of 12 zero bytes. The caches of `hi-cache` and `lm-cache` keep salted prompts and those of
//! adapters apart by other means than the hash: such prompts have no hashes there.
//!
//! Predicted blocks, where they are kept beside those that events tell of, have a family of their own
//! too, `predicted`: Dynamo's block hashes, which the chaining makes Dynamo's sequence hashes.
//!
//! A hash of any family stands for the whole prefix. In a **chained** family, whose senders name
//! blocks in order from the root, the index chains the hashes once more, as if they were hashes of
//! blocks: what one sender says of a hash's place never touches another's. In a **flat** family
//! blocks come in any order, so every block stands alone.

mod cbor;
mod hasher;

use serde::{Deserialize, Serialize};

use crate::hash::chain;
use crate::id::Family;

pub use hasher::FamilyHasher;

/// A family as a pool uses it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scheme {
    /// The family.
    pub family: Family,
    /// Tokens to a block, a multiple of the pool's own.
    pub block_size: u32,
    /// `PYTHONHASHSEED` of the engines; for vLLM's families.
    pub hash_seed: String,
}

/// What of a request besides its tokens decides the hashes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Namespace<'a> {
    /// LoRA adapter, empty for none.
    pub lora: &'a str,
    /// Cache salt, empty for none.
    pub salt: &'a str,
}

impl Namespace<'_> {
    /// Whether it is that of plain requests.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        self.lora.is_empty() && self.salt.is_empty()
    }
}

impl Family {
    /// Whether blocks stand alone, in any order and without parents.
    #[must_use]
    pub fn is_flat(self) -> bool {
        match self {
            Self::HiCache | Self::LmCache => true,
            Self::Dynamo
            | Self::FlexKv
            | Self::VllmSha256Cbor
            | Self::VllmXxhashCbor
            | Self::Predicted => false,
        }
    }

    /// The 64 bits of a digest that stand for it in events and in the index. Shorter digests count
    /// as if zeros stood before them.
    #[must_use]
    pub fn reduce(self, digest: &[u8]) -> u64 {
        let kept = match self {
            Self::VllmSha256Cbor | Self::VllmXxhashCbor => digest.last_chunk::<8>(),
            Self::Dynamo | Self::FlexKv | Self::HiCache | Self::LmCache | Self::Predicted => {
                digest.first_chunk::<8>()
            }
        };
        let short = || {
            digest
                .iter()
                .fold(0, |value, byte| value << 8 | u64::from(*byte))
        };
        kept.map_or_else(short, |bytes| u64::from_be_bytes(*bytes))
    }
}

impl Scheme {
    /// The hashes under which the index has a prompt's blocks, in order; none where the family's
    /// caches don't find such a prompt by hash.
    #[must_use]
    pub fn hashes(&self, tokens: &[u32], namespace: Namespace<'_>) -> Vec<u64> {
        let Some(mut hasher) = FamilyHasher::new(self, namespace) else {
            return Vec::new();
        };
        hasher.push(tokens);
        let mut hashes = hasher.into_hashes();
        if !self.family.is_flat() {
            chained(&mut hashes);
        }
        hashes
    }
}

/// Turns the hashes that senders use into those that the index chains.
pub fn chained(hashes: &mut [u64]) {
    let mut previous = None;
    for hash in hashes {
        *hash = previous.map_or(*hash, |previous| chain(previous, *hash));
        previous = Some(*hash);
    }
}

#[cfg(all(test, not(target_arch = "wasm32")))]
mod tests;
