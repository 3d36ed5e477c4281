//! The worker table with what this VM derives from it once per version.

use kv_core::hash::{Hashing, Seed};
use kv_core::id::{Role, Slot};
use kv_core::policy::Mode;
use kv_core::scan::Scan;
use kv_core::table::{Owner, Pool, Table};

use crate::host::{Host, MetricId, MetricKind};
use crate::lanes::{Lane, Lanes};
use crate::metrics::{Fault, Metrics, labelled};

/// Counter by `pool` of decisions of the round-robin mode: the cursor that all threads share.
pub const TURNS: &str = "kv_router_turns_total";

/// A decoded table.
#[derive(Debug, Default)]
pub struct Fleet {
    /// The table.
    pub table: Table,
    /// In the order of the table's pools.
    pools: Vec<Derived>,
}

#[derive(Debug, Default)]
struct Derived {
    /// Positions in [`Pool::owners`] of those that take requests.
    accepting: Vec<usize>,
    /// In the order of [`Pool::owners`].
    lanes: Vec<Option<Lane>>,
    turns: Option<MetricId>,
}

/// One pool of a fleet.
#[derive(Clone, Copy, Debug)]
pub struct Served<'a> {
    /// The pool.
    pub pool: &'a Pool,
    /// Its position in the table.
    pub position: usize,
    /// The adapter that the request named as its model.
    pub lora: &'a str,
    /// Whether the pool names the request's model.
    pub known: bool,
    derived: &'a Derived,
}

impl Fleet {
    /// Derives what decisions need. Defining the gauges of all owners here, at a tick, spares
    /// the first request that.
    pub fn new(host: &impl Host, metrics: &mut Metrics, lanes: &mut Lanes, table: Table) -> Self {
        lanes.trim(&table);
        let mut derive = |pool: &Pool| {
            let mut derived = Derived::default();
            for (i, owner) in pool.owners.iter().enumerate() {
                let sound = owner.endpoint.bytes().all(|b| b.is_ascii_graphic());
                if !sound || owner.endpoint.is_empty() {
                    metrics.fault(host, Fault::Endpoint);
                } else if owner.accepting && owner.role == Role::Aggregated {
                    derived.accepting.push(i);
                }
                let lane = lanes.of(host, &pool.name, owner.id);
                if lane.is_none() {
                    metrics.fault(host, Fault::Lane);
                }
                derived.lanes.push(lane);
            }
            if pool.policy.mode == Mode::RoundRobin {
                let turns = labelled(TURNS, &[("pool", &pool.name)]);
                derived.turns = host.define(MetricKind::Counter, &turns);
            }
            derived
        };
        let pools = table.pools.iter().map(&mut derive).collect();
        Self { table, pools }
    }

    /// The pool for a model.
    #[must_use]
    pub fn serve(&self, model: Option<&str>) -> Option<Served<'_>> {
        let served = self.table.serve(model)?;
        Some(Served {
            pool: self.table.pools.get(served.pool)?,
            position: served.pool,
            lora: served.lora.unwrap_or_default(),
            known: served.known,
            derived: self.pools.get(served.pool)?,
        })
    }

    /// How to hash a prompt, as far as its body has said.
    #[must_use]
    pub fn hashing(&self, scan: &Scan) -> Option<Hashing> {
        let served = self.serve(scan.model.value().map(String::as_str))?;
        Some(served.hashing(scan.cache_salt.value().map_or("", String::as_str)))
    }
}

impl<'a> Served<'a> {
    /// How this pool's prompts are hashed.
    #[must_use]
    pub fn hashing(&self, salt: &str) -> Hashing {
        let block_size = usize::try_from(self.pool.block_size).unwrap_or(0);
        Hashing::new(block_size, Seed::new(self.lora, salt))
    }

    /// Positions in [`Pool::owners`] of the owners that take requests.
    #[must_use]
    pub fn accepting(&self) -> &'a [usize] {
        &self.derived.accepting
    }

    /// Position in [`Pool::owners`] of the owner in a slot.
    #[must_use]
    pub fn owner_in(&self, slot: Slot) -> Option<usize> {
        let owners = &self.pool.owners;
        owners.binary_search_by_key(&slot, |owner| owner.slot).ok()
    }

    /// The owner at a position.
    #[must_use]
    pub fn owner(&self, position: usize) -> Option<&'a Owner> {
        self.pool.owners.get(position)
    }

    /// Its gauges.
    #[must_use]
    pub fn lane(&self, position: usize) -> Option<Lane> {
        self.derived.lanes.get(position).copied().flatten()
    }

    /// The next turn of the round-robin mode.
    pub fn turn(&self, host: &impl Host) -> u64 {
        let turn = self.derived.turns.and_then(|turns| {
            host.add(turns, 1);
            host.metric(turns)
        });
        turn.unwrap_or(0)
    }
}
