//! What turns a proxy's lanes into the true load.

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

/// Corrections of which those of blocks have lasted: each is the middle one of what was told, what
/// was found before and what is found.
///
/// Of blocks that requests of two VMs share, one VM counts what the other one frees. Until both have
/// reported, the ledger is off by these blocks, and the lanes are right.
pub(super) fn lasting(
    found: &[(Slot, Correction)],
    before: &[(Slot, Correction)],
    told: &[(Slot, Correction)],
    owners: &[(Slot, OwnerId)],
) -> Vec<(Slot, Correction)> {
    let correction = |(slot, _): &(Slot, OwnerId)| {
        let of = |list| PoolLoads::find(list, *slot);
        let (found, before, told) = (of(found), of(before), of(told));
        let mut blocks = [found.blocks, before.blocks, told.blocks];
        blocks.sort_unstable();
        let [_, blocks, _] = blocks;
        let correction = Correction { blocks, ..found };
        (!correction.is_zero()).then_some((*slot, correction))
    };
    owners.iter().filter_map(correction).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_correction_of_blocks_is_told_once_it_lasts() {
        let owners = [(Slot(3), OwnerId { worker: 1, rank: 0 })];
        let of = |blocks, waiting| {
            let correction = Correction {
                blocks,
                waiting,
                ..Correction::default()
            };
            vec![(Slot(3), correction)]
        };
        assert_eq!(lasting(&of(16, 2), &[], &[], &owners), of(0, 2));
        assert_eq!(lasting(&of(16, 0), &of(16, 1), &[], &owners), of(16, 0));
        assert_eq!(lasting(&[], &of(16, 0), &[], &owners), []);
        assert_eq!(lasting(&[], &of(9, 0), &of(9, 0), &owners), of(9, 0));
        assert_eq!(lasting(&[], &[], &of(9, 0), &owners), []);
        // One that grows is told as far as it has lasted.
        assert_eq!(
            lasting(&of(20, 0), &of(16, 0), &of(9, 0), &owners),
            of(16, 0)
        );
    }
}
