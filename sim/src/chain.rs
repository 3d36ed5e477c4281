//! Names of blocks: the public hash of a block's tokens, and the engine's own chained name.

use std::sync::Arc;

use kv_core::hash::Seed;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::rng::mix;

/// One full block of a sequence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    /// The engine's name; covers the tokens of this block and of all before it.
    pub engine_hash: u64,
    /// Hash of the block's tokens alone, equal on all engines.
    pub tokens_hash: u64,
    /// The engine's name of the block before; `None` for the first.
    pub parent: Option<u64>,
    /// Token ids of the block.
    #[serde(skip)]
    pub tokens: Arc<[u32]>,
    /// Salt of the sequence.
    #[serde(skip)]
    pub salt: Arc<str>,
}

/// Names the blocks of one sequence as it grows.
#[derive(Clone, Debug)]
pub struct Chain {
    block_size: usize,
    seed: Seed,
    engine_seed: u64,
    salt: Arc<str>,
    keys: Vec<Key>,
}

impl Chain {
    /// A chain without blocks. Engine names differ from worker to worker, as they do in engines
    /// that seed their hashes at random; so nothing outside can rely on them being equal.
    #[must_use]
    pub fn new(worker_id: u64, block_size: usize, seed: Seed) -> Self {
        Self {
            block_size,
            seed,
            engine_seed: mix(worker_id ^ seed.0),
            salt: Arc::default(),
            keys: Vec::new(),
        }
    }

    /// Says what the seed was made of.
    #[must_use]
    pub fn salted(mut self, salt: &str) -> Self {
        self.salt = salt.into();
        self
    }

    /// The blocks named so far.
    #[must_use]
    pub fn keys(&self) -> &[Key] {
        &self.keys
    }

    /// Names every block that `tokens`, the whole sequence, fills.
    pub fn extend(&mut self, tokens: &[u32]) {
        let done = self.keys.len() * self.block_size;
        for block in tokens[done.min(tokens.len())..].chunks_exact(self.block_size) {
            let tokens_hash = self.seed.block(block);
            let parent = self.keys.last().map(|key| key.engine_hash);
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&parent.unwrap_or_default().to_le_bytes());
            bytes[8..].copy_from_slice(&tokens_hash.to_le_bytes());
            self.keys.push(Key {
                engine_hash: xxh3_64_with_seed(&bytes, self.engine_seed),
                tokens_hash,
                parent,
                tokens: block.into(),
                salt: Arc::clone(&self.salt),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(worker: u64, tokens: &[u32]) -> Vec<Key> {
        let mut chain = Chain::new(worker, 4, Seed::new("", ""));
        chain.extend(tokens);
        chain.keys().to_vec()
    }

    #[test]
    fn partial_tail_has_no_name() {
        assert_eq!(chain(1, &[1, 2, 3]).len(), 0);
        assert_eq!(chain(1, &[1, 2, 3, 4, 5]).len(), 1);
    }

    #[test]
    fn growing_in_steps_names_what_one_step_names() {
        let tokens: Vec<u32> = (0..19).collect();
        let mut grown = Chain::new(1, 4, Seed::new("", ""));
        for end in 0..=tokens.len() {
            grown.extend(&tokens[..end]);
        }
        assert_eq!(grown.keys(), chain(1, &tokens));
    }

    #[test]
    fn engine_names_differ_by_worker_and_by_prefix_while_token_hashes_agree() {
        let here = chain(1, &[1, 2, 3, 4, 9, 9, 9, 9]);
        let there = chain(2, &[1, 2, 3, 4, 9, 9, 9, 9]);
        let other = chain(1, &[5, 6, 7, 8, 9, 9, 9, 9]);
        assert_eq!(here[1].tokens_hash, there[1].tokens_hash);
        assert_ne!(here[1].engine_hash, there[1].engine_hash);
        assert_eq!(here[1].tokens_hash, other[1].tokens_hash);
        assert_ne!(here[1].engine_hash, other[1].engine_hash);
        assert_eq!(here[1].parent, Some(here[0].engine_hash));
    }
}
