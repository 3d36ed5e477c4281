use kv_core::id::OwnerId;
use kv_core::replica::{PrefillLoadHint, WorkerWithDpRank};
use kv_core::tracker::{ActiveLoad, Tracking};

use super::*;

const OWN: u64 = 1;
const PEER: u64 = 42;

struct Setting {
    mirror: Mirror,
    tracker: Tracker,
    now_ms: u64,
    sequence: u64,
}

fn add(blocks: &[u64], tokens: u64) -> ActiveSequenceEventData {
    ActiveSequenceEventData::AddRequest {
        token_sequence: Some(blocks.to_vec()),
        track_prefill_tokens: true,
        expected_output_tokens: None,
        prefill_load_hint: Some(PrefillLoadHint {
            initial_effective_prefill_tokens: tokens,
            expected_prefill_duration: None,
        }),
    }
}

const FREE: ActiveSequenceEventData = ActiveSequenceEventData::Free;
const MARK: ActiveSequenceEventData = ActiveSequenceEventData::MarkPrefillCompleted;

fn event(request: &str, worker_id: u64, data: ActiveSequenceEventData) -> ActiveSequenceEvent {
    ActiveSequenceEvent {
        request_id: request.into(),
        worker: WorkerWithDpRank {
            worker_id,
            dp_rank: 0,
        },
        data,
        router_id: PEER,
        lora_name: None,
    }
}

/// Workers 1 and 2 have one rank.
fn find(id: OwnerId) -> Result<OwnerKey, Dropped> {
    match id {
        OwnerId { worker: 3.., .. } => Err(Dropped::UnknownWorker),
        OwnerId { rank: 1.., .. } => Err(Dropped::UnknownRank),
        id => Ok(OwnerKey { pool: 0, id }),
    }
}

fn load(prefill_tokens: u64, waiting: u32, decoding: u32, blocks: u64) -> ActiveLoad {
    ActiveLoad {
        prefill_tokens,
        waiting,
        decoding,
        blocks,
    }
}

impl Setting {
    fn new() -> Self {
        Self {
            mirror: Mirror::new(OWN),
            tracker: Tracker::new(Tracking::default(), 100),
            now_ms: 0,
            sequence: 0,
        }
    }

    fn decoded(sequence: u64, events: Vec<ActiveSequenceEvent>) -> Decoded {
        Decoded {
            publisher: PEER,
            sequence,
            events,
            malformed: 0,
        }
    }

    fn events(&mut self, events: Vec<ActiveSequenceEvent>) -> Vec<Taken> {
        let decoded = Self::decoded(self.sequence, events);
        self.sequence += 1;
        self.mirror
            .events(&decoded, &mut self.tracker, find, self.now_ms)
    }

    fn snapshot(&mut self, part: u64, events: Vec<ActiveSequenceEvent>) -> Vec<Taken> {
        let decoded = Self::decoded(part, events);
        self.mirror
            .snapshot(&decoded, &mut self.tracker, find, self.now_ms)
    }

    fn alive(&mut self, live: u64) -> bool {
        let alive = Alive {
            router_id: PEER,
            live,
            next_sequence: self.sequence,
        };
        self.mirror.alive(alive, &mut self.tracker, self.now_ms)
    }

    fn load(&self, worker: u64) -> ActiveLoad {
        let id = OwnerId { worker, rank: 0 };
        self.tracker.load(&OwnerKey { pool: 0, id })
    }
}

#[test]
fn a_request_is_booked_decodes_and_ends() {
    let mut setting = Setting::new();
    let booked = setting.events(vec![event("a", 1, add(&[1, 2], 32))]);
    assert_eq!(booked, [Ok("booked")]);
    assert_eq!(setting.load(1), load(32, 1, 0, 2));
    // The mark is the worker's own: another router id.
    let mark = ActiveSequenceEvent {
        router_id: 1_000,
        ..event("a", 1, MARK)
    };
    assert_eq!(setting.events(vec![mark]), [Ok("first_token")]);
    assert_eq!(setting.load(1), load(0, 0, 1, 2));
    assert_eq!(setting.mirror.len(), 1);
    let rest = vec![event("a", 1, FREE), event("b", 2, add(&[1, 2], 32))];
    assert_eq!(setting.events(rest), [Ok("freed"), Ok("booked")]);
    assert_eq!(setting.load(1), load(0, 0, 0, 0));
    assert_eq!(setting.load(2), load(32, 1, 0, 2));
}

#[test]
fn own_unknown_and_doubled_requests_are_not_booked() {
    let mut setting = Setting::new();
    let own = ActiveSequenceEvent {
        router_id: OWN,
        ..event("own", 1, add(&[1], 16))
    };
    let other_rank = ActiveSequenceEvent {
        worker: WorkerWithDpRank {
            worker_id: 1,
            dp_rank: 1,
        },
        ..event("rank", 1, add(&[1], 16))
    };
    let taken = setting.events(vec![
        own,
        event("who", 3, add(&[1], 16)),
        other_rank,
        event("a", 1, add(&[1], 16)),
        event("a", 2, add(&[1], 16)),
        event("a", 2, FREE),
    ]);
    let expected = [
        Err(Dropped::UnknownWorker),
        Err(Dropped::UnknownRank),
        Ok("booked"),
        Err(Dropped::Duplicate),
        Err(Dropped::WorkerMismatch),
    ];
    assert_eq!(taken, expected);
    assert_eq!(setting.tracker.len(), 1);
}

#[test]
fn what_overtakes_its_booking_still_counts() {
    let mut setting = Setting::new();
    setting.events(vec![event("a", 1, MARK), event("b", 1, FREE)]);
    let adds = vec![
        event("a", 1, add(&[1], 16)),
        event("b", 1, add(&[2], 16)),
        event("c", 1, add(&[3], 16)),
    ];
    let taken = setting.events(adds);
    assert_eq!(
        taken,
        [Ok("booked"), Err(Dropped::Superseded), Ok("booked")]
    );
    assert_eq!(setting.load(1), load(16, 1, 1, 2));
    // Only for a while.
    setting.events(vec![event("d", 1, FREE)]);
    setting.now_ms = 10_000;
    setting.mirror.sweep(&mut setting.tracker, setting.now_ms);
    let late = setting.events(vec![event("d", 1, add(&[4], 16))]);
    assert_eq!(late, [Ok("booked")]);
}

#[test]
fn a_sign_of_life_shows_what_was_missed() {
    let mut setting = Setting::new();
    assert!(!setting.alive(0));
    setting.events(vec![
        event("a", 1, add(&[1], 16)),
        event("x", 9, add(&[], 0)),
    ]);
    setting.now_ms = 1_000;
    assert!(!setting.alive(2), "an unknown worker's request counts");
    // A message is lost.
    setting.sequence += 1;
    assert!(setting.alive(2));
    assert!(!setting.alive(2), "not asked again at once");
    setting.now_ms = 4_000;
    assert!(setting.alive(2));
    setting.snapshot(0, vec![]);
    assert_eq!(setting.tracker.len(), 0);
    assert!(!setting.alive(0));
}

#[test]
fn a_snapshot_replaces_what_was_known() {
    let mut setting = Setting::new();
    setting.alive(0);
    setting.events(vec![
        event("stays", 1, add(&[1], 16)),
        event("stale", 1, add(&[2], 16)),
    ]);
    setting.now_ms = 3_000;
    setting.events(vec![
        event("ended", 1, add(&[5], 16)),
        event("ended", 1, FREE),
        event("young", 2, add(&[3], 16)),
    ]);
    let first = setting.snapshot(
        0,
        vec![
            event("stays", 1, add(&[1], 0)),
            event("stays", 1, MARK),
            event("ended", 1, add(&[5], 16)),
        ],
    );
    assert_eq!(first, [Ok("first_token"), Err(Dropped::Superseded)]);
    assert_eq!(
        setting.snapshot(1, vec![event("new", 2, add(&[4], 16))]),
        [Ok("booked")]
    );
    assert_eq!(setting.load(1), load(16, 1, 1, 2));
    assert_eq!(setting.snapshot(2, vec![]), [Ok("stale")]);
    assert_eq!(setting.load(1), load(0, 0, 1, 1));
    assert_eq!(setting.load(2), load(32, 2, 0, 2));
}

#[test]
fn a_snapshot_with_a_missing_part_frees_nothing() {
    let mut setting = Setting::new();
    setting.alive(0);
    setting.events(vec![event("a", 1, add(&[1], 16))]);
    setting.now_ms = 3_000;
    setting.snapshot(0, vec![event("b", 1, add(&[2], 16))]);
    setting.snapshot(2, vec![]);
    assert_eq!(setting.tracker.len(), 2);
    assert!(setting.alive(2), "it is asked again");
}

#[test]
fn a_silent_sidecar_loses_its_load_and_a_router_without_signs_does_not() {
    let mut setting = Setting::new();
    setting.alive(0);
    setting.events(vec![event("a", 1, add(&[1], 16))]);
    let other = ActiveSequenceEvent {
        router_id: 77,
        ..event("b", 1, add(&[2], 16))
    };
    setting.events(vec![other]);
    let gone = setting.mirror.sweep(&mut setting.tracker, 5_000);
    assert_eq!(gone, Gone::default());
    let gone = setting.mirror.sweep(&mut setting.tracker, 5_001);
    assert_eq!((gone.peers, gone.freed), (vec![PEER], 1));
    assert_eq!(setting.load(1), load(16, 1, 0, 1));
    // The router's bookings end for being idle.
    assert_eq!(setting.tracker.expire(u64::MAX), 1);
    setting.mirror.expired(&setting.tracker);
    setting.mirror.sweep(&mut setting.tracker, 6_000);
    assert!(setting.mirror.is_empty() && setting.mirror.by_request.is_empty());
    // One that was merely slow is asked for all it has.
    assert!(setting.alive(1));
}

#[test]
fn signs_of_life_keep_bookings_from_expiring() {
    let mut setting = Setting::new();
    setting.alive(0);
    setting.events(vec![event("a", 1, add(&[1], 16))]);
    setting.now_ms = 9_000;
    setting.alive(1);
    assert_eq!(setting.tracker.expire(9_000), 0);
}
