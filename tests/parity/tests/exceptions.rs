//! Where our index and Dynamo's differ on purpose: each case with what either says and why.

use kv_core::event::{EventData, Removed, Stored, StoredBlock};
use kv_core::hash::chain;
use kv_core::id::{OwnerId, Slot, Tier};
use kv_core::index::{Index, IndexConfig};
use kv_parity::content::Depths;
use kv_parity::oracle::Oracle;

const A: OwnerId = OwnerId { worker: 1, rank: 0 };
const B: OwnerId = OwnerId { worker: 2, rank: 0 };

/// The blocks of the one prompt all cases are about, by their token hashes.
const PROMPT: [u64; 4] = [11, 22, 33, 44];

/// Both indexes, fed the same.
struct Both {
    ours: Index,
    theirs: Oracle,
}

impl Both {
    fn new() -> Self {
        let mut ours = Index::new(IndexConfig {
            epoch: 1,
            level: 0,
            group: 32,
            max_orphans: 64,
            max_bytes: usize::MAX,
            max_page_bytes: usize::MAX,
        });
        ours.add_pool(1);
        Self {
            ours,
            theirs: Oracle::new(),
        }
    }

    fn apply(&mut self, owner: OwnerId, tier: Tier, data: &EventData) {
        self.ours.apply(0, slot(owner), tier, data);
        self.theirs.apply(owner, tier, data);
    }

    /// Blocks of a rank, (name, position in the prompt), below the block named `parent`.
    fn store(&mut self, owner: OwnerId, tier: Tier, parent: Option<u64>, blocks: &[(u64, usize)]) {
        let blocks = blocks.iter().map(|(name, at)| StoredBlock {
            block_hash: *name,
            tokens_hash: PROMPT[*at],
            mm_extra_info: None,
        });
        let stored = Stored {
            parent_hash: parent,
            start_position: None,
            blocks: blocks.collect(),
        };
        self.apply(owner, tier, &EventData::Stored(stored));
    }

    fn remove(&mut self, owner: OwnerId, tier: Tier, names: &[u64]) {
        let block_hashes = names.to_vec();
        self.apply(owner, tier, &EventData::Removed(Removed { block_hashes }));
    }

    /// What we say a rank holds of the prompt, and what Dynamo says.
    fn depths(&self, owner: OwnerId) -> (Depths, Depths) {
        let mut sequence: Vec<u64> = Vec::new();
        for block in PROMPT {
            sequence.push(
                sequence
                    .last()
                    .map_or(block, |before| chain(*before, block)),
            );
        }
        let ours = self.ours.overlaps(0, &sequence);
        let ours = ours.iter().find(|(s, _)| *s == slot(owner));
        let theirs = self.theirs.depths(&PROMPT);
        (
            ours.map(|(_, overlap)| overlap.depth).unwrap_or_default(),
            theirs.get(&owner).copied().unwrap_or_default(),
        )
    }

    /// The same for device blocks alone.
    fn device(&self, owner: OwnerId) -> (u32, u32) {
        let (ours, theirs) = self.depths(owner);
        (ours[0], theirs[0])
    }
}

fn slot(owner: OwnerId) -> Slot {
    Slot(u16::try_from(owner.worker).unwrap())
}

/// A chain is one edge of Dynamo's tree, and a rank owns a leading part of it: a removal in the
/// middle cuts off what follows, though the engine still holds it.
#[test]
fn dynamo_forgets_the_blocks_behind_a_removed_one() {
    let mut both = Both::new();
    both.store(A, Tier::Device, None, &[(1, 0), (2, 1), (3, 2), (4, 3)]);
    both.remove(A, Tier::Device, &[2]);
    assert_eq!(both.device(A), (1, 1));
    both.store(A, Tier::Device, Some(1), &[(2, 1)]);
    assert_eq!(both.device(A), (4, 2));
}

/// When the last rank leaves an edge, Dynamo drops all that hangs on it. The rank's table of
/// blocks still leads to what was dropped, so later stores go where no lookup comes.
#[test]
fn dynamo_forgets_what_hangs_on_an_edge_without_ranks() {
    let mut both = Both::new();
    both.store(A, Tier::Device, None, &[(1, 0), (2, 1)]);
    // A second continuation makes the edge end behind the second block.
    both.store(A, Tier::Device, Some(2), &[(9, 0)]);
    both.store(A, Tier::Device, Some(2), &[(3, 2)]);
    assert_eq!(both.device(A), (3, 3));
    both.remove(A, Tier::Device, &[1]);
    both.store(A, Tier::Device, None, &[(1, 0), (2, 1)]);
    assert_eq!(both.device(A), (3, 2));
    both.store(A, Tier::Device, Some(3), &[(4, 3)]);
    assert_eq!(both.device(A), (4, 2));
}

/// A store that overtakes its parent's is dropped by Dynamo. Ours waits, within a bound.
#[test]
fn dynamo_drops_a_store_that_comes_before_its_parents() {
    let mut both = Both::new();
    both.store(A, Tier::Device, Some(2), &[(3, 2), (4, 3)]);
    both.store(A, Tier::Device, None, &[(1, 0), (2, 1)]);
    assert_eq!(both.device(A), (4, 2));
}

/// An edge of Dynamo's tree carries the engine hashes of its first writer. A rank whose engine
/// names the same tokens otherwise is credited, but neither its removals nor its further stores
/// find their blocks: it is credited with what it dropped and not with what it holds.
#[test]
fn dynamo_over_credits_a_rank_whose_engine_names_blocks_otherwise() {
    let mut both = Both::new();
    both.store(A, Tier::Device, None, &[(1, 0), (2, 1)]);
    both.store(B, Tier::Device, None, &[(101, 0), (102, 1)]);
    assert_eq!(both.device(B), (2, 2));
    both.store(B, Tier::Device, Some(102), &[(103, 2)]);
    assert_eq!(both.device(B), (3, 2));
    both.remove(B, Tier::Device, &[101, 102, 103]);
    assert_eq!(both.device(B), (0, 2));
}

/// The same on the slower tiers, where the second name for the same tokens is refused.
#[test]
fn dynamo_refuses_a_second_name_on_slower_tiers() {
    let mut both = Both::new();
    both.store(A, Tier::Host, None, &[(1, 0), (2, 1)]);
    both.store(B, Tier::Host, None, &[(101, 0), (102, 1)]);
    assert_eq!(both.depths(A), ([0, 2, 2, 2], [0, 2, 2, 2]));
    assert_eq!(both.depths(B), ([0, 2, 2, 2], [0; 4]));
}

/// Dynamo looks up device, host, disk and external once each, in that order: a block on a faster
/// tier behind one on a slower is not credited. Ours counts it for the slower tier.
#[test]
fn dynamo_does_not_go_back_to_a_faster_tier() {
    let mut both = Both::new();
    both.store(A, Tier::Host, None, &[(1, 0)]);
    both.store(A, Tier::Disk, Some(1), &[(2, 1)]);
    assert_eq!(both.depths(A), ([0, 1, 2, 2], [0, 1, 2, 2]));
    both.store(A, Tier::Host, Some(2), &[(3, 2), (4, 3)]);
    assert_eq!(both.depths(A), ([0, 1, 4, 4], [0, 1, 2, 2]));
}
