//! From a message's bytes to events. What can't be read costs itself alone; only where the encoding
//! itself is broken is the rest of the message lost with it.

use std::fmt;

use serde::Deserializer;
use serde::de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::event::{self, Event};
use super::value::{Reader, Value};
use super::{Encoding, Form};
use crate::ingest::Rejection;

/// Most bytes of a message. A step that stores a prompt of a million tokens has about 5 MB.
pub const MAX_BATCH_BYTES: usize = 16 << 20;
/// Most events of a message.
pub const MAX_BATCH_EVENTS: usize = 1 << 16;
/// Deepest nesting that is read over; deeper breaks the message.
const MAX_NESTING: usize = 64;

/// A message.
#[derive(Debug, Default)]
pub(super) struct Payload {
    /// The data-parallel rank that it names.
    pub(super) rank: Option<u32>,
    /// How it is laid out.
    pub(super) outer: Outer,
    /// Its events in order, each read or not.
    pub(super) events: Vec<Result<(Event, Form), Rejection>>,
}

/// How a message is laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Outer {
    /// Not at all: it is broken.
    #[default]
    Unknown,
    /// A list of time, events and perhaps rank and more; this many elements.
    List(usize),
    /// A map with `events`.
    Map,
    /// The events themselves.
    Bare,
}

/// Reads a message.
pub(super) fn read(bytes: &[u8], encoding: Encoding) -> Payload {
    let mut payload = Payload::default();
    if bytes.len() > MAX_BATCH_BYTES {
        payload.events.push(Err(Rejection::BatchTooLarge));
        return payload;
    }
    let outcome = match encoding {
        Encoding::MsgPack => {
            let mut from = rmp_serde::Deserializer::from_read_ref(bytes);
            from.set_max_depth(MAX_NESTING);
            from.deserialize_any(Message(&mut payload)).is_ok()
        }
        Encoding::Json => {
            let mut from = serde_json::Deserializer::from_slice(bytes);
            let read = from.deserialize_any(Message(&mut payload)).is_ok();
            read && from.end().is_ok()
        }
    };
    if !outcome {
        payload.events.push(Err(Rejection::Malformed));
    }
    payload
}

struct Message<'p>(&'p mut Payload);

impl Payload {
    fn push(&mut self, value: &Value<'_>, is_too_large: bool) {
        self.events.push(if is_too_large {
            Err(Rejection::TooManyBlocks)
        } else {
            event::read(value)
        });
    }

    /// A rank that is no number of a rank can't be guessed: the batch's events go where a batch
    /// without rank does.
    fn take_rank(&mut self, value: &Value<'_>) {
        self.rank = value.number().or(self.rank);
    }
}

impl<'de> Visitor<'de> for Message<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a batch of events")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut from: A) -> Result<(), A::Error> {
        let payload = self.0;
        let mut reader = Reader::new();
        let Some(first) = from.next_element_seed(&mut reader)? else {
            payload.outer = Outer::Bare;
            return Ok(());
        };
        if matches!(first, Value::List(_) | Value::Map(_)) {
            payload.outer = Outer::Bare;
            payload.push(&first, reader.is_too_large());
            drop(first);
            return rest_of_events(payload, from);
        }
        if from.next_element_seed(Events(payload))?.is_none() {
            return Err(A::Error::custom("no events"));
        }
        let mut elements = 2;
        if let Some(rank) = from.next_element_seed(&mut Reader::new())? {
            payload.take_rank(&rank);
            elements += 1;
        }
        while from.next_element::<IgnoredAny>()?.is_some() {
            elements += 1;
        }
        payload.outer = Outer::List(elements);
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut from: A) -> Result<(), A::Error> {
        let payload = self.0;
        let mut others = Vec::new();
        let mut reader = Reader::new();
        while let Some(key) = from.next_key_seed(&mut Reader::new())? {
            match key {
                Value::Str(key) if key == "events" => {
                    from.next_value_seed(Events(payload))?;
                    payload.outer = Outer::Map;
                }
                Value::Str(key) if key == "data_parallel_rank" || key == "dp_rank" => {
                    let rank = from.next_value_seed(&mut Reader::new())?;
                    payload.take_rank(&rank);
                }
                Value::Str(key) => {
                    let value = from.next_value_seed(&mut reader)?;
                    if !reader.is_too_large() {
                        others.push((key, value));
                    }
                }
                _ => {
                    from.next_value::<IgnoredAny>()?;
                }
            }
        }
        if payload.outer == Outer::Unknown {
            // One event alone.
            payload.push(&Value::Map(others), reader.is_too_large());
            payload.outer = Outer::Bare;
        }
        Ok(())
    }
}

/// The list of a batch's events.
struct Events<'p>(&'p mut Payload);

impl<'de> DeserializeSeed<'de> for Events<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Events<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of events")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, from: A) -> Result<(), A::Error> {
        rest_of_events(self.0, from)
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<(), E> {
        Ok(())
    }
}

fn rest_of_events<'de, A: SeqAccess<'de>>(
    payload: &mut Payload,
    mut from: A,
) -> Result<(), A::Error> {
    loop {
        if payload.events.len() >= MAX_BATCH_EVENTS {
            if from.next_element::<IgnoredAny>()?.is_none() {
                return Ok(());
            }
            payload.events.push(Err(Rejection::TooManyEvents));
            continue;
        }
        let mut reader = Reader::new();
        let Some(value) = from.next_element_seed(&mut reader)? else {
            return Ok(());
        };
        payload.push(&value, reader.is_too_large());
    }
}
