//! Questions about prompts, answered from the tree itself.

use super::Index;
use super::places::Place;
use super::sets::{EMPTY, SetId};
use super::slab::NIL;
use super::space::Space;
use crate::id::{Family, Slot};
use crate::overlap::Overlap;

/// A block of a prompt, as found: `set` is `EMPTY` where there is nothing.
#[derive(Clone, Copy)]
struct Probe {
    at: usize,
    place: Place,
    set: SetId,
}

impl Index {
    /// What every owner of a pool holds of a prompt, from the tree itself; owners that hold
    /// nothing are left out. Ascending by slot.
    #[must_use]
    pub fn overlaps(&self, pool: usize, prompt: &[u64]) -> Vec<(Slot, Overlap)> {
        let space = Space::new(pool, Family::Dynamo);
        let mut found = Vec::new();
        let Some(last) = prompt.len().checked_sub(1) else {
            return found;
        };
        let mut lower = self.probe(space, prompt, 0);
        // What has been looked at further on, the nearest at the end. Where two blocks of a prompt
        // have one set, so has every block between, because sets are closed.
        let mut upper = Vec::with_capacity(16);
        if last > 0 && lower.set != EMPTY {
            upper.push(self.probe(space, prompt, last));
        }
        while lower.set != EMPTY {
            let Some(next) = upper.last().copied() else {
                self.mark(&mut found, lower);
                break;
            };
            if next.set == lower.set {
                lower = next;
                upper.pop();
                continue;
            }
            self.advance(prompt, &mut lower, next.at);
            if lower.at + 1 == next.at {
                self.mark(&mut found, lower);
                lower = next;
                upper.pop();
                continue;
            }
            let middle = lower.at + (next.at - lower.at) / 2;
            upper.push(self.probe(space, prompt, middle));
        }
        found
    }

    fn probe(&self, space: Space, prompt: &[u64], at: usize) -> Probe {
        let sequence = prompt.get(at).copied().unwrap_or(0);
        let place = self.tree.find(space, sequence).unwrap_or(Place::ROOT);
        let set = self.tree.run(place.run()).eff;
        Probe { at, place, set }
    }

    /// Goes on to the end of the run, as far as that is before `end` and the prompt follows it.
    fn advance(&self, prompt: &[u64], probe: &mut Probe, end: usize) {
        let id = probe.place.run();
        let run = self.tree.run(id);
        let from = self.tree.index(probe.place);
        let left = run.blocks.len().saturating_sub(from + 1);
        let by = left.min(end.saturating_sub(probe.at + 1));
        let follows = |by: usize| {
            let block = run.blocks.get(from + by).map(|block| block.sequence);
            block.is_some() && block.as_ref() == prompt.get(probe.at + by)
        };
        if by > 0 && follows(by) {
            probe.place = run.place(id, from + by);
            probe.at += by;
        }
    }

    /// Notes the owners of a set, which is that of a prompt up to a block.
    fn mark(&self, found: &mut Vec<(Slot, Overlap)>, probe: Probe) {
        let depth = super::store::count(probe.at + 1);
        for member in self.tree.eff.members(probe.set) {
            let (slot, tier) = (Slot(member >> 2), usize::from(member & 3));
            let at = match found.last() {
                Some((last, _)) if *last >= slot => {
                    found.binary_search_by_key(&slot, |(slot, _)| *slot)
                }
                _ => Err(found.len()),
            };
            let at = at.unwrap_or_else(|at| {
                found.insert(at, (slot, Overlap::default()));
                at
            });
            if let Some((_, overlap)) = found.get_mut(at) {
                overlap.depth.iter_mut().skip(tier).for_each(|d| *d = depth);
            }
        }
    }

    /// Notes that a block of a pool and those before it are in use: what has not been used for
    /// longest goes first when the index is full.
    pub fn touch(&mut self, pool: usize, sequence: u64) {
        let place = self.tree.find(Space::new(pool, Family::Dynamo), sequence);
        if let Some(place) = place {
            self.tree.touch(place);
        }
    }

    /// Sequence hashes from a prompt's first block to the one with this hash; `None` for a block
    /// that the index does not have.
    #[must_use]
    pub fn chain(&self, pool: usize, hash: u64) -> Option<Vec<u64>> {
        let place = self.tree.find(Space::new(pool, Family::Dynamo), hash)?;
        let mut chain = Vec::new();
        let (mut at, mut length) = (place.run(), self.tree.index(place) + 1);
        while at != NIL {
            let run = self.tree.run(at);
            let blocks = run.blocks.iter().take(length).rev();
            chain.extend(blocks.map(|block| block.sequence));
            (at, length) = (run.parent, usize::MAX);
        }
        chain.reverse();
        Some(chain)
    }

    /// Positions of a prompt's blocks after which other prompts go on differently, deepest first,
    /// at most `most`.
    #[must_use]
    pub fn branches(&self, pool: usize, prompt: &[u64], most: usize) -> Vec<u32> {
        let space = Space::new(pool, Family::Dynamo);
        let mut branches = Vec::new();
        let mut at = 0;
        while at < prompt.len() {
            let mut probe = self.probe(space, prompt, at);
            if probe.place == Place::ROOT {
                break;
            }
            let run = self.tree.run(probe.place.run());
            let here = run.blocks.iter().map(|block| &block.sequence);
            let same = here.zip(prompt.iter().skip(at));
            probe.at += same.take_while(|(a, b)| a == b).count().saturating_sub(1);
            let next = prompt.get(probe.at + 1);
            let is_end = probe.at + 1 == at + run.blocks.len();
            let first = |id| {
                self.tree
                    .run(id)
                    .blocks
                    .first()
                    .map(|block| &block.sequence)
            };
            let goes_elsewhere = |child| first(child) != next;
            let branches_here = if is_end {
                self.tree.children(probe.place.run()).any(goes_elsewhere)
            } else {
                let following = run.blocks.get(probe.at + 1 - at);
                following.map(|block| &block.sequence) != next
            };
            if next.is_some() && branches_here {
                branches.push(super::store::count(probe.at));
            }
            at = probe.at + 1;
        }
        branches.reverse();
        branches.truncate(most);
        branches
    }
}
