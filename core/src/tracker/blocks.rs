//! Blocks in use on one owner: how many requests use each, and where shared prefixes end.

use hashbrown::{HashMap, HashSet};

/// A block in use.
#[derive(Clone, Copy, Debug, Default)]
struct Block {
    /// Requests that use it.
    uses: u32,
    /// Blocks right after it that several requests share.
    shared_after: u32,
    /// Blocks of the prompt up to it.
    depth: u32,
}

/// Blocks in use, by sequence hash.
///
/// A block that two or more requests share, and after which none is shared, ends a shared prefix.
/// The ends are kept as requests come and go: a request changes at most a few of them, however
/// long its prompt.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    by_hash: HashMap<u64, Block>,
    ends: HashSet<u64>,
}

impl Blocks {
    /// A request uses a chain of blocks, the first of which comes after `start` others. Returns
    /// how many were not in use.
    pub(super) fn add(&mut self, start: u32, chain: &[u64]) -> u64 {
        let mut fresh = 0;
        let mut run = None;
        for (at, (hash, depth)) in chain.iter().zip(start.saturating_add(1)..).enumerate() {
            let block = self.by_hash.entry(*hash).or_default();
            block.uses += 1;
            block.depth = depth;
            fresh += u64::from(block.uses == 1);
            if block.uses == 2 {
                run.get_or_insert(at);
                if let Some(before) = before(chain, at) {
                    self.count_after(before, 1);
                }
            } else if let Some(first) = run.take() {
                self.shared(chain, first, at);
            }
        }
        if let Some(first) = run {
            self.shared(chain, first, chain.len());
        }
        fresh
    }

    /// The inverse of [`Blocks::add`]. Returns how many are in use no more.
    pub(super) fn subtract(&mut self, chain: &[u64]) -> u64 {
        let mut gone = 0;
        let mut run = None;
        for (at, hash) in chain.iter().enumerate() {
            let Some(block) = self.by_hash.get_mut(hash) else {
                continue;
            };
            block.uses -= 1;
            let uses = block.uses;
            if uses == 0 {
                self.by_hash.remove(hash);
                gone += 1;
            }
            if uses == 1 {
                run.get_or_insert(at);
                if let Some(before) = before(chain, at) {
                    self.count_after(before, -1);
                }
            } else if let Some(first) = run.take() {
                self.unshared(chain, first, at);
            }
        }
        if let Some(first) = run {
            self.unshared(chain, first, chain.len());
        }
        gone
    }

    /// Requests that use a block.
    pub(super) fn uses(&self, hash: u64) -> u32 {
        self.by_hash.get(&hash).map_or(0, |block| block.uses)
    }

    /// Blocks in use and the requests that use them.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, u32)> + '_ {
        self.by_hash.iter().map(|(hash, block)| (*hash, block.uses))
    }

    /// Last blocks of shared prefixes, and the lengths of these.
    pub(super) fn ends(&self) -> impl Iterator<Item = (u64, u32)> + '_ {
        let depth = |hash: &u64| self.by_hash.get(hash).map(|block| (*hash, block.depth));
        self.ends.iter().filter_map(depth)
    }

    fn count_after(&mut self, hash: u64, by: i32) {
        if let Some(block) = self.by_hash.get_mut(&hash) {
            block.shared_after = block.shared_after.saturating_add_signed(by);
        }
    }

    /// Blocks `first..end` of a chain have become shared.
    fn shared(&mut self, chain: &[u64], first: usize, end: usize) {
        if let Some(before) = before(chain, first) {
            self.ends.remove(&before);
        }
        self.mark(before(chain, end));
    }

    /// Blocks `first..end` of a chain are shared no more.
    fn unshared(&mut self, chain: &[u64], first: usize, end: usize) {
        if let Some(last) = before(chain, end) {
            self.ends.remove(&last);
        }
        self.mark(before(chain, first));
    }

    /// Enters a block as an end, if it is one.
    fn mark(&mut self, hash: Option<u64>) {
        let Some(hash) = hash else { return };
        let block = self.by_hash.get(&hash);
        if block.is_some_and(|block| block.uses >= 2 && block.shared_after == 0) {
            self.ends.insert(hash);
        }
    }
}

fn before(chain: &[u64], at: usize) -> Option<u64> {
    chain.get(at.checked_sub(1)?).copied()
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::hash::chain;
    use crate::rng::Rng;

    /// Sequence hashes of a prompt.
    fn prompt(tokens: &[u64]) -> Vec<u64> {
        let mut hashes: Vec<u64> = Vec::new();
        for token in tokens {
            let hash = hashes.last().map_or(*token, |last| chain(*last, *token));
            hashes.push(hash);
        }
        hashes
    }

    /// Ends found the obvious way.
    fn naive(prompts: &[Vec<u64>]) -> BTreeSet<(u64, u32)> {
        let mut uses: BTreeMap<u64, u32> = BTreeMap::new();
        for hash in prompts.iter().flatten() {
            *uses.entry(*hash).or_default() += 1;
        }
        let is_shared = |hash: &u64| uses.get(hash).is_some_and(|uses| *uses >= 2);
        let mut ends = BTreeSet::new();
        for prompt in prompts {
            ends.extend(
                (1..)
                    .zip(prompt)
                    .filter(|(_, h)| is_shared(h))
                    .map(|(d, h)| (*h, d)),
            );
        }
        for prompt in prompts {
            for (depth, pair) in (1..).zip(prompt.windows(2)) {
                if is_shared(&pair[1]) {
                    ends.remove(&(pair[0], depth));
                }
            }
        }
        ends
    }

    #[test]
    fn ends_are_the_deepest_shared_blocks_over_random_histories() {
        for seed in 0..200 {
            let mut rng = Rng::new(seed);
            let mut blocks = Blocks::default();
            let mut live: Vec<Vec<u64>> = Vec::new();
            for _ in 0..300 {
                if live.len() < 12 && rng.below(2) == 0 {
                    let length = rng.below(8);
                    let tokens: Vec<u64> = (0..length).map(|_| rng.below(2) as u64 + 7).collect();
                    blocks.add(0, &prompt(&tokens));
                    live.push(prompt(&tokens));
                } else if !live.is_empty() {
                    let gone = live.swap_remove(rng.below(live.len()));
                    blocks.subtract(&gone);
                }
                assert_eq!(blocks.ends().collect::<BTreeSet<_>>(), naive(&live));
            }
            for gone in live.drain(..) {
                blocks.subtract(&gone);
            }
            assert_eq!((blocks.iter().count(), blocks.ends().count()), (0, 0));
        }
    }

    #[test]
    fn a_chain_that_starts_late_keeps_its_depth() {
        let mut blocks = Blocks::default();
        assert_eq!(blocks.add(10, &[1, 2, 3]), 3);
        assert_eq!(blocks.add(10, &[1, 2, 9]), 1);
        assert_eq!(blocks.ends().collect::<Vec<_>>(), [(2, 12)]);
        assert_eq!((blocks.uses(1), blocks.uses(9), blocks.uses(8)), (2, 1, 0));
        assert_eq!(blocks.subtract(&[1, 2, 3]), 1);
        assert_eq!(blocks.ends().count(), 0);
    }
}
