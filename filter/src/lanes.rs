//! Load lanes of owners: two gauges each, which all threads of the Envoy process share.
//!
//! They are named `kv_router_lane_a.<pool>.<worker>.<rank>` and `kv_router_lane_b.<...>`, by
//! identity and not by slot, so a slot that changes hands carries no load over. What the fields of
//! a lane mean is said in [`kv_core::load`]; they are no counts for people to read.

use hashbrown::HashMap;
use kv_core::board;
use kv_core::id::OwnerId;
use kv_core::ledger::Lanes as Raw;
use kv_core::load::Delta;
use kv_core::table::Table;

use crate::host::{Host, MetricId, MetricKind};

/// Owners whose gauges this VM remembers although the table no longer has them.
const MAX_OWNERS: usize = 4096;

/// Both gauges of one owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lane {
    a: MetricId,
    b: MetricId,
    /// The owner as boards name it.
    name: u64,
}

impl Lane {
    /// The owner as [`kv_core::board`] names it.
    #[must_use]
    pub fn name(self) -> u64 {
        self.name
    }

    /// What they hold.
    #[must_use]
    pub fn read(self, host: &impl Host) -> Raw {
        Raw {
            a: self.read_a(host),
            b: host.metric(self.b).unwrap_or(0),
        }
    }

    /// What the first of them holds.
    #[must_use]
    pub fn read_a(self, host: &impl Host) -> u64 {
        host.metric(self.a).unwrap_or(0)
    }

    /// Adds to them. Only [`crate::bookings`] does, which reports the same.
    pub(crate) fn add(self, host: &impl Host, delta: Delta) {
        for (id, by) in [(self.a, delta.a), (self.b, delta.b)] {
            if by != 0 {
                host.add(id, by);
            }
        }
    }
}

/// Gauges by owner.
#[derive(Debug, Default)]
pub struct Lanes {
    pools: HashMap<String, HashMap<OwnerId, Lane>>,
}

impl Lanes {
    /// The gauges of an owner; `None` if Envoy did not define them.
    pub fn of(&mut self, host: &impl Host, pool: &str, owner: OwnerId) -> Option<Lane> {
        let owners = self.pools.entry_ref(pool).or_default();
        if let Some(lane) = owners.get(&owner) {
            return Some(*lane);
        }
        let OwnerId { worker, rank } = owner;
        let define = |lane: char| {
            let name = format!("kv_router_lane_{lane}.{pool}.{worker}.{rank}");
            host.define(MetricKind::Gauge, &name)
        };
        let lane = Lane {
            a: define('a')?,
            b: define('b')?,
            name: board::owner(&format!("{pool}.{worker}.{rank}")),
        };
        // Reading them makes this VM one of those that keep them alive: a gauge ends with the last
        // VM that has touched it, and what was booked on it with it.
        let _ = lane.read(host);
        owners.insert(owner, lane);
        Some(lane)
    }

    /// Forgets owners that are not in the table, once there are too many. Bookings keep their own
    /// copy of a lane.
    pub fn trim(&mut self, table: &Table) {
        if self.pools.values().map(HashMap::len).sum::<usize>() <= MAX_OWNERS {
            return;
        }
        self.pools.retain(|name, owners| {
            let pool = table.pools.iter().find(|pool| pool.name == *name);
            owners.retain(|id, _| pool.is_some_and(|p| p.owners.iter().any(|o| o.id == *id)));
            !owners.is_empty()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::Lanes;
    use crate::fake::Fake;
    use kv_core::id::OwnerId;
    use kv_core::table::{Owner, Pool, Table};

    #[test]
    fn owners_that_left_are_forgotten_when_they_are_many() {
        let host = Fake::default();
        let mut lanes = Lanes::default();
        for worker in 0..5000 {
            lanes.of(&host, "p", OwnerId { worker, rank: 0 });
        }
        let table = Table {
            pools: vec![Pool {
                name: "p".into(),
                owners: vec![Owner {
                    slot: kv_core::id::Slot(0),
                    id: OwnerId { worker: 3, rank: 0 },
                    role: kv_core::id::Role::Aggregated,
                    endpoint: String::new(),
                    accepting: true,
                    traits: kv_core::table::Traits::default(),
                    metadata: kv_core::table::Metadata::default(),
                }],
                ..Pool::default()
            }],
            ..Table::default()
        };
        lanes.trim(&table);
        assert_eq!(lanes.pools["p"].len(), 1);
    }
}
