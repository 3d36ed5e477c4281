use std::collections::BTreeMap;

use super::*;
use crate::id::OwnerId;
use crate::rng::Rng;

fn owner(worker: u64) -> OwnerKey {
    OwnerKey {
        pool: 0,
        id: OwnerId { worker, rank: 0 },
    }
}

fn id(request: u64) -> BookingId {
    BookingId {
        source: request % 3,
        request,
    }
}

fn booking(prefill_tokens: u32, hashes: &[u64]) -> Booking {
    Booking {
        prefill_tokens,
        hashes: hashes.to_vec(),
        ..Booking::default()
    }
}

#[test]
fn shared_blocks_count_once() {
    let mut tracker = Tracker::new(Tracking::default(), 10);
    tracker
        .book(id(1), owner(7), booking(64, &[1, 2, 3]), 0)
        .unwrap();
    tracker
        .book(id(2), owner(7), booking(32, &[1, 2, 9]), 0)
        .unwrap();
    let load = ActiveLoad {
        prefill_tokens: 96,
        waiting: 2,
        decoding: 0,
        blocks: 4,
    };
    assert_eq!(tracker.load(&owner(7)), load);
    assert_eq!(tracker.shared_blocks(&owner(7), &[1, 2, 3, 4]), 3);
    assert!(tracker.first_token(&id(1), 5));
    assert!(tracker.free(&id(2)));
    let load = ActiveLoad {
        prefill_tokens: 0,
        waiting: 0,
        decoding: 1,
        blocks: 3,
    };
    assert_eq!(tracker.load(&owner(7)), load);
    assert!(!tracker.free(&id(2)));
}

#[test]
fn prefixes_that_prompts_may_share_are_told_with_their_length() {
    let mut tracker = Tracker::new(Tracking::default(), 10);
    for (request, worker, last) in [(1, 7, 3), (2, 7, 9), (3, 8, 3)] {
        let booking = Booking {
            start: 10,
            branches: if request == 2 { vec![0] } else { Vec::new() },
            ..booking(0, &[1, 2, last])
        };
        tracker
            .book(id(request), owner(worker), booking, 0)
            .unwrap();
    }
    let prefixes = |tracker: &Tracker| {
        let named = tracker.prefixes().filter(|p| !p.is_whole);
        let mut prefixes: Vec<_> = named.map(|p| (p.pool, p.hash, p.depth)).collect();
        prefixes.sort_unstable();
        let whole = tracker.prefixes().filter(|p| p.is_whole);
        let whole: Vec<u32> = whole.map(|p| p.depth).collect();
        assert_eq!(whole, vec![13; tracker.len()]);
        prefixes
    };
    // Requests 1 and 3 share all on two owners, 2 has two blocks in common with them.
    let all = [(0, 1, 11), (0, 2, 12), (0, 3, 13), (0, 3, 13)];
    assert_eq!(prefixes(&tracker), all);
    assert_eq!(tracker.uses(&owner(7), 1), 2);
    assert_eq!(tracker.uses(&owner(8), 3), 1);
    assert_eq!(tracker.uses(&owner(8), 9), 0);
    assert_eq!(tracker.get(&id(3)).unwrap().0, owner(8));
    assert_eq!(tracker.bookings().count(), 3);
    tracker.relocate(&id(1), owner(8), 0);
    assert_eq!(prefixes(&tracker), all);
    tracker.free(&id(1));
    assert_eq!(prefixes(&tracker), [(0, 1, 11), (0, 2, 12), (0, 2, 12)]);
    tracker.free(&id(3));
    assert_eq!(prefixes(&tracker), [(0, 1, 11)]);
    tracker.retain(id(2).source, |_| false);
    assert!(tracker.pools.values().all(HashMap::is_empty));
}

#[test]
fn ids_are_unique_and_bookings_bounded() {
    let mut tracker = Tracker::new(Tracking::default(), 1);
    tracker.book(id(1), owner(7), booking(1, &[]), 0).unwrap();
    let twice = tracker.book(id(1), owner(7), booking(1, &[]), 0);
    assert_eq!(twice, Err(TrackError::Duplicate(1)));
    let over = tracker.book(id(2), owner(7), booking(1, &[]), 0);
    assert_eq!(over, Err(TrackError::Full(1)));
}

#[test]
fn what_is_not_tracked_does_not_count() {
    let all_off = Tracking {
        prefill_tokens: false,
        active_blocks: false,
        ..Tracking::default()
    };
    let mut tracker = Tracker::new(all_off, 9);
    tracker.book(id(1), owner(7), booking(64, &[1]), 0).unwrap();
    let load = ActiveLoad {
        waiting: 1,
        ..ActiveLoad::default()
    };
    assert_eq!(tracker.load(&owner(7)), load);
    let mut tracker = Tracker::new(
        Tracking {
            kv_reuse: false,
            ..Tracking::default()
        },
        9,
    );
    tracker
        .book(id(1), owner(7), booking(0, &[1, 2]), 0)
        .unwrap();
    tracker
        .book(id(2), owner(7), booking(0, &[1, 2]), 0)
        .unwrap();
    assert_eq!(tracker.load(&owner(7)).blocks, 4);
}

/// Bookings kept the obvious way: load is what they add up to.
fn naive(bookings: &BTreeMap<u64, (u64, Booking, f32)>) -> BTreeMap<u64, ActiveLoad> {
    /// Load without blocks, private blocks, and who uses each of the others.
    type Kept = (ActiveLoad, f64, BTreeMap<u64, Vec<f32>>);
    let mut loads: BTreeMap<u64, Kept> = BTreeMap::new();
    for (worker, booking, left) in bookings.values() {
        let (load, own, blocks) = loads.entry(*worker).or_default();
        load.prefill_tokens += u64::from(booking.prefill_tokens);
        load.waiting += u32::from(!booking.decoding);
        load.decoding += u32::from(booking.decoding);
        *own += f64::from(booking.private_blocks) * f64::from(*left);
        for hash in &booking.hashes {
            blocks.entry(*hash).or_default().push(*left);
        }
    }
    let total = |(worker, (load, own, blocks)): (u64, Kept)| {
        let weight = |lefts: &Vec<f32>| match lefts.as_slice() {
            [alone] => f64::from(*alone),
            _ => 1.0,
        };
        let blocks = (own + blocks.values().map(weight).sum::<f64>()).round() as u64;
        (worker, ActiveLoad { blocks, ..load })
    };
    loads.into_iter().map(total).collect()
}

#[test]
fn load_is_what_the_bookings_add_up_to_over_random_histories() {
    for seed in 0..50 {
        let mut rng = Rng::new(seed);
        let tracking = Tracking {
            output_blocks: true,
            ..Tracking::default()
        };
        let mut tracker = Tracker::new(tracking, 1000);
        let mut bookings: BTreeMap<u64, (u64, Booking, f32)> = BTreeMap::new();
        for step in 0..500 {
            let request = rng.below(40) as u64;
            let worker = rng.below(4) as u64;
            match rng.below(7) {
                0..3 => {
                    let hashes: Vec<u64> = (0..rng.below(6) as u64).collect();
                    let booking = booking(rng.below(100) as u32, &hashes);
                    let booked = tracker.book(id(request), owner(worker), booking.clone(), step);
                    assert_eq!(booked.is_ok(), !bookings.contains_key(&request));
                    bookings.entry(request).or_insert((worker, booking, 1.0));
                }
                3 => {
                    tracker.first_token(&id(request), step);
                    if let Some((_, booking, _)) = bookings.get_mut(&request) {
                        booking.prefill_tokens = 0;
                        booking.decoding = true;
                    }
                }
                4 => {
                    tracker.relocate(&id(request), owner(worker), step);
                    if let Some((at, ..)) = bookings.get_mut(&request) {
                        *at = worker;
                    }
                }
                5 => {
                    let left = [1.0, 0.75, 0.5, 0.0][rng.below(4)];
                    tracker.grow(&id(request), 2, left, step);
                    if let Some((_, booking, of)) = bookings.get_mut(&request) {
                        booking.private_blocks += 2;
                        *of = left;
                    }
                }
                _ => {
                    tracker.free(&id(request));
                    bookings.remove(&request);
                }
            }
            let seen = tracker.loads().map(|(key, load)| (key.id.worker, load));
            assert_eq!(seen.collect::<BTreeMap<_, _>>(), naive(&bookings));
        }
        let expired = tracker.expire(u64::MAX);
        assert_eq!(expired, bookings.len());
        assert_eq!(tracker.loads().count(), 0);
        assert!(tracker.fading.is_empty());
    }
}

#[test]
fn half_an_answer_halves_what_is_its_alone() {
    let tracking = Tracking {
        output_blocks: true,
        ..Tracking::default()
    };
    let mut tracker = Tracker::new(tracking, 9);
    tracker
        .book(id(1), owner(7), booking(0, &[1, 2, 3, 4]), 0)
        .unwrap();
    tracker.grow(&id(1), 1, 0.5, 0);
    assert_eq!(tracker.load(&owner(7)).blocks, 3, "2.5, rounded");
    // Two of them in common with another request count whole.
    tracker
        .book(id(2), owner(7), booking(0, &[1, 2]), 0)
        .unwrap();
    assert_eq!(tracker.load(&owner(7)).blocks, 4, "2 and 1.5");
    let mut tracker = Tracker::new(Tracking::default(), 9);
    tracker.book(id(1), owner(7), booking(0, &[1]), 0).unwrap();
    tracker.grow(&id(1), 1, 0.5, 0);
    assert_eq!(tracker.load(&owner(7)).blocks, 1, "answers are not tracked");
    tracker.fill(&id(1), 2, None, 0);
    assert_eq!(tracker.load(&owner(7)).blocks, 3, "but by who booked it");
    tracker.fill(&id(1), 1, Some(0.5), 0);
    tracker.fill(&id(1), 2, None, 0);
    assert_eq!(tracker.load(&owner(7)).blocks, 3, "half of six");
}

#[test]
fn a_source_keeps_only_what_it_claims() {
    let mut tracker = Tracker::new(Tracking::default(), 100);
    for request in 0..9 {
        tracker
            .book(id(request), owner(1), booking(1, &[]), request)
            .unwrap();
    }
    assert_eq!(tracker.retain(1, |request| request == 4), 2);
    assert_eq!(tracker.load(&owner(1)).waiting, 7);
    assert_eq!(tracker.expire(3), 2);
    assert_eq!(tracker.len(), 5);
}
