//! Bytes to events. Unknown fields are tolerated; an event that can't be read is one rejection.

use kv_core::event::{Envelope, EventData, RouterEvent};
use kv_core::id::WorkerId;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;

use super::subject::TOPIC;
use super::{Decoded, MAX_EVENT_BLOCKS, Rejection};

/// A message of Dynamo's event plane: a MessagePack envelope around an array of events.
#[must_use]
pub fn dynamo(bytes: &[u8]) -> Decoded {
    let mut decoded = Decoded::default();
    let Ok(envelope) = rmp_serde::from_slice::<Envelope>(bytes) else {
        decoded.rejected.push(Rejection::Malformed);
        return decoded;
    };
    decoded.publisher = Some(envelope.publisher_id);
    if envelope.topic != TOPIC {
        decoded.rejected.push(Rejection::WrongTopic);
        return decoded;
    }
    match rmp_serde::from_slice::<Vec<RouterEvent>>(&envelope.payload) {
        Ok(events) => events
            .into_iter()
            .for_each(|event| decoded.take(Some(event))),
        Err(_) => one_by_one(&envelope.payload, &mut decoded),
    }
    decoded
}

/// Events of an array in which something can't be read.
fn one_by_one(mut rest: &[u8], decoded: &mut Decoded) {
    let Ok(events) = rmp::decode::read_array_len(&mut rest) else {
        decoded.rejected.push(Rejection::Malformed);
        return;
    };
    for _ in 0..events {
        let before = rest;
        let mut skipping = rmp_serde::Deserializer::new(&mut rest);
        if IgnoredAny::deserialize(&mut skipping).is_err() {
            // Where the next event starts is unknown: the rest is one rejection.
            decoded.rejected.push(Rejection::Malformed);
            break;
        }
        let event = &before[..before.len() - rest.len()];
        decoded.take(rmp_serde::from_slice(event).ok());
    }
}

/// A message of plain JSON from `worker`: one event or an array of them.
#[must_use]
pub fn json(bytes: &[u8], worker: WorkerId) -> Decoded {
    let mut decoded = Decoded::default();
    let is_array = bytes.iter().find(|b| !b.is_ascii_whitespace()) == Some(&b'[');
    let events: Vec<&RawValue> = if is_array {
        serde_json::from_slice(bytes).unwrap_or_default()
    } else {
        serde_json::from_slice(bytes).into_iter().collect()
    };
    if events.is_empty() && serde_json::from_slice::<[(); 0]>(bytes).is_err() {
        decoded.rejected.push(Rejection::Malformed);
    }
    for event in events {
        let event: Option<RouterEvent> = serde_json::from_str(event.get()).ok();
        if event.as_ref().is_some_and(|e| e.worker_id != worker) {
            decoded.rejected.push(Rejection::WorkerMismatch);
        } else {
            decoded.take(event);
        }
    }
    decoded
}

impl Decoded {
    fn take(&mut self, event: Option<RouterEvent>) {
        let fit = event.ok_or(Rejection::Malformed).and_then(|event| {
            fit(&event)?;
            Ok(event)
        });
        match fit {
            Ok(event) => self.events.push(event),
            Err(rejection) => self.rejected.push(rejection),
        }
    }
}

/// Whether an event is one that the index takes.
///
/// # Errors
/// Says why not.
pub fn fit(event: &RouterEvent) -> Result<(), Rejection> {
    if !matches!(event.residency_domain.as_deref(), None | Some("worker")) {
        return Err(Rejection::ResidencyDomain);
    }
    let blocks = match &event.event.data {
        EventData::Stored(stored) => stored.blocks.len(),
        EventData::Removed(removed) => removed.block_hashes.len(),
        EventData::Cleared => 0,
    };
    if blocks > MAX_EVENT_BLOCKS {
        return Err(Rejection::TooManyBlocks);
    }
    Ok(())
}
