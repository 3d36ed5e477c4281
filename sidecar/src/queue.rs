//! The queues of all pools: requests that filters hold because all workers are busy.
//!
//! Filters say who waits; who goes next is decided here, over all proxies, by the true load. A
//! request that was let go counts on the owner with most room until its filter says where it is
//! booked, so that what is free is given away once. Synchronous: time is Unix nanoseconds.

mod line;
mod report;

use std::sync::Arc;

use kv_core::queue::{Mail, Verdict};
use kv_core::report::{OwnerKey, Queued};
use kv_core::table::Pool;
use kv_core::tracker::ActiveLoad;

use crate::load::ProxyId;
use crate::metrics::Metrics;
use line::{Letter, Line, Origin, Ticket};
pub use report::{ClassReport, QueueReport};

/// All queues.
#[derive(Debug)]
pub struct Queues {
    lines: Vec<Line>,
    /// Verdicts that are to be told.
    letters: Vec<Letter>,
    metrics: Arc<Metrics>,
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

#[cfg(test)]
mod tests;
