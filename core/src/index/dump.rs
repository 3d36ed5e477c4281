//! What an owner holds, in a form that rebuilds it.

use hashbrown::HashSet;

use super::places::Place;
use super::run::{Block, RunId, SHARED, TIERS, UNNAMED};
use super::slab::NIL;
use super::space::Space;
use super::store::hand;
use super::tree::Next;
use super::{Applied, Held, Index};
use crate::id::{Family, Slot};

impl Index {
    /// All blocks of an owner, family by family, parents first. Waiting stores are not part of it.
    #[must_use]
    pub fn dump(&self, pool: usize, slot: Slot) -> Vec<Held> {
        let dump = |family| self.dump_in(Space::new(pool, family), slot);
        Family::ALL.into_iter().flat_map(dump).collect()
    }

    fn dump_in(&self, space: Space, slot: Slot) -> Vec<Held> {
        let Some(owner) = self.owners.get(&(space, slot)) else {
            return Vec::new();
        };
        let tree = &self.tree;
        let mut seen: HashSet<RunId> = HashSet::new();
        let mut runs: Vec<(u32, RunId)> = Vec::new();
        for id in self.runs_of(space, slot) {
            let mut at = id;
            while at != NIL && seen.insert(at) {
                let run = tree.run(at);
                runs.push((run.depth, at));
                at = run.parent;
            }
        }
        runs.sort_unstable();
        let mut dump = Vec::with_capacity(owner.held);
        for (_, id) in runs {
            let run = tree.run(id);
            let low = tree.raw.get(run.raw, slot.0);
            let before = tree.run(run.parent).blocks.last();
            let mut parent = before.map(|block| block.sequence);
            for block in &run.blocks {
                let held = |name, tiers: u16| Held {
                    family: space.family(),
                    sequence: block.sequence,
                    parent,
                    name,
                    // Tiers are four.
                    tiers: u8::try_from(tiers).unwrap_or(0),
                };
                match low {
                    None => dump.push(held(None, 0)),
                    Some(low) if low & SHARED != 0 => {
                        dump.push(held(Some(block.name), low & TIERS));
                    }
                    Some(_) => {
                        let names = owner.own.of(block.sequence);
                        dump.extend(names.map(|name| held(Some(name.hash), name.tiers)));
                    }
                }
                parent = Some(block.sequence);
            }
        }
        dump
    }

    /// Runs that an owner holds, in no order.
    pub(super) fn runs_of(&self, space: Space, slot: Slot) -> impl Iterator<Item = RunId> + '_ {
        let is_of = move |(_, run): &(RunId, &super::run::Run)| {
            run.space == space && self.tree.raw.get(run.raw, slot.0).is_some()
        };
        self.tree.runs.iter().filter(is_of).map(|(id, _)| id)
    }

    /// Gives an owner without blocks those of a dump. Blocks whose parent the dump lacks, and names
    /// that it uses twice, are dropped and counted as collisions.
    pub fn restore(&mut self, pool: usize, slot: Slot, dump: &[Held]) -> Applied {
        let mut applied = Applied::default();
        for part in dump.chunk_by(|a, b| a.family == b.family) {
            let family = part.first().map_or(Family::Dynamo, |held| held.family);
            self.restore_in(Space::new(pool, family), slot, part, &mut applied);
        }
        self.bound();
        applied
    }

    fn restore_in(&mut self, space: Space, slot: Slot, dump: &[Held], applied: &mut Applied) {
        let is_limited = self.limits.contains_key(&space);
        let (tree, owners) = (&mut self.tree, &mut self.owners);
        let mut hand = hand(tree, owners, space, slot);
        let before = hand.owner.bytes();
        let mut links = Vec::new();
        let mut last = (None, Place::ROOT);
        for (i, held) in dump.iter().enumerate() {
            let tree = &mut *hand.tree;
            let parent = match held.parent {
                None => Some(Place::ROOT),
                parent if parent == last.0 => Some(last.1),
                Some(parent) => tree.find(space, parent),
            };
            let Some(parent) = parent else {
                applied.collisions += 1;
                continue;
            };
            let next = tree.next(space, parent, held.sequence);
            if next == Next::Taken {
                applied.collisions += 1;
                continue;
            }
            let Some(name) = held.name else {
                let block = Block {
                    sequence: held.sequence,
                    name: UNNAMED,
                };
                if next == Next::Absent {
                    tree.add(space, parent, block, None, 0);
                    links.push(held.sequence);
                }
                last = (None, Place::ROOT);
                continue;
            };
            if hand.known(name).is_some() {
                applied.collisions += 1;
                continue;
            }
            let tiers = u16::from(held.tiers) & TIERS;
            if tiers == 0 {
                continue;
            }
            if is_limited {
                let announced = &mut hand.owner.announced;
                announced.get_or_insert_default().touch(name);
            }
            match next {
                Next::There(place) => hand.give(place, name, tiers),
                _ => {
                    let is_free = hand.tree.find_name(space, name).is_none();
                    let more = dump.len() - i;
                    hand.bring(parent, held.sequence, name, is_free, tiers, more);
                }
            }
            applied.stored += tiers.count_ones();
            let place = hand.tree.find(space, held.sequence);
            last = place.map_or((None, Place::ROOT), |place| (Some(held.sequence), place));
        }
        for sequence in links.into_iter().rev() {
            if let Some(place) = hand.tree.find(space, sequence) {
                hand.tree.release(place.run());
            }
        }
        let after = hand.owner.bytes();
        self.owner_bytes = self.owner_bytes + after - before;
    }
}
