//! What turns a proxy's lanes into the true load.

use std::collections::HashMap;

use kv_core::id::{OwnerId, Slot};
use kv_core::ledger::Ledger;
use kv_core::loads::{Correction, PoolLoads};
use kv_core::report::OwnerKey;
use kv_core::tracker::Tracker;

/// Corrections of a pool's owners that are not zero, in the order of `owners`.
pub(super) fn of(
    tracker: &Tracker,
    ledger: &Ledger,
    pool: u16,
    owners: &[(Slot, OwnerId)],
) -> Vec<(Slot, Correction)> {
    let correction = |(slot, id): &(Slot, OwnerId)| {
        let owner = OwnerKey { pool, id: *id };
        let correction = Correction::between(&tracker.load(&owner), &ledger.booked(&owner).load());
        (!correction.is_zero()).then_some((*slot, correction))
    };
    owners.iter().filter_map(correction).collect()
}

/// Corrections of blocks of one pool that are not told yet because they may pass.
///
/// Of blocks that requests of two VMs share, one VM may count what the other one frees. Until both
/// have reported, the ledger is off by these blocks although the lanes are right.
#[derive(Debug, Default)]
pub(super) struct Passing(HashMap<Slot, Departed>);

/// A correction that is another than the one told.
#[derive(Clone, Copy, Debug)]
struct Departed {
    since_ms: u64,
    /// The least departure since then.
    by: i64,
}

impl Passing {
    /// What to tell of these corrections: those of blocks only as far as they have been so for
    /// `last_ms`.
    pub(super) fn lasting(
        &mut self,
        found: &[(Slot, Correction)],
        told: &[(Slot, Correction)],
        owners: &[(Slot, OwnerId)],
        (last_ms, now_ms): (u64, u64),
    ) -> Vec<(Slot, Correction)> {
        let correction = |(slot, _): &(Slot, OwnerId)| {
            let of = |list| PoolLoads::find(list, *slot);
            let (found, told) = (of(found), of(told));
            let blocks = self.blocks(*slot, found.blocks, told.blocks, (last_ms, now_ms));
            let correction = Correction { blocks, ..found };
            (!correction.is_zero()).then_some((*slot, correction))
        };
        let lasting = owners.iter().filter_map(correction).collect();
        self.0
            .retain(|slot, _| owners.iter().any(|(s, _)| s == slot));
        lasting
    }

    fn blocks(&mut self, slot: Slot, found: i64, told: i64, (last_ms, now_ms): (u64, u64)) -> i64 {
        let by = found - told;
        let departed = self.0.entry(slot).or_insert(Departed {
            since_ms: now_ms,
            by,
        });
        if departed.by.signum() != by.signum() {
            (departed.since_ms, departed.by) = (now_ms, by);
        } else if by.abs() < departed.by.abs() {
            departed.by = by;
        }
        if by != 0 && now_ms.saturating_sub(departed.since_ms) < last_ms {
            return told;
        }
        let lasting = told + departed.by;
        self.0.remove(&slot);
        lasting
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNERS: [(Slot, OwnerId); 1] = [(Slot(3), OwnerId { worker: 1, rank: 0 })];

    fn of(blocks: i64, waiting: i64) -> Vec<(Slot, Correction)> {
        let correction = Correction {
            blocks,
            waiting,
            ..Correction::default()
        };
        vec![(Slot(3), correction)]
    }

    #[test]
    fn a_correction_of_blocks_is_told_once_it_has_lasted() {
        let mut passing = Passing::default();
        let mut at =
            |now_ms, found: &[_], told: &[_]| passing.lasting(found, told, &OWNERS, (100, now_ms));
        assert_eq!(at(0, &of(16, 2), &[]), of(0, 2), "the rest is told at once");
        assert_eq!(at(50, &of(24, 0), &[]), []);
        assert_eq!(
            at(100, &of(30, 0), &[]),
            of(16, 0),
            "as far as it has lasted"
        );
        assert_eq!(at(110, &of(30, 0), &of(16, 0)), of(16, 0));
        // It passes, in between once below.
        assert_eq!(at(120, &of(16, 0), &of(16, 0)), of(16, 0));
        assert_eq!(at(130, &of(30, 0), &of(16, 0)), of(16, 0));
        assert_eq!(at(180, &of(9, 0), &of(16, 0)), of(16, 0));
        assert_eq!(at(240, &of(30, 0), &of(16, 0)), of(16, 0));
        assert_eq!(at(300, &[], &of(16, 0)), of(16, 0));
        assert_eq!(at(400, &[], &of(16, 0)), []);
        assert!(passing.0.is_empty());
    }

    #[test]
    fn nothing_is_waited_for_where_nothing_can_pass() {
        let mut passing = Passing::default();
        let told = passing.lasting(&of(16, 0), &of(5, 0), &OWNERS, (0, 7));
        assert_eq!(told, of(16, 0));
        assert!(passing.0.is_empty());
    }
}
