//! Salts of blocks. vLLM names a salt with a prompt's first block only; the blocks below have it too.

use std::collections::HashMap;

use kv_core::hash::{CHAIN_SEED, Seed};
use kv_core::id::DpRank;

use crate::ingest::Rejection;

/// Salted blocks that are surely remembered, in each of two generations.
const GENERATION: usize = 1 << 17;

/// Salted blocks of a stream, by name.
///
/// Blocks that nobody has asked after or stored for a generation are forgotten, and then their
/// descendants count as unsalted: only a stream that has lost many removes gets there. The engine
/// keeps its namespaces apart whatever the router thinks.
#[derive(Debug, Default)]
pub(super) struct Salts {
    young: HashMap<(DpRank, u64), Mark>,
    old: HashMap<(DpRank, u64), Mark>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mark {
    /// What the salt adds to the seed.
    Salt(u64),
    /// Blocks of two namespaces have had this name.
    Ambiguous,
}

impl Salts {
    /// Notes a store and returns what its salt adds to the seed, its own or its parent's.
    pub(super) fn store(
        &mut self,
        rank: DpRank,
        parent: Option<u64>,
        hashes: &[u64],
        salt: Option<&str>,
    ) -> Result<u64, Rejection> {
        let own = salt.map(|salt| Seed::new("", salt).0.wrapping_sub(CHAIN_SEED));
        let inherited = parent.and_then(|parent| self.get(rank, parent));
        let mark = match (own, inherited) {
            (None, Some(Mark::Ambiguous)) => return Err(Rejection::AmbiguousSalt),
            (None, Some(Mark::Salt(term))) | (Some(term), _) => Some(Mark::Salt(term)),
            (None, None) => None,
        };
        if mark.is_some() || !self.is_empty() {
            for hash in hashes {
                match (self.get(rank, *hash), mark) {
                    (None, Some(mark)) => self.put(rank, *hash, mark),
                    (Some(before), mark) if mark != Some(before) => {
                        self.put(rank, *hash, Mark::Ambiguous);
                    }
                    _ => {}
                }
            }
        }
        match mark {
            Some(Mark::Salt(term)) => Ok(term),
            _ => Ok(0),
        }
    }

    /// A removed name may be used anew, unless it was ambiguous: another block may still have it.
    pub(super) fn remove(&mut self, rank: DpRank, hashes: &[u64]) {
        if self.is_empty() {
            return;
        }
        for hash in hashes {
            if matches!(self.get(rank, *hash), Some(Mark::Salt(_))) {
                self.young.remove(&(rank, *hash));
            }
        }
    }

    pub(super) fn clear(&mut self, rank: DpRank) {
        self.young.retain(|(of, _), _| *of != rank);
        self.old.retain(|(of, _), _| *of != rank);
    }

    fn is_empty(&self) -> bool {
        self.young.is_empty() && self.old.is_empty()
    }

    /// The mark of a name, which is young again.
    fn get(&mut self, rank: DpRank, hash: u64) -> Option<Mark> {
        let key = (rank, hash);
        if let Some(mark) = self.young.get(&key) {
            return Some(*mark);
        }
        let mark = self.old.remove(&key)?;
        self.put(rank, hash, mark);
        Some(mark)
    }

    fn put(&mut self, rank: DpRank, hash: u64, mark: Mark) {
        if self.young.len() >= GENERATION {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert((rank, hash), mark);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn term(salt: &str) -> u64 {
        Seed::new("", salt).0.wrapping_sub(CHAIN_SEED)
    }

    #[test]
    fn descendants_have_the_salt_of_their_parent_in_their_rank() {
        let mut salts = Salts::default();
        assert_eq!(salts.store(0, None, &[1, 2], Some("a")), Ok(term("a")));
        assert_eq!(salts.store(0, Some(2), &[3], None), Ok(term("a")));
        assert_eq!(salts.store(0, Some(3), &[4], None), Ok(term("a")));
        assert_eq!(salts.store(1, Some(2), &[3], None), Ok(0));
        assert_eq!(salts.store(0, Some(9), &[10], None), Ok(0));
    }

    #[test]
    fn a_name_of_two_namespaces_has_no_descendants() {
        let mut salts = Salts::default();
        salts.store(0, None, &[1], Some("a")).unwrap();
        assert_eq!(salts.store(0, None, &[1], Some("b")), Ok(term("b")));
        assert_eq!(
            salts.store(0, Some(1), &[2], None),
            Err(Rejection::AmbiguousSalt)
        );
        salts.remove(0, &[1]);
        assert_eq!(
            salts.store(0, Some(1), &[2], None),
            Err(Rejection::AmbiguousSalt)
        );
        // A store that says its salt needs no parent's.
        assert_eq!(salts.store(0, Some(1), &[2], Some("a")), Ok(term("a")));
        salts.clear(0);
        assert_eq!(salts.store(0, Some(1), &[2], None), Ok(0));
    }

    #[test]
    fn an_unsalted_store_makes_a_salted_name_ambiguous_and_a_removed_one_free() {
        let mut salts = Salts::default();
        salts.store(0, None, &[1, 5], Some("a")).unwrap();
        salts.store(0, None, &[1], None).unwrap();
        assert_eq!(
            salts.store(0, Some(1), &[2], None),
            Err(Rejection::AmbiguousSalt)
        );
        salts.remove(0, &[5]);
        assert_eq!(salts.store(0, Some(5), &[6], None), Ok(0));
    }

    #[test]
    fn names_in_use_outlive_those_that_are_not_and_the_rest_is_bounded() {
        let mut salts = Salts::default();
        salts.store(0, None, &[1, 2], Some("a")).unwrap();
        for hash in 0..3 * GENERATION as u64 {
            salts.store(0, Some(1), &[100 + hash], Some("a")).unwrap();
            assert_eq!(salts.store(0, Some(1), &[], None), Ok(term("a")));
        }
        assert!(salts.young.len() + salts.old.len() <= 2 * GENERATION);
        assert_eq!(salts.store(0, Some(2), &[3], None), Ok(0));
    }
}
