//! Choosing a worker: overlaps from the pages, loads from the lanes, the decision, the booking.

use std::borrow::Cow;

use kv_core::constraint::Pin;
use kv_core::cost::Demand;
use kv_core::decide::{self, Candidate, Request, Scored};
use kv_core::device;
use kv_core::holdings::{Holdings, Named, Pages};
use kv_core::id::{Family, Slot};
use kv_core::key;
use kv_core::load::{Delta, Load};
use kv_core::loads::PoolLoads;
use kv_core::overlap::Overlap;
use kv_core::policy::{Mode, Policy};
use kv_core::reader::{Reader, View};
use kv_core::rng::Rng;

use crate::board::Glimpse;
use crate::bookings::{Bookings, Place, Tentative};
use crate::fleet::Served;
use crate::host::Host;
use crate::metrics::{Event, Metrics, Timing};
use crate::reason::Reason;
use crate::world::Index;

/// Owners of a pool up to which all are scored.
const SCORE_ALL: usize = 128;
/// In a larger pool: owners scored because they have most of the prompt.
const DEEPEST: usize = 64;
/// In a larger pool: owners scored besides, at random.
const SAMPLED: usize = 32;
/// Bookings of one request that are undone, at most.
const MAX_UNDONE: u32 = 2;

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
    /// The worker that it is to go to, in the mode direct.
    pub pin: Option<Pin>,
    /// What answer it asks for.
    pub answer: Answer,
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

/// Where a request goes.
#[derive(Debug)]
pub struct Choice {
    /// Endpoints of the chosen worker and of the one to try after it; `None` leaves the choice to
    /// Envoy.
    pub endpoints: Option<String>,
    /// Position of the chosen owner in its pool.
    pub owner: Option<usize>,
    /// Position of the owner to try after it.
    pub second: Option<usize>,
    /// Why.
    pub reason: Reason,
    /// What was booked.
    pub booking: Option<Tentative>,
    /// The longest prefix of the prompt that some owner holds: its blocks, and the hash of the last.
    pub prefix: Option<(u32, u64)>,
    /// Share of the overlaps that counted.
    pub trust: f64,
    /// When the loads were read, Unix nanoseconds.
    pub read_ns: u64,
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
    holdings: Holdings,
    rng: Rng,
    /// By candidate: what the first lane of its owner held when its load was read.
    read: Vec<u64>,
    /// When that was, Unix nanoseconds.
    read_ns: u64,
    /// Leading blocks of the prompt that are in use elsewhere, ascending by slot.
    in_use: Vec<(Slot, u32)>,
}

impl Chooser {
    /// A chooser whose random choices follow from the seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            reader: Reader::new(),
            holdings: Holdings::new(),
            rng: Rng::new(seed),
            read: Vec::new(),
            read_ns: 0,
            in_use: Vec::new(),
        }
    }

    /// Chooses a worker of a pool and books the request on it.
    pub fn choose(
        &mut self,
        host: &impl Host,
        metrics: &mut Metrics,
        bookings: &mut Bookings,
        served: &Served<'_>,
        published: &Published<'_>,
        ask: &Ask<'_>,
    ) -> Choice {
        let pool = served.pool;
        let mode = pool.policy.mode;
        let mut reason = ask.reason.under(mode);
        let mut trust = 1.0;
        let looked_up = reason.has_blocks() && {
            match published.index {
                None => reason = Reason::NoIndex,
                Some(index) if index.trust <= 0.0 => reason = Reason::Stale,
                Some(index) => {
                    trust = index.trust;
                    self.look_up(host, metrics, served, &index, ask);
                }
            }
            reason.has_blocks()
        };
        self.in_use.clear();
        if let Some(loads) = published.loads.filter(|_| mode == Mode::Kv) {
            self.in_use = loads.in_use(ask.hashes);
            self.in_use.sort_unstable();
        }
        // Where blocks count for each request, or not at all, nothing is counted more than once.
        let tracking = pool.policy.tracking;
        let counts_distinct = tracking.active_blocks && tracking.kv_reuse;
        let prompt = (mode == Mode::Kv && counts_distinct)
            .then(|| Glimpse::new(host, ask.hashes))
            .flatten();
        let policy = pool.policy.trusted(trust);
        let candidates = match ask.pin {
            Some(pin) => {
                let pinned = served.pinned(pin);
                pinned
                    .map(|owner| self.candidate(served, false, owner))
                    .collect()
            }
            None => self.candidates(served, looked_up, &policy),
        };
        let request = Request {
            demand: Demand {
                tokens: ask.tokens,
                block_size: pool.block_size,
            },
            trust,
            turn: match mode {
                Mode::RoundRobin => served.turn(host),
                Mode::Kv
                | Mode::Random
                | Mode::LeastLoaded
                | Mode::PowerOfTwo
                | Mode::Direct
                | Mode::DeviceAwareWeighted => 0,
            },
        };
        let mut round = Round {
            served,
            loads: published.loads,
            request,
            prompt,
            candidates,
        };
        let (weighed, booking) = self.book(host, metrics, bookings, &mut round);
        let picked = weighed.picked().map(|s| s.candidate.owner);
        let second = self.second(served, &weighed);
        Choice {
            endpoints: picked.and_then(|picked| served.endpoints(picked, second)),
            owner: picked,
            second,
            reason: picked.map_or(Reason::NoOwner, |_| reason),
            booking,
            prefix: looked_up.then(|| self.prefix(ask.hashes)).flatten(),
            trust,
            read_ns: self.read_ns,
            weighed,
        }
    }

    /// Decides and books. Another VM may have read the same loads at the same time: where the lane
    /// shows that one was quicker, the choice has to stand against the load as it is then.
    fn book(
        &mut self,
        host: &impl Host,
        metrics: &mut Metrics,
        bookings: &mut Bookings,
        round: &mut Round<'_>,
    ) -> (Weighed, Option<Tentative>) {
        let pool = round.served.pool;
        let policy = &pool.policy;
        let demand = round.request.demand;
        self.read_loads(host, round, None);
        let mut undone = 0;
        loop {
            let (scored, chosen) =
                decide::decide(&round.group(), &round.request, policy, &mut self.rng);
            let weighed = Weighed {
                demand,
                scored,
                chosen,
            };
            let picked = weighed.picked().map(|s| s.candidate);
            let booked = picked.and_then(|picked| {
                let place = round.served.place(picked.owner)?;
                let trusted = policy.trusted(round.request.trust);
                let prefill = demand.uncached_tokens(&picked.overlap, &trusted);
                let size = (prefill, demand.blocks());
                let prompt = round.prompt.as_mut();
                let booking = bookings.hold(host, metrics, place, policy.tracking, size, prompt);
                Some((picked, place, booking))
            });
            let Some((picked, place, booking)) = booked else {
                return (weighed, None);
            };
            let settled = undone == MAX_UNDONE || !policy.takes_least();
            if settled || !self.was_raced(host, round, place, &picked, booking.delta()) {
                return (weighed, Some(booking));
            }
            metrics.count(host, Event::Raced, 1);
            if let Some(prompt) = &mut round.prompt {
                prompt.again(host, booking.listing());
            }
            self.read_loads(host, round, Some((picked.owner, booking.delta())));
            if round.is_least(picked.owner) {
                return (weighed, Some(booking));
            }
            metrics.count(host, Event::Undone, 1);
            booking.undo(bookings, host);
            undone += 1;
        }
    }

    /// Whether the lane of the chosen owner shows more than what was read and booked.
    fn was_raced(
        &self,
        host: &impl Host,
        round: &Round<'_>,
        place: Place,
        picked: &Candidate,
        delta: Delta,
    ) -> bool {
        let mut read = round.candidates.iter().zip(&self.read);
        let before = read.find(|(candidate, _)| candidate.owner == picked.owner);
        before.is_some_and(|(_, a)| a.wrapping_add_signed(delta.a) != place.lane.read_a(host))
    }

    /// Reads the loads of all candidates, and what they use of the prompt, without what was just
    /// booked on one of them.
    fn read_loads(
        &mut self,
        host: &impl Host,
        round: &mut Round<'_>,
        booked: Option<(usize, Delta)>,
    ) {
        self.read.clear();
        self.read_ns = host.unix_ns();
        for candidate in &mut round.candidates {
            let place = round.served.place(candidate.owner);
            let mut lanes = place.map_or_else(Default::default, |place| place.lane.read(host));
            if let Some((owner, delta)) = booked
                && owner == candidate.owner
            {
                lanes.a = lanes.a.wrapping_sub_signed(delta.a);
                lanes.b = lanes.b.wrapping_sub_signed(delta.b);
            }
            self.read.push(lanes.a);
            let slot = round.served.owner(candidate.owner).map(|owner| owner.slot);
            let elsewhere = slot.map_or(0, |slot| self.in_use(slot));
            let here = round.prompt.as_ref().zip(place);
            let here = here.map_or(0, |(prompt, place)| prompt.shared(place.lane.name()));
            candidate.shared_blocks = here.max(elsewhere);
            let owner = round.served.owner(candidate.owner);
            candidate.load = match round.loads.zip(owner) {
                Some((loads, owner)) => loads.correction(owner.slot).apply(&lanes.load()),
                None => lanes.load(),
            };
        }
    }

    /// Position of the best owner of another worker than the chosen one. A worker that the request
    /// names has no second.
    fn second(&mut self, served: &Served<'_>, weighed: &Weighed) -> Option<usize> {
        let endpoint = |candidate: &Candidate| Some(&served.owner(candidate.owner)?.endpoint);
        let chosen = weighed.chosen?;
        let first = endpoint(&weighed.picked()?.candidate);
        let mode = served.pool.policy.mode;
        let elsewhere = |c: &Candidate| endpoint(c) != first;
        let second = decide::second(&weighed.scored, chosen, mode, &mut self.rng, elsewhere)?;
        Some(weighed.scored.get(second)?.candidate.owner)
    }

    /// The longest prefix that some owner holds, after a lookup.
    fn prefix(&self, hashes: &[u64]) -> Option<(u32, u64)> {
        let depth = self.holdings.known();
        let last = usize::try_from(depth).ok()?.checked_sub(1)?;
        Some((depth, *hashes.get(last)?))
    }

    /// Finds out what every owner holds of the prompt.
    fn look_up(
        &mut self,
        host: &impl Host,
        metrics: &mut Metrics,
        served: &Served<'_>,
        index: &Index,
        ask: &Ask<'_>,
    ) {
        let view = View {
            level: index.head.level,
            group: index.head.group,
            epoch: index.head.epoch,
            pool_key: served.pool.key,
            family: Family::Dynamo,
            slots: served.pool.slots(),
        };
        let since_ns = host.now_ns();
        let fetch = |id| host.shared(&key::page(id)).map(|page| page.bytes);
        let mut pages = Pages {
            reader: &mut self.reader,
            view,
            fetch,
        };
        let stores = &served.pool.stores;
        self.holdings
            .look_up(&mut pages, view.slots, stores, ask.hashes, ask.families);
        metrics.time(host, Timing::Lookup, since_ns, host.now_ns());
    }

    /// The owners to score, with overlap and without load.
    fn candidates(
        &mut self,
        served: &Served<'_>,
        looked_up: bool,
        policy: &Policy,
    ) -> Vec<Candidate> {
        let accepting = served.accepting();
        if accepting.len() <= SCORE_ALL || policy.mode != Mode::Kv {
            let make = |owner: &usize| self.candidate(served, looked_up, *owner);
            return accepting.iter().map(make).collect();
        }
        let mut owners = Vec::with_capacity(DEEPEST + SAMPLED);
        if looked_up {
            let mut holders: Vec<(f64, usize)> = self
                .holdings
                .held()
                .filter_map(|slot| {
                    let owner = served.owner_in(slot)?;
                    let depth = self.holdings.overlap(slot).effective(policy);
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
        let make = |owner: &usize| self.candidate(served, looked_up, *owner);
        owners.iter().map(make).collect()
    }

    fn candidate(&self, served: &Served<'_>, looked_up: bool, owner: usize) -> Candidate {
        let slot = served.owner(owner).map(|o| o.slot);
        let held = slot.filter(|_| looked_up);
        Candidate {
            owner,
            overlap: held.map_or_else(Overlap::default, |slot| self.holdings.overlap(slot)),
            load: Load::default(),
            shared_blocks: 0,
        }
    }

    /// Leading blocks of the prompt that requests of other proxies use.
    fn in_use(&self, slot: Slot) -> u32 {
        let at = self.in_use.binary_search_by_key(&slot, |(s, _)| *s);
        let found = at.ok().and_then(|at| self.in_use.get(at));
        found.map_or(0, |(_, depth)| *depth)
    }
}

/// One decision under way.
struct Round<'a> {
    served: &'a Served<'a>,
    loads: Option<&'a PoolLoads>,
    request: Request,
    /// The prompt among the live ones of this process.
    prompt: Option<Glimpse>,
    candidates: Vec<Candidate>,
}

impl Round<'_> {
    /// The candidates that are compared with each other.
    fn group(&self) -> Cow<'_, [Candidate]> {
        device::group(&self.candidates, self.served.pool)
    }

    /// Whether no candidate is better than this one.
    fn is_least(&self, owner: usize) -> bool {
        let policy = &self.served.pool.policy;
        let scored = decide::score(&self.group(), &self.request, policy);
        let own = scored.iter().find(|s| s.candidate.owner == owner);
        own.is_some_and(|own| {
            let own = own.compared(policy.mode);
            scored.iter().all(|s| own <= s.compared(policy.mode))
        })
    }
}

impl Weighed {
    /// The chosen one.
    #[must_use]
    pub fn picked(&self) -> Option<&Scored> {
        self.scored.get(self.chosen?)
    }
}
