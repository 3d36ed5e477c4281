//! The true load: every booking of every proxy, and what they add up to per owner.
//!
//! Blocks are counted once per owner however many requests share them; requests and prefill
//! tokens are sums. Of a request that told how long its answer would be, the blocks that are its
//! alone count by the share of the answer that is still to come. Everything is synchronous; ids and
//! time are arguments.

mod booking;
mod owner;

use hashbrown::{HashMap, HashSet};

use crate::report::OwnerKey;

pub use booking::{ActiveLoad, Booking, BookingId, Change, Prefix, TrackError, Tracking};
use owner::{Blocks, Owner, leave_blocks, use_blocks};

#[derive(Debug)]
struct Entry {
    owner: OwnerKey,
    booking: Booking,
    /// Share of its answer that is still to come.
    left: f32,
    touched_ms: u64,
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

#[cfg(test)]
mod tests;
