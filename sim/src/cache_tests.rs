use std::collections::HashMap;

use kv_core::event::EventData;
use kv_core::hash::Seed;
use proptest::prelude::*;

use super::*;
use crate::chain::Chain;

const BLOCK: usize = 2;

fn keys(tokens: &[u32]) -> Vec<Key> {
    let mut chain = Chain::new(1, BLOCK, Seed::new("", ""));
    chain.extend(tokens);
    chain.keys().to_vec()
}

/// Runs one sequence to its end.
fn run(cache: &mut Cache, keys: &[Key]) -> usize {
    let (mut lease, hits) = cache.admit(keys, keys.len()).expect("room");
    cache.commit(&mut lease, keys);
    cache.release(lease);
    hits
}

/// What a listener knows after these events.
#[derive(Default)]
struct Listener(HashMap<u64, (u64, Option<u64>)>);

impl Listener {
    fn apply(&mut self, changes: &[Change]) {
        for change in changes {
            match change.data() {
                EventData::Stored(run) => {
                    let mut parent = run.parent_hash;
                    for block in run.blocks {
                        let old = self.0.insert(block.block_hash, (block.tokens_hash, parent));
                        assert_eq!(old, None, "stored twice");
                        parent = Some(block.block_hash);
                    }
                }
                EventData::Removed(run) => {
                    for hash in run.block_hashes {
                        assert!(self.0.remove(&hash).is_some(), "removed, never stored");
                    }
                }
                EventData::Cleared => self.0.clear(),
            }
        }
    }

    fn assert_equals(&self, cache: &Cache) {
        let content: HashMap<_, _> = cache
            .keys()
            .map(|key| (key.engine_hash, (key.tokens_hash, key.parent)))
            .collect();
        assert_eq!(self.0, content);
    }
}

#[test]
fn a_repeated_prompt_hits_and_another_does_not() {
    let mut cache = Cache::new(8);
    assert_eq!(run(&mut cache, &keys(&[1, 2, 3, 4])), 0);
    assert_eq!(run(&mut cache, &keys(&[1, 2, 3, 4, 5, 6])), 2);
    assert_eq!(run(&mut cache, &keys(&[9, 2, 3, 4])), 0);
}

#[test]
fn the_leaf_of_the_least_recently_used_chain_goes_first() {
    let mut cache = Cache::new(4);
    let old = keys(&[1, 1, 2, 2]);
    let young = keys(&[3, 3, 4, 4]);
    run(&mut cache, &old);
    run(&mut cache, &young);
    cache.take_changes();
    for expected in [&old[1], &old[0], &young[1], &young[0]] {
        assert_eq!(cache.evict(1), 1);
        let change = Change::Removed(vec![expected.engine_hash]);
        assert_eq!(cache.take_changes(), [change]);
    }
    assert_eq!(cache.evict(1), 0);
}

#[test]
fn a_hit_makes_a_chain_young_again() {
    let mut cache = Cache::new(4);
    let first = keys(&[1, 1, 2, 2]);
    let second = keys(&[3, 3, 4, 4]);
    run(&mut cache, &first);
    run(&mut cache, &second);
    run(&mut cache, &first);
    run(&mut cache, &keys(&[5, 5]));
    assert_eq!(cache.overlap(&first), 2);
    assert_eq!(cache.overlap(&second), 1);
}

#[test]
fn pinned_blocks_are_neither_evicted_nor_removed() {
    let mut cache = Cache::new(3);
    let held = keys(&[1, 1, 2, 2]);
    let (mut lease, _) = cache.admit(&held, 2).expect("room");
    cache.commit(&mut lease, &held);
    assert_eq!(cache.evict(3), 0);
    assert_eq!(cache.remove(&[held[0].engine_hash]), 0);
    assert!(cache.admit(&keys(&[3, 3, 4, 4]), 2).is_none());
    assert_eq!(cache.overlap(&held), 2);
    cache.release(lease);
    assert!(cache.admit(&keys(&[3, 3, 4, 4]), 2).is_some());
}

#[test]
fn refused_admission_changes_nothing() {
    let mut cache = Cache::new(3);
    let cached = keys(&[1, 1, 2, 2]);
    run(&mut cache, &cached);
    cache.take_changes();
    // Two hits that stay plus two blocks more than the cache has.
    assert!(cache.admit(&cached, 4).is_none());
    assert_eq!(cache.pinned(), 0);
    assert_eq!(cache.take_changes(), []);
}

#[test]
fn twins_computed_at_once_share_one_block() {
    let mut cache = Cache::new(4);
    let prompt = keys(&[1, 1, 2, 2]);
    let (mut first, _) = cache.admit(&prompt, 2).expect("room");
    let (mut second, hits) = cache.admit(&prompt, 2).expect("room");
    assert_eq!(hits, 0);
    cache.commit(&mut first, &prompt);
    cache.commit(&mut second, &prompt);
    assert_eq!(cache.pinned(), 2);
    cache.release(first);
    assert_eq!(cache.evict(4), 0);
    cache.release(second);
    assert_eq!(cache.evict(4), 2);
}

#[test]
fn a_hole_in_a_chain_closes_when_its_block_is_stored_again() {
    let mut cache = Cache::new(4);
    let prompt = keys(&[1, 1, 2, 2, 3, 3]);
    run(&mut cache, &prompt);
    assert_eq!(cache.remove(&[prompt[1].engine_hash, 77]), 1);
    assert_eq!(cache.overlap(&prompt), 1);
    run(&mut cache, &prompt[..2]);
    assert_eq!(cache.overlap(&prompt), 3);
}

#[test]
fn a_sequence_that_outlives_a_clear_names_nothing() {
    let mut cache = Cache::new(4);
    let prompt = keys(&[1, 1, 2, 2]);
    let (mut lease, _) = cache.admit(&prompt, 2).expect("room");
    cache.commit(&mut lease, &prompt[..1]);
    cache.clear();
    cache.take_changes();
    cache.commit(&mut lease, &prompt);
    assert_eq!(cache.take_changes(), []);
    cache.release(lease);
    assert_eq!(cache.keys().count(), 0);
    assert_eq!(run(&mut cache, &prompt), 0);
}

#[test]
fn a_run_of_stores_is_one_change_with_its_parent() {
    let mut cache = Cache::new(8);
    let prompt = keys(&[1, 1, 2, 2, 3, 3]);
    run(&mut cache, &prompt[..1]);
    cache.take_changes();
    run(&mut cache, &prompt);
    let changes = cache.take_changes();
    let [Change::Stored(stored)] = changes.as_slice() else {
        panic!("{changes:?}");
    };
    assert_eq!(stored[0].parent, Some(prompt[0].engine_hash));
    assert_eq!(stored.len(), 2);
}

#[derive(Clone, Debug)]
enum Step {
    Start(Vec<u32>),
    Grow(usize),
    Finish(usize),
    Remove(usize),
    Evict(usize),
    Clear,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => prop::collection::vec(0..2_u32, 1..14).prop_map(Step::Start),
        4 => any::<usize>().prop_map(Step::Grow),
        6 => any::<usize>().prop_map(Step::Finish),
        2 => any::<usize>().prop_map(Step::Remove),
        1 => (0..4_usize).prop_map(Step::Evict),
        1 => Just(Step::Clear),
    ]
}

/// Plays steps, checking the invariants after each; `holes` allows removals inside chains.
fn play(steps: Vec<Step>, holes: bool) {
    let mut cache = Cache::new(16);
    let mut live: Vec<(Lease, Vec<Key>)> = Vec::new();
    let mut listener = Listener::default();
    for step in steps {
        match step {
            Step::Start(tokens) => {
                let keys = keys(&tokens);
                let expected = cache.overlap(&keys);
                if let Some((mut lease, hits)) = cache.admit(&keys, keys.len() + 1) {
                    assert_eq!(hits, expected);
                    cache.commit(&mut lease, &keys);
                    live.push((lease, keys));
                }
            }
            Step::Grow(pick) if !live.is_empty() => {
                let at = pick % live.len();
                let (lease, keys) = &mut live[at];
                let mut tokens = Chain::new(1, BLOCK, Seed(keys.len() as u64));
                tokens.extend(&[0, 0]);
                if cache.grow(lease, 1) {
                    let parent = keys.last().map(|key| key.engine_hash);
                    let mut next = tokens.keys()[0].clone();
                    next.engine_hash = crate::rng::mix(parent.unwrap_or(1));
                    next.parent = parent;
                    keys.push(next);
                    cache.commit(lease, keys);
                }
            }
            Step::Finish(pick) if !live.is_empty() => {
                cache.release(live.swap_remove(pick % live.len()).0);
            }
            Step::Remove(pick) if holes => {
                let mut names: Vec<u64> = cache.keys().map(|key| key.engine_hash).collect();
                names.sort_unstable();
                if !names.is_empty() {
                    cache.remove(&[names[pick % names.len()]]);
                }
            }
            Step::Evict(count) => {
                cache.evict(count);
            }
            Step::Clear => cache.clear(),
            Step::Grow(_) | Step::Finish(_) | Step::Remove(_) => {}
        }
        listener.apply(&cache.take_changes());
        listener.assert_equals(&cache);
        if !holes {
            for key in cache.keys() {
                let parent = key
                    .parent
                    .is_none_or(|parent| cache.named.contains_key(&parent));
                assert!(parent, "a block lost its parent");
            }
        }
        let pinned = cache.blocks.iter().filter(|block| block.pins > 0).count();
        assert_eq!(pinned, cache.pinned());
    }
    for (lease, _) in live {
        cache.release(lease);
    }
    assert_eq!(cache.pinned(), 0);
    assert_eq!(cache.empty.len() + cache.idle.len(), cache.capacity());
}

proptest! {
    #[test]
    fn events_replay_to_the_content_whatever_happens(
        steps in prop::collection::vec(step(), 1..80)
    ) {
        play(steps, true);
    }

    #[test]
    fn without_forced_removals_the_cache_is_prefix_closed(
        steps in prop::collection::vec(step(), 1..80)
    ) {
        play(steps, false);
    }
}
