//! `kv-router check-events`: what an engine's events look like, what the index would make of them,
//! and what to do about the rest.
//!
//! The same decoders and the same normaliser as in the sidecar, so the verdict is what will happen.

mod advice;
pub mod command;
mod guess;
pub mod live;
mod text;

use std::collections::{BTreeMap, BTreeSet};

use kv_core::event::{EventData, RouterEvent};
use kv_core::id::{DpRank, Family, Tier};
use serde::Serialize;

use crate::ingest::batch::Change;
use crate::ingest::engine::inspect::{self, HashForm, Seen};
use crate::ingest::engine::{Encoding, Normaliser, Settings};
use crate::ingest::{Decoded, Rejection, decode};

/// Most bytes of a file; a message may have fewer.
pub const MAX_FILE_BYTES: u64 = 64 << 20;
/// First byte of a frame of Dynamo's ZMQ plane, followed by the length of the rest.
const FRAME_VERSION: u8 = 1;

/// Watches messages of one stream.
#[derive(Debug)]
pub struct Checker {
    settings: Settings,
    normaliser: Normaliser,
    seen: Seen,
    planes: BTreeSet<&'static str>,
    messages: usize,
    /// Messages that were not understood.
    riddles: usize,
    files: Vec<File>,
    totals: Totals,
}

#[derive(Debug, Default)]
struct Totals {
    bytes: u64,
    stored: BTreeMap<Tier, u64>,
    removed: BTreeMap<Tier, u64>,
    cleared: u64,
    families: BTreeMap<Family, u64>,
    ranks: BTreeSet<DpRank>,
    dropped: BTreeMap<&'static str, (Rejection, u64)>,
    sequences: Option<Sequences>,
    replay: Option<live::Replay>,
}

/// Numbers of a live stream's messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Sequences {
    /// Number of the first message.
    pub first: u64,
    /// Number of the last one.
    pub last: u64,
    /// Messages that were passed over.
    pub missing: u64,
    /// Times that the numbers went back: the engine began anew.
    pub restarts: u64,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Whether every message was read to its end and every event was one that is known.
    pub understood: bool,
    /// Messages.
    pub messages: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Layouts, in words.
    pub shapes: Vec<String>,
    /// What most likely sends them.
    pub engine: String,
    /// Events by name.
    pub events: BTreeMap<String, u64>,
    /// Tokens to an engine's block, with events.
    pub block_sizes: BTreeMap<u32, u64>,
    /// Tokens to a block of the index.
    pub kv_cache_block_size: u32,
    /// Media as written, with tier and events.
    pub media: BTreeMap<String, Medium>,
    /// Groups of attention with their kinds.
    pub groups: BTreeMap<u32, Option<String>>,
    /// How hashes are written.
    pub hashes: Vec<String>,
    /// What the hashes are taken for, with changes.
    pub families: BTreeMap<String, u64>,
    /// Data-parallel ranks.
    pub ranks: Vec<DpRank>,
    /// Numbers of messages, where there are any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sequences: Option<Sequences>,
    /// What the replay socket has, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replay: Option<live::Replay>,
    /// What would be done to the index.
    pub indexed: Indexed,
    /// Events that would be dropped, by reason.
    pub dropped: BTreeMap<String, Dropped>,
    /// What to do.
    pub advice: Vec<String>,
    /// Messages that were named, such as files.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<File>,
}

/// A medium of events.
#[derive(Clone, Debug, Serialize)]
pub struct Medium {
    /// Its tier, if known.
    pub tier: Option<Tier>,
    /// Events.
    pub events: u64,
}

/// What would be done to the index.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Indexed {
    /// Blocks stored, by tier.
    pub stored_blocks: BTreeMap<Tier, u64>,
    /// Blocks removed, by tier.
    pub removed_blocks: BTreeMap<Tier, u64>,
    /// Clears.
    pub clears: u64,
}

/// Events that would be dropped for one reason.
#[derive(Clone, Debug, Serialize)]
pub struct Dropped {
    /// Events.
    pub events: u64,
    /// What the reason means.
    pub why: &'static str,
}

/// What became of a file.
#[derive(Clone, Debug, Serialize)]
pub struct File {
    /// Its name.
    pub name: String,
    /// Whether it was understood.
    pub understood: bool,
    /// Changes it makes.
    pub changes: u64,
    /// Events dropped, by reason.
    pub dropped: BTreeMap<&'static str, u64>,
}

/// The block size that some messages suggest: the smallest they name.
#[must_use]
pub fn suggested_block_size<'m>(messages: impl IntoIterator<Item = &'m [u8]>) -> Option<u32> {
    let mut seen = Seen::default();
    for bytes in messages {
        let bytes = unwrapped(bytes);
        inspect::message(&bytes, encoding(&bytes), &mut seen);
    }
    seen.block_sizes.into_keys().find(|size| *size > 0)
}

impl Checker {
    /// For a stream of a pool with these settings.
    #[must_use]
    pub fn new(settings: Settings, rank: DpRank) -> Self {
        Self {
            normaliser: Normaliser::new(settings.clone(), rank),
            settings,
            seen: Seen::default(),
            planes: BTreeSet::new(),
            messages: 0,
            riddles: 0,
            files: Vec::new(),
            totals: Totals::default(),
        }
    }

    /// Takes the number of a live stream's next message.
    pub fn sequence(&mut self, number: u64) {
        let Some(sequences) = &mut self.totals.sequences else {
            let (missing, restarts) = (0, 0);
            let (first, last) = (number, number);
            self.totals.sequences = Some(Sequences {
                first,
                last,
                missing,
                restarts,
            });
            return;
        };
        if number <= sequences.last {
            sequences.restarts += 1;
            self.normaliser.reset();
        } else {
            sequences.missing += number - sequences.last - 1;
        }
        sequences.last = number;
    }

    /// Takes what a replay socket has.
    pub fn replay(&mut self, replay: live::Replay) {
        self.totals.replay = Some(replay);
    }

    /// Takes a message, with the name of its file if it has one.
    pub fn message(&mut self, name: Option<&str>, bytes: &[u8]) {
        self.totals.bytes += bytes.len() as u64;
        let bytes = &*unwrapped(bytes);
        let (changes, rejected) = match dynamo(bytes) {
            Some((plane, decoded)) => {
                self.planes.insert(plane);
                (self.router_events(&decoded.events), decoded.rejected)
            }
            None => {
                let encoding = encoding(bytes);
                inspect::message(bytes, encoding, &mut self.seen);
                let normalised = self.normaliser.batch(bytes, encoding);
                (normalised.changes, normalised.rejected)
            }
        };
        for change in &changes {
            self.totals.change(change);
        }
        let mut dropped: BTreeMap<&'static str, u64> = BTreeMap::new();
        for rejection in &rejected {
            *dropped.entry(rejection.kind()).or_default() += 1;
            let total = self.totals.dropped.entry(rejection.kind());
            total.or_insert((*rejection, 0)).1 += 1;
        }
        let understood = !rejected.iter().copied().any(inspect::is_riddle);
        self.messages += 1;
        self.riddles += usize::from(!understood);
        if let Some(name) = name {
            self.files.push(File {
                name: name.to_owned(),
                understood,
                changes: changes.len() as u64,
                dropped,
            });
        }
    }

    fn router_events(&mut self, events: &[RouterEvent]) -> Vec<Change> {
        let change = |event: &RouterEvent| Change {
            rank: event.event.dp_rank,
            tier: Some(event.storage_tier.into()),
            family: Family::Dynamo,
            data: event.event.data.clone(),
        };
        for event in events {
            let name = match event.event.data {
                EventData::Stored(_) => "stored",
                EventData::Removed(_) => "removed",
                EventData::Cleared => "cleared",
            };
            *self.seen.events.entry(name.to_owned()).or_default() += 1;
        }
        events.iter().map(change).collect()
    }

    /// What came of it so far.
    #[must_use]
    pub fn report(&self) -> Report {
        let seen = &self.seen;
        let totals = &self.totals;
        let medium = |(name, events): (&String, &u64)| {
            let tier = self.settings.media.tier(name);
            let events = *events;
            (name.clone(), Medium { tier, events })
        };
        let dropped = totals.dropped.iter().map(|(kind, (rejection, events))| {
            let why = advice::why(*rejection);
            let events = *events;
            ((*kind).to_owned(), Dropped { events, why })
        });
        let family = |(family, changes): (&Family, &u64)| (text::family(*family), *changes);
        let planes = self.planes.iter().map(|plane| (*plane).to_owned());
        let mut ranks = seen.ranks.clone();
        ranks.extend(&totals.ranks);
        Report {
            understood: self.messages > 0 && self.riddles == 0,
            messages: self.messages,
            bytes: totals.bytes,
            shapes: seen.shapes.iter().cloned().chain(planes).collect(),
            engine: guess::engine(seen, !self.planes.is_empty()),
            events: seen.events.clone(),
            block_sizes: seen.block_sizes.clone(),
            kv_cache_block_size: self.settings.block_size,
            media: seen.media.iter().map(medium).collect(),
            groups: seen.groups.clone(),
            hashes: seen.hashes.iter().map(|form| hash_form(*form)).collect(),
            families: totals.families.iter().map(family).collect(),
            ranks: ranks.into_iter().collect(),
            sequences: totals.sequences,
            replay: totals.replay,
            indexed: Indexed {
                stored_blocks: totals.stored.clone(),
                removed_blocks: totals.removed.clone(),
                clears: totals.cleared,
            },
            dropped: dropped.collect(),
            advice: advice::advice(seen, &self.settings, totals),
            files: self.files.clone(),
        }
    }
}

impl Totals {
    fn change(&mut self, change: &Change) {
        self.ranks.insert(change.rank);
        let (blocks, by_tier) = match &change.data {
            EventData::Stored(stored) => (stored.blocks.len(), &mut self.stored),
            EventData::Removed(removed) => (removed.block_hashes.len(), &mut self.removed),
            EventData::Cleared => {
                self.cleared += 1;
                return;
            }
        };
        *self.families.entry(change.family).or_default() += 1;
        let tier = change.tier.unwrap_or_default();
        *by_tier.entry(tier).or_default() += blocks as u64;
    }

    fn stored(&self) -> u64 {
        self.stored.values().sum()
    }

    fn dropped(&self, rejection: Rejection) -> u64 {
        let dropped = self.dropped.get(rejection.kind());
        dropped.map_or(0, |(_, events)| *events)
    }
}

fn hash_form(form: HashForm) -> String {
    match form {
        HashForm::Unsigned => "integers".into(),
        HashForm::Signed => "signed integers".into(),
        HashForm::Bytes(length) => format!("{length} bytes"),
        HashForm::Text => "text".into(),
    }
}

/// How a message is encoded: a MessagePack message is a list or a map, and neither begins like JSON.
fn encoding(bytes: &[u8]) -> Encoding {
    match bytes.iter().find(|b| !b.is_ascii_whitespace()) {
        Some(b'[' | b'{') => Encoding::Json,
        _ => Encoding::MsgPack,
    }
}

/// A capture may have a dictionary of TensorRT-LLM under `event`, beside notes on it.
fn unwrapped(bytes: &[u8]) -> std::borrow::Cow<'_, [u8]> {
    if encoding(bytes) == Encoding::Json
        && let Ok(capture) = serde_json::from_slice::<serde_json::Value>(bytes)
        && let Some(event) = capture.get("event")
        && event.pointer("/data/type").is_some()
    {
        return event.to_string().into_bytes().into();
    }
    bytes.into()
}

/// A message of Dynamo's, with the name of its plane.
fn dynamo(bytes: &[u8]) -> Option<(&'static str, Decoded)> {
    if encoding(bytes) == Encoding::Json {
        let value: serde_json::Value = serde_json::from_slice(bytes).ok()?;
        let first = value.get(0).unwrap_or(&value);
        let worker = first.get("worker_id")?.as_u64()?;
        first.get("event")?;
        return Some((
            "JSON, events of the sidecar's plain plane",
            decode::json(bytes, worker),
        ));
    }
    let (plane, envelope) = match bytes {
        [FRAME_VERSION, a, b, c, d, rest @ ..]
            if u32::from_be_bytes([*a, *b, *c, *d]) as usize == rest.len() =>
        {
            ("MessagePack, Dynamo's event plane over ZMQ", rest)
        }
        _ => ("MessagePack, Dynamo's event plane", bytes),
    };
    rmp_serde::from_slice::<kv_core::event::Envelope>(envelope).ok()?;
    Some((plane, decode::dynamo(envelope)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_show_losses_and_restarts() {
        let settings = Settings {
            block_size: 16,
            media: Default::default(),
            families: Vec::new(),
            image_token: None,
        };
        let mut checker = Checker::new(settings, 0);
        for number in [3, 4, 7, 0, 1] {
            checker.sequence(number);
            checker.message(None, b"\x92\x00\x90");
        }
        let report = checker.report();
        let (first, last, missing, restarts) = (3, 1, 2, 1);
        let expected = Sequences {
            first,
            last,
            missing,
            restarts,
        };
        assert_eq!(report.sequences, Some(expected));
        assert!(report.understood && report.files.is_empty());
    }
}
