//! Leaves of the tree in the order of their last use.
//!
//! A use is noted in the run alone. The queue learns of it when the run's turn comes, so a use
//! costs nothing here.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::run::{Run, RunId};
use super::slab::{NIL, Slab};

/// The queue. It has every leaf, and may have runs that are none.
#[derive(Debug, Default)]
pub(super) struct Leaves {
    queue: BinaryHeap<Reverse<(u32, RunId)>>,
}

impl Leaves {
    /// A run that has become a leaf.
    pub(super) fn push(&mut self, run: RunId, runs: &Slab<Run>) {
        if self.queue.len() > 2 * runs.len() + 1024 {
            self.rebuild(runs);
        }
        self.queue.push(Reverse((runs.at(run).used, run)));
    }

    /// The leaf that has not been used for longest.
    pub(super) fn oldest(&mut self, runs: &Slab<Run>) -> Option<RunId> {
        while let Some(mut entry) = self.queue.peek_mut() {
            let Reverse((used, id)) = *entry;
            let run = runs.at(id);
            if run.blocks.is_empty() || run.child != NIL {
                std::collections::binary_heap::PeekMut::pop(entry);
            } else if run.used == used {
                return Some(id);
            } else {
                *entry = Reverse((run.used, id));
            }
        }
        None
    }

    /// Takes in all leaves afresh.
    pub(super) fn rebuild(&mut self, runs: &Slab<Run>) {
        let is_leaf = |run: &Run| !run.blocks.is_empty() && run.child == NIL;
        let leaves = runs.iter().filter(|(_, run)| is_leaf(run));
        self.queue = leaves.map(|(id, run)| Reverse((run.used, id))).collect();
    }

    /// Bytes taken from the allocator.
    pub(super) fn bytes(&self) -> usize {
        self.queue.capacity() * size_of::<Reverse<(u32, RunId)>>()
    }
}
