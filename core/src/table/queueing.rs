//! What the worker table says about waiting and overload, behind all else.

use serde::{Deserialize, Serialize};

use super::Table;
use crate::queue::{Capacity, Profile, Refusing, Thresholds};

/// By position of the pool in the table.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Queueing(Vec<OfPool>);

#[derive(Debug, Serialize, Deserialize)]
struct OfPool {
    queue: Option<Profile>,
    overload: Thresholds,
    refusing: Refusing,
    /// By position of the owner in its pool; none where nothing asks for it.
    capacities: Vec<Capacity>,
}

impl Queueing {
    pub(super) fn of(table: &Table) -> Self {
        let pools = table.pools.iter().map(|pool| {
            let is_asked = pool.queue.is_some() || !pool.overload.is_unset();
            let owners = pool.owners.iter().filter(|_| is_asked);
            OfPool {
                queue: pool.queue.clone(),
                overload: pool.overload,
                refusing: pool.refusing,
                capacities: owners.map(|owner| owner.traits.capacity).collect(),
            }
        });
        Self(pools.collect())
    }

    pub(super) fn extend(self, table: &mut Table) {
        for (pool, more) in table.pools.iter_mut().zip(self.0) {
            pool.queue = more.queue;
            pool.overload = more.overload;
            pool.refusing = more.refusing;
            for (owner, capacity) in pool.owners.iter_mut().zip(more.capacities) {
                owner.traits.capacity = capacity;
            }
        }
    }
}
