//! What a request asks of the worker that it goes to, besides what its prompt speaks for.
//!
//! Filter and sidecar narrow the owners of a pool by [`Constraints::narrow`], and weigh those that
//! are left by [`Constraints::factor`]. Neither allocates for an owner.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::id::{DpRank, OwnerId, Role, WorkerId};
use crate::table::{Owner, Pool};

/// Workers, or endpoints, that a request may list.
pub const MAX_ALLOWED: usize = 1024;
/// Taints of one kind that a request may list.
pub const MAX_TAINTS: usize = 32;
/// Longest taint, in bytes.
pub const MAX_TAINT: usize = 256;
/// What a taint begins with that stands for a label: `dynamo.topology/zone=a` for `zone: a`, as
/// Dynamo has it.
pub const TOPOLOGY: &str = "dynamo.topology/";

/// The worker that a request names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    /// The worker.
    pub worker: WorkerId,
    /// Its data-parallel rank; without it any of the worker's.
    pub rank: Option<DpRank>,
}

/// The owner that a request's session is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bound {
    /// The owner.
    pub owner: OwnerId,
    /// It gets the request as long as its cost is at most so many times the least; `None` always.
    pub slack: Option<f64>,
}

/// All of a request's constraints. Lists are bounded by [`MAX_ALLOWED`] and [`MAX_TAINTS`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Constraints {
    /// The one worker that may have it.
    pub pin: Option<Pin>,
    /// The workers that may have it, ascending; `None` stands for all.
    pub workers: Option<Vec<WorkerId>>,
    /// The endpoints that may have it, each `ip` or `ip:port`, ascending; `None` stands for all.
    pub endpoints: Option<Vec<String>>,
    /// Taints that its worker must have, all of them.
    pub required_taints: Vec<String>,
    /// Taints that make a worker better by a weight above 0 or worse by one below.
    pub preferred_taints: Vec<(String, f32)>,
    /// The adapter that its worker should have loaded; empty for none.
    pub lora: String,
    /// Where its session is.
    pub bound: Option<Bound>,
}

/// Owners that may have a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Narrowed<'a> {
    /// Their positions in the pool, ascending.
    pub owners: Cow<'a, [usize]>,
    /// Whether none of them has the adapter.
    pub is_lora_missing: bool,
}

impl Constraints {
    /// Whether nothing is asked.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pin.is_none()
            && self.workers.is_none()
            && self.endpoints.is_none()
            && self.required_taints.is_empty()
            && self.preferred_taints.is_empty()
            && self.lora.is_empty()
            && self.bound.is_none()
    }

    /// About how many bytes they take in a report.
    #[must_use]
    pub fn size(&self) -> usize {
        let texts = self.endpoints.iter().flatten().chain(&self.required_taints);
        let texts = texts.chain(self.preferred_taints.iter().map(|(taint, _)| taint));
        let workers = self.workers.as_ref().map_or(0, Vec::len);
        texts.map(|text| text.len() + 6).sum::<usize>() + 10 * workers + self.lora.len()
    }

    /// Whether a worker other than those that are left must never get the request.
    #[must_use]
    pub fn is_strict(&self) -> bool {
        self.pin.is_some()
            || self.workers.is_some()
            || self.endpoints.is_some()
            || !self.required_taints.is_empty()
    }

    /// Whether a worker is among those that are listed, if any are.
    #[must_use]
    pub fn lists(&self, worker: WorkerId) -> bool {
        let listed = self.workers.as_ref();
        listed.is_none_or(|listed| listed.binary_search(&worker).is_ok())
    }

    /// The owners of a pool that may have the request, of those that take any, at these positions.
    /// A worker that the request names need take none.
    #[must_use]
    pub fn narrow<'a>(&self, pool: &Pool, accepting: &'a [usize]) -> Narrowed<'a> {
        let mut owners = Cow::Borrowed(accepting);
        if let Some(pin) = self.pin {
            owners = Cow::Owned(pinned(pool, pin).collect());
        }
        if self.workers.is_some() || self.endpoints.is_some() || !self.required_taints.is_empty() {
            retain(pool, &mut owners, |owner| self.allows(owner));
        }
        let mut is_lora_missing = false;
        if !self.lora.is_empty() && self.pin.is_none() {
            let has = |position: &usize| {
                let owner = pool.owners.get(*position);
                owner.is_some_and(|owner| owner.metadata.has_lora(&self.lora))
            };
            is_lora_missing = !owners.is_empty() && !owners.iter().any(has);
            if !is_lora_missing && !owners.iter().all(has) {
                owners.to_mut().retain(has);
            }
        }
        if let Some(Bound { owner, slack: None }) = self.bound {
            let is_it = |position: &&usize| {
                let other = pool.owners.get(**position);
                other.is_some_and(|other| other.id == owner)
            };
            if let Some(position) = owners.iter().find(is_it).copied() {
                owners = Cow::Owned(vec![position]);
            }
        }
        Narrowed {
            owners,
            is_lora_missing,
        }
    }

    /// Whether an owner is among the workers and endpoints, and has the taints.
    fn allows(&self, owner: &Owner) -> bool {
        let has_endpoint = |list: &Vec<String>| {
            let listed = |endpoint: &str| list.binary_search_by(|e| e.as_str().cmp(endpoint));
            let (ip, _) = owner.endpoint.rsplit_once(':').unwrap_or_default();
            let bare = ip.trim_start_matches('[').trim_end_matches(']');
            listed(&owner.endpoint).is_ok() || listed(ip).is_ok() || listed(bare).is_ok()
        };
        self.lists(owner.id.worker)
            && self.endpoints.as_ref().is_none_or(has_endpoint)
            && self
                .required_taints
                .iter()
                .all(|taint| has_taint(owner, taint))
    }

    /// What the cost of an owner is multiplied by: `exp(-tanh(w))`, where `w` is the sum of the
    /// weights of preferred taints that it has; Dynamo's.
    #[must_use]
    pub fn factor(&self, owner: &Owner) -> f64 {
        if self.preferred_taints.is_empty() {
            return 1.0;
        }
        let preferred = self.preferred_taints.iter();
        let weights = preferred
            .filter_map(|(taint, weight)| has_taint(owner, taint).then_some(f64::from(*weight)));
        preference(weights.sum())
    }
}

/// What a cost is multiplied by for preferred taints of this weight in all.
#[must_use]
pub fn preference(weight: f64) -> f64 {
    (-weight.tanh()).exp()
}

/// Constraints as records show them: those that there are.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Shown<'a> {
    /// The one worker that may have it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pin: Option<Pin>,
    /// How many workers were listed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allowed_workers: Option<usize>,
    /// How many endpoints were listed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoints: Option<usize>,
    /// Taints that its worker must have.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    pub required_taints: &'a [String],
    /// Taints that make a worker better or worse.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    pub preferred_taints: &'a [(String, f32)],
    /// The adapter that its worker should have loaded.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub lora: &'a str,
    /// Where its session is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bound: Option<Bound>,
}

impl Constraints {
    /// What records show of them, if there are any.
    #[must_use]
    pub fn shown(&self) -> Option<Shown<'_>> {
        (!self.is_empty()).then(|| Shown {
            pin: self.pin,
            allowed_workers: self.workers.as_ref().map(Vec::len),
            endpoints: self.endpoints.as_ref().map(Vec::len),
            required_taints: &self.required_taints,
            preferred_taints: &self.preferred_taints,
            lora: &self.lora,
            bound: self.bound,
        })
    }
}

/// Positions of the owners that a request names, whether or not they take requests.
pub fn pinned(pool: &Pool, pin: Pin) -> impl Iterator<Item = usize> + '_ {
    let is_it = move |owner: &Owner| {
        let is_ranked = pin.rank.is_none_or(|rank| owner.id.rank == rank);
        owner.id.worker == pin.worker && is_ranked && owner.role == Role::Aggregated
    };
    let owners = pool.owners.iter().enumerate();
    owners.filter(move |(_, o)| is_it(o)).map(|(at, _)| at)
}

fn retain(pool: &Pool, owners: &mut Cow<'_, [usize]>, keep: impl Fn(&Owner) -> bool) {
    let kept = owners.iter().copied();
    let kept = kept.filter(|position| pool.owners.get(*position).is_some_and(&keep));
    *owners = Cow::Owned(kept.collect());
}

/// Whether an owner has a taint, by that name or as a label.
fn has_taint(owner: &Owner, taint: &str) -> bool {
    let metadata = &owner.metadata;
    let label = || {
        let (name, value) = taint.strip_prefix(TOPOLOGY)?.split_once('=')?;
        Some(metadata.labels.get(name)? == value)
    };
    metadata.taints.iter().any(|t| t == taint) || label() == Some(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::Slot;
    use crate::table::{Metadata, Traits};

    /// Worker, rank, taints, zone and adapters of an owner.
    type Said<'a> = (u64, u32, &'a [&'a str], &'a str, &'a [&'a str]);

    /// Workers 0 to 4; worker 3 with two ranks, worker 4 without requests.
    fn pool() -> Pool {
        let said = [
            (0, 0, &["fast", "spot"][..], "a", &["sql"][..]),
            (1, 0, &["fast"], "b", &["chat"]),
            (2, 0, &[], "a", &["chat"]),
            (3, 0, &["spot"], "b", &["chat"]),
            (3, 1, &["spot"], "b", &["chat"]),
            (4, 0, &["fast"], "a", &["sql"]),
        ];
        let owned = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
        let owner = |(slot, (worker, rank, taints, zone, lora)): (u16, Said<'_>)| Owner {
            slot: Slot(slot),
            id: OwnerId { worker, rank },
            role: Role::Aggregated,
            endpoint: format!("10.0.0.{worker}:80"),
            accepting: worker != 4,
            traits: Traits::default(),
            metadata: Metadata {
                taints: owned(taints),
                lora: owned(lora),
                labels: [("zone".to_owned(), zone.to_owned())].into(),
                ..Metadata::default()
            },
        };
        Pool {
            owners: (0..).zip(said).map(owner).collect(),
            ..Pool::default()
        }
    }

    const ACCEPTING: [usize; 5] = [0, 1, 2, 3, 4];

    fn left(constraints: &Constraints) -> Vec<usize> {
        constraints.narrow(&pool(), &ACCEPTING).owners.into_owned()
    }

    fn taints(required: &[&str]) -> Constraints {
        Constraints {
            required_taints: required.iter().map(|t| (*t).to_owned()).collect(),
            ..Constraints::default()
        }
    }

    #[test]
    fn each_constraint_leaves_out_whom_it_does_not_fit() {
        let none = Constraints::default();
        assert!(none.is_empty() && !none.is_strict());
        let pool = pool();
        let all = none.narrow(&pool, &ACCEPTING);
        assert!(matches!(all.owners, Cow::Borrowed(_)));
        assert_eq!(left(&taints(&["fast"])), [0, 1]);
        assert_eq!(left(&taints(&["fast", "spot"])), [0]);
        assert!(left(&taints(&["slow"])).is_empty());
        assert_eq!(left(&taints(&["dynamo.topology/zone=a"])), [0, 2]);
        assert!(left(&taints(&["dynamo.topology/zone"])).is_empty());
        assert_eq!(left(&taints(&["fast", "dynamo.topology/zone=b"])), [1]);
        let listed = Constraints {
            workers: Some(vec![1, 3, 9]),
            ..Constraints::default()
        };
        assert_eq!(left(&listed), [1, 3, 4]);
        let subset = |endpoints: &[&str]| Constraints {
            endpoints: Some(endpoints.iter().map(|e| (*e).to_owned()).collect()),
            ..listed.clone()
        };
        assert_eq!(left(&subset(&["10.0.0.1", "10.0.0.3:80"])), [1, 3, 4]);
        assert!(left(&subset(&["10.0.0.2:80", "10.0.0.3:81"])).is_empty());
    }

    #[test]
    fn a_named_worker_need_take_no_requests_but_must_fit() {
        let pin = |worker, rank| Constraints {
            pin: Some(Pin { worker, rank }),
            ..Constraints::default()
        };
        assert_eq!(left(&pin(4, None)), [5]);
        assert_eq!(left(&pin(3, None)), [3, 4]);
        assert_eq!(left(&pin(3, Some(1))), [4]);
        assert!(left(&pin(3, Some(2))).is_empty());
        let tainted = Constraints {
            required_taints: vec!["spot".into()],
            ..pin(4, None)
        };
        assert!(left(&tainted).is_empty());
    }

    #[test]
    fn an_adapter_narrows_where_somebody_has_it() {
        let lora = |lora: &str, required: &[&str]| Constraints {
            lora: lora.into(),
            ..taints(required)
        };
        let narrow = |constraints: &Constraints| {
            let pool = pool();
            let narrowed = constraints.narrow(&pool, &ACCEPTING);
            (narrowed.owners.into_owned(), narrowed.is_lora_missing)
        };
        assert_eq!(narrow(&lora("sql", &[])), (vec![0], false));
        assert_eq!(narrow(&lora("chat", &["fast"])), (vec![1], false));
        assert_eq!(
            narrow(&lora("sql", &["dynamo.topology/zone=b"])),
            (vec![1, 3, 4], true)
        );
        assert_eq!(narrow(&lora("sql", &["slow"])), (Vec::new(), false));
    }

    #[test]
    fn a_hard_binding_leaves_its_owner_where_that_fits() {
        let bound = |worker, slack| Constraints {
            bound: Some(Bound {
                owner: OwnerId { worker, rank: 0 },
                slack,
            }),
            ..taints(&["fast"])
        };
        assert_eq!(left(&bound(1, None)), [1]);
        assert_eq!(left(&bound(1, Some(2.0))), [0, 1]);
        assert_eq!(left(&bound(2, None)), [0, 1]);
        assert_eq!(left(&bound(4, None)), [0, 1]);
    }

    #[test]
    fn preferred_taints_scale_the_cost_as_dynamo_does() {
        let pool = pool();
        let preferred = Constraints {
            preferred_taints: vec![("fast".into(), 0.5), ("spot".into(), -2.0)],
            ..Constraints::default()
        };
        let factor = |position: usize| preferred.factor(&pool.owners[position]);
        assert!((factor(0) - 1.5_f64.tanh().exp()).abs() < 1e-12);
        assert!((factor(1) - (-(0.5_f64.tanh())).exp()).abs() < 1e-12);
        assert_eq!(factor(2), 1.0);
        assert_eq!(Constraints::default().factor(&pool.owners[0]), 1.0);
    }
}
