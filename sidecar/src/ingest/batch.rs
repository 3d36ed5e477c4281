//! What an engine's own stream of events says, made ready for the index.
//!
//! A **stream** is one numbered sequence of messages: a ZMQ port, a polled address, the messages a
//! custom engine posts. It belongs to one worker and speaks for that worker alone. The door that
//! reads it puts it in order: what comes out is a sequence of batches without repetitions, with
//! word of every loss and every new start.

use kv_core::event::EventData;
use kv_core::id::{DpRank, Family, Tier, WorkerId};
use serde::{Deserialize, Serialize};

use super::Rejection;

/// A stream of one worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Origin {
    /// The worker, as the configuration names it.
    pub worker: WorkerId,
    /// Its number among the worker's streams: the rank whose port it is, 0 where one stream
    /// carries all ranks.
    pub stream: u32,
}

/// One message of a stream.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Number of the message, where the stream numbers them.
    pub sequence: Option<u64>,
    /// By what the door knows, after a restart of the sidecar, that the engine is still in the run
    /// that sent this message.
    pub mark: u64,
    /// Unix nanoseconds when it was received.
    pub received_ns: u64,
    /// Changes that are fit to apply, in order.
    pub changes: Vec<Change>,
    /// One to each dropped event.
    pub rejected: Vec<Rejection>,
}

/// A change of one rank's cache.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// Data-parallel rank.
    pub rank: DpRank,
    /// The tier that changed; `None` only for a clear of all tiers.
    pub tier: Option<Tier>,
    /// What the hashes are. Of any family but Dynamo's, `tokens_hash` of a stored block is its
    /// sequence hash in that family and means the whole prefix.
    pub family: Family,
    /// What changed.
    pub data: EventData,
}

/// Where a stream is to be taken up after a restart of the sidecar.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resume {
    /// Number of the last message that the restored index includes.
    pub sequence: u64,
    /// That message's [`Batch::mark`].
    pub mark: u64,
    /// Whether the restored index has all of the stream up to there.
    pub is_whole: bool,
}

/// What became of a stream, in order with its batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It is being read, for the first time or again.
    Opened,
    /// It can't be read.
    Closed,
    /// All batches before the next one that ever were have been delivered.
    Whole,
    /// Batches are missing before the next one, and nobody has them any more.
    Gap {
        /// How many; 0 where the stream can't tell.
        missing: u64,
    },
    /// The engine has started anew: what was said before no longer holds.
    Restarted,
}
