//! Runs cut in two and joined again. Whichever part keeps the number, the other is the smaller one
//! or has no children, so the work is bounded by the length of a run.

use super::places::Place;
use super::run::{Run, RunId};
use super::slab::NIL;
use super::tree::Tree;

impl Tree {
    /// Makes a place the end of its run and returns the run.
    pub(super) fn cut_after(&mut self, at: Place) -> RunId {
        let (id, length) = (at.run(), self.index(at) + 1);
        if id != NIL && length < self.run(id).blocks.len() {
            self.split(id, length).0
        } else {
            id
        }
    }

    /// Cuts a run before its block `at`, which is not the first. Returns both parts.
    #[allow(clippy::cast_possible_truncation)]
    pub(super) fn split(&mut self, id: RunId, at: usize) -> (RunId, RunId) {
        let run = self.runs.at_mut(id);
        let is_leaf = run.child == NIL;
        let (raw, eff) = (run.raw, run.eff);
        let before = run.blocks.capacity();
        let tail = run.blocks.split_off(at);
        let mut other = Run {
            raw,
            eff,
            unit: run.unit,
            used: run.used,
            space: run.space,
            ..Run::default()
        };
        self.raw.share(raw);
        self.eff.share(eff);
        // A run is no longer than a group.
        let moved = at as u8;
        if is_leaf && tail.len() < at {
            run.blocks.shrink_to_fit();
            self.room = self.room + run.blocks.capacity() + tail.capacity() - before;
            other.parent = id;
            other.depth = run.depth + u32::from(moved);
            other.first = run.first + moved;
            other.blocks = tail;
            let length = other.blocks.len();
            let other = self.runs.insert(other);
            self.runs.at_mut(id).child = other;
            self.relist(id, other, 0, length);
            self.leaves.push(other, &self.runs);
            return (id, other);
        }
        let mut head = std::mem::replace(&mut run.blocks, tail);
        head.shrink_to_fit();
        self.room = self.room + run.blocks.capacity() + head.capacity() - before;
        (other.depth, other.first) = (run.depth, run.first);
        (other.parent, other.next, other.previous) = (run.parent, run.next, run.previous);
        other.child = id;
        other.blocks = head;
        run.depth += u32::from(moved);
        run.first += moved;
        let other = self.take_over(id, other);
        let run = self.runs.at_mut(id);
        (run.parent, run.next, run.previous) = (other, NIL, NIL);
        self.relist(id, other, 0, at);
        (other, id)
    }

    /// Puts a run in the place of another between parent and siblings.
    fn take_over(&mut self, old: RunId, run: Run) -> RunId {
        let (parent, next, previous, unit) = (run.parent, run.next, run.previous, run.unit);
        let new = self.runs.insert(run);
        self.relink(old, new, parent, next, previous);
        if self.units.at(unit).root == old {
            self.units.at_mut(unit).root = new;
        }
        new
    }

    fn relink(&mut self, old: RunId, new: RunId, parent: RunId, next: RunId, previous: RunId) {
        if parent != NIL && self.run(parent).child == old {
            self.runs.at_mut(parent).child = new;
        }
        self.runs.at_mut(previous).next = new;
        self.runs.at_mut(next).previous = new;
    }

    /// Takes a run out from between parent and siblings.
    pub(super) fn unlink(&mut self, id: RunId) {
        let run = self.run(id);
        let (parent, next, previous) = (run.parent, run.next, run.previous);
        if previous == NIL {
            self.runs.at_mut(parent).child = next;
        } else {
            self.runs.at_mut(previous).next = next;
        }
        self.runs.at_mut(next).previous = previous;
    }

    /// After the owners of a run have changed: drops it if nothing needs it, else joins it with
    /// its neighbours where they have become alike.
    pub(super) fn settle(&mut self, id: RunId) {
        let parent = self.run(id).parent;
        self.release(id);
        self.merge(id);
        self.merge(parent);
    }

    /// Joins a run with the one after it, if that is the only one and alike.
    pub(super) fn merge(&mut self, id: RunId) {
        let run = self.run(id);
        let child_id = run.child;
        if id == NIL || child_id == NIL {
            return;
        }
        let child = self.run(child_id);
        if child.next != NIL || child.unit != run.unit || child.raw != run.raw {
            return;
        }
        let head = run.blocks.len();
        let before = run.blocks.capacity() + child.blocks.capacity();
        // The closure of equal sets is equal.
        let (raw, eff) = (child.raw, child.eff);
        if child.child == NIL && child.blocks.len() <= head {
            let child = self.runs.remove(child_id);
            let run = self.runs.at_mut(id);
            run.child = NIL;
            run.used = run.used.max(child.used);
            run.blocks.extend_from_slice(&child.blocks);
            let length = run.blocks.len();
            self.room = self.room + run.blocks.capacity() - before;
            self.relist(child_id, id, head, length);
            self.leaves.push(id, &self.runs);
        } else {
            let mut run = self.runs.remove(id);
            let child = self.runs.at_mut(child_id);
            run.blocks.extend_from_slice(&child.blocks);
            child.blocks = run.blocks;
            (child.depth, child.first) = (run.depth, run.first);
            (child.parent, child.next, child.previous) = (run.parent, run.next, run.previous);
            child.used = child.used.max(run.used);
            self.room = self.room + child.blocks.capacity() - before;
            self.relink(id, child_id, run.parent, run.next, run.previous);
            if self.units.at(run.unit).root == id {
                self.units.at_mut(run.unit).root = child_id;
            }
            self.relist(id, child_id, 0, head);
        }
        self.raw.release(raw);
        self.eff.release(eff);
    }
}
