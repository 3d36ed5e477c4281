//! A worker for a prompt.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use kv_core::constraint::preference;
use kv_core::cost::Demand;
use kv_core::decide::{Candidate, Request, decide};
use kv_core::id::{DpRank, OwnerId, Role, WorkerId};
use kv_core::overlap::Overlap;
use kv_core::rng::Rng;
use kv_core::table::{Owner, Pool};

use super::{Catalog, Hashed, SelectError};
use crate::index::Field;

/// What is asked.
#[derive(Clone, Debug)]
pub struct Question {
    /// Number of the pool.
    pub pool: usize,
    /// The prompt.
    pub prompt: Hashed,
    /// Its LoRA adapter.
    pub lora: Option<String>,
    /// Where it may go.
    pub constraints: Constraints,
    /// Workers that registered.
    pub catalog: Arc<Catalog>,
    /// Whether its prompt tokens count as load; `None` where the configuration says.
    pub tracks_prefill: Option<bool>,
    /// Whether other requests can share its blocks; `None` where the configuration says.
    pub reuses: Option<bool>,
    /// What becomes of the choice.
    pub then: Then,
}

/// What becomes of a choice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Then {
    /// Nothing.
    Nothing,
    /// It can be booked later under an id.
    Keep(String),
    /// It is booked under an id.
    Book(String),
}

/// Where a request may go.
#[derive(Clone, Debug, Default)]
pub struct Constraints {
    /// There alone.
    pub pinned: Option<OwnerId>,
    /// To these alone.
    pub allowed: Option<HashSet<WorkerId>>,
    /// There alone, if it takes requests.
    pub affinity: Option<(WorkerId, Option<DpRank>)>,
    /// To workers that have all of these.
    pub required_taints: HashSet<String>,
    /// Rather to workers that have these, by weight.
    pub preferred_taints: HashMap<String, f32>,
}

/// Where it goes.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// The pool.
    pub pool: Arc<Pool>,
    /// The owner.
    pub owner: OwnerId,
    /// `ip:port` of its worker; empty where the worker registered for selection.
    pub endpoint: String,
    /// What each rank of the worker holds of the prompt.
    pub ranks: Vec<(DpRank, Overlap)>,
    /// Prompt tokens to be computed there.
    pub prefill_tokens: u32,
    /// Whether they count as load.
    pub tracks_prefill: bool,
    /// Blocks in use there with this request.
    pub potential_blocks: u64,
    /// Prompt tokens that wait there.
    pub active_prefill_tokens: u64,
    /// Sequence hashes of its blocks, as load knows them.
    pub hashes: Vec<u64>,
}

impl Question {
    /// Whether an owner takes requests from here.
    fn takes(&self, owner: &Owner) -> bool {
        takes(&self.catalog, owner)
    }

    fn has_taint(&self, owner: &Owner, taint: &String) -> bool {
        let registered = self.catalog.taints(owner.id.worker);
        owner.metadata.taints.contains(taint)
            || registered.is_some_and(|taints| taints.contains(taint))
    }

    fn has_taints(&self, owner: &Owner) -> bool {
        let mut required = self.constraints.required_taints.iter();
        required.all(|taint| self.has_taint(owner, taint))
    }

    /// What the cost of an owner is multiplied by.
    fn preference(&self, owner: &Owner) -> f64 {
        let preferred = self.constraints.preferred_taints.iter();
        let had = preferred.filter(|(taint, _)| self.has_taint(owner, taint));
        preference(had.map(|(_, weight)| f64::from(*weight)).sum())
    }

    fn has_adapter(&self, owner: &Owner) -> bool {
        let adapter = self.lora.as_deref();
        adapter.is_none_or(|adapter| owner.metadata.has_lora(adapter))
    }
}

/// Whether an owner takes requests from the select service.
pub(super) fn takes(catalog: &Catalog, owner: &Owner) -> bool {
    if owner.endpoint.is_empty() {
        catalog.has(owner.id)
    } else {
        owner.accepting && owner.role == Role::Aggregated
    }
}

impl Constraints {
    fn check(&self) -> Result<(), SelectError> {
        let excluded = |pinned: &OwnerId| {
            let allowed = self.allowed.as_ref();
            allowed.is_some_and(|allowed| !allowed.contains(&pinned.worker))
        };
        match self.pinned.filter(excluded) {
            Some(pinned) => Err(SelectError::PinnedNotAllowed(pinned.worker)),
            None => Ok(()),
        }
    }

    /// Owners that fit, those of the affinity alone if there are any.
    fn keep(&self, candidates: &mut Vec<Candidate>, pool: &Pool) {
        let id = |candidate: &Candidate| pool.owners.get(candidate.owner).map(|owner| owner.id);
        let fits = |owner: OwnerId| {
            let allowed = self.allowed.as_ref();
            self.pinned.is_none_or(|pinned| pinned == owner)
                && allowed.is_none_or(|allowed| allowed.contains(&owner.worker))
        };
        candidates.retain(|candidate| id(candidate).is_some_and(fits));
        if let Some((worker, rank)) = self.affinity {
            let is_it = |candidate: &Candidate| {
                let owner = id(candidate);
                owner.is_some_and(|o| o.worker == worker && rank.is_none_or(|rank| o.rank == rank))
            };
            if candidates.iter().any(is_it) {
                candidates.retain(is_it);
            }
        }
    }
}

/// Chooses among the owners of a field by its policy.
///
/// # Errors
/// When nobody takes the request.
pub fn choose(field: &Field, question: &Question, rng: &mut Rng) -> Result<Choice, SelectError> {
    question.constraints.check()?;
    let pool = &*field.pool;
    let prompt = &question.prompt;
    let mut policy = pool.policy;
    if let Some(tracks_prefill) = question.tracks_prefill {
        policy.tracking.prefill_tokens = tracks_prefill;
    }
    let mut candidates =
        field.candidates_that(|owner| question.takes(owner) && question.has_taints(owner));
    question.constraints.keep(&mut candidates, pool);
    let owner = |candidate: &Candidate| pool.owners.get(candidate.owner);
    let has_adapter = |c: &Candidate| owner(c).is_some_and(|owner| question.has_adapter(owner));
    if candidates.iter().any(has_adapter) {
        candidates.retain(has_adapter);
    }
    let has_any = !candidates.is_empty();
    let is_full =
        |c: &Candidate| owner(c).is_some_and(|owner| owner.metadata.is_full(c.load.requests()));
    candidates.retain(|candidate| !is_full(candidate));
    if has_any && candidates.is_empty() {
        return Err(SelectError::Overloaded);
    }
    for candidate in &mut candidates {
        let owner = pool.owners.get(candidate.owner);
        candidate.factor = owner.map_or(1.0, |owner| question.preference(owner));
    }
    if question.reuses == Some(false) {
        for candidate in &mut candidates {
            candidate.shared_blocks = 0;
        }
    }
    let demand = Demand {
        tokens: prompt.tokens,
        block_size: pool.block_size,
    };
    let request = Request {
        demand,
        trust: 1.0,
        turn: rng.below(usize::MAX) as u64,
        // What is usual is learned by each proxy for itself.
        typical_ms: 0.0,
        bound: None,
    };
    let (scored, chosen) = decide(&candidates, &request, &policy, rng);
    let chosen = chosen.and_then(|at| scored.get(at)).map(|s| s.candidate);
    let found = chosen.and_then(|c| {
        let (owner, standing) = (pool.owners.get(c.owner)?, field.standings.get(c.owner)?);
        Some((c, owner, standing))
    });
    let (candidate, owner, standing) = found.ok_or(SelectError::NoEndpoints)?;
    let owners = pool.owners.iter().zip(&field.standings);
    let ranks = owners.filter(|(o, _)| o.id.worker == owner.id.worker && question.takes(o));
    let ranks = ranks.map(|(o, standing)| (o.id.rank, standing.overlap));
    let known = u64::try_from(prompt.used.len()).unwrap_or(u64::MAX);
    let own = if policy.tracking.active_blocks {
        known.saturating_sub(candidate.shared_blocks.into())
    } else {
        0
    };
    // With the block that the prompt only begins.
    let blocks = u64::from(prompt.tokens.div_ceil(pool.block_size.max(1)));
    let own = own.saturating_add(blocks.saturating_sub(known));
    Ok(Choice {
        owner: owner.id,
        endpoint: owner.endpoint.clone(),
        ranks: ranks.collect(),
        prefill_tokens: candidate.uncached_tokens(demand, &policy),
        tracks_prefill: policy.tracking.prefill_tokens,
        potential_blocks: standing.load.blocks.saturating_add(own),
        active_prefill_tokens: standing.load.prefill_tokens,
        hashes: prompt.used.clone(),
        pool: Arc::clone(&field.pool),
    })
}
