//! The true load: every booking of every proxy, and what they add up to per owner.
//!
//! Blocks are counted once per owner however many requests share them; requests and prefill
//! tokens are sums. Of a request that told how long its answer would be, the blocks that are its
//! alone count by the share of the answer that is still to come. Everything is synchronous; ids and
//! time are arguments.

use hashbrown::{HashMap, HashSet};
use serde::{Deserialize, Serialize};

use crate::load::Load;
use crate::report::OwnerKey;

/// Who made a booking, and its number there: a filter VM, another router, the select service.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BookingId {
    /// The source.
    pub source: u64,
    /// The request.
    pub request: u64,
}

/// A booking as the tracker keeps it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Booking {
    /// Prompt tokens to compute; none once the first token has come.
    pub prefill_tokens: u32,
    /// Whether the first token has come.
    pub decoding: bool,
    /// Blocks of the prompt before those of `hashes`.
    pub start: u32,
    /// Sequence hashes of its blocks, in the order of the prompt.
    pub hashes: Vec<u64>,
    /// Positions in `hashes` of blocks after which other prompts go on differently.
    pub branches: Vec<u32>,
    /// Blocks whose hashes are not known: nobody shares them.
    pub private_blocks: u32,
}

/// The load of an owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ActiveLoad {
    /// Prompt tokens still to be prefilled.
    pub prefill_tokens: u64,
    /// Requests without a first token.
    pub waiting: u32,
    /// Requests past their first token.
    pub decoding: u32,
    /// Distinct blocks in use.
    pub blocks: u64,
}

/// A prefix of a live prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Prefix {
    /// Who booked the prompt.
    pub source: u64,
    /// Position of the pool in the table.
    pub pool: u16,
    /// Sequence hash of its last block.
    pub hash: u64,
    /// Its blocks.
    pub depth: u32,
    /// Whether it is named for being the whole prompt.
    pub is_whole: bool,
}

impl From<ActiveLoad> for Load {
    /// The load as lanes hold it; fields end at their greatest value.
    fn from(load: ActiveLoad) -> Self {
        let wide = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        let narrow = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        Self {
            prefill_tokens: wide(load.prefill_tokens),
            waiting: narrow(load.waiting),
            decoding: narrow(load.decoding),
            blocks: wide(load.blocks),
        }
    }
}

#[derive(Debug, Default)]
struct Owner {
    load: ActiveLoad,
    /// Requests by block in use.
    blocks: Blocks,
}

/// Requests by block that they use.
type Blocks = HashMap<u64, u32>;

#[derive(Debug)]
struct Entry {
    owner: OwnerKey,
    booking: Booking,
    /// Share of its answer that is still to come.
    left: f32,
    touched_ms: u64,
}

/// Which parts of the load count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tracking {
    /// Prefill tokens (`--router-track-prefill-tokens`).
    pub prefill_tokens: bool,
    /// Blocks (`--router-track-active-blocks`).
    pub active_blocks: bool,
    /// Whether requests share blocks (`--router-assume-kv-reuse`).
    pub kv_reuse: bool,
    /// Blocks that answers fill (`--router-track-output-blocks`).
    pub output_blocks: bool,
}

impl Default for Tracking {
    fn default() -> Self {
        Self {
            prefill_tokens: true,
            active_blocks: true,
            kv_reuse: true,
            output_blocks: false,
        }
    }
}

/// A booking that was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TrackError {
    /// The id is in use.
    #[error("request {0} is booked already")]
    Duplicate(u64),
    /// Too many bookings.
    #[error("{0} requests are booked already")]
    Full(usize),
}

impl TrackError {
    /// Label for metrics.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Duplicate(_) => "duplicate",
            Self::Full(_) => "full",
        }
    }
}

/// A change of a [`Tracker`], to be made in another one.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// See [`Tracker::book`].
    Book(BookingId, OwnerKey, Box<Booking>),
    /// See [`Tracker::relocate`].
    Relocate(BookingId, OwnerKey),
    /// See [`Tracker::first_token`].
    FirstToken(BookingId),
    /// See [`Tracker::grow`].
    Grow(BookingId, u32, f32),
    /// See [`Tracker::free`].
    Free(BookingId),
}

/// All bookings.
#[derive(Debug)]
pub struct Tracker {
    entries: HashMap<BookingId, Entry>,
    owners: HashMap<OwnerKey, Owner>,
    /// Bookings whose own blocks do not count in full, by owner.
    fading: HashMap<OwnerKey, HashSet<BookingId>>,
    /// Blocks in use on the owners of each pool.
    pools: HashMap<u16, Blocks>,
    tracking: Tracking,
    capacity: usize,
    /// What has changed, if that is asked for.
    journal: Option<Vec<Change>>,
}

impl Tracker {
    /// A tracker of at most `capacity` bookings.
    #[must_use]
    pub fn new(tracking: Tracking, capacity: usize) -> Self {
        Self {
            entries: HashMap::new(),
            owners: HashMap::new(),
            fading: HashMap::new(),
            pools: HashMap::new(),
            tracking,
            capacity,
            journal: None,
        }
    }

    /// Tracks what is booked from here on in another way.
    pub fn track(&mut self, tracking: Tracking) {
        self.tracking = tracking;
    }

    /// Keeps a journal of changes from here on.
    #[must_use]
    pub fn with_journal(mut self) -> Self {
        self.journal = Some(Vec::new());
        self
    }

    /// Takes what the journal has since it was last taken.
    pub fn take_journal(&mut self) -> Vec<Change> {
        self.journal
            .as_mut()
            .map(std::mem::take)
            .unwrap_or_default()
    }

    /// Makes a change of another tracker here. Whether it could be made.
    pub fn apply(&mut self, change: Change, now_ms: u64) -> bool {
        match change {
            Change::Book(id, owner, booking) => self.book(id, owner, *booking, now_ms).is_ok(),
            Change::Relocate(id, to) => self.relocate(&id, to, now_ms),
            Change::FirstToken(id) => self.first_token(&id, now_ms),
            Change::Grow(id, blocks, left) => self.fill(&id, blocks, Some(left), now_ms),
            Change::Free(id) => self.free(&id),
        }
    }

    fn note(&mut self, change: impl FnOnce() -> Change) {
        if let Some(journal) = &mut self.journal {
            journal.push(change());
        }
    }

    /// Books a request.
    ///
    /// # Errors
    /// When its id is in use, or too many are booked.
    pub fn book(
        &mut self,
        id: BookingId,
        owner: OwnerKey,
        mut booking: Booking,
        now_ms: u64,
    ) -> Result<(), TrackError> {
        if self.entries.contains_key(&id) {
            return Err(TrackError::Duplicate(id.request));
        }
        if self.entries.len() >= self.capacity {
            return Err(TrackError::Full(self.capacity));
        }
        if !self.tracking.prefill_tokens || booking.decoding {
            booking.prefill_tokens = 0;
        }
        if !self.tracking.active_blocks {
            booking.hashes = Vec::new();
            booking.private_blocks = 0;
        }
        if !self.tracking.kv_reuse {
            let blocks = u32::try_from(booking.hashes.len()).unwrap_or(u32::MAX);
            booking.private_blocks = booking.private_blocks.saturating_add(blocks);
            booking.hashes = Vec::new();
        }
        self.note(|| Change::Book(id.clone(), owner, Box::new(booking.clone())));
        self.owners.entry(owner).or_default().add(&booking);
        use_blocks(self.pools.entry(owner.pool).or_default(), &booking.hashes);
        let entry = Entry {
            owner,
            booking,
            left: 1.0,
            touched_ms: now_ms,
        };
        self.entries.insert(id, entry);
        Ok(())
    }

    /// The request goes to another owner. Whether it is booked.
    pub fn relocate(&mut self, id: &BookingId, to: OwnerKey, now_ms: u64) -> bool {
        let pools = &mut self.pools;
        let Some(entry) = self.entries.get_mut(id) else {
            return false;
        };
        release(&mut self.owners, pools, entry);
        fade(&mut self.fading, entry.owner, id, 1.0);
        fade(&mut self.fading, to, id, entry.left);
        entry.owner = to;
        entry.touched_ms = now_ms;
        self.owners.entry(to).or_default().add(&entry.booking);
        use_blocks(pools.entry(to.pool).or_default(), &entry.booking.hashes);
        self.note(|| Change::Relocate(id.clone(), to));
        true
    }

    /// The first token has come: prefill is done. Whether it is booked.
    pub fn first_token(&mut self, id: &BookingId, now_ms: u64) -> bool {
        let is_booked = self.change(id, now_ms, |entry, owners| {
            let owner = owners.entry(entry.owner).or_default();
            let booking = &mut entry.booking;
            owner.load.prefill_tokens -= u64::from(booking.prefill_tokens);
            *owner.requests(booking) -= 1;
            booking.prefill_tokens = 0;
            booking.decoding = true;
            *owner.requests(booking) += 1;
        });
        if is_booked {
            self.note(|| Change::FirstToken(id.clone()));
        }
        is_booked
    }

    /// The answer has filled blocks, and this share of it is still to come. Whether it is booked.
    /// Without output tracking nothing changes.
    pub fn grow(&mut self, id: &BookingId, blocks: u32, left: f32, now_ms: u64) -> bool {
        if !self.tracking.output_blocks {
            return self.touch(id, now_ms);
        }
        self.fill(id, blocks, Some(left), now_ms)
    }

    /// The answer has filled blocks, as who booked it counts itself, and this share of it is still
    /// to come, if that is known. Whether it is booked.
    pub fn fill(&mut self, id: &BookingId, blocks: u32, left: Option<f32>, now_ms: u64) -> bool {
        if !self.tracking.active_blocks {
            return self.touch(id, now_ms);
        }
        let fading = &mut self.fading;
        let Some(entry) = self.entries.get_mut(id) else {
            return false;
        };
        entry.touched_ms = now_ms;
        if let Some(left) = left {
            entry.left = if left.is_finite() {
                left.clamp(0.0, 1.0)
            } else {
                1.0
            };
        }
        let left = entry.left;
        fade(fading, entry.owner, id, left);
        let private = &mut entry.booking.private_blocks;
        let before = *private;
        *private = private.saturating_add(blocks);
        let owner = self.owners.entry(entry.owner).or_default();
        owner.load.blocks += u64::from(*private - before);
        self.note(|| Change::Grow(id.clone(), blocks, left));
        true
    }

    fn change(
        &mut self,
        id: &BookingId,
        now_ms: u64,
        step: impl FnOnce(&mut Entry, &mut HashMap<OwnerKey, Owner>),
    ) -> bool {
        let Some(entry) = self.entries.get_mut(id) else {
            return false;
        };
        entry.touched_ms = now_ms;
        step(entry, &mut self.owners);
        true
    }

    /// The request is still there. Whether it is booked.
    pub fn touch(&mut self, id: &BookingId, now_ms: u64) -> bool {
        self.change(id, now_ms, |_, _| ())
    }

    /// The request is over. Whether it was booked.
    pub fn free(&mut self, id: &BookingId) -> bool {
        let Some(entry) = self.entries.remove(id) else {
            return false;
        };
        release(&mut self.owners, &mut self.pools, &entry);
        fade(&mut self.fading, entry.owner, id, 1.0);
        self.note(|| Change::Free(id.clone()));
        true
    }

    /// Frees every booking of a source for which `keep` is false, and returns how many.
    pub fn retain(&mut self, source: u64, mut keep: impl FnMut(u64) -> bool) -> usize {
        self.keep(|id, _| id.source != source || keep(id.request))
    }

    /// Frees bookings without any step since `before_ms`, and returns how many.
    pub fn expire(&mut self, before_ms: u64) -> usize {
        self.keep(|_, entry| entry.touched_ms >= before_ms)
    }

    fn keep(&mut self, mut stays: impl FnMut(&BookingId, &Entry) -> bool) -> usize {
        let (owners, pools, fading) = (&mut self.owners, &mut self.pools, &mut self.fading);
        let journal = &mut self.journal;
        let before = self.entries.len();
        self.entries.retain(|id, entry| {
            let stays = stays(id, entry);
            if !stays {
                release(owners, pools, entry);
                fade(fading, entry.owner, id, 1.0);
                if let Some(journal) = journal {
                    journal.push(Change::Free(id.clone()));
                }
            }
            stays
        });
        before - self.entries.len()
    }

    /// The load of an owner.
    #[must_use]
    pub fn load(&self, owner: &OwnerKey) -> ActiveLoad {
        self.owners
            .get(owner)
            .map_or_else(ActiveLoad::default, |o| self.faded(owner, o))
    }

    /// Owners with load.
    pub fn loads(&self) -> impl Iterator<Item = (OwnerKey, ActiveLoad)> + '_ {
        let owners = self.owners.iter();
        owners.map(|(key, owner)| (*key, self.faded(key, owner)))
    }

    /// The load of an owner, less what bookings hold alone and will not need for long.
    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss
    )]
    fn faded(&self, key: &OwnerKey, owner: &Owner) -> ActiveLoad {
        let Some(fading) = self.fading.get(key) else {
            return owner.load;
        };
        let entries = fading.iter().filter_map(|id| self.entries.get(id));
        let less: f64 = entries
            .map(|entry| {
                let hashes = &entry.booking.hashes;
                // A block is used by no fewer requests than the one after it.
                let is_shared = |hash: &u64| owner.blocks.get(hash).is_some_and(|n| *n >= 2);
                let alone = hashes.len() - hashes.partition_point(is_shared);
                let alone = alone as f64 + f64::from(entry.booking.private_blocks);
                alone * f64::from(1.0 - entry.left)
            })
            .sum();
        let blocks = (owner.load.blocks as f64 - less).round() as u64;
        ActiveLoad {
            blocks,
            ..owner.load
        }
    }

    /// How many leading blocks of a prompt are in use on an owner.
    #[must_use]
    pub fn shared_blocks(&self, owner: &OwnerKey, prompt: &[u64]) -> usize {
        let Some(owner) = self.owners.get(owner) else {
            return 0;
        };
        let in_use = prompt
            .iter()
            .take_while(|hash| owner.blocks.contains_key(*hash));
        in_use.count()
    }

    /// Requests that use each block of an owner.
    pub fn blocks_in_use(&self, owner: &OwnerKey) -> impl Iterator<Item = (u64, u32)> + '_ {
        let blocks = self.owners.get(owner).map(|o| &o.blocks);
        let uses = blocks.into_iter().flatten();
        uses.map(|(hash, uses)| (*hash, *uses))
    }

    /// Requests on an owner that use a block.
    #[must_use]
    pub fn uses(&self, owner: &OwnerKey, hash: u64) -> u32 {
        let uses = self.owners.get(owner).and_then(|o| o.blocks.get(&hash));
        uses.copied().unwrap_or(0)
    }

    /// Prefixes of live prompts that another prompt may have in common with them: of each booking
    /// the longest one that another booking in its pool uses too, those that end where other
    /// prompts went on differently, and all of it, which the next turn would start with.
    pub fn prefixes(&self) -> impl Iterator<Item = Prefix> + '_ {
        self.entries.iter().flat_map(|(id, entry)| {
            let source = id.source;
            let Booking {
                start,
                hashes,
                branches,
                ..
            } = &entry.booking;
            let pool = entry.owner.pool;
            let uses = self.pools.get(&pool);
            let is_shared = |hash: &u64| uses.and_then(|u| u.get(hash)).is_some_and(|n| *n >= 2);
            // A block is used by no fewer requests than the one after it.
            let shared = hashes.partition_point(is_shared).checked_sub(1);
            let branches = branches.iter().map(|at| *at as usize);
            let parts = shared.into_iter().chain(branches).map(|at| (at, false));
            let whole = hashes.len().checked_sub(1).map(|at| (at, true));
            parts.chain(whole).filter_map(move |(at, is_whole)| {
                Some(Prefix {
                    source,
                    pool,
                    hash: *hashes.get(at)?,
                    depth: start.checked_add(u32::try_from(at).ok()?)?.checked_add(1)?,
                    is_whole,
                })
            })
        })
    }

    /// A booking and its owner.
    #[must_use]
    pub fn get(&self, id: &BookingId) -> Option<(OwnerKey, &Booking)> {
        let entry = self.entries.get(id)?;
        Some((entry.owner, &entry.booking))
    }

    /// All bookings and their owners.
    pub fn bookings(&self) -> impl Iterator<Item = (&BookingId, OwnerKey, &Booking)> + '_ {
        let entries = self.entries.iter();
        entries.map(|(id, entry)| (id, entry.owner, &entry.booking))
    }

    /// Bookings.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing is booked.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

/// Takes a booking off its owner; an owner without load is forgotten.
fn release(owners: &mut HashMap<OwnerKey, Owner>, pools: &mut HashMap<u16, Blocks>, entry: &Entry) {
    if let Some(blocks) = pools.get_mut(&entry.owner.pool) {
        leave_blocks(blocks, &entry.booking.hashes);
    }
    if let Some(owner) = owners.get_mut(&entry.owner) {
        owner.subtract(&entry.booking);
        if owner.load == ActiveLoad::default() {
            owners.remove(&entry.owner);
        }
    }
}

/// Keeps who is fading on an owner; with all to come still, nobody is.
fn fade(
    fading: &mut HashMap<OwnerKey, HashSet<BookingId>>,
    owner: OwnerKey,
    id: &BookingId,
    left: f32,
) {
    if left < 1.0 {
        fading.entry(owner).or_default().insert(id.clone());
    } else if let Some(ids) = fading.get_mut(&owner) {
        ids.remove(id);
        if ids.is_empty() {
            fading.remove(&owner);
        }
    }
}

/// Counts a request's blocks. Returns how many were not in use.
fn use_blocks(blocks: &mut Blocks, hashes: &[u64]) -> u64 {
    let mut fresh = 0;
    for hash in hashes {
        let uses = blocks.entry(*hash).or_default();
        fresh += u64::from(*uses == 0);
        *uses += 1;
    }
    fresh
}

/// The inverse of [`use_blocks`]. Returns how many are in use no more.
fn leave_blocks(blocks: &mut Blocks, hashes: &[u64]) -> u64 {
    let mut gone = 0;
    for hash in hashes {
        if let Some(uses) = blocks.get_mut(hash) {
            *uses -= 1;
            if *uses == 0 {
                blocks.remove(hash);
                gone += 1;
            }
        }
    }
    gone
}

impl Owner {
    fn add(&mut self, booking: &Booking) {
        self.load.prefill_tokens += u64::from(booking.prefill_tokens);
        self.load.blocks += u64::from(booking.private_blocks);
        *self.requests(booking) += 1;
        self.load.blocks += use_blocks(&mut self.blocks, &booking.hashes);
    }

    /// The inverse of [`Owner::add`].
    fn subtract(&mut self, booking: &Booking) {
        self.load.prefill_tokens -= u64::from(booking.prefill_tokens);
        self.load.blocks -= u64::from(booking.private_blocks);
        *self.requests(booking) -= 1;
        self.load.blocks -= leave_blocks(&mut self.blocks, &booking.hashes);
    }

    fn requests(&mut self, booking: &Booking) -> &mut u32 {
        if booking.decoding {
            &mut self.load.decoding
        } else {
            &mut self.load.waiting
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::id::OwnerId;
    use crate::rng::Rng;

    fn owner(worker: u64) -> OwnerKey {
        OwnerKey {
            pool: 0,
            id: OwnerId { worker, rank: 0 },
        }
    }

    fn id(request: u64) -> BookingId {
        BookingId {
            source: request % 3,
            request,
        }
    }

    fn booking(prefill_tokens: u32, hashes: &[u64]) -> Booking {
        Booking {
            prefill_tokens,
            hashes: hashes.to_vec(),
            ..Booking::default()
        }
    }

    #[test]
    fn shared_blocks_count_once() {
        let mut tracker = Tracker::new(Tracking::default(), 10);
        tracker
            .book(id(1), owner(7), booking(64, &[1, 2, 3]), 0)
            .unwrap();
        tracker
            .book(id(2), owner(7), booking(32, &[1, 2, 9]), 0)
            .unwrap();
        let load = ActiveLoad {
            prefill_tokens: 96,
            waiting: 2,
            decoding: 0,
            blocks: 4,
        };
        assert_eq!(tracker.load(&owner(7)), load);
        assert_eq!(tracker.shared_blocks(&owner(7), &[1, 2, 3, 4]), 3);
        assert!(tracker.first_token(&id(1), 5));
        assert!(tracker.free(&id(2)));
        let load = ActiveLoad {
            prefill_tokens: 0,
            waiting: 0,
            decoding: 1,
            blocks: 3,
        };
        assert_eq!(tracker.load(&owner(7)), load);
        assert!(!tracker.free(&id(2)));
    }

    #[test]
    fn prefixes_that_prompts_may_share_are_told_with_their_length() {
        let mut tracker = Tracker::new(Tracking::default(), 10);
        for (request, worker, last) in [(1, 7, 3), (2, 7, 9), (3, 8, 3)] {
            let booking = Booking {
                start: 10,
                branches: if request == 2 { vec![0] } else { Vec::new() },
                ..booking(0, &[1, 2, last])
            };
            tracker
                .book(id(request), owner(worker), booking, 0)
                .unwrap();
        }
        let prefixes = |tracker: &Tracker| {
            let named = tracker.prefixes().filter(|p| !p.is_whole);
            let mut prefixes: Vec<_> = named.map(|p| (p.pool, p.hash, p.depth)).collect();
            prefixes.sort_unstable();
            let whole = tracker.prefixes().filter(|p| p.is_whole);
            let whole: Vec<u32> = whole.map(|p| p.depth).collect();
            assert_eq!(whole, vec![13; tracker.len()]);
            prefixes
        };
        // Requests 1 and 3 share all on two owners, 2 has two blocks in common with them.
        let all = [(0, 1, 11), (0, 2, 12), (0, 3, 13), (0, 3, 13)];
        assert_eq!(prefixes(&tracker), all);
        assert_eq!(tracker.uses(&owner(7), 1), 2);
        assert_eq!(tracker.uses(&owner(8), 3), 1);
        assert_eq!(tracker.uses(&owner(8), 9), 0);
        assert_eq!(tracker.get(&id(3)).unwrap().0, owner(8));
        assert_eq!(tracker.bookings().count(), 3);
        tracker.relocate(&id(1), owner(8), 0);
        assert_eq!(prefixes(&tracker), all);
        tracker.free(&id(1));
        assert_eq!(prefixes(&tracker), [(0, 1, 11), (0, 2, 12), (0, 2, 12)]);
        tracker.free(&id(3));
        assert_eq!(prefixes(&tracker), [(0, 1, 11)]);
        tracker.retain(id(2).source, |_| false);
        assert!(tracker.pools.values().all(HashMap::is_empty));
    }

    #[test]
    fn ids_are_unique_and_bookings_bounded() {
        let mut tracker = Tracker::new(Tracking::default(), 1);
        tracker.book(id(1), owner(7), booking(1, &[]), 0).unwrap();
        let twice = tracker.book(id(1), owner(7), booking(1, &[]), 0);
        assert_eq!(twice, Err(TrackError::Duplicate(1)));
        let over = tracker.book(id(2), owner(7), booking(1, &[]), 0);
        assert_eq!(over, Err(TrackError::Full(1)));
    }

    #[test]
    fn what_is_not_tracked_does_not_count() {
        let all_off = Tracking {
            prefill_tokens: false,
            active_blocks: false,
            ..Tracking::default()
        };
        let mut tracker = Tracker::new(all_off, 9);
        tracker.book(id(1), owner(7), booking(64, &[1]), 0).unwrap();
        let load = ActiveLoad {
            waiting: 1,
            ..ActiveLoad::default()
        };
        assert_eq!(tracker.load(&owner(7)), load);
        let mut tracker = Tracker::new(
            Tracking {
                kv_reuse: false,
                ..Tracking::default()
            },
            9,
        );
        tracker
            .book(id(1), owner(7), booking(0, &[1, 2]), 0)
            .unwrap();
        tracker
            .book(id(2), owner(7), booking(0, &[1, 2]), 0)
            .unwrap();
        assert_eq!(tracker.load(&owner(7)).blocks, 4);
    }

    /// Bookings kept the obvious way: load is what they add up to.
    fn naive(bookings: &BTreeMap<u64, (u64, Booking, f32)>) -> BTreeMap<u64, ActiveLoad> {
        /// Load without blocks, private blocks, and who uses each of the others.
        type Kept = (ActiveLoad, f64, BTreeMap<u64, Vec<f32>>);
        let mut loads: BTreeMap<u64, Kept> = BTreeMap::new();
        for (worker, booking, left) in bookings.values() {
            let (load, own, blocks) = loads.entry(*worker).or_default();
            load.prefill_tokens += u64::from(booking.prefill_tokens);
            load.waiting += u32::from(!booking.decoding);
            load.decoding += u32::from(booking.decoding);
            *own += f64::from(booking.private_blocks) * f64::from(*left);
            for hash in &booking.hashes {
                blocks.entry(*hash).or_default().push(*left);
            }
        }
        let total = |(worker, (load, own, blocks)): (u64, Kept)| {
            let weight = |lefts: &Vec<f32>| match lefts.as_slice() {
                [alone] => f64::from(*alone),
                _ => 1.0,
            };
            let blocks = (own + blocks.values().map(weight).sum::<f64>()).round() as u64;
            (worker, ActiveLoad { blocks, ..load })
        };
        loads.into_iter().map(total).collect()
    }

    #[test]
    fn load_is_what_the_bookings_add_up_to_over_random_histories() {
        for seed in 0..50 {
            let mut rng = Rng::new(seed);
            let tracking = Tracking {
                output_blocks: true,
                ..Tracking::default()
            };
            let mut tracker = Tracker::new(tracking, 1000);
            let mut bookings: BTreeMap<u64, (u64, Booking, f32)> = BTreeMap::new();
            for step in 0..500 {
                let request = rng.below(40) as u64;
                let worker = rng.below(4) as u64;
                match rng.below(7) {
                    0..3 => {
                        let hashes: Vec<u64> = (0..rng.below(6) as u64).collect();
                        let booking = booking(rng.below(100) as u32, &hashes);
                        let booked =
                            tracker.book(id(request), owner(worker), booking.clone(), step);
                        assert_eq!(booked.is_ok(), !bookings.contains_key(&request));
                        bookings.entry(request).or_insert((worker, booking, 1.0));
                    }
                    3 => {
                        tracker.first_token(&id(request), step);
                        if let Some((_, booking, _)) = bookings.get_mut(&request) {
                            booking.prefill_tokens = 0;
                            booking.decoding = true;
                        }
                    }
                    4 => {
                        tracker.relocate(&id(request), owner(worker), step);
                        if let Some((at, ..)) = bookings.get_mut(&request) {
                            *at = worker;
                        }
                    }
                    5 => {
                        let left = [1.0, 0.75, 0.5, 0.0][rng.below(4)];
                        tracker.grow(&id(request), 2, left, step);
                        if let Some((_, booking, of)) = bookings.get_mut(&request) {
                            booking.private_blocks += 2;
                            *of = left;
                        }
                    }
                    _ => {
                        tracker.free(&id(request));
                        bookings.remove(&request);
                    }
                }
                let seen = tracker.loads().map(|(key, load)| (key.id.worker, load));
                assert_eq!(seen.collect::<BTreeMap<_, _>>(), naive(&bookings));
            }
            let expired = tracker.expire(u64::MAX);
            assert_eq!(expired, bookings.len());
            assert_eq!(tracker.loads().count(), 0);
            assert!(tracker.fading.is_empty());
        }
    }

    #[test]
    fn half_an_answer_halves_what_is_its_alone() {
        let tracking = Tracking {
            output_blocks: true,
            ..Tracking::default()
        };
        let mut tracker = Tracker::new(tracking, 9);
        tracker
            .book(id(1), owner(7), booking(0, &[1, 2, 3, 4]), 0)
            .unwrap();
        tracker.grow(&id(1), 1, 0.5, 0);
        assert_eq!(tracker.load(&owner(7)).blocks, 3, "2.5, rounded");
        // Two of them in common with another request count whole.
        tracker
            .book(id(2), owner(7), booking(0, &[1, 2]), 0)
            .unwrap();
        assert_eq!(tracker.load(&owner(7)).blocks, 4, "2 and 1.5");
        let mut tracker = Tracker::new(Tracking::default(), 9);
        tracker.book(id(1), owner(7), booking(0, &[1]), 0).unwrap();
        tracker.grow(&id(1), 1, 0.5, 0);
        assert_eq!(tracker.load(&owner(7)).blocks, 1, "answers are not tracked");
        tracker.fill(&id(1), 2, None, 0);
        assert_eq!(tracker.load(&owner(7)).blocks, 3, "but by who booked it");
        tracker.fill(&id(1), 1, Some(0.5), 0);
        tracker.fill(&id(1), 2, None, 0);
        assert_eq!(tracker.load(&owner(7)).blocks, 3, "half of six");
    }

    #[test]
    fn a_source_keeps_only_what_it_claims() {
        let mut tracker = Tracker::new(Tracking::default(), 100);
        for request in 0..9 {
            tracker
                .book(id(request), owner(1), booking(1, &[]), request)
                .unwrap();
        }
        assert_eq!(tracker.retain(1, |request| request == 4), 2);
        assert_eq!(tracker.load(&owner(1)).waiting, 7);
        assert_eq!(tracker.expire(3), 2);
        assert_eq!(tracker.len(), 5);
    }
}
