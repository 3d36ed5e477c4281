//! Which number each owner of a pool has in the pages.

use std::collections::{HashMap, VecDeque};

use kv_core::id::{OwnerId, Slot};
use serde::{Deserialize, Serialize};

/// The slots of a pool. An owner keeps its slot while it is there. A slot that was freed is used
/// again only when none is left that never was, the longest freed first: pages that still name it
/// are long overwritten by then.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slots {
    assigned: HashMap<OwnerId, Slot>,
    unused_from: u16,
    freed: VecDeque<Slot>,
}

impl Slots {
    /// The owner's slot, assigned if it has none; `None` when all are taken.
    pub fn assign(&mut self, owner: OwnerId) -> Option<Slot> {
        if let Some(slot) = self.assigned.get(&owner) {
            return Some(*slot);
        }
        let slot = if self.unused_from < Slot::MAX {
            self.unused_from += 1;
            Slot(self.unused_from - 1)
        } else {
            self.freed.pop_front()?
        };
        self.assigned.insert(owner, slot);
        Some(slot)
    }

    /// Frees the owner's slot.
    pub fn free(&mut self, owner: OwnerId) -> Option<Slot> {
        let slot = self.assigned.remove(&owner)?;
        self.freed.push_back(slot);
        Some(slot)
    }

    /// The owner's slot.
    #[must_use]
    pub fn get(&self, owner: OwnerId) -> Option<Slot> {
        self.assigned.get(&owner).copied()
    }

    /// Owners with a slot.
    pub fn owners(&self) -> impl Iterator<Item = OwnerId> {
        self.assigned.keys().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(worker: u64) -> OwnerId {
        OwnerId { worker, rank: 0 }
    }

    #[test]
    fn an_owner_keeps_its_slot_and_a_newcomer_gets_one_never_used() {
        let mut slots = Slots::default();
        assert_eq!(slots.assign(owner(7)), Some(Slot(0)));
        assert_eq!(slots.assign(owner(8)), Some(Slot(1)));
        assert_eq!(slots.assign(owner(7)), Some(Slot(0)));
        assert_eq!(slots.free(owner(7)), Some(Slot(0)));
        assert_eq!(slots.assign(owner(9)), Some(Slot(2)));
        assert_eq!(slots.assign(owner(7)), Some(Slot(3)));
    }

    #[test]
    fn freed_slots_return_oldest_first_once_none_is_unused() {
        let mut slots = Slots::default();
        for worker in 0..u64::from(Slot::MAX) {
            slots.assign(owner(worker)).unwrap();
        }
        assert_eq!(slots.assign(owner(5000)), None);
        slots.free(owner(30));
        slots.free(owner(10));
        assert_eq!(slots.assign(owner(5000)), Some(Slot(30)));
        assert_eq!(slots.assign(owner(5001)), Some(Slot(10)));
        assert_eq!(slots.assign(owner(5002)), None);
    }
}
