//! Contents for an index: conversations as agents have them.
//!
//! Twenty system prompts of 64 blocks; below them conversations of 38 to 1,640 blocks, of which one
//! in eight forks off the one before it. A quarter of them is held by a second owner to 60 %, a
//! fifth is on the device to 70 % only and in host memory beyond.

use kv_core::event::{StorageTier, Stored, StoredBlock};
use kv_core::hash::{Seed, chain};
use kv_core::rng::Rng;

/// Tokens to a block.
pub const BLOCK: usize = 16;
/// Most blocks of one event.
const EVENT_BLOCKS: usize = 4096;
const SYSTEMS: usize = 20;
const SYSTEM_BLOCKS: usize = 64;

/// Consecutive blocks from the root.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    /// Hashes of the blocks' tokens.
    pub tokens: Vec<u64>,
    /// Sequence hashes, which serve as the engines' names too.
    pub sequence: Vec<u64>,
}

/// One store of one worker.
#[derive(Clone, Debug)]
pub struct Store {
    /// Who stores.
    pub worker: u64,
    /// Where.
    pub tier: StorageTier,
    /// What.
    pub data: Stored,
}

impl Chain {
    /// The chain of a prompt.
    #[must_use]
    pub fn of(ids: &[u32]) -> Self {
        let mut all = Self::default();
        for block in ids.chunks_exact(BLOCK) {
            all.push(Seed::default().block(block));
        }
        all
    }

    /// Its first `keep` blocks and `more` random ones.
    #[must_use]
    pub fn fork(&self, keep: usize, more: usize, rng: &mut Rng) -> Self {
        let mut fork = Self {
            tokens: self.tokens.iter().take(keep).copied().collect(),
            sequence: self.sequence.iter().take(keep).copied().collect(),
        };
        for _ in 0..more {
            fork.push(rng.next_u64());
        }
        fork
    }

    /// Appends a block.
    pub fn push(&mut self, tokens: u64) {
        self.tokens.push(tokens);
        self.sequence.push(
            self.sequence
                .last()
                .map_or(tokens, |last| chain(*last, tokens)),
        );
    }

    /// Blocks.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there are no blocks.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// The events with which a worker stores the blocks from `from` to before `to`.
    pub fn stores(
        &self,
        worker: u64,
        tier: StorageTier,
        from: usize,
        to: usize,
    ) -> impl Iterator<Item = Store> + '_ {
        (from..to).step_by(EVENT_BLOCKS).map(move |start| {
            let end = to.min(start + EVENT_BLOCKS);
            let pairs = self.sequence[start..end]
                .iter()
                .zip(&self.tokens[start..end]);
            let block = |(name, tokens): (&u64, &u64)| StoredBlock {
                block_hash: *name,
                tokens_hash: *tokens,
                mm_extra_info: None,
            };
            let parent_hash = start.checked_sub(1).map(|before| self.sequence[before]);
            let blocks = pairs.map(block).collect();
            Store {
                worker,
                tier,
                data: Stored {
                    parent_hash,
                    start_position: None,
                    blocks,
                },
            }
        })
    }
}

/// One conversation and who holds it.
#[derive(Clone, Debug)]
pub struct Conversation {
    /// The system prompt and all turns.
    pub chain: Chain,
    /// Blocks that no earlier conversation has, system prompts aside.
    pub fresh: usize,
    /// The stores, parents first.
    pub stores: Vec<Store>,
}

/// An endless supply of conversations for workers `1..=owners`.
#[derive(Clone, Debug)]
pub struct Corpus {
    rng: Rng,
    owners: usize,
    systems: Vec<Chain>,
    last: Chain,
}

impl Corpus {
    /// The same conversations for the same arguments.
    #[must_use]
    pub fn new(owners: usize, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let system = |_| Chain::default().fork(0, SYSTEM_BLOCKS, &mut rng);
        let systems = (0..SYSTEMS).map(system).collect();
        Self {
            rng,
            owners,
            systems,
            last: Chain::default(),
        }
    }

    /// Conversations of `blocks` blocks in all.
    pub fn of_size(mut self, blocks: usize) -> impl Iterator<Item = Conversation> {
        let mut left = blocks.saturating_sub(SYSTEMS * SYSTEM_BLOCKS);
        std::iter::from_fn(move || {
            if left == 0 {
                return None;
            }
            let next = self.conversation(left);
            left -= next.fresh;
            Some(next)
        })
    }

    fn worker(&mut self) -> u64 {
        1 + self.rng.below(self.owners) as u64
    }

    fn conversation(&mut self, most: usize) -> Conversation {
        let forks = self.last.len() > 2 * SYSTEM_BLOCKS && self.rng.below(8) == 0;
        let fresh = most.min(38 + self.rng.below(1603));
        let chain = if forks {
            self.last.fork(self.last.len() / 2, fresh, &mut self.rng)
        } else {
            let system = self.rng.below(SYSTEMS);
            self.systems[system].fork(SYSTEM_BLOCKS, fresh, &mut self.rng)
        };
        let (device, host) = (StorageTier::Device, StorageTier::HostPinned);
        let (worker, all) = (self.worker(), chain.len());
        let mut stores = Vec::new();
        if self.rng.below(5) == 0 {
            stores.extend(chain.stores(worker, device, 0, all * 7 / 10));
            stores.extend(chain.stores(worker, host, all * 7 / 10, all));
        } else {
            stores.extend(chain.stores(worker, device, 0, all));
        }
        if self.rng.below(4) == 0 {
            stores.extend(chain.stores(self.worker(), device, 0, all * 6 / 10));
        }
        self.last = chain.clone();
        Conversation {
            chain,
            fresh,
            stores,
        }
    }
}
