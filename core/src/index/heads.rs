//! Which prompts begin as none does that the index has: most that miss do so with their first block.

/// Counters: a power of two, few enough to stay in a cache near the core.
const COUNTERS: usize = 1 << 14;

/// First blocks by some bits of their keys, counted. A counter that is full stays so.
#[derive(Debug)]
pub(super) struct Heads {
    counters: Box<[u8]>,
}

impl Default for Heads {
    fn default() -> Self {
        let counters = vec![0; COUNTERS].into();
        Self { counters }
    }
}

#[allow(clippy::cast_possible_truncation)]
fn counter(key: u64) -> usize {
    key as usize % COUNTERS
}

impl Heads {
    /// Whether there may be a first block with a key.
    pub(super) fn may_have(&self, key: u64) -> bool {
        self.counters.get(counter(key)).is_some_and(|n| *n > 0)
    }

    /// A first block has come.
    pub(super) fn add(&mut self, key: u64) {
        if let Some(n) = self.counters.get_mut(counter(key)) {
            *n = n.saturating_add(1);
        }
    }

    /// A first block has gone.
    pub(super) fn remove(&mut self, key: u64) {
        let n = self.counters.get_mut(counter(key));
        if let Some(n) = n.filter(|n| **n < u8::MAX) {
            *n = n.saturating_sub(1);
        }
    }

    /// Bytes taken from the allocator.
    pub(super) fn bytes(&self) -> usize {
        self.counters.len()
    }
}
