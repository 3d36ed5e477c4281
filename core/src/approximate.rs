//! What owners probably hold, where their engines publish no KV events: the blocks of every prompt
//! sent to them, for a while.
//!
//! A block is refreshed with every prompt that starts with it, so one is never forgotten before
//! those after it. Which blocks are held is kept elsewhere; this says what to store and to remove.

use hashbrown::HashMap;

use crate::id::Slot;

const NIL: u32 = u32::MAX;

/// A block of an owner.
#[derive(Clone, Copy, Debug)]
struct Block {
    slot: Slot,
    hash: u64,
    /// When a prompt last used it, milliseconds.
    used_ms: u64,
    /// Neighbours in the order of use, the longest unused first; within a prompt the last block
    /// comes first.
    before: u32,
    after: u32,
}

/// The predicted blocks of a pool.
#[derive(Debug)]
pub struct Approximate {
    blocks: Vec<Block>,
    free: Vec<u32>,
    by_hash: HashMap<(Slot, u64), u32>,
    first: u32,
    last: u32,
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
            first: NIL,
            last: NIL,
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
                    self.unlink(id);
                    id
                }
                None => self.place(slot, *hash),
            };
            self.link_last(id, now_ms);
        }
        known
    }

    /// Forgets the longest unused block if it was last used before `before_ms` or there are too
    /// many, and names it. Call until there is none.
    pub fn expire(&mut self, before_ms: u64) -> Option<(Slot, u64)> {
        let block = *self.blocks.get(self.first as usize)?;
        let is_over = self.by_hash.len() > self.capacity;
        if block.used_ms >= before_ms && !is_over {
            return None;
        }
        self.forget(self.first);
        Some((block.slot, block.hash))
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
        let of_owner = self.by_hash.iter().filter(|((s, _), _)| *s == slot);
        let blocks: Vec<(u64, u32)> = of_owner.map(|((_, hash), id)| (*hash, *id)).collect();
        for (_, id) in &blocks {
            self.forget(*id);
        }
        blocks.into_iter().map(|(hash, _)| hash).collect()
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
        let block = Block {
            slot,
            hash,
            used_ms: 0,
            before: NIL,
            after: NIL,
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

    fn forget(&mut self, id: u32) {
        self.unlink(id);
        if let Some(block) = self.blocks.get(id as usize) {
            self.by_hash.remove(&(block.slot, block.hash));
            self.free.push(id);
        }
    }

    fn link_last(&mut self, id: u32, now_ms: u64) {
        let last = std::mem::replace(&mut self.last, id);
        if let Some(block) = self.blocks.get_mut(id as usize) {
            block.used_ms = now_ms;
            block.before = last;
            block.after = NIL;
        }
        match self.blocks.get_mut(last as usize) {
            Some(before) => before.after = id,
            None => self.first = id,
        }
    }

    fn unlink(&mut self, id: u32) {
        let Some(Block { before, after, .. }) = self.blocks.get(id as usize).copied() else {
            return;
        };
        match self.blocks.get_mut(before as usize) {
            Some(block) => block.after = after,
            None => self.first = after,
        }
        match self.blocks.get_mut(after as usize) {
            Some(block) => block.before = before,
            None => self.last = before,
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
        std::iter::from_fn(|| approximate.expire(before_ms)).collect()
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
