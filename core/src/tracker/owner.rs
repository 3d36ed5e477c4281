//! What the bookings of one owner add up to.

use hashbrown::HashMap;

use super::booking::{ActiveLoad, Booking};

/// An owner with bookings.
#[derive(Debug, Default)]
pub(super) struct Owner {
    pub(super) load: ActiveLoad,
    /// Requests by block in use.
    pub(super) blocks: Blocks,
}

/// Requests by block that they use.
pub(super) type Blocks = HashMap<u64, u32>;

/// Counts a request's blocks. Returns how many were not in use.
pub(super) fn use_blocks(blocks: &mut Blocks, hashes: &[u64]) -> u64 {
    let mut fresh = 0;
    for hash in hashes {
        let uses = blocks.entry(*hash).or_default();
        fresh += u64::from(*uses == 0);
        *uses += 1;
    }
    fresh
}

/// The inverse of [`use_blocks`]. Returns how many are in use no more.
pub(super) fn leave_blocks(blocks: &mut Blocks, hashes: &[u64]) -> u64 {
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
    pub(super) fn add(&mut self, booking: &Booking) {
        self.load.prefill_tokens += u64::from(booking.prefill_tokens);
        self.load.blocks += u64::from(booking.private_blocks);
        *self.requests(booking) += 1;
        self.load.blocks += use_blocks(&mut self.blocks, &booking.hashes);
    }

    /// The inverse of [`Owner::add`].
    pub(super) fn subtract(&mut self, booking: &Booking) {
        self.load.prefill_tokens -= u64::from(booking.prefill_tokens);
        self.load.blocks -= u64::from(booking.private_blocks);
        *self.requests(booking) -= 1;
        self.load.blocks -= leave_blocks(&mut self.blocks, &booking.hashes);
    }

    pub(super) fn requests(&mut self, booking: &Booking) -> &mut u32 {
        if booking.decoding {
            &mut self.load.decoding
        } else {
            &mut self.load.waiting
        }
    }
}
