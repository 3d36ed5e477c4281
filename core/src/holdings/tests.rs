use std::collections::HashMap;
use std::sync::Arc;

use super::{Holdings, InIndex, Named, Pages, Source, named};
use crate::event::{EventData, Removed, Stored, StoredBlock};
use crate::family::{FamilyHasher, Namespace, Scheme};
use crate::hash::{Hashing, Seed, sequence_hashes};
use crate::id::{Family, Slot, Tier};
use crate::index::{Held, Index, IndexConfig, parents_first};
use crate::naive::{Foreign, Naive};
use crate::reader::{Reader, View};
use crate::rng::Rng;

const SECRET: u64 = 0x5eed_5eed_5eed_5eed;
const POOL: usize = 1;
const BLOCK: u32 = 4;
const GROUP: u8 = 4;

/// Dynamo's family and all others, with blocks of one, two and three blocks of the pool.
struct Fleet {
    rng: Rng,
    index: Index,
    naive: Naive,
    schemes: Vec<Scheme>,
    stores: Vec<Slot>,
    slots: u16,
    pages: HashMap<u32, Arc<[u8]>>,
    /// Overlaps seen that end on each tier, and that go on in a store.
    ends: [usize; 5],
}

fn scheme(family: Family, blocks: u32) -> Scheme {
    Scheme {
        family,
        block_size: BLOCK * blocks,
        hash_seed: "0".into(),
    }
}

fn stored(parent_hash: Option<u64>, names: &[u64], hashes: &[u64]) -> EventData {
    let blocks = names.iter().zip(hashes).map(|(name, hash)| StoredBlock {
        block_hash: *name,
        tokens_hash: *hash,
        mm_extra_info: None,
    });
    EventData::Stored(Stored {
        parent_hash,
        start_position: None,
        blocks: blocks.collect(),
    })
}

fn removed(names: &[u64]) -> EventData {
    EventData::Removed(Removed {
        block_hashes: names.to_vec(),
    })
}

impl Fleet {
    fn new(seed: u64, slots: u16, stores: &[u16], schemes: Vec<Scheme>) -> Self {
        let mut index = Index::new(IndexConfig {
            epoch: 7,
            level: 0,
            group: GROUP,
            max_orphans: 1 << 16,
            max_bytes: usize::MAX,
            max_page_bytes: usize::MAX,
        });
        assert_eq!(index.add_pool(SECRET ^ 1), 0);
        assert_eq!(index.add_pool(SECRET), POOL);
        Self {
            rng: Rng::new(seed),
            index,
            naive: Naive::default(),
            schemes,
            stores: stores.iter().copied().map(Slot).collect(),
            slots,
            pages: HashMap::new(),
            ends: [0; 5],
        }
    }

    /// Tokens of a prompt; prompts share prefixes.
    fn tokens(&mut self) -> Vec<u32> {
        let (length, branch) = (1 + self.rng.below(120), self.rng.below(3));
        let fork = 16 * self.rng.below(4);
        let token = |i| if i < fork { i } else { i + 1000 * (1 + branch) };
        (0..length)
            .map(|i| u32::try_from(token(i)).unwrap())
            .collect()
    }

    fn step(&mut self) {
        let slot = Slot(self.rng.below(usize::from(self.slots)) as u16);
        let tier = Tier::from_index(self.rng.below(4));
        let tokens = self.tokens();
        let of = self.rng.below(self.schemes.len() + 1);
        let scheme = self.schemes.get(of).cloned().unwrap_or_default();
        let family = scheme.family;
        let (names, hashes) = if family == Family::Dynamo {
            let chunks = tokens.chunks_exact(BLOCK as usize);
            let blocks: Vec<u64> = chunks.map(|b| Seed::default().block(b)).collect();
            (sequence(&tokens), blocks)
        } else {
            let mut hasher = FamilyHasher::new(&scheme, Namespace::default()).unwrap();
            hasher.push(&tokens);
            (hasher.hashes().to_vec(), hasher.into_hashes())
        };
        if names.is_empty() {
            return;
        }
        let from = self.rng.below(names.len());
        let to = from + 1 + self.rng.below(names.len() - from);
        let data = match self.rng.below(20) {
            0 if self.rng.below(8) == 0 => EventData::Cleared,
            0..6 => removed(&names[from..to]),
            // A tail whose parent may not be known, or blocks of a store in any order.
            6..10 if family != Family::FlexKv => {
                let parent = from.checked_sub(1).filter(|_| !family.is_flat());
                stored(
                    parent.map(|i| names[i]),
                    &names[from..to],
                    &hashes[from..to],
                )
            }
            _ => stored(None, &names[..to], &hashes[..to]),
        };
        self.index.apply_family(POOL, family, slot, tier, &data);
        self.naive.apply_family(POOL, family, slot, tier, &data);
    }

    fn check(&mut self) {
        while self.index.is_dirty() {
            for write in self.index.flush() {
                self.pages.insert(write.id, write.bytes);
            }
        }
        let tokens = self.tokens();
        let (prompt, families) = (sequence(&tokens), self.named(&tokens));
        let foreign: Vec<Foreign> = self.schemes.iter().map(|s| foreign(s, &tokens)).collect();
        let mut reader = Reader::new();
        let pages = Pages {
            reader: &mut reader,
            view: View {
                level: self.index.level(),
                group: GROUP,
                epoch: 7,
                pool_key: SECRET,
                family: Family::Dynamo,
                slots: usize::from(self.slots),
            },
            fetch: |id| self.pages.get(&id).map(|page| page.to_vec()),
        };
        let seen = self.looked_up(pages, &prompt, &families);
        let index = InIndex {
            index: &self.index,
            pool: POOL,
        };
        let exact = self.looked_up(index, &prompt, &families);
        for slot in (0..self.slots).map(Slot) {
            let expected = if self.stores.contains(&slot) {
                Default::default()
            } else {
                let stores = &self.stores;
                self.naive.holding(POOL, slot, stores, &prompt, &foreign)
            };
            assert_eq!(seen.overlap(slot), expected, "pages, slot {slot:?}");
            assert_eq!(exact.overlap(slot), expected, "index, slot {slot:?}");
            let blocks = expected
                .by_tier()
                .into_iter()
                .chain([expected.shared_cache]);
            for (ends, blocks) in self.ends.iter_mut().zip(blocks) {
                *ends += usize::from(blocks > 0);
            }
        }
    }

    fn looked_up(&self, mut source: impl Source, prompt: &[u64], families: &[Named]) -> Holdings {
        let mut holdings = Holdings::new();
        let slots = usize::from(self.slots);
        holdings.look_up(&mut source, slots, &self.stores, prompt, families);
        holdings
    }

    fn named(&self, tokens: &[u32]) -> Vec<Named> {
        named(&self.schemes, BLOCK, tokens, Namespace::default())
    }
}

fn sequence(tokens: &[u32]) -> Vec<u64> {
    sequence_hashes(tokens, Hashing::new(BLOCK as usize, Seed::default()))
}

fn foreign(scheme: &Scheme, tokens: &[u32]) -> Foreign {
    let mut hasher = FamilyHasher::new(scheme, Namespace::default()).unwrap();
    hasher.push(tokens);
    Foreign {
        family: scheme.family,
        blocks: scheme.block_size / BLOCK,
        hashes: hasher.into_hashes(),
    }
}

#[test]
fn overlaps_over_all_families_equal_the_naive_model() {
    let mut ends = [0; 5];
    for seed in 0..40 {
        let schemes = vec![
            scheme(Family::FlexKv, 1),
            scheme(Family::HiCache, 2),
            scheme(Family::VllmSha256Cbor, 3),
            scheme(Family::VllmXxhashCbor, 1),
            scheme(Family::LmCache, 3),
        ];
        let count = [1, 2, 5][seed as usize % 3];
        let (slots, stores): (u16, &[u16]) =
            [(3, &[][..]), (4, &[1][..]), (70, &[0, 69][..])][seed as usize / 3 % 3];
        let skip = seed as usize % (schemes.len() + 1 - count);
        let schemes = schemes.into_iter().skip(skip).take(count).collect();
        let mut fleet = Fleet::new(seed, slots, stores, schemes);
        for step in 0..400 {
            fleet.step();
            if step % 4 == 0 {
                fleet.check();
            }
        }
        for (sum, n) in ends.iter_mut().zip(fleet.ends) {
            *sum += n;
        }
    }
    assert!(ends.iter().all(|n| *n > 1_000), "{ends:?}");
}

#[test]
fn a_dump_rebuilds_an_owner_in_all_families() {
    let schemes = vec![scheme(Family::FlexKv, 1), scheme(Family::LmCache, 2)];
    let mut fleet = Fleet::new(5, 3, &[], schemes);
    for _ in 0..200 {
        fleet.step();
    }
    let dumps: Vec<_> = (0..3)
        .map(|slot| fleet.index.dump(POOL, Slot(slot)))
        .collect();
    assert!(
        dumps
            .iter()
            .flatten()
            .any(|held| held.family == Family::LmCache)
    );
    for (slot, dump) in (0..3).map(Slot).zip(&dumps) {
        let names = fleet.index.names(POOL, slot);
        let parts = names.chunks(7).rev();
        let parts = parts.flat_map(|part| fleet.index.held(POOL, slot, part));
        let mut parts: Vec<Held> = parts.collect();
        let key = |held: &Held| (held.family, held.sequence, held.name);
        let mut whole = dump.clone();
        whole.sort_unstable_by_key(key);
        parts.sort_unstable_by_key(key);
        parts.dedup();
        assert_eq!(parts, whole);
        parents_first(&mut parts);
        fleet.index.remove_owner(POOL, slot);
        assert_eq!(fleet.index.restore(POOL, slot, &parts).collisions, 0);
    }
    for _ in 0..50 {
        fleet.check();
    }
    for (slot, dump) in (0..3).map(Slot).zip(dumps) {
        fleet.index.remove_owner(POOL, slot);
        assert_eq!(fleet.index.owner_blocks(POOL, slot), 0);
        assert_eq!(fleet.index.restore(POOL, slot, &dump).collisions, 0);
    }
    for _ in 0..50 {
        fleet.check();
    }
}

#[test]
fn one_hash_in_two_families_is_two_blocks() {
    let mut fleet = Fleet::new(0, 2, &[], vec![scheme(Family::FlexKv, 1)]);
    let tokens: Vec<u32> = (0..8).collect();
    let families = fleet.named(&tokens);
    let store = stored(None, &families[0].hashes, &families[0].hashes);
    let index = &mut fleet.index;
    index.apply_family(POOL, Family::LmCache, Slot(0), Tier::Host, &store);
    assert_eq!(
        index.overlaps_in(POOL, Family::FlexKv, &families[0].hashes),
        []
    );
    assert_eq!(
        index
            .holders(POOL, Family::FlexKv, families[0].hashes[0])
            .count(),
        0
    );
    assert_eq!(
        index
            .holders(POOL, Family::LmCache, families[0].hashes[0])
            .count(),
        1
    );
    assert_eq!(
        index
            .apply_family(
                POOL,
                Family::FlexKv,
                Slot(0),
                Tier::Host,
                &EventData::Cleared
            )
            .removed,
        0
    );
    assert_eq!(index.owner_blocks(POOL, Slot(0)), 2);
}

#[test]
fn what_a_sender_says_of_a_hash_s_place_hides_nobody_else_s_blocks() {
    let mut fleet = Fleet::new(0, 2, &[], vec![scheme(Family::FlexKv, 1)]);
    let tokens: Vec<u32> = (0..12).collect();
    let own = foreign(&fleet.schemes[0], &tokens).hashes;
    let backwards: Vec<u64> = own.iter().rev().copied().collect();
    for (slot, hashes) in [(Slot(0), &backwards), (Slot(1), &own)] {
        let data = stored(None, hashes, hashes);
        fleet
            .index
            .apply_family(POOL, Family::FlexKv, slot, Tier::Disk, &data);
        fleet
            .naive
            .apply_family(POOL, Family::FlexKv, slot, Tier::Disk, &data);
    }
    let families = fleet.named(&tokens);
    let found = fleet
        .index
        .overlaps_in(POOL, Family::FlexKv, &families[0].hashes);
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].0, found[0].1.depth), (Slot(1), [0, 0, 3, 3]));
}

#[test]
fn beyond_its_limit_an_owner_loses_what_it_announced_longest_ago() {
    let mut fleet = Fleet::new(0, 2, &[], vec![scheme(Family::FlexKv, 1)]);
    let index = &mut fleet.index;
    index.limit(POOL, Family::FlexKv, 5);
    let mut announce = |from: u64, to: u64| {
        let hashes: Vec<u64> = (from..to).collect();
        index.apply_family(
            POOL,
            Family::FlexKv,
            Slot(0),
            Tier::Host,
            &stored(None, &hashes, &hashes),
        )
    };
    assert_eq!(announce(0, 3).expired, 0);
    assert_eq!(announce(10, 14).expired, 2);
    // The root of the older prompt is the last to go, and announcing it again spares it.
    assert_eq!(announce(0, 1).expired, 0);
    assert_eq!(announce(20, 22).expired, 2);
    let mut held: Vec<u64> = index
        .dump(POOL, Slot(0))
        .iter()
        .filter_map(|h| h.name)
        .collect();
    held.sort_unstable();
    assert_eq!(held, [0, 10, 11, 20, 21]);
    index.apply_family(
        POOL,
        Family::FlexKv,
        Slot(0),
        Tier::Host,
        &removed(&[10, 11]),
    );
    let more: Vec<u64> = (30..32).collect();
    let applied = index.apply_family(
        POOL,
        Family::FlexKv,
        Slot(0),
        Tier::Disk,
        &stored(None, &more, &more),
    );
    assert_eq!((applied.stored, applied.expired), (2, 0));
    // Other families have no limit.
    let many: Vec<u64> = (0..50).collect();
    let applied = index.apply_family(
        POOL,
        Family::HiCache,
        Slot(0),
        Tier::Disk,
        &stored(None, &many, &many),
    );
    assert_eq!((applied.stored, applied.expired), (50, 0));
}
