mod bounds;

use std::collections::HashMap;
use std::sync::Arc;

use super::*;
use crate::event::{EventData, Removed, Stored, StoredBlock};
use crate::hash::chain;
use crate::naive::Naive;
use crate::overlap::Overlap;
use crate::reader::{Reader, View};
use crate::rng::Rng;

const SECRET: u64 = 0x5eed_5eed_5eed_5eed;

/// What Envoy would hold: pages by id, and the head's level.
struct Envoy {
    pages: HashMap<u32, Arc<[u8]>>,
    level: u8,
    group: u8,
    slots: usize,
    reader: Reader,
}

impl Envoy {
    fn sync(index: &mut Index, group: u8, slots: usize) -> Self {
        let ids = index.page_ids();
        let pages = ids.map(|id| (id, index.page(id))).collect();
        let level = index.level();
        Self {
            pages,
            level,
            group,
            slots,
            reader: Reader::new(),
        }
    }

    /// One flush; the head follows its pages.
    fn flush(&mut self, index: &mut Index) {
        for write in index.flush() {
            self.pages.insert(write.id, write.bytes);
        }
        self.level = index.level();
    }

    /// What has changed is written, growth may be under way.
    fn flush_changes(&mut self, index: &mut Index) {
        self.flush(index);
        while index.stats().dirty_pages > 0 {
            self.flush(index);
        }
    }

    fn overlaps(&mut self, pool: usize, prompt: &[u64], gallop: bool) -> Vec<(Slot, Overlap)> {
        let view = View {
            level: self.level,
            group: self.group,
            epoch: 7,
            pool_key: SECRET + pool as u64,
            family: Family::Dynamo,
            slots: self.slots,
        };
        let fetch = |id| self.pages.get(&id).map(|page| page.to_vec());
        if gallop {
            self.reader.gallop(&view, prompt, fetch);
        } else {
            self.reader.linear(&view, prompt, fetch);
        }
        self.reader
            .held()
            .map(|s| (s, self.reader.overlap(s)))
            .collect()
    }
}

/// A random history over prompts that share prefixes.
struct History {
    rng: Rng,
    index: Index,
    naive: Naive,
    slots: u16,
    length: usize,
    alphabet: u64,
}

impl History {
    fn new(seed: u64, group: u8, slots: u16, length: usize, alphabet: u64) -> Self {
        let config = IndexConfig {
            epoch: 7,
            level: 0,
            group,
            max_orphans: 1 << 20,
            max_bytes: usize::MAX,
            max_page_bytes: usize::MAX,
        };
        let mut index = Index::new(config);
        assert_eq!(index.add_pool(SECRET), 0);
        assert_eq!(index.add_pool(SECRET + 1), 1);
        Self {
            rng: Rng::new(seed),
            index,
            naive: Naive::default(),
            slots,
            length,
            alphabet,
        }
    }

    /// Token hashes of a prompt: the further on, the fewer choices, so prefixes are shared.
    fn tokens(&mut self) -> Vec<u64> {
        let length = 1 + self.rng.below(self.length);
        let mut tokens = Vec::new();
        for i in 0..length {
            let fork = i % 5 == 0 || self.rng.below(40) == 0;
            let choice = if fork {
                self.rng.below(self.alphabet as usize)
            } else {
                0
            };
            tokens.push(0xB10C ^ (choice as u64) << 32 ^ (i as u64) << 8);
        }
        tokens
    }

    fn sequence(tokens: &[u64]) -> Vec<u64> {
        let mut sequence: Vec<u64> = Vec::new();
        for t in tokens {
            sequence.push(sequence.last().map_or(*t, |s| chain(*s, *t)));
        }
        sequence
    }

    /// An engine's name for a block: there are four kinds of engines.
    fn name(slot: Slot, sequence: u64) -> u64 {
        match u64::from(slot.0 % 4) {
            0 => sequence,
            kind => sequence.rotate_left(17) ^ kind << 3,
        }
    }

    fn step(&mut self) {
        let pool = usize::from(self.rng.below(8) == 0);
        let slot = Slot(self.rng.below(usize::from(self.slots)) as u16);
        let tier = Tier::from_index([0, 0, 0, 1, 2, 3][self.rng.below(6)]);
        let tokens = self.tokens();
        let names: Vec<u64> = Self::sequence(&tokens)
            .iter()
            .map(|s| Self::name(slot, *s))
            .collect();
        let from = self.rng.below(tokens.len());
        let data = match self.rng.below(20) {
            0 if self.rng.below(10) == 0 => {
                if self.rng.below(2) == 0 {
                    self.index.remove_owner(pool, slot);
                    self.naive.remove_owner(pool, slot);
                    return;
                }
                EventData::Cleared
            }
            0..8 => {
                let count = 1 + self.rng.below(names.len() - from);
                EventData::Removed(Removed {
                    block_hashes: names[from..from + count].to_vec(),
                })
            }
            kind => {
                // Mostly whole prompts; else a tail whose parent may be unknown.
                let from = if kind < 17 { 0 } else { from };
                let blocks = names[from..]
                    .iter()
                    .zip(&tokens[from..])
                    .map(|(n, t)| StoredBlock {
                        block_hash: *n,
                        tokens_hash: *t,
                        mm_extra_info: None,
                    });
                EventData::Stored(Stored {
                    parent_hash: from.checked_sub(1).map(|i| names[i]),
                    start_position: None,
                    blocks: blocks.collect(),
                })
            }
        };
        self.index.apply(pool, slot, tier, &data);
        self.naive.apply(pool, slot, tier, &data);
    }

    fn check(&mut self, envoy: &mut Envoy) {
        let prompts: Vec<Vec<u64>> = (0..5).map(|_| Self::sequence(&self.tokens())).collect();
        for pool in 0..2 {
            let expected = self.naive.overlaps(pool, &prompts);
            for (prompt, expected) in prompts.iter().zip(expected) {
                assert_eq!(self.index.overlaps(pool, prompt), expected, "tree");
                assert_eq!(envoy.overlaps(pool, prompt, false), expected, "linear");
                assert_eq!(envoy.overlaps(pool, prompt, true), expected, "gallop");
            }
        }
    }
}

fn run(seed: u64, group: u8, slots: u16, length: usize, alphabet: u64, steps: usize) -> IndexStats {
    let mut history = History::new(seed, group, slots, length, alphabet);
    let mut envoy = Envoy::sync(&mut history.index, group, usize::from(slots));
    let mut largest = IndexStats::default();
    for step in 0..steps {
        history.step();
        if step % 10 == 0 {
            envoy.flush_changes(&mut history.index);
            history.check(&mut envoy);
            history.index.tree.check();
        }
        if history.index.stats().blocks > largest.blocks {
            largest = history.index.stats();
        }
    }
    envoy.flush_changes(&mut history.index);
    let mut fresh = Envoy::sync(&mut history.index, group, usize::from(slots));
    history.check(&mut fresh);
    for slot in 0..slots {
        for pool in 0..2 {
            history.index.remove_owner(pool, Slot(slot));
        }
    }
    let stats = history.index.stats();
    let nothing = (
        stats.blocks,
        stats.owner_blocks,
        stats.units,
        stats.owner_sets,
        stats.orphans,
    );
    assert_eq!(nothing, (0, 0, 0, 0, 0));
    let tree = &history.index.tree;
    assert!(tree.by_name.is_empty() && tree.eponymous == 0);
    largest
}

#[test]
fn lookups_equal_the_naive_index_over_random_histories() {
    for seed in 0..60 {
        let group = [1, 4, 8, 32][seed as usize % 4];
        let slots = [3, 20, 70, 300][seed as usize / 4 % 4];
        run(
            seed,
            group,
            slots,
            30 + seed as usize * 3,
            2 + seed % 5,
            400,
        );
    }
}

#[test]
fn lookups_stay_exact_while_units_split_and_pages_multiply() {
    let stats = run(1000, 32, 40, 32, 3, 3000);
    assert!(stats.level >= 3, "{stats:?}");
    // No prompt is longer than a group, so without splits there is a unit for each first block.
    assert!(stats.units > 5 * 2 * 3, "units split: {stats:?}");
}

fn stored(parent: Option<u64>, blocks: &[(u64, u64)]) -> EventData {
    let block = |(block_hash, tokens_hash): &(u64, u64)| StoredBlock {
        block_hash: *block_hash,
        tokens_hash: *tokens_hash,
        mm_extra_info: None,
    };
    EventData::Stored(Stored {
        parent_hash: parent,
        start_position: None,
        blocks: blocks.iter().map(block).collect(),
    })
}

fn removed(hashes: &[u64]) -> EventData {
    EventData::Removed(Removed {
        block_hashes: hashes.to_vec(),
    })
}

fn small() -> Index {
    let mut index = Index::new(IndexConfig {
        epoch: 7,
        level: 2,
        group: 4,
        max_orphans: 8,
        max_bytes: usize::MAX,
        max_page_bytes: usize::MAX,
    });
    index.add_pool(SECRET);
    index
}

const PROMPT: [u64; 4] = [11, 22, 33, 44];

fn depth(index: &Index, slot: u16) -> u32 {
    let found = index.overlaps(0, &History::sequence(&PROMPT));
    found
        .iter()
        .find(|(s, _)| s.0 == slot)
        .map_or(0, |(_, o)| o.depth[0])
}

#[test]
fn a_chain_leads_from_the_first_block_to_the_named_one() {
    let mut index = small();
    index.apply(
        0,
        Slot(1),
        Tier::Device,
        &stored(None, &[(1, 11), (2, 12), (3, 13)]),
    );
    let prompt = [11, chain(11, 12), chain(chain(11, 12), 13)];
    assert_eq!(index.chain(0, prompt[1]), Some(prompt[..2].to_vec()));
    assert_eq!(index.chain(0, prompt[2]), Some(prompt.to_vec()));
    assert_eq!(index.chain(0, 99), None);
    assert_eq!(index.chain(7, prompt[1]), None);
}

#[test]
fn branches_are_where_other_prompts_went_elsewhere() {
    let mut index = small();
    let store = |index: &mut Index, blocks: &[(u64, u64)]| {
        index.apply(0, Slot(1), Tier::Device, &stored(None, blocks));
    };
    store(&mut index, &[(1, 11), (2, 12), (3, 13), (4, 14)]);
    store(&mut index, &[(1, 11), (5, 15)]);
    let prompt = |tokens: &[u64]| History::sequence(tokens);
    let branches = |tokens: &[u64], most| index.branches(0, &prompt(tokens), most);
    assert_eq!(branches(&[11, 12, 13, 14], 9), [0]);
    // It goes a way of its own after the second block.
    assert_eq!(branches(&[11, 12, 99], 9), [1, 0]);
    assert_eq!(branches(&[11, 12, 99], 1), [1]);
    assert_eq!(branches(&[11, 12, 13, 14, 99], 9), [0]);
    assert_eq!(branches(&[11, 12, 13], 9), [0]);
    assert!(branches(&[99, 11], 9).is_empty());
}

#[test]
fn a_removed_middle_hides_what_follows_until_it_returns() {
    let mut index = small();
    let all = [(1, 11), (2, 22), (3, 33), (4, 44)];
    index.apply(0, Slot(0), Tier::Device, &stored(None, &all));
    assert_eq!(
        index
            .apply(0, Slot(0), Tier::Device, &removed(&[2]))
            .removed,
        1
    );
    assert_eq!(depth(&index, 0), 1);
    assert_eq!(index.stats().owner_blocks, 3);
    index.apply(0, Slot(0), Tier::Device, &stored(Some(1), &[(2, 22)]));
    assert_eq!(depth(&index, 0), 4);
    let again = index.apply(0, Slot(0), Tier::Device, &removed(&[9]));
    assert_eq!((again.removed, again.unknown), (0, 1));
}

#[test]
fn workers_whose_engines_hash_differently_share_blocks() {
    let mut index = small();
    index.apply(0, Slot(0), Tier::Device, &stored(None, &[(1, 11), (2, 22)]));
    index.apply(
        0,
        Slot(1),
        Tier::Device,
        &stored(None, &[(101, 11), (102, 22)]),
    );
    index.apply(0, Slot(1), Tier::Device, &stored(Some(102), &[(103, 33)]));
    assert_eq!((depth(&index, 0), depth(&index, 1)), (2, 3));
    assert_eq!(index.stats().blocks, 3);
    index.apply(0, Slot(1), Tier::Device, &removed(&[102]));
    assert_eq!((depth(&index, 0), depth(&index, 1)), (2, 1));
}

#[test]
fn an_orphan_waits_for_its_parent_within_the_bound() {
    let mut index = small();
    let orphan = index.apply(
        0,
        Slot(0),
        Tier::Device,
        &stored(Some(2), &[(3, 33), (4, 44)]),
    );
    assert_eq!((orphan.orphaned, index.stats().orphans), (2, 2));
    index.apply(0, Slot(0), Tier::Device, &removed(&[4]));
    let parent = index.apply(0, Slot(0), Tier::Device, &stored(None, &[(1, 11), (2, 22)]));
    assert_eq!((parent.stored, parent.adopted), (2, 1));
    assert_eq!((depth(&index, 0), index.stats().orphans), (3, 0));
    let many: Vec<(u64, u64)> = (100..109).map(|h| (h, h)).collect();
    let over = index.apply(0, Slot(0), Tier::Device, &stored(Some(99), &many));
    assert_eq!((over.orphans_dropped, index.stats().orphans), (9, 0));
}

#[test]
fn a_removed_block_does_not_come_back_with_a_store_that_waited() {
    let waits_twice = [
        stored(Some(2), &[(3, 33)]),
        stored(Some(2), &[(3, 33), (4, 44)]),
    ];
    let held_and_waits = [
        stored(None, &[(1, 11), (2, 22), (3, 33)]),
        removed(&[2]),
        stored(Some(2), &[(3, 33)]),
    ];
    for before in [waits_twice.as_slice(), &held_and_waits] {
        let mut index = small();
        let end = [removed(&[3]), stored(None, &[(1, 11), (2, 22)])];
        for data in before.iter().chain(&end) {
            index.apply(0, Slot(0), Tier::Device, data);
        }
        assert_eq!(depth(&index, 0), 2, "{before:?}");
    }
}

#[test]
fn a_block_with_two_names_stays_until_both_are_gone() {
    let mut index = small();
    index.apply(0, Slot(0), Tier::Device, &stored(None, &[(1, 11)]));
    let second = index.apply(0, Slot(0), Tier::Device, &stored(None, &[(2, 11)]));
    assert_eq!((second.stored, second.duplicates), (0, 1));
    index.apply(0, Slot(0), Tier::Device, &removed(&[1]));
    assert_eq!(depth(&index, 0), 1);
    index.apply(0, Slot(0), Tier::Device, &removed(&[2]));
    assert_eq!((depth(&index, 0), index.stats().blocks), (0, 0));
}

#[test]
fn names_that_are_hashes_of_other_blocks_find_their_own() {
    let mut index = small();
    let tokens = [1, 2, 3, 4];
    let hash = History::sequence(&tokens);
    // Each block has the hash of another one for a name, then its own.
    let crossed = [(hash[1], 1), (hash[0], 2), (hash[3], 3), (hash[2], 4)];
    index.apply(0, Slot(0), Tier::Device, &stored(None, &crossed));
    let own: Vec<_> = hash.iter().copied().zip(tokens).collect();
    index.apply(0, Slot(1), Tier::Device, &stored(None, &own));
    index.tree.check();
    let found = |index: &Index| {
        let found = index.overlaps(0, &hash).into_iter();
        found
            .map(|(_, overlap)| overlap.depth[0])
            .collect::<Vec<_>>()
    };
    assert_eq!(found(&index), [4, 4]);
    index.apply(0, Slot(0), Tier::Device, &removed(&[hash[2]]));
    index.apply(0, Slot(1), Tier::Device, &removed(&[hash[2]]));
    index.tree.check();
    assert_eq!(found(&index), [3, 2]);
}

#[test]
fn a_store_that_repeats_a_name_or_a_hash_adds_what_stands_before() {
    let mut index = small();
    let twice = [(11, 1), (12, 2), (13, 3), (12, 4), (15, 5)];
    let applied = index.apply(0, Slot(0), Tier::Device, &stored(None, &twice));
    index.tree.check();
    // The name has moved on to the fourth block, so the second one is held no more.
    assert_eq!((applied.stored, applied.renamed), (5, 1));
    let hash = History::sequence(&[1, 2, 3, 4, 5]);
    let found = index.overlaps(0, &hash);
    assert_eq!(found.first().map(|(_, overlap)| overlap.depth[0]), Some(1));
    assert_eq!(index.stats().owner_blocks, 4);
}

#[test]
fn a_name_that_moves_leaves_its_old_block() {
    let mut index = small();
    index.apply(
        0,
        Slot(0),
        Tier::Device,
        &stored(None, &[(1, 11), (2, 22), (3, 33)]),
    );
    let moved = index.apply(0, Slot(0), Tier::Device, &stored(None, &[(3, 11)]));
    assert_eq!(moved.renamed, 1);
    assert_eq!((depth(&index, 0), index.stats().blocks), (2, 2));
}

#[test]
fn a_dump_rebuilds_an_owner_hidden_blocks_included() {
    for seed in 0..10 {
        let mut history = History::new(seed, 8, 6, 40, 3);
        (0..200).for_each(|_| history.step());
        let config = IndexConfig {
            epoch: 7,
            level: 3,
            group: 8,
            max_orphans: 0,
            max_bytes: usize::MAX,
            max_page_bytes: usize::MAX,
        };
        let mut copy = Index::new(config);
        copy.add_pool(SECRET);
        copy.add_pool(SECRET + 1);
        for pool in 0..2 {
            for slot in (0..6).map(Slot) {
                let dump = history.index.dump(pool, slot);
                assert_eq!(copy.restore(pool, slot, &dump).collisions, 0);
                assert_eq!(copy.dump(pool, slot).len(), dump.len());
            }
        }
        let (a, b) = (history.index.stats(), copy.stats());
        assert_eq!((a.blocks, a.owner_blocks), (b.blocks, b.owner_blocks));
        for _ in 0..50 {
            let prompt = History::sequence(&history.tokens());
            assert_eq!(
                copy.overlaps(0, &prompt),
                history.index.overlaps(0, &prompt)
            );
        }
    }
}

#[test]
fn ten_thousand_continuations_of_one_prompt_keep_pages_small() {
    let config = IndexConfig {
        epoch: 7,
        level: 4,
        group: 32,
        max_orphans: 0,
        max_bytes: usize::MAX,
        max_page_bytes: usize::MAX,
    };
    let mut index = Index::new(config);
    index.add_pool(SECRET);
    let shared: Vec<(u64, u64)> = (0..40).map(|i| (i, i)).collect();
    index.apply(0, Slot(0), Tier::Device, &stored(None, &shared));
    for c in 0..10_000_u64 {
        let tail: Vec<(u64, u64)> = (1..=20)
            .map(|i| (c << 8 | i << 40, c << 16 | i << 48))
            .collect();
        index.apply(0, Slot(0), Tier::Device, &stored(Some(39), &tail));
        index.flush();
    }
    while index.is_dirty() {
        index.flush();
    }
    let largest = index.page_ids().map(|id| index.page(id).len()).max();
    assert!(largest < Some(6 << 10), "{largest:?}");
    let stats = index.stats();
    assert_eq!((stats.blocks, stats.left_out_units), (40 + 200_000, 0));
    assert!(stats.page_bytes < 5 * stats.blocks, "{stats:?}");
}
