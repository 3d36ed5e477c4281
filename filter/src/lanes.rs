//! Load lanes of owners: two gauges each, which all threads of the Envoy process share.
//!
//! They are named `kv_router_lane_a.<pool>.<worker>.<rank>` and `kv_router_lane_b.<...>`, by
//! identity and not by slot, so a slot that changes hands carries no load over. What the fields of
//! a lane mean is said in [`kv_core::load`]; they are no counts for people to read.

use hashbrown::HashMap;
use kv_core::id::OwnerId;
use kv_core::load::{Delta, Leg, Load};
use kv_core::table::Table;

use crate::host::{Host, MetricId, MetricKind};

/// Owners whose gauges this VM remembers although the table no longer has them.
const MAX_OWNERS: usize = 4096;

/// Both gauges of one owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lane {
    a: MetricId,
    b: MetricId,
}

impl Lane {
    /// The owner's load.
    #[must_use]
    pub fn load(self, host: &impl Host) -> Load {
        let read = |id| host.metric(id).unwrap_or(0);
        Load::from_lanes(read(self.a), read(self.b))
    }

    fn add(self, host: &impl Host, delta: Delta) {
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
        let define = |lane: char| {
            let OwnerId { worker, rank } = owner;
            let name = format!("kv_router_lane_{lane}.{pool}.{worker}.{rank}");
            host.define(MetricKind::Gauge, &name)
        };
        let lane = Lane {
            a: define('a')?,
            b: define('b')?,
        };
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

/// A leg of a request and where it is booked.
#[derive(Debug)]
pub struct Booking {
    lane: Lane,
    leg: Leg,
}

impl Booking {
    /// Books a request with this much prefill to do and these blocks to hold.
    pub fn new(host: &impl Host, lane: Lane, prefill_tokens: u32, blocks: u32) -> Self {
        let (leg, delta) = Leg::book(prefill_tokens, blocks);
        lane.add(host, delta);
        Self { lane, leg }
    }

    /// The first token has come. Counts once.
    pub fn first_token(&mut self, host: &impl Host) {
        self.lane.add(host, self.leg.first_token());
    }

    /// The request is over. Counts once.
    pub fn release(&mut self, host: &impl Host) {
        self.lane.add(host, self.leg.release());
    }
}

#[cfg(test)]
mod tests {
    use super::{Booking, Lanes};
    use crate::fake::Fake;
    use kv_core::id::OwnerId;
    use kv_core::load::Load;
    use kv_core::table::{Owner, Pool, Table};

    const ID: OwnerId = OwnerId { worker: 7, rank: 1 };

    #[test]
    fn vms_of_a_process_see_each_others_bookings() {
        let one = Fake::default();
        let two = one.beside();
        let lane = Lanes::default().of(&one, "p.q", ID).unwrap();
        let seen = Lanes::default().of(&two, "p.q", ID).unwrap();
        let mut booking = Booking::new(&one, lane, 100, 7);
        let load = Load {
            prefill_tokens: 100,
            waiting: 1,
            decoding: 0,
            blocks: 7,
        };
        assert_eq!(seen.load(&two), load);
        booking.first_token(&one);
        booking.release(&one);
        booking.release(&one);
        assert_eq!(seen.load(&two), Load::default());
        assert!(one.has_metric("kv_router_lane_b.p.q.7.1"));
    }

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
                }],
                ..Pool::default()
            }],
            ..Table::default()
        };
        lanes.trim(&table);
        assert_eq!(lanes.pools["p"].len(), 1);
    }
}
