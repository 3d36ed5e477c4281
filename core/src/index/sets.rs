//! Interned owner sets: sorted `slot << 2 | tier` or `slot << 4 | tier mask` words, one copy of
//! each distinct set, counted by the blocks that refer to it.

use std::hash::BuildHasher;

use hashbrown::{DefaultHashBuilder, HashTable};

use super::BOX_BYTES;
use super::slab::Slab;

/// Number of a set. 0 is the empty set, which is never freed.
pub(super) type SetId = u32;
/// The empty set.
pub(super) const EMPTY: SetId = 0;

#[derive(Debug, Default)]
struct Entry {
    members: Box<[u16]>,
    uses: u32,
}

/// Bytes of an entry in a table that has just grown and so is filled least.
const ENTRY_BYTES: usize = 12;

fn boxed_bytes(members: &[u16]) -> usize {
    size_of_val(members) + BOX_BYTES
}

/// The interner.
#[derive(Debug)]
pub(super) struct Sets {
    entries: Slab<Entry>,
    by_members: HashTable<SetId>,
    hasher: DefaultHashBuilder,
    /// Low bits of a member that don't belong to the slot.
    shift: u32,
    /// Bytes of all members.
    member_bytes: usize,
    /// Room for a set being made.
    scratch: Vec<u16>,
}

impl Sets {
    /// Sets whose members keep the slot above `shift` bits.
    pub(super) fn new(shift: u32) -> Self {
        let mut entries = Slab::default();
        entries.insert(Entry::default());
        Self {
            entries,
            by_members: HashTable::new(),
            hasher: DefaultHashBuilder::default(),
            shift,
            member_bytes: 0,
            scratch: Vec::new(),
        }
    }

    /// Low bits of a member that don't belong to the slot.
    pub(super) fn shift(&self) -> u32 {
        self.shift
    }

    /// Members, ascending by slot.
    pub(super) fn members(&self, set: SetId) -> &[u16] {
        &self.entries.at(set).members
    }

    /// The low bits of a slot's member, if the set has it.
    pub(super) fn get(&self, set: SetId, slot: u16) -> Option<u16> {
        let members = self.members(set);
        let at = members
            .binary_search_by_key(&slot, |m| m >> self.shift)
            .ok()?;
        members.get(at).map(|m| m & ((1 << self.shift) - 1))
    }

    /// Whether a set has this member of a slot and no other.
    pub(super) fn is_alone(&self, set: SetId, slot: u16, low: u16) -> bool {
        self.members(set) == [slot << self.shift | low]
    }

    /// Takes another use of a set.
    pub(super) fn share(&mut self, set: SetId) {
        if set != EMPTY {
            self.entries.at_mut(set).uses += 1;
        }
    }

    /// The set with a slot's member replaced (`Some`) or taken out (`None`). Takes over the
    /// caller's use of `set` and hands back a use of the result.
    pub(super) fn replace(&mut self, set: SetId, slot: u16, low: Option<u16>) -> SetId {
        if self.get(set, slot) == low {
            return set;
        }
        let mut members = std::mem::take(&mut self.scratch);
        members.clear();
        let old = self.members(set);
        let at = old.partition_point(|m| m >> self.shift < slot);
        let (before, after) = old.split_at_checked(at).unwrap_or((old, &[]));
        members.extend_from_slice(before);
        members.extend(low.map(|low| slot << self.shift | low));
        let skip = usize::from(after.first().is_some_and(|m| m >> self.shift == slot));
        members.extend(after.iter().skip(skip));
        let new = self.intern(&members);
        self.scratch = members;
        self.release(set);
        new
    }

    /// Gives up one use of a set.
    pub(super) fn release(&mut self, set: SetId) {
        if set == EMPTY {
            return;
        }
        let entry = self.entries.at_mut(set);
        entry.uses -= 1;
        if entry.uses > 0 {
            return;
        }
        self.member_bytes -= boxed_bytes(&entry.members);
        let hash = self.hasher.hash_one(&*entry.members);
        if let Ok(found) = self.by_members.find_entry(hash, |id| *id == set) {
            found.remove();
        }
        self.entries.remove(set);
    }

    fn intern(&mut self, members: &[u16]) -> SetId {
        if members.is_empty() {
            return EMPTY;
        }
        let hash = self.hasher.hash_one(members);
        let same = |id: &SetId| *self.entries.at(*id).members == *members;
        if let Some(id) = self.by_members.find(hash, same) {
            self.entries.at_mut(*id).uses += 1;
            return *id;
        }
        self.member_bytes += boxed_bytes(members);
        let members = members.into();
        let id = self.entries.insert(Entry { members, uses: 1 });
        let rehash = |id: &SetId| self.hasher.hash_one(&self.entries.at(*id).members);
        self.by_members.insert_unique(hash, id, rehash);
        id
    }

    /// Bytes taken from the allocator.
    pub(super) fn bytes(&self) -> usize {
        self.entries.bytes() + self.by_members.allocation_size() + self.member_bytes
    }

    /// Most bytes that the sets in use take, if there were never more.
    pub(super) fn used_bytes(&self) -> usize {
        self.entries.used_bytes() + self.len() * ENTRY_BYTES + self.member_bytes
    }

    /// Numbers the sets anew and gives back memory. Returns the numbers by their old ones.
    pub(super) fn compact(&mut self) -> Vec<SetId> {
        let ids = self.entries.compact();
        let entries = &self.entries;
        let hash = |id: &SetId| self.hasher.hash_one(&*entries.at(*id).members);
        self.by_members = HashTable::with_capacity(entries.len());
        for (id, _) in entries.iter().skip(1) {
            self.by_members.insert_unique(hash(&id), id, hash);
        }
        ids
    }

    /// Distinct sets, the empty one aside.
    pub(super) fn len(&self) -> usize {
        self.entries.len() - 1
    }
}

#[cfg(test)]
mod tests {
    use super::{EMPTY, Sets};

    #[test]
    fn equal_sets_are_one_and_unused_ones_go() {
        let mut sets = Sets::new(2);
        let a = sets.replace(EMPTY, 7, Some(1));
        let b = sets.replace(EMPTY, 7, Some(1));
        assert_eq!(a, b);
        let c = sets.replace(a, 3, Some(0));
        assert_eq!(sets.members(c), [3 << 2, 7 << 2 | 1]);
        assert_eq!((sets.get(c, 7), sets.get(c, 4)), (Some(1), None));
        let d = sets.replace(c, 7, None);
        assert_eq!(sets.members(d), [3 << 2]);
        assert_eq!(sets.len(), 2);
        let e = sets.replace(d, 3, None);
        assert_eq!(e, EMPTY);
        sets.release(b);
        assert_eq!(sets.len(), 0);
    }
}
