//! Questions about prompts, answered from the tree itself.

use super::Index;
use super::places::Place;
use super::sets::{EMPTY, SetId};
use super::slab::NIL;
use super::space::Space;
use crate::id::{Family, Slot, Tier};
use crate::overlap::Overlap;

/// Blocks between two looked up within which runs are followed rather than looked up.
const STRIDE: usize = 256;

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
        self.overlaps_in(pool, Family::Dynamo, prompt)
    }

    /// The same of a chained family, by the hashes that [`crate::family`] makes of the prompt.
    #[must_use]
    pub fn overlaps_in(&self, pool: usize, family: Family, prompt: &[u64]) -> Vec<(Slot, Overlap)> {
        let space = Space::new(pool, family);
        let mut found = Vec::new();
        let place = prompt.first().and_then(|first| {
            let may_be = self.tree.may_begin(space, *first);
            may_be.then(|| self.tree.find(space, *first)).flatten()
        });
        let Some(place) = place else {
            return found;
        };
        let set = self.tree.run(place.run()).eff;
        if set == EMPTY {
            return found;
        }
        let first = Probe { at: 0, place, set };
        let mut steps = Vec::new();
        let last = self.deepest(space, prompt, first);
        self.descents(space, prompt, first, last, &mut steps);
        steps.push((last.set, last.at + 1));
        for (set, depth) in steps {
            self.mark(&mut found, set, depth);
        }
        found
    }

    /// Who holds the block of a flat family that has this hash, and where at best. Ascending by
    /// slot.
    pub fn holders(
        &self,
        pool: usize,
        family: Family,
        hash: u64,
    ) -> impl Iterator<Item = (Slot, Tier)> + '_ {
        let set = self.probe(Space::new(pool, family), &[hash], 0).set;
        let members = self.tree.eff.members(set).iter();
        members.map(|m| (Slot(m >> 2), Tier::from_index(usize::from(m & 3))))
    }

    fn probe(&self, space: Space, prompt: &[u64], at: usize) -> Probe {
        let sequence = prompt.get(at).copied().unwrap_or(0);
        let place = self.tree.find(space, sequence).unwrap_or(Place::ROOT);
        let set = self.tree.run(place.run()).eff;
        Probe { at, place, set }
    }

    /// The last block of a prompt that some owner holds from the root on.
    fn deepest(&self, space: Space, prompt: &[u64], first: Probe) -> Probe {
        let group = self.tree.units.room(0);
        // Groups begin with runs, so their first blocks are looked up, the last one first.
        let mut lower = first;
        let mut end = prompt.len().div_ceil(group);
        let mut middle = end - 1;
        while middle * group > lower.at {
            let probe = self.probe(space, prompt, middle * group);
            if probe.set == EMPTY {
                end = middle;
            } else {
                lower = probe;
            }
            middle = (lower.at / group).midpoint(end);
        }
        loop {
            let run = self.tree.run(lower.place.run());
            let from = self.tree.index(lower.place);
            let here = run.blocks.iter().skip(from).map(|block| &block.sequence);
            let same = here.zip(prompt.iter().skip(lower.at));
            let by = same.take_while(|(a, b)| a == b).count().saturating_sub(1);
            lower.place = run.place(lower.place.run(), from + by);
            lower.at += by;
            if from + by + 1 < run.blocks.len() || lower.at + 1 == prompt.len() {
                return lower;
            }
            let next = self.probe(space, prompt, lower.at + 1);
            if next.set == EMPTY {
                return lower;
            }
            lower = next;
        }
    }

    /// Where owners are lost between two blocks of a prompt: the sets of which all blocks above
    /// have one, with the depth at which it ends, ascending. Where two blocks have one set, so has
    /// every block between, because sets are closed.
    fn descents(
        &self,
        space: Space,
        prompt: &[u64],
        upper: Probe,
        lower: Probe,
        steps: &mut Vec<(SetId, usize)>,
    ) {
        if upper.set == lower.set {
            return;
        }
        let group = self.tree.units.room(0);
        let between = lower.at - upper.at;
        if between > STRIDE.max(2 * group) {
            let middle = self.probe(space, prompt, (upper.at + between / 2) / group * group);
            self.descents(space, prompt, upper, middle, steps);
            self.descents(space, prompt, middle, lower, steps);
            return;
        }
        let from = steps.len();
        let (mut set, mut at) = (lower.set, lower.place.run());
        while set != upper.set && at != NIL {
            let run = self.tree.run(at);
            if run.eff != set {
                set = run.eff;
                steps.push((set, run.depth as usize + run.blocks.len()));
            }
            at = run.parent;
        }
        if let Some(ascending) = steps.get_mut(from..) {
            ascending.reverse();
        }
    }

    /// Notes the owners of a set, which is that of a prompt up to a block.
    fn mark(&self, found: &mut Vec<(Slot, Overlap)>, set: SetId, depth: usize) {
        let depth = super::store::count(depth);
        for member in self.tree.eff.members(set) {
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
