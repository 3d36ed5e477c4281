//! Load that several sidecars, and Dynamo's routers, tell each other over NATS.
//!
//! Events are Dynamo 1.6.1's `active_sequences_events`. Between sidecars there are, on subjects
//! beside theirs, signs of life ([`Alive`]) and snapshots: who starts, or notices by an [`Alive`]
//! that it has missed something, asks for a peer's live bookings and gets them as batches of the
//! same events, an empty one at the end. A sidecar that falls silent loses its bookings; a router
//! of Dynamo gives no signs of life, and its bookings end by their events or for being idle.

pub mod announcer;
pub mod codec;
mod link;
pub mod mirror;
pub mod subject;
mod tombs;

use kv_core::replica::ActiveSequenceEvent;
use serde::{Deserialize, Serialize};

pub use link::Link;

/// A sidecar's sign of life, sent after the events it counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alive {
    /// The sidecar.
    pub router_id: u64,
    /// Bookings that it has announced and not freed.
    pub live: u64,
    /// Sequence number that its next message of events will have.
    pub next_sequence: u64,
}

/// A request for live bookings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    /// Who asks.
    pub router_id: u64,
    /// Whom; everybody, if nobody.
    pub of: Option<u64>,
}

/// From peers to the index service.
#[derive(Debug)]
pub enum Arrival {
    /// NATS is connected, for the first time or again.
    Connected,
    /// The connection is lost.
    Disconnected,
    /// A message of events.
    Events(codec::Decoded),
    /// A part of a snapshot, numbered from 0 by its sequence.
    Snapshot(codec::Decoded),
    /// A sign of life.
    Alive(Alive),
    /// A peer wants the live bookings.
    Asked {
        /// Where to send them.
        reply: String,
    },
}

/// From the index service to peers; sent in order.
#[derive(Debug)]
pub enum Departure {
    /// Events of own requests.
    Events(Vec<ActiveSequenceEvent>),
    /// A sign of life.
    Alive {
        /// Live bookings.
        live: u64,
    },
    /// Live bookings are wanted.
    Ask {
        /// Of one peer, or of all.
        of: Option<u64>,
    },
    /// The live bookings.
    Snapshot {
        /// Who asked.
        reply: String,
        /// All of them.
        events: Vec<ActiveSequenceEvent>,
    },
}

/// Why an event or a message was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dropped {
    /// It can't be decoded.
    Malformed,
    /// An envelope with another topic.
    WrongTopic,
    /// The worker isn't in the configuration.
    UnknownWorker,
    /// The worker has no such data-parallel rank.
    UnknownRank,
    /// The request is booked already.
    Duplicate,
    /// The request was freed before.
    Superseded,
    /// The request isn't booked; remembered for a while.
    UnknownRequest,
    /// The request is booked on another worker.
    WorkerMismatch,
    /// Too many bookings.
    Full,
    /// Too many peers.
    TooManyPeers,
    /// More blocks than a message takes; not sent.
    TooLong,
    /// The queue to NATS is full; sent later.
    QueueFull,
    /// NATS didn't take it.
    Unsent,
}

impl Dropped {
    /// Label for metrics.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::WrongTopic => "wrong_topic",
            Self::UnknownWorker => "unknown_worker",
            Self::UnknownRank => "unknown_rank",
            Self::Duplicate => "duplicate",
            Self::Superseded => "superseded",
            Self::UnknownRequest => "unknown_request",
            Self::WorkerMismatch => "worker_mismatch",
            Self::Full => "full",
            Self::TooManyPeers => "too_many_peers",
            Self::TooLong => "too_long",
            Self::QueueFull => "queue_full",
            Self::Unsent => "unsent",
        }
    }
}
