//! Prefixes of live requests that the next request may have in common with them.

use std::cmp::Reverse;
use std::collections::HashMap;

use kv_core::id::{OwnerId, Slot};
use kv_core::loads::{LivePrefix, MAX_PREFIXES};
use kv_core::report::OwnerKey;
use kv_core::tracker::Tracker;

/// Live prefixes by pool, with all owners on which they are in use: first those of two or more
/// requests, then those of one at whose end other prompts went on differently, then whole prompts;
/// of each kind the longest first.
pub(super) fn live(tracker: &Tracker, owners: &[Vec<(Slot, OwnerId)>]) -> Vec<Vec<LivePrefix>> {
    let mut ends: Vec<HashMap<u64, End>> = vec![HashMap::new(); owners.len()];
    for prefix in tracker.prefixes() {
        if let Some(ends) = ends.get_mut(usize::from(prefix.pool)) {
            let end = ends.entry(prefix.hash).or_default();
            end.depth = prefix.depth;
            end.parts += u32::from(!prefix.is_whole);
        }
    }
    let pools = (0_u16..).zip(ends).zip(owners);
    pools
        .map(|((pool, ends), owners)| of_pool(tracker, pool, ends, owners))
        .collect()
}

/// The end of a prefix.
#[derive(Clone, Copy, Default)]
struct End {
    depth: u32,
    /// How often it is named as a part of a prompt.
    parts: u32,
}

fn of_pool(
    tracker: &Tracker,
    pool: u16,
    ends: HashMap<u64, End>,
    owners: &[(Slot, OwnerId)],
) -> Vec<LivePrefix> {
    let mut ends: Vec<(u64, End)> = ends.into_iter().collect();
    // By hash at last, so that the same prefixes make the same list.
    ends.sort_unstable_by_key(|(hash, end)| Reverse((end.parts.min(2), end.depth, *hash)));
    ends.truncate(MAX_PREFIXES);
    let prefix = |(hash, end): (u64, End)| {
        let uses =
            |(_, id): &&(Slot, OwnerId)| tracker.is_in_use(&OwnerKey { pool, id: *id }, hash);
        LivePrefix {
            hash,
            depth: end.depth,
            slots: owners.iter().filter(uses).map(|(slot, _)| *slot).collect(),
        }
    };
    ends.into_iter().map(prefix).collect()
}
