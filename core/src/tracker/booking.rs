//! What is booked, and the load it makes.

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

/// A change of a [`Tracker`](super::Tracker), to be made in another one.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// See [`super::Tracker::book`].
    Book(BookingId, OwnerKey, Box<Booking>),
    /// See [`super::Tracker::relocate`].
    Relocate(BookingId, OwnerKey),
    /// See [`super::Tracker::first_token`].
    FirstToken(BookingId),
    /// See [`super::Tracker::grow`].
    Grow(BookingId, u32, f32),
    /// See [`super::Tracker::free`].
    Free(BookingId),
}
