//! A cache's content as stores, parents first, in parts small enough for a message.

use std::collections::HashMap;

use kv_core::event::{EventData, KvCacheEvent, RouterEvent, SnapshotPart, StorageTier};

use crate::chain::Key;
use crate::change::Change;

/// Bytes of JSON in the events of one part; NATS takes 1 MB by default.
const PART_BYTES: usize = 480 * 1024;

/// Blocks in one store: about 90 bytes of JSON each.
const RUN_BLOCKS: usize = 1024;

/// The event of a worker, as it goes on the wire.
#[must_use]
pub(crate) fn event(worker_id: u64, event_id: u64, data: EventData) -> RouterEvent {
    RouterEvent {
        worker_id,
        storage_tier: StorageTier::Device,
        residency_domain: Some("worker".to_owned()),
        event: KvCacheEvent {
            event_id,
            data,
            dp_rank: 0,
        },
        session_id: None,
    }
}

/// Stores that rebuild a cache: each after the store of its parent, where the parent is cached.
#[must_use]
pub(crate) fn runs(mut keys: Vec<Key>) -> Vec<Change> {
    keys.sort_unstable_by_key(|key| key.engine_hash);
    let cached: HashMap<u64, Key> = keys
        .iter()
        .map(|key| (key.engine_hash, key.clone()))
        .collect();
    let mut children: HashMap<u64, Vec<Key>> = HashMap::new();
    let mut open = Vec::new();
    for key in keys {
        match key.parent.filter(|parent| cached.contains_key(parent)) {
            Some(parent) => children.entry(parent).or_default().push(key),
            None => open.push(key),
        }
    }
    let mut runs = Vec::new();
    while let Some(first) = open.pop() {
        let mut run = Vec::new();
        let mut next = Some(first);
        while let Some(key) = next.take() {
            let mut below = children.remove(&key.engine_hash).unwrap_or_default();
            run.push(key);
            if below.len() == 1 && run.len() < RUN_BLOCKS {
                next = below.pop();
            } else {
                open.append(&mut below);
            }
        }
        runs.push(Change::Stored(run));
    }
    runs
}

/// The answer to a snapshot request; one empty part for an empty cache.
#[must_use]
pub(crate) fn parts(worker_id: u64, event_id: u64, keys: Vec<Key>) -> Vec<SnapshotPart> {
    let mut groups: Vec<Vec<RouterEvent>> = vec![Vec::new()];
    let mut bytes = 0;
    for run in runs(keys) {
        let event = event(worker_id, event_id, run.data());
        let size = serde_json::to_vec(&event).map_or(0, |json| json.len() + 1);
        if bytes + size > PART_BYTES {
            groups.push(Vec::new());
            bytes = 0;
        }
        bytes += size;
        if let Some(group) = groups.last_mut() {
            group.push(event);
        }
    }
    let total = u32::try_from(groups.len()).unwrap_or(u32::MAX);
    (0..total)
        .zip(groups)
        .map(|(part, events)| SnapshotPart {
            worker_id,
            event_id,
            part,
            parts: total,
            events,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use kv_core::event::Stored;
    use kv_core::hash::Seed;

    use super::*;
    use crate::chain::Chain;

    fn stores(keys: Vec<Key>) -> Vec<Stored> {
        let store = |run: &Change| match run.data() {
            EventData::Stored(store) => store,
            other => panic!("{other:?}"),
        };
        runs(keys).iter().map(store).collect()
    }

    fn chain(tokens: &[u32]) -> Vec<Key> {
        let mut chain = Chain::new(1, 1, Seed::new("", ""));
        chain.extend(tokens);
        chain.keys().to_vec()
    }

    fn merged(chains: &[Vec<Key>]) -> Vec<Key> {
        let mut seen = HashSet::new();
        let mut keys: Vec<Key> = chains.concat();
        keys.retain(|key| seen.insert(key.engine_hash));
        keys
    }

    #[test]
    fn a_fork_is_three_runs_and_parents_come_first() {
        let keys = merged(&[chain(&[1, 2, 3, 4]), chain(&[1, 2, 5, 6, 7])]);
        let stores = stores(keys.clone());
        assert_eq!(stores.len(), 3);
        let mut known = HashSet::new();
        for store in &stores {
            assert!(
                store
                    .parent_hash
                    .is_none_or(|parent| known.contains(&parent))
            );
            known.extend(store.blocks.iter().map(|block| block.block_hash));
        }
        assert_eq!(known.len(), keys.len());
    }

    #[test]
    fn blocks_without_their_parent_are_told_too() {
        let keys = chain(&[1, 2, 3]);
        let stores = stores(vec![keys[0].clone(), keys[2].clone()]);
        let parents: HashSet<_> = stores.iter().map(|store| store.parent_hash).collect();
        assert_eq!(parents, HashSet::from([None, Some(keys[1].engine_hash)]));
    }

    #[test]
    fn parts_stay_below_the_limit_and_lose_nothing() {
        let tokens: Vec<u32> = (0..20_000).collect();
        let parts = parts(7, 9, chain(&tokens));
        assert!(parts.len() > 1);
        let mut blocks = 0;
        for (at, part) in parts.iter().enumerate() {
            assert_eq!((part.part as usize, part.parts as usize), (at, parts.len()));
            assert!(serde_json::to_vec(part).unwrap().len() < 512 * 1024);
            for event in &part.events {
                let EventData::Stored(store) = &event.event.data else {
                    panic!("{event:?}");
                };
                blocks += store.blocks.len();
            }
        }
        assert_eq!(blocks, tokens.len());
    }

    #[test]
    fn an_empty_cache_answers_with_one_empty_part() {
        let parts = parts(7, 0, Vec::new());
        assert_eq!(
            (parts.len(), parts[0].parts, parts[0].events.len()),
            (1, 1, 0)
        );
    }
}
