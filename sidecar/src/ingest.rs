//! KV events from outside: decoded one by one, told apart by worker, handed to the index in order.
//!
//! A broken event is counted by reason and costs nothing but itself.

pub mod batch;
pub mod decode;
pub mod doors;
pub mod dynamo_zmq;
pub mod engine;
pub mod jetstream;
pub mod nats;
pub mod order;
pub mod pause;
pub mod poll;
pub mod post;
pub mod quota;
pub mod stream;
pub mod subject;
pub mod zmq;
pub mod zmtp;

use kv_core::event::{RouterEvent, SnapshotPart};
use kv_core::id::WorkerId;
use serde::{Deserialize, Serialize};

use batch::{Batch, Origin, Turn};

/// Most blocks of one event; engines send far fewer.
pub const MAX_EVENT_BLOCKS: usize = 1 << 16;

/// How events come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Plane {
    /// Dynamo 1.6.1's event plane over NATS.
    Dynamo,
    /// Plain JSON over NATS.
    Json,
    /// An engine's own ZMQ socket.
    Zmq,
    /// Posted to the sidecar.
    Http,
    /// Polled from the engine.
    Poll,
    /// A stream of JetStream.
    JetStream,
}

impl Plane {
    /// Whether one connection serves all workers.
    #[must_use]
    pub fn is_shared(self) -> bool {
        matches!(self, Self::Dynamo | Self::Json | Self::JetStream)
    }

    /// Label for metrics.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::Dynamo => "dynamo",
            Self::Json => "json",
            Self::Zmq => "zmq",
            Self::Http => "http",
            Self::Poll => "poll",
            Self::JetStream => "jet_stream",
        }
    }
}

/// Why an event, or a message that should have carried some, was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rejection {
    /// It can't be decoded.
    Malformed,
    /// An envelope whose topic isn't its subject's.
    WrongTopic,
    /// Residency of something other than a worker.
    ResidencyDomain,
    /// More than [`MAX_EVENT_BLOCKS`] blocks.
    TooManyBlocks,
    /// The worker isn't in the configuration.
    UnknownWorker,
    /// The worker has no such data-parallel rank.
    UnknownRank,
    /// The event speaks for another worker than its subject.
    WorkerMismatch,
    /// The event was applied before, by its id.
    DuplicateId,
    /// The pool takes no events.
    EventsOff,
    /// A part of a snapshot that nobody asked for.
    UnaskedSnapshot,
    /// A message of more than [`engine::MAX_BATCH_BYTES`].
    BatchTooLarge,
    /// An event past [`engine::MAX_BATCH_EVENTS`] of its message.
    TooManyEvents,
    /// An event of a name that isn't known.
    UnknownEvent,
    /// An event that says of itself that it is to be ignored.
    Ignored,
    /// Blocks that lie elsewhere than at the worker.
    NotLocal,
    /// Blocks that belong to something other than the worker.
    Ownership,
    /// A medium whose tier isn't known.
    UnknownMedium,
    /// A kind of attention that a prefix cache is not about.
    AttentionKind,
    /// A kind of attention that isn't known.
    UnknownAttentionKind,
    /// A group whose kind of attention a prefix cache is not about.
    AttentionGroup,
    /// A group whose kind of attention no event has named.
    UnlearnedGroup,
    /// A cache of a smaller attention window than another one of the rank.
    AttentionWindow,
    /// The parent's name was used under two salts, so this one's isn't known.
    AmbiguousSalt,
    /// A block size that is no multiple of the pool's, or not that of the medium's family.
    BlockSizeMismatch,
    /// No token ids, and no family that says what the hashes are.
    NoTokens,
    /// Fewer token ids than its blocks have; those before are stored.
    TooFewTokens,
    /// A hash twice in one chain; the blocks before are stored.
    RepeatedHash,
    /// A block that isn't full; those before are stored.
    PartialBlock,
    /// An object of a store that is no page's, or another tenant's.
    UnknownObject,
    /// A block that changed its level without having been stored.
    UnknownBlock,
    /// The worker's events are taken from another source.
    OtherSource,
    /// Too many workers without an endpoint, or blocks of theirs.
    TooManyStrangers,
}

impl Rejection {
    /// Label for metrics.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::WrongTopic => "wrong_topic",
            Self::ResidencyDomain => "residency_domain",
            Self::TooManyBlocks => "too_many_blocks",
            Self::UnknownWorker => "unknown_worker",
            Self::UnknownRank => "unknown_rank",
            Self::WorkerMismatch => "worker_mismatch",
            Self::DuplicateId => "duplicate_id",
            Self::EventsOff => "events_off",
            Self::UnaskedSnapshot => "unasked_snapshot",
            Self::BatchTooLarge => "batch_too_large",
            Self::TooManyEvents => "too_many_events",
            Self::UnknownEvent => "unknown_event",
            Self::Ignored => "ignored",
            Self::NotLocal => "not_local",
            Self::Ownership => "ownership",
            Self::UnknownMedium => "unknown_medium",
            Self::AttentionKind => "attention_kind",
            Self::UnknownAttentionKind => "unknown_attention_kind",
            Self::AttentionGroup => "attention_group",
            Self::UnlearnedGroup => "unlearned_group",
            Self::AttentionWindow => "attention_window",
            Self::AmbiguousSalt => "ambiguous_salt",
            Self::BlockSizeMismatch => "block_size_mismatch",
            Self::NoTokens => "no_tokens",
            Self::TooFewTokens => "too_few_tokens",
            Self::RepeatedHash => "repeated_hash",
            Self::PartialBlock => "partial_block",
            Self::UnknownObject => "unknown_object",
            Self::UnknownBlock => "unknown_block",
            Self::OtherSource => "other_source",
            Self::TooManyStrangers => "too_many_strangers",
        }
    }
}

/// What one message held.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Decoded {
    /// The events that are fit to apply, in order.
    pub events: Vec<RouterEvent>,
    /// One to each dropped event.
    pub rejected: Vec<Rejection>,
    /// Publisher process, where the plane names it.
    pub publisher: Option<u64>,
}

/// From a plane to the index, in order of arrival.
#[derive(Debug)]
pub enum Arrival {
    /// The plane is connected, for the first time or again: events may have been missed.
    Connected(Plane),
    /// The connection is lost.
    Disconnected(Plane),
    /// A message of events.
    Events {
        /// Where it came in.
        plane: Plane,
        /// Unix nanoseconds when it was received.
        received_ns: u64,
        /// What it held.
        decoded: Decoded,
    },
    /// An answer to a request for a worker's snapshot.
    Snapshot {
        /// Whom the answer is about.
        worker: WorkerId,
        /// A part, or why there is none.
        part: Result<SnapshotPart, NoSnapshot>,
    },
    /// The next message of a worker's own stream.
    Batch(Origin, Plane, Batch),
    /// What became of a worker's own stream.
    Turn(Origin, Plane, Turn),
}

/// Why a snapshot didn't come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NoSnapshot {
    /// Nobody listens on the subject.
    NoResponders,
    /// Not all parts came in time.
    Timeout,
    /// An answer that can't be decoded, speaks for another worker or contradicts another part.
    Malformed,
    /// More events than may be held back.
    Overflow,
    /// The connection was lost.
    Disconnected,
}

impl NoSnapshot {
    /// Label for metrics.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::NoResponders => "no_responders",
            Self::Timeout => "timeout",
            Self::Malformed => "malformed",
            Self::Overflow => "overflow",
            Self::Disconnected => "disconnected",
        }
    }
}
