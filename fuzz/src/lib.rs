//! What the fuzz targets do with bytes: every decoder of events and every reader of requests and
//! answers, each holding the promise that nothing in a message makes it panic, and that what comes
//! out is bounded.

mod text;

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::{Arc, LazyLock};

use bytes::{Bytes, BytesMut};
use kv_core::event::EventData;
use kv_core::id::{Family, Tier};
use kv_router::check_events::Checker;
use kv_router::config::FamilyUse;
use kv_router::ingest::batch::{Change, Origin};
use kv_router::ingest::engine::media::Media;
use kv_router::ingest::engine::{Encoding, MAX_BATCH_EVENTS, Normaliser, Settings};
use kv_router::ingest::post::{Credentials, Desk, PostError, Taken};
use kv_router::ingest::stream::{Hall, Outlet};
use kv_router::ingest::zmtp::{Codec, Unit};
use kv_router::ingest::{Arrival, Decoded, MAX_EVENT_BLOCKS, Plane, Rejection, decode};
use kv_router::metrics::Metrics;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_util::codec::{Decoder as _, Encoder as _};

pub use text::{answer_stream, prompt, request_body};

/// One way in for bytes from outside.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name.
    pub name: &'static str,
    /// Takes an input, and panics if a promise is broken.
    pub run: fn(&[u8]),
    /// Makes an input of an engine's message.
    pub wrap: fn(&[u8]) -> Vec<u8>,
    /// How many times as long as the others it takes.
    pub cost: usize,
}

/// The targets.
pub const TARGETS: [Target; 10] = [
    bare("engine_msgpack", engine_msgpack),
    bare("engine_json", engine_json),
    bare("dynamo_plane", dynamo_plane),
    bare("json_plane", json_plane),
    bare("check_events", check_events),
    Target {
        name: "post_body",
        run: post_body,
        wrap: posted,
        cost: 1,
    },
    Target {
        name: "zmtp",
        run: zmtp,
        wrap: published,
        cost: 1,
    },
    Target {
        name: "request_body",
        run: request_body,
        wrap: text::chat,
        cost: 1,
    },
    Target {
        name: "prompt",
        run: prompt,
        wrap: text::chat,
        cost: 20,
    },
    Target {
        name: "answer_stream",
        run: answer_stream,
        wrap: text::streamed,
        cost: 1,
    },
];

const fn bare(name: &'static str, run: fn(&[u8])) -> Target {
    Target {
        name,
        run,
        wrap: <[u8]>::to_vec,
        cost: 1,
    }
}

fn settings(block_size: u32) -> Settings {
    Settings {
        block_size,
        media: Media::new([("tape", Tier::External)]),
        families: vec![FamilyUse {
            hash_seed: "0".to_owned(),
            max_blocks: None,
            objects: 2,
            family: Family::FlexKv,
            media: vec!["CPU".into(), "SSD".into()],
            block_size,
        }],
        image_token: (block_size == 16).then_some(5),
    }
}

fn bounded(changes: &[Change], rejected: &[Rejection]) {
    assert!(changes.len() + rejected.len() < 4 * MAX_BATCH_EVENTS);
    for change in changes {
        assert!(change.rank < 1024);
        match &change.data {
            EventData::Stored(stored) => {
                assert!(!stored.blocks.is_empty());
                assert!(stored.blocks.len() <= MAX_EVENT_BLOCKS);
                assert!(change.tier.is_some());
            }
            EventData::Removed(removed) => {
                assert!(!removed.block_hashes.is_empty());
                assert!(change.tier.is_some());
            }
            EventData::Cleared => assert_eq!(change.family, Family::Dynamo),
        }
    }
}

fn engine(bytes: &[u8], encoding: Encoding) {
    for block_size in [1, 16] {
        let mut normaliser = Normaliser::new(settings(block_size), 0);
        let first = normaliser.batch(bytes, encoding);
        bounded(&first.changes, &first.rejected);
        // What it remembers may change what comes of the same message, not that it comes.
        let again = normaliser.batch(bytes, encoding);
        bounded(&again.changes, &again.rejected);
        normaliser.reset();
        assert_eq!(normaliser.batch(bytes, encoding), first);
    }
}

/// Messages of engines in MessagePack.
pub fn engine_msgpack(bytes: &[u8]) {
    engine(bytes, Encoding::MsgPack);
}

/// Messages of engines in JSON.
pub fn engine_json(bytes: &[u8]) {
    engine(bytes, Encoding::Json);
}

fn fit(decoded: &Decoded) {
    for event in &decoded.events {
        assert_eq!(decode::fit(event), Ok(()));
    }
}

/// Messages of Dynamo's event plane.
pub fn dynamo_plane(bytes: &[u8]) {
    fit(&decode::dynamo(bytes));
}

/// Messages of the plain plane.
pub fn json_plane(bytes: &[u8]) {
    let decoded = decode::json(bytes, 7);
    fit(&decoded);
    assert!(decoded.events.iter().all(|event| event.worker_id == 7));
}

/// Messages of any kind, as `kv-router check-events` takes them.
pub fn check_events(bytes: &[u8]) {
    let mut checker = Checker::new(settings(16), 0);
    checker.message(Some("input"), bytes);
    let report = checker.report();
    assert!(!report.to_string().is_empty());
    assert!(serde_json::to_value(&report).is_ok());
}

/// The worker that posts.
const POSTER: u64 = 7;
/// Ranks of the worker that posts.
const RANKS: u32 = 2;

static METRICS: LazyLock<Arc<Metrics>> = LazyLock::new(Arc::default);

/// Bodies of posts, each to a door that has taken none.
pub fn post_body(bytes: &[u8]) {
    let body = Bytes::copy_from_slice(bytes);
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    let runtime = runtime.expect("a runtime");
    for encoding in [Encoding::Json, Encoding::MsgPack] {
        runtime.block_on(post(body.clone(), encoding));
    }
}

async fn post(body: Bytes, encoding: Encoding) {
    let (arrivals, mut arrived) = mpsc::channel(16);
    let hall = Hall {
        arrivals,
        bytes_per_second: 1 << 40,
        metrics: Arc::clone(&METRICS),
    };
    let outlet = |stream| {
        let worker = POSTER;
        let normaliser = Normaliser::new(settings(16), stream);
        let origin = Origin { worker, stream };
        Outlet::new(hall.clone(), origin, Plane::Http, normaliser)
    };
    let desk = Desk::default();
    let credentials = Credentials {
        token_file: None,
        trusts_loopback: true,
    };
    desk.open(POSTER, credentials, (0..RANKS).map(outlet));
    desk.begin();
    let from = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let poster = desk.poster(None, from).await.expect("a poster");
    let taken = match poster.post(body.clone(), encoding).await {
        Ok(taken) => taken,
        Err(error) => {
            assert_ne!(error, PostError::Gone);
            assert!(arrived.try_recv().is_err(), "refused, but told");
            return;
        }
    };
    let mut batches = 0;
    while let Ok(arrival) = arrived.try_recv() {
        let (Arrival::Batch(origin, ..) | Arrival::Turn(origin, ..)) = &arrival else {
            panic!("{arrival:?}");
        };
        assert!(origin.worker == POSTER && origin.stream < RANKS);
        let Arrival::Batch(_, _, batch) = arrival else {
            continue;
        };
        assert_eq!(batch.changes.len(), taken.changes);
        assert_eq!(batch.rejected.len(), taken.rejected);
        bounded(&batch.changes, &batch.rejected);
        batches += 1;
    }
    assert_eq!(batches, 1);
    let again = Taken {
        changes: 0,
        rejected: 0,
        duplicate: true,
        ..taken
    };
    assert_eq!(poster.post(body, encoding).await, Ok(again));
    assert!(arrived.try_recv().is_err(), "a duplicate was told");
}

/// A message as the body of a post.
fn posted(message: &[u8]) -> Vec<u8> {
    let batch: Option<Value> = serde_json::from_slice(message)
        .or_else(|_| rmp_serde::from_slice(message))
        .ok();
    let events = match &batch {
        Some(Value::Array(parts)) if parts.len() >= 2 && parts[1].is_array() => &parts[1],
        Some(events @ Value::Array(_)) => events,
        _ => return message.to_vec(),
    };
    let post = json!({
        "worker_id": POSTER, "stream": 0, "incarnation": "a", "sequence": 0, "events": events,
    });
    match message.first() {
        Some(b'{' | b'[') => post.to_string().into_bytes(),
        _ => rmp_serde::to_vec(&post).unwrap_or_default(),
    }
}

/// Most bytes of a message over ZMQ.
const ZMQ_BYTES: usize = 1 << 14;

/// What a ZMQ peer sends; the first byte says in pieces of how many bytes.
pub fn zmtp(bytes: &[u8]) {
    let Some((piece, wire)) = bytes.split_first() else {
        return;
    };
    let whole = units(wire, wire.len());
    assert_eq!(units(wire, 1 + usize::from(*piece)), whole);
    let mut again = BytesMut::new();
    for unit in &whole.0 {
        let mut codec = Codec::new(ZMQ_BYTES);
        codec.encode(unit.clone(), &mut again).expect("an encoding");
    }
    assert_eq!(units(&again, again.len()), (whole.0, None));
}

/// What comes out, and why it ends before the wire does.
fn units(wire: &[u8], piece: usize) -> (Vec<Unit>, Option<&'static str>) {
    let (mut codec, mut buffer, mut units) = (Codec::new(ZMQ_BYTES), BytesMut::new(), vec![]);
    for piece in wire.chunks(piece.max(1)) {
        buffer.extend_from_slice(piece);
        loop {
            match codec.decode(&mut buffer) {
                Ok(Some(unit)) => units.push(unit),
                Ok(None) => break,
                Err(error) => return (units, Some(error.kind())),
            }
        }
        assert!(buffer.capacity() <= 2 * (ZMQ_BYTES + wire.len()) + 64);
    }
    for unit in &units {
        if let Unit::Message(frames) = unit {
            assert!(!frames.is_empty());
            assert!(frames.iter().map(Bytes::len).sum::<usize>() <= ZMQ_BYTES);
        }
    }
    (units, None)
}

/// A message as a publisher sends it over a new connection.
fn published(message: &[u8]) -> Vec<u8> {
    let ready = b"\x05READY\x0bSocket-Type\0\0\0\x03PUB";
    let frames = [b"kv-events", &[0_u8; 8][..], message];
    let units = [
        Unit::Greeting,
        Unit::Command(Bytes::from_static(ready)),
        Unit::Message(frames.map(Bytes::copy_from_slice).to_vec()),
    ];
    let mut wire = BytesMut::from(&[31][..]);
    let mut codec = Codec::new(ZMQ_BYTES);
    for unit in units {
        codec.encode(unit, &mut wire).expect("an encoding");
    }
    wire.to_vec()
}

/// Every genuine message below a folder of fixtures, in the same order each time.
///
/// # Errors
/// When a file can't be read.
pub fn corpus(folder: &Path) -> std::io::Result<Vec<Vec<u8>>> {
    let mut entries: Vec<_> = std::fs::read_dir(folder)?.collect::<Result<_, _>>()?;
    entries.sort_by_key(std::fs::DirEntry::path);
    let mut messages = Vec::new();
    for entry in entries {
        let path = entry.path();
        if path.is_dir() {
            messages.extend(corpus(&path)?);
            continue;
        }
        let bytes = std::fs::read(&path)?;
        match serde_json::from_slice::<Value>(&bytes) {
            // A description of a message holds it decoded.
            Ok(described) => {
                for key in ["event", "wire_decoded"] {
                    let held = described.get(key);
                    messages.extend(held.map(|it| it.to_string().into_bytes()));
                }
            }
            Err(_) => messages.push(bytes),
        }
    }
    Ok(messages)
}
