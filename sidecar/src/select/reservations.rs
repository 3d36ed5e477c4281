//! What is reserved, and choices that can be.

use std::collections::{BTreeMap, HashMap};

use kv_core::id::OwnerId;
use kv_core::tracker::BookingId;

/// How long a choice can be booked, milliseconds.
const KEPT_MS: u64 = 120_000;
/// Choices that can be booked.
const MAX_KEPT: usize = 4096;
/// Bytes of them.
const MAX_KEPT_BYTES: usize = 256 << 20;

/// A choice that can be booked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pending {
    /// Where it goes.
    pub owner: OwnerId,
    /// Sequence hashes of its blocks.
    pub hashes: Vec<u64>,
    /// Whether other requests can share them.
    pub is_shared: bool,
    /// Prompt tokens to be computed there, of those that count.
    pub prefill_tokens: u32,
}

/// A choice by pool and id.
type Key = (usize, String);

#[derive(Debug)]
struct Kept {
    pending: Pending,
    at_ms: u64,
    number: u64,
}

/// All of them. Time is milliseconds of any clock that doesn't go back.
#[derive(Debug)]
pub struct Reservations {
    /// Who books, among the sources of bookings.
    source: u64,
    /// Numbers given out.
    numbers: u64,
    live: HashMap<String, u64>,
    kept: HashMap<Key, Kept>,
    /// Oldest first.
    order: BTreeMap<(u64, u64), Key>,
    bytes: usize,
}

impl Reservations {
    /// Nothing reserved; bookings are made in the name of `source`.
    #[must_use]
    pub fn new(source: u64) -> Self {
        Self {
            source,
            numbers: 0,
            live: HashMap::new(),
            kept: HashMap::new(),
            order: BTreeMap::new(),
            bytes: 0,
        }
    }

    /// Whose bookings they are.
    #[must_use]
    pub fn source(&self) -> u64 {
        self.source
    }

    /// A number for a booking.
    pub fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    /// The booking under an id.
    #[must_use]
    pub fn booking(&self, id: &str) -> Option<BookingId> {
        let request = *self.live.get(id)?;
        Some(BookingId {
            source: self.source,
            request,
        })
    }

    /// A booking is there.
    pub fn booked(&mut self, id: String, request: u64) {
        self.live.insert(id, request);
    }

    /// It is over.
    pub fn over(&mut self, id: &str) {
        self.live.remove(id);
    }

    /// Reserved requests.
    #[must_use]
    pub fn live(&self) -> usize {
        self.live.len()
    }

    /// Forgets ids whose booking is gone, and returns how many.
    pub fn retain(&mut self, is_booked: impl Fn(&BookingId) -> bool) -> usize {
        let before = self.live.len();
        let source = self.source;
        self.live.retain(|_, request| {
            is_booked(&BookingId {
                source,
                request: *request,
            })
        });
        before - self.live.len()
    }

    /// Keeps a choice, in place of one with the same id.
    pub fn keep(&mut self, pool: usize, id: String, pending: Pending, now_ms: u64) {
        let key = (pool, id);
        self.drop_kept(&key);
        let number = self.number();
        self.bytes += size(&key, &pending);
        self.order.insert((now_ms, number), key.clone());
        let kept = Kept {
            pending,
            at_ms: now_ms,
            number,
        };
        self.kept.insert(key, kept);
        self.sweep(now_ms);
    }

    /// A choice that was kept.
    pub fn pending(&mut self, pool: usize, id: &str, now_ms: u64) -> Option<&Pending> {
        self.sweep(now_ms);
        let kept = self.kept.get(&(pool, id.to_owned()))?;
        Some(&kept.pending)
    }

    /// Forgets a choice.
    pub fn forget(&mut self, pool: usize, id: &str) {
        self.drop_kept(&(pool, id.to_owned()));
    }

    /// Forgets choices that are too old or too many.
    pub fn sweep(&mut self, now_ms: u64) {
        while let Some((&(at_ms, _), key)) = self.order.first_key_value() {
            let is_old = now_ms.saturating_sub(at_ms) >= KEPT_MS;
            let is_over = self.kept.len() > MAX_KEPT || self.bytes > MAX_KEPT_BYTES;
            if !is_old && !is_over {
                return;
            }
            let key = key.clone();
            self.drop_kept(&key);
        }
    }

    /// Choices that can be booked.
    #[must_use]
    pub fn kept(&self) -> usize {
        self.kept.len()
    }

    fn drop_kept(&mut self, key: &Key) {
        if let Some(kept) = self.kept.remove(key) {
            self.order.remove(&(kept.at_ms, kept.number));
            self.bytes -= size(key, &kept.pending);
        }
    }
}

/// Bytes of a choice, with its id twice.
fn size((_, id): &Key, pending: &Pending) -> usize {
    size_of::<Kept>() + 2 * (size_of::<Key>() + id.len()) + size_of_val(&*pending.hashes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pending(blocks: usize) -> Pending {
        Pending {
            owner: OwnerId { worker: 1, rank: 0 },
            hashes: vec![7; blocks],
            is_shared: true,
            prefill_tokens: 3,
        }
    }

    #[test]
    fn a_choice_is_kept_for_a_while_and_only_in_its_pool() {
        let mut reservations = Reservations::new(5);
        reservations.keep(0, "a".into(), pending(1), 0);
        reservations.keep(0, "a".into(), pending(2), 1_000);
        assert_eq!(reservations.pending(1, "a", 1_000), None);
        let kept = reservations.pending(0, "a", KEPT_MS + 999);
        assert_eq!(kept, Some(&pending(2)));
        assert_eq!(reservations.pending(0, "a", KEPT_MS + 1_000), None);
        assert_eq!((reservations.kept(), reservations.bytes), (0, 0));
        assert!(reservations.order.is_empty());
    }

    #[test]
    fn the_oldest_choices_go_when_they_are_too_many_or_too_large() {
        let mut reservations = Reservations::new(5);
        for number in 0..MAX_KEPT as u64 + 2 {
            reservations.keep(0, number.to_string(), pending(0), number);
        }
        assert_eq!(reservations.kept(), MAX_KEPT);
        assert_eq!(reservations.pending(0, "1", 5_000), None);
        assert!(reservations.pending(0, "2", 5_000).is_some());
        let half = MAX_KEPT_BYTES / 2 / size_of::<u64>();
        reservations.keep(0, "large".into(), pending(half), 5_000);
        reservations.keep(0, "larger".into(), pending(half), 5_001);
        assert!(reservations.bytes <= MAX_KEPT_BYTES);
        assert_eq!(reservations.kept(), 1);
        reservations.forget(0, "larger");
        assert_eq!((reservations.kept(), reservations.bytes), (0, 0));
    }

    #[test]
    fn ids_go_with_their_bookings() {
        let mut reservations = Reservations::new(5);
        for id in ["a", "b", "c"] {
            let request = reservations.number();
            reservations.booked(id.into(), request);
        }
        let booking = reservations.booking("b").unwrap();
        assert_eq!((booking.source, booking.request), (5, 2));
        reservations.over("a");
        assert_eq!(reservations.retain(|id| *id == booking), 1);
        assert_eq!(reservations.live(), 1);
        assert_eq!(reservations.booking("c"), None);
    }
}
