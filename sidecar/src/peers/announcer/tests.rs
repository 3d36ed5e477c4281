use kv_core::id::OwnerId;
use kv_core::tracker::Tracking;

use super::*;

const ROUTER: u64 = 42;

struct Setting {
    announcer: Announcer,
    tracker: Tracker,
    out: mpsc::Sender<Departure>,
    departures: mpsc::Receiver<Departure>,
}

fn owner(worker: u64) -> OwnerKey {
    let id = OwnerId { worker, rank: 0 };
    OwnerKey { pool: 0, id }
}

fn id(request: u64) -> BookingId {
    BookingId { source: 5, request }
}

fn booking(hashes: &[u64]) -> Booking {
    Booking {
        prefill_tokens: 16,
        hashes: hashes.to_vec(),
        ..Booking::default()
    }
}

impl Setting {
    fn new(capacity: usize) -> Self {
        let (out, departures) = mpsc::channel(capacity);
        let mut announcer = Announcer::new(ROUTER);
        announcer.connected(true);
        Self {
            announcer,
            tracker: Tracker::new(Tracking::default(), 10_000),
            out,
            departures,
        }
    }

    fn book(&mut self, request: u64, worker: u64, booking: Booking) {
        let booked = self.tracker.book(id(request), owner(worker), booking, 0);
        booked.unwrap();
        self.announcer.changed(id(request));
    }

    fn free(&mut self, request: u64) {
        assert!(self.tracker.free(&id(request)));
        self.announcer.changed(id(request));
    }

    fn announce(&mut self) -> Sent {
        let sources = || HashSet::from([9]);
        self.announcer.announce(&self.tracker, sources, &self.out)
    }

    fn departed(&mut self) -> Vec<ActiveSequenceEvent> {
        let mut all = Vec::new();
        while let Ok(Departure::Events(events)) = self.departures.try_recv() {
            all.extend(events);
        }
        all
    }
}

fn sequence(event: &ActiveSequenceEvent) -> &[u64] {
    match &event.data {
        ActiveSequenceEventData::AddRequest {
            token_sequence: Some(sequence),
            ..
        } => sequence,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_booking_that_came_and_went_is_not_mentioned() {
    let mut setting = Setting::new(8);
    setting.announce();
    setting.book(1, 7, booking(&[1]));
    setting.free(1);
    setting.book(2, 7, booking(&[2]));
    assert_eq!(setting.announce().events, ["booked"]);
    assert_eq!(setting.departed().len(), 1);
    assert_eq!(setting.announcer.live(), 1);
    setting.tracker.first_token(&id(2), 0);
    setting.tracker.relocate(&id(2), owner(8), 0);
    setting.announcer.changed(id(2));
    let expected = ["freed", "booked", "first_token"];
    assert_eq!(setting.announce().events, expected);
    let told = setting.departed();
    let workers: Vec<u64> = told.iter().map(|e| e.worker.worker_id).collect();
    assert_eq!(workers, [7, 8, 8]);
    assert_ne!(told[0].request_id, told[1].request_id);
    assert_eq!(setting.announce(), Sent::default());
}

#[test]
fn what_a_full_queue_does_not_take_is_told_later() {
    let mut setting = Setting::new(1);
    for request in 0..1_000 {
        setting.book(request, 7, booking(&[request]));
    }
    let mut told = 0;
    let mut overflows = 0;
    while told < 1_000 {
        overflows += setting.announce().dropped.len();
        let events = setting.departed();
        assert!((1..=MAX_BATCH_EVENTS).contains(&events.len()));
        told += events.len();
    }
    assert_eq!((told, overflows), (1_000, 3));
    assert_eq!(setting.announcer.live(), 1_000);
}

#[test]
fn what_happened_without_a_connection_is_told_as_a_difference() {
    let mut setting = Setting::new(8);
    setting.book(1, 7, booking(&[1]));
    setting.book(2, 7, booking(&[2]));
    setting.announce();
    setting.departed();
    setting.announcer.connected(false);
    setting.free(1);
    setting.book(3, 7, booking(&[3]));
    let of_peer = BookingId {
        source: 9,
        request: 4,
    };
    setting
        .tracker
        .book(of_peer, owner(7), booking(&[4]), 0)
        .unwrap();
    assert_eq!(setting.announce(), Sent::default());
    setting.announcer.connected(true);
    assert_eq!(setting.announce().events, ["freed", "booked"]);
    let live = setting.announcer.snapshot(&setting.tracker);
    let mut blocks: Vec<&[u64]> = live.iter().map(sequence).collect();
    blocks.sort_unstable();
    assert_eq!(blocks, [[2], [3]]);
}

#[test]
fn bookings_that_are_freed_unsaid_are_found_by_their_source() {
    let mut setting = Setting::new(8);
    setting.book(1, 7, booking(&[1]));
    setting.announce();
    setting.tracker.retain(5, |_| false);
    assert_eq!(setting.announce(), Sent::default());
    setting.announcer.source_changed(6);
    assert_eq!(setting.announce(), Sent::default());
    setting.announcer.source_changed(5);
    assert_eq!(setting.announce().events, ["freed"]);
}

#[test]
fn unknown_blocks_count_and_are_nobody_elses() {
    let mut setting = Setting::new(8);
    for request in 1..=2 {
        let booking = Booking {
            start: 2,
            private_blocks: 3,
            ..booking(&[11, 12])
        };
        setting.book(request, 7, booking);
    }
    setting.announce();
    let told = setting.departed();
    let (one, two) = (sequence(&told[0]), sequence(&told[1]));
    assert_eq!((one.len(), &one[2..4]), (5, &[11, 12][..]));
    let common = one.iter().filter(|hash| two.contains(hash));
    assert_eq!(common.count(), 2);
}

#[test]
fn a_prompt_that_no_message_takes_is_not_announced() {
    let mut setting = Setting::new(8);
    let long = vec![1; MAX_BATCH_BLOCKS + 1];
    setting.book(1, 7, booking(&long));
    let sent = setting.announce();
    assert_eq!(sent.dropped, [Dropped::TooLong]);
    assert_eq!((sent.events.len(), setting.announcer.live()), (0, 0));
}
