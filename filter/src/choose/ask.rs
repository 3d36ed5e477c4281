//! A request to be routed, and what is known for it.

use kv_core::affinity::Session;
use kv_core::constraint::Constraints;
use kv_core::holdings::Named;
use kv_core::loads::PoolLoads;
use kv_core::queue::Profile;

use crate::reason::Reason;
use crate::world::Index;

/// A request to be routed.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// The reason so far; see [`Reason::has_blocks`].
    pub reason: Reason,
    /// Prompt tokens, 0 where unknown.
    pub tokens: u32,
    /// Sequence hashes of the prompt's blocks.
    pub hashes: &'a [u64],
    /// Its hashes in the pool's further families.
    pub families: &'a [Named],
    /// Positions of the owners that may have it, ascending.
    pub owners: &'a [usize],
    /// What it asks of its worker.
    pub constraints: &'a Constraints,
    /// Its session, where those are kept together.
    pub session: Option<Session>,
    /// What answer it asks for.
    pub answer: Answer,
    /// Where it may have to wait; `None` for one that goes on whatever the load.
    pub gate: Option<Gate<'a>>,
}

/// When a request has to wait.
#[derive(Clone, Copy, Debug)]
pub struct Gate<'a> {
    /// The classes of its pool.
    pub profile: &'a Profile,
    /// The class or family that it names; empty for none.
    pub named: &'a str,
    /// Classes in which requests wait already, as bits: nobody overtakes them.
    pub backlog: u64,
}

/// How an answer comes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Answer {
    /// The body has not said.
    #[default]
    Unknown,
    /// At once, when it is complete.
    Whole,
    /// Token by token; `expected` of them, 0 where not known.
    Streamed {
        /// Tokens that the client expects.
        expected: u32,
        /// Whether the client wants to be told what the answer used.
        tells_usage: bool,
    },
}

/// What the sidecar has published for a pool.
#[derive(Clone, Copy, Debug, Default)]
pub struct Published<'a> {
    /// The pages, if they may be used.
    pub index: Option<Index>,
    /// What to correct the lanes by, if it may be used.
    pub loads: Option<&'a PoolLoads>,
}
