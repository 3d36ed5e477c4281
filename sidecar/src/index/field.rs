//! What a prompt would meet in a pool: every owner with its overlap and its true load.

use std::sync::Arc;

use kv_core::decide::Candidate;
use kv_core::holdings::{Holdings, InIndex, Named};
use kv_core::id::Role;
use kv_core::overlap::Overlap;
use kv_core::report::OwnerKey;
use kv_core::table;
use kv_core::tracker::ActiveLoad;

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
    /// Owners that take whole requests, as the filter chooses among them.
    #[must_use]
    pub fn candidates(&self) -> Vec<Candidate> {
        let owners = self.pool.owners.iter().zip(&self.standings).enumerate();
        let takes = |owner: &table::Owner| owner.accepting && owner.role == Role::Aggregated;
        let accepting = owners.filter(|(_, (owner, _))| takes(owner));
        let candidate = |(position, (_, standing)): (usize, (_, &Standing))| Candidate {
            owner: position,
            overlap: standing.overlap,
            load: standing.load.into(),
            shared_blocks: standing.shared_blocks,
        };
        accepting.map(candidate).collect()
    }
}

impl Service {
    /// What a prompt would meet in a pool, if there is such a pool. `families` are its hashes in
    /// other families than Dynamo's.
    pub(super) fn field(&self, pool: usize, prompt: &[u64], families: &[Named]) -> Option<Field> {
        let table = Arc::clone(self.tables.get(pool)?);
        let number = u16::try_from(pool).ok()?;
        let mut holdings = Holdings::new();
        let mut index = InIndex {
            index: &self.index,
            pool,
        };
        holdings.look_up(&mut index, table.slots(), &table.stores, prompt, families);
        let standing = |owner: &table::Owner| {
            let key = OwnerKey {
                pool: number,
                id: owner.id,
            };
            Standing {
                overlap: holdings.overlap(owner.slot),
                load: self.accounts.load(&key),
                shared_blocks: self.accounts.shared_blocks(&key, prompt),
            }
        };
        let standings = table.owners.iter().map(standing).collect();
        Some(Field {
            pool: table,
            is_load_known: self.is_load_known(),
            standings,
        })
    }
}
