//! Random histories of a few ranks whose prompts share prefixes.

use std::collections::BTreeMap;

use kv_core::event::{EventData, Removed, Stored, StoredBlock};
use kv_core::hash::chain;
use kv_core::id::{OwnerId, Tier};
use kv_core::rng::Rng;

use crate::content::Content;

/// How the engines of a history behave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manners {
    /// As paged engines do: a device block is stored below one that is held and is dropped after
    /// all blocks that hang on it.
    Orderly,
    /// Any order: blocks are dropped from the middle, stores come before their parent's.
    Wild,
}

/// One thing that happens.
#[derive(Clone, Debug)]
pub enum Step {
    /// A rank sends an event.
    Event(OwnerId, Tier, EventData),
    /// A rank leaves.
    Leave(OwnerId),
}

/// A prompt: its block hashes, and the engines' name for each block.
#[derive(Clone, Debug)]
pub struct Prompt {
    /// Hash of each block's tokens.
    pub tokens: Vec<u64>,
    /// Engine hash of each block: equal on all ranks, as Dynamo demands.
    pub names: Vec<u64>,
}

/// A generator of steps, with what each rank holds after them.
#[derive(Debug)]
pub struct History {
    rng: Rng,
    manners: Manners,
    owners: Vec<OwnerId>,
    longest: usize,
    choices: usize,
    /// Content by rank.
    pub contents: BTreeMap<OwnerId, Content>,
}

impl History {
    /// A history of up to six ranks of up to three workers.
    #[must_use]
    pub fn new(seed: u64, manners: Manners) -> Self {
        let mut rng = Rng::new(seed);
        let owners = (0..1 + rng.below(6)).map(|i| OwnerId {
            worker: 7 + i as u64 / 2,
            rank: u32::from(i % 2 == 1),
        });
        let owners: Vec<OwnerId> = owners.collect();
        Self {
            manners,
            contents: owners.iter().map(|o| (*o, Content::default())).collect(),
            owners,
            longest: 1 + rng.below(24),
            choices: 1 + rng.below(3),
            rng,
        }
    }

    /// A prompt. The fewer choices, the more prompts share their beginnings.
    pub fn prompt(&mut self) -> Prompt {
        let length = 1 + self.rng.below(self.longest);
        let mut prompt = Prompt {
            tokens: Vec::new(),
            names: Vec::new(),
        };
        let mut sequence = None;
        for i in 0..length {
            let is_fork = i % 5 == 0 || self.rng.below(30) == 0;
            let choice = if is_fork {
                self.rng.below(self.choices)
            } else {
                0
            };
            let block = 0xB10C ^ ((choice as u64) << 32) ^ ((i as u64) << 8);
            let hash = sequence.map_or(block, |before| chain(before, block));
            prompt.tokens.push(block);
            prompt.names.push(hash.rotate_left(17));
            sequence = Some(hash);
        }
        prompt
    }

    /// The next step; [`History::contents`] follow it.
    pub fn step(&mut self) -> Step {
        let owner = self.owners[self.rng.below(self.owners.len())];
        if self.rng.below(80) == 0 {
            self.contents.insert(owner, Content::default());
            return Step::Leave(owner);
        }
        let tier = Tier::from_index([0, 0, 0, 0, 1, 1, 2, 3][self.rng.below(8)]);
        let data = match self.rng.below(60) {
            0 => EventData::Cleared,
            1..=34 => self.store(owner, tier),
            _ => self.remove(owner, tier),
        };
        let content = self.contents.entry(owner).or_default();
        content.apply(tier, &data);
        Step::Event(owner, tier, data)
    }

    fn store(&mut self, owner: OwnerId, tier: Tier) -> EventData {
        let prompt = self.prompt();
        let content = &self.contents[&owner];
        let held = |tier| move |name: &&u64| content.holds(**name, tier);
        let last = prompt.names.len() - 1;
        let from = match (self.manners, tier) {
            // Anywhere from the root to the first block that is not held: what is held is stored
            // once more.
            (Manners::Orderly, Tier::Device) => {
                let depth = prompt.names.iter().take_while(held(tier)).count();
                self.rng.below(1 + depth.min(last))
            }
            // Below what the rank holds on any tier.
            (Manners::Orderly, _) => {
                let depth = content.reachable(&prompt.names)[Tier::External.index()];
                self.rng.below(1 + (depth as usize).min(last))
            }
            (Manners::Wild, _) => [0, self.rng.below(1 + last)][self.rng.below(2)],
        };
        let blocks = prompt.tokens.iter().zip(&prompt.names).skip(from);
        EventData::Stored(Stored {
            parent_hash: from.checked_sub(1).map(|parent| prompt.names[parent]),
            start_position: None,
            blocks: blocks
                .map(|(tokens_hash, block_hash)| StoredBlock {
                    block_hash: *block_hash,
                    tokens_hash: *tokens_hash,
                    mm_extra_info: None,
                })
                .collect(),
        })
    }

    fn remove(&mut self, owner: OwnerId, tier: Tier) -> EventData {
        let content = &self.contents[&owner];
        let mut held: Vec<u64> = content.on(tier).collect();
        held.sort_unstable();
        let mut block_hashes = Vec::new();
        for _ in 0..1 + self.rng.below(4) {
            // Leaves first, where order matters to the engine.
            let is_leaf = |name: &u64| {
                !held
                    .iter()
                    .any(|other| content.parent(*other) == Some(*name))
            };
            let is_orderly = self.manners == Manners::Orderly && tier == Tier::Device;
            let fit: Vec<u64> = held
                .iter()
                .copied()
                .filter(|name| !is_orderly || is_leaf(name))
                .collect();
            let Some(name) = fit.get(self.rng.below(fit.len())) else {
                break;
            };
            block_hashes.push(*name);
            held.retain(|other| other != name);
        }
        if self.rng.below(8) == 0 {
            // Never stored, or gone already.
            block_hashes.push(self.rng.next_u64());
        }
        EventData::Removed(Removed { block_hashes })
    }
}
