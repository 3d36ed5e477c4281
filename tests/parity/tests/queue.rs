//! Requests that wait go in the order of Dynamo's policy queue, and are refused where it refuses.

use dynamo_kv_router::config::RouterQueuePolicy;
use dynamo_kv_router::protocols::WorkerWithDpRank;
use dynamo_kv_router::scheduling::policy_queue::{PolicyQueue as Theirs, QueueSnapshot};
use dynamo_kv_router::scheduling::{PolicyProfile, RouterPolicyConfig, WorkerPlacement};
use kv_core::id::OwnerId;
use kv_core::queue::{Bucketed, Class, Limits, Order, PolicyQueue, Profile, Request};
use kv_core::rng::Rng;

const HISTORIES: u64 = 2_000;
const STEPS: usize = 120;
const WORKERS: usize = 3;

/// Classes of one history, for both.
struct Classes {
    ours: Profile,
    theirs: PolicyProfile,
}

fn order(name: &str) -> Order {
    match name {
        "wspt" => Order::Wspt,
        "lcfs" => Order::Lcfs,
        _ => Order::Fcfs,
    }
}

/// Limits as YAML, and as ours.
fn limits(rng: &mut Rng) -> (String, Limits) {
    let mut limits = Limits::default();
    let mut yaml = String::new();
    let places = [
        ("request", &mut limits.requests, 12),
        ("raw_isl_token", &mut limits.tokens, 9_000),
        ("cached_token", &mut limits.cached_tokens, 5_000),
    ];
    for (name, place, most) in places {
        if rng.below(4) == 0 {
            let limit = rng.below(most) as u64;
            *place = Some(limit);
            yaml += &format!("    {name}_queue_limit_per_worker: {limit}\n");
        }
    }
    (yaml, limits)
}

/// A matrix of two families and two buckets, and a class of its own.
fn classes(rng: &mut Rng) -> Classes {
    let (orders, starts) = (["fcfs", "wspt"], [0, 1_000]);
    let mut yaml = String::from(
        "default_policy_family: agents\nuncached_isl_buckets:\n  - min_tokens: 0\n    bucket: short\n  \
         - min_tokens: 1000\n    bucket: long\npolicy_classes:\n",
    );
    let mut ours = Vec::new();
    let places = [
        ("agents-short", Some(("agents", "short"))),
        ("agents-long", Some(("agents", "long"))),
        ("vip", None),
        ("batch-long", Some(("batch", "long"))),
        ("batch-short", Some(("batch", "short"))),
    ];
    for (name, at) in places {
        let policy = orders[rng.below(2)];
        let quantum = 1 + rng.below(600);
        let (more, limits) = limits(rng);
        yaml += &format!(
            "  - name: {name}\n    queue_policy: {policy}\n    quantum: {quantum}\n{more}"
        );
        if let Some((family, bucket)) = at {
            yaml += &format!("    policy_family: {family}\n    cache_bucket: {bucket}\n");
        }
        ours.push(Bucketed {
            class: Class {
                order: order(policy),
                quantum: quantum as u64,
                limits,
                ..Class::new(name)
            },
            at: at.map(|(family, bucket)| (family.to_owned(), bucket.to_owned())),
        });
    }
    let buckets = [
        (starts[0], "short".to_owned()),
        (starts[1], "long".to_owned()),
    ];
    let config = RouterPolicyConfig::from_yaml(&yaml).unwrap_or_else(|e| panic!("{e}: {yaml}"));
    Classes {
        ours: Profile::new(ours, "agents", &buckets).unwrap(),
        theirs: config
            .resolve_profile(None, None, RouterQueuePolicy::Fcfs)
            .clone(),
    }
}

/// One class without a policy file.
fn single(policy: RouterQueuePolicy, name: &str) -> Classes {
    Classes {
        ours: Profile::single(Class {
            order: order(name),
            busy_share: Some(0.5),
            ..Class::new("default")
        }),
        theirs: PolicyProfile::synthetic(Some(0.5), policy),
    }
}

fn history(rng: &mut Rng, classes: &Classes) {
    let mut ours = PolicyQueue::new(classes.ours.clone());
    let mut theirs = Theirs::new(classes.theirs.clone());
    // A lane that is blocked once stays so until Dynamo is told to look again.
    let frees: Vec<bool> = (0..WORKERS).map(|_| rng.below(3) > 0).collect();
    let names = ["", "agents", "batch", "vip", "who"];
    for id in 0..STEPS as u64 {
        match rng.below(8) {
            0..=4 => {
                let tokens = rng.below(2_500);
                let cached = rng.below(tokens + 1);
                let (tokens, cached) = (tokens as u32, cached as u32);
                let named = names[rng.below(names.len())];
                let class = classes.ours.class_of(named, tokens - cached);
                let requested = Some(named).filter(|named| !named.is_empty());
                let their_class = classes
                    .theirs
                    .resolve_class_index(requested, (tokens - cached) as usize);
                let name = &classes.theirs.class(their_class).name;
                assert_eq!(&classes.ours.classes()[class].name, name, "{named:?}");
                let pinned = (rng.below(3) == 0).then(|| rng.below(WORKERS) as u64);
                let request = Request {
                    class,
                    owner: pinned.map(|worker| OwnerId { worker, rank: 0 }),
                    tokens,
                    cached_tokens: cached,
                    arrival_s: rng.below(40) as f64 / 4.0,
                    priority: rng.below(12) as f64 / 2.0 - 2.0,
                    strict: rng.below(3) as u32,
                    due_ns: None,
                    until_ns: u64::MAX,
                };
                let placement = pinned.map_or(WorkerPlacement::Any, |worker| {
                    WorkerPlacement::Exact(WorkerWithDpRank::new(worker, 0))
                });
                let entered = theirs.enqueue(
                    their_class,
                    WORKERS,
                    QueueSnapshot::new(tokens as usize, cached as usize),
                    request.arrival_s,
                    request.priority,
                    request.strict,
                    placement,
                    id,
                );
                let refused = entered.err().map(|(refusal, _)| {
                    let kind = refusal.limit_kind.to_string();
                    (kind, refusal.current as u64, refusal.limit as u64)
                });
                let own = ours.push(id, request, WORKERS as u64).err();
                let own = own.map(|full| (full.kind.name().to_owned(), full.current, full.limit));
                assert_eq!(own, refused);
            }
            5 => {
                let gone = rng.below(STEPS) as u64;
                theirs.retain(|id| *id != gone);
                ours.remove(gone);
            }
            _ => {
                let any = rng.below(4) > 0;
                let owners: Vec<(u64, Option<OwnerId>)> =
                    ours.entries().map(|e| (e.id, e.request.owner)).collect();
                let fits = |owner: Option<OwnerId>| {
                    owner.map_or(any, |owner| frees[owner.worker as usize])
                };
                let next = theirs.pop_next(|_, _, id| {
                    let (_, owner) = owners.iter().find(|(known, _)| known == id).unwrap();
                    fits(*owner)
                });
                let next = next.map(|entry| *entry.payload());
                let own = ours.next(|_, entry| fits(entry.request.owner));
                assert_eq!(own.map(|entry| entry.id), next);
            }
        }
        assert_eq!(ours.len(), theirs.pending_count());
        for class in 0..theirs.class_count() {
            let (own, their) = (ours.usage(class), theirs.class_stats(class));
            let own = [own.requests, own.tokens, own.cached_tokens];
            let their = [their.requests, their.raw_isl_tokens, their.cached_tokens];
            assert_eq!(own, their.map(|n| n as u64));
        }
    }
}

#[test]
fn requests_go_in_dynamos_order() {
    for seed in 0..HISTORIES {
        let mut rng = Rng::new(seed);
        let classes = match seed % 5 {
            0 => single(RouterQueuePolicy::Fcfs, "fcfs"),
            1 => single(RouterQueuePolicy::Wspt, "wspt"),
            2 => single(RouterQueuePolicy::Lcfs, "lcfs"),
            _ => classes(&mut rng),
        };
        history(&mut rng, &classes);
    }
}

#[test]
fn a_worker_is_busy_where_it_is_for_dynamo() {
    let mut rng = Rng::new(1);
    for _ in 0..100_000 {
        let share = rng.below(400) as f64 / 100.0;
        let tokens = rng.below(20_000) as u64;
        let batch = 1 + rng.below(8_192) as u32;
        let theirs = PolicyProfile::synthetic(Some(share), RouterQueuePolicy::Fcfs);
        let class = Class {
            busy_share: Some(share),
            ..Class::new("default")
        };
        let capacity = kv_core::queue::Capacity {
            batched_tokens: batch,
            blocks: 0,
        };
        assert_eq!(
            class.is_busy(tokens, capacity),
            theirs
                .default_class()
                .worker_is_busy(tokens as usize, batch.into()),
        );
    }
}
