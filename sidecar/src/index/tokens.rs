//! Hashes of blocks' own tokens. The index goes by sequence hashes and has no use for them, but
//! who takes its blocks over as events needs them.

use std::collections::{HashMap, HashSet};

use kv_core::event::EventData;
use kv_core::hash::chain;
use kv_core::index::Held;

/// Entries that may be left over before it is worth to look for them.
const SPARE: usize = 1 << 16;

/// Most entries before it is known how many blocks are held.
const FIRST: usize = 1 << 20;

/// By pool and an engine's name for the block; what was said last counts.
#[derive(Debug)]
pub(super) struct Tokens {
    by_name: HashMap<(usize, u64), u64>,
    most: usize,
}

impl Default for Tokens {
    fn default() -> Self {
        Self {
            by_name: HashMap::new(),
            most: FIRST,
        }
    }
}

impl Tokens {
    /// Keeps those of a store, as far as there is room.
    pub(super) fn note(&mut self, pool: usize, data: &EventData) {
        if let EventData::Stored(stored) = data {
            let room = self.most.saturating_sub(self.by_name.len());
            let entries = stored.blocks.iter().take(room);
            let entries = entries.map(|block| ((pool, block.block_hash), block.tokens_hash));
            self.by_name.extend(entries);
        }
    }

    /// The hash of a held block, if it is known: engines may use a name for several blocks, but
    /// only one of them has this sequence hash.
    pub(super) fn of(&self, pool: usize, held: &Held) -> Option<u64> {
        let tokens = *self.by_name.get(&(pool, held.name?))?;
        let sequence = held.parent.map_or(tokens, |parent| chain(parent, tokens));
        (sequence == held.sequence).then_some(tokens)
    }

    /// Whether many entries must be of blocks that are gone, given how many are held. Makes room
    /// for as many and more.
    pub(super) fn is_crowded(&mut self, held: usize) -> bool {
        self.most = FIRST + 4 * held;
        self.by_name.len() > 2 * held + SPARE
    }

    /// Forgets all but these names.
    pub(super) fn retain(&mut self, names: &HashSet<(usize, u64)>) {
        self.by_name.retain(|name, _| names.contains(name));
        self.by_name.shrink_to_fit();
    }
}

#[cfg(test)]
mod tests {
    use kv_core::event::{Stored, StoredBlock};

    use super::*;

    fn stored(name: u64, tokens: u64) -> EventData {
        EventData::Stored(Stored {
            blocks: vec![StoredBlock {
                block_hash: name,
                tokens_hash: tokens,
                mm_extra_info: None,
            }],
            ..Stored::default()
        })
    }

    fn held(sequence: u64, parent: Option<u64>, name: u64) -> Held {
        Held {
            family: kv_core::id::Family::Dynamo,
            sequence,
            parent,
            name: Some(name),
            tiers: 1,
        }
    }

    #[test]
    fn a_hash_is_told_only_for_the_block_it_belongs_to() {
        let mut tokens = Tokens::default();
        tokens.note(0, &stored(7, 11));
        assert_eq!(tokens.of(0, &held(11, None, 7)), Some(11));
        assert_eq!(tokens.of(0, &held(chain(5, 11), Some(5), 7)), Some(11));
        assert_eq!(tokens.of(0, &held(12, None, 7)), None);
        assert_eq!(tokens.of(1, &held(11, None, 7)), None);
        assert_eq!(tokens.of(0, &held(11, None, 8)), None);
    }

    #[test]
    fn names_no_longer_in_use_are_forgotten() {
        let mut tokens = Tokens::default();
        for name in 0..=SPARE as u64 + 2 {
            tokens.note(0, &stored(name, name));
        }
        assert!(tokens.is_crowded(1) && !tokens.is_crowded(2));
        tokens.retain(&HashSet::from([(0, 5)]));
        assert!(!tokens.is_crowded(0));
        assert_eq!(tokens.of(0, &held(5, None, 5)), Some(5));
    }
}
