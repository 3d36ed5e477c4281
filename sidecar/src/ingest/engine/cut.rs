//! An engine's blocks into the index's: each k times as long as those is cut into k.

use std::collections::HashSet;

use kv_core::event::StoredBlock;
use kv_core::hash::Seed;

use super::event::Stored;
use super::hash::names;
use super::keys::{self, Key};
use crate::ingest::Rejection;

/// How a store's blocks are hashed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cutter {
    /// Tokens to a block of the index.
    pub(super) own: usize,
    /// Such blocks to a block of the engine.
    pub(super) cut: usize,
    /// Each block also covers the first token of the next one.
    pub(super) eagle: bool,
    pub(super) seed: Seed,
    /// Placeholder of images, where they are replaced.
    pub(super) image_token: Option<u32>,
}

impl Cutter {
    /// The blocks of a store up to what is wrong with it, and what that is.
    ///
    /// Dynamo drops a whole store in which a hash comes twice. Here the blocks before the
    /// repetition stay: they are a sound chain, and the engine holds them.
    pub(super) fn chain(&self, stored: &Stored) -> (Vec<StoredBlock>, Option<Rejection>) {
        let size = self.own * self.cut;
        let mut seen: HashSet<u64> = stored.parent.into_iter().collect();
        let mut blocks = Vec::with_capacity(stored.hashes.len().saturating_mul(self.cut));
        for (i, hash) in stored.hashes.iter().enumerate() {
            if !seen.insert(*hash) {
                return (blocks, Some(Rejection::RepeatedHash));
            }
            let start = i.saturating_mul(size);
            let end = start.saturating_add(size + usize::from(self.eagle));
            let Some(tokens) = stored.tokens.ids.get(start..end) else {
                return (blocks, Some(Rejection::TooFewTokens));
            };
            let keys = stored.keys.get(i).map_or(&[][..], Vec::as_slice);
            self.block(*hash, tokens, keys, &mut blocks);
        }
        (blocks, None)
    }

    /// Cuts one block of the engine.
    pub(super) fn block(
        &self,
        hash: u64,
        tokens: &[u32],
        keys: &[Key],
        blocks: &mut Vec<StoredBlock>,
    ) {
        let hashes = self.hashes(tokens, keys);
        let names = names(hash, hashes.len() as u64);
        blocks.extend(
            names
                .zip(hashes)
                .map(|(block_hash, tokens_hash)| StoredBlock {
                    block_hash,
                    tokens_hash,
                    mm_extra_info: None,
                }),
        );
    }

    /// Hashes of the parts. Which part an object is in is not known, so all are of the object.
    fn hashes(&self, tokens: &[u32], keys: &[Key]) -> Vec<u64> {
        let mut replaced = Vec::new();
        let mut tokens = tokens;
        let mut objects = Vec::new();
        let mut mixed = Vec::new();
        for key in keys {
            match key {
                Key::Object(object) if self.image_token.is_some() => objects.push(*object),
                Key::Object(key) | Key::Other(key) => mixed.push(*key),
            }
        }
        if let Some(image_token) = self.image_token
            && !objects.is_empty()
        {
            replaced.extend_from_slice(tokens);
            keys::replace(&mut replaced, image_token, &objects);
            tokens = &replaced;
        }
        let windows = tokens.windows(self.own + usize::from(self.eagle));
        let windows = windows.step_by(self.own);
        let hash = |window: &[u32]| {
            if mixed.is_empty() {
                self.seed.block(window)
            } else {
                keys::block_with(window, self.seed.0, &mut mixed)
            }
        };
        windows.map(hash).collect()
    }
}
