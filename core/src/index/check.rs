//! Everything that must hold of a tree, for tests.

use super::places::Place;
use super::run::{SHARED, TIERS, UNNAMED};
use super::sets::EMPTY;
use super::slab::NIL;
use super::tree::{Next, Tree};

impl Tree {
    pub(super) fn check(&self) {
        let (mut blocks, mut room, mut held) = (0, 0, 0);
        for (id, run) in self.runs.iter().filter(|(_, run)| !run.blocks.is_empty()) {
            blocks += run.blocks.len();
            room += run.blocks.capacity();
            held += run.blocks.len() * self.raw.members(run.raw).len();
            assert_eq!(run.first, self.units.position(run.depth));
            assert!(run.blocks.len() <= self.units.room(run.depth));
            assert!(run.raw != EMPTY || run.child != NIL, "a run of no use");
            for member in self.raw.members(run.raw) {
                assert_ne!(member & TIERS, 0);
            }
            let is_shared = self.raw.members(run.raw).iter().any(|m| m & SHARED != 0);
            for (at, block) in run.blocks.iter().enumerate() {
                let place = run.place(id, at);
                assert_eq!(self.find(run.space, block.sequence), Some(place));
                if block.name == UNNAMED {
                    assert!(!is_shared);
                } else {
                    assert_eq!(self.find_name(run.space, block.name), Some(place));
                }
            }
            let children: Vec<_> = self.children(id).collect();
            for child in &children {
                let below = self.run(*child);
                assert_eq!(
                    (below.parent, below.depth),
                    (id, run.depth + run.blocks.len() as u32)
                );
                let last = run.place(id, run.blocks.len() - 1);
                let first = below.blocks[0].sequence;
                assert_eq!(
                    self.next(run.space, last, first),
                    Next::There(below.place(*child, 0))
                );
            }
            if let [only] = children.as_slice() {
                let below = self.run(*only);
                assert!(below.unit != run.unit || below.raw != run.raw, "not joined");
            }
            if run.parent == NIL || self.run(run.parent).unit != run.unit {
                assert_eq!(self.units.at(run.unit).root, id);
            }
            if run.parent == NIL {
                let first = run.blocks[0].sequence;
                let next = self.next(run.space, Place::ROOT, first);
                assert_eq!(next, Next::There(run.place(id, 0)));
                assert!(self.may_begin(run.space, first));
            }
        }
        assert_eq!((blocks, room, held), (self.blocks, self.room, self.held));
    }
}
