//! The prompts that are live in one Envoy process, so that a block counts once on an owner however
//! many requests use it.
//!
//! VMs keep them in shared data, one board to each [`shard`]: prompts that have any block in common
//! have the first in common, and so the shard. An entry has a fingerprint of each of its prompt's
//! leading blocks. Whoever puts an entry on a board or takes one off learns how many of its blocks
//! others use on its owner, and adds that to or takes it from the blocks that the owner's lanes
//! count more than once ([`crate::load`]). However entries come and go, these add up to what the
//! requests on the board share.
//!
//! Two different blocks have the same fingerprint once in 65,536 times; then the prompts part one
//! block later, for everybody and for as long as both are there.
//!
//! A board is its entries, one after the other, little-endian: VM 8 bytes | number 8 | owner 8 |
//! stamp 4 | fingerprints n 2 | n times 2.

use xxhash_rust::xxh3::xxh3_64;

/// Boards of a process.
pub const SHARDS: u64 = 256;
/// Blocks of a prompt that an entry knows, at most. Those after them count for their request alone.
pub const MAX_BLOCKS: usize = 1024;
/// Size of a board, in bytes, at most.
pub const MAX_BYTES: usize = 64 << 10;
/// An entry whose VM has not stamped it for so many seconds is nobody's.
pub const MAX_AGE_S: u32 = 10;

const HEADER: usize = 30;
const STAMP: usize = 24;
const OWNER: usize = 16;

/// The board of a prompt, by the sequence hash of its first block.
#[must_use]
#[allow(clippy::cast_possible_truncation)]
pub fn shard(first: u64) -> u8 {
    (first % SHARDS) as u8
}

/// An owner as entries name it, by what its lanes are called in this process.
#[must_use]
pub fn owner(lanes: &str) -> u64 {
    xxh3_64(lanes.as_bytes())
}

/// Names an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EntryId {
    /// Nonce of the VM.
    pub vm: u64,
    /// Its number for the entry.
    pub number: u64,
}

/// Fingerprints of a prompt's leading blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prints(Vec<u8>);

impl Prints {
    /// Of a prompt's sequence hashes.
    #[must_use]
    pub fn new(prompt: &[u64]) -> Self {
        let print = |hash: &u64| {
            let [.., low, high] = hash.to_le_bytes();
            [low, high]
        };
        Self(prompt.iter().take(MAX_BLOCKS).flat_map(print).collect())
    }
}

/// One shard's entries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Board {
    bytes: Vec<u8>,
}

#[derive(Clone, Copy)]
struct Entry<'a> {
    start: usize,
    id: EntryId,
    owner: u64,
    stamp_s: u32,
    prints: &'a [u8],
}

impl Entry<'_> {
    fn end(&self) -> usize {
        self.start + HEADER + self.prints.len()
    }
}

impl Board {
    /// Reads a board; bytes that are no entry, and all after them, are none.
    #[must_use]
    pub fn from_bytes(mut bytes: Vec<u8>) -> Self {
        let mut end = 0;
        while let Some(entry) = entry(&bytes, end) {
            end = entry.end();
        }
        bytes.truncate(end);
        Self { bytes }
    }

    /// The inverse of [`Board::from_bytes`].
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn entries(&self) -> impl Iterator<Item = Entry<'_>> {
        let first = entry(&self.bytes, 0);
        std::iter::successors(first, |before| entry(&self.bytes, before.end()))
    }

    fn find(&self, id: EntryId) -> Option<Entry<'_>> {
        self.entries().find(|entry| entry.id == id)
    }

    /// Leading blocks of a prompt that other entries than `except` have on each owner that has any.
    #[must_use]
    pub fn shared(&self, prompt: &Prints, except: Option<EntryId>) -> Vec<(u64, u32)> {
        let mut shared: Vec<(u64, u32)> = Vec::new();
        for entry in self.entries().filter(|e| Some(e.id) != except) {
            let blocks = common(entry.prints, &prompt.0);
            if blocks == 0 {
                continue;
            }
            match shared.iter_mut().find(|(owner, _)| *owner == entry.owner) {
                Some((_, most)) => *most = blocks.max(*most),
                None => shared.push((entry.owner, blocks)),
            }
        }
        shared
    }

    /// Leading blocks that other entries than `except` have on one owner.
    fn shared_on(&self, owner: u64, prints: &[u8], except: EntryId) -> u32 {
        let others = self
            .entries()
            .filter(|e| e.owner == owner && e.id != except);
        others.map(|e| common(e.prints, prints)).max().unwrap_or(0)
    }

    /// Puts a prompt on the board. Returns how many of its blocks others use on the owner; `None`
    /// where the board is full.
    pub fn add(&mut self, id: EntryId, owner: u64, prompt: &Prints, now_s: u32) -> Option<u32> {
        if self.bytes.len() + HEADER + prompt.0.len() > MAX_BYTES {
            return None;
        }
        let shared = self.shared_on(owner, &prompt.0, id);
        let blocks = u16::try_from(prompt.0.len() / 2).ok()?;
        let bytes = &mut self.bytes;
        bytes.extend(id.vm.to_le_bytes());
        bytes.extend(id.number.to_le_bytes());
        bytes.extend(owner.to_le_bytes());
        bytes.extend(now_s.to_le_bytes());
        bytes.extend(blocks.to_le_bytes());
        bytes.extend(&prompt.0);
        Some(shared)
    }

    /// Takes an entry off the board. Returns its owner, and how many of its blocks others use there.
    pub fn remove(&mut self, id: EntryId) -> Option<(u64, u32)> {
        let entry = self.find(id)?;
        let (owner, range) = (entry.owner, entry.start..entry.end());
        let shared = self.shared_on(owner, entry.prints, id);
        self.bytes.drain(range);
        Some((owner, shared))
    }

    /// Another owner serves an entry's request. Returns how many of its blocks others use on the
    /// owner that it leaves, and on the one it goes to.
    pub fn relocate(&mut self, id: EntryId, to: u64) -> Option<(u32, u32)> {
        let entry = self.find(id)?;
        let at = entry.start + OWNER;
        let left = self.shared_on(entry.owner, entry.prints, id);
        let joined = self.shared_on(to, entry.prints, id);
        self.bytes
            .get_mut(at..at + 8)?
            .copy_from_slice(&to.to_le_bytes());
        Some((left, joined))
    }

    /// Stamps the entries for which `is_live` holds. Whether there are any.
    pub fn stamp(&mut self, now_s: u32, is_live: impl Fn(EntryId) -> bool) -> bool {
        let live = self.entries().filter(|entry| is_live(entry.id));
        let stamps: Vec<usize> = live.map(|entry| entry.start + STAMP).collect();
        for at in &stamps {
            if let Some(stamp) = self.bytes.get_mut(*at..*at + 4) {
                stamp.copy_from_slice(&now_s.to_le_bytes());
            }
        }
        !stamps.is_empty()
    }

    /// Takes off what is nobody's, as [`Board::remove`] does.
    pub fn expire(&mut self, now_s: u32) -> Vec<(u64, u32)> {
        let is_old = |entry: &Entry<'_>| now_s.saturating_sub(entry.stamp_s) > MAX_AGE_S;
        let old: Vec<EntryId> = self.entries().filter(is_old).map(|e| e.id).collect();
        old.into_iter().filter_map(|id| self.remove(id)).collect()
    }
}

fn entry(bytes: &[u8], start: usize) -> Option<Entry<'_>> {
    let bytes = bytes.get(start..)?;
    let (vm, rest) = bytes.split_first_chunk()?;
    let (number, rest) = rest.split_first_chunk()?;
    let (owner, rest) = rest.split_first_chunk()?;
    let (stamp, rest) = rest.split_first_chunk()?;
    let (blocks, rest) = rest.split_first_chunk()?;
    let prints = rest.get(..2 * usize::from(u16::from_le_bytes(*blocks)))?;
    Some(Entry {
        start,
        id: EntryId {
            vm: u64::from_le_bytes(*vm),
            number: u64::from_le_bytes(*number),
        },
        owner: u64::from_le_bytes(*owner),
        stamp_s: u32::from_le_bytes(*stamp),
        prints,
    })
}

/// Fingerprints that two prompts have in common from their start.
fn common(a: &[u8], b: &[u8]) -> u32 {
    let (wide_a, _) = a.as_chunks::<16>();
    let (wide_b, _) = b.as_chunks::<16>();
    let wide = wide_a.iter().zip(wide_b);
    let wide = wide.take_while(|(a, b)| a == b).count();
    let rest = |bytes| {
        <[u8]>::get(bytes, 16 * wide..)
            .unwrap_or(&[])
            .as_chunks::<2>()
            .0
    };
    let narrow = rest(a).iter().zip(rest(b));
    let narrow = narrow.take_while(|(a, b)| a == b).count();
    u32::try_from(8 * wide + narrow).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::hash::chain;
    use crate::rng::Rng;

    fn id(number: u64) -> EntryId {
        EntryId {
            vm: number % 3,
            number,
        }
    }

    /// Prompts that part at random depths from one another.
    fn prompt(rng: &mut Rng) -> Vec<u64> {
        let length = 1 + rng.below(40);
        let mut hash = 7_u64;
        let next = |_| {
            hash = chain(hash, rng.below(8) as u64 / 7);
            hash
        };
        (0..length).map(next).collect()
    }

    #[test]
    fn blocks_counted_more_than_once_are_those_that_requests_share() {
        for seed in 0..30 {
            let mut rng = Rng::new(seed);
            let mut board = Board::default();
            // By owner: blocks that lanes count more than once.
            let mut double: BTreeMap<u64, i64> = BTreeMap::new();
            let mut live: BTreeMap<u64, (u64, Vec<u64>)> = BTreeMap::new();
            for number in 0..300 {
                match rng.below(5) {
                    0..2 => {
                        let (owner, prompt) = (rng.below(3) as u64, prompt(&mut rng));
                        let shared = board.add(id(number), owner, &Prints::new(&prompt), 0);
                        *double.entry(owner).or_default() += i64::from(shared.unwrap());
                        live.insert(number, (owner, prompt));
                    }
                    2 => {
                        let at = rng.below(live.len() + 1);
                        let Some((number, (owner, _))) = live.iter_mut().nth(at) else {
                            continue;
                        };
                        let to = rng.below(3) as u64;
                        let (left, joined) = board.relocate(id(*number), to).unwrap();
                        *double.entry(*owner).or_default() -= i64::from(left);
                        *double.entry(to).or_default() += i64::from(joined);
                        *owner = to;
                    }
                    _ => {
                        let at = rng.below(live.len() + 1);
                        let Some(number) = live.keys().nth(at).copied() else {
                            continue;
                        };
                        let (owner, shared) = board.remove(id(number)).unwrap();
                        *double.entry(owner).or_default() -= i64::from(shared);
                        live.remove(&number);
                    }
                }
                for owner in 0..3 {
                    let on = live.values().filter(|(at, _)| *at == owner);
                    let prompts: Vec<&Vec<u64>> = on.map(|(_, prompt)| prompt).collect();
                    let all: usize = prompts.iter().map(|prompt| prompt.len()).sum();
                    let distinct: BTreeSet<&u64> = prompts.into_iter().flatten().collect();
                    let shared = (all - distinct.len()) as i64;
                    assert_eq!(double.get(&owner).copied().unwrap_or(0), shared);
                }
                assert_eq!(Board::from_bytes(board.bytes().to_vec()), board);
            }
        }
    }

    #[test]
    fn the_longest_prefix_in_use_on_each_owner_is_told() {
        let mut board = Board::default();
        let prompt = |tail: &[u64]| {
            let system = (1..=20).map(|i| i << 48);
            Prints::new(
                &system
                    .chain(tail.iter().map(|i| i << 48))
                    .collect::<Vec<_>>(),
            )
        };
        board.add(id(1), 7, &prompt(&[31, 32]), 0);
        board.add(id(2), 7, &prompt(&[31, 40]), 0);
        board.add(id(3), 8, &prompt(&[50]), 0);
        assert_eq!(
            board.shared(&prompt(&[31, 32, 33]), None),
            [(7, 22), (8, 20)]
        );
        assert_eq!(
            board.shared(&prompt(&[31, 32]), Some(id(1))),
            [(7, 21), (8, 20)]
        );
        assert_eq!(board.shared(&Prints::new(&[1]), None), []);
    }

    #[test]
    fn entries_that_nobody_stamps_go() {
        let mut board = Board::default();
        let prints = Prints::new(&[1 << 48, 2 << 48]);
        board.add(id(1), 7, &prints, 100);
        board.add(id(2), 7, &prints, 100);
        assert!(board.stamp(105, |entry| entry == id(2)));
        assert_eq!(board.expire(110), []);
        assert_eq!(board.expire(111), [(7, 2)]);
        assert_eq!(board.remove(id(1)), None);
        assert_eq!(board.remove(id(2)), Some((7, 0)));
        assert!(!board.stamp(105, |_| true));
        assert!(board.bytes().is_empty());
    }

    #[test]
    fn a_full_board_takes_no_more_and_broken_bytes_are_no_entries() {
        let mut board = Board::default();
        let long: Vec<u64> = (0..5000).map(|i| i << 48).collect();
        let prints = Prints::new(&long);
        let taken = (0..100).take_while(|n| board.add(id(*n), 1, &prints, 0).is_some());
        let taken = taken.count();
        assert_eq!(taken, MAX_BYTES / (HEADER + 2 * MAX_BLOCKS));
        assert_eq!(board.shared(&prints, None), [(1, 1024)]);
        let whole = board.bytes().to_vec();
        let cut = Board::from_bytes(whole[..whole.len() - 1].to_vec());
        assert_eq!(cut.entries().count(), taken - 1);
        assert_eq!(Board::from_bytes(vec![0xff; 31]), Board::default());
    }
}
