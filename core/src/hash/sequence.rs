//! Sequence hashes of whole prompts and of prompts that grow.

use super::{Seed, chain, xxh3};

/// Everything that decides the hashes of a token sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hashing {
    /// Tokens per block. With 0 there are no blocks.
    pub block_size: usize,
    /// EAGLE models: a block also covers the first token of the next one, so the last block needs
    /// one token more.
    pub eagle: bool,
    /// Seed of the block hashes.
    pub seed: Seed,
}

impl Hashing {
    /// Hashing of a model without EAGLE.
    #[must_use]
    pub fn new(block_size: usize, seed: Seed) -> Self {
        Self {
            block_size,
            eagle: false,
            seed,
        }
    }

    /// Tokens one block hash covers.
    fn window(self) -> usize {
        self.block_size.saturating_add(usize::from(self.eagle))
    }

    /// Completes `hashes`, the sequence hashes of the first blocks of `tokens`, with those of every
    /// further complete block. `tokens` is the prompt from its beginning.
    pub fn extend(self, tokens: &[u32], hashes: &mut Vec<u64>) {
        let hashed = hashes.len().saturating_mul(self.block_size);
        let Some(rest) = tokens.get(hashed..) else {
            return;
        };
        self.append(rest, hashes);
    }

    /// Appends the sequence hashes of the complete blocks at the start of `tokens`, whose
    /// predecessor is the last of `hashes`.
    fn append(self, tokens: &[u32], hashes: &mut Vec<u64>) {
        let seed = self.seed.0;
        match (self.block_size, self.eagle) {
            (0, _) => {}
            (16, false) => append_fixed::<16>(tokens, seed, hashes),
            (32, false) => append_fixed::<32>(tokens, seed, hashes),
            (16, true) => {
                let windows = tokens.windows(17).step_by(16);
                let blocks = windows.filter_map(|window| window.first_chunk::<17>());
                append_chain(blocks.map(|block| xxh3::fixed(block, seed)), hashes);
            }
            _ => {
                let mut bytes = Vec::new();
                let windows = tokens.windows(self.window()).step_by(self.block_size);
                let blocks = windows.map(|window| xxh3::tokens(window, seed, &mut bytes));
                append_chain(blocks, hashes);
            }
        }
    }
}

/// [`Hashing::append`] for blocks of a size known to the compiler.
fn append_fixed<const N: usize>(tokens: &[u32], seed: u64, hashes: &mut Vec<u64>) {
    let (blocks, _) = tokens.as_chunks::<N>();
    append_chain(blocks.iter().map(|block| xxh3::fixed(block, seed)), hashes);
}

#[inline(always)]
fn append_chain(blocks: impl Iterator<Item = u64>, hashes: &mut Vec<u64>) {
    let mut previous = hashes.last().copied();
    hashes.extend(blocks.map(|block| {
        let hash = previous.map_or(block, |previous| chain(previous, block));
        previous = Some(hash);
        hash
    }));
}

/// Sequence hashes of every complete block of `tokens`.
#[must_use]
pub fn sequence_hashes(tokens: &[u32], hashing: Hashing) -> Vec<u64> {
    let mut hashes = Vec::new();
    hashing.append(tokens, &mut hashes);
    hashes
}

/// Sequence hashes of a token sequence that comes in pieces.
#[derive(Clone, Debug)]
pub struct SequenceHasher {
    hashing: Hashing,
    hashes: Vec<u64>,
    /// Tokens from the first block that is not complete on.
    tail: Vec<u32>,
}

impl SequenceHasher {
    /// A hasher at the start of a sequence.
    #[must_use]
    pub fn new(hashing: Hashing) -> Self {
        Self {
            hashing,
            hashes: Vec::new(),
            tail: Vec::new(),
        }
    }

    /// Takes the next tokens.
    pub fn push(&mut self, tokens: &[u32]) {
        if self.hashing.block_size == 0 {
            return;
        }
        self.tail.extend_from_slice(tokens);
        let before = self.hashes.len();
        self.hashing.append(&self.tail, &mut self.hashes);
        let blocks = self.hashes.len() - before;
        self.tail.drain(..blocks * self.hashing.block_size);
    }

    /// Sequence hashes of the complete blocks so far.
    #[must_use]
    pub fn hashes(&self) -> &[u64] {
        &self.hashes
    }

    /// The sequence hashes, without the hasher.
    #[must_use]
    pub fn into_hashes(self) -> Vec<u64> {
        self.hashes
    }
}
