//! Choosing a worker: overlaps from the pages, loads from the lanes, the decision, the booking.

use kv_core::cost::Demand;
use kv_core::decide::{self, Candidate, Request, Scored};
use kv_core::key;
use kv_core::load::Load;
use kv_core::overlap::Overlap;
use kv_core::policy::{Mode, Policy};
use kv_core::reader::{Reader, View};
use kv_core::rng::Rng;

use crate::fleet::Served;
use crate::host::Host;
use crate::lanes::Booking;
use crate::metrics::{Metrics, Timing};
use crate::reason::Reason;
use crate::world::Index;

/// Owners of a pool up to which all are scored.
const SCORE_ALL: usize = 128;
/// In a larger pool: owners scored because they have most of the prompt.
const DEEPEST: usize = 64;
/// In a larger pool: owners scored besides, at random.
const SAMPLED: usize = 32;

/// A request to be routed.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// The reason so far: [`Reason::Kv`] for a prompt that has been read.
    pub reason: Reason,
    /// Prompt tokens, 0 where unknown.
    pub tokens: u32,
    /// Sequence hashes of the prompt's blocks.
    pub hashes: &'a [u64],
}

/// Where a request goes.
#[derive(Debug)]
pub struct Choice<'a> {
    /// Endpoint of the chosen worker; `None` leaves the choice to Envoy.
    pub endpoint: Option<&'a str>,
    /// Why.
    pub reason: Reason,
    /// What was booked.
    pub booking: Option<Booking>,
    /// What was weighed.
    pub weighed: Weighed,
}

/// The candidates of a decision.
#[derive(Debug, Default)]
pub struct Weighed {
    /// Size of the prompt.
    pub demand: Demand,
    /// All that were scored.
    pub scored: Vec<Scored>,
    /// Position of the chosen one.
    pub chosen: Option<usize>,
}

/// Chooses workers. Reused between requests, which spares allocations.
pub struct Chooser {
    reader: Reader,
    rng: Rng,
}

impl Chooser {
    /// A chooser whose random choices follow from the seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            reader: Reader::new(),
            rng: Rng::new(seed),
        }
    }

    /// Chooses a worker of a pool and books the request on it.
    pub fn choose<'a>(
        &mut self,
        host: &impl Host,
        metrics: &mut Metrics,
        served: &Served<'a>,
        index: Option<Index>,
        ask: &Ask<'_>,
    ) -> Choice<'a> {
        let pool = served.pool;
        let mode = pool.policy.mode;
        let mut reason = ask.reason.under(mode);
        let mut trust = 1.0;
        let looked_up = reason == Reason::Kv && {
            match index {
                None => reason = Reason::NoIndex,
                Some(index) if index.trust <= 0.0 => reason = Reason::Stale,
                Some(index) => {
                    trust = index.trust;
                    self.look_up(host, metrics, served, &index, ask.hashes);
                }
            }
            reason == Reason::Kv
        };
        let policy = pool.policy.trusted(trust);
        let candidates = self.candidates(host, served, looked_up, &policy);
        let demand = Demand {
            tokens: ask.tokens,
            block_size: pool.block_size,
        };
        let turn = match mode {
            Mode::RoundRobin => served.turn(host),
            Mode::Kv | Mode::Random => 0,
        };
        let request = Request {
            demand,
            trust,
            turn,
        };
        let (scored, chosen) = decide::decide(&candidates, &request, &pool.policy, &mut self.rng);
        let picked = chosen.and_then(|i| scored.get(i)).map(|s| s.candidate);
        let booking = picked.and_then(|candidate| {
            let lane = served.lane(candidate.owner)?;
            let prefill = demand.uncached_tokens(&candidate.overlap, &policy);
            Some(Booking::new(host, lane, prefill, demand.blocks()))
        });
        let owner = picked.and_then(|candidate| served.owner(candidate.owner));
        Choice {
            endpoint: owner.map(|owner| owner.endpoint.as_str()),
            reason: owner.map_or(Reason::NoOwner, |_| reason),
            booking,
            weighed: Weighed {
                demand,
                scored,
                chosen,
            },
        }
    }

    /// Leaves in the reader what every owner holds of the prompt.
    fn look_up(
        &mut self,
        host: &impl Host,
        metrics: &mut Metrics,
        served: &Served<'_>,
        index: &Index,
        hashes: &[u64],
    ) {
        let view = View {
            level: index.head.level,
            group: index.head.group,
            epoch: index.head.epoch,
            pool_key: served.pool.key,
            slots: served.pool.slots(),
        };
        let since_ns = host.now_ns();
        let fetch = |id| host.shared(&key::page(id)).map(|page| page.bytes);
        self.reader.gallop(&view, hashes, fetch);
        metrics.time(host, Timing::Lookup, since_ns, host.now_ns());
    }

    /// The owners to score, with overlap and load.
    fn candidates(
        &mut self,
        host: &impl Host,
        served: &Served<'_>,
        looked_up: bool,
        policy: &Policy,
    ) -> Vec<Candidate> {
        let accepting = served.accepting();
        if accepting.len() <= SCORE_ALL || policy.mode != Mode::Kv {
            let make = |owner: &usize| self.candidate(host, served, looked_up, *owner);
            return accepting.iter().map(make).collect();
        }
        let mut owners = Vec::with_capacity(DEEPEST + SAMPLED);
        if looked_up {
            let mut holders: Vec<(f64, usize)> = self
                .reader
                .held()
                .filter_map(|slot| {
                    let owner = served.owner_in(slot)?;
                    let depth = self.reader.overlap(slot).effective(policy);
                    accepting.binary_search(&owner).ok()?;
                    Some((depth, owner))
                })
                .collect();
            if holders.len() > DEEPEST {
                holders.select_nth_unstable_by(DEEPEST, |a, b| b.0.total_cmp(&a.0));
                holders.truncate(DEEPEST);
            }
            owners.extend(holders.iter().map(|(_, owner)| *owner));
        }
        for _ in 0..SAMPLED {
            owners.extend(accepting.get(self.rng.below(accepting.len())));
        }
        owners.sort_unstable();
        owners.dedup();
        let make = |owner: &usize| self.candidate(host, served, looked_up, *owner);
        owners.iter().map(make).collect()
    }

    fn candidate(
        &self,
        host: &impl Host,
        served: &Served<'_>,
        looked_up: bool,
        owner: usize,
    ) -> Candidate {
        let slot = served.owner(owner).map(|o| o.slot).filter(|_| looked_up);
        Candidate {
            owner,
            overlap: slot.map_or_else(Overlap::default, |slot| self.reader.overlap(slot)),
            load: served
                .lane(owner)
                .map_or_else(Load::default, |lane| lane.load(host)),
        }
    }
}
