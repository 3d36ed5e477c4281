//! What the worker table says about waiting and overload, behind all else.

use serde::{Deserialize, Serialize};

use super::Table;
use crate::queue::{Profile, Refusing, Thresholds};

/// By position of the pool in the table.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Queueing(Vec<OfPool>);

#[derive(Debug, Serialize, Deserialize)]
struct OfPool {
    queue: Option<Profile>,
    overload: Thresholds,
    refusing: Refusing,
}

impl Queueing {
    pub(super) fn of(table: &Table) -> Self {
        let pools = table.pools.iter().map(|pool| OfPool {
            queue: pool.queue.clone(),
            overload: pool.overload,
            refusing: pool.refusing,
        });
        Self(pools.collect())
    }

    pub(super) fn extend(self, table: &mut Table) {
        for (pool, more) in table.pools.iter_mut().zip(self.0) {
            pool.queue = more.queue;
            pool.overload = more.overload;
            pool.refusing = more.refusing;
        }
    }
}
