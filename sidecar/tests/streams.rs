//! Workers' own streams by scripted arrivals: what counts after losses, restarts and
//! contradictions.

mod support;

use kv_core::event::EventData;
use kv_core::hash::{Hashing, Seed, sequence_hashes};
use kv_core::id::{Family, Slot, Tier};
use kv_core::naive::Naive;
use kv_core::rng::Rng;
use kv_router::dump::Line;
use kv_router::ingest::batch::{Batch, Origin, Turn};
use kv_router::ingest::{Arrival, Decoded, Plane, Rejection};
use serde_json::json;
use support::engine::{event, removed, stored, tokens};
use support::eventually;
use support::service::{Scripted, change, change_on};

const HTTP: &str = "workers: [{id: 1, endpoint: '1.1.1.1:1', data_parallel_size: 2, \
                    events: {http: {token_file: TOKEN}}}, \
                    {id: 2, endpoint: '1.1.1.1:2', events: {http: {token_file: TOKEN}}}]";
const PLANE: &str = "nats: {url: 'nats://127.0.0.1:1', dynamo: {namespace: d, component: c}}";

/// Dynamo's plane with these workers.
fn nats(workers: &[u64]) -> String {
    let worker = |id: &u64| format!("{{id: {id}, endpoint: '1.1.1.1:{id}'}}");
    let workers: Vec<String> = workers.iter().map(worker).collect();
    format!("{PLANE}\nworkers: [{}]", workers.join(", "))
}

fn events(plane: Plane, events: Vec<kv_core::event::RouterEvent>) -> Arrival {
    Arrival::Events {
        plane,
        received_ns: 0,
        decoded: Decoded {
            events,
            rejected: Vec::new(),
            publisher: Some(5),
        },
    }
}

#[tokio::test]
async fn a_batch_changes_the_ranks_of_its_worker_alone() {
    let service = Scripted::start(HTTP);
    let (a, b) = (tokens(0, 3), tokens(500, 2));
    let unknown_rank = change(2, stored(&a, 0, 100));
    let mut of_family = change(0, stored(&a, 0, 100));
    of_family.family = Family::FlexKv;
    let changes = vec![
        change(0, stored(&a, 0, 100)),
        unknown_rank,
        of_family,
        change_on(1, Some(Tier::Host), stored(&b, 0, 200)),
    ];
    service.turn(1, Turn::Opened).await;
    service.turn(1, Turn::Whole).await;
    service.batch(1, 0, changes).await;
    assert_eq!(service.overlap(1, 0, &a).await, [3, 0, 0, 0]);
    assert_eq!(service.overlap(1, 1, &b).await, [0, 2, 0, 0]);
    assert_eq!(service.overlap(2, 0, &a).await, [0; 4]);
    let owner = service.owner(1, 0).await;
    // Of Dynamo's family and of another.
    assert_eq!(owner["blocks"], 6);
    assert_eq!(owner["knowledge"], "whole");
    assert_eq!(owner["events"]["source"], "http");
    assert_eq!(owner["events"]["connected"], true);
    assert_eq!(owner["events"]["sequence"], 0);
    let rejected = json!({"unknown_rank": 1});
    assert_eq!(owner["events"]["rejected"], rejected);
    assert_eq!(service.owner(2, 0).await["knowledge"], "unknown");
    let ranks = &service.readiness().await["ranks"];
    assert_eq!(*ranks, json!({"whole": 2, "partial": 0, "unknown": 1}));
    let index = service.index().await;
    assert_eq!(index["planes"]["http"]["events"], json!({"stored": 3}));

    let nobody = Batch {
        changes: vec![change(0, stored(&a, 0, 100))],
        rejected: vec![Rejection::Malformed],
        ..Batch::default()
    };
    let origin = Origin {
        worker: 99,
        stream: 0,
    };
    service
        .arrive(Arrival::Batch(origin, Plane::Http, nobody))
        .await;
    let rejected = json!({"unknown_rank": 1, "malformed": 1, "unknown_worker": 1});
    assert_eq!(
        service.index().await["planes"]["http"]["rejected"],
        rejected
    );
}

#[tokio::test]
async fn clears_are_barriers_of_a_tier_or_of_all() {
    let service = Scripted::start(HTTP);
    let prompt = tokens(0, 3);
    let both = vec![
        change(0, stored(&prompt, 0, 100)),
        change_on(0, Some(Tier::Disk), stored(&prompt, 0, 100)),
        change(1, stored(&prompt, 0, 100)),
        change_on(0, Some(Tier::Device), EventData::Cleared),
    ];
    service.batch(1, 0, both).await;
    assert_eq!(service.overlap(1, 0, &prompt).await, [0, 0, 3, 0]);
    assert_eq!(service.owner(1, 0).await["knowledge"], "partial");
    let clear = vec![
        change_on(0, None, EventData::Cleared),
        change(0, stored(&prompt[..4], 0, 900)),
    ];
    service.batch(1, 1, clear).await;
    assert_eq!(service.overlap(1, 0, &prompt).await, [1, 0, 0, 0]);
    assert_eq!(service.overlap(1, 1, &prompt).await, [3, 0, 0, 0]);
    assert_eq!(service.owner(1, 0).await["knowledge"], "whole");
    assert_eq!(service.owner(1, 1).await["knowledge"], "partial");
}

#[tokio::test]
async fn after_a_gap_only_what_later_events_vouch_for_counts() {
    let service = Scripted::start(HTTP);
    let (a, b) = (tokens(0, 6), tokens(900, 3));
    service.turn(1, Turn::Whole).await;
    service
        .batch(
            1,
            0,
            vec![
                change(0, stored(&a[..16], 0, 100)),
                change(0, stored(&b, 0, 200)),
            ],
        )
        .await;
    service.turn(1, Turn::Gap { missing: 3 }).await;
    assert_eq!(service.overlap(1, 0, &a).await, [0; 4]);
    let owner = service.owner(1, 0).await;
    assert_eq!(
        (&owner["knowledge"], &owner["gaps"]),
        (&json!("partial"), &json!(1))
    );
    assert_eq!(owner["doubtful"], 7);
    // A prompt goes on behind block 102, so the engine has what is before it.
    let store = stored(&a, 3, 100);
    service
        .batch(1, 4, vec![change(0, store), change(0, removed(&[201]))])
        .await;
    assert_eq!(service.overlap(1, 0, &a).await, [6, 0, 0, 0]);
    assert_eq!(service.overlap(1, 0, &b).await, [0; 4]);
    assert_eq!(service.owner(1, 0).await["doubtful"], 2);
    let index = service.index().await;
    assert_eq!(index["blocks"]["unknown"], json!(0));
    // A clear leaves no doubt.
    service
        .batch(1, 5, vec![change_on(0, None, EventData::Cleared)])
        .await;
    let owner = service.owner(1, 0).await;
    assert_eq!(
        (&owner["knowledge"], &owner["doubtful"]),
        (&json!("whole"), &json!(0))
    );
    assert_eq!(service.overlap(1, 0, &a).await, [0; 4]);
}

#[tokio::test]
async fn one_lost_message_among_many_blocks_leaves_them() {
    let service = Scripted::start(HTTP);
    let prompt = tokens(0, 400);
    service
        .batch(1, 0, vec![change(0, stored(&prompt, 0, 1000))])
        .await;
    service.turn(1, Turn::Gap { missing: 1 }).await;
    assert_eq!(service.overlap(1, 0, &prompt).await, [400, 0, 0, 0]);
    assert_eq!(service.owner(1, 0).await["knowledge"], "partial");
    // How many are missing is not known.
    service.turn(1, Turn::Gap { missing: 0 }).await;
    assert_eq!(service.overlap(1, 0, &prompt).await, [0; 4]);
    service.turn(1, Turn::Whole).await;
    assert_eq!(service.overlap(1, 0, &prompt).await, [400, 0, 0, 0]);
}

#[tokio::test]
async fn an_engine_that_starts_anew_loses_its_blocks_and_no_other_does() {
    let service = Scripted::start(HTTP);
    let prompt = tokens(0, 3);
    for worker in [1, 2] {
        service.turn(worker, Turn::Whole).await;
        service
            .batch(worker, 7, vec![change(0, stored(&prompt, 0, 100))])
            .await;
    }
    service.turn(1, Turn::Restarted).await;
    assert_eq!(service.overlap(1, 0, &prompt).await, [0; 4]);
    assert_eq!(service.overlap(2, 0, &prompt).await, [3, 0, 0, 0]);
    assert_eq!(service.owner(1, 0).await["events"]["sequence"], json!(null));
    service
        .batch(1, 0, vec![change(0, stored(&prompt, 0, 500))])
        .await;
    assert_eq!(service.overlap(1, 0, &prompt).await, [3, 0, 0, 0]);
    service.turn(1, Turn::Closed).await;
    assert_eq!(service.owner(1, 0).await["events"]["connected"], false);
}

#[tokio::test]
async fn of_two_sources_the_configured_one_counts_and_the_other_is_shown() {
    let service = Scripted::start(&format!("{PLANE}\n{HTTP}"));
    let (a, b) = (tokens(0, 3), tokens(900, 3));
    let consolidator = vec![event(2, 1, stored(&b, 0, 200))];
    service.arrive(events(Plane::Dynamo, consolidator)).await;
    service
        .batch(2, 0, vec![change(0, stored(&a, 0, 100))])
        .await;
    assert_eq!(service.overlap(2, 0, &a).await, [3, 0, 0, 0]);
    assert_eq!(service.overlap(2, 0, &b).await, [0; 4]);
    let owner = service.owner(2, 0).await;
    assert_eq!(owner["events"]["source"], "http");
    assert_eq!(owner["events"]["refused"], json!(["dynamo"]));
    assert_eq!(owner["events"]["rejected"], json!({"other_source": 1}));
}

#[tokio::test]
async fn a_restarted_service_takes_streams_up_where_they_were() {
    let service = Scripted::start(HTTP);
    let prompt = tokens(0, 3);
    service.turn(1, Turn::Whole).await;
    service
        .batch(1, 41, vec![change(0, stored(&prompt, 0, 100))])
        .await;
    service
        .batch(2, 9, vec![change(0, stored(&prompt[..8], 0, 100))])
        .await;
    service.turn(2, Turn::Gap { missing: 0 }).await;
    assert_eq!(service.overlap(2, 0, &prompt).await, [0; 4]);
    let service = service.restart().await;
    let resume = |worker| service.resume[&Origin { worker, stream: 0 }];
    assert_eq!(
        (resume(1).sequence, resume(1).mark, resume(1).is_whole),
        (41, 41 ^ 77, true)
    );
    assert_eq!((resume(2).sequence, resume(2).is_whole), (9, false));
    assert_eq!(service.overlap(1, 0, &prompt).await, [3, 0, 0, 0]);
    // What was in doubt still is, and can be vouched for.
    assert_eq!(service.owner(2, 0).await["doubtful"], 2);
    service
        .batch(2, 12, vec![change(0, stored(&prompt, 2, 100))])
        .await;
    assert_eq!(service.overlap(2, 0, &prompt).await, [3, 0, 0, 0]);
    // Another source counts its messages in another way.
    let polled = HTTP.replace(
        "'1.1.1.1:2', events: {http: {token_file: TOKEN}}",
        "'1.1.1.1:2', events: {trtllm: {url: 'http://1.1.1.1:2/kv_cache_events'}}",
    );
    let service = service.restart_with(&polled).await;
    let taken_up: Vec<u64> = service.resume.keys().map(|origin| origin.worker).collect();
    assert_eq!(taken_up, [1]);
}

#[tokio::test]
async fn a_worker_without_an_endpoint_is_indexed_and_shown_and_served_once_it_has_one() {
    let service = Scripted::start(&nats(&[1]));
    let prompt = tokens(0, 3);
    let early = vec![event(7, 1, stored(&prompt[..8], 0, 100))];
    service.arrive(events(Plane::Dynamo, early)).await;
    let workers = service.workers().await;
    let stranger = &workers["no_endpoint"][0];
    assert_eq!(
        (&stranger["worker"], &stranger["state"]),
        (&json!(7), &json!("no endpoint"))
    );
    assert_eq!(stranger["ranks"][0]["blocks"], 2);
    assert_eq!(workers["pools"][0]["owners"].as_array().unwrap().len(), 1);
    let index = service.index().await;
    assert_eq!(index["stats"]["owner_blocks"], 0);
    service.configure(&nats(&[1, 7])).await;
    assert_eq!(service.overlap(7, 0, &prompt).await, [2, 0, 0, 0]);
    assert_eq!(service.workers().await["no_endpoint"], json!([]));
    service
        .arrive(events(
            Plane::Dynamo,
            vec![event(7, 2, stored(&prompt, 2, 100))],
        ))
        .await;
    assert_eq!(service.overlap(7, 0, &prompt).await, [3, 0, 0, 0]);
    let owner = service.owner(7, 0).await;
    assert_eq!(
        (&owner["knowledge"], &owner["gaps"]),
        (&json!("whole"), &json!(0))
    );
}

#[tokio::test]
async fn events_lost_on_dynamos_plane_put_blocks_in_doubt() {
    let service = Scripted::start(&nats(&[1]));
    let prompt = tokens(0, 4);
    for (id, data) in [(1, stored(&prompt[..12], 0, 100)), (5, removed(&[999]))] {
        service
            .arrive(events(Plane::Dynamo, vec![event(1, id, data)]))
            .await;
    }
    assert_eq!(service.overlap(1, 0, &prompt).await, [0; 4]);
    let owner = service.owner(1, 0).await;
    assert_eq!((&owner["gaps"], &owner["doubtful"]), (&json!(1), &json!(3)));
    service
        .arrive(events(
            Plane::Dynamo,
            vec![event(1, 6, stored(&prompt, 3, 100))],
        ))
        .await;
    assert_eq!(service.overlap(1, 0, &prompt).await, [4, 0, 0, 0]);
    assert_eq!(service.owner(1, 0).await["partial"], true);
}

#[tokio::test]
async fn a_gap_of_json_events_without_a_snapshot_is_one_gap_and_puts_blocks_in_doubt() {
    let yaml = "nats: {url: 'nats://127.0.0.1:1', json_subject: 'e.{worker_id}'}\n\
                workers: [{id: 1, endpoint: '1.1.1.1:1'}]";
    let service = Scripted::start(yaml);
    let prompt = tokens(0, 4);
    let first = event(1, 1, stored(&prompt[..12], 0, 100));
    service.arrive(events(Plane::Json, vec![first])).await;
    assert_eq!(service.owner(1, 0).await["knowledge"], "whole");
    let late = event(1, 5, stored(&prompt, 3, 100));
    service.arrive(events(Plane::Json, vec![late])).await;
    let known = async || {
        let owner = service.owner(1, 0).await;
        (owner["last_event_id"] == 5).then_some(owner)
    };
    let owner = eventually("it goes on without a snapshot", known).await;
    assert_eq!(
        (&owner["gaps"], &owner["knowledge"]),
        (&json!(1), &json!("partial"))
    );
    assert_eq!(service.overlap(1, 0, &prompt).await, [4, 0, 0, 0]);
}

/// A random change under names that differ from worker to worker.
fn random_change(rng: &mut Rng, worker: u64) -> (Option<Tier>, EventData) {
    let prompt = tokens(
        1000 * u32::try_from(rng.below(6)).unwrap(),
        1 + u32::try_from(rng.below(40)).unwrap(),
    );
    let name = 10_000 * worker + 1000 * u64::from(prompt[0]);
    let blocks = prompt.len() as u64 / 4;
    match rng.below(100) {
        0 => (None, EventData::Cleared),
        1..25 => {
            let gone: Vec<u64> = (0..blocks)
                .filter(|_| rng.below(3) == 0)
                .map(|i| name + i)
                .collect();
            (Some(Tier::from_index(rng.below(2))), removed(&gone))
        }
        _ => (
            Some(Tier::from_index(rng.below(2))),
            stored(&prompt, 0, name),
        ),
    }
}

#[tokio::test]
async fn random_histories_leave_what_a_naive_index_has_and_survive_a_restart() {
    let service = Scripted::start(HTTP);
    let mut rng = Rng::new(3);
    let mut naive = Naive::default();
    for worker in [1, 2] {
        service.turn(worker, Turn::Whole).await;
    }
    for sequence in 0..400 {
        let worker = 1 + sequence % 2;
        let (tier, data) = random_change(&mut rng, worker);
        let slot = Slot(u16::try_from(worker).unwrap());
        naive.apply(0, slot, tier.unwrap_or_default(), &data);
        service
            .batch(worker, sequence, vec![change_on(0, tier, data)])
            .await;
    }
    let mut some_overlap = 0;
    for family in 0..6 {
        let prompt = tokens(1000 * family, 40);
        let hashes = sequence_hashes(&prompt, Hashing::new(4, Seed::new("", "")));
        let expected = naive.overlaps(0, &[hashes]).remove(0);
        some_overlap += expected.len();
        for worker in [1, 2] {
            let held = expected
                .iter()
                .find(|(slot, _)| u64::from(slot.0) == worker);
            let held = held.map_or([0; 4], |(_, overlap)| overlap.by_tier());
            assert_eq!(service.overlap(worker, 0, &prompt).await, held);
        }
    }
    assert!(some_overlap > 3);
    let before = service.blocks().await;
    let service = service.restart().await;
    assert_eq!(service.blocks().await, before);
    assert_eq!(service.index().await["restored"], true);
}

#[tokio::test]
async fn a_dump_made_while_events_come_is_exact_with_those_after_its_beginning() {
    let service = Scripted::start(HTTP);
    let long = tokens(0, 9000);
    service.turn(1, Turn::Whole).await;
    service.turn(2, Turn::Whole).await;
    service
        .batch(1, 0, vec![change(0, stored(&long, 0, 1))])
        .await;
    let mut lines = service.begin_dump().await.unwrap();
    let mut rng = Rng::new(5);
    let (mut dump, mut batches) = (Vec::new(), Vec::new());
    while let Some(line) = lines.recv().await {
        dump.push(line);
        let sequence = batches.len() as u64 + 1;
        let gone: Vec<u64> = (0..50).map(|_| 1 + rng.below(9000) as u64).collect();
        let from = u32::try_from(rng.below(8000)).unwrap();
        let again = stored(&long[..4 * (from as usize + 500)], from, 1);
        let mut changes = vec![change(0, removed(&gone)), change(0, again)];
        if sequence == 8 {
            changes.push(change_on(0, None, EventData::Cleared));
            changes.push(change(0, stored(&long[..4000], 0, 1)));
        }
        service.batch(1, sequence, changes.clone()).await;
        batches.push((sequence, changes));
    }
    assert!(matches!(dump.last(), Some(Line::End { owners: 3, .. })));
    let parts = dump
        .iter()
        .filter(|l| matches!(l, Line::Blocks { .. }))
        .count();
    assert!(parts > 2, "{parts}");

    let copy = Scripted::start_from(HTTP, dump);
    let resume = copy.resume[&Origin {
        worker: 1,
        stream: 0,
    }];
    assert_eq!((resume.sequence, resume.is_whole), (0, true));
    for (sequence, changes) in batches {
        copy.batch(1, sequence, changes).await;
    }
    assert_eq!(copy.blocks().await, service.blocks().await);
    let prompts = [&long[..400], &long[..]];
    for prompt in prompts {
        let expected = service.overlap(1, 0, prompt).await;
        assert_eq!(copy.overlap(1, 0, prompt).await, expected);
    }
    assert_eq!(copy.owner(1, 0).await["knowledge"], "whole");
}
