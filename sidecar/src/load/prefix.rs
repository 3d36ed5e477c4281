//! Prefixes of live requests that the next request may have in common with them.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};

use kv_core::id::{OwnerId, Slot};
use kv_core::loads::{LivePrefix, MAX_PREFIXES};
use kv_core::report::OwnerKey;
use kv_core::tracker::Tracker;

/// Requests that use a block, by owner and sequence hash.
type Uses = HashMap<(OwnerKey, u64), u32>;

/// Live prefixes by pool, with all owners on which they are in use: first those of two or more
/// requests, then those of one at whose end other prompts went on differently, then whole prompts;
/// of each kind the longest first. Requests of the sources in `own` don't count: who asks knows of
/// them.
pub(super) fn live(
    tracker: &Tracker,
    owners: &[Vec<(Slot, OwnerId)>],
    own: &HashSet<u64>,
) -> Vec<Vec<LivePrefix>> {
    let mut ends: Vec<HashMap<u64, End>> = vec![HashMap::new(); owners.len()];
    for prefix in tracker.prefixes().filter(|p| !own.contains(&p.source)) {
        if let Some(ends) = ends.get_mut(usize::from(prefix.pool)) {
            let end = ends.entry(prefix.hash).or_default();
            end.depth = prefix.depth;
            end.parts += u32::from(!prefix.is_whole);
        }
    }
    let best: Vec<Vec<(u64, End)>> = ends.into_iter().map(best).collect();
    let own_uses = uses(tracker, &best, own);
    let pools = (0_u16..).zip(best).zip(owners);
    pools
        .map(|((pool, ends), owners)| of_pool(tracker, pool, ends, owners, &own_uses))
        .collect()
}

/// The end of a prefix.
#[derive(Clone, Copy, Default)]
struct End {
    depth: u32,
    /// How often it is named as a part of a prompt.
    parts: u32,
}

fn best(ends: HashMap<u64, End>) -> Vec<(u64, End)> {
    let mut ends: Vec<(u64, End)> = ends.into_iter().collect();
    // By hash at last, so that the same prefixes make the same list.
    ends.sort_unstable_by_key(|(hash, end)| Reverse((end.parts.min(2), end.depth, *hash)));
    ends.truncate(MAX_PREFIXES);
    ends
}

/// What the requests of some sources use of these prefixes.
fn uses(tracker: &Tracker, ends: &[Vec<(u64, End)>], of: &HashSet<u64>) -> Uses {
    let mut uses = Uses::new();
    if ends.iter().all(Vec::is_empty) {
        return uses;
    }
    let bookings = tracker
        .bookings()
        .filter(|(id, ..)| of.contains(&id.source));
    for (_, owner, booking) in bookings {
        for (hash, end) in ends.get(usize::from(owner.pool)).into_iter().flatten() {
            let at = end.depth.checked_sub(booking.start + 1);
            if at.and_then(|at| booking.hashes.get(at as usize)) == Some(hash) {
                *uses.entry((owner, *hash)).or_default() += 1;
            }
        }
    }
    uses
}

fn of_pool(
    tracker: &Tracker,
    pool: u16,
    ends: Vec<(u64, End)>,
    owners: &[(Slot, OwnerId)],
    own_uses: &Uses,
) -> Vec<LivePrefix> {
    let prefix = |(hash, end): (u64, End)| {
        let is_used = |(_, id): &&(Slot, OwnerId)| {
            let owner = OwnerKey { pool, id: *id };
            let own = own_uses.get(&(owner, hash)).copied().unwrap_or(0);
            tracker.uses(&owner, hash) > own
        };
        LivePrefix {
            hash,
            depth: end.depth,
            slots: owners
                .iter()
                .filter(is_used)
                .map(|(slot, _)| *slot)
                .collect(),
        }
    };
    ends.into_iter().map(prefix).collect()
}
