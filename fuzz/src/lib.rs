//! What the fuzz targets do with bytes: every decoder of events, each holding the promise that
//! nothing in a message makes it panic, and that what comes out is bounded.

use std::path::Path;

use kv_core::event::EventData;
use kv_core::id::{Family, Tier};
use kv_router::check_events::Checker;
use kv_router::config::FamilyUse;
use kv_router::ingest::engine::media::Media;
use kv_router::ingest::engine::{Encoding, MAX_BATCH_EVENTS, Normalised, Normaliser, Settings};
use kv_router::ingest::{Decoded, MAX_EVENT_BLOCKS, decode};

/// What a target does with one input.
pub type Target = fn(&[u8]);

/// The targets by name.
pub const TARGETS: [(&str, Target); 5] = [
    ("engine_msgpack", engine_msgpack),
    ("engine_json", engine_json),
    ("dynamo_plane", dynamo_plane),
    ("json_plane", json_plane),
    ("check_events", check_events),
];

fn settings(block_size: u32) -> Settings {
    Settings {
        block_size,
        media: Media::new([("tape", Tier::External)]),
        families: vec![FamilyUse {
            hash_seed: "0".to_owned(),
            max_blocks: None,
            family: Family::FlexKv,
            media: vec!["CPU".into(), "SSD".into()],
            block_size,
        }],
        image_token: (block_size == 16).then_some(5),
    }
}

fn bounded(taken: &Normalised) {
    assert!(taken.changes.len() + taken.rejected.len() < 4 * MAX_BATCH_EVENTS);
    for change in &taken.changes {
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
        bounded(&first);
        // What it remembers may change what comes of the same message, not that it comes.
        bounded(&normaliser.batch(bytes, encoding));
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
        match serde_json::from_slice::<serde_json::Value>(&bytes) {
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
