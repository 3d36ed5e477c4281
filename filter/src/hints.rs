//! What a request says about where it should go and how much work it is.
//!
//! The length of an answer is anybody's to say. Everything else is privileged: whoever chooses a
//! worker can overload it, and whoever chooses a tenant reads along in its cache. It counts only
//! where the client is [trusted](trust). Elsewhere it is taken out of the headers, not read in the
//! body, and counted.

mod said;
mod trust;

use kv_core::constraint::{Constraints, Pin};
use kv_core::table::Pool;

use crate::header_map::HeaderMap;
use crate::host::{Headers, Host};
use crate::metrics::Metrics;

pub use said::{Malformed, Nvext, RANK, Said};
pub use trust::is_trusted;

/// The kinds of privileged hints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The pool.
    Pool,
    /// The worker.
    Worker,
    /// Its data-parallel rank.
    Rank,
    /// The workers among which one is chosen.
    AllowedWorkers,
    /// The endpoints among which one is chosen.
    Endpoints,
    /// Taints that the worker must have.
    RequiredTaints,
    /// Taints that make workers better or worse.
    PreferredTaints,
    /// The tenant, in a header.
    Tenant,
    /// The class in the queue.
    PolicyClass,
    /// A priority above 0.
    Priority,
    /// The tier in the queue.
    StrictPriority,
}

impl Kind {
    /// All of them, in order.
    pub const ALL: [Self; 11] = [
        Self::Pool,
        Self::Worker,
        Self::Rank,
        Self::AllowedWorkers,
        Self::Endpoints,
        Self::RequiredTaints,
        Self::PreferredTaints,
        Self::Tenant,
        Self::PolicyClass,
        Self::Priority,
        Self::StrictPriority,
    ];
    /// Number of kinds.
    pub const COUNT: usize = Self::ALL.len();

    /// Metric label.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pool => "pool",
            Self::Worker => "worker",
            Self::Rank => "rank",
            Self::AllowedWorkers => "allowed_workers",
            Self::Endpoints => "endpoints",
            Self::RequiredTaints => "required_taints",
            Self::PreferredTaints => "preferred_taints",
            Self::Tenant => "tenant",
            Self::PolicyClass => "policy_class",
            Self::Priority => "priority",
            Self::StrictPriority => "strict_priority",
        }
    }
}

/// What counts of all that a request says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Hints {
    /// Tokens of the answer that the client expects; 0 where it does not say.
    pub expected_output: u32,
    /// Seconds by which the request counts as having come earlier to the queue, from its priority;
    /// never below 0.
    pub priority_jump: f64,
    /// Its tier in the queue.
    pub strict_priority: u32,
    /// Its class in the queue.
    pub policy_class: Option<String>,
    /// What keeps its blocks apart from others', in place of the body's `cache_salt`.
    pub salt: Option<String>,
    /// What it asks of its worker.
    pub constraints: Constraints,
    /// Whether it names a worker and may not.
    pub is_untrusted_pin: bool,
    /// Whether it names a rank and no worker.
    pub is_rank_alone: bool,
    /// Something privileged of a trusted client that can't be read.
    pub malformed: Option<Malformed>,
}

impl Hints {
    /// What counts for the current request. What does not is removed from its headers and counted;
    /// without a pool nobody but the route says whom to trust.
    pub fn gather(
        host: &impl Host,
        metrics: &mut Metrics,
        pool: Option<&Pool>,
        headers: &HeaderMap,
        nvext: &Nvext,
    ) -> Self {
        let said = Said::of(headers);
        let cosmetic = Self {
            expected_output: nvext.agent.osl.unwrap_or(0),
            salt: nvext.cache_salt.clone(),
            ..Self::default()
        };
        let in_headers = said.names().filter(|(_, kind)| {
            // One that does not put the request forward is no privilege.
            *kind != Kind::Priority || said.priority().is_some_and(|p| p > 0)
        });
        let in_body = nvext.privileged();
        let is_said =
            |kind: &Kind| in_headers.clone().any(|(_, k)| k == *kind) || in_body.contains(kind);
        if in_headers.clone().next().is_none() && in_body.is_empty() && nvext.malformed.is_none() {
            return cosmetic;
        }
        if is_trusted(host, pool) {
            return cosmetic.with_privileged(&said, nvext);
        }
        for kind in Kind::ALL.into_iter().filter(is_said) {
            metrics.hint_ignored(host, kind);
        }
        for (name, _) in in_headers {
            host.remove_header(Headers::Request, name);
        }
        Self {
            is_untrusted_pin: said.worker().or(nvext.worker).is_some(),
            ..cosmetic
        }
    }

    fn with_privileged(mut self, said: &Said<'_>, nvext: &Nvext) -> Self {
        let mut faults = Faults(nvext.malformed);
        let worker = said.worker().or(nvext.worker);
        let rank = said.rank().or(nvext.rank);
        let tenant = faults.take(said.tenant()).map(str::to_owned);
        self.salt = tenant.or(self.salt);
        let workers = faults.take(said.allowed_workers());
        let required = faults.take(said.required_taints());
        let preferred = faults.take(said.preferred_taints());
        self.constraints = Constraints {
            pin: worker.map(|worker| Pin { worker, rank }),
            workers: ascending(workers.or_else(|| nvext.allowed_workers.clone())),
            endpoints: ascending(faults.take(said.endpoints())),
            required_taints: required.unwrap_or_else(|| nvext.required_taints.clone()),
            preferred_taints: preferred.unwrap_or_else(|| nvext.preferred_taints.clone()),
            ..Constraints::default()
        };
        let jump = said.priority().or(nvext.agent.priority).map(f64::from);
        let jump = jump.or(nvext.agent.latency_sensitivity);
        self.priority_jump = jump.filter(|jump| jump.is_finite()).unwrap_or(0.0).max(0.0);
        let strict = said.strict_priority().or(nvext.agent.strict_priority);
        self.strict_priority = strict.unwrap_or(0);
        self.policy_class = said.policy_class().map(str::to_owned);
        self.is_rank_alone = worker.is_none() && rank.is_some();
        self.malformed = faults.0;
        self
    }
}

fn ascending<T: Ord>(list: Option<Vec<T>>) -> Option<Vec<T>> {
    list.map(|mut list| {
        list.sort_unstable();
        list
    })
}

/// The first thing that could not be read.
struct Faults(Option<Malformed>);

impl Faults {
    fn take<T>(&mut self, read: Result<Option<T>, Malformed>) -> Option<T> {
        read.unwrap_or_else(|fault| {
            self.0.get_or_insert(fault);
            None
        })
    }
}
