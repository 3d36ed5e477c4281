//! Choosing a worker: overlaps from the pages, loads from the lanes, the decision, the booking.

mod ask;
mod candidates;
mod choice;
mod round;

use hashbrown::HashMap;
use kv_core::cost::Demand;
use kv_core::decide::{self, Candidate, Price, Request};
use kv_core::delay;
use kv_core::holdings::Holdings;
use kv_core::id::{Slot, WorkerId};
use kv_core::load::{Delta, Load};
use kv_core::policy::Mode;
use kv_core::reader::Reader;
use kv_core::rng::Rng;
use kv_core::table::Pool;

pub use self::ask::{Answer, Ask, Gate, Published};
pub use self::choice::{Barred, Busy, Choice, Weighed};
use self::round::Round;
use crate::board::Glimpse;
use crate::bookings::{Bookings, Place, Tentative};
use crate::fleet::Served;
use crate::host::Host;
use crate::metrics::{Event, Metrics};
use crate::reason::Reason;

/// Pools whose usual prompts are remembered, at most.
const MAX_TYPICAL: usize = 64;
/// Owners that are named to the sidecar of a request that only some can take, at most.
const MAX_NAMED: usize = 64;
/// Bookings of one request that are undone, at most.
const MAX_UNDONE: u32 = 2;

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
    /// By key of a pool: what its prompts usually take to prefill, milliseconds.
    typical: HashMap<u64, f64>,
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
            typical: HashMap::new(),
        }
    }

    /// Chooses a worker of a pool and books the request on it.
    ///
    /// # Errors
    /// When there is too much load.
    pub fn choose(
        &mut self,
        host: &impl Host,
        metrics: &mut Metrics,
        bookings: &mut Bookings,
        served: &Served<'_>,
        published: &Published<'_>,
        ask: &Ask<'_>,
    ) -> Result<Choice, Barred> {
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
        let all = self.candidates(served, looked_up, &policy, ask);
        let candidates = match ask.constraints.pin {
            Some(_) => all,
            None => self.warm(host, served, all),
        };
        let bound = ask.constraints.bound.and_then(|bound| {
            let owner = served.position(ask.owners, bound.owner)?;
            Some((owner, bound.slack?))
        });
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
            typical_ms: self.typical.get(&pool.key).copied().unwrap_or(0.0),
            bound,
        };
        let mut round = Round {
            served,
            loads: published.loads,
            request,
            prompt,
            // What is not for generation is no load to speak of.
            is_capped: reason != Reason::Passed,
            is_full: false,
            is_whole: candidates.len() == ask.owners.len(),
            ask,
            candidates,
        };
        self.read_loads(host, &mut round, None);
        self.bar(host, &mut round, ask)?;
        let (weighed, booking) = self.book(host, metrics, bookings, &mut round);
        let picked = weighed.picked().map(|s| s.candidate.owner);
        self.learn(pool, &weighed);
        let second = self.second(served, &weighed);
        Ok(Choice {
            endpoints: picked.and_then(|picked| served.endpoints(picked, second)),
            owner: picked,
            second,
            reason: picked.map_or(Reason::NoOwner, |_| reason),
            is_full: picked.is_none() && round.is_full,
            booking,
            prefix: looked_up.then(|| self.prefix(ask.hashes)).flatten(),
            trust,
            read_ns: self.read_ns,
            weighed,
        })
    }

    /// Leaves out workers that have too much load, and finds out whether the request has to wait
    /// for the others. Loads have been read.
    fn bar(
        &mut self,
        host: &impl Host,
        round: &mut Round<'_>,
        ask: &Ask<'_>,
    ) -> Result<(), Barred> {
        // What is no generation is no load.
        if round.candidates.is_empty() || ask.reason == Reason::Passed {
            return Ok(());
        }
        let served = round.served;
        let pool = served.pool;
        if !pool.overload.is_unset() {
            self.leave_out_overloaded(round);
            if round.candidates.is_empty() {
                return Err(Barred::Overloaded);
            }
        }
        let Some(gate) = ask.gate else {
            return Ok(());
        };
        let demand = round.request.demand;
        let trusted = pool.policy.trusted(round.request.trust);
        let uncached = |c: &Candidate| c.uncached_tokens(demand, &trusted);
        let uncached = round.candidates.iter().map(uncached).min();
        let uncached = uncached.unwrap_or(demand.tokens);
        let at = gate.profile.class_of(gate.named, uncached);
        let Some(class) = gate.profile.classes().get(at) else {
            return Ok(());
        };
        let has_room = |owner: usize, load: &Load| {
            let owner = served.owner(owner);
            let prefill = u64::from(load.prefill_tokens);
            owner.is_some_and(|owner| owner.has_room(class, prefill, load.requests()))
        };
        let mut candidates = round.candidates.iter();
        let is_free = candidates.any(|c| has_room(c.owner, &c.load))
            || !round.is_whole && {
                let mut all = ask.owners.iter();
                all.any(|owner| has_room(*owner, &round.load(host, *owner)))
            };
        let waits = u32::try_from(at).is_ok_and(|at| gate.backlog >> at & 1 == 1);
        if is_free && !waits {
            return Ok(());
        }
        // Of too many to be named the sidecar takes any.
        let is_narrowed = ask.owners.len() < served.accepting().len();
        let is_named =
            (is_narrowed || ask.constraints.pin.is_some()) && ask.owners.len() <= MAX_NAMED;
        let owners = ask.owners.iter().filter(|_| is_named);
        Err(Barred::Busy(Busy {
            class: at,
            cached_tokens: demand.tokens.saturating_sub(uncached),
            owners: owners
                .filter_map(|owner| Some(served.owner(*owner)?.id))
                .collect(),
        }))
    }

    /// Takes those out of a round all of whose ranks are past a threshold.
    fn leave_out_overloaded(&mut self, round: &mut Round<'_>) {
        let served = round.served;
        let worker = |c: &Candidate| served.owner(c.owner).map(|owner| owner.id.worker);
        let is_fine = |c: &&Candidate| {
            let overload = &served.pool.overload;
            let owner = served.owner(c.owner);
            !owner.is_some_and(|owner| overload.is_over(&c.load, owner.capacity()))
        };
        let fine: Vec<Option<WorkerId>> = round
            .candidates
            .iter()
            .filter(is_fine)
            .map(worker)
            .collect();
        if fine.len() == round.candidates.len() {
            return;
        }
        self.keep(round, |c| fine.contains(&worker(c)));
    }

    /// Keeps some of the candidates, with what was read of them.
    fn keep(&mut self, round: &mut Round<'_>, is_kept: impl Fn(&Candidate) -> bool) {
        let read = std::mem::take(&mut self.read);
        let candidates = std::mem::take(&mut round.candidates).into_iter().zip(read);
        (round.candidates, self.read) = candidates.filter(|(c, _)| is_kept(c)).unzip();
    }

    /// Decides and books, loads having been read. Another VM may have read the same loads at the same
    /// time: where the lane shows that one was quicker, the choice has to stand against the load as it
    /// is then.
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
        self.leave_out_full(round);
        if round.candidates.is_empty() && round.is_full && !round.is_whole {
            // Those that were looked at are full; others may have room.
            let (served, ask) = (round.served, round.ask);
            let all = ask.owners.iter();
            let make = |owner: &usize| self.candidate(served, false, ask, *owner);
            round.candidates = all.map(make).collect();
            self.read_loads(host, round, None);
            self.leave_out_full(round);
        }
        let mut undone = 0;
        loop {
            let (scored, chosen) =
                decide::decide(&round.group(), &round.request, policy, &mut self.rng);
            let weighed = Weighed {
                demand,
                scored,
                chosen,
                typical_ms: round.request.typical_ms,
            };
            let picked = weighed.picked().map(|s| s.candidate);
            let booked = picked.and_then(|picked| {
                let place = round.served.place(picked.owner)?;
                let trusted = policy.trusted(round.request.trust);
                let prefill = picked.uncached_tokens(demand, &trusted);
                let size = (prefill, demand.blocks());
                let prompt = round.prompt.as_mut();
                let booking = bookings.hold(host, metrics, place, policy.tracking, size, prompt);
                Some((picked, place, booking))
            });
            let Some((picked, place, booking)) = booked else {
                return (weighed, None);
            };
            if round.is_over(host, picked.owner) {
                // Others were quicker: it has no room any more.
                if let Some(prompt) = &mut round.prompt {
                    prompt.again(host, booking.listing());
                }
                metrics.count(host, Event::Undone, 1);
                booking.undo(bookings, host);
                round.is_full = true;
                round.candidates.retain(|c| c.owner != picked.owner);
                self.read_loads(host, round, None);
                self.leave_out_full(round);
                continue;
            }
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

    /// Leaves out workers that have joined a moment ago, as often as their share is not whole yet,
    /// unless nobody else is there.
    fn warm(
        &mut self,
        host: &impl Host,
        served: &Served<'_>,
        candidates: Vec<Candidate>,
    ) -> Vec<Candidate> {
        let slow_start_ms = served.pool.slow_start_ms;
        if slow_start_ms == 0 {
            return candidates;
        }
        let now_ms = host.unix_ns() / 1_000_000;
        let takes_part = |candidate: &&Candidate| {
            let owner = served.owner(candidate.owner);
            let share = owner.map_or(1.0, |o| o.traits.share(slow_start_ms, now_ms));
            share >= 1.0 || self.rng.unit() < share
        };
        let taking: Vec<Candidate> = candidates.iter().filter(takes_part).copied().collect();
        if taking.is_empty() {
            return candidates;
        }
        taking
    }

    /// Takes those out of a round that have as many requests as they take. Loads have been read.
    fn leave_out_full(&mut self, round: &mut Round<'_>) {
        if !round.is_capped {
            return;
        }
        let served = round.served;
        let is_full = |c: &Candidate| {
            let owner = served.owner(c.owner);
            owner.is_some_and(|owner| owner.metadata.is_full(c.load.requests()))
        };
        if !round.candidates.iter().any(is_full) {
            return;
        }
        round.is_full = true;
        self.keep(round, |c| !is_full(c));
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
        let predicts_delay = round.served.pool.policy.predicts_delay();
        let now_ns = if predicts_delay { host.now_ns() } else { 0 };
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
            if let Some(place) = place.filter(|_| predicts_delay) {
                candidate.pace = place.lane.pace(host, now_ns);
                if let Some((owner, delta)) = booked
                    && owner == candidate.owner
                {
                    let own = Load::from_lanes(0_u64.wrapping_add_signed(delta.a), 0);
                    candidate.pace.finish_ms -=
                        f64::from(own.prefill_tokens) * candidate.pace.ms_per_token;
                }
                // The clock knows nothing of what other proxies have booked.
                let booked = lanes.load().prefill_tokens;
                let elsewhere = candidate.load.prefill_tokens.saturating_sub(booked);
                if elsewhere > 0 {
                    let takes = f64::from(elsewhere) * candidate.pace.ms_per_token;
                    candidate.pace.finish_ms = candidate.pace.finish_ms.max(0.0) + takes;
                }
            }
        }
    }

    /// What the chosen owner has to prefill goes into what prompts usually take.
    fn learn(&mut self, pool: &Pool, weighed: &Weighed) {
        let Some(Price::Delay(delay)) = weighed.picked().map(|s| s.cost) else {
            return;
        };
        if self.typical.len() >= MAX_TYPICAL && !self.typical.contains_key(&pool.key) {
            self.typical.clear();
        }
        let before = self.typical.get(&pool.key).copied();
        self.typical
            .insert(pool.key, delay::typical(before, delay.own));
    }

    /// Position of the best owner of another worker than the chosen one, for which the request need
    /// not be another.
    fn second(&mut self, served: &Served<'_>, weighed: &Weighed) -> Option<usize> {
        let endpoint = |owner: usize| Some(&served.owner(owner)?.endpoint);
        let chosen = weighed.chosen?;
        let first = weighed.picked()?.candidate.owner;
        let mode = served.pool.policy.mode;
        // The request says its rank, so it has to be the same one there.
        let elsewhere = |c: &Candidate| {
            endpoint(c.owner) != endpoint(first) && served.rank(c.owner) == served.rank(first)
        };
        let second = decide::second(&weighed.scored, chosen, mode, &mut self.rng, elsewhere)?;
        Some(weighed.scored.get(second)?.candidate.owner)
    }
}
