use super::*;
use crate::fake::Fake;
use crate::lanes::Lanes;
use kv_core::id::OwnerId;
use kv_core::load::Load;
use kv_core::table::Pool;

const ID: OwnerId = OwnerId { worker: 7, rank: 1 };

fn place(host: &Fake, worker: u64) -> Place {
    let id = OwnerId { worker, ..ID };
    Place {
        lane: Lanes::default().of(host, "p.q", id).unwrap(),
        owner: OwnerKey { pool: 0, id },
    }
}

fn sum(bookings: &Bookings, place: Place) -> (u64, u64) {
    let sum = bookings.sums[&place.owner];
    (sum.a, sum.b)
}

#[test]
fn vms_of_a_process_see_each_others_bookings_and_know_their_own() {
    let one = Fake::default();
    let two = one.beside();
    let (here, there) = (place(&one, 7), place(&two, 7));
    let (mut bookings, mut metrics) = (Bookings::default(), Metrics::default());
    let booking = bookings.hold(
        &one,
        &mut metrics,
        here,
        Tracking::default(),
        (100, 7),
        None,
    );
    let load = Load {
        prefill_tokens: 100,
        waiting: 1,
        decoding: 0,
        blocks: 7,
    };
    assert_eq!(there.lane.read(&two).load(), load);
    let lanes = there.lane.read(&two);
    assert_eq!(sum(&bookings, here), (lanes.a, lanes.b));
    let id = booking.open(&mut bookings, &one, &mut metrics, Told::default());
    bookings.first_token(&one, &mut metrics, id);
    bookings.first_token(&one, &mut metrics, id);
    assert_eq!(there.lane.read(&two).load().decoding, 1);
    bookings.free(&one, &mut metrics, id);
    bookings.free(&one, &mut metrics, id);
    assert_eq!(there.lane.read(&two).load(), Load::default());
    assert_eq!(sum(&bookings, here), (0, 0));
    assert!(one.has_metric("kv_router_lane_b.p.q.7.1"));
}

#[test]
fn a_booking_moves_whole_in_either_phase() {
    let host = Fake::default();
    let (from, to) = (place(&host, 1), place(&host, 2));
    for decoding in [false, true] {
        let (mut bookings, mut metrics) = (Bookings::default(), Metrics::default());
        let booking = bookings.hold(
            &host,
            &mut metrics,
            from,
            Tracking::default(),
            (100, 7),
            None,
        );
        let id = booking.open(&mut bookings, &host, &mut metrics, Told::default());
        if decoding {
            bookings.first_token(&host, &mut metrics, id);
        }
        let before = from.lane.read(&host);
        bookings.relocate(&host, &mut metrics, id, to);
        assert_eq!(from.lane.read(&host).load(), Load::default());
        assert_eq!(to.lane.read(&host), before);
        assert_eq!(sum(&bookings, to), (before.a, before.b));
        bookings.free(&host, &mut metrics, id);
        assert_eq!(to.lane.read(&host).load(), Load::default());
    }
}

#[test]
fn bookings_follow_their_pool_to_another_position() {
    let host = Fake::default();
    let here = place(&host, 1);
    let (mut bookings, mut metrics) = (Bookings::default(), Metrics::default());
    let booking = bookings.hold(
        &host,
        &mut metrics,
        here,
        Tracking::default(),
        (100, 7),
        None,
    );
    let id = booking.open(&mut bookings, &host, &mut metrics, Told::default());
    let table = |names: &[&str]| Table {
        pools: names
            .iter()
            .map(|name| Pool {
                name: (*name).to_owned(),
                ..Pool::default()
            })
            .collect(),
        ..Table::default()
    };
    bookings.follow(&table(&["p.q"]), &table(&["x", "p.q"]));
    let moved = OwnerKey {
        pool: 1,
        ..here.owner
    };
    assert_eq!(bookings.live[&id.0].booked.owner, moved);
    assert_eq!(bookings.sums.keys().collect::<Vec<_>>(), [&moved]);
    bookings.follow(&table(&["x", "p.q"]), &table(&["x"]));
    assert!(bookings.sums.is_empty());
    bookings.free(&host, &mut metrics, id);
    assert_eq!(here.lane.read(&host).load(), Load::default());
}
