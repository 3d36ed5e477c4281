//! What filter VMs tell the sidecar about the requests they route.
//!
//! A report carries *sums* and *steps*. Sums are state: for every owner touched since the last
//! report, everything this VM has ever added to the owner's lanes, so a lost or repeated report
//! does no harm to them. Steps are the requests' progress. A complete report lists every live
//! booking of its VM and replaces what was known of it.

use serde::{Deserialize, Serialize};

use crate::id::{OwnerId, Tier};
use crate::load::Delta;

/// Steps of one report, at most.
pub const MAX_STEPS: usize = 64;

/// An owner as reports and loads name it: position of its pool in the table, and identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct OwnerKey {
    /// Position of the pool in the worker table.
    pub pool: u16,
    /// The owner.
    pub id: OwnerId,
}

/// A message of one VM.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Nonce of the VM.
    pub vm: u64,
    /// Number of the report within its VM, from 1.
    pub sequence: u64,
    /// Whether `steps` are all live bookings of the VM and `sums` all its sums.
    pub complete: bool,
    /// Lanes by owner.
    pub sums: Vec<Sum>,
    /// What happened, in order.
    pub steps: Vec<Step>,
}

/// All that a VM has ever added to an owner's lanes, modulo 2^64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sum {
    /// The owner.
    pub owner: OwnerKey,
    /// Lane A.
    pub a: u64,
    /// Lane B.
    pub b: u64,
}

impl Sum {
    /// Nothing added yet.
    #[must_use]
    pub fn new(owner: OwnerKey) -> Self {
        Self { owner, a: 0, b: 0 }
    }

    /// Adds a delta.
    pub fn add(&mut self, delta: Delta) {
        self.a = self.a.wrapping_add_signed(delta.a);
        self.b = self.b.wrapping_add_signed(delta.b);
    }

    /// The delta that takes it out of the lanes.
    #[must_use]
    pub fn removal(&self) -> Delta {
        Delta {
            a: 0_i64.wrapping_sub_unsigned(self.a),
            b: 0_i64.wrapping_sub_unsigned(self.b),
        }
    }
}

/// Progress of a request, which its VM numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Step {
    /// It was booked.
    Book(Box<Booked>),
    /// Another owner than the booked one serves it.
    Move {
        /// The request.
        request: u64,
        /// The owner that serves it.
        to: OwnerKey,
    },
    /// Its first token came.
    FirstToken {
        /// The request.
        request: u64,
    },
    /// It is over.
    Free {
        /// The request.
        request: u64,
    },
    /// Its prefill is done as far as can be told: of an answer that comes whole, the first token
    /// is not seen.
    Prefilled {
        /// The request.
        request: u64,
    },
    /// Its answer has filled blocks.
    Grown {
        /// The request.
        request: u64,
        /// How many since it was last said.
        blocks: u32,
        /// Share of the expected answer that is still to come, by which the blocks that are its
        /// alone count; 1 where none was expected.
        left: f32,
    },
    /// A worker has failed it.
    Failed {
        /// The request; 0 for one that is not booked.
        request: u64,
        /// The worker, by an owner of it.
        owner: OwnerKey,
        /// How.
        failure: Failure,
    },
    /// All that this VM has ever taken out of the lanes for VMs that are gone; a part of its sums.
    WrittenOff(Sum),
    /// The VM ends with the requests of its complete report: it tells how they go on and nothing
    /// else, however long that takes.
    Leave,
}

/// How a worker failed a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Failure {
    /// It did not take it: no connection, or a reset before any answer.
    Unreached,
    /// It broke off its answer.
    Broken,
    /// It answered with a status of 500 or above.
    Status,
}

impl Failure {
    /// Label for metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Unreached => "unreached",
            Self::Broken => "broken",
            Self::Status => "status",
        }
    }
}

/// A booking.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Booked {
    /// The request.
    pub request: u64,
    /// Where it was booked.
    pub owner: OwnerKey,
    /// Whether its first token has come; only in complete reports.
    pub decoding: bool,
    /// Prompt tokens to compute there.
    pub prefill_tokens: u32,
    /// Complete blocks of the prompt.
    pub blocks: u32,
    /// Blocks at the start of the prompt that the index knows: their number, and the sequence hash
    /// of the last of them.
    pub prefix: Option<(u32, u64)>,
    /// Sequence hashes of the blocks after them; empty where the prompt is not known.
    pub hashes: Vec<u64>,
    /// What the decision rested on; not in complete reports.
    pub evidence: Option<Evidence>,
}

/// What a filter saw when it decided.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evidence {
    /// When, Unix nanoseconds by Envoy's clock.
    pub at_ns: u64,
    /// Why the request was routed as it was.
    pub reason: String,
    /// Prompt tokens.
    pub tokens: u32,
    /// Share of the overlap that still counted.
    pub trust: f32,
    /// The best candidates by cost, the chosen one first.
    pub candidates: Vec<Weighed>,
}

/// A candidate as a filter weighed it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Weighed {
    /// The owner.
    pub owner: OwnerId,
    /// Blocks held by tier.
    pub overlap: [u32; Tier::COUNT],
    /// Prefill tokens there.
    pub prefill_tokens: u32,
    /// Blocks in use there.
    pub active_blocks: u32,
    /// Blocks of the request already in use there.
    pub shared_blocks: u32,
    /// Requests there.
    pub requests: u32,
    /// Its cost, in blocks.
    pub cost: f64,
}
