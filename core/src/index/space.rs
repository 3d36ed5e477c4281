//! Blocks of a pool that may match each other: those of one family.

use crate::id::Family;
use crate::page::unit_key;

/// A pool and a family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Space {
    pool: u16,
    pub(super) family: Family,
}

impl Space {
    /// The space of a family in a pool.
    pub(super) fn new(pool: usize, family: Family) -> Self {
        Self {
            pool: u16::try_from(pool).unwrap_or(u16::MAX),
            family,
        }
    }

    /// Key of a block, given the secrets of all pools.
    pub(super) fn key(self, pool_keys: &[u64], sequence: u64) -> u64 {
        let secret = pool_keys.get(usize::from(self.pool)).copied();
        unit_key(sequence, secret.unwrap_or(0), self.family)
    }
}
