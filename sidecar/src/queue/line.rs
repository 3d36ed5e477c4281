//! The line of one pool: who waits in it and who was let go.

use std::collections::BTreeMap;
use std::sync::Arc;

use kv_core::id::{OwnerId, Role};
use kv_core::load::Load;
use kv_core::queue::{Class, Entry, PolicyQueue, Request, Verdict};
use kv_core::report::Queued;
use kv_core::table::{Owner, Pool};
use kv_core::tracker::ActiveLoad;

use crate::load::ProxyId;
use crate::metrics::{Metrics, OfClass, QueueOutcome};

/// How long a filter may take to book a request that was let go. After that it counts no more, and
/// is let go again if it waits still.
pub(super) const GRANT_NS: u64 = 2_000_000_000;
/// How long a request counts as having come before the queue was made, at most.
const EARLIEST_NS: u64 = 3_600_000_000_000;

/// A request that waits, over all proxies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Ticket {
    pub(super) vm: u64,
    pub(super) number: u64,
}

/// One pool's.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) pool: Arc<Pool>,
    /// `None` where no request waits.
    pub(super) queue: Option<PolicyQueue<Ticket>>,
    /// Where those that wait are held.
    pub(super) origins: BTreeMap<Ticket, Origin>,
    /// Those that were let go and are not booked yet.
    pub(super) granted: BTreeMap<Ticket, Grant>,
    /// Arrivals are counted from here.
    pub(super) origin_ns: u64,
}

#[derive(Clone, Debug)]
pub(super) struct Origin {
    pub(super) proxy: ProxyId,
    pub(super) mailbox: u8,
    pub(super) since_ns: u64,
    /// The class or family that its client named.
    pub(super) class: String,
    /// The owners that can take it; empty for any.
    pub(super) owners: Vec<OwnerId>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Grant {
    at_ns: u64,
    /// The owner on which it counts.
    owner: Option<OwnerId>,
    tokens: u32,
}

/// A verdict and whom it is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Letter {
    pub(super) proxy: ProxyId,
    pub(super) mailbox: u8,
    pub(super) vm: u64,
    pub(super) ticket: u64,
    pub(super) verdict: Verdict,
}

/// An owner with what it has to do and what it was promised.
#[derive(Clone, Copy, Debug)]
struct Seat<'a> {
    owner: &'a Owner,
    prefill_tokens: u64,
    requests: u32,
    is_overloaded: bool,
}

impl Line {
    pub(super) fn new(pool: &Arc<Pool>, now_ns: u64) -> Self {
        Self {
            pool: Arc::clone(pool),
            queue: pool.queue.clone().map(PolicyQueue::new),
            origins: BTreeMap::new(),
            granted: BTreeMap::new(),
            origin_ns: now_ns.saturating_sub(EARLIEST_NS),
        }
    }

    /// Follows the pool's classes.
    pub(super) fn rearrange(&mut self, now_ns: u64, letters: &mut Vec<Letter>, metrics: &Metrics) {
        metrics.queue_depth.clear();
        let before = std::mem::replace(self, Self::new(&self.pool, now_ns));
        let entries: Vec<Entry<Ticket>> = before
            .queue
            .iter()
            .flat_map(PolicyQueue::entries)
            .copied()
            .collect();
        self.origin_ns = before.origin_ns;
        self.granted = before.granted;
        let mut origins = before.origins;
        for Entry { id, request } in entries {
            let Some(origin) = origins.remove(&id) else {
                continue;
            };
            let class = self.pool.queue.as_ref();
            let class = class.map(|profile| profile.class_of(&origin.class, request.cost()));
            let request = Request {
                class: class.unwrap_or(0),
                ..request
            };
            self.push(id, origin, request, letters, metrics);
        }
    }

    pub(super) fn enter(
        &mut self,
        ticket: Ticket,
        origin: Origin,
        queued: &Queued,
        letters: &mut Vec<Letter>,
        metrics: &Metrics,
        now_ns: u64,
    ) {
        let uncached = queued.tokens.saturating_sub(queued.cached_tokens);
        let profile = self.pool.queue.as_ref();
        let class = profile.map_or(0, |profile| profile.class_of(&queued.class, uncached));
        let wait_ms = profile.map_or(0, |profile| profile.bounds.wait_ms);
        let since_ns = queued.since_ns.min(now_ns);
        let request = Request {
            class,
            owner: match queued.owners.as_slice() {
                [only] => Some(*only),
                _ => None,
            },
            tokens: queued.tokens,
            cached_tokens: queued.cached_tokens,
            arrival_s: seconds(since_ns.saturating_sub(self.origin_ns)),
            priority: queued.priority,
            strict: queued.strict,
            due_ns: (queued.due_ns > 0).then_some(queued.due_ns),
            until_ns: since_ns.saturating_add(wait_ms.saturating_mul(1_000_000)),
        };
        self.push(ticket, origin, request, letters, metrics);
    }

    fn push(
        &mut self,
        ticket: Ticket,
        origin: Origin,
        request: Request,
        letters: &mut Vec<Letter>,
        metrics: &Metrics,
    ) {
        let workers = self.workers();
        let Some(queue) = &mut self.queue else {
            letters.push(origin.letter(ticket, Verdict::Go));
            return;
        };
        let pushed = queue.push(ticket, request, workers);
        let outcome = pushed.map_or_else(|full| full.kind.name(), |()| "queued");
        count(metrics, &self.pool, queue, &request, outcome);
        match pushed {
            Ok(()) => {
                self.origins.insert(ticket, origin);
            }
            Err(full) => letters.push(origin.letter(ticket, Verdict::Full(full))),
        }
    }

    pub(super) fn withdraw(&mut self, ticket: Ticket, metrics: &Metrics) {
        self.origins.remove(&ticket);
        let Some(queue) = &mut self.queue else { return };
        if let Some(entry) = queue.remove(ticket) {
            count(metrics, &self.pool, queue, &entry.request, "left");
        }
    }

    pub(super) fn settle(
        &mut self,
        now_ns: u64,
        load: impl Fn(OwnerId) -> ActiveLoad,
        letters: &mut Vec<Letter>,
        metrics: &Metrics,
    ) {
        self.granted
            .retain(|_, grant| now_ns.saturating_sub(grant.at_ns) < GRANT_NS);
        let Some(queue) = &mut self.queue else { return };
        let pool = Arc::clone(&self.pool);
        for entry in queue.expire(now_ns) {
            count(metrics, &pool, queue, &entry.request, "late");
            if let Some(origin) = self.origins.remove(&entry.id) {
                letters.push(origin.letter(entry.id, Verdict::Late));
            }
        }
        if queue.is_empty() {
            return;
        }
        let mut seats = seats(&pool, load, &self.granted);
        loop {
            let origins = &self.origins;
            let next = queue.next(|class, entry| {
                let origin = origins.get(&entry.id);
                let mut able = seats.iter().filter(|seat| takes(origin, seat)).peekable();
                // Whom nobody can take, nobody will: what is wrong is told where it is routed.
                able.peek().is_none() || able.any(|seat| seat.has_room(class))
            });
            let Some(Entry { id, request }) = next else {
                return;
            };
            let class = queue.profile().classes().get(request.class);
            let Some(origin) = self.origins.remove(&id) else {
                continue;
            };
            let able = seats.iter_mut().filter(|seat| takes(Some(&origin), seat));
            let free = able.filter(|seat| class.is_some_and(|class| seat.has_room(class)));
            let seat = free.min_by_key(|seat| (seat.prefill_tokens, seat.requests));
            let tokens = request.cost();
            let owner = seat.map(|seat| {
                seat.prefill_tokens += u64::from(tokens);
                seat.requests += 1;
                seat.owner.id
            });
            let grant = Grant {
                at_ns: now_ns,
                owner,
                tokens,
            };
            self.granted.insert(id, grant);
            count(metrics, &pool, queue, &request, "granted");
            if let Some(class) = class {
                let waited = seconds(now_ns.saturating_sub(origin.since_ns));
                let label = label_of(&pool.name, class);
                metrics.queue_wait.get_or_create(&label).observe(waited);
            }
            letters.push(origin.letter(id, Verdict::Go));
        }
    }

    /// Workers that limits count by.
    fn workers(&self) -> u64 {
        let takes = |owner: &&Owner| owner.accepting && owner.role == Role::Aggregated;
        let workers = self.pool.owners.iter().filter(takes);
        let mut workers: Vec<u64> = workers.map(|owner| owner.id.worker).collect();
        workers.sort_unstable();
        workers.dedup();
        workers.len() as u64
    }

    pub(super) fn label(&self, class: &Class) -> OfClass {
        label_of(&self.pool.name, class)
    }
}

impl Origin {
    pub(super) fn letter(&self, ticket: Ticket, verdict: Verdict) -> Letter {
        Letter {
            proxy: self.proxy.clone(),
            mailbox: self.mailbox,
            vm: ticket.vm,
            ticket: ticket.number,
            verdict,
        }
    }
}

impl Seat<'_> {
    fn has_room(&self, class: &Class) -> bool {
        !self.is_overloaded
            && self
                .owner
                .has_room(class, self.prefill_tokens, self.requests)
    }
}

/// Owners that take requests, with their load and what was promised to requests that are not booked
/// yet.
fn seats<'a>(
    pool: &'a Pool,
    load: impl Fn(OwnerId) -> ActiveLoad,
    granted: &BTreeMap<Ticket, Grant>,
) -> Vec<Seat<'a>> {
    let takes = |owner: &&Owner| owner.accepting && owner.role == Role::Aggregated;
    let owners = pool.owners.iter().filter(takes);
    let mut seats: Vec<Seat<'_>> = owners
        .map(|owner| {
            let load = load(owner.id);
            Seat {
                owner,
                prefill_tokens: load.prefill_tokens,
                requests: load.waiting.saturating_add(load.decoding),
                is_overloaded: pool.overload.is_over(&narrow(&load), owner.capacity()),
            }
        })
        .collect();
    // A worker is overloaded where all its ranks are.
    let fine = seats.iter().filter(|seat| !seat.is_overloaded);
    let mut fine: Vec<u64> = fine.map(|seat| seat.owner.id.worker).collect();
    fine.sort_unstable();
    for seat in &mut seats {
        seat.is_overloaded &= fine.binary_search(&seat.owner.id.worker).is_err();
    }
    for grant in granted.values() {
        let seat = seats
            .iter_mut()
            .find(|seat| Some(seat.owner.id) == grant.owner);
        if let Some(seat) = seat {
            seat.prefill_tokens += u64::from(grant.tokens);
            seat.requests += 1;
        }
    }
    seats
}

fn takes(origin: Option<&Origin>, seat: &Seat<'_>) -> bool {
    origin.is_none_or(|origin| origin.owners.is_empty() || origin.owners.contains(&seat.owner.id))
}

fn narrow(load: &ActiveLoad) -> Load {
    Load {
        prefill_tokens: u32::try_from(load.prefill_tokens).unwrap_or(u32::MAX),
        blocks: u32::try_from(load.blocks).unwrap_or(u32::MAX),
        ..Load::default()
    }
}

fn label_of(pool: &str, class: &Class) -> OfClass {
    OfClass {
        pool: pool.to_owned(),
        class: class.name.clone(),
    }
}

/// Counts what became of a request.
fn count(
    metrics: &Metrics,
    pool: &Pool,
    queue: &PolicyQueue<Ticket>,
    request: &Request,
    outcome: &'static str,
) {
    let class = queue.profile().classes().get(request.class);
    let label = QueueOutcome {
        pool: pool.name.clone(),
        class: class.map(|class| class.name.clone()).unwrap_or_default(),
        outcome,
    };
    metrics.queue.get_or_create(&label).inc();
}

#[allow(clippy::cast_precision_loss)]
fn seconds(ns: u64) -> f64 {
    ns as f64 * 1e-9
}
