//! The tree of blocks of all pools: who holds what, and who holds it without a gap from the root.
//!
//! Every node has two owner sets. `raw` is what engines reported. `eff` is prefix-closed: an owner
//! is in it only while it is in the parent's, at the worst tier along the chain. Only `eff` is
//! published, so that lookups may gallop; blocks that a removal hides stay in `raw` and return
//! with their parent.

use hashbrown::HashTable;

use super::sets::{EMPTY, SetId, Sets};
use super::slab::{NIL, Slab};
use super::space::Space;
use super::unit::{UnitId, Units};
use crate::hash::chain;
use crate::id::Slot;

/// Number of a node.
pub(super) type NodeId = u32;

/// A block of some prompt. 40 bytes.
#[derive(Debug)]
pub(super) struct Node {
    /// Sequence hash.
    pub(super) sequence: u64,
    pub(super) parent: NodeId,
    pub(super) child: NodeId,
    next: NodeId,
    previous: NodeId,
    raw: SetId,
    pub(super) eff: SetId,
    /// The unit this block belongs to.
    pub(super) unit: UnitId,
    pub(super) depth: u32,
    pub(super) space: Space,
}

impl Default for Node {
    fn default() -> Self {
        Self {
            sequence: 0,
            parent: NIL,
            child: NIL,
            next: NIL,
            previous: NIL,
            raw: EMPTY,
            eff: EMPTY,
            unit: NIL,
            depth: 0,
            space: Space::default(),
        }
    }
}

/// The tree and the units its blocks are published in.
#[derive(Debug)]
pub(super) struct Tree {
    nodes: Slab<Node>,
    by_key: HashTable<NodeId>,
    /// Secrets of the pools.
    pool_keys: Vec<u64>,
    /// Members are `slot << 4 | mask of tiers`.
    raw: Sets,
    /// Members are `slot << 2 | tier`, as pages hold them.
    pub(super) eff: Sets,
    pub(super) units: Units,
    /// (owner, block) pairs held.
    pub(super) held: usize,
}

impl Tree {
    pub(super) fn new(units: Units) -> Self {
        Self {
            nodes: Slab::default(),
            by_key: HashTable::new(),
            pool_keys: Vec::new(),
            raw: Sets::new(4),
            eff: Sets::new(2),
            units,
            held: 0,
        }
    }

    pub(super) fn add_pool(&mut self, key: u64) -> usize {
        self.pool_keys.push(key);
        self.pool_keys.len() - 1
    }

    pub(super) fn blocks(&self) -> usize {
        self.nodes.len()
    }

    pub(super) fn node(&self, id: NodeId) -> &Node {
        self.nodes.at(id)
    }

    /// Children of a node.
    pub(super) fn children(&self, id: NodeId) -> impl Iterator<Item = NodeId> + '_ {
        let some = |id: NodeId| (id != NIL).then_some(id);
        std::iter::successors(some(self.node(id).child), move |c| some(self.node(*c).next))
    }

    /// The key under which a block's unit is found if the block is its first: also what identifies
    /// the block, because neither pools nor families may share blocks.
    pub(super) fn key(&self, space: Space, sequence: u64) -> u64 {
        space.key(&self.pool_keys, sequence)
    }

    /// The node of a sequence hash.
    pub(super) fn find(&self, space: Space, sequence: u64) -> Option<NodeId> {
        let same = |id: &NodeId| {
            let node = self.node(*id);
            node.sequence == sequence && node.space == space
        };
        self.by_key.find(self.key(space, sequence), same).copied()
    }

    /// The node of the block with this token hash below `parent` (`NIL` at the root), made if it
    /// isn't there. `None` when another block has its sequence hash.
    pub(super) fn below(&mut self, space: Space, parent: NodeId, tokens: u64) -> Option<NodeId> {
        let sequence = if parent == NIL {
            tokens
        } else {
            chain(self.node(parent).sequence, tokens)
        };
        self.with_sequence(space, parent, sequence)
    }

    /// The node of a sequence hash below `parent`, made if it isn't there. `None` when another
    /// block has that hash.
    pub(super) fn with_sequence(
        &mut self,
        space: Space,
        parent: NodeId,
        sequence: u64,
    ) -> Option<NodeId> {
        if let Some(id) = self.find(space, sequence) {
            return (self.node(id).parent == parent).then_some(id);
        }
        let depth = if parent == NIL {
            0
        } else {
            self.node(parent).depth + 1
        };
        let next = if parent == NIL {
            NIL
        } else {
            self.node(parent).child
        };
        let id = self.nodes.insert(Node {
            sequence,
            parent,
            next,
            depth,
            space,
            ..Node::default()
        });
        if parent != NIL {
            self.nodes.at_mut(parent).child = id;
        }
        if next != NIL {
            self.nodes.at_mut(next).previous = id;
        }
        let key = self.key(space, sequence);
        let parent_unit = self.node(parent).unit;
        self.nodes.at_mut(id).unit = self.units.join(id, key, depth, parent_unit);
        let rehash = |id: &NodeId| {
            let node = self.nodes.at(*id);
            node.space.key(&self.pool_keys, node.sequence)
        };
        self.by_key.insert_unique(key, id, rehash);
        Some(id)
    }

    /// Mask of the tiers on which an owner holds a block.
    pub(super) fn tiers(&self, id: NodeId, slot: Slot) -> u16 {
        self.raw.get(self.node(id).raw, slot.0).unwrap_or(0)
    }

    /// Sets the tiers on which an owner holds a block, and what follows for the blocks below. A
    /// block that nobody holds and nothing hangs on is dropped: keep no id of it.
    pub(super) fn hold(&mut self, id: NodeId, slot: Slot, tiers: u16) {
        let before = self.tiers(id, slot);
        if before == tiers {
            self.release(id);
            return;
        }
        self.held += usize::from(before == 0);
        self.held -= usize::from(tiers == 0);
        let raw = self.node(id).raw;
        let raw = self.raw.replace(raw, slot.0, (tiers != 0).then_some(tiers));
        self.nodes.at_mut(id).raw = raw;
        self.close(id, slot);
        self.release(id);
    }

    /// Restores the invariant of `eff` for one owner from a node downwards.
    fn close(&mut self, from: NodeId, slot: Slot) {
        let mut stack = vec![from];
        while let Some(id) = stack.pop() {
            let node = self.node(id);
            let own = self.raw.get(node.raw, slot.0).map(best_tier);
            let above = if node.parent == NIL {
                Some(0)
            } else {
                self.eff.get(self.node(node.parent).eff, slot.0)
            };
            let tier = above.zip(own).map(|(above, own)| above.max(own));
            let (eff, unit) = (node.eff, node.unit);
            let before = self.eff.get(eff, slot.0);
            if before == tier {
                continue;
            }
            let is_loss = tier.is_none_or(|tier| before.is_some_and(|before| before < tier));
            self.nodes.at_mut(id).eff = self.eff.replace(eff, slot.0, tier);
            self.units.touch(unit, is_loss);
            let mut child = self.node(id).child;
            while child != NIL {
                if self.raw.get(self.node(child).raw, slot.0).is_some() {
                    stack.push(child);
                }
                child = self.node(child).next;
            }
        }
    }

    /// Drops a node that nobody holds and that has no children, and then its parents likewise.
    fn release(&mut self, mut id: NodeId) {
        while id != NIL {
            let node = self.node(id);
            if node.raw != EMPTY || node.child != NIL {
                return;
            }
            let key = self.key(node.space, node.sequence);
            if let Ok(entry) = self.by_key.find_entry(key, |other| *other == id) {
                entry.remove();
            }
            let node = self.nodes.remove(id);
            if node.parent != NIL {
                if node.previous == NIL {
                    self.nodes.at_mut(node.parent).child = node.next;
                } else {
                    self.nodes.at_mut(node.previous).next = node.next;
                }
                if node.next != NIL {
                    self.nodes.at_mut(node.next).previous = node.previous;
                }
            }
            let parent_unit = self.node(node.parent).unit;
            self.units.leave(id, node.unit, parent_unit);
            id = node.parent;
        }
    }

    /// Moves a node to another unit.
    pub(super) fn assign(&mut self, id: NodeId, unit: UnitId) {
        self.nodes.at_mut(id).unit = unit;
    }
}

/// Best tier of a non-empty mask.
#[allow(clippy::cast_possible_truncation)]
fn best_tier(mask: u16) -> u16 {
    mask.trailing_zeros() as u16
}
