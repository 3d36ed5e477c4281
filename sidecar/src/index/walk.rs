//! A walk over what all owners hold, a part at a time, between other work.
//!
//! What is said of an owner's stream is from before its first part, so whatever changes during the
//! walk comes again after it: stores that are in the copy already do no harm, nor do removals of
//! what is not.

use kv_core::id::{Family, OwnerId};

use super::{Service, roster};
use crate::state::{OwnerState, StreamState};

/// Blocks of a part.
const PART: usize = 2048;

/// How far a walk has come.
#[derive(Debug)]
pub(super) struct Walk {
    left: Vec<(usize, OwnerId)>,
    at: Option<Place>,
}

#[derive(Debug)]
struct Place {
    pool: usize,
    id: OwnerId,
    /// Names that are not copied yet.
    names: Vec<(Family, u64)>,
}

/// The next part of a walk.
#[derive(Debug)]
pub(super) enum Part {
    /// An owner, without its blocks.
    Owner(usize, OwnerState),
    /// More of its blocks, in no order.
    Blocks(usize, OwnerId, Vec<kv_core::index::Held>),
}

impl Service {
    /// A walk from the beginning.
    pub(super) fn walk(&self) -> Walk {
        let owners = |(number, pool): (usize, &roster::Pool)| {
            let owners = pool.workers.values().flat_map(|w| w.config.owners());
            owners.map(|id| (number, id)).collect::<Vec<_>>()
        };
        let owners = self.roster.pools.iter().enumerate().flat_map(owners);
        Walk {
            left: owners.collect(),
            at: None,
        }
    }

    /// The next part; `None` after the last.
    pub(super) fn walk_step(&mut self, walk: &mut Walk) -> Option<Part> {
        loop {
            if let Some(place) = &mut walk.at {
                let (pool, id) = (place.pool, place.id);
                let rest = place.names.len().saturating_sub(PART);
                let names = place.names.split_off(rest);
                if names.is_empty() {
                    walk.at = None;
                    continue;
                }
                let slot = self.roster.worker(id.worker).and_then(|(at, worker)| {
                    let owner = worker.owner(id.rank)?;
                    (at == pool).then_some(owner.slot)
                });
                let Some(slot) = slot else {
                    walk.at = None;
                    continue;
                };
                let blocks = self.index.held(pool, slot, &names);
                return Some(Part::Blocks(pool, id, blocks));
            }
            let (pool, id) = walk.left.pop()?;
            if let Some((owner, names)) = self.owner_state(pool, id) {
                walk.at = Some(Place { pool, id, names });
                return Some(Part::Owner(pool, owner));
            }
        }
    }

    fn owner_state(
        &mut self,
        number: usize,
        id: OwnerId,
    ) -> Option<(OwnerState, Vec<(Family, u64)>)> {
        let (pool, worker) = self.roster.worker(id.worker)?;
        let is_awaited = worker.repair.is_some();
        let json = worker.json;
        let is_ill = worker.health.ailment().is_some();
        let owner = *worker.owner(id.rank)?;
        if pool != number || is_awaited && owner.knowledge != super::Knowledge::Whole {
            return None;
        }
        let doubt = self.doubts.get(&(pool, owner.slot));
        let mut state = OwnerState {
            id,
            dynamo: owner.dynamo,
            json,
            knowledge: owner.knowledge,
            blocks: Vec::new(),
            doubtful: doubt.map_or_else(Vec::new, super::doubt::Doubt::to_blocks),
        };
        let takes_events = self.roster.pools.get(pool)?.config.kv_events;
        // Predictions are not worth keeping, and can't be told apart.
        let names = if is_ill || !takes_events {
            state.knowledge = state.knowledge.min(super::Knowledge::Partial);
            Vec::new()
        } else {
            let mut names = self.index.names(pool, owner.slot);
            names.retain(|(family, _)| *family != Family::Predicted);
            names
        };
        Some((state, names))
    }

    /// Where a pool's streams have come to.
    pub(super) fn stream_states(pool: &roster::Pool) -> Vec<StreamState> {
        let of_worker = |worker: &roster::Worker| {
            let id = worker.config.id;
            let streams = worker.streams.iter();
            let states = streams.filter_map(move |(stream, state)| {
                Some(StreamState {
                    worker: id,
                    stream: *stream,
                    plane: state.plane,
                    resume: state.resume()?,
                })
            });
            states.collect::<Vec<_>>()
        };
        pool.workers.values().flat_map(of_worker).collect()
    }
}
