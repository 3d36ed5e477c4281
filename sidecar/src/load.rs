//! The true load of every owner, and what each proxy has to add to its lanes to see it.
//!
//! Every proxy has a ledger of what its VMs say they added to its lanes; one tracker holds the
//! bookings of all. What is told to a proxy is the tracker's load less the ledger's, so that lane
//! plus correction is the truth plus exactly what has not been reported yet. Synchronous: time is
//! milliseconds of any clock that doesn't go back.

mod correction;
mod news;
mod outcome;
mod prefix;
mod proxy;
mod view;

use std::collections::{BTreeMap, HashMap, HashSet};

use kv_core::id::{OwnerId, Slot};
use kv_core::ledger::{Continuity, Lanes};
use kv_core::report::{Booked, OwnerKey, Report, Step, Sum};
use kv_core::tracker::{ActiveLoad, Booking, BookingId, Change, Tracker, Tracking};

pub use news::News;
pub use outcome::Outcome;
use proxy::Proxy;
pub use proxy::ProxyId;
pub use view::{LoadReport, ProxyRequests, RawReport};

/// Bookings at a time, over all proxies.
const MAX_BOOKINGS: usize = 1 << 18;
/// How long a VM may be silent: it reports whole every 2 s.
const VM_SILENCE_MS: u64 = 5_000;
/// How long a proxy may be without a stream.
const PROXY_SILENCE_MS: u64 = 8_000;

/// Load as the sidecar is configured to track it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Which parts count.
    pub tracking: Tracking,
    /// After this time without any step a booking counts no more.
    pub expiry_ms: u64,
}

/// All proxies and bookings.
#[derive(Debug)]
pub struct Accounts {
    tracker: Tracker,
    proxies: BTreeMap<ProxyId, Proxy>,
    /// Owners of the worker table by pool, ascending by slot.
    owners: Vec<Vec<(Slot, OwnerId)>>,
    expiry_ms: u64,
    /// Number of the last write-off.
    write_offs: u64,
    /// Whether blocks count once however many requests use them, as boards have it.
    counts_distinct: bool,
    /// Whether corrections were found that may pass.
    is_unsettled: bool,
    /// By pool, the classes in which requests wait, as bits.
    backlogs: Vec<u64>,
    /// Whether blocks are predicted from bookings.
    predicts: bool,
}

/// The prompt of a booking, as far as it is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prompt {
    /// Leading blocks whose hashes are not known.
    pub start: u32,
    /// Sequence hashes of the blocks after them.
    pub hashes: Vec<u64>,
    /// Positions in `hashes` of blocks after which other prompts go on differently.
    pub branches: Vec<u32>,
}

/// What went because nobody claimed it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// VMs that fell silent, with their proxies.
    pub vms: Vec<(ProxyId, u64)>,
    /// Proxies that are gone.
    pub proxies: Vec<ProxyId>,
    /// Bookings of these.
    pub freed: usize,
    /// Bookings without any step for too long.
    pub expired: usize,
    /// Lanes that proxies are to take something out of that is nobody's.
    pub written_off: usize,
}

impl Accounts {
    /// Nobody and nothing.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self {
            tracker: Tracker::new(settings.tracking, MAX_BOOKINGS).with_journal(),
            proxies: BTreeMap::new(),
            owners: Vec::new(),
            expiry_ms: settings.expiry_ms,
            write_offs: 0,
            counts_distinct: settings.tracking.active_blocks && settings.tracking.kv_reuse,
            is_unsettled: false,
            backlogs: Vec::new(),
            predicts: false,
        }
    }

    /// Numbers write-offs from here on, apart from those of an earlier run that Envoy may hold.
    #[must_use]
    pub fn numbering_from(mut self, number: u64) -> Self {
        self.write_offs = number;
        self
    }

    /// Tracks what is booked from here on in another way.
    pub fn track(&mut self, settings: Settings) {
        self.tracker.track(settings.tracking);
        self.expiry_ms = settings.expiry_ms;
        self.counts_distinct = settings.tracking.active_blocks && settings.tracking.kv_reuse;
    }

    /// The owners of the worker table, by pool; those of a pool ascending by slot.
    pub fn serve(&mut self, owners: Vec<Vec<(Slot, OwnerId)>>) {
        self.owners = owners;
        for proxy in self.proxies.values_mut() {
            let is_known = |owner: &OwnerKey| {
                let pool = self.owners.get(usize::from(owner.pool));
                pool.is_some_and(|pool| pool.iter().any(|(_, id)| *id == owner.id))
            };
            proxy.ledger.keep(is_known);
        }
    }

    /// A proxy has a stream, which takes the place of any before it. `knows_its_own` where its VMs
    /// know of each other's live prompts.
    pub fn connected(&mut self, id: ProxyId, stream: u64, knows_its_own: bool, now_ms: u64) {
        let proxy = self.proxies.entry(id).or_default();
        proxy.connect(stream, knows_its_own, now_ms);
    }

    /// The filter on a stream takes out of the lanes what it is told to.
    pub fn writes_off(&mut self, stream: u64) {
        if let Some((_, proxy)) = self.proxy(stream) {
            proxy.writes_off = true;
        }
    }

    /// A stream is over.
    pub fn disconnected(&mut self, stream: u64, now_ms: u64) {
        if let Some((_, proxy)) = self.proxy(stream) {
            proxy.disconnect(now_ms);
        }
    }

    /// The proxy that has a stream.
    #[must_use]
    pub fn proxy_of(&self, stream: u64) -> Option<&ProxyId> {
        let mut proxies = self.proxies.iter();
        let found = proxies.find(|(_, proxy)| proxy.stream == Some(stream));
        found.map(|(id, _)| id)
    }

    /// The stream of a proxy.
    #[must_use]
    pub fn stream_of(&self, proxy: &ProxyId) -> Option<u64> {
        self.proxies.get(proxy)?.stream
    }

    /// VMs of all proxies.
    pub fn vms(&self) -> impl Iterator<Item = u64> + '_ {
        self.proxies.values().flat_map(|proxy| proxy.ledger.vms())
    }

    fn proxy(&mut self, stream: u64) -> Option<(&ProxyId, &mut Proxy)> {
        let is_its = |(_, proxy): &(&ProxyId, &mut Proxy)| proxy.stream == Some(stream);
        self.proxies.iter_mut().find(is_its)
    }

    /// Enters a report's sums; a complete one frees the VM's bookings that it doesn't list. The
    /// steps of one that isn't repeated are to be applied next. `None` where no proxy has this
    /// stream.
    pub fn report(&mut self, stream: u64, report: &Report, now_ms: u64) -> Option<Continuity> {
        let (_, proxy) = self.proxy(stream)?;
        let continuity = proxy.ledger.report(report, now_ms);
        if report.complete && continuity != Continuity::Repeated {
            let listed = report.steps.iter().filter_map(|step| match step {
                Step::Book(booked) => Some(booked.request),
                _ => None,
            });
            let listed: HashSet<u64> = listed.collect();
            self.tracker
                .retain(report.vm, |request| listed.contains(&request));
        }
        Some(continuity)
    }

    /// Applies a booking of a VM.
    pub fn book(&mut self, vm: u64, booked: &Booked, prompt: Prompt, now_ms: u64) -> Outcome {
        let id = booking_id(vm, booked.request);
        if let Some((owner, booking)) = self.tracker.get(&id) {
            let is_first_token = booked.decoding && !booking.decoding;
            let named = u32::try_from(booking.hashes.len()).unwrap_or(u32::MAX);
            let counted = booking.private_blocks.saturating_add(named);
            // A step that was lost may have told of these.
            let grown = booked.blocks.saturating_sub(counted);
            if grown > 0 {
                self.tracker.grow(&id, grown, 1.0, now_ms);
            }
            self.tracker.touch(&id, now_ms);
            if owner != booked.owner {
                self.tracker.relocate(&id, booked.owner, now_ms);
            }
            if is_first_token {
                self.tracker.first_token(&id, now_ms);
            }
            return Outcome::Kept;
        }
        let known = u32::try_from(prompt.hashes.len()).unwrap_or(u32::MAX);
        let booking = Booking {
            prefill_tokens: booked.prefill_tokens,
            decoding: booked.decoding,
            start: prompt.start,
            private_blocks: booked.blocks.saturating_sub(known),
            hashes: prompt.hashes,
            branches: prompt.branches,
        };
        match self.tracker.book(id, booked.owner, booking, now_ms) {
            Ok(()) => Outcome::Booked,
            Err(error) => Outcome::Refused(error),
        }
    }

    /// Applies any other step of a VM.
    pub fn step(&mut self, vm: u64, step: &Step, now_ms: u64) -> Outcome {
        let tracker = &mut self.tracker;
        let id = |request: &u64| booking_id(vm, *request);
        let (is_booked, outcome) = match step {
            Step::Book(booked) => {
                return self.book(vm, booked, Prompt::default(), now_ms);
            }
            Step::Move { request, to } => {
                let moved = tracker.relocate(&id(request), *to, now_ms);
                (moved, Outcome::Moved)
            }
            Step::FirstToken { request } => {
                let came = tracker.first_token(&id(request), now_ms);
                (came, Outcome::FirstToken)
            }
            Step::Prefilled { request } => {
                let is_booked = tracker.first_token(&id(request), now_ms);
                (is_booked, Outcome::Prefilled)
            }
            Step::Grown {
                request,
                blocks,
                left,
            } => {
                let grown = tracker.grow(&id(request), *blocks, *left, now_ms);
                (grown, Outcome::Grown)
            }
            Step::Free { request } => (tracker.free(&id(request)), Outcome::Freed),
            Step::Cached { request, .. } => (tracker.get(&id(request)).is_some(), Outcome::Cached),
            Step::Failed { .. } => (true, Outcome::Failed),
            // The ledger has taken them already.
            Step::WrittenOff(_) | Step::Leave => (true, Outcome::OfVm),
            Step::Queued(_) => (true, Outcome::Queued),
            Step::Unqueued { .. } => (true, Outcome::Unqueued),
        };
        if is_booked { outcome } else { Outcome::Unknown }
    }

    /// Compares a proxy's lanes with its ledger, and names what had leaked.
    pub fn lanes(&mut self, stream: u64, shown: &[Sum], now_ms: u64) -> Vec<(OwnerKey, Lanes)> {
        let Some((_, proxy)) = self.proxy(stream) else {
            return Vec::new();
        };
        let compare = |sum: &Sum| {
            let lanes = Lanes { a: sum.a, b: sum.b };
            let leak = proxy.ledger.compare(sum.owner, lanes, now_ms)?;
            Some((sum.owner, leak))
        };
        shown.iter().filter_map(compare).collect()
    }

    /// Drops what nobody has claimed for too long.
    pub fn sweep(&mut self, now_ms: u64) -> Swept {
        let mut swept = Swept::default();
        let mut orphans = Vec::new();
        for (id, proxy) in &mut self.proxies {
            for retired in proxy.retire(now_ms, VM_SILENCE_MS, self.expiry_ms) {
                orphans.push(retired.vm);
                if !retired.was_leaving {
                    swept.vms.push((id.clone(), retired.vm));
                }
            }
            swept.written_off += proxy.write_off(now_ms, || {
                self.write_offs += 1;
                self.write_offs
            });
        }
        self.proxies.retain(|id, proxy| {
            let stays = !proxy.is_gone(now_ms, PROXY_SILENCE_MS);
            if !stays {
                orphans.extend(proxy.ledger.vms());
                swept.proxies.push(id.clone());
            }
            stays
        });
        for vm in orphans {
            swept.freed += self.tracker.retain(vm, |_| false);
        }
        let idle_since = now_ms.saturating_sub(self.expiry_ms);
        swept.expired = self.tracker.expire(idle_since);
        swept
    }

    /// By pool, the classes in which requests wait, as bits. Whether they are others than before.
    pub fn set_backlogs(&mut self, backlogs: Vec<u64>) -> bool {
        let is_changed = self.backlogs != backlogs;
        self.backlogs = backlogs;
        is_changed
    }

    /// Whether blocks are predicted from bookings, so that those have to be known soon.
    pub fn set_predicting(&mut self, predicts: bool) {
        self.predicts = predicts;
    }

    /// Whether more is to be told although nothing changes.
    #[must_use]
    pub fn is_unsettled(&self) -> bool {
        self.is_unsettled
    }

    /// What has changed since it was last taken.
    pub fn take_journal(&mut self) -> Vec<Change> {
        self.tracker.take_journal()
    }

    /// A tracker to make the same changes in: what does not count is not among them.
    #[must_use]
    pub fn replica() -> Tracker {
        let all = Tracking {
            output_blocks: true,
            ..Tracking::default()
        };
        Tracker::new(all, MAX_BOOKINGS)
    }

    /// All bookings.
    #[must_use]
    pub(crate) fn tracker(&self) -> &Tracker {
        &self.tracker
    }

    /// All bookings, for those that are no proxy's.
    pub(crate) fn tracker_mut(&mut self) -> &mut Tracker {
        &mut self.tracker
    }

    /// The true load of an owner.
    #[must_use]
    pub fn load(&self, owner: &OwnerKey) -> ActiveLoad {
        self.tracker.load(owner)
    }

    /// Where a booking whose whole prompt is known is, and the blocks of its prompt.
    #[must_use]
    pub fn prompt(&self, vm: u64, request: u64) -> Option<(OwnerKey, &[u64])> {
        let (owner, booking) = self.tracker.get(&booking_id(vm, request))?;
        (booking.start == 0).then_some((owner, &booking.hashes))
    }

    /// The owner of a booking.
    #[must_use]
    pub fn owner(&self, vm: u64, request: u64) -> Option<OwnerKey> {
        let (owner, _) = self.tracker.get(&booking_id(vm, request))?;
        Some(owner)
    }

    /// Whether some proxy reports its load.
    #[must_use]
    pub fn is_reported(&self) -> bool {
        !self.proxies.is_empty()
    }

    /// Bookings.
    #[must_use]
    pub fn bookings(&self) -> usize {
        self.tracker.len()
    }

    /// Requests on each owner by the proxy that booked them.
    #[must_use]
    pub fn requests(&self) -> HashMap<OwnerKey, BTreeMap<&ProxyId, u32>> {
        let vms = self.proxies.iter().flat_map(|(id, proxy)| {
            let vms = proxy.ledger.vms();
            vms.map(move |vm| (vm, id))
        });
        let vms: HashMap<u64, &ProxyId> = vms.collect();
        let mut requests: HashMap<OwnerKey, BTreeMap<&ProxyId, u32>> = HashMap::new();
        for (id, owner, _) in self.tracker.bookings() {
            if let Some(proxy) = vms.get(&id.source) {
                *requests.entry(owner).or_default().entry(proxy).or_default() += 1;
            }
        }
        requests
    }
}

fn booking_id(vm: u64, request: u64) -> BookingId {
    BookingId {
        source: vm,
        request,
    }
}

#[cfg(test)]
mod tests;
