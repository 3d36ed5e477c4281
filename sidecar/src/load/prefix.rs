//! Prefixes that live requests share.

use kv_core::id::{OwnerId, Slot};
use kv_core::loads::{LivePrefix, MAX_PREFIXES};
use kv_core::report::OwnerKey;
use kv_core::tracker::Tracker;

/// The longest prefixes that two or more requests on some owner share, by pool, longest first, with
/// all owners on which they are in use.
pub(super) fn live(tracker: &Tracker, owners: &[Vec<(Slot, OwnerId)>]) -> Vec<Vec<LivePrefix>> {
    let mut ends: Vec<Vec<(u32, u64)>> = vec![Vec::new(); owners.len()];
    for (owner, hash, depth) in tracker.shared_prefixes() {
        if let Some(ends) = ends.get_mut(usize::from(owner.pool)) {
            ends.push((depth, hash));
        }
    }
    let pools = (0_u16..).zip(ends).zip(owners);
    pools
        .map(|((pool, ends), owners)| of_pool(tracker, pool, ends, owners))
        .collect()
}

fn of_pool(
    tracker: &Tracker,
    pool: u16,
    mut ends: Vec<(u32, u64)>,
    owners: &[(Slot, OwnerId)],
) -> Vec<LivePrefix> {
    ends.sort_unstable_by(|a, b| b.cmp(a));
    ends.dedup();
    ends.truncate(MAX_PREFIXES);
    let prefix = |(depth, hash)| {
        let uses =
            |(_, id): &&(Slot, OwnerId)| tracker.is_in_use(&OwnerKey { pool, id: *id }, hash);
        LivePrefix {
            hash,
            depth,
            slots: owners.iter().filter(uses).map(|(slot, _)| *slot).collect(),
        }
    };
    ends.into_iter().map(prefix).collect()
}
