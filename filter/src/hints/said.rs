//! Where a request may say something about its routing: Dynamo's headers and ours, and Dynamo's
//! extensions of the body. Of both, a header counts first.

use kv_core::constraint::{MAX_ALLOWED, MAX_TAINT, MAX_TAINTS};
use kv_core::id::{DpRank, WorkerId};
use kv_core::scan::Members;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::Kind;
use crate::header_map::HeaderMap;

/// Longest value of one of its keys that is read, in bytes.
const MAX_FIELD: usize = 32 << 10;
/// Dynamo's way of saying that there is no rank.
const NO_RANK: DpRank = DpRank::MAX;

/// Privileged headers, each with what it is about. Of those that say the same, the first that can
/// be read counts.
const HEADERS: [(&str, Kind); Name::COUNT] = [
    ("x-dynamo-worker-instance-id", Kind::Worker),
    ("x-worker-instance-id", Kind::Worker),
    ("x-dynamo-prefill-instance-id", Kind::Worker),
    ("x-prefill-instance-id", Kind::Worker),
    ("x-dynamo-dp-rank", Kind::Rank),
    ("x-dp-rank", Kind::Rank),
    (RANK, Kind::Rank),
    ("x-dynamo-prefill-dp-rank", Kind::Rank),
    ("x-prefill-dp-rank", Kind::Rank),
    ("x-dynamo-request-priority", Kind::Priority),
    ("x-dynamo-request-strict-priority", Kind::StrictPriority),
    ("x-dynamo-meta-policy-class", Kind::PolicyClass),
    ("x-tenant-id", Kind::Tenant),
    ("x-gateway-destination-endpoint-subset", Kind::Endpoints),
    ("x-kv-allowed-workers", Kind::AllowedWorkers),
    ("x-kv-required-taints", Kind::RequiredTaints),
    ("x-kv-preferred-taints", Kind::PreferredTaints),
];

/// The header by which engines take the rank that a request is for.
pub const RANK: &str = "x-data-parallel-rank";

/// Position in [`HEADERS`] of the first header of its meaning.
#[derive(Clone, Copy)]
enum Name {
    Worker = 0,
    Rank = 4,
    Priority = 9,
    StrictPriority = 10,
    PolicyClass = 11,
    Tenant = 12,
    Endpoints = 13,
    AllowedWorkers = 14,
    RequiredTaints = 15,
    PreferredTaints = 16,
}

impl Name {
    const COUNT: usize = 17;

    fn malformed(self) -> Malformed {
        Malformed(HEADERS.get(self as usize).map_or("", |(name, _)| name))
    }
}

/// The privileged headers of a request.
#[derive(Debug)]
pub struct Said<'a> {
    values: [Option<&'a [u8]>; Name::COUNT],
    /// Names that came more than once.
    repeated: [bool; Name::COUNT],
}

impl<'a> Said<'a> {
    /// Those among all headers. The first value of a name counts, of the tenant the last.
    #[must_use]
    pub fn of(headers: &'a HeaderMap) -> Self {
        let mut values = [None; Name::COUNT];
        let mut repeated = [false; Name::COUNT];
        for (name, value) in headers.iter() {
            // All names begin like this, and most headers' don't.
            if !name.starts_with(b"x-") {
                continue;
            }
            let at = HEADERS.iter().position(|(n, _)| n.as_bytes() == name);
            if let Some(at) = at
                && let Some((slot, repeated)) = values.get_mut(at).zip(repeated.get_mut(at))
            {
                *repeated = slot.is_some();
                let value = value.trim_ascii();
                let is_later = at == Name::Tenant as usize && !value.is_empty();
                if slot.is_none() || is_later {
                    *slot = Some(value);
                }
            }
        }
        Self { values, repeated }
    }

    /// Names of those that are there, and what they are about.
    pub fn names(&self) -> impl Iterator<Item = (&'static str, Kind)> + Clone {
        let all = HEADERS.iter().zip(&self.values);
        all.filter_map(|(header, value)| value.is_some().then_some(*header))
    }

    fn value(&self, name: Name) -> Option<&'a [u8]> {
        self.values.get(name as usize).copied().flatten()
    }

    /// The first of so many equivalent headers that is a decimal number.
    fn number<T: std::str::FromStr>(&self, name: Name, equivalent: usize) -> Option<T> {
        let first = name as usize;
        let values = self.values.get(first..first + equivalent)?;
        values.iter().flatten().find_map(|value| {
            let text = std::str::from_utf8(value).ok()?;
            text.parse().ok()
        })
    }

    fn text(&self, name: Name) -> Result<Option<&'a str>, Malformed> {
        let Some(value) = self.value(name) else {
            return Ok(None);
        };
        let text = std::str::from_utf8(value)
            .ok()
            .filter(|text| !text.is_empty());
        text.map(Some).ok_or(name.malformed())
    }

    /// The elements of a list whose elements are separated by commas.
    fn list<T>(
        &self,
        name: Name,
        most: usize,
        read: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<Vec<T>>, Malformed> {
        let Some(text) = self.text(name)? else {
            return Ok(None);
        };
        // Half of a list would leave out what the other half asks for.
        if self.repeated.get(name as usize) == Some(&true) {
            return Err(name.malformed());
        }
        let elements = text.split(',').map(str::trim).filter(|e| !e.is_empty());
        let list: Option<Vec<T>> = elements.take(most + 1).map(read).collect();
        let list = list.filter(|list| list.len() <= most);
        list.map(Some).ok_or(name.malformed())
    }

    /// The worker's id.
    #[must_use]
    pub fn worker(&self) -> Option<WorkerId> {
        self.number(Name::Worker, 2)
    }

    /// Its rank.
    #[must_use]
    pub fn rank(&self) -> Option<DpRank> {
        self.number(Name::Rank, 3).filter(|rank| *rank != NO_RANK)
    }

    /// Priority in the queue.
    #[must_use]
    pub fn priority(&self) -> Option<i32> {
        self.number(Name::Priority, 1)
    }

    /// Tier in the queue.
    #[must_use]
    pub fn strict_priority(&self) -> Option<u32> {
        self.number(Name::StrictPriority, 1)
    }

    /// Class in the queue.
    #[must_use]
    pub fn policy_class(&self) -> Option<&'a str> {
        self.text(Name::PolicyClass).ok().flatten()
    }

    /// The tenant, which keeps its blocks apart.
    ///
    /// # Errors
    /// When it is no text: without it, blocks would be shared.
    pub fn tenant(&self) -> Result<Option<&'a str>, Malformed> {
        self.text(Name::Tenant)
    }

    /// Endpoints that may have the request.
    ///
    /// # Errors
    /// When it is no text or there are too many.
    pub fn endpoints(&self) -> Result<Option<Vec<String>>, Malformed> {
        self.list(Name::Endpoints, MAX_ALLOWED, |e| Some(e.to_owned()))
    }

    /// Workers that may have it.
    ///
    /// # Errors
    /// When one is no number or there are too many.
    pub fn allowed_workers(&self) -> Result<Option<Vec<WorkerId>>, Malformed> {
        self.list(Name::AllowedWorkers, MAX_ALLOWED, |e| e.parse().ok())
    }

    /// Taints that its worker must have.
    ///
    /// # Errors
    /// When one is too long or there are too many.
    pub fn required_taints(&self) -> Result<Option<Vec<String>>, Malformed> {
        self.list(Name::RequiredTaints, MAX_TAINTS, |e| taint(e.to_owned()))
    }

    /// Taints that make a worker better or worse, as `taint:weight`; a weight that is left out is 1.
    ///
    /// # Errors
    /// When one is too long, its weight no number, or there are too many.
    pub fn preferred_taints(&self) -> Result<Option<Vec<(String, f32)>>, Malformed> {
        self.list(Name::PreferredTaints, MAX_TAINTS, |e| {
            let (name, weight) = e.rsplit_once(':').unwrap_or((e, "1"));
            weighted((name.trim().to_owned(), weight.trim().parse().ok()?))
        })
    }
}

fn taint(taint: String) -> Option<String> {
    (1..=MAX_TAINT).contains(&taint.len()).then_some(taint)
}

fn weighted((name, weight): (String, f32)) -> Option<(String, f32)> {
    Some((taint(name)?, Some(weight).filter(|w| w.is_finite())?))
}

/// Something privileged that can't be read: where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed(pub &'static str);

/// The parts of a body's `nvext` that are read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Nvext {
    /// `decode_worker_id`, else `backend_instance_id`.
    pub worker: Option<WorkerId>,
    /// `prefill_worker_id`.
    pub prefill_worker: Option<WorkerId>,
    /// `dp_rank`.
    pub rank: Option<DpRank>,
    /// `prefill_dp_rank`.
    pub prefill_rank: Option<DpRank>,
    /// `cache_salt`, which counts before that of the body.
    pub cache_salt: Option<String>,
    /// `agent_hints`.
    pub agent: AgentHints,
    /// `allowed_worker_ids`.
    pub allowed_workers: Option<Vec<WorkerId>>,
    /// `routing_constraints.required_taints`.
    pub required_taints: Vec<String>,
    /// `routing_constraints.preferred_taints`.
    pub preferred_taints: Vec<(String, f32)>,
    /// What could not be read.
    pub malformed: Option<Malformed>,
}

/// Hints of agents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct AgentHints {
    /// Priority in the queue, and in the engine.
    pub priority: Option<i32>,
    /// Tier in the queue.
    pub strict_priority: Option<u32>,
    /// Tokens of the answer.
    pub osl: Option<u32>,
    /// Older name of the priority.
    pub latency_sensitivity: Option<f64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RoutingConstraints {
    required_taints: Option<Vec<String>>,
    preferred_taints: Option<std::collections::BTreeMap<String, f32>>,
}

impl Nvext {
    /// Reads it: `members` are its keys and where their values stand in it.
    #[must_use]
    pub fn read(json: &[u8], members: &Members) -> Self {
        let mut fields = Fields {
            json,
            members,
            malformed: None,
        };
        let decode = fields.take("nvext.decode_worker_id");
        let backend = fields.take("nvext.backend_instance_id");
        let prefill_worker = fields.take("nvext.prefill_worker_id");
        let rank = fields.take("nvext.dp_rank");
        let prefill_rank = fields.take("nvext.prefill_dp_rank");
        let cache_salt: Option<String> = fields.take("nvext.cache_salt");
        let agent = fields.take("nvext.agent_hints");
        let allowed_workers: Option<Vec<WorkerId>> = fields.take("nvext.allowed_worker_ids");
        if allowed_workers
            .as_ref()
            .is_some_and(|w| w.len() > MAX_ALLOWED)
        {
            fields.fail("nvext.allowed_worker_ids");
        }
        let routing: Option<RoutingConstraints> = fields.take("nvext.routing_constraints");
        let routing = routing.unwrap_or_default();
        let required = routing.required_taints.unwrap_or_default();
        let preferred = routing.preferred_taints.unwrap_or_default();
        let is_bounded = required.len() <= MAX_TAINTS && preferred.len() <= MAX_TAINTS;
        let required: Option<Vec<_>> = required.into_iter().map(taint).collect();
        let preferred: Option<Vec<_>> = preferred.into_iter().map(weighted).collect();
        if !is_bounded || required.is_none() || preferred.is_none() {
            fields.fail("nvext.routing_constraints");
        }
        Self {
            worker: decode.or(backend),
            prefill_worker,
            rank: rank.filter(|rank| *rank != NO_RANK),
            prefill_rank: prefill_rank.filter(|rank| *rank != NO_RANK),
            cache_salt: cache_salt.filter(|salt| !salt.is_empty()),
            agent: agent.unwrap_or_default(),
            allowed_workers,
            required_taints: required.unwrap_or_default(),
            preferred_taints: preferred.unwrap_or_default(),
            malformed: fields.malformed,
        }
    }

    /// What of it only trusted clients may say.
    #[must_use]
    pub fn privileged(&self) -> Vec<Kind> {
        let AgentHints {
            priority,
            strict_priority,
            latency_sensitivity,
            ..
        } = self.agent;
        let jumps = priority.is_some_and(|p| p > 0) || latency_sensitivity.is_some_and(|l| l > 0.0);
        [
            (Kind::Worker, self.worker.or(self.prefill_worker).is_some()),
            (Kind::Rank, self.rank.or(self.prefill_rank).is_some()),
            (Kind::Priority, jumps),
            (Kind::StrictPriority, strict_priority.is_some_and(|s| s > 0)),
            (Kind::AllowedWorkers, self.allowed_workers.is_some()),
            (Kind::RequiredTaints, !self.required_taints.is_empty()),
            (Kind::PreferredTaints, !self.preferred_taints.is_empty()),
        ]
        .into_iter()
        .filter_map(|(kind, is_said)| is_said.then_some(kind))
        .collect()
    }
}

struct Fields<'a> {
    json: &'a [u8],
    members: &'a Members,
    malformed: Option<Malformed>,
}

impl Fields<'_> {
    /// The value of a key, `None` also where it is `null` or makes no sense.
    fn take<T: DeserializeOwned>(&mut self, path: &'static str) -> Option<T> {
        let (_, key) = path.split_once('.')?;
        let place = self.members.get(key)?;
        let json = self.json.get(place).filter(|json| json.len() <= MAX_FIELD);
        let value = json.and_then(|json| serde_json::from_slice::<Option<T>>(json).ok());
        if value.is_none() {
            self.fail(path);
        }
        value.flatten()
    }

    fn fail(&mut self, path: &'static str) {
        self.malformed.get_or_insert(Malformed(path));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kv_core::scan::Scanner;

    fn nvext(json: &[u8]) -> Nvext {
        let mut scanner = Scanner::of(10, None);
        scanner.feed(json);
        let scan = scanner.finish().unwrap_or_default();
        Nvext::read(json, &scan.members)
    }

    #[test]
    fn one_field_that_makes_no_sense_loses_no_other() {
        let read = nvext(
            br#"{"agent_hints": {"osl": "x"}, "dp_rank": 2, "token_data": [1,2,3], "decode_worker_id": 8,
                "backend_instance_id": 7, "allowed_worker_ids": null}"#,
        );
        assert_eq!((read.worker, read.rank), (Some(8), Some(2)));
        assert_eq!(read.agent, AgentHints::default());
        assert_eq!(read.malformed, Some(Malformed("nvext.agent_hints")));
        assert_eq!(read.allowed_workers, None);
        assert_eq!(nvext(b"7"), Nvext::default());
    }

    #[test]
    fn taints_and_their_weights_are_read() {
        let read = nvext(
            br#"{"routing_constraints": {"required_taints": ["a"], "preferred_taints": {"b": -0.5}}}"#,
        );
        assert_eq!(read.required_taints, ["a"]);
        assert_eq!(read.preferred_taints, [("b".to_owned(), -0.5)]);
        assert_eq!(
            read.privileged(),
            [Kind::RequiredTaints, Kind::PreferredTaints]
        );
        for broken in [
            &br#"{"routing_constraints": {"required_taints": [""]}}"#[..],
            br#"{"routing_constraints": {"required_taints": "a"}}"#,
        ] {
            let malformed = nvext(broken).malformed;
            assert_eq!(malformed, Some(Malformed("nvext.routing_constraints")));
        }
    }

    #[test]
    fn no_rank_is_dynamos_greatest_number() {
        let read = nvext(br#"{"dp_rank": 4294967295, "prefill_dp_rank": 0}"#);
        assert_eq!((read.rank, read.prefill_rank), (None, Some(0)));
    }
}
