//! What owners probably hold, where their engines publish no KV events: the blocks of every prompt
//! sent to them, for a while or as many as they have room for.
//!
//! A block is refreshed with every prompt that starts with it, so one is never forgotten before
//! those after it. Which blocks are held is kept elsewhere; this says what to store and to remove.

use hashbrown::HashMap;

use crate::id::Slot;

const NIL: u32 = u32::MAX;
/// The list of all blocks among those that a block stands in.
const ALL: usize = 0;
/// The list of its owner's blocks.
const OWN: usize = 1;

/// A block of an owner.
#[derive(Clone, Copy, Debug)]
struct Block {
    slot: Slot,
    hash: u64,
    /// When a prompt last used it, milliseconds.
    used_ms: u64,
    /// Its places in the order of use among all blocks and among its owner's.
    links: [Link; 2],
}

/// Neighbours in an order of use, the longest unused first; within a prompt the last block comes
/// first.
#[derive(Clone, Copy, Debug)]
struct Link {
    before: u32,
    after: u32,
}

/// A list of blocks.
#[derive(Clone, Copy, Debug)]
struct Ends {
    first: u32,
    last: u32,
    len: usize,
}

impl Default for Ends {
    fn default() -> Self {
        Self {
            first: NIL,
            last: NIL,
            len: 0,
        }
    }
}

/// The predicted blocks of a pool.
#[derive(Debug)]
pub struct Approximate {
    blocks: Vec<Block>,
    free: Vec<u32>,
    by_hash: HashMap<(Slot, u64), u32>,
    all: Ends,
    owners: HashMap<Slot, Ends>,
    capacity: usize,
}

impl Approximate {
    /// Nothing predicted; at most `capacity` blocks, counted once for each owner.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self {
            blocks: Vec::new(),
            free: Vec::new(),
            by_hash: HashMap::new(),
            all: Ends::default(),
            owners: HashMap::new(),
            capacity: capacity.min(NIL as usize),
        }
    }

    /// A prompt goes to an owner. Returns how many of its leading blocks were predicted already;
    /// those after them are to be stored.
    pub fn insert(&mut self, slot: Slot, prompt: &[u64], now_ms: u64) -> usize {
        let known = |hash: &&u64| self.by_hash.contains_key(&(slot, **hash));
        let known = prompt.iter().take_while(known).count();
        for hash in prompt.iter().rev() {
            let id = match self.by_hash.get(&(slot, *hash)) {
                Some(id) => {
                    let id = *id;
                    self.unlink(ALL, id);
                    self.unlink(OWN, id);
                    id
                }
                None => self.place(slot, *hash),
            };
            self.link_last(ALL, id);
            self.link_last(OWN, id);
            self.used(id, now_ms);
        }
        known
    }

    /// Forgets the longest unused block if it was last used before `before_ms` or there are too
    /// many, and names it. Blocks of owners for which `is_timed` is false don't grow old. Call
    /// until there is none.
    pub fn expire(
        &mut self,
        before_ms: u64,
        is_timed: impl Fn(Slot) -> bool,
    ) -> Option<(Slot, u64)> {
        loop {
            let first = self.all.first;
            let block = *self.blocks.get(first as usize)?;
            if self.by_hash.len() <= self.capacity {
                if block.used_ms >= before_ms {
                    return None;
                }
                if !is_timed(block.slot) {
                    self.unlink(ALL, first);
                    self.link_last(ALL, first);
                    self.used(first, before_ms);
                    continue;
                }
            }
            self.forget(first);
            return Some((block.slot, block.hash));
        }
    }

    /// Forgets the longest unused blocks of an owner that has more than `capacity`, but for those
    /// in use, and names them.
    pub fn evict(
        &mut self,
        slot: Slot,
        capacity: usize,
        is_used: impl Fn(u64) -> bool,
    ) -> Vec<u64> {
        let ends = self.owners.get(&slot).copied().unwrap_or_default();
        let excess = ends.len.saturating_sub(capacity);
        let mut gone = Vec::new();
        let mut at = ends.first;
        while gone.len() < excess
            && let Some(block) = self.blocks.get(at as usize).copied()
        {
            if !is_used(block.hash) {
                self.forget(at);
                gone.push(block.hash);
            }
            let [_, own] = block.links;
            at = own.after;
        }
        gone
    }

    /// Forgets a block of an owner. Whether it was predicted.
    pub fn remove(&mut self, slot: Slot, hash: u64) -> bool {
        let id = self.by_hash.get(&(slot, hash)).copied();
        id.is_some_and(|id| {
            self.forget(id);
            true
        })
    }

    /// Forgets an owner, and names its blocks.
    pub fn remove_owner(&mut self, slot: Slot) -> Vec<u64> {
        self.evict(slot, 0, |_| false)
    }

    /// Predicted blocks.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_hash.len()
    }

    /// Whether nothing is predicted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_hash.is_empty()
    }

    fn place(&mut self, slot: Slot, hash: u64) -> u32 {
        let nowhere = Link {
            before: NIL,
            after: NIL,
        };
        let block = Block {
            slot,
            hash,
            used_ms: 0,
            links: [nowhere; 2],
        };
        let reused = self.free.pop();
        let id = match reused.and_then(|id| Some((id, self.blocks.get_mut(id as usize)?))) {
            Some((id, place)) => {
                *place = block;
                id
            }
            None => {
                self.blocks.push(block);
                // Prompts are far shorter than the numbers left above the capacity.
                u32::try_from(self.blocks.len() - 1).unwrap_or(NIL)
            }
        };
        self.by_hash.insert((slot, hash), id);
        id
    }

    fn used(&mut self, id: u32, now_ms: u64) {
        if let Some(block) = self.blocks.get_mut(id as usize) {
            block.used_ms = now_ms;
        }
    }

    fn forget(&mut self, id: u32) {
        self.unlink(ALL, id);
        self.unlink(OWN, id);
        if let Some(block) = self.blocks.get(id as usize) {
            self.by_hash.remove(&(block.slot, block.hash));
            self.free.push(id);
            if self
                .owners
                .get(&block.slot)
                .is_some_and(|ends| ends.len == 0)
            {
                self.owners.remove(&block.slot);
            }
        }
    }

    fn link(&mut self, list: usize, id: u32) -> Option<&mut Link> {
        self.blocks.get_mut(id as usize)?.links.get_mut(list)
    }

    fn ends(&mut self, list: usize, slot: Slot) -> &mut Ends {
        if list == ALL {
            &mut self.all
        } else {
            self.owners.entry(slot).or_default()
        }
    }

    fn link_last(&mut self, list: usize, id: u32) {
        let Some(slot) = self.blocks.get(id as usize).map(|block| block.slot) else {
            return;
        };
        let ends = self.ends(list, slot);
        let last = std::mem::replace(&mut ends.last, id);
        ends.len += 1;
        if last == NIL {
            ends.first = id;
        }
        if let Some(link) = self.link(list, id) {
            *link = Link {
                before: last,
                after: NIL,
            };
        }
        if let Some(before) = self.link(list, last) {
            before.after = id;
        }
    }

    fn unlink(&mut self, list: usize, id: u32) {
        let Some(slot) = self.blocks.get(id as usize).map(|block| block.slot) else {
            return;
        };
        let Some(Link { before, after }) = self.link(list, id).copied() else {
            return;
        };
        let ends = self.ends(list, slot);
        ends.len = ends.len.saturating_sub(1);
        if before == NIL {
            ends.first = after;
        }
        if after == NIL {
            ends.last = before;
        }
        if let Some(link) = self.link(list, before) {
            link.after = after;
        }
        if let Some(link) = self.link(list, after) {
            link.before = before;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::rng::Rng;

    const A: Slot = Slot(1);
    const B: Slot = Slot(2);

    fn expired(approximate: &mut Approximate, before_ms: u64) -> Vec<(Slot, u64)> {
        std::iter::from_fn(|| approximate.expire(before_ms, |_| true)).collect()
    }

    #[test]
    fn blocks_expire_deepest_first_and_a_new_use_keeps_a_prefix() {
        let mut approximate = Approximate::new(100);
        assert_eq!(approximate.insert(A, &[1, 2, 3], 0), 0);
        assert_eq!(approximate.insert(A, &[1, 2, 9], 50), 2);
        assert_eq!(approximate.insert(B, &[1], 60), 0);
        assert_eq!(expired(&mut approximate, 50), [(A, 3)]);
        assert_eq!(expired(&mut approximate, 51), [(A, 9), (A, 2), (A, 1)]);
        assert_eq!(expired(&mut approximate, 61), [(B, 1)]);
        assert!(approximate.is_empty());
    }

    #[test]
    fn the_longest_unused_go_when_there_are_too_many() {
        let mut approximate = Approximate::new(4);
        approximate.insert(A, &[1, 2, 3], 0);
        approximate.insert(A, &[7, 8], 0);
        assert_eq!(expired(&mut approximate, 0), [(A, 3)]);
        approximate.insert(A, &[11, 12, 13, 14, 15], 0);
        // Of a prompt that is too long its beginning stays.
        let gone = expired(&mut approximate, 0);
        assert_eq!(gone, [(A, 2), (A, 1), (A, 8), (A, 7), (A, 15)]);
        assert_eq!(approximate.len(), 4);
        assert!(approximate.blocks.len() <= 10);
    }

    #[test]
    fn an_owner_keeps_what_it_has_room_for_and_what_is_in_use() {
        let mut approximate = Approximate::new(100);
        approximate.insert(A, &[1, 2, 3], 0);
        approximate.insert(B, &[7, 8, 9], 1);
        approximate.insert(A, &[1, 5], 2);
        assert!(approximate.evict(A, 4, |_| false).is_empty());
        assert_eq!(approximate.evict(A, 2, |hash| hash == 3), [2, 5]);
        assert!(approximate.evict(A, 1, |_| true).is_empty());
        assert_eq!(approximate.len(), 5);
        // Those of an owner with a capacity don't grow old.
        let old = |approximate: &mut Approximate| approximate.expire(9, |slot| slot == B);
        let gone: Vec<_> = std::iter::from_fn(|| old(&mut approximate)).collect();
        assert_eq!(gone, [(B, 9), (B, 8), (B, 7)]);
        assert_eq!(approximate.evict(A, 0, |_| false), [3, 1]);
        assert!(approximate.is_empty() && approximate.owners.is_empty());
        assert_eq!((approximate.all.first, approximate.all.len), (NIL, 0));
    }

    #[test]
    fn an_owner_that_leaves_takes_its_blocks_along() {
        let mut approximate = Approximate::new(100);
        approximate.insert(A, &[1, 2], 0);
        approximate.insert(B, &[1, 2], 0);
        let mut gone = approximate.remove_owner(A);
        gone.sort_unstable();
        assert_eq!(gone, [1, 2]);
        assert_eq!(expired(&mut approximate, 1), [(B, 2), (B, 1)]);
        assert_eq!(approximate.insert(A, &[1], 2), 0);
    }

    #[test]
    fn predictions_equal_a_plain_map_of_times_over_random_histories() {
        for seed in 0..30 {
            let mut rng = Rng::new(seed);
            let mut approximate = Approximate::new(1 << 20);
            let mut naive: BTreeMap<(Slot, u64), u64> = BTreeMap::new();
            for now_ms in 0..500 {
                let slot = Slot(u16::try_from(rng.below(3)).unwrap());
                let family = 100 * rng.below(4) as u64;
                let prompt: Vec<u64> = (0..rng.below(9) as u64).map(|i| family + i).collect();
                approximate.insert(slot, &prompt, now_ms);
                naive.extend(prompt.iter().map(|hash| ((slot, *hash), now_ms)));
                let before_ms = now_ms.saturating_sub(20);
                let gone = expired(&mut approximate, before_ms);
                for (at, block) in gone.iter().enumerate() {
                    assert!(naive.remove(block).unwrap() < before_ms);
                    let (slot, hash) = *block;
                    let deeper = gone.get(at + 1..).unwrap().contains(&(slot, hash + 1));
                    assert!(!deeper, "{hash} went before the block after it");
                }
                assert!(naive.values().all(|used| *used >= before_ms));
                assert_eq!(approximate.len(), naive.len());
            }
        }
    }
}
