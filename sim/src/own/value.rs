//! MessagePack of any shape.

use serde::ser::{Serialize, SerializeMap as _, Serializer};

/// A value; maps keep the order of their keys.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Nil,
    Uint(u64),
    Int(i64),
    Float(f64),
    Text(String),
    Bytes(Vec<u8>),
    List(Vec<Self>),
    Map(Vec<(&'static str, Self)>),
}

impl Serialize for Value {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Nil => to.serialize_unit(),
            Self::Uint(number) => to.serialize_u64(*number),
            Self::Int(number) => to.serialize_i64(*number),
            Self::Float(number) => to.serialize_f64(*number),
            Self::Text(text) => to.serialize_str(text),
            Self::Bytes(bytes) => to.serialize_bytes(bytes),
            Self::List(list) => to.collect_seq(list),
            Self::Map(entries) => {
                let mut map = to.serialize_map(Some(entries.len()))?;
                for (key, value) in entries {
                    map.serialize_entry(key, value)?;
                }
                map.end()
            }
        }
    }
}

impl Value {
    pub(super) fn text(text: &str) -> Self {
        Self::Text(text.to_owned())
    }

    pub(super) fn tokens(tokens: impl IntoIterator<Item = u32>) -> Self {
        Self::List(tokens.into_iter().map(|t| Self::Uint(t.into())).collect())
    }

    /// MessagePack.
    pub(super) fn pack(&self) -> Vec<u8> {
        // Nothing here can fail to be written to memory.
        rmp_serde::to_vec(self).unwrap_or_default()
    }
}
