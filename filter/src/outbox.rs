//! What this VM has yet to tell the sidecar, and how it does: encoded reports in the shared queue
//! that the bridge empties.

use hashbrown::HashMap;
use kv_core::key;
use kv_core::report::{Booked, MAX_STEPS, OwnerKey, Report, Step, Sum};
use kv_core::wire::{self, QUEUE};

use crate::host::{Host, Queue};
use crate::metrics::{Event, Metrics};

/// Steps come at least this far apart in reports, unless a report is full: where others have to
/// know soon. A report is a message to the sidecar, which costs Envoy more than all else that a step
/// takes.
const SOON_NS: u64 = 1_000_000;
/// The same of what only lightens a load: it waits as long as the sidecar takes to tell other
/// proxies of it, and mostly comes with the next booking.
const LATER_NS: u64 = 5_000_000;
/// The same of bookings and all later steps where no other proxy is there to know of them.
const ALONE_NS: u64 = 20_000_000;
/// A complete report comes at least this often.
const COMPLETE_NS: u64 = 2_000_000_000;
/// A VM that ends says so at most this often while it has requests.
const LEAVE_NS: u64 = 1_000_000_000;
/// Steps that wait for a queue, at most.
const MAX_WAITING: usize = 4096;
/// Their encoded size, at most, in bytes.
const MAX_WAITING_BYTES: usize = 1 << 20;
/// Aim for the encoded size of one report, in bytes.
const REPORT_BYTES: usize = 24 << 10;
/// Encoded size of the hashes in a complete report, at most, in bytes: in one that a sidecar needs,
/// and in one that repeats what it knows. Bookings past it are listed by their number of blocks.
const COMPLETE_BYTES: (usize, usize) = (1 << 20, 64 << 10);
/// Encoded size of a sequence hash, at most, in bytes.
const HASH_BYTES: usize = 10;

/// Sums by owner.
pub type Sums = HashMap<OwnerKey, Sum>;

/// Position of a pool that has left the worker table: its owners are not reported.
pub const NO_POOL: u16 = u16::MAX;

/// A step and when it happened, Unix nanoseconds.
#[derive(Debug)]
struct Timed {
    at_ns: u64,
    step: Step,
}

/// Steps that wait, and how far the sidecar has been told.
#[derive(Debug, Default)]
pub struct Outbox {
    vm: u64,
    /// Number of the last report.
    sequence: u64,
    steps: Vec<Timed>,
    bytes: usize,
    /// Owners whose sums have changed since they were last reported.
    touched: Vec<OwnerKey>,
    /// Whether others have to know soon of a step that waits.
    is_urgent: bool,
    /// Whether requests wait for what lightens a load.
    is_awaited: bool,
    /// Whether no other proxy books on the same owners.
    is_alone: bool,
    /// Whether a complete report was made that nothing has called into question since.
    whole: bool,
    completed_ns: u64,
    sent_ns: u64,
    /// When it was last said that the VM ends.
    left_ns: u64,
    /// Number of the bridge's stream that the last complete report was made for.
    stream: Vec<u8>,
    queue: Option<Queue>,
}

impl Outbox {
    /// Names the VM.
    pub fn set_vm(&mut self, vm: u64) {
        self.vm = vm;
    }

    /// Whether something waits to be reported.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        !(self.steps.is_empty() && self.touched.is_empty())
    }

    /// Whether requests wait for what lightens a load: then it is reported at once.
    pub fn set_awaited(&mut self, is_awaited: bool) {
        self.is_awaited = is_awaited;
    }

    /// Whether no other proxy books on the same owners: then bookings can wait.
    pub fn set_alone(&mut self, is_alone: bool) {
        self.is_alone = is_alone;
    }

    /// An owner's sum has changed.
    pub fn touch(&mut self, owner: OwnerKey) {
        if !self.touched.contains(&owner) {
            self.touched.push(owner);
        }
    }

    /// Something has happened at `at_ns`, Unix nanoseconds.
    pub fn push(&mut self, host: &impl Host, metrics: &mut Metrics, step: Step, at_ns: u64) {
        let bytes = size(&step);
        if self.steps.len() >= MAX_WAITING || self.bytes + bytes > MAX_WAITING_BYTES {
            let lost = u32::try_from(self.steps.len() + 1).unwrap_or(u32::MAX);
            metrics.count(host, Event::StepDropped, lost);
            self.forget();
            return;
        }
        self.bytes += bytes;
        self.is_urgent |= is_urgent(&step, self.is_alone);
        self.steps.push(Timed { at_ns, step });
    }

    /// Drops what waits; a complete report makes up for it.
    pub fn forget(&mut self) {
        self.steps = Vec::new();
        self.bytes = 0;
        self.is_urgent = false;
        self.whole = false;
    }

    /// Reports what waits, if it is time to.
    pub fn settle(&mut self, host: &impl Host, sums: &Sums) {
        let now_ns = host.now_ns();
        let spacing_ns = match (self.is_awaited, self.is_urgent, self.is_alone) {
            (true, ..) => 0,
            (_, true, _) => SOON_NS,
            (.., true) => ALONE_NS,
            _ => LATER_NS,
        };
        let is_full = self.steps.len() >= MAX_STEPS || self.bytes >= REPORT_BYTES;
        if is_full || now_ns.saturating_sub(self.sent_ns) >= spacing_ns {
            self.flush(host, sums, now_ns);
        }
    }

    /// Reports what waits, and everything when that is due. Whether a complete report was made.
    pub fn tick<'a>(
        &mut self,
        host: &impl Host,
        sums: &Sums,
        live: impl Iterator<Item = &'a Booked>,
        state: impl Iterator<Item = Step>,
    ) -> bool {
        let now_ns = host.now_ns();
        if !self.flush(host, sums, now_ns) {
            return false;
        }
        let stream = host.shared(&key::STREAM).map(|shared| shared.bytes);
        let stream = stream.unwrap_or_default();
        let is_needed = !self.whole || stream != self.stream;
        let is_due = is_needed || now_ns.saturating_sub(self.completed_ns) >= COMPLETE_NS;
        if !is_due {
            return false;
        }
        let (needed, repeated) = COMPLETE_BYTES;
        let budget = if is_needed { needed } else { repeated };
        let mut steps = whole(live, budget);
        steps.extend(state);
        if !self.complete(host, sums, steps, now_ns) {
            return false;
        }
        self.whole = true;
        self.completed_ns = now_ns;
        self.stream = stream;
        true
    }

    /// Reports what waits, and that the VM ends with the requests it has: once a second, and when
    /// it has none.
    pub fn leave<'a>(
        &mut self,
        host: &impl Host,
        sums: &Sums,
        live: impl Iterator<Item = &'a Booked>,
        state: impl Iterator<Item = Step>,
    ) {
        let now_ns = host.now_ns();
        self.flush(host, sums, now_ns);
        let (_, budget) = COMPLETE_BYTES;
        let mut live = live.peekable();
        let is_due = now_ns.saturating_sub(self.left_ns) >= LEAVE_NS;
        if live.peek().is_some() && !is_due {
            return;
        }
        self.left_ns = now_ns;
        let mut steps = whole(live, budget);
        steps.extend(state.chain([Step::Leave]));
        // Where nobody takes it, the VM is missed after a while.
        self.complete(host, sums, steps, now_ns);
    }

    fn complete(&mut self, host: &impl Host, sums: &Sums, steps: Vec<Step>, now_ns: u64) -> bool {
        let known = sums.values().filter(|s| is_known(s.owner));
        let report = Report {
            vm: self.vm,
            sequence: self.sequence + 1,
            complete: true,
            at_ns: host.unix_ns(),
            sums: known.copied().collect(),
            steps,
            ..Report::default()
        };
        self.send(host, &report.with_besides(), now_ns)
    }

    /// Reports all that waits. `false` if it could not.
    pub fn flush(&mut self, host: &impl Host, all: &Sums, now_ns: u64) -> bool {
        while self.is_pending() {
            let count = self.fitting();
            let is_last = count == self.steps.len();
            // Sums are at least as new as the steps they come with.
            let sums = self
                .touched
                .iter()
                .filter(|owner| is_last && is_known(**owner));
            let sums = sums.map(|owner| sum(all, *owner)).collect();
            let at_ns = host.unix_ns();
            let age = |timed: Timed| (timed.step, at_ns.saturating_sub(timed.at_ns));
            let (steps, ages_ns) = self.steps.drain(..count).map(age).unzip();
            let report = Report {
                vm: self.vm,
                sequence: self.sequence + 1,
                complete: false,
                at_ns,
                sums,
                steps,
                ages_ns,
                ..Report::default()
            };
            let report = report.with_besides();
            if !self.send(host, &report, now_ns) {
                let timed = report.steps.into_iter().zip(report.ages_ns);
                let timed = timed.map(|(step, age)| Timed {
                    at_ns: at_ns.saturating_sub(age),
                    step,
                });
                self.steps.splice(..0, timed);
                return false;
            }
            self.bytes = self
                .bytes
                .saturating_sub(report.steps.iter().map(size).sum());
            if is_last {
                self.touched.clear();
                self.is_urgent = false;
            }
        }
        true
    }

    /// Steps at the front that one report takes: at least one, if there are any.
    fn fitting(&self) -> usize {
        let mut bytes = 0;
        let fits = |timed: &&Timed| {
            bytes += size(&timed.step);
            bytes <= REPORT_BYTES
        };
        let fitting = self.steps.iter().take(MAX_STEPS).take_while(fits).count();
        fitting.max(1).min(self.steps.len())
    }

    fn send(&mut self, host: &impl Host, report: &Report, now_ns: u64) -> bool {
        // Until a bridge has registered the queue there is none.
        self.queue = self.queue.or_else(|| host.resolve_queue(QUEUE));
        let Some(queue) = self.queue else {
            return false;
        };
        if !host.enqueue(queue, &wire::encode(report)) {
            self.queue = None;
            return false;
        }
        self.sequence = report.sequence;
        self.sent_ns = now_ns;
        true
    }
}

fn is_known(owner: OwnerKey) -> bool {
    owner.pool != NO_POOL
}

/// The sum of an owner; one that is not kept is zero.
fn sum(sums: &Sums, owner: OwnerKey) -> Sum {
    sums.get(&owner).copied().unwrap_or_else(|| Sum::new(owner))
}

/// All live bookings as steps, with so many bytes of hashes.
fn whole<'a>(live: impl Iterator<Item = &'a Booked>, budget: usize) -> Vec<Step> {
    let mut bytes = 0;
    let mut book = |booked: &Booked| {
        bytes += booked.hashes.len() * HASH_BYTES;
        let named = bytes <= budget;
        Step::Book(Box::new(Booked {
            prefix: booked.prefix.filter(|_| named),
            hashes: if named {
                booked.hashes.clone()
            } else {
                Vec::new()
            },
            evidence: None,
            ..*booked
        }))
    };
    live.filter(|booked| is_known(booked.owner))
        .map(&mut book)
        .collect()
}

/// Whether others have to know soon: a step adds to a load, or says that something is wrong.
fn is_urgent(step: &Step, is_alone: bool) -> bool {
    match step {
        Step::Book(_) => !is_alone,
        Step::Move { .. }
        | Step::Failed { .. }
        | Step::WrittenOff(_)
        | Step::Queued(_)
        | Step::Leave => true,
        Step::FirstToken { .. }
        | Step::Free { .. }
        | Step::Cached { .. }
        | Step::Prefilled { .. }
        | Step::Unqueued { .. }
        | Step::Grown { .. } => false,
    }
}

/// Encoded size of a step, about, in bytes.
fn size(step: &Step) -> usize {
    const FIXED: usize = 32;
    const CANDIDATE: usize = 64;
    match step {
        Step::Book(booked) => {
            let evidence = booked.evidence.as_ref();
            let candidates = evidence.map_or(0, |e| e.candidates.len());
            let asked = evidence.map_or(0, |e| e.constraints.size());
            2 * FIXED + booked.hashes.len() * HASH_BYTES + candidates * CANDIDATE + asked
        }
        Step::Queued(queued) => {
            const OWNER: usize = 12;
            2 * FIXED + queued.class.len() + queued.owners.len() * OWNER
        }
        Step::Move { .. }
        | Step::Unqueued { .. }
        | Step::FirstToken { .. }
        | Step::Free { .. }
        | Step::Cached { .. }
        | Step::Prefilled { .. }
        | Step::Grown { .. }
        | Step::Failed { .. }
        | Step::WrittenOff(_)
        | Step::Leave => FIXED,
    }
}
