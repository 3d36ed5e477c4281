//! Dynamo's public block and sequence hashes.
//!
//! A prompt is cut into blocks of `block_size` tokens; a partial tail has no hash.
//!
//! - *Block hash*: XXH3-64 of the block's token ids as `u32` little-endian, seeded by [`Seed`]. It
//!   depends on neither the position nor what comes before.
//! - *Sequence hash*: the first block's is its block hash; every later one is [`chain`] of the
//!   sequence hash before it and its own block hash.
//!
//! Both are equal bit for bit to XXH3-64 of the same bytes. Blocks of 16, 17 (EAGLE over 16) and 32
//! tokens and the chain have code of their own, without 128-bit multiplication on wasm32.

mod sequence;
mod xxh3;

pub use sequence::{Hashing, SequenceHasher, sequence_hashes};
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Base seed of block hashes and seed of the chain.
pub const CHAIN_SEED: u64 = 1337;

/// Seed of a request's block hashes: the base seed plus LoRA and cache-salt terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seed(pub u64);

impl Seed {
    /// Seed for a LoRA adapter and a cache salt; an empty string is the same as none.
    #[must_use]
    pub fn new(lora: &str, salt: &str) -> Self {
        let mut seed = CHAIN_SEED;
        if !lora.is_empty() {
            seed = seed.wrapping_add(xxh3_64_with_seed(lora.as_bytes(), 0));
        }
        if !salt.is_empty() {
            seed = seed.wrapping_add(xxh3_64_with_seed(salt.as_bytes(), 1));
        }
        Self(seed)
    }

    /// Hash of one block, of any number of tokens.
    #[must_use]
    pub fn block(self, tokens: &[u32]) -> u64 {
        xxh3::tokens(tokens, self.0, &mut Vec::new())
    }
}

impl Default for Seed {
    /// The seed without LoRA adapter and cache salt.
    fn default() -> Self {
        Self(CHAIN_SEED)
    }
}

/// Sequence hash of the block `block` that follows the block with sequence hash `previous`.
#[must_use]
#[inline]
pub fn chain(previous: u64, block: u64) -> u64 {
    xxh3::pair(previous, block)
}

#[cfg(all(test, not(target_arch = "wasm32")))]
mod tests;
