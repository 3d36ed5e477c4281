//! Blocks that may match each other: those of one pool and one hash family.

use crate::id::Family;
use crate::page::unit_key;

/// Bits of the family.
const FAMILY_BITS: u32 = 3;

/// A pool and a family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Space(u16);

impl Space {
    /// The space of a family in a pool.
    pub(super) fn new(pool: usize, family: Family) -> Self {
        let pool = u16::try_from(pool).unwrap_or(u16::MAX);
        Self(pool << FAMILY_BITS | family as u16)
    }

    pub(super) fn family(self) -> Family {
        let family = usize::from(self.0 & ((1 << FAMILY_BITS) - 1));
        Family::ALL.get(family).copied().unwrap_or_default()
    }

    /// Key of a block by its sequence hash: that of the unit which it is the first of, too.
    pub(super) fn key(self, secrets: &[u64], sequence: u64) -> u64 {
        self.mix(self.secret(secrets), sequence)
    }

    /// Key of a block by its name.
    pub(super) fn name_key(self, secrets: &[u64], name: u64) -> u64 {
        self.mix(self.secret(secrets).rotate_left(32), name)
    }

    fn secret(self, secrets: &[u64]) -> u64 {
        let pool = usize::from(self.0 >> FAMILY_BITS);
        secrets.get(pool).copied().unwrap_or(0)
    }

    fn mix(self, secret: u64, hash: u64) -> u64 {
        unit_key(hash, secret, self.family())
    }
}
