//! A decoded value of either encoding, kept small.
//!
//! A sender's fields may be missing, of another type or unknown, so an event is first read as a
//! tree and then interpreted. Only one event's tree lives at a time, and its size is bounded: what
//! is too deep becomes [`Value::Opaque`], and past [`MAX_NODES`] the event is not kept.

use std::borrow::Cow;
use std::fmt;

use serde::Deserializer;
use serde::de::{DeserializeSeed, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// Deepest value that is looked at, counted from the event. Engines send 5: an object's range in
/// the list of its ranges, in an object, in a block, in the event.
const MAX_DEPTH: u8 = 12;
/// Values of one event; an event of most blocks with 16 tokens each has fewer.
const MAX_NODES: usize = 1_200_000;

/// A value.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value<'v> {
    /// Nothing.
    Nil,
    /// A truth value.
    Bool(bool),
    /// Any integer of 64 bits, with or without sign.
    Int(i128),
    /// Any other number.
    Float(f64),
    /// Text.
    Str(Cow<'v, str>),
    /// Bytes; only in MessagePack.
    Bytes(Cow<'v, [u8]>),
    /// A list.
    List(Vec<Value<'v>>),
    /// A map with texts for keys; entries with other keys are left out.
    Map(Vec<(Cow<'v, str>, Value<'v>)>),
    /// Something that nobody looks at: too deep, or an extension.
    Opaque,
}

impl<'v> Value<'v> {
    pub(super) fn is_nil(&self) -> bool {
        matches!(self, Self::Nil)
    }

    pub(super) fn int(&self) -> Option<i128> {
        match self {
            Self::Int(int) => Some(*int),
            _ => None,
        }
    }

    /// An integer that fits; a number that doesn't is none.
    pub(super) fn number<N: TryFrom<i128>>(&self) -> Option<N> {
        self.int().and_then(|int| N::try_from(int).ok())
    }

    pub(super) fn text(&self) -> Option<&str> {
        match self {
            Self::Str(text) => Some(text),
            _ => None,
        }
    }

    pub(super) fn list(&self) -> Option<&[Self]> {
        match self {
            Self::List(list) => Some(list),
            _ => None,
        }
    }

    /// The value under a key of a map; nil like none.
    pub(super) fn get(&self, key: &str) -> Option<&Self> {
        match self {
            Self::Map(map) => field(map, key),
            _ => None,
        }
    }
}

/// The value under a key; nil like none.
pub(super) fn field<'a, 'v>(
    map: &'a [(Cow<'v, str>, Value<'v>)],
    key: &str,
) -> Option<&'a Value<'v>> {
    let found = map.iter().find(|(name, _)| name == key);
    found
        .map(|(_, value)| value)
        .filter(|value| !value.is_nil())
}

/// Reads one value and counts its nodes.
#[derive(Debug)]
pub(super) struct Reader {
    nodes: usize,
    depth: u8,
}

impl Reader {
    pub(super) fn new() -> Self {
        Self { nodes: 0, depth: 0 }
    }

    /// Whether the value read is not complete, because it is larger than an event may be.
    pub(super) fn is_too_large(&self) -> bool {
        self.nodes > MAX_NODES
    }
}

impl<'de> DeserializeSeed<'de> for &mut Reader {
    type Value = Value<'de>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Value<'de>, D::Error> {
        self.nodes += 1;
        if self.depth > MAX_DEPTH || self.is_too_large() {
            from.deserialize_ignored_any(IgnoredAny)?;
            return Ok(Value::Opaque);
        }
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for &mut Reader {
    type Value = Value<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E: Error>(self) -> Result<Value<'de>, E> {
        Ok(Value::Nil)
    }

    fn visit_none<E: Error>(self) -> Result<Value<'de>, E> {
        Ok(Value::Nil)
    }

    fn visit_some<D: Deserializer<'de>>(self, from: D) -> Result<Value<'de>, D::Error> {
        from.deserialize_any(self)
    }

    fn visit_bool<E: Error>(self, it: bool) -> Result<Value<'de>, E> {
        Ok(Value::Bool(it))
    }

    fn visit_u64<E: Error>(self, it: u64) -> Result<Value<'de>, E> {
        Ok(Value::Int(it.into()))
    }

    fn visit_i64<E: Error>(self, it: i64) -> Result<Value<'de>, E> {
        Ok(Value::Int(it.into()))
    }

    fn visit_f64<E: Error>(self, it: f64) -> Result<Value<'de>, E> {
        Ok(Value::Float(it))
    }

    fn visit_borrowed_str<E: Error>(self, it: &'de str) -> Result<Value<'de>, E> {
        Ok(Value::Str(it.into()))
    }

    fn visit_str<E: Error>(self, it: &str) -> Result<Value<'de>, E> {
        Ok(Value::Str(it.to_owned().into()))
    }

    fn visit_borrowed_bytes<E: Error>(self, it: &'de [u8]) -> Result<Value<'de>, E> {
        Ok(Value::Bytes(it.into()))
    }

    fn visit_bytes<E: Error>(self, it: &[u8]) -> Result<Value<'de>, E> {
        Ok(Value::Bytes(it.to_owned().into()))
    }

    /// A MessagePack extension, such as a timestamp.
    fn visit_newtype_struct<D: Deserializer<'de>>(self, from: D) -> Result<Value<'de>, D::Error> {
        from.deserialize_ignored_any(IgnoredAny)?;
        Ok(Value::Opaque)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut from: A) -> Result<Value<'de>, A::Error> {
        self.depth += 1;
        let mut list = Vec::new();
        while let Some(value) = from.next_element_seed(&mut *self)? {
            if !self.is_too_large() {
                list.push(value);
            }
        }
        self.depth -= 1;
        Ok(Value::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut from: A) -> Result<Value<'de>, A::Error> {
        self.depth += 1;
        let mut map = Vec::new();
        while let Some(key) = from.next_key_seed(&mut *self)? {
            let value = from.next_value_seed(&mut *self)?;
            if let Value::Str(key) = key
                && !self.is_too_large()
            {
                map.push((key, value));
            }
        }
        self.depth -= 1;
        Ok(Value::Map(map))
    }
}
