//! TensorRT-LLM's blocks and the levels they are on.
//!
//! Its events say a block's tokens once and its level afterwards by name alone, and removes name no
//! level. So what was stored is kept, by name, as long as it is in the engine.

use std::collections::{HashMap, HashSet};

use kv_core::event::{EventData, Stored, StoredBlock};
use kv_core::id::{DpRank, Family, Tier};

use super::cut::Cutter;
use super::hash::names;
use super::trtllm::{self, Data, Event};
use super::{Normalised, Normaliser, seed};
use crate::ingest::{MAX_EVENT_BLOCKS, Rejection};

/// Most blocks that are kept; of further ones no move is followed.
const MAX_BLOCKS: usize = 1 << 19;
/// Most names of partial blocks that are kept; removes of further ones go on to the index, which
/// does not know them.
const MAX_PARTIAL: usize = 1 << 16;
/// Stands for all levels where salts are concerned: a remove is about all of them.
const ANY: Tier = Tier::Device;

/// What is known of a stream's blocks.
#[derive(Debug, Default)]
pub(super) struct Levels {
    /// The largest window of each rank: its cache holds whole prefixes.
    windows: HashMap<DpRank, u64>,
    blocks: HashMap<(DpRank, u64), Block>,
    partial: HashSet<(DpRank, u64)>,
}

#[derive(Clone, Debug)]
struct Block {
    tier: Tier,
    parent: Option<u64>,
    /// Hashes of the parts it was cut into.
    parts: Box<[u64]>,
}

impl Levels {
    pub(super) fn clear(&mut self, rank: DpRank) {
        self.blocks.retain(|(of, _), _| *of != rank);
        self.partial.retain(|(of, _)| *of != rank);
    }

    /// Refuses caches of a smaller window than another one of the rank.
    fn window(&mut self, rank: DpRank, window: Option<u64>) -> Result<(), Rejection> {
        let Some(window) = window else {
            return Ok(());
        };
        let largest = self.windows.entry(rank).or_insert(window);
        *largest = window.max(*largest);
        if window < *largest {
            Err(Rejection::AttentionWindow)
        } else {
            Ok(())
        }
    }
}

impl Normaliser {
    pub(super) fn trtllm(
        &mut self,
        rank: DpRank,
        event: Event,
        out: &mut Normalised,
    ) -> Result<(), Rejection> {
        self.levels.window(rank, event.window)?;
        match event.data {
            // Says how large the cache is; nothing is in it.
            Data::Created => Ok(()),
            Data::Stored(stored) => self.trtllm_stored(rank, &stored, out),
            Data::Removed(hashes) => {
                self.trtllm_removed(rank, &hashes, out);
                Ok(())
            }
            Data::Updated { level: None, .. } => Ok(()),
            Data::Updated {
                hash,
                level: Some(level),
            } => self.moved(rank, hash, trtllm::tier(level), out),
        }
    }

    fn trtllm_stored(
        &mut self,
        rank: DpRank,
        stored: &trtllm::Stored,
        out: &mut Normalised,
    ) -> Result<(), Rejection> {
        let own = self.settings.block_size.max(1) as usize;
        let parts: usize = stored.blocks.iter().map(|b| b.tokens.len() / own).sum();
        if parts > MAX_EVENT_BLOCKS {
            return Err(Rejection::TooManyBlocks);
        }
        let is_partial = |block: &trtllm::Block| {
            block.tokens.is_empty() || !block.tokens.len().is_multiple_of(own)
        };
        let whole = stored.blocks.iter().take_while(|block| !is_partial(block));
        let whole = whole.count();
        let (blocks, tail) = stored.blocks.split_at(whole);
        for block in tail {
            if self.levels.partial.len() < MAX_PARTIAL {
                self.levels.partial.insert((rank, block.hash));
            }
        }
        let hashes: Vec<u64> = blocks.iter().map(|block| block.hash).collect();
        let salt = stored.salt.as_deref();
        let salt = self.salts.store(rank, ANY, stored.parent, &hashes, salt)?;
        let seed = seed(&stored.lora, salt);
        let mut parent = stored.parent;
        let mut seen: HashSet<u64> = parent.into_iter().collect();
        let mut flaw = (!tail.is_empty()).then_some(Rejection::PartialBlock);
        for run in blocks.chunk_by(|a, b| trtllm::tier(a.level) == trtllm::tier(b.level)) {
            let tier = trtllm::tier(run.first().map_or(0, |block| block.level));
            let run_parent = parent;
            let mut chain = Vec::new();
            for block in run {
                if !seen.insert(block.hash) {
                    flaw = Some(Rejection::RepeatedHash);
                    break;
                }
                let cutter = Cutter {
                    own,
                    cut: block.tokens.len() / own,
                    eagle: false,
                    seed,
                    image_token: self.settings.image_token,
                };
                let first = chain.len();
                cutter.block(block.hash, &block.tokens, &block.keys, &mut chain);
                self.note_cut(rank, tier, cutter.cut as u64);
                let parts = chain.iter().skip(first).map(|part| part.tokens_hash);
                let kept = Block {
                    tier,
                    parent,
                    parts: parts.collect(),
                };
                self.keep(rank, block.hash, kept);
                parent = Some(block.hash);
            }
            out.stored(rank, tier, run_parent, chain);
            if flaw == Some(Rejection::RepeatedHash) {
                break;
            }
        }
        flaw.map_or(Ok(()), Err)
    }

    fn keep(&mut self, rank: DpRank, hash: u64, block: Block) {
        let blocks = &mut self.levels.blocks;
        if blocks.len() < MAX_BLOCKS || blocks.contains_key(&(rank, hash)) {
            blocks.insert((rank, hash), block);
        }
        self.levels.partial.remove(&(rank, hash));
    }

    fn trtllm_removed(&mut self, rank: DpRank, hashes: &[u64], out: &mut Normalised) {
        let mut by_tier: [Vec<u64>; Tier::COUNT] = Default::default();
        for hash in hashes {
            if self.levels.partial.remove(&(rank, *hash)) {
                continue;
            }
            let tier = self.levels.blocks.remove(&(rank, *hash));
            let tier = tier.map_or(Tier::Device, |block| block.tier);
            if let Some(of_tier) = by_tier.get_mut(tier.index()) {
                of_tier.push(*hash);
            }
        }
        self.salts.remove(rank, ANY, hashes);
        for (tier, hashes) in Tier::ALL.into_iter().zip(by_tier) {
            if !hashes.is_empty() {
                self.drop_blocks(rank, tier, &hashes, out);
            }
        }
    }

    /// Stored where it goes first, so that what hangs below it never hangs in the air.
    fn moved(
        &mut self,
        rank: DpRank,
        hash: u64,
        to: Tier,
        out: &mut Normalised,
    ) -> Result<(), Rejection> {
        if self.levels.partial.contains(&(rank, hash)) {
            return Ok(());
        }
        let block = self.levels.blocks.get_mut(&(rank, hash));
        let block = block.ok_or(Rejection::UnknownBlock)?;
        let from = std::mem::replace(&mut block.tier, to);
        if from == to {
            return Ok(());
        }
        let parent = block.parent;
        let parts = block.parts.clone();
        let names = names(hash, parts.len() as u64);
        let chain = names
            .zip(&parts)
            .map(|(block_hash, tokens_hash)| StoredBlock {
                block_hash,
                tokens_hash: *tokens_hash,
                mm_extra_info: None,
            });
        let chain = chain.collect();
        self.note_cut(rank, to, parts.len() as u64);
        out.stored(rank, to, parent, chain);
        self.drop_blocks(rank, from, &[hash], out);
        Ok(())
    }
}

impl Normalised {
    fn stored(
        &mut self,
        rank: DpRank,
        tier: Tier,
        parent_hash: Option<u64>,
        blocks: Vec<StoredBlock>,
    ) {
        if blocks.is_empty() {
            return;
        }
        let data = EventData::Stored(Stored {
            parent_hash,
            start_position: None,
            blocks,
        });
        self.push(rank, Some(tier), Family::Dynamo, data);
    }
}
