//! Salts of blocks. vLLM names a salt with a prompt's first block only; the blocks below have it too.

use std::collections::HashMap;

use kv_core::hash::{CHAIN_SEED, Seed};
use kv_core::id::{DpRank, Tier};

use crate::ingest::Rejection;

/// Salted blocks that are surely remembered, in each of two generations.
const GENERATION: usize = 1 << 17;

/// Salted blocks of a stream, by name, whatever tier they lie on: a block that goes to disk keeps its
/// salt, and one that leaves a tier has it as long as another tier has the block.
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
    /// What the salt adds to the seed, and a bit for each tier that has the block.
    Salt { term: u64, tiers: u8 },
    /// Blocks of two namespaces have had this name.
    Ambiguous,
}

impl Mark {
    /// Takes a tier out; false when none is left.
    fn stays_without(&mut self, tier: Tier) -> bool {
        match self {
            Self::Salt { tiers, .. } => {
                *tiers &= !bit(tier);
                *tiers != 0
            }
            Self::Ambiguous => true,
        }
    }
}

fn bit(tier: Tier) -> u8 {
    1 << tier.index()
}

impl Salts {
    /// Notes a store and returns what its salt adds to the seed, its own or its parent's.
    pub(super) fn store(
        &mut self,
        rank: DpRank,
        tier: Tier,
        parent: Option<u64>,
        hashes: &[u64],
        salt: Option<&str>,
    ) -> Result<u64, Rejection> {
        let own = salt.map(|salt| Seed::new("", salt).0.wrapping_sub(CHAIN_SEED));
        let inherited = parent.and_then(|parent| self.get(rank, parent));
        let term = match (own, inherited) {
            (None, Some(Mark::Ambiguous)) => return Err(Rejection::AmbiguousSalt),
            (None, Some(Mark::Salt { term, .. })) | (Some(term), _) => Some(term),
            (None, None) => None,
        };
        if term.is_some() || !self.is_empty() {
            for hash in hashes {
                let mark = match (self.get(rank, *hash), term) {
                    (None, None) => continue,
                    (None, Some(term)) => Mark::Salt {
                        term,
                        tiers: bit(tier),
                    },
                    (Some(Mark::Salt { term, tiers }), of) if of == Some(term) => Mark::Salt {
                        term,
                        tiers: tiers | bit(tier),
                    },
                    (Some(_), _) => Mark::Ambiguous,
                };
                self.put(rank, *hash, mark);
            }
        }
        Ok(term.unwrap_or(0))
    }

    /// A name that has left its last tier may be used anew, unless it was ambiguous: another block
    /// may still have it.
    pub(super) fn remove(&mut self, rank: DpRank, tier: Tier, hashes: &[u64]) {
        if self.is_empty() {
            return;
        }
        for hash in hashes {
            let Some(mut mark) = self.get(rank, *hash) else {
                continue;
            };
            if mark.stays_without(tier) {
                self.put(rank, *hash, mark);
            } else {
                self.young.remove(&(rank, *hash));
            }
        }
    }

    /// A tier, or all of them, are empty.
    pub(super) fn clear(&mut self, rank: DpRank, tier: Option<Tier>) {
        for marks in [&mut self.young, &mut self.old] {
            marks.retain(|(of, _), mark| {
                *of != rank || tier.is_some_and(|tier| mark.stays_without(tier))
            });
        }
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
        let key = (rank, hash);
        if self.young.len() >= GENERATION && !self.young.contains_key(&key) {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, mark);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICE: Tier = Tier::Device;

    fn term(salt: &str) -> u64 {
        Seed::new("", salt).0.wrapping_sub(CHAIN_SEED)
    }

    #[test]
    fn descendants_have_the_salt_of_their_parent_in_their_rank() {
        let mut salts = Salts::default();
        assert_eq!(
            salts.store(0, DEVICE, None, &[1, 2], Some("a")),
            Ok(term("a"))
        );
        assert_eq!(salts.store(0, DEVICE, Some(2), &[3], None), Ok(term("a")));
        assert_eq!(salts.store(0, DEVICE, Some(3), &[4], None), Ok(term("a")));
        assert_eq!(salts.store(1, DEVICE, Some(2), &[3], None), Ok(0));
        assert_eq!(salts.store(0, DEVICE, Some(9), &[10], None), Ok(0));
    }

    #[test]
    fn a_name_of_two_namespaces_has_no_descendants() {
        let mut salts = Salts::default();
        salts.store(0, DEVICE, None, &[1], Some("a")).unwrap();
        assert_eq!(salts.store(0, DEVICE, None, &[1], Some("b")), Ok(term("b")));
        assert_eq!(
            salts.store(0, DEVICE, Some(1), &[2], None),
            Err(Rejection::AmbiguousSalt)
        );
        salts.remove(0, DEVICE, &[1]);
        assert_eq!(
            salts.store(0, DEVICE, Some(1), &[2], None),
            Err(Rejection::AmbiguousSalt)
        );
        // A store that says its salt needs no parent's.
        assert_eq!(
            salts.store(0, DEVICE, Some(1), &[2], Some("a")),
            Ok(term("a"))
        );
        salts.clear(0, None);
        assert_eq!(salts.store(0, DEVICE, Some(1), &[2], None), Ok(0));
    }

    #[test]
    fn an_unsalted_store_makes_a_salted_name_ambiguous_and_a_removed_one_free() {
        let mut salts = Salts::default();
        salts.store(0, DEVICE, None, &[1, 5], Some("a")).unwrap();
        salts.store(0, DEVICE, None, &[1], None).unwrap();
        assert_eq!(
            salts.store(0, DEVICE, Some(1), &[2], None),
            Err(Rejection::AmbiguousSalt)
        );
        salts.remove(0, DEVICE, &[5]);
        assert_eq!(salts.store(0, DEVICE, Some(5), &[6], None), Ok(0));
    }

    #[test]
    fn a_block_keeps_its_salt_until_it_has_left_every_tier() {
        let mut salts = Salts::default();
        let child = |salts: &mut Salts| salts.store(0, DEVICE, Some(1), &[], None);
        salts.store(0, DEVICE, None, &[1], Some("a")).unwrap();
        let below = salts.store(0, Tier::Disk, Some(1), &[2], None);
        assert_eq!(below, Ok(term("a")));
        salts.store(0, Tier::Host, None, &[1], Some("a")).unwrap();
        salts.remove(0, Tier::Host, &[1]);
        salts.remove(0, Tier::Disk, &[1]);
        assert_eq!(child(&mut salts), Ok(term("a")));
        salts.remove(0, DEVICE, &[1]);
        assert_eq!(child(&mut salts), Ok(0));
        salts.clear(0, Some(DEVICE));
        assert_eq!(salts.store(0, DEVICE, Some(2), &[], None), Ok(term("a")));
        salts.clear(0, Some(Tier::Disk));
        assert_eq!(salts.store(0, DEVICE, Some(2), &[], None), Ok(0));
    }

    #[test]
    fn names_in_use_outlive_those_that_are_not_and_the_rest_is_bounded() {
        let mut salts = Salts::default();
        salts.store(0, DEVICE, None, &[1, 2], Some("a")).unwrap();
        for hash in 0..3 * GENERATION as u64 {
            salts
                .store(0, DEVICE, Some(1), &[100 + hash], Some("a"))
                .unwrap();
            assert_eq!(salts.store(0, DEVICE, Some(1), &[], None), Ok(term("a")));
        }
        assert!(salts.young.len() + salts.old.len() <= 2 * GENERATION);
        assert_eq!(salts.store(0, DEVICE, Some(2), &[3], None), Ok(0));
    }
}
