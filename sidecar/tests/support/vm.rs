//! A filter VM's side of load: it books on gauges that it shares with the VMs of its process, and
//! says so in reports.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use kv_core::id::OwnerId;
use kv_core::ledger::Lanes;
use kv_core::load::{Delta, Leg, Load};
use kv_core::report::{Booked, Evidence, OwnerKey, Report, Step, Sum};
use kv_core::wire::Up;

/// Rank 0 of a worker of the first pool.
pub(crate) fn owner(worker: u64) -> OwnerKey {
    OwnerKey {
        pool: 0,
        id: OwnerId { worker, rank: 0 },
    }
}

/// The gauges of an Envoy process.
#[derive(Clone, Debug, Default)]
pub(crate) struct Gauges(Arc<Mutex<BTreeMap<OwnerKey, Lanes>>>);

impl Gauges {
    fn add(&self, owner: OwnerKey, delta: Delta) {
        let mut gauges = self.0.lock().unwrap();
        let lanes = gauges.entry(owner).or_default();
        lanes.a = lanes.a.wrapping_add_signed(delta.a);
        lanes.b = lanes.b.wrapping_add_signed(delta.b);
    }

    pub(crate) fn load(&self, owner: OwnerKey) -> Load {
        let gauges = self.0.lock().unwrap();
        gauges.get(&owner).copied().unwrap_or_default().load()
    }

    /// As the bridge shows them.
    pub(crate) fn shown(&self) -> Up {
        let gauges = self.0.lock().unwrap();
        let sum = |(owner, lanes): (&OwnerKey, &Lanes)| Sum {
            owner: *owner,
            a: lanes.a,
            b: lanes.b,
        };
        Up::Lanes(gauges.iter().map(sum).collect())
    }
}

struct Live {
    leg: Leg,
    booked: Booked,
}

/// A VM.
pub(crate) struct Vm {
    nonce: u64,
    sequence: u64,
    gauges: Gauges,
    sums: BTreeMap<OwnerKey, Sum>,
    touched: BTreeSet<OwnerKey>,
    steps: Vec<Step>,
    live: BTreeMap<u64, Live>,
}

impl Vm {
    pub(crate) fn new(nonce: u64, gauges: &Gauges) -> Self {
        Self {
            nonce,
            sequence: 0,
            gauges: gauges.clone(),
            sums: BTreeMap::new(),
            touched: BTreeSet::new(),
            steps: Vec::new(),
            live: BTreeMap::new(),
        }
    }

    fn add(&mut self, owner: OwnerKey, delta: Delta) {
        self.gauges.add(owner, delta);
        self.sums.entry(owner).or_insert(Sum::new(owner)).add(delta);
        self.touched.insert(owner);
    }

    /// Books a prompt of 16-token blocks.
    pub(crate) fn book(&mut self, request: u64, worker: u64, hashes: &[u64]) {
        self.book_with(request, worker, None, hashes, None);
    }

    pub(crate) fn book_with(
        &mut self,
        request: u64,
        worker: u64,
        prefix: Option<(u32, u64)>,
        hashes: &[u64],
        evidence: Option<Evidence>,
    ) {
        let rest = u32::try_from(hashes.len()).unwrap();
        let blocks = rest + prefix.map_or(0, |(depth, _)| depth);
        let booked = Booked {
            request,
            owner: owner(worker),
            decoding: false,
            prefill_tokens: 16 * rest,
            blocks,
            prefix,
            hashes: hashes.to_vec(),
            evidence,
            session: None,
        };
        let (leg, delta) = Leg::book(16 * rest, blocks);
        self.add(booked.owner, delta);
        self.steps.push(Step::Book(Box::new(booked.clone())));
        let booked = Booked {
            evidence: None,
            ..booked
        };
        self.live.insert(request, Live { leg, booked });
    }

    pub(crate) fn move_to(&mut self, request: u64, worker: u64) {
        let mut live = self.live.remove(&request).unwrap();
        let back = live.leg.release();
        self.add(live.booked.owner, back);
        live.booked.owner = owner(worker);
        let (leg, delta) = Leg::book(live.booked.prefill_tokens, live.booked.blocks);
        live.leg = leg;
        self.add(owner(worker), delta);
        let to = owner(worker);
        self.steps.push(Step::Move { request, to });
        self.live.insert(request, live);
    }

    /// Tells something that changes no lane.
    pub(crate) fn say(&mut self, step: Step) {
        self.steps.push(step);
    }

    pub(crate) fn first_token(&mut self, request: u64) {
        let live = self.live.get_mut(&request).unwrap();
        live.booked.decoding = true;
        let (owner, delta) = (live.booked.owner, live.leg.first_token());
        self.add(owner, delta);
        self.steps.push(Step::FirstToken { request });
    }

    pub(crate) fn free(&mut self, request: u64) {
        let mut live = self.live.remove(&request).unwrap();
        let delta = live.leg.release();
        self.add(live.booked.owner, delta);
        self.steps.push(Step::Free { request });
    }

    /// What happened since the last report.
    pub(crate) fn report(&mut self) -> Report {
        self.sequence += 1;
        let touched = std::mem::take(&mut self.touched);
        Report {
            vm: self.nonce,
            sequence: self.sequence,
            complete: false,
            sums: touched.iter().map(|owner| self.sums[owner]).collect(),
            steps: std::mem::take(&mut self.steps),
            ..Report::default()
        }
    }

    /// Everything.
    pub(crate) fn whole(&mut self) -> Report {
        self.sequence += 1;
        self.steps.clear();
        self.touched.clear();
        let book = |live: &Live| Step::Book(Box::new(live.booked.clone()));
        Report {
            vm: self.nonce,
            sequence: self.sequence,
            complete: true,
            sums: self.sums.values().copied().collect(),
            steps: self.live.values().map(book).collect(),
            ..Report::default()
        }
    }
}
