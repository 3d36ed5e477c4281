//! From a message's bytes to events. What can't be read costs itself alone; only where the encoding
//! itself is broken is the rest of the message lost with it.

use std::fmt;

use serde::Deserializer;
use serde::de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::Encoding;
use super::value::{Reader, Value};
use crate::ingest::Rejection;

/// Most bytes of a message. A step that stores a prompt of a million tokens has about 5 MB.
pub const MAX_BATCH_BYTES: usize = 16 << 20;
/// Most events of a message.
pub const MAX_BATCH_EVENTS: usize = 1 << 16;
/// Deepest nesting that is read over; deeper breaks the message.
const MAX_NESTING: usize = 64;

/// What a message says about all its events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Head {
    /// The data-parallel rank that it names.
    pub(super) rank: Option<u32>,
    /// How it is laid out.
    pub(super) outer: Outer,
    /// Whether it names the run of its engine, as posts to the sidecar do.
    pub(super) is_post: bool,
}

/// Takes each event in order, or why it can't be read.
type Sink<'s> = &'s mut dyn FnMut(Result<&Value<'_>, Rejection>);

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
pub(super) fn read(bytes: &[u8], encoding: Encoding, sink: Sink<'_>) -> Head {
    let mut head = Head::default();
    if bytes.len() > MAX_BATCH_BYTES {
        sink(Err(Rejection::BatchTooLarge));
        return head;
    }
    let mut events = Events { sink, taken: 0 };
    let message = Message {
        head: &mut head,
        events: &mut events,
    };
    let is_whole = match encoding {
        Encoding::MsgPack => {
            let mut from = rmp_serde::Deserializer::from_read_ref(bytes);
            from.set_max_depth(MAX_NESTING);
            from.deserialize_any(message).is_ok()
        }
        Encoding::Json => {
            let mut from = serde_json::Deserializer::from_slice(bytes);
            let is_read = from.deserialize_any(message).is_ok();
            is_read && from.end().is_ok()
        }
    };
    if !is_whole {
        (events.sink)(Err(Rejection::Malformed));
    }
    head
}

struct Message<'m, 's> {
    head: &'m mut Head,
    events: &'m mut Events<'s>,
}

impl Head {
    /// A rank that is no number of a rank can't be guessed: the batch's events go where a batch
    /// without rank does.
    fn take_rank(&mut self, value: &Value<'_>) {
        self.rank = value.number().or(self.rank);
    }
}

impl<'de> Visitor<'de> for Message<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a batch of events")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut from: A) -> Result<(), A::Error> {
        let Self { head, events } = self;
        let mut reader = Reader::new();
        let Some(first) = from.next_element_seed(&mut reader)? else {
            head.outer = Outer::Bare;
            return Ok(());
        };
        if matches!(first, Value::List(_) | Value::Map(_)) {
            head.outer = Outer::Bare;
            events.push(&first, reader.is_too_large());
            drop(first);
            return events.rest(from);
        }
        if from.next_element_seed(&mut *events)?.is_none() {
            return Err(A::Error::custom("no events"));
        }
        let mut elements = 2;
        if let Some(rank) = from.next_element_seed(&mut Reader::new())? {
            head.take_rank(&rank);
            elements += 1;
        }
        while from.next_element::<IgnoredAny>()?.is_some() {
            elements += 1;
        }
        head.outer = Outer::List(elements);
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut from: A) -> Result<(), A::Error> {
        let Self { head, events } = self;
        let mut others = Vec::new();
        let mut reader = Reader::new();
        while let Some(key) = from.next_key_seed(&mut Reader::new())? {
            match key {
                Value::Str(key) if key == "events" => {
                    from.next_value_seed(&mut *events)?;
                    head.outer = Outer::Map;
                }
                Value::Str(key) if key == "data_parallel_rank" || key == "dp_rank" => {
                    let rank = from.next_value_seed(&mut Reader::new())?;
                    head.take_rank(&rank);
                }
                Value::Str(key) => {
                    head.is_post |= key == "incarnation";
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
        if head.outer == Outer::Unknown {
            // One event alone.
            events.push(&Value::Map(others), reader.is_too_large());
            head.outer = Outer::Bare;
        }
        Ok(())
    }
}

/// The list of a batch's events.
struct Events<'s> {
    sink: Sink<'s>,
    /// Events so far.
    taken: usize,
}

impl Events<'_> {
    fn push(&mut self, value: &Value<'_>, is_too_large: bool) {
        self.taken += 1;
        (self.sink)(if is_too_large {
            Err(Rejection::TooManyBlocks)
        } else {
            Ok(value)
        });
    }

    fn rest<'de, A: SeqAccess<'de>>(&mut self, mut from: A) -> Result<(), A::Error> {
        while self.taken < MAX_BATCH_EVENTS {
            let mut reader = Reader::new();
            let Some(value) = from.next_element_seed(&mut reader)? else {
                return Ok(());
            };
            self.push(&value, reader.is_too_large());
        }
        while from.next_element::<IgnoredAny>()?.is_some() {
            (self.sink)(Err(Rejection::TooManyEvents));
        }
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for &mut Events<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for &mut Events<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of events")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, from: A) -> Result<(), A::Error> {
        self.rest(from)
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<(), E> {
        Ok(())
    }
}
