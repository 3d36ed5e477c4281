//! One class of requests.

use serde::{Deserialize, Serialize};

use super::busy::Capacity;

/// Who of a class goes first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// Who came first; a priority of p counts as having come p seconds earlier.
    #[default]
    Fcfs,
    /// Who has least to prefill, divided by 1 + priority.
    Wspt,
    /// Who came last; a priority of p counts as having come p seconds later.
    Lcfs,
}

/// A class.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Class {
    /// Its name, a metric's label.
    pub name: String,
    /// Who goes first.
    pub order: Order,
    /// Prompt tokens that it gets in a round of all classes, at least 1.
    pub quantum: u64,
    /// An owner with more prefill tokens than this is busy for it.
    pub busy_tokens: Option<u64>,
    /// The same as a share of a batch.
    pub busy_share: Option<f64>,
    /// How much of it may wait.
    pub limits: Limits,
}

/// How much of a class may wait, for each worker of the pool. A request is let in as long as what
/// waits already is below; a limit of 0 lets none wait.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Requests.
    pub requests: Option<u64>,
    /// Their prompt tokens.
    pub tokens: Option<u64>,
    /// Prompt tokens among them that are cached.
    pub cached_tokens: Option<u64>,
}

/// What of a class waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Requests.
    pub requests: u64,
    /// Their prompt tokens.
    pub tokens: u64,
    /// Prompt tokens among them that are cached.
    pub cached_tokens: u64,
}

/// A kind of limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Limit {
    /// [`Limits::requests`].
    Requests,
    /// [`Limits::tokens`].
    Tokens,
    /// [`Limits::cached_tokens`].
    CachedTokens,
}

impl Limit {
    /// Dynamo's name of it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Requests => "requests",
            Self::Tokens => "raw_isl_tokens",
            Self::CachedTokens => "cached_tokens",
        }
    }
}

/// A class lets no more requests wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{current} {} wait, the limit is {limit}", kind.name())]
pub struct Full {
    /// Which limit.
    pub kind: Limit,
    /// What waits.
    pub current: u64,
    /// What may.
    pub limit: u64,
}

impl Class {
    /// A class of this name that is never busy, with a quantum of 1 and no limits.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            quantum: 1,
            ..Self::default()
        }
    }

    /// Whether its requests ever wait.
    #[must_use]
    pub fn queues(&self) -> bool {
        self.busy_tokens.is_some() || self.busy_share.is_some()
    }

    /// Whether an owner with so many prefill tokens is busy for it.
    #[must_use]
    #[allow(clippy::cast_precision_loss)]
    pub fn is_busy(&self, prefill_tokens: u64, capacity: Capacity) -> bool {
        let share = self.busy_share;
        self.busy_tokens.is_some_and(|most| prefill_tokens > most)
            || share.is_some_and(|share| prefill_tokens as f64 > share * capacity.batch())
    }
}

impl Limits {
    /// Holds what waits against the limits.
    ///
    /// # Errors
    /// The first limit that is reached.
    pub fn admit(&self, usage: &Usage, workers: u64) -> Result<(), Full> {
        let all = [
            (Limit::Requests, usage.requests, self.requests),
            (Limit::Tokens, usage.tokens, self.tokens),
            (Limit::CachedTokens, usage.cached_tokens, self.cached_tokens),
        ];
        for (kind, current, limit) in all {
            let limit = limit.map(|limit| limit.saturating_mul(workers));
            if let Some(limit) = limit.filter(|limit| current >= *limit) {
                return Err(Full {
                    kind,
                    current,
                    limit,
                });
            }
        }
        Ok(())
    }

    /// The limit that lets no request wait at all, if there is one.
    #[must_use]
    pub fn forbids(&self) -> Option<Full> {
        let any = Usage::default();
        self.admit(&any, 1).err()
    }
}

impl Usage {
    pub(super) fn add(&mut self, tokens: u32, cached_tokens: u32) {
        self.requests += 1;
        self.tokens += u64::from(tokens);
        self.cached_tokens += u64::from(cached_tokens);
    }

    pub(super) fn remove(&mut self, tokens: u32, cached_tokens: u32) {
        self.requests = self.requests.saturating_sub(1);
        self.tokens = self.tokens.saturating_sub(tokens.into());
        self.cached_tokens = self.cached_tokens.saturating_sub(cached_tokens.into());
    }
}
