//! The queue does what the naive one does, whatever happens.

use proptest::prelude::*;

use super::naive::Naive;
use super::*;
use crate::id::OwnerId;

fn owner(worker: u64) -> OwnerId {
    OwnerId { worker, rank: 0 }
}

fn class(name: &str, order: Order, quantum: u64) -> Class {
    Class {
        order,
        quantum,
        ..Class::new(name)
    }
}

fn profile(orders: &[(Order, u64)], limits: Limits) -> Profile {
    let names = ["a", "b", "c", "d"];
    let classes = names.iter().zip(orders).map(|(name, (order, quantum))| {
        let class = Class {
            limits,
            ..class(name, *order, *quantum)
        };
        Bucketed {
            class,
            at: (*name == "a").then(|| ("a".to_owned(), "all".to_owned())),
        }
    });
    Profile::new(classes.collect(), "a", &[(0, "all".into())]).unwrap()
}

#[derive(Clone, Debug)]
enum Op {
    Push(Request),
    Remove(usize),
    Expire(u64),
    /// Owners from this one on are busy.
    Next(u64, bool),
}

fn request() -> impl Strategy<Value = Request> {
    let order = (
        0_u32..3,
        prop::option::weighted(0.3, 0_u64..50),
        50_u64..100,
    );
    let size = (0_u32..3_000, 0_u32..3_000);
    let score = (-2_i32..4, 0_u32..6);
    (
        0_usize..3,
        prop::option::weighted(0.3, 0_u64..3),
        order,
        size,
        score,
    )
        .prop_map(
            |(class, worker, (strict, due_ns, until_ns), (tokens, cached), (priority, arrival))| {
                Request {
                    class,
                    owner: worker.map(owner),
                    tokens,
                    cached_tokens: cached.min(tokens),
                    arrival_s: f64::from(arrival) / 2.0,
                    priority: f64::from(priority) / 2.0,
                    strict,
                    due_ns,
                    until_ns,
                }
            },
        )
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        5 => request().prop_map(Op::Push),
        1 => (0_usize..40).prop_map(Op::Remove),
        1 => (0_u64..60).prop_map(Op::Expire),
        4 => (0_u64..4, prop::bool::weighted(0.8)).prop_map(|(busy, any)| Op::Next(busy, any)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn does_what_the_naive_queue_does(
        orders in prop::collection::vec(
            (prop_oneof![Just(Order::Fcfs), Just(Order::Wspt), Just(Order::Lcfs)], 1_u64..700),
            3,
        ),
        most in prop::option::weighted(0.3, 0_u64..9_000),
        ops in prop::collection::vec(op(), 0..120),
    ) {
        let limits = Limits { tokens: most, requests: Some(12), cached_tokens: None };
        let profile = profile(&orders, limits);
        let mut queue = PolicyQueue::new(profile.clone());
        let mut naive = Naive::new(profile);
        for (id, op) in (0_u64..).zip(ops) {
            match op {
                Op::Push(request) => {
                    prop_assert_eq!(queue.push(id, request, 1), naive.push(id, request, 1));
                }
                Op::Remove(at) => {
                    let id = naive.ids().get(at).copied().unwrap_or(9_999);
                    prop_assert_eq!(queue.remove(id).is_some(), naive.remove(id));
                }
                Op::Expire(now_ns) => {
                    let mut gone: Vec<u64> =
                        queue.expire(now_ns).iter().map(|entry| entry.id).collect();
                    gone.sort_unstable();
                    prop_assert_eq!(gone, naive.expire(now_ns));
                }
                Op::Next(busy, any) => {
                    let fits = |request: &Request| {
                        request.owner.map_or(any, |owner| owner.worker < busy)
                    };
                    let next = queue.next(|_, entry| fits(&entry.request));
                    prop_assert_eq!(next.map(|entry| entry.id), naive.next(fits));
                }
            }
            let mut ids: Vec<u64> = queue.entries().map(|entry| entry.id).collect();
            ids.sort_unstable();
            prop_assert_eq!(ids, naive.ids());
            prop_assert_eq!(queue.len(), naive.ids().len());
            for class in 0..3 {
                prop_assert_eq!(queue.usage(class), naive.usage(class));
            }
        }
    }
}

#[test]
fn classes_share_by_their_quanta() {
    let orders = [(Order::Fcfs, 300), (Order::Fcfs, 100)];
    let mut queue = PolicyQueue::new(profile(&orders, Limits::default()));
    for id in 0..400 {
        let request = Request {
            class: id % 2,
            tokens: 50,
            until_ns: u64::MAX,
            ..Request::default()
        };
        queue.push(id, request, 1).unwrap();
    }
    let mut served = [0, 0];
    for _ in 0..80 {
        served[queue.next(|_, _| true).unwrap().request.class] += 1;
    }
    assert_eq!(served, [60, 20]);
}

#[test]
fn a_class_goes_on_while_another_finds_no_room() {
    let orders = [(Order::Fcfs, 1), (Order::Fcfs, 1)];
    let mut queue = PolicyQueue::new(profile(&orders, Limits::default()));
    for class in 0..2 {
        let request = Request {
            class,
            tokens: 1_000,
            until_ns: u64::MAX,
            ..Request::default()
        };
        queue.push(class, request, 1).unwrap();
    }
    assert_eq!(queue.next(|class, _| class.name == "b").unwrap().id, 1);
    assert!(queue.next(|class, _| class.name == "b").is_none());
    assert_eq!(queue.next(|_, _| true).unwrap().id, 0);
    assert!(queue.is_empty() && queue.next(|_, _| true).is_none());
}

#[test]
fn requests_are_classed_by_name_then_family_and_bucket() {
    let of = |name: &str, at: Option<(&str, &str)>| Bucketed {
        class: Class::new(name),
        at: at.map(|(family, bucket)| (family.to_owned(), bucket.to_owned())),
    };
    let classes = vec![
        of("batch-long", Some(("batch", "long"))),
        of("vip", None),
        of("chat-short", Some(("chat", "short"))),
        of("chat-long", Some(("chat", "long"))),
        of("batch-short", Some(("batch", "short"))),
    ];
    let buckets = [(0, "short".to_owned()), (1_000, "long".to_owned())];
    let profile = Profile::new(classes.clone(), "chat", &buckets).unwrap();
    let name = |named, tokens| &*profile.classes()[profile.class_of(named, tokens)].name;
    assert_eq!(name("", 999), "chat-short");
    assert_eq!(name("who?", 1_000), "chat-long");
    assert_eq!(name("batch", 0), "batch-short");
    assert_eq!(name("batch", 5_000), "batch-long");
    assert_eq!(name("vip", 5_000), "vip");
    // A class of the matrix is reached by its family alone.
    assert_eq!(name("batch-long", 0), "chat-short");

    let refused = |classes: &[Bucketed], default: &str, buckets: &[(u64, String)]| {
        Profile::new(classes.to_vec(), default, buckets).unwrap_err()
    };
    let missing = ProfileError::Missing("batch".into(), "short".into());
    assert_eq!(refused(&classes[..4], "chat", &buckets), missing);
    let none = ProfileError::NoFamily("x".into());
    assert_eq!(refused(&classes, "x", &buckets), none);
    assert_eq!(
        refused(&classes, "chat", &buckets[1..]),
        ProfileError::Buckets
    );
    let twice = [&classes[..], &classes[..1]].concat();
    let error = ProfileError::Twice("batch-long".into());
    assert_eq!(refused(&twice, "chat", &buckets), error);
    assert_eq!(refused(&[], "chat", &buckets), ProfileError::Count(0));
    let error = ProfileError::NoBucket("batch-long".into(), "long".into());
    assert_eq!(refused(&classes, "chat", &buckets[..1]), error);
}

#[test]
fn a_single_class_takes_every_request() {
    let class = Class {
        busy_share: Some(0.5),
        ..Class::new("default")
    };
    let profile = Profile::single(class);
    assert_eq!(profile.class_of("anything", 7), 0);
    assert!(profile.queues());
    let capacity = Capacity {
        batched_tokens: 1_000,
        ..Capacity::default()
    };
    let busy = |tokens| profile.classes()[0].is_busy(tokens, capacity);
    assert_eq!([500, 501].map(busy), [false, true]);
}
