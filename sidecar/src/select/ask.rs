//! What the index is asked.

use std::sync::Arc;

use kv_core::id::OwnerId;
use kv_core::table::Pool;
use tokio::sync::oneshot;

use super::{Choice, Hashed, Question, SelectError};
use crate::index::Field;

/// A question with the place for its answer.
#[derive(Debug)]
pub enum Ask {
    /// Every partition.
    Served(oneshot::Sender<Arc<[Served]>>),
    /// What a prompt would meet in a pool.
    Meet {
        /// Pool number.
        pool: usize,
        /// The prompt.
        prompt: Hashed,
        /// Every owner, if there is such a pool.
        reply: oneshot::Sender<Option<Field>>,
    },
    /// A worker for a prompt, booked there if the question says so.
    Choose(Box<Question>, oneshot::Sender<Result<Choice, SelectError>>),
    /// A booking at a worker that is known.
    Book(Box<Booking>, oneshot::Sender<Result<(), SelectError>>),
    /// The booking of an earlier choice. Says whose it is.
    Claim {
        /// Pool number.
        pool: usize,
        /// What the choice is kept under.
        id: String,
        /// The owner; `None` where nothing is kept.
        reply: oneshot::Sender<Result<Option<OwnerId>, SelectError>>,
    },
    /// A reserved request goes on.
    Advance(String, Stage, oneshot::Sender<Result<(), SelectError>>),
}

/// The workers of a model in a routing group.
#[derive(Clone, Debug)]
pub struct Served {
    /// Number of the pool.
    pub number: usize,
    /// Models that it goes by.
    pub models: Vec<String>,
    /// Routing group.
    pub group: String,
    /// The pool, with workers that take requests from here alone, which have no endpoint in it.
    pub pool: Arc<Pool>,
}

/// A request to be booked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Booking {
    /// What it is reserved under.
    pub id: String,
    /// Pool number.
    pub pool: usize,
    /// Where it goes.
    pub owner: OwnerId,
    /// Sequence hashes of its complete blocks.
    pub hashes: Vec<u64>,
    /// Whether other requests can share them.
    pub is_shared: bool,
    /// Prompt tokens to be computed there.
    pub prefill_tokens: u32,
}

/// What a reserved request has come to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Stage {
    /// Its first token has come.
    Prefilled,
    /// Its answer has filled a block; the share of it that is still to come, if that is known.
    Filled(Option<f32>),
    /// It is over.
    Over,
}
