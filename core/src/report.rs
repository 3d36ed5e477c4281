//! What filter VMs tell the sidecar about the requests they route.
//!
//! A report carries *sums* and *steps*. Sums are state: for every owner touched since the last
//! report, everything this VM has ever added to the owner's lanes, so a lost or repeated report
//! does no harm to them. Steps are the requests' progress. A complete report lists every live
//! booking of its VM and replaces what was known of it.

use serde::{Deserialize, Serialize};

use crate::affinity::Session;
use crate::constraint::Constraints;
use crate::id::{OwnerId, Tier};
use crate::load::Delta;
use crate::wire::{self, WireError};

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
    /// When it was made, Unix nanoseconds by Envoy's clock; 0 where the filter does not say.
    pub at_ns: u64,
    /// Lanes by owner.
    pub sums: Vec<Sum>,
    /// What happened, in order.
    pub steps: Vec<Step>,
    /// How long before `at_ns` each of the steps happened, nanoseconds; at `at_ns` those past the
    /// end of the list.
    pub ages_ns: Vec<u64>,
    /// [`Weighed::shared_cache`] of all candidates of all steps in order; 0 for those past the end
    /// of the list.
    pub shared_caches: Vec<u32>,
    /// [`Weighed::paced`] of the candidates of all steps in order; `None` for those past the end
    /// of the list.
    pub paced: Vec<Option<Paced>>,
    /// [`Evidence::constraints`] of those steps, by position, that have any.
    pub constraints: Vec<(u32, Constraints)>,
    /// [`Booked::session`] of those steps, by position, that have one.
    pub sessions: Vec<(u32, Session)>,
}

/// A [`Report`] of protocol version 2.
#[derive(Deserialize)]
struct Untimed {
    vm: u64,
    sequence: u64,
    complete: bool,
    sums: Vec<Sum>,
    steps: Vec<Step>,
}

impl Report {
    /// Reads an encoded report of any protocol version that is understood.
    ///
    /// # Errors
    /// When the bytes are empty, of another version or malformed.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        if wire::version(bytes).is_none_or(|version| version >= wire::TIMED_FROM) {
            let mut report: Self = wire::decode(bytes)?;
            let shared_caches = report.shared_caches.iter().copied();
            for (weighed, blocks) in weighed_mut(&mut report.steps).zip(shared_caches) {
                weighed.shared_cache = blocks;
            }
            let paced = report.paced.iter().copied();
            for (weighed, paced) in weighed_mut(&mut report.steps).zip(paced) {
                weighed.paced = paced;
            }
            for (step, constraints) in &report.constraints {
                if let Some(Step::Book(booked)) = report.steps.get_mut(*step as usize)
                    && let Some(evidence) = &mut booked.evidence
                {
                    evidence.constraints = constraints.clone();
                }
            }
            for (step, session) in &report.sessions {
                if let Some(Step::Book(booked)) = report.steps.get_mut(*step as usize) {
                    booked.session = Some(*session);
                }
            }
            return Ok(report);
        }
        let Untimed {
            vm,
            sequence,
            complete,
            sums,
            steps,
        } = wire::decode(bytes)?;
        Ok(Self {
            vm,
            sequence,
            complete,
            at_ns: 0,
            sums,
            steps,
            ..Self::default()
        })
    }

    /// Takes what reports carry apart from the steps.
    #[must_use]
    pub fn with_besides(mut self) -> Self {
        let shared = weighed_mut(&mut self.steps).map(|weighed| weighed.shared_cache);
        self.shared_caches = shared.collect();
        let used = self.shared_caches.iter().rposition(|blocks| *blocks > 0);
        self.shared_caches.truncate(used.map_or(0, |last| last + 1));
        let paced = weighed_mut(&mut self.steps).map(|weighed| weighed.paced);
        self.paced = paced.collect();
        let used = self.paced.iter().rposition(Option::is_some);
        self.paced.truncate(used.map_or(0, |last| last + 1));
        let asked = (0..).zip(&self.steps).filter_map(|(at, step)| match step {
            Step::Book(booked) => Some((at, booked.evidence.as_ref()?.constraints.clone())),
            _ => None,
        });
        self.constraints = asked.filter(|(_, c)| !c.is_empty()).collect();
        let sessions = (0..).zip(&self.steps).filter_map(|(at, step)| match step {
            Step::Book(booked) => Some((at, booked.session?)),
            _ => None,
        });
        self.sessions = sessions.collect();
        self
    }

    /// The steps and when they happened, Unix nanoseconds by Envoy's clock; 0 where it is not said.
    pub fn timed(&self) -> impl Iterator<Item = (u64, &Step)> {
        let ages = self.ages_ns.iter().copied().chain(std::iter::repeat(0));
        let times = ages.map(|age| self.at_ns.saturating_sub(age));
        times.zip(&self.steps)
    }
}

/// The candidates of all steps.
fn weighed_mut(steps: &mut [Step]) -> impl Iterator<Item = &mut Weighed> {
    let evidence = steps.iter_mut().filter_map(|step| match step {
        Step::Book(booked) => booked.evidence.as_mut(),
        _ => None,
    });
    evidence.flat_map(|evidence| &mut evidence.candidates)
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
    /// Its worker has said how many prompt tokens it found in its cache. Before it is over, at most
    /// once.
    Cached {
        /// The request.
        request: u64,
        /// Prompt tokens that the decision took to be there.
        predicted: u32,
        /// Prompt tokens that were.
        found: u32,
    },
    /// It waits for a worker to have room.
    Queued(Box<Queued>),
    /// It waits no more: it is booked, or it is gone.
    Unqueued {
        /// Its ticket.
        ticket: u64,
    },
}

/// A request that waits. One that is repeated waits still.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Queued {
    /// Its number among those of its VM that wait, ascending as they came.
    pub ticket: u64,
    /// Position of its pool in the worker table.
    pub pool: u16,
    /// Where its VM looks for verdicts.
    pub mailbox: u8,
    /// The class or family that its client named; empty for none.
    pub class: String,
    /// Prompt tokens.
    pub tokens: u32,
    /// Prompt tokens that the best owner has cached.
    pub cached_tokens: u32,
    /// When it came, Unix nanoseconds by Envoy's clock.
    pub since_ns: u64,
    /// Its priority, in seconds.
    pub priority: f64,
    /// Its tier.
    pub strict: u32,
    /// When it has to go at the latest, Unix nanoseconds; 0 for no deadline of its own.
    pub due_ns: u64,
    /// The owners that can take it; empty for any of its pool.
    pub owners: Vec<OwnerId>,
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
    /// Its session, where those are kept together. Reports carry it apart.
    #[serde(skip)]
    pub session: Option<Session>,
}

/// What a filter saw when it decided.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evidence {
    /// When the loads were read, Unix nanoseconds by Envoy's clock.
    pub at_ns: u64,
    /// Why the request was routed as it was.
    pub reason: String,
    /// Prompt tokens.
    pub tokens: u32,
    /// Share of the overlap that still counted.
    pub trust: f32,
    /// The best candidates by cost, the chosen one first.
    pub candidates: Vec<Weighed>,
    /// What the request asked of its worker. Reports carry it apart.
    #[serde(skip)]
    pub constraints: Constraints,
}

/// A candidate as a filter weighed it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Weighed {
    /// The owner.
    pub owner: OwnerId,
    /// Blocks held by tier.
    pub overlap: [u32; Tier::COUNT],
    /// Blocks beyond them in a shared store. Reports carry it apart.
    #[serde(skip)]
    pub shared_cache: u32,
    /// Prefill tokens there.
    pub prefill_tokens: u32,
    /// Blocks in use there.
    pub active_blocks: u32,
    /// Blocks of the request already in use there.
    pub shared_blocks: u32,
    /// Requests there.
    pub requests: u32,
    /// Its cost: blocks, or milliseconds of a predicted delay.
    pub cost: f64,
    /// What a predicted delay rests on besides. Reports carry it apart.
    #[serde(skip)]
    pub paced: Option<Paced>,
}

/// What a predicted delay rests on besides the load.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Paced {
    /// Requests without a first token, of all that were there.
    pub waiting: u16,
    /// Milliseconds until the owner is done with its prefills; negative since it was.
    pub finish_ms: f64,
    /// Milliseconds that it takes to prefill a token.
    pub ms_per_token: f64,
    /// Milliseconds that prompts of the pool usually take.
    pub typical_ms: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_of_this_protocol_and_the_one_before_are_read() {
        let report = Report {
            vm: 1,
            sequence: 2,
            complete: false,
            at_ns: 900,
            sums: Vec::new(),
            steps: vec![Step::Free { request: 3 }, Step::FirstToken { request: 4 }],
            ages_ns: vec![100],
            shared_caches: Vec::new(),
            paced: Vec::new(),
            constraints: Vec::new(),
            sessions: Vec::new(),
        };
        assert_eq!(Report::decode(&wire::encode(&report)), Ok(report.clone()));
        let weighed = |worker, shared_cache| Weighed {
            owner: OwnerId { worker, rank: 0 },
            overlap: [1, 0, 0, 2],
            shared_cache,
            prefill_tokens: 3,
            active_blocks: 4,
            shared_blocks: 5,
            requests: 6,
            cost: 7.5,
            paced: (worker == 2).then_some(Paced {
                waiting: 3,
                finish_ms: -1.5,
                ms_per_token: 0.05,
                typical_ms: 9.0,
            }),
        };
        let book = |candidates| {
            Step::Book(Box::new(Booked {
                request: 9,
                owner: OwnerKey {
                    pool: 0,
                    id: OwnerId { worker: 1, rank: 0 },
                },
                decoding: false,
                prefill_tokens: 1,
                blocks: 2,
                prefix: None,
                hashes: vec![8],
                evidence: Some(Evidence {
                    at_ns: 1,
                    reason: "kv".into(),
                    tokens: 32,
                    trust: 1.0,
                    candidates,
                    constraints: Constraints {
                        lora: "sql".into(),
                        ..Constraints::default()
                    },
                }),
                session: Some(Session {
                    key: 5,
                    is_last: true,
                }),
            }))
        };
        let steps = vec![
            book(vec![weighed(1, 0), weighed(2, 11)]),
            book(vec![weighed(1, 12), weighed(2, 0)]),
        ];
        let booked = Report {
            steps,
            ..report.clone()
        };
        let booked = booked.with_besides();
        assert_eq!(booked.shared_caches, [0, 11, 12]);
        let paced: Vec<bool> = booked.paced.iter().map(Option::is_some).collect();
        assert_eq!(paced, [false, true, false, true]);
        assert_eq!(Report::decode(&wire::encode(&booked)), Ok(booked));
        let times = report.timed().map(|(at_ns, _)| at_ns);
        assert_eq!(times.collect::<Vec<_>>(), [800, 900]);
        let Report { sums, steps, .. } = &report;
        let untimed = wire::encode_for(2, &(1_u64, 2_u64, false, sums, steps));
        let expected = Report {
            at_ns: 0,
            ages_ns: Vec::new(),
            ..report
        };
        assert_eq!(Report::decode(&untimed), Ok(expected));
        assert_eq!(Report::decode(&[]), Err(WireError::Empty));
        assert_eq!(Report::decode(&[1, 9]), Err(WireError::Malformed(2)));
    }
}
