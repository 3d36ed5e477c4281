//! What the index takes from the allocator, and that it keeps to its limit.

#![cfg(not(target_arch = "wasm32"))]

use std::alloc::System;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kv_core::event::{EventData, Removed, Stored, StoredBlock};
use kv_core::id::{Slot, Tier};
use kv_core::index::{Index, IndexConfig};
use kv_core::rng::Rng;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// The allocator counts for all tests of the process: one at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes taken and not given back since a moment.
fn taken(region: &Region<'_, System>) -> usize {
    let change = region.change();
    change.bytes_allocated - change.bytes_deallocated
}

fn index(max_bytes: usize) -> Index {
    let mut index = Index::new(IndexConfig {
        epoch: 1,
        level: 6,
        group: 32,
        max_orphans: 1 << 18,
        max_bytes,
        max_page_bytes: usize::MAX,
    });
    index.add_pool(0x1234_5678_9abc_def1);
    index
}

fn blocks(names: impl Iterator<Item = (u64, u64)>) -> Vec<StoredBlock> {
    let block = |(block_hash, tokens_hash)| StoredBlock {
        block_hash,
        tokens_hash,
        mm_extra_info: None,
    };
    names.map(block).collect()
}

fn flush(index: &mut Index) {
    while index.is_dirty() {
        index.flush();
    }
}

#[test]
fn the_index_takes_what_it_says() {
    let _alone = alone();
    // (blocks to a prompt, owners of a prompt, whether engines name blocks alike)
    let shapes = [
        (1_u64, 1_u64, true),
        (20, 1, true),
        (300, 4, true),
        (60, 4, false),
    ];
    for (length, owners, alike) in shapes {
        let region = Region::new(ALLOCATOR);
        let mut index = index(usize::MAX);
        for prompt in 0..60_000_u64 / length {
            for owner in 0..owners {
                let slot = Slot(((prompt * owners + owner) % 64) as u16);
                let name = if alike { 0 } else { u64::from(slot.0) << 56 };
                let hash = |i| (1 + prompt) << 24 | i;
                let names = (0..length).map(|i| (hash(i) ^ name, hash(i)));
                let data = EventData::Stored(Stored {
                    parent_hash: None,
                    start_position: None,
                    blocks: blocks(names),
                });
                index.apply(0, slot, Tier::Device, &data);
            }
        }
        flush(&mut index);
        let stats = index.stats();
        let taken = taken(&region);
        // Its own account includes what a system's allocator adds to each piece, which the counting
        // one does not see.
        let own = stats.bytes;
        assert!(
            own > taken * 95 / 100,
            "{own} told, {taken} taken: {stats:?}"
        );
        assert!(
            own < taken * 130 / 100,
            "{own} told, {taken} taken: {stats:?}"
        );
    }
}

/// Applies random events and returns the most bytes that were taken.
fn most_taken(events: usize, limit: usize) -> usize {
    let mut rng = Rng::new(5);
    // Names that were stored lately, to build on and to remove.
    let mut recent: Vec<(u16, u64)> = vec![(0, 1); 1 << 16];
    let region = Region::new(ALLOCATOR);
    let mut index = index(limit);
    let mut most = 0;
    for event in 0..events {
        let slot = rng.below(64) as u16;
        let at = rng.below(recent.len());
        let (of, name) = recent[at];
        let tier = Tier::from_index(rng.below(4));
        // Chains of large events at times, single blocks at others.
        let longest = if (event / (events / 8)).is_multiple_of(2) {
            2
        } else {
            40
        };
        let (slot, data) = match rng.below(16) {
            0..3 => {
                let block_hashes = vec![name];
                (of, EventData::Removed(Removed { block_hashes }))
            }
            kind => {
                let (slot, parent_hash) = match kind {
                    3..11 => (of, Some(name)),
                    // Of an owner that does not know it.
                    11 => (slot, Some(name)),
                    12 => (slot, Some(rng.next_u64())),
                    _ => (slot, None),
                };
                let count = 1 + rng.below(longest);
                let names = (0..count).map(|_| (rng.next_u64(), rng.next_u64() >> 40));
                let blocks = blocks(names.collect::<Vec<_>>().into_iter());
                recent[at] = (slot, blocks[count - 1].block_hash);
                let stored = Stored {
                    parent_hash,
                    start_position: None,
                    blocks,
                };
                (slot, EventData::Stored(stored))
            }
        };
        index.apply(0, Slot(slot), tier, &data);
        if event % 512 == 0 {
            index.flush();
        }
        if event % 64 == 0 {
            most = most.max(taken(&region));
        }
    }
    let stats = index.stats();
    assert!(stats.evicted_blocks > 0, "the limit was reached: {stats:?}");
    assert!(
        stats.blocks > limit / 400,
        "it is full of blocks: {stats:?}"
    );
    println!("at most {most} bytes: {stats:?}");
    most
}

#[test]
fn random_events_stay_within_the_limit() {
    let _alone = alone();
    let limit = 8 << 20;
    assert!(most_taken(400_000, limit) <= limit);
}

/// Some minutes: `make test-memory`.
#[test]
#[ignore = "some minutes"]
fn millions_of_random_events_stay_within_the_limit() {
    let _alone = alone();
    let limit = 256 << 20;
    assert!(most_taken(24_000_000, limit) <= limit);
}
