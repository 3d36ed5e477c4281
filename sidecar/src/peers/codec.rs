//! Events to bytes and back. An event that can't be read costs nothing but itself.

use kv_core::event::Envelope;
use kv_core::replica::{
    ActiveSequenceEvent, ActiveSequenceEventBatch, ActiveSequenceEventData, MAX_BATCH_EVENTS, TOPIC,
};
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::Dropped;

/// Blocks of one message, at most: 9 bytes each, below the megabyte that NATS takes.
pub const MAX_BATCH_BLOCKS: usize = 100_000;

/// What a message held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decoded {
    /// Id of the publisher; that of a sidecar is its router id.
    pub publisher: u64,
    /// Number of the message within its publisher.
    pub sequence: u64,
    /// The events that could be read, in order.
    pub events: Vec<ActiveSequenceEvent>,
    /// Events that could not.
    pub malformed: u64,
}

/// A message of these events.
///
/// # Errors
/// When it can't be encoded.
pub fn encode(
    publisher: u64,
    sequence: u64,
    published_at: u64,
    events: Vec<ActiveSequenceEvent>,
) -> Result<Vec<u8>, rmp_serde::encode::Error> {
    let payload = rmp_serde::to_vec_named(&ActiveSequenceEventBatch { events })?;
    rmp_serde::to_vec_named(&Envelope {
        publisher_id: publisher,
        sequence,
        published_at,
        topic: TOPIC.into(),
        payload,
    })
}

/// Reads a message: a router's batch, or the single event of a worker.
///
/// # Errors
/// When it holds no events at all.
pub fn decode(bytes: &[u8]) -> Result<Decoded, Dropped> {
    let envelope: Envelope = rmp_serde::from_slice(bytes).map_err(|_| Dropped::Malformed)?;
    if envelope.topic != TOPIC {
        return Err(Dropped::WrongTopic);
    }
    let mut decoded = Decoded {
        publisher: envelope.publisher_id,
        sequence: envelope.sequence,
        events: Vec::new(),
        malformed: 0,
    };
    match list(&envelope.payload).ok_or(Dropped::Malformed)? {
        Some(events) => decoded.take(events),
        None => {
            let event = rmp_serde::from_slice(&envelope.payload);
            decoded.events.push(event.map_err(|_| Dropped::Malformed)?);
        }
    }
    Ok(decoded)
}

/// What follows the key `events`, if the map has it; `None` when it is no map.
fn list(payload: &[u8]) -> Option<Option<&[u8]>> {
    let mut rest = payload;
    let keys = rmp::decode::read_map_len(&mut rest).ok()?;
    for _ in 0..keys {
        let (key, value) = rmp::decode::read_str_from_slice(rest).ok()?;
        if key == "events" {
            return Some(Some(value));
        }
        rest = value;
        skip(&mut rest)?;
    }
    Some(None)
}

fn skip(rest: &mut &[u8]) -> Option<()> {
    let mut skipping = rmp_serde::Deserializer::new(rest);
    IgnoredAny::deserialize(&mut skipping).ok()?;
    Some(())
}

impl Decoded {
    fn take(&mut self, mut rest: &[u8]) {
        let Ok(events) = rmp::decode::read_array_len(&mut rest) else {
            self.malformed += 1;
            return;
        };
        for _ in 0..events {
            let before = rest;
            if skip(&mut rest).is_none() {
                // Where the next event starts is unknown: the rest is one malformed event.
                self.malformed += 1;
                return;
            }
            match rmp_serde::from_slice(&before[..before.len() - rest.len()]) {
                Ok(event) => self.events.push(event),
                Err(_) => self.malformed += 1,
            }
        }
    }
}

/// Blocks that an event carries.
#[must_use]
pub fn blocks(event: &ActiveSequenceEvent) -> usize {
    match &event.data {
        ActiveSequenceEventData::AddRequest {
            token_sequence: Some(blocks),
            ..
        } => blocks.len(),
        _ => 0,
    }
}

/// Takes as many events from the front as one message may hold, at least one if there is any.
#[must_use]
pub fn batch(events: &mut Vec<ActiveSequenceEvent>) -> Vec<ActiveSequenceEvent> {
    let mut held = 0;
    let fits = |event: &&ActiveSequenceEvent| {
        held += blocks(event);
        held <= MAX_BATCH_BLOCKS
    };
    let fitting = events.iter().take(MAX_BATCH_EVENTS).take_while(fits);
    let taken = fitting.count().max(1).min(events.len());
    events.drain(..taken).collect()
}
