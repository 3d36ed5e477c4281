//! The queues of all pools: requests that filters hold because all workers are busy.
//!
//! Filters say who waits; who goes next is decided here, over all proxies, by the true load. A
//! request that was let go counts on the owner with most room until its filter says where it is
//! booked, so that what is free is given away once. Synchronous: time is Unix nanoseconds.

mod report;

use std::collections::BTreeMap;
use std::sync::Arc;

use kv_core::id::{OwnerId, Role};
use kv_core::load::Load;
use kv_core::queue::{Class, Entry, Mail, PolicyQueue, Request, Verdict};
use kv_core::report::{OwnerKey, Queued};
use kv_core::table::{Owner, Pool};
use kv_core::tracker::ActiveLoad;

use crate::load::ProxyId;
use crate::metrics::{Metrics, OfClass, QueueOutcome};
pub use report::{ClassReport, QueueReport};

/// How long a filter may take to book a request that was let go. After that it counts no more, and
/// is let go again if it waits still.
const GRANT_NS: u64 = 2_000_000_000;
/// How long a request counts as having come before the queue was made, at most.
const EARLIEST_NS: u64 = 3_600_000_000_000;

/// A request that waits, over all proxies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Ticket {
    vm: u64,
    number: u64,
}

/// All queues.
#[derive(Debug)]
pub struct Queues {
    lines: Vec<Line>,
    /// Verdicts that are to be told.
    letters: Vec<Letter>,
    metrics: Arc<Metrics>,
}

/// One pool's.
#[derive(Debug)]
struct Line {
    pool: Arc<Pool>,
    /// `None` where no request waits.
    queue: Option<PolicyQueue<Ticket>>,
    /// Where those that wait are held.
    origins: BTreeMap<Ticket, Origin>,
    /// Those that were let go and are not booked yet.
    granted: BTreeMap<Ticket, Grant>,
    /// Arrivals are counted from here.
    origin_ns: u64,
}

#[derive(Clone, Debug)]
struct Origin {
    proxy: ProxyId,
    mailbox: u8,
    since_ns: u64,
    /// The class or family that its client named.
    class: String,
    /// The owners that can take it; empty for any.
    owners: Vec<OwnerId>,
}

#[derive(Clone, Copy, Debug)]
struct Grant {
    at_ns: u64,
    /// The owner on which it counts.
    owner: Option<OwnerId>,
    tokens: u32,
}

/// A verdict and whom it is for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Letter {
    proxy: ProxyId,
    mailbox: u8,
    vm: u64,
    ticket: u64,
    verdict: Verdict,
}

/// Mail for a mailbox of a proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parcel {
    /// The proxy.
    pub proxy: ProxyId,
    /// Its mailbox.
    pub mailbox: u8,
    /// The mail.
    pub mail: Mail,
}

/// An owner with what it has to do and what it was promised.
#[derive(Clone, Copy, Debug)]
struct Seat<'a> {
    owner: &'a Owner,
    prefill_tokens: u64,
    requests: u32,
    is_overloaded: bool,
}

impl Queues {
    /// None.
    #[must_use]
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            lines: Vec::new(),
            letters: Vec::new(),
            metrics,
        }
    }

    /// Takes the worker table's pools over. Those who wait in a pool that has other classes are put
    /// in line again; where none waits any more, they go.
    pub fn serve(&mut self, pools: &[Arc<Pool>], now_ns: u64) {
        self.lines.truncate(pools.len());
        for (at, pool) in pools.iter().enumerate() {
            match self.lines.get_mut(at) {
                Some(line) => {
                    let is_same = line.pool.queue == pool.queue && line.pool.name == pool.name;
                    line.pool = Arc::clone(pool);
                    if !is_same {
                        line.rearrange(now_ns, &mut self.letters, &self.metrics);
                    }
                }
                None => self.lines.push(Line::new(pool, now_ns)),
            }
        }
    }

    /// A request of a proxy waits. One that is known waits still.
    pub fn enter(&mut self, proxy: &ProxyId, vm: u64, queued: &Queued, now_ns: u64) {
        let ticket = Ticket {
            vm,
            number: queued.ticket,
        };
        let origin = Origin {
            proxy: proxy.clone(),
            mailbox: queued.mailbox,
            since_ns: queued.since_ns,
            class: queued.class.clone(),
            owners: queued.owners.clone(),
        };
        let Some(line) = self.lines.get_mut(usize::from(queued.pool)) else {
            self.letters.push(origin.letter(ticket, Verdict::Go));
            return;
        };
        if let Some(known) = line.origins.get_mut(&ticket) {
            // Its VM may have another mailbox.
            *known = origin;
            return;
        }
        if line.granted.contains_key(&ticket) {
            // Its VM did not know yet when it said so; if the mail is lost, it will say so again.
            return;
        }
        line.enter(
            ticket,
            origin,
            queued,
            &mut self.letters,
            &self.metrics,
            now_ns,
        );
    }

    /// A request waits no more: it is booked, or gone.
    pub fn leave(&mut self, vm: u64, ticket: u64) {
        let ticket = Ticket { vm, number: ticket };
        for line in &mut self.lines {
            line.granted.remove(&ticket);
            line.withdraw(ticket, &self.metrics);
        }
    }

    /// Of a VM only those wait for which `waits` holds.
    pub fn retain(&mut self, vm: u64, waits: impl Fn(u64) -> bool) {
        let first = Ticket { vm, number: 0 };
        let last = Ticket {
            vm,
            number: u64::MAX,
        };
        for line in &mut self.lines {
            let own = line.origins.range(first..=last).map(|(ticket, _)| *ticket);
            let gone: Vec<Ticket> = own.filter(|ticket| !waits(ticket.number)).collect();
            for ticket in gone {
                line.withdraw(ticket, &self.metrics);
            }
        }
    }

    /// Nobody waits any more of VMs for which `is_there` does not hold.
    pub fn keep_vms(&mut self, is_there: impl Fn(u64) -> bool) {
        for line in &mut self.lines {
            let all = line.origins.keys().copied();
            let gone: Vec<Ticket> = all.filter(|ticket| !is_there(ticket.vm)).collect();
            for ticket in gone {
                line.withdraw(ticket, &self.metrics);
            }
        }
    }

    /// Lets those go for whom there is room, as the load is, and refuses those who have waited too
    /// long. Returns what is to be told.
    pub fn settle(&mut self, now_ns: u64, load: impl Fn(&OwnerKey) -> ActiveLoad) -> Vec<Parcel> {
        for (at, line) in (0..).zip(&mut self.lines) {
            let load = |id| load(&OwnerKey { pool: at, id });
            line.settle(now_ns, load, &mut self.letters, &self.metrics);
        }
        parcels(std::mem::take(&mut self.letters))
    }

    /// By pool, the classes in which requests wait, as bits.
    #[must_use]
    pub fn backlogs(&self) -> Vec<u64> {
        let classes = |line: &Line| {
            let queue = line.queue.as_ref()?;
            let classes = 0..queue.profile().classes().len();
            let waiting = classes.filter(|class| queue.usage(*class).requests > 0);
            Some(waiting.fold(0, |bits, class| bits | 1 << class))
        };
        let backlogs = self.lines.iter().map(|line| classes(line).unwrap_or(0));
        backlogs.collect()
    }

    /// Whether nobody waits and everybody who was let go is booked.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        let is_idle = |line: &Line| line.origins.is_empty() && line.granted.is_empty();
        self.letters.is_empty() && self.lines.iter().all(is_idle)
    }

    /// Shows how many wait.
    pub fn measure(&self) {
        for line in &self.lines {
            let Some(queue) = &line.queue else { continue };
            for (at, class) in queue.profile().classes().iter().enumerate() {
                let depth = queue.usage(at).requests;
                let gauge = self.metrics.queue_depth.get_or_create(&line.label(class));
                gauge.set(i64::try_from(depth).unwrap_or(i64::MAX));
            }
        }
    }
}

impl Line {
    fn new(pool: &Arc<Pool>, now_ns: u64) -> Self {
        Self {
            pool: Arc::clone(pool),
            queue: pool.queue.clone().map(PolicyQueue::new),
            origins: BTreeMap::new(),
            granted: BTreeMap::new(),
            origin_ns: now_ns.saturating_sub(EARLIEST_NS),
        }
    }

    /// Follows the pool's classes.
    fn rearrange(&mut self, now_ns: u64, letters: &mut Vec<Letter>, metrics: &Metrics) {
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

    fn enter(
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

    fn withdraw(&mut self, ticket: Ticket, metrics: &Metrics) {
        self.origins.remove(&ticket);
        let Some(queue) = &mut self.queue else { return };
        if let Some(entry) = queue.remove(ticket) {
            count(metrics, &self.pool, queue, &entry.request, "left");
        }
    }

    fn settle(
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

    fn label(&self, class: &Class) -> OfClass {
        label_of(&self.pool.name, class)
    }
}

impl Origin {
    fn letter(&self, ticket: Ticket, verdict: Verdict) -> Letter {
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

/// Verdicts for the same mailbox and VM together.
fn parcels(letters: Vec<Letter>) -> Vec<Parcel> {
    let mut parcels: Vec<Parcel> = Vec::new();
    for letter in letters {
        let Letter {
            proxy,
            mailbox,
            vm,
            ticket,
            verdict,
        } = letter;
        let same = parcels
            .iter_mut()
            .find(|p| p.mailbox == mailbox && p.mail.vm == vm && p.proxy == proxy);
        match same {
            Some(parcel) => parcel.mail.verdicts.push((ticket, verdict)),
            None => parcels.push(Parcel {
                proxy,
                mailbox,
                mail: Mail {
                    vm,
                    verdicts: vec![(ticket, verdict)],
                },
            }),
        }
    }
    parcels
}

#[allow(clippy::cast_precision_loss)]
fn seconds(ns: u64) -> f64 {
    ns as f64 * 1e-9
}

#[cfg(test)]
mod tests;
