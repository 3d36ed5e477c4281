//! What indexes are measured with: a million (rank, block) entries, as sequences of equal length.
//!
//! Sequences come in groups of 16 that share their first quarter; each is held by `copies` ranks.
//! Names are the sequence hashes, so that all ranks have one name for a block, as Dynamo demands.

use std::sync::Arc;

use dynamo_kv_router::RadixTree;
use dynamo_kv_router::indexer::concurrent_radix_tree_compressed::ConcurrentRadixTreeCompressed;
use dynamo_kv_router::indexer::positional::PositionalIndexer;
use dynamo_kv_router::indexer::{SyncIndexer, ThreadPoolIndexer};
use dynamo_kv_router::protocols::{LocalBlockHash, RouterEvent};
use kv_core::event::{EventData, Removed, Stored, StoredBlock};
use kv_core::hash::chain;
use kv_core::id::{OwnerId, Slot, Tier};
use kv_core::index::{Index, IndexConfig};
use kv_core::rng::Rng;
use tokio::runtime::Runtime;

use crate::oracle::router_event;

/// (rank, block) entries of a workload.
pub const ENTRIES: usize = 1_000_000;
/// Blocks of a large event.
pub const EVENT_BLOCKS: usize = 64;
/// Sequences of a group.
const GROUP: usize = 16;
/// Tokens to a block.
const BLOCK_SIZE: u32 = 16;

/// An event and who sends it.
pub type Sent = (u64, EventData);

/// A prompt as both sides want it.
#[derive(Clone, Debug)]
pub struct Prompt {
    /// Block hashes.
    pub tokens: Vec<u64>,
    /// Sequence hashes.
    pub sequence: Vec<u64>,
}

impl Prompt {
    fn extended(&self, keep: usize, to: usize, rng: &mut Rng) -> Self {
        let mut prompt = Self {
            tokens: self.tokens.iter().take(keep).copied().collect(),
            sequence: self.sequence.iter().take(keep).copied().collect(),
        };
        while prompt.tokens.len() < to {
            let block = rng.next_u64();
            let last = prompt.sequence.last();
            prompt
                .sequence
                .push(last.map_or(block, |last| chain(*last, block)));
            prompt.tokens.push(block);
        }
        prompt
    }

    fn store(&self, from: usize, to: usize) -> EventData {
        let blocks = self.sequence.iter().zip(&self.tokens);
        let block = |(name, tokens): (&u64, &u64)| StoredBlock {
            block_hash: *name,
            tokens_hash: *tokens,
            mm_extra_info: None,
        };
        EventData::Stored(Stored {
            parent_hash: from.checked_sub(1).map(|before| self.sequence[before]),
            start_position: None,
            blocks: blocks.take(to).skip(from).map(block).collect(),
        })
    }
}

/// Shape of a workload.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Blocks of a sequence.
    pub depth: usize,
    /// Ranks.
    pub workers: usize,
    /// Ranks that hold a sequence.
    pub copies: usize,
}

/// Sequences and who holds them.
#[derive(Debug)]
pub struct Workload {
    shape: Shape,
    rng: Rng,
    /// The sequences.
    pub prompts: Vec<Prompt>,
}

impl Workload {
    /// The same for the same shape.
    #[must_use]
    pub fn new(shape: Shape) -> Self {
        let mut rng = Rng::new(shape.depth as u64);
        let none = Prompt {
            tokens: Vec::new(),
            sequence: Vec::new(),
        };
        let count = ENTRIES / shape.depth / shape.copies;
        let mut shared = none.clone();
        let mut prompts = Vec::with_capacity(count);
        for i in 0..count {
            if i % GROUP == 0 {
                shared = none.extended(0, shape.depth / 4, &mut rng);
            }
            prompts.push(shared.extended(shape.depth / 4, shape.depth, &mut rng));
        }
        Self {
            shape,
            rng,
            prompts,
        }
    }

    fn ranks(&self, prompt: usize) -> impl Iterator<Item = u64> + use<> {
        let Shape {
            workers, copies, ..
        } = self.shape;
        (0..copies).map(move |copy| (prompt * copies + copy) as u64 % workers as u64)
    }

    /// The events that store everything.
    #[must_use]
    pub fn stores(&self) -> Vec<Sent> {
        let mut stores = Vec::new();
        for (i, prompt) in self.prompts.iter().enumerate() {
            for rank in self.ranks(i) {
                for from in (0..self.shape.depth).step_by(EVENT_BLOCKS) {
                    let to = self.shape.depth.min(from + EVENT_BLOCKS);
                    stores.push((rank, prompt.store(from, to)));
                }
            }
        }
        stores
    }

    /// Stores of single blocks, each at the end of some sequence, and their removals, the last one
    /// first.
    pub fn singles(&mut self, count: usize) -> (Vec<Sent>, Vec<Sent>) {
        let mut grown = self.prompts.clone();
        let (mut stores, mut removals) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let at = self.rng.below(grown.len());
            let depth = grown[at].tokens.len();
            grown[at] = grown[at].extended(depth, depth + 1, &mut self.rng);
            let rank = self.ranks(at).next().unwrap_or(0);
            stores.push((rank, grown[at].store(depth, depth + 1)));
            let block_hashes = vec![grown[at].sequence[depth]];
            removals.push((rank, EventData::Removed(Removed { block_hashes })));
        }
        removals.reverse();
        (stores, removals)
    }

    /// Prompts of which a part is held, as a share of the sequences' length.
    pub fn queries(&mut self, count: usize, share: f64) -> Vec<Prompt> {
        let depth = self.shape.depth;
        let keep = (depth as f64 * share) as usize;
        let mut query = |_| {
            let at = self.rng.below(self.prompts.len());
            self.prompts[at].extended(keep, depth, &mut self.rng)
        };
        (0..count).map(&mut query).collect()
    }
}

/// What is measured.
pub enum Subject {
    /// Ours.
    Ours(Box<Index>, usize),
    /// Dynamo's tree for one thread.
    Radix(Box<RadixTree>),
    /// Its concurrent compressed tree, one thread taking events.
    Compressed(Pool<ConcurrentRadixTreeCompressed>),
    /// Its positional indexer, likewise.
    Positional(Pool<PositionalIndexer>),
}

/// A concurrent index with its thread.
pub struct Pool<T: SyncIndexer> {
    indexer: Arc<ThreadPoolIndexer<T>>,
    runtime: Runtime,
}

impl<T: SyncIndexer> Pool<T> {
    fn new(backend: T) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        let runtime = runtime.expect("a runtime");
        let indexer = {
            let _guard = runtime.enter();
            Arc::new(ThreadPoolIndexer::new(backend, 1, BLOCK_SIZE))
        };
        Self { indexer, runtime }
    }

    fn apply(&self, events: Vec<RouterEvent>) {
        for event in events {
            self.indexer
                .enqueue_event(event)
                .expect("the thread takes events");
        }
        self.runtime.block_on(self.indexer.flush());
    }
}

/// Events in the form that a subject takes, so that making it so is not measured.
pub enum Events {
    /// Ours.
    Ours(Vec<(Slot, EventData)>),
    /// Dynamo's.
    Theirs(Vec<RouterEvent>),
}

/// Prompts in the form that a subject takes.
pub enum Queries {
    /// Sequence hashes.
    Ours(Vec<Vec<u64>>),
    /// Block hashes.
    Theirs(Vec<Vec<LocalBlockHash>>),
}

impl Subject {
    /// Names of the subjects, ours first.
    pub const ALL: [&str; 4] = ["ours", "radix", "compressed", "positional"];

    /// An empty index.
    ///
    /// # Panics
    /// When there is none of this name.
    #[must_use]
    pub fn new(name: &str) -> Self {
        match name {
            "ours" => {
                let mut index = Index::new(IndexConfig {
                    epoch: 1,
                    level: 6,
                    group: 32,
                    max_orphans: 1 << 18,
                    max_bytes: 1 << 30,
                    max_page_bytes: 1 << 30,
                });
                let pool = index.add_pool(0x1234_5678_9abc_def1);
                Self::Ours(Box::new(index), pool)
            }
            "radix" => Self::Radix(Box::default()),
            "compressed" => Self::Compressed(Pool::new(ConcurrentRadixTreeCompressed::new())),
            "positional" => Self::Positional(Pool::new(PositionalIndexer::new(32))),
            other => panic!("no index named {other}"),
        }
    }

    /// Events for this subject.
    #[must_use]
    pub fn events(&self, sent: &[Sent]) -> Events {
        if let Self::Ours(..) = self {
            let slot = |rank: u64| Slot(u16::try_from(rank).unwrap_or(u16::MAX));
            let event = |(rank, data): &Sent| (slot(*rank), data.clone());
            return Events::Ours(sent.iter().map(event).collect());
        }
        let owner = |worker| OwnerId { worker, rank: 0 };
        let event = |(rank, data): &Sent| router_event(owner(*rank), Tier::Device, data);
        Events::Theirs(sent.iter().map(event).collect())
    }

    /// Prompts for this subject.
    #[must_use]
    pub fn queries(&self, prompts: &[Prompt]) -> Queries {
        if let Self::Ours(..) = self {
            return Queries::Ours(prompts.iter().map(|p| p.sequence.clone()).collect());
        }
        let tokens = |p: &Prompt| p.tokens.iter().copied().map(LocalBlockHash).collect();
        Queries::Theirs(prompts.iter().map(tokens).collect())
    }

    /// Applies events, and waits until they are.
    ///
    /// # Panics
    /// When an event is refused.
    pub fn apply(&mut self, events: Events) {
        match (self, events) {
            (Self::Ours(index, pool), Events::Ours(events)) => {
                for (slot, data) in events {
                    index.apply(*pool, slot, Tier::Device, &data);
                }
            }
            (Self::Radix(tree), Events::Theirs(events)) => {
                for event in events {
                    tree.apply_event(event).expect("the event is taken");
                }
            }
            (Self::Compressed(pool), Events::Theirs(events)) => pool.apply(events),
            (Self::Positional(pool), Events::Theirs(events)) => pool.apply(events),
            _ => unreachable!("events of another subject"),
        }
    }

    /// Looks every prompt up and returns the sum of all depths found.
    pub fn find(&self, queries: Queries) -> u64 {
        let sum = |scores: dynamo_kv_router::protocols::OverlapScores| {
            scores
                .scores
                .values()
                .map(|depth| u64::from(*depth))
                .sum::<u64>()
        };
        match (self, queries) {
            (Self::Ours(index, pool), Queries::Ours(prompts)) => {
                let found = prompts.iter().map(|prompt| index.overlaps(*pool, prompt));
                found
                    .map(|found| {
                        found
                            .iter()
                            .map(|(_, o)| u64::from(o.depth[0]))
                            .sum::<u64>()
                    })
                    .sum()
            }
            (Self::Radix(tree), Queries::Theirs(prompts)) => {
                let found = prompts.into_iter().map(|p| tree.find_matches(p, false));
                found.map(sum).sum()
            }
            (Self::Compressed(pool), Queries::Theirs(prompts)) => {
                let backend = pool.indexer.backend();
                prompts
                    .iter()
                    .map(|p| sum(backend.find_matches(p, false)))
                    .sum()
            }
            (Self::Positional(pool), Queries::Theirs(prompts)) => {
                let backend = pool.indexer.backend();
                prompts
                    .iter()
                    .map(|p| sum(backend.find_matches(p, false)))
                    .sum()
            }
            _ => unreachable!("prompts of another subject"),
        }
    }
}
