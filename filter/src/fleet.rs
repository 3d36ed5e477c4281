//! The worker table with what this VM derives from it once per version.

use hashbrown::HashMap;
use kv_core::family::Namespace;
use kv_core::hash::{Hashing, Seed};
use kv_core::holdings::{self, Named};
use kv_core::id::{DpRank, OwnerId, Role, Slot, WorkerId};
use kv_core::policy::Mode;
use kv_core::report::OwnerKey;
use kv_core::scan::Scan;
use kv_core::table::{Owner, Pool, Table};

use crate::bookings::Place;
use crate::host::{Host, MetricId, MetricKind};
use crate::lanes::Lanes;
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
    places: Vec<Option<Place>>,
    /// In the order of [`Pool::owners`]: whether its worker has several ranks.
    is_ranked: Vec<bool>,
    /// Whether some owner says which adapters it has.
    says_adapters: bool,
    /// Position in [`Pool::owners`] of the first owner at an endpoint.
    by_endpoint: HashMap<String, usize>,
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
        let mut derive = |(position, pool): (u16, &Pool)| {
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
                let delay = Some(&pool.policy.delay).filter(|_| pool.policy.predicts_delay());
                let prefill_ns = delay.map_or(0, |delay| delay.prefill_ns(&owner.traits));
                derived.places.push(lane.map(|lane| Place {
                    lane: lane.paced(prefill_ns),
                    owner: OwnerKey {
                        pool: position,
                        id: owner.id,
                    },
                }));
                derived.by_endpoint.entry_ref(&owner.endpoint).or_insert(i);
            }
            let mut ranks: HashMap<WorkerId, u32> = HashMap::new();
            for owner in &pool.owners {
                *ranks.entry(owner.id.worker).or_default() += 1;
            }
            let is_ranked = |owner: &Owner| ranks.get(&owner.id.worker).is_some_and(|n| *n > 1);
            derived.is_ranked = pool.owners.iter().map(is_ranked).collect();
            let mut said = pool.owners.iter().map(|owner| &owner.metadata.lora);
            derived.says_adapters = said.any(|lora| !lora.is_empty());
            if pool.policy.mode == Mode::RoundRobin {
                let turns = labelled(TURNS, &[("pool", &pool.name)]);
                derived.turns = host.define(MetricKind::Counter, &turns);
            }
            derived
        };
        let pools = (0..).zip(&table.pools).map(&mut derive).collect();
        Self { table, pools }
    }

    /// The pool for a request, by its name or by the request's model.
    #[must_use]
    pub fn serve(&self, pool: Option<&str>, model: Option<&str>) -> Option<Served<'_>> {
        let served = self.table.serve(pool, model)?;
        self.at(served.pool, served.lora.unwrap_or_default(), served.known)
    }

    /// The pool of a name, for requests of no particular model.
    #[must_use]
    pub fn named(&self, name: &str) -> Option<Served<'_>> {
        let position = self.table.pools.iter().position(|pool| pool.name == name)?;
        self.at(position, "", true)
    }

    fn at<'a>(&'a self, position: usize, lora: &'a str, known: bool) -> Option<Served<'a>> {
        Some(Served {
            pool: self.table.pools.get(position)?,
            position,
            lora,
            known,
            derived: self.pools.get(position)?,
        })
    }

    /// Where requests of an owner are booked.
    #[must_use]
    pub fn place_of(&self, owner: OwnerKey) -> Option<Place> {
        let places = &self.pools.get(usize::from(owner.pool))?.places;
        places.iter().flatten().find(|p| p.owner == owner).copied()
    }

    /// Where requests may be booked.
    pub fn places(&self) -> impl Iterator<Item = Place> + '_ {
        let places = self.pools.iter().flat_map(|derived| &derived.places);
        places.copied().flatten()
    }

    /// How to hash a prompt, as far as its body has said.
    #[must_use]
    pub fn hashing(&self, pool: Option<&str>, scan: &Scan) -> Option<Hashing> {
        let served = self.serve(pool, scan.model.value().map(String::as_str))?;
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

    /// A prompt's hashes in the families that this pool uses to choose by.
    #[must_use]
    pub fn named(&self, tokens: &[u32], salt: &str) -> Vec<Named> {
        let namespace = Namespace {
            lora: self.lora,
            salt,
        };
        match self.pool.policy.mode {
            Mode::Kv => {
                let families = &self.pool.families;
                holdings::named(families, self.pool.block_size, tokens, namespace)
            }
            Mode::RoundRobin
            | Mode::Random
            | Mode::LeastLoaded
            | Mode::PowerOfTwo
            | Mode::Direct
            | Mode::DeviceAwareWeighted => Vec::new(),
        }
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

    /// Where requests for it are booked.
    #[must_use]
    pub fn place(&self, position: usize) -> Option<Place> {
        self.derived.places.get(position).copied().flatten()
    }

    /// Position of the first owner at an endpoint.
    #[must_use]
    pub fn owner_at(&self, endpoint: &str) -> Option<usize> {
        self.derived.by_endpoint.get(endpoint).copied()
    }

    /// Where an owner stands, if it is one of those at these positions.
    #[must_use]
    pub fn position(&self, among: &[usize], id: OwnerId) -> Option<usize> {
        let is_it = |at: &usize| self.owner(*at).is_some_and(|owner| owner.id == id);
        among.iter().copied().find(is_it)
    }

    /// Whether some worker says which adapters it has loaded.
    #[must_use]
    pub fn says_adapters(&self) -> bool {
        self.derived.says_adapters
    }

    /// The rank of an owner whose worker has several: its engine is to be told.
    #[must_use]
    pub fn rank(&self, position: usize) -> Option<DpRank> {
        let is_ranked = self.derived.is_ranked.get(position) == Some(&true);
        self.owner(position)
            .filter(|_| is_ranked)
            .map(|owner| owner.id.rank)
    }

    /// The endpoints of an owner and of the one to try after it, as `override_host` reads them.
    #[must_use]
    pub fn endpoints(&self, first: usize, second: Option<usize>) -> Option<String> {
        let mut endpoints = self.owner(first)?.endpoint.clone();
        if let Some(second) = second.and_then(|second| self.owner(second)) {
            endpoints.extend([",", &second.endpoint]);
        }
        Some(endpoints)
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
