//! Messages captured from Dynamo 1.6.1, and what is made of broken ones.

use kv_core::event::{Envelope, EventData, KvCacheEvent, RouterEvent, StorageTier, Stored};
use kv_router::ingest::decode::{dynamo, json};
use kv_router::ingest::{MAX_EVENT_BLOCKS, Rejection};

macro_rules! fixture {
    ($name:literal) => {
        include_bytes!(concat!("fixtures/", $name, ".bin")).as_slice()
    };
}

fn stored(event: &RouterEvent) -> &Stored {
    match &event.event.data {
        EventData::Stored(stored) => stored,
        other => panic!("not stored: {other:?}"),
    }
}

/// A valid event of worker 7 with an id.
fn event(id: u64) -> RouterEvent {
    RouterEvent {
        worker_id: 7,
        storage_tier: StorageTier::Device,
        residency_domain: None,
        event: KvCacheEvent {
            event_id: id,
            data: EventData::Cleared,
            dp_rank: 0,
        },
        session_id: None,
    }
}

fn envelope(topic: &str, payload: Vec<u8>) -> Vec<u8> {
    rmp_serde::to_vec_named(&Envelope {
        publisher_id: 5,
        sequence: 0,
        published_at: 0,
        topic: topic.into(),
        payload,
    })
    .unwrap()
}

#[test]
fn captured_stores_are_read_to_the_last_bit() {
    let first = dynamo(fixture!("nats_kv_events_stored_1"));
    assert_eq!(first.rejected, []);
    assert_eq!(first.publisher, Some(3_482_576_219_587_071));
    let [event] = first.events.as_slice() else {
        panic!("{:?}", first.events);
    };
    assert_eq!(event.worker_id, 6_022_108_633_765_374_755);
    assert_eq!((event.event.event_id, event.event.dp_rank), (1, 0));
    let blocks = stored(event);
    assert_eq!((blocks.parent_hash, blocks.blocks.len()), (None, 13));
    assert_eq!(blocks.blocks[1].block_hash, 3_065_661_386_887_543_850);
    assert_eq!(blocks.blocks[12].tokens_hash, 5_330_395_620_010_969_367);

    let second = dynamo(fixture!("nats_kv_events_stored_2"));
    let blocks = stored(&second.events[0]);
    assert_eq!(blocks.parent_hash, Some(15_956_830_959_445_010_781));
    assert_eq!(blocks.blocks[0].block_hash, 18_419_619_693_281_230_692);
    assert_eq!(blocks.blocks[0].tokens_hash, 17_708_997_837_273_646_954);
}

#[test]
fn captured_messages_of_other_topics_are_told_apart() {
    for other in [
        fixture!("nats_kv_metrics_1"),
        fixture!("nats_active_sequences_events_1"),
    ] {
        let decoded = dynamo(other);
        assert_eq!(decoded.events, []);
        assert_eq!(decoded.rejected, [Rejection::WrongTopic]);
    }
}

#[test]
fn a_broken_msgpack_event_costs_nothing_but_itself() {
    let mut payload = vec![0x94];
    payload.extend(rmp_serde::to_vec_named(&event(1)).unwrap());
    payload.extend(rmp_serde::to_vec_named(&serde_json::json!({"worker_id": "x"})).unwrap());
    let foreign = RouterEvent {
        residency_domain: Some("cache_owner".into()),
        ..event(2)
    };
    payload.extend(rmp_serde::to_vec_named(&foreign).unwrap());
    let mut unknown_field = serde_json::to_value(event(3)).unwrap();
    unknown_field["shoe_size"] = 43.into();
    payload.extend(rmp_serde::to_vec_named(&unknown_field).unwrap());
    let decoded = dynamo(&envelope("kv-events", payload));
    assert_eq!(decoded.events, [event(1), event(3)]);
    assert_eq!(
        decoded.rejected,
        [Rejection::Malformed, Rejection::ResidencyDomain]
    );
}

#[test]
fn every_cut_of_a_message_is_refused_without_harm() {
    let whole = fixture!("nats_kv_events_stored_1");
    for cut in 0..whole.len() {
        let decoded = dynamo(&whole[..cut]);
        assert_eq!(decoded.events, [], "cut at {cut}");
        assert_eq!(decoded.rejected, [Rejection::Malformed], "cut at {cut}");
    }
}

#[test]
fn a_broken_json_event_costs_nothing_but_itself() {
    let good = serde_json::to_string(&event(1)).unwrap();
    let other = serde_json::to_string(&RouterEvent {
        worker_id: 8,
        ..event(2)
    })
    .unwrap();
    let text = format!(r#" [{good}, {{"worker_id": 7}}, {other}, 5, {good}]"#);
    let decoded = json(text.as_bytes(), 7);
    assert_eq!(decoded.events, [event(1), event(1)]);
    assert_eq!(
        decoded.rejected,
        [
            Rejection::Malformed,
            Rejection::WorkerMismatch,
            Rejection::Malformed
        ]
    );
    assert_eq!(json(good.as_bytes(), 7).events, [event(1)]);
    assert_eq!(json(b"[]", 7).rejected, []);
    for broken in [b"[{]".as_slice(), b"", b"{", b"\xff", b"7"] {
        assert_eq!(
            json(broken, 7).rejected,
            [Rejection::Malformed],
            "{broken:?}"
        );
    }
}

#[test]
fn an_event_of_too_many_blocks_is_refused() {
    let data = EventData::Removed(kv_core::event::Removed {
        block_hashes: vec![1; MAX_EVENT_BLOCKS + 1],
    });
    let mut large = event(1);
    large.event.data = data;
    let text = serde_json::to_vec(&large).unwrap();
    assert_eq!(json(&text, 7).rejected, [Rejection::TooManyBlocks]);
}
