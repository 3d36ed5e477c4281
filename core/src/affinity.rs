//! Sessions that stay on one worker.
//!
//! A session is known by a keyed hash of its id. The sidecar has the bindings of all proxies
//! ([`Bindings`]) and publishes them in shards; what VMs bind before it knows of it stands in shards of
//! their process. A published binding counts before one of the process, so that all proxies agree.
//!
//! A shard is its entries, one after the other, little-endian: key 8 bytes | worker 8 | rank 4 |
//! stamp 4. The stamp is the time of the last use in seconds by Envoy's clock, 0 in published ones.

use std::collections::{BTreeSet, HashMap};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::id::OwnerId;

/// Number of shards.
pub const SHARDS: u16 = 1024;
/// Sessions that are bound at a time; Dynamo's limit.
pub const MAX_SESSIONS: usize = 65_536;
/// Sessions of one shard of a process, at most.
pub const MAX_IN_SHARD: usize = 64;
/// Longest session id, in bytes; Dynamo's limit.
pub const MAX_ID: usize = 256;

const ENTRY: usize = 24;

/// A request's session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    /// Keyed hash of its id.
    pub key: u64,
    /// Whether this is its last request.
    pub is_last: bool,
}

/// How a pool keeps sessions together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Affinity {
    /// Seconds after its last use for which a binding holds.
    pub ttl_s: u32,
    /// How many times the least cost that of the bound worker may be; `None` for any number.
    pub slack: Option<f64>,
    /// Headers with the session's id, before the usual ones.
    pub headers: Vec<String>,
}

/// Key of a session of the pool with this secret.
#[must_use]
pub fn key(id: &[u8], pool_key: u64) -> u64 {
    xxh3_64_with_seed(id, pool_key)
}

/// Shard of a key.
#[must_use]
#[allow(clippy::cast_possible_truncation)]
pub fn shard(key: u64) -> u16 {
    (key % u64::from(SHARDS)) as u16
}

fn entries(shard: &[u8]) -> impl Iterator<Item = (u64, OwnerId, u32)> {
    shard.as_chunks::<ENTRY>().0.iter().filter_map(|entry| {
        let (key, rest) = entry.split_first_chunk()?;
        let (worker, rest) = rest.split_first_chunk()?;
        let (rank, rest) = rest.split_first_chunk()?;
        let (stamp, _) = rest.split_first_chunk()?;
        let owner = OwnerId {
            worker: u64::from_le_bytes(*worker),
            rank: u32::from_le_bytes(*rank),
        };
        Some((u64::from_le_bytes(*key), owner, u32::from_le_bytes(*stamp)))
    })
}

fn put(shard: &mut Vec<u8>, key: u64, owner: OwnerId, stamp_s: u32) {
    shard.extend(key.to_le_bytes());
    shard.extend(owner.worker.to_le_bytes());
    shard.extend(owner.rank.to_le_bytes());
    shard.extend(stamp_s.to_le_bytes());
}

/// Owner and stamp of a session in a shard.
#[must_use]
pub fn find(shard: &[u8], key: u64) -> Option<(OwnerId, u32)> {
    let mut entries = entries(shard);
    entries.find_map(|(k, owner, stamp)| (k == key).then_some((owner, stamp)))
}

/// The shard of a process once a session is bound, or with `None` is no more. Entries that have not
/// been used for `ttl_s` go, and of too many the one whose last use is longest ago.
#[must_use]
pub fn rebound(shard: &[u8], key: u64, owner: Option<OwnerId>, now_s: u32, ttl_s: u32) -> Vec<u8> {
    let mut kept: Vec<_> = entries(shard)
        .filter(|(k, _, stamp)| *k != key && now_s.saturating_sub(*stamp) < ttl_s)
        .collect();
    if kept.len() >= MAX_IN_SHARD
        && let Some(oldest) = kept.iter().map(|(.., stamp)| *stamp).min()
        && let Some(at) = kept.iter().position(|(.., stamp)| *stamp == oldest)
    {
        kept.swap_remove(at);
    }
    let mut bytes = Vec::with_capacity((kept.len() + 1) * ENTRY);
    for (key, owner, stamp) in kept {
        put(&mut bytes, key, owner, stamp);
    }
    if let Some(owner) = owner {
        put(&mut bytes, key, owner, now_s);
    }
    bytes
}

/// What became of a session that was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// It is bound for the first time.
    Bound,
    /// It is where it was.
    Kept,
    /// It was bound to an owner that it has left.
    Moved,
    /// Another request has bound it to another owner.
    Lost,
    /// There are too many.
    Full,
}

impl Use {
    /// Label for metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Bound => "bound",
            Self::Kept => "kept",
            Self::Moved => "moved",
            Self::Lost => "lost",
            Self::Full => "full",
        }
    }
}

/// A binding as the state folder keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// Key of the session.
    pub key: u64,
    /// Its owner.
    pub owner: OwnerId,
    /// Milliseconds since its last use.
    pub idle_ms: u64,
    /// Milliseconds that it may stay unused.
    pub ttl_ms: u64,
}

#[derive(Clone, Copy, Debug)]
struct Binding {
    owner: OwnerId,
    used_ms: u64,
    ttl_ms: u64,
    /// Requests of it under way; while there are any it does not expire.
    running: u32,
}

/// The bindings of all proxies.
#[derive(Debug, Default)]
pub struct Bindings {
    bound: HashMap<u64, Binding>,
    /// Shards that differ from what was published.
    changed: BTreeSet<u16>,
}

impl Bindings {
    /// A request of a session was booked on an owner. `stays` says whether the session may still be
    /// on an owner.
    pub fn book(
        &mut self,
        session: Session,
        owner: OwnerId,
        ttl_ms: u64,
        now_ms: u64,
        stays: impl Fn(OwnerId) -> bool,
    ) -> Use {
        let Some(binding) = self.bound.get_mut(&session.key) else {
            if self.bound.len() >= MAX_SESSIONS {
                return Use::Full;
            }
            let binding = Binding {
                owner,
                used_ms: now_ms,
                ttl_ms,
                running: 1,
            };
            self.bound.insert(session.key, binding);
            self.changed.insert(shard(session.key));
            return Use::Bound;
        };
        binding.running += 1;
        binding.used_ms = now_ms;
        binding.ttl_ms = ttl_ms;
        if binding.owner == owner {
            return Use::Kept;
        }
        if stays(binding.owner) {
            return Use::Lost;
        }
        binding.owner = owner;
        self.changed.insert(shard(session.key));
        Use::Moved
    }

    /// Another owner than the booked one serves a request of a session.
    pub fn relocate(&mut self, session: Session, from: OwnerId, to: OwnerId) {
        if let Some(binding) = self.bound.get_mut(&session.key)
            && binding.owner == from
        {
            binding.owner = to;
            self.changed.insert(shard(session.key));
        }
    }

    /// A request of a session is over.
    pub fn over(&mut self, session: Session, now_ms: u64) {
        let Some(binding) = self.bound.get_mut(&session.key) else {
            return;
        };
        binding.running = binding.running.saturating_sub(1);
        binding.used_ms = now_ms;
        if session.is_last && binding.running == 0 {
            self.release(session.key);
        }
    }

    fn release(&mut self, key: u64) {
        if self.bound.remove(&key).is_some() {
            self.changed.insert(shard(key));
        }
    }

    /// Releases what has not been used for its time, or may not stay. Returns how many that were.
    pub fn sweep(&mut self, now_ms: u64, stays: impl Fn(OwnerId) -> bool) -> usize {
        let is_over = |binding: &Binding| {
            let idle_ms = now_ms.saturating_sub(binding.used_ms);
            let is_idle = binding.running == 0 && idle_ms >= binding.ttl_ms;
            is_idle || !stays(binding.owner)
        };
        let over = self.bound.iter().filter(|(_, binding)| is_over(binding));
        let over: Vec<u64> = over.map(|(key, _)| *key).collect();
        for key in &over {
            self.release(*key);
        }
        over.len()
    }

    /// No request is under way that was before, as far as is known.
    pub fn settle(&mut self, running: impl IntoIterator<Item = u64>) {
        for binding in self.bound.values_mut() {
            binding.running = 0;
        }
        for key in running {
            if let Some(binding) = self.bound.get_mut(&key) {
                binding.running += 1;
            }
        }
    }

    /// Sessions that are bound.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bound.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bound.is_empty()
    }

    /// The shards that have changed since they were last taken, as they are published.
    pub fn take_changed(&mut self) -> Vec<(u16, Vec<u8>)> {
        let changed = std::mem::take(&mut self.changed);
        self.encode(&changed)
    }

    /// All shards, as they are published.
    #[must_use]
    pub fn shards(&self) -> Vec<(u16, Vec<u8>)> {
        self.encode(&(0..SHARDS).collect())
    }

    fn encode(&self, wanted: &BTreeSet<u16>) -> Vec<(u16, Vec<u8>)> {
        let mut shards: HashMap<u16, Vec<u8>> =
            wanted.iter().map(|shard| (*shard, Vec::new())).collect();
        for (key, binding) in &self.bound {
            if let Some(bytes) = shards.get_mut(&shard(*key)) {
                put(bytes, *key, binding.owner, 0);
            }
        }
        shards.into_iter().collect()
    }

    /// All bindings for the state folder.
    #[must_use]
    pub fn save(&self, now_ms: u64) -> Vec<Saved> {
        let saved = self.bound.iter().map(|(key, binding)| Saved {
            key: *key,
            owner: binding.owner,
            idle_ms: now_ms.saturating_sub(binding.used_ms),
            ttl_ms: binding.ttl_ms,
        });
        saved.collect()
    }

    /// Takes saved bindings over. They may stay unused for their time from now on.
    pub fn restore(&mut self, saved: &[Saved], now_ms: u64) {
        for binding in saved.iter().take(MAX_SESSIONS) {
            let taken = Binding {
                owner: binding.owner,
                used_ms: now_ms,
                ttl_ms: binding.ttl_ms,
                running: 0,
            };
            self.bound.insert(binding.key, taken);
            self.changed.insert(shard(binding.key));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: OwnerId = OwnerId { worker: 1, rank: 0 };
    const B: OwnerId = OwnerId { worker: 2, rank: 3 };

    fn session(key: u64) -> Session {
        Session {
            key,
            is_last: false,
        }
    }

    #[test]
    fn a_shard_of_a_process_forgets_what_is_old_and_has_a_bound() {
        let bytes = rebound(&[], 7, Some(A), 100, 60);
        assert_eq!(find(&bytes, 7), Some((A, 100)));
        let bytes = rebound(&bytes, 8, Some(B), 150, 60);
        assert_eq!(
            (find(&bytes, 7), find(&bytes, 8)),
            (Some((A, 100)), Some((B, 150)))
        );
        let bytes = rebound(&bytes, 7, Some(B), 155, 60);
        assert_eq!(find(&bytes, 7), Some((B, 155)));
        let bytes = rebound(&bytes, 9, None, 212, 60);
        assert_eq!((find(&bytes, 7), find(&bytes, 8)), (Some((B, 155)), None));
        let mut full = Vec::new();
        for key in 0..100_u32 {
            full = rebound(&full, key.into(), Some(A), key, 1000);
        }
        assert_eq!(full.len(), MAX_IN_SHARD * ENTRY);
        assert_eq!((find(&full, 35), find(&full, 36)), (None, Some((A, 36))));
        assert_eq!(find(&full[..ENTRY - 1], 36), None);
    }

    #[test]
    fn the_first_binding_holds_while_its_owner_does() {
        let mut all = Bindings::default();
        let book =
            |all: &mut Bindings, owner, stays| all.book(session(7), owner, 1_000, 0, |_| stays);
        assert_eq!(book(&mut all, A, true), Use::Bound);
        assert_eq!(book(&mut all, A, true), Use::Kept);
        assert_eq!(book(&mut all, B, true), Use::Lost);
        let shards = all.take_changed();
        assert_eq!(shards.len(), 1);
        assert_eq!(find(&shards[0].1, 7), Some((A, 0)));
        assert_eq!(all.take_changed(), []);
        assert_eq!(book(&mut all, B, false), Use::Moved);
        assert_eq!(find(&all.take_changed()[0].1, 7), Some((B, 0)));
        all.relocate(session(7), A, A);
        assert_eq!(all.take_changed(), []);
        all.relocate(session(7), B, A);
        assert_eq!(find(&all.take_changed()[0].1, 7), Some((A, 0)));
        assert_eq!(all.shards().len(), usize::from(SHARDS));
    }

    #[test]
    fn bindings_end_by_time_by_their_owner_and_by_their_last_request() {
        let mut all = Bindings::default();
        for (key, owner) in [(1, A), (2, A), (3, B)] {
            all.book(session(key), owner, 1_000, 0, |_| true);
        }
        all.over(session(1), 500);
        assert_eq!(all.sweep(1_400, |_| true), 0);
        // The second still has a request.
        assert_eq!(all.sweep(1_500, |_| true), 1);
        assert_eq!(all.sweep(1_500, |owner| owner == A), 1);
        assert_eq!(all.len(), 1);
        let last = Session {
            is_last: true,
            ..session(2)
        };
        all.over(last, 1_500);
        assert!(all.is_empty());
        let changed = all.take_changed();
        assert_eq!(
            changed.iter().map(|(_, bytes)| bytes.len()).sum::<usize>(),
            0
        );
        assert_eq!(changed.len(), 3);
    }

    #[test]
    fn saved_bindings_are_taken_over_and_their_number_is_bounded() {
        let mut all = Bindings::default();
        all.book(session(1), A, 1_000, 100, |_| true);
        let saved = all.save(300);
        assert_eq!(saved[0].idle_ms, 200);
        let mut next = Bindings::default();
        next.restore(&saved, 50);
        assert_eq!(find(&next.take_changed()[0].1, 1), Some((A, 0)));
        assert_eq!(next.sweep(1_049, |_| true), 0);
        assert_eq!(next.sweep(1_050, |_| true), 1);
        for key in 0..MAX_SESSIONS as u64 {
            all.book(session(key + 2), A, 1, 0, |_| true);
        }
        assert_eq!(all.len(), MAX_SESSIONS);
        assert_eq!(all.book(session(0), A, 1, 0, |_| true), Use::Full);
    }
}
