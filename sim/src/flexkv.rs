//! `FlexKV` beside an engine: what the engine finishes goes to host memory and to disk, and what a
//! prompt finds there beyond the engine's own cache is loaded instead of computed.
//!
//! Its events are those of `FlexKV`'s collector: hashes without token ids, no parent, the whole
//! prefix once more with every insertion, removed hashes as signed numbers.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use kv_core::family::{FamilyHasher, Namespace, Scheme};
use kv_core::id::Family;

/// Sizes and speeds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Host memory.
    pub cpu: LevelConfig,
    /// Disk.
    pub ssd: LevelConfig,
}

/// Size and speed of one level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LevelConfig {
    /// Blocks it holds; 0 for none.
    pub blocks: usize,
    /// Time to load one block from it.
    pub load_per_block: Duration,
}

/// A change of one level.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// A prefix is there, whole.
    Stored(&'static str, Vec<u64>),
    /// Blocks were dropped.
    Removed(&'static str, Vec<u64>),
}

/// The levels.
#[derive(Debug)]
pub(crate) struct FlexKv {
    scheme: Scheme,
    levels: [Level; 2],
    changes: Vec<Change>,
}

#[derive(Debug)]
struct Level {
    medium: &'static str,
    config: LevelConfig,
    /// Last use by hash, and the other way round.
    used: HashMap<u64, u64>,
    order: BTreeMap<u64, u64>,
    clock: u64,
}

// === impl FlexKv ===

impl FlexKv {
    /// Empty levels for an engine's block size.
    #[must_use]
    pub(crate) fn new(config: &Config, block_size: usize) -> Self {
        let level = |medium, config| Level {
            medium,
            config,
            used: HashMap::new(),
            order: BTreeMap::new(),
            clock: 0,
        };
        Self {
            scheme: Scheme {
                family: Family::FlexKv,
                block_size: u32::try_from(block_size).unwrap_or(u32::MAX),
                hash_seed: String::new(),
            },
            levels: [level("CPU", config.cpu), level("SSD", config.ssd)],
            changes: Vec::new(),
        }
    }

    /// Hashes of a sequence's full blocks.
    #[must_use]
    pub(crate) fn hashes(&self, tokens: &[u32]) -> Vec<u64> {
        let hasher = FamilyHasher::new(&self.scheme, Namespace::default());
        hasher.map_or_else(Vec::new, |mut hasher| {
            hasher.push(tokens);
            hasher.into_hashes()
        })
    }

    /// How many of these consecutive blocks are there, and the time to load them, each from the
    /// fastest level that has it.
    #[must_use]
    pub(crate) fn find(&self, hashes: &[u64]) -> (usize, Duration) {
        let mut time = Duration::ZERO;
        for (found, hash) in hashes.iter().enumerate() {
            let level = self.levels.iter().find(|l| l.used.contains_key(hash));
            let Some(level) = level else {
                return (found, time);
            };
            time += level.config.load_per_block;
        }
        (hashes.len(), time)
    }

    /// Stores a prefix on every level.
    pub(crate) fn store(&mut self, hashes: &[u64]) {
        for level in &mut self.levels {
            level.store(hashes, &mut self.changes);
        }
    }

    /// What changed since the last call, in order.
    pub(crate) fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes)
    }
}

// === impl Level ===

impl Level {
    fn store(&mut self, hashes: &[u64], changes: &mut Vec<Change>) {
        let hashes = &hashes[..hashes.len().min(self.config.blocks)];
        let is_new = hashes.iter().any(|hash| !self.used.contains_key(hash));
        // Backwards, so that the end of a prefix goes before its beginning.
        for hash in hashes.iter().rev() {
            self.clock += 1;
            if let Some(before) = self.used.insert(*hash, self.clock) {
                self.order.remove(&before);
            }
            self.order.insert(self.clock, *hash);
        }
        if is_new {
            changes.push(Change::Stored(self.medium, hashes.to_vec()));
        }
        let mut gone = Vec::new();
        while self.used.len() > self.config.blocks
            && let Some((_, hash)) = self.order.pop_first()
        {
            self.used.remove(&hash);
            gone.push(hash);
        }
        if !gone.is_empty() {
            changes.push(Change::Removed(self.medium, gone));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn levels(cpu: usize, ssd: usize) -> FlexKv {
        let level = |blocks, us| LevelConfig {
            blocks,
            load_per_block: Duration::from_micros(us),
        };
        let config = Config {
            cpu: level(cpu, 10),
            ssd: level(ssd, 100),
        };
        FlexKv::new(&config, 4)
    }

    #[test]
    fn a_prefix_is_told_whole_and_only_when_something_of_it_is_new() {
        let mut flexkv = levels(8, 0);
        flexkv.store(&[1, 2]);
        assert_eq!(flexkv.take_changes(), [Change::Stored("CPU", vec![1, 2])]);
        flexkv.store(&[1, 2]);
        assert_eq!(flexkv.take_changes(), []);
        flexkv.store(&[1, 2, 3]);
        assert_eq!(
            flexkv.take_changes(),
            [Change::Stored("CPU", vec![1, 2, 3])]
        );
    }

    #[test]
    fn a_full_level_drops_the_end_of_what_was_stored_longest_ago() {
        let mut flexkv = levels(4, 16);
        flexkv.store(&[1, 2, 3]);
        flexkv.store(&[11, 12]);
        let changes = flexkv.take_changes();
        assert!(
            changes.contains(&Change::Removed("CPU", vec![3])),
            "{changes:?}"
        );
        assert!(
            !changes
                .iter()
                .any(|c| matches!(c, Change::Removed("SSD", _)))
        );
        // From memory, memory and disk.
        assert_eq!(flexkv.find(&[1, 2, 3, 4]), (3, Duration::from_micros(120)));
        assert_eq!(flexkv.find(&[4]), (0, Duration::ZERO));
    }

    #[test]
    fn hashes_are_flexkvs() {
        let tokens: Vec<u32> = (0..48).collect();
        let config = levels(1, 1);
        assert_eq!(config.hashes(&tokens).len(), 12);
        let sixteen = FlexKv::new(
            &Config {
                cpu: config.levels[0].config,
                ssd: config.levels[1].config,
            },
            16,
        );
        assert_eq!(sixteen.hashes(&tokens)[0], 0x00b4_7f43_944b_694b);
    }
}
