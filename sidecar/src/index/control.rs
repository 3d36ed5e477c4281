//! What the service is told and asked, besides events.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use kv_core::event::RouterEvent;
use kv_core::holdings::Named;
use kv_core::id::OwnerId;
use kv_core::overlap::Overlap;
use kv_core::report::{Report, Sum};
use kv_core::table::Table;
use kv_core::wire::{Ack, Subscribe};
use tokio::sync::{mpsc, oneshot};

use super::{
    Field, IndexReport, NotAdopted, NotDumped, Partition, Readiness, Refusal, WorkersReport,
};
use crate::config::Config;
use crate::decision::{DecisionsReport, Wanted};
use crate::dump::Line;
use crate::ingest::batch::{Origin, Resume};
use crate::load::RawReport;
use crate::{peers, select};

/// Anything but events.
#[derive(Debug)]
pub enum Control {
    /// A bridge subscribes.
    Subscribe {
        /// Its first message.
        who: Subscribe,
        /// Protocol version of that.
        version: u8,
        /// Takes batches; its capacity is a window.
        out: mpsc::Sender<Bytes>,
        /// The number of the subscription, or why it is refused.
        reply: oneshot::Sender<Result<u64, Refusal>>,
    },
    /// A batch was written.
    Ack(u64, Ack),
    /// Reports of VMs, in order.
    Reports(u64, Vec<Report>),
    /// Lanes as Envoy's gauges show them.
    Lanes(u64, Vec<Sum>),
    /// Something of other routers.
    Peer(peers::Arrival),
    /// A subscription's stream is over.
    Gone(u64),
    /// Pools, workers, policies or settings have changed.
    Configure {
        /// The configuration; its pools are the same by name and order.
        config: Arc<Config>,
        /// Told once every Envoy has the table.
        written: oneshot::Sender<()>,
    },
    /// Workers with what is known of them.
    Workers(oneshot::Sender<WorkersReport>),
    /// Lanes, reports and corrections of every proxy.
    Raw(oneshot::Sender<RawReport>),
    /// Decisions, and what the exact state says of them.
    Decisions(Wanted, oneshot::Sender<DecisionsReport>),
    /// The index and its publication.
    Index(oneshot::Sender<IndexReport>),
    /// The whole index, line by line.
    Dump {
        /// Takes the lines.
        out: mpsc::Sender<Line>,
        /// Whether it begins.
        reply: oneshot::Sender<Result<(), NotDumped>>,
    },
    /// A line of the dump of the peer whose index is awaited.
    Adopt {
        /// The line.
        line: Line,
        /// Whether it was the last one, or why it makes no sense.
        reply: oneshot::Sender<Result<bool, NotAdopted>>,
    },
    /// No peer is awaited any more. Where workers' own streams are to be taken up.
    Adopted(oneshot::Sender<HashMap<Origin, Resume>>),
    /// What is missing for service.
    Readiness(oneshot::Sender<Readiness>),
    /// What a prompt would meet.
    Overlaps {
        /// Pool number.
        pool: usize,
        /// Sequence hashes of the prompt's blocks.
        prompt: Vec<u64>,
        /// Its hashes in further families of the pool.
        families: Vec<Named>,
        /// The owners and what they have, if there is such a pool.
        reply: oneshot::Sender<Option<Field>>,
    },
    /// The worker table.
    Table(oneshot::Sender<Table>),
    /// What the standalone indexer goes by.
    Partitions(oneshot::Sender<Vec<Partition>>),
    /// What the owners of a pool hold of a prompt, without those that hold nothing.
    Held {
        /// Pool number.
        pool: usize,
        /// Sequence hashes of the prompt's blocks.
        prompt: Vec<u64>,
        /// The owners.
        reply: oneshot::Sender<Vec<(OwnerId, Overlap)>>,
    },
    /// All blocks of an owner, as stores of one block each, parents first.
    Stores {
        /// Pool number.
        pool: usize,
        /// The owner.
        owner: OwnerId,
        /// The stores.
        reply: oneshot::Sender<Vec<RouterEvent>>,
    },
    /// What the select service asks.
    Select(select::Ask),
}
