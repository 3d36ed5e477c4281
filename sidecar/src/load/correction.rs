//! What turns a proxy's lanes into the true load.

use kv_core::id::{OwnerId, Slot};
use kv_core::ledger::Ledger;
use kv_core::loads::Correction;
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
