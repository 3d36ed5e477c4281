//! Who is let go, refused and forgotten.

use std::collections::HashMap;

use kv_core::id::{OwnerId, Role, Slot};
use kv_core::queue::{Class, Limits, Order, Profile};
use kv_core::table::{Metadata, Owner, Traits};

use super::line::GRANT_NS;
use super::*;
use kv_core::queue::Full;

const SECOND: u64 = 1_000_000_000;
const NOW: u64 = 1_700_000_000 * SECOND;

fn id(worker: u64) -> OwnerId {
    OwnerId { worker, rank: 0 }
}

fn pool(workers: u64, class: Class) -> Arc<Pool> {
    let owner = |worker| Owner {
        slot: Slot(u16::try_from(worker).unwrap()),
        id: id(worker),
        role: Role::Aggregated,
        endpoint: String::new(),
        accepting: true,
        traits: Traits::default(),
        metadata: Metadata::default(),
    };
    Arc::new(Pool {
        name: "p".into(),
        queue: Some(Profile::single(class)),
        owners: (0..workers).map(owner).collect(),
        ..Pool::default()
    })
}

fn class() -> Class {
    Class {
        busy_tokens: Some(100),
        ..Class::new("default")
    }
}

struct Bench {
    queues: Queues,
    loads: HashMap<OwnerKey, u64>,
    now_ns: u64,
}

impl Bench {
    fn new(pool: &Arc<Pool>) -> Self {
        let mut queues = Queues::new(Arc::default());
        queues.serve(std::slice::from_ref(pool), NOW);
        Self {
            queues,
            loads: HashMap::new(),
            now_ns: NOW,
        }
    }

    fn load(&mut self, worker: u64, prefill_tokens: u64) {
        let owner = OwnerKey {
            pool: 0,
            id: id(worker),
        };
        self.loads.insert(owner, prefill_tokens);
    }

    fn wait(&mut self, vm: u64, ticket: u64, change: impl FnOnce(&mut Queued)) {
        let mut queued = Queued {
            ticket,
            mailbox: u8::try_from(vm).unwrap(),
            tokens: 60,
            since_ns: self.now_ns,
            ..Queued::default()
        };
        change(&mut queued);
        self.queues.enter(&proxy(vm), vm, &queued, self.now_ns);
    }

    /// Verdicts by VM and ticket.
    fn settle(&mut self) -> Vec<(u64, u64, Verdict)> {
        let loads = &self.loads;
        let load = |owner: &OwnerKey| ActiveLoad {
            prefill_tokens: loads.get(owner).copied().unwrap_or(0),
            ..ActiveLoad::default()
        };
        let parcels = self.queues.settle(self.now_ns, load);
        let verdicts = parcels.into_iter().flat_map(|parcel| {
            assert_eq!(u64::from(parcel.mailbox), parcel.mail.vm);
            assert_eq!(parcel.proxy, proxy(parcel.mail.vm));
            let vm = parcel.mail.vm;
            let verdicts = parcel.mail.verdicts.into_iter();
            verdicts.map(move |(ticket, verdict)| (vm, ticket, verdict))
        });
        verdicts.collect()
    }
}

fn proxy(vm: u64) -> ProxyId {
    ProxyId {
        process: vm,
        vm_id: "v".into(),
    }
}

#[test]
fn what_is_free_is_given_away_once() {
    let mut bench = Bench::new(&pool(2, class()));
    bench.load(0, 101);
    bench.load(1, 101);
    for ticket in 1..=4 {
        bench.wait(1, ticket, |_| {});
    }
    assert_eq!(bench.settle(), []);
    assert_eq!(bench.queues.backlogs(), [1]);
    bench.load(1, 0);
    // 0, 60 and 120 tokens: two fit.
    let go = |ticket| (1, ticket, Verdict::Go);
    assert_eq!(bench.settle(), [go(1), go(2)]);
    assert_eq!(bench.settle(), []);
    // Both are booked.
    bench.load(1, 120);
    bench.queues.leave(1, 1);
    bench.queues.leave(1, 2);
    assert_eq!(bench.settle(), []);
    bench.load(1, 60);
    assert_eq!(bench.settle(), [go(3)]);
    // It is never booked, and says after a while that it waits still.
    bench.now_ns += GRANT_NS;
    bench.load(1, 0);
    assert_eq!(bench.settle(), [go(4)]);
    bench.wait(1, 3, |_| {});
    assert_eq!(bench.settle(), [go(3)]);
    bench.queues.leave(1, 3);
    bench.queues.leave(1, 4);
    assert!(bench.queues.is_idle());
    assert_eq!(bench.queues.backlogs(), [0]);
}

#[test]
fn priorities_hold_over_vms_and_arrival_decides_within() {
    let mut bench = Bench::new(&pool(1, class()));
    bench.load(0, 500);
    bench.wait(2, 1, |q| q.since_ns -= SECOND);
    bench.wait(1, 1, |q| q.since_ns -= 3 * SECOND);
    bench.wait(1, 2, |q| q.priority = 4.0);
    bench.wait(3, 9, |q| q.strict = 1);
    bench.load(0, 0);
    let mut order = Vec::new();
    for _ in 0..4 {
        let verdicts = bench.settle();
        bench.load(0, 101);
        for (vm, ticket, _) in verdicts {
            bench.queues.leave(vm, ticket);
            order.push((vm, ticket));
        }
        bench.load(0, 50);
    }
    assert_eq!(order, [(3, 9), (1, 2), (1, 1), (2, 1)]);
}

#[test]
fn who_waits_too_long_or_too_many_is_refused() {
    let limits = Limits {
        requests: Some(2),
        ..Limits::default()
    };
    let mut bench = Bench::new(&pool(
        1,
        Class {
            limits,
            order: Order::Lcfs,
            ..class()
        },
    ));
    bench.load(0, 500);
    bench.wait(1, 1, |_| {});
    bench.wait(1, 2, |q| q.due_ns = NOW + SECOND);
    bench.wait(2, 1, |_| {});
    let full = Full {
        kind: kv_core::queue::Limit::Requests,
        current: 2,
        limit: 2,
    };
    assert_eq!(bench.settle(), [(2, 1, Verdict::Full(full))]);
    bench.now_ns += SECOND;
    assert_eq!(bench.settle(), [(1, 2, Verdict::Late)]);
    bench.now_ns += 29 * SECOND;
    assert_eq!(bench.settle(), [(1, 1, Verdict::Late)]);
    assert!(bench.queues.is_idle());
}

#[test]
fn a_request_for_one_worker_waits_for_it_and_holds_up_nobody() {
    let mut bench = Bench::new(&pool(2, class()));
    bench.load(0, 500);
    bench.load(1, 500);
    bench.wait(1, 1, |q| q.owners = vec![id(0)]);
    bench.wait(1, 2, |_| {});
    bench.wait(1, 3, |q| q.owners = vec![id(7)]);
    bench.load(1, 0);
    // Nobody can ever take the third: it goes, to be told so.
    assert_eq!(bench.settle(), [(1, 2, Verdict::Go), (1, 3, Verdict::Go)]);
    bench.load(0, 0);
    assert_eq!(bench.settle(), [(1, 1, Verdict::Go)]);
}

#[test]
fn vms_that_are_gone_wait_no_more_and_complete_reports_count() {
    let mut bench = Bench::new(&pool(1, class()));
    bench.load(0, 500);
    for (vm, ticket) in [(1, 1), (1, 2), (2, 1), (3, 1)] {
        bench.wait(vm, ticket, |_| {});
    }
    bench.queues.retain(1, |ticket| ticket == 2);
    bench.queues.keep_vms(|vm| vm != 3);
    bench.load(0, 0);
    let go = |vm, ticket| (vm, ticket, Verdict::Go);
    assert_eq!(bench.settle(), [go(1, 2), go(2, 1)]);
}

#[test]
fn without_a_queue_those_who_wait_go() {
    let with = pool(1, class());
    let mut bench = Bench::new(&with);
    bench.load(0, 500);
    bench.wait(1, 1, |_| {});
    bench.wait(1, 2, |_| {});
    // Other thresholds: they wait still.
    let class = Class {
        busy_tokens: Some(400),
        ..class()
    };
    bench.queues.serve(&[pool(1, class)], NOW);
    assert_eq!(bench.settle(), []);
    let without = Arc::new(Pool {
        queue: None,
        ..Pool::clone(&with)
    });
    bench.queues.serve(&[without], NOW);
    let go = |ticket| (1, ticket, Verdict::Go);
    assert_eq!(bench.settle(), [go(1), go(2)]);
    bench.wait(1, 3, |_| {});
    assert_eq!(bench.settle(), [go(3)]);
    assert!(bench.queues.is_idle());
}
