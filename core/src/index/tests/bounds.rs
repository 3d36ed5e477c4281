//! The index within its limits.

use super::*;

fn limited(max_bytes: usize, max_page_bytes: usize) -> Index {
    let mut index = Index::new(IndexConfig {
        epoch: 7,
        level: 2,
        group: 8,
        max_orphans: 1 << 16,
        max_bytes,
        max_page_bytes,
    });
    index.add_pool(SECRET);
    index.add_pool(SECRET + 1);
    index
}

/// Prompt number `number`, of `length` blocks, whose names are its token hashes.
fn prompt(number: u64, length: u64) -> Vec<(u64, u64)> {
    let hash = |i| (1 + number) << 32 | i;
    (0..length).map(|i| (hash(i), hash(i))).collect()
}

fn sequence(prompt: &[(u64, u64)]) -> Vec<u64> {
    History::sequence(&prompt.iter().map(|(_, tokens)| *tokens).collect::<Vec<_>>())
}

fn held(index: &Index, prompt: &[(u64, u64)]) -> u32 {
    let found = index.overlaps(0, &sequence(prompt));
    found.first().map_or(0, |(_, overlap)| overlap.depth[0])
}

/// Stores prompts until the index has dropped some block.
fn fill(index: &mut Index, from: u64, length: u64) -> u64 {
    let evicted = index.stats().evicted_blocks;
    let mut number = from;
    while index.stats().evicted_blocks == evicted {
        let all = stored(None, &prompt(number, length));
        index.apply(0, Slot(0), Tier::Device, &all);
        number += 1;
    }
    number
}

#[test]
fn what_was_stored_first_goes_first_and_from_its_end() {
    let mut index = limited(1 << 20, usize::MAX);
    let end = fill(&mut index, 0, 20);
    let evicted = index.stats().evicted_blocks;
    assert!(evicted < 20, "no more goes than must: {evicted}");
    assert_eq!(u64::from(held(&index, &prompt(0, 20))), 20 - evicted);
    assert!((1..end).all(|number| held(&index, &prompt(number, 20)) == 20));
    fill(&mut index, end, 20);
    assert!(index.stats().bytes <= 1 << 20);
}

#[test]
fn what_is_in_use_stays() {
    let mut index = limited(1 << 20, usize::MAX);
    let used = prompt(0, 20);
    let mut end = fill(&mut index, 0, 20);
    // It has lost its last blocks; the rest is looked up again and again.
    let kept = held(&index, &used);
    for _ in 0..300 {
        let before = index.chain(0, sequence(&used)[kept as usize - 1]);
        index.touch(
            0,
            *before
                .and_then(|chain| chain.last().copied())
                .as_ref()
                .unwrap(),
        );
        end = fill(&mut index, end, 20);
    }
    assert_eq!(held(&index, &used), kept);
    assert_eq!(
        held(&index, &prompt(1, 20)),
        0,
        "it was used before all others"
    );
}

#[test]
fn a_prefix_is_as_fresh_as_the_freshest_prompt_that_begins_with_it() {
    let mut index = limited(1 << 20, usize::MAX);
    let shared = prompt(0, 10);
    index.apply(0, Slot(0), Tier::Device, &stored(None, &shared));
    for number in 1..5000 {
        let parent = (number % 100 == 0).then(|| shared[9].0);
        let other = stored(parent, &prompt(number, 20));
        index.apply(0, Slot(0), Tier::Device, &other);
    }
    assert!(held(&index, &prompt(1, 20)) == 0 && index.stats().evicted_blocks > 10_000);
    assert_eq!(held(&index, &shared), 10);
}

#[test]
fn an_evicted_block_is_unknown_and_stores_below_it_do_not_pile_up() {
    let mut index = limited(1 << 20, usize::MAX);
    let first = prompt(0, 20);
    let mut end = fill(&mut index, 0, 20);
    while held(&index, &first) > 0 {
        end = fill(&mut index, end, 20);
    }
    let gone = index.apply(0, Slot(0), Tier::Device, &removed(&[first[19].0]));
    assert_eq!((gone.removed, gone.unknown), (0, 1));
    let mut dropped = 0;
    for child in 0..100_000 {
        let below = stored(Some(first[19].0), &[(1 + child, child)]);
        let applied = index.apply(0, Slot(0), Tier::Device, &below);
        assert_eq!(applied.orphaned, 1);
        dropped += applied.orphans_dropped;
    }
    let stats = index.stats();
    assert_eq!(stats.orphans + dropped as usize, 100_000);
    assert!(stats.orphans < 2000 && stats.bytes <= 1 << 20, "{stats:?}");
    // The engine computes it anew: the stores that still wait come back with it.
    let again = index.apply(0, Slot(0), Tier::Device, &stored(None, &first));
    assert_eq!((again.stored, again.adopted as usize), (20, stats.orphans));
}

#[test]
fn names_of_evicted_blocks_are_forgotten_with_them() {
    let mut index = limited(1 << 20, usize::MAX);
    let first = prompt(0, 8);
    let other: Vec<(u64, u64)> = first.iter().map(|(name, t)| (!name, *t)).collect();
    index.apply(0, Slot(0), Tier::Device, &stored(None, &first));
    index.apply(0, Slot(1), Tier::Device, &stored(None, &other));
    assert_eq!(index.owner_blocks(0, Slot(1)), 8);
    let mut end = 1;
    while !index.overlaps(0, &sequence(&first)).is_empty() {
        end = fill(&mut index, end, 20);
    }
    assert_eq!(index.owner_blocks(0, Slot(1)), 0);
    let gone = index.apply(0, Slot(1), Tier::Device, &removed(&[other[0].0]));
    assert_eq!((gone.removed, gone.unknown), (0, 1));
}

#[test]
fn pages_stay_within_their_limit() {
    let mut index = limited(usize::MAX, 64 << 10);
    let mut most = 0;
    for number in 0..4000 {
        let all = stored(None, &prompt(number, 20));
        index.apply(0, Slot(0), Tier::Device, &all);
        while index.is_dirty() {
            index.flush();
        }
        most = most.max(index.stats().envoy_bytes);
    }
    let stats = index.stats();
    assert!(stats.evicted_blocks > 0, "{stats:?}");
    // What one flush may add.
    assert!(most <= (64 << 10) + 1024, "{most}");
    assert_eq!(held(&index, &prompt(3999, 20)), 20);
}

/// Over random histories: nothing is credited that an owner does not hold, what is published is
/// what the tree says, and the tables agree with the tree.
#[test]
fn a_full_index_credits_no_owner_with_what_it_lacks() {
    for seed in 0..4 {
        let mut history = History::new(seed, 8, 20, 200, 12);
        history.index = limited(1 << 20, 20 << 10);
        let mut envoy = Envoy::sync(&mut history.index, 8, 20);
        for step in 0..2000 {
            history.step();
            assert!(history.index.bytes() <= 1 << 20);
            if step % 100 > 0 {
                continue;
            }
            envoy.flush_changes(&mut history.index);
            history.index.tree.check();
            let prompts: Vec<_> = (0..5)
                .map(|_| History::sequence(&history.tokens()))
                .collect();
            let most = history.naive.overlaps(0, &prompts);
            for (prompt, most) in prompts.iter().zip(most) {
                let found = history.index.overlaps(0, prompt);
                assert_eq!(envoy.overlaps(0, prompt, true), found);
                assert_eq!(envoy.overlaps(0, prompt, false), found);
                for (slot, overlap) in found {
                    let held = most.iter().find(|(s, _)| *s == slot);
                    let (_, held) = held.expect("an owner that holds some");
                    let pairs = overlap.depth.iter().zip(&held.depth);
                    assert!(pairs.clone().all(|(found, held)| found <= held));
                }
            }
        }
        let stats = history.index.stats();
        assert!(stats.evicted_blocks > 100, "{stats:?}");
        for slot in 0..20 {
            for pool in 0..2 {
                history.index.remove_owner(pool, Slot(slot));
            }
        }
        history.index.tree.check();
        let stats = history.index.stats();
        assert_eq!((stats.blocks, stats.owner_blocks, stats.orphans), (0, 0, 0));
    }
}

#[test]
fn what_was_evicted_does_not_count_against_the_limit_of_its_family() {
    let mut index = limited(1 << 20, usize::MAX);
    index.limit(0, Family::FlexKv, 50);
    let chain = |number| -> Vec<(u64, u64)> { prompt(number, 40) };
    let announce = |index: &mut Index, number| {
        let all = stored(None, &chain(number));
        index.apply_family(0, Family::FlexKv, Slot(0), Tier::Host, &all)
    };
    announce(&mut index, 1 << 20);
    let of_family = |index: &Index| {
        let names = index.names(0, Slot(0));
        names.iter().filter(|(f, _)| *f == Family::FlexKv).count()
    };
    let mut end = 0;
    while of_family(&index) > 0 {
        end = fill(&mut index, end, 20);
    }
    assert_eq!(announce(&mut index, 2 << 20).expired, 0);
    assert_eq!(of_family(&index), 40);
    assert_eq!(announce(&mut index, 3 << 20).expired, 30);
}
