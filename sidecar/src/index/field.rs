//! What a prompt would meet in a pool: every owner with its overlap and its true load.

use std::sync::Arc;

use kv_core::constraint::Constraints;
use kv_core::decide::Candidate;
use kv_core::delay::Pace;
use kv_core::holdings::{Holdings, InIndex, Named};
use kv_core::id::Role;
use kv_core::overlap::Overlap;
use kv_core::report::OwnerKey;
use kv_core::table;
use kv_core::tracker::{ActiveLoad, Tracker};

use super::Service;

/// A pool as a prompt meets it.
#[derive(Clone, Debug, PartialEq)]
pub struct Field {
    /// The pool.
    pub pool: Arc<table::Pool>,
    /// Whether some proxy reports load; without, all owners count as idle.
    pub is_load_known: bool,
    /// One to each of the pool's owners.
    pub standings: Vec<Standing>,
}

/// An owner's part.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Standing {
    /// What it holds of the prompt.
    pub overlap: Overlap,
    /// Its true load.
    pub load: ActiveLoad,
    /// Blocks of the prompt in use there.
    pub shared_blocks: u32,
}

impl Field {
    /// Takes the load as a tracker has it.
    pub(super) fn load(&mut self, tracker: &Tracker, pool: u16, prompt: &[u64]) {
        for (owner, standing) in self.pool.owners.iter().zip(&mut self.standings) {
            let key = OwnerKey { pool, id: owner.id };
            standing.load = tracker.load(&key);
            let shared = tracker.shared_blocks(&key, prompt);
            standing.shared_blocks = u32::try_from(shared).unwrap_or(u32::MAX);
        }
    }

    /// The pace of an owner; what is booked on it is taken to be all still to be done.
    fn pace(&self, position: usize) -> Pace {
        let owner = self.pool.owners.get(position);
        let weights = &self.pool.policy.delay;
        Pace {
            finish_ms: f64::INFINITY,
            ms_per_token: owner.map_or(0.0, |o| f64::from(weights.prefill_ns(&o.traits)) / 1e6),
        }
    }

    /// Owners that take whole requests and fit, as the filter chooses among them.
    #[must_use]
    pub fn candidates(&self, constraints: &Constraints) -> Vec<Candidate> {
        let owners = self.pool.owners.iter().enumerate();
        let takes = |owner: &table::Owner| owner.accepting && owner.role == Role::Aggregated;
        let accepting: Vec<usize> = owners.filter(|(_, o)| takes(o)).map(|(at, _)| at).collect();
        let narrowed = constraints.narrow(&self.pool, &accepting);
        let candidate = |position: &usize| {
            let mut candidate = self.candidate(*position)?;
            candidate.factor = constraints.factor(self.pool.owners.get(*position)?);
            Some(candidate)
        };
        narrowed.owners.iter().filter_map(candidate).collect()
    }

    /// Owners of which something holds.
    #[must_use]
    pub fn candidates_that(&self, holds: impl Fn(&table::Owner) -> bool) -> Vec<Candidate> {
        let owners = self.pool.owners.iter().enumerate();
        let held = owners.filter(|(_, owner)| holds(owner));
        held.filter_map(|(position, _)| self.candidate(position))
            .collect()
    }

    fn candidate(&self, position: usize) -> Option<Candidate> {
        let standing = self.standings.get(position)?;
        Some(Candidate {
            owner: position,
            overlap: standing.overlap,
            load: standing.load.into(),
            shared_blocks: standing.shared_blocks,
            pace: self.pace(position),
            factor: 1.0,
        })
    }
}

impl Service {
    /// What a prompt would meet in a pool, if there is such a pool. `families` are its hashes in
    /// other families than Dynamo's.
    pub(super) fn field(&self, pool: usize, prompt: &[u64], families: &[Named]) -> Option<Field> {
        let mut field = self.unloaded_field(pool, prompt, families)?;
        field.load(self.accounts.tracker(), u16::try_from(pool).ok()?, prompt);
        Some(field)
    }

    /// The same, but for the load.
    pub(super) fn unloaded_field(
        &self,
        pool: usize,
        prompt: &[u64],
        families: &[Named],
    ) -> Option<Field> {
        let table = Arc::clone(self.tables.get(pool)?);
        Some(self.meet(pool, table, prompt, families))
    }

    /// What a prompt would meet at the owners of a table, but for the load.
    pub(super) fn meet(
        &self,
        pool: usize,
        table: Arc<table::Pool>,
        prompt: &[u64],
        families: &[Named],
    ) -> Field {
        let mut holdings = Holdings::new();
        let mut index = InIndex {
            index: &self.index,
            pool,
        };
        holdings.look_up(&mut index, table.slots(), &table.stores, prompt, families);
        let standing = |owner: &table::Owner| Standing {
            overlap: holdings.overlap(owner.slot),
            load: ActiveLoad::default(),
            shared_blocks: 0,
        };
        let standings = table.owners.iter().map(standing).collect();
        Field {
            pool: table,
            is_load_known: self.is_load_known(),
            standings,
        }
    }
}
