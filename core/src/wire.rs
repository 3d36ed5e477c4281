//! Messages between the bridge in Envoy and the sidecar, one to a gRPC message.
//!
//! The stream is `kv.router.v1.Bridge/Stream`. The bridge opens it and subscribes; the sidecar
//! answers with batches of shared-data writes, which the bridge copies in order and acknowledges.
//! Each message is the protocol's version byte and the postcard form of its struct.

use serde::{Deserialize, Serialize, Serializer};

/// Version of these messages. Version 2 has reports without times, see
/// [`crate::report::Report::decode`], and knows no steps but the first four of
/// [`crate::report::Step`]; version 1 is the same without [`Up::Reports`] and [`Up::Lanes`].
pub const PROTOCOL: u8 = 3;
/// Version from which on reports say when things happened.
pub const TIMED_FROM: u8 = 3;
/// Oldest version that is understood.
pub const OLDEST: u8 = 1;
/// Envoy's shared queue in which VMs leave reports for the bridge.
pub const QUEUE: &str = "kv_router_reports";
/// gRPC service of the stream.
pub const SERVICE: &str = "kv.router.v1.Bridge";
/// gRPC method of the stream.
pub const METHOD: &str = "Stream";
/// Batches under way that no acknowledgement has come for.
pub const WINDOW: usize = 4;
/// Aim for the bytes of one batch: a longer one would hold up the bridge's thread.
pub const BATCH_BYTES: usize = 48 << 10;
/// Most bytes of a batch's message besides its writes.
const BATCH_HEAD: usize = 24;
/// Most bytes of a write besides its value, for values up to two megabytes.
const WRITE_HEAD: usize = 10;

/// From the bridge to the sidecar.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Up {
    /// First message of a stream.
    Subscribe(Subscribe),
    /// A batch has been written.
    Ack(Ack),
    /// Reports of VMs, each a [`crate::report::Report`] put through [`encode`].
    Reports(Vec<Vec<u8>>),
    /// The lanes of all owners in use, as Envoy's gauges show them.
    Lanes(Vec<crate::report::Sum>),
}

/// Who is talking, and what Envoy holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subscribe {
    /// [`crate::key::FORMAT`] of the filter.
    pub format: u8,
    /// Nonce of the Envoy process.
    pub process: u64,
    /// The filter's `vm_id`: shared data is common to the VMs of one id.
    pub vm_id: String,
    /// Term of the lease; of two streams of one (process, vm id) the higher term is true.
    pub term: u64,
    /// Epoch of the pages Envoy holds, if any.
    pub epoch: Option<u32>,
    /// Level of those pages.
    pub level: u8,
}

/// Acknowledges a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ack {
    /// The batch's number.
    pub seq: u64,
    /// Envoy's clock when the writes were done, Unix nanoseconds.
    pub written_at_ns: u64,
    /// Writes that were refused: keys the publisher may not write.
    pub refused: u32,
}

/// From the sidecar to the bridge: writes to shared data, in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch<'a> {
    /// Number of the batch in its stream, from 1.
    pub seq: u64,
    /// The writes.
    #[serde(borrow)]
    pub writes: Vec<Write<'a>>,
}

/// One write to shared data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Write<'a> {
    /// A key for which [`crate::key::is_published`] holds.
    #[serde(borrow, serialize_with = "at_once")]
    pub key: &'a [u8],
    /// Its value.
    #[serde(borrow, serialize_with = "at_once")]
    pub value: &'a [u8],
}

/// Bytes in one piece: on the wire they are what a slice of numbers is, which would be written one
/// by one.
pub(crate) fn at_once<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
    to.serialize_bytes(bytes)
}

/// A message that can't be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// No bytes.
    #[error("empty message")]
    Empty,
    /// Another protocol version.
    #[error("protocol version {0}, expected {OLDEST} to {PROTOCOL}")]
    Version(u8),
    /// Bytes that don't decode.
    #[error("malformed message of {0} bytes")]
    Malformed(usize),
}

impl WireError {
    /// Label for metrics.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Version(_) => "version",
            Self::Malformed(_) => "malformed",
        }
    }
}

/// Version byte and message.
#[must_use]
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    encode_for(PROTOCOL, message)
}

/// The message for a peer that speaks `version`, which must have the message.
#[must_use]
pub fn encode_for<T: Serialize>(version: u8, message: &T) -> Vec<u8> {
    encode_onto(vec![version], message)
}

/// The message of a batch for a peer that speaks `version`; its values have so many `bytes`.
#[must_use]
pub fn encode_batch(version: u8, batch: &Batch<'_>, bytes: usize) -> Vec<u8> {
    let mut message = Vec::with_capacity(BATCH_HEAD + WRITE_HEAD * batch.writes.len() + bytes);
    message.push(version);
    encode_onto(message, batch)
}

/// Version byte and message behind other bytes.
pub(crate) fn encode_behind<T: Serialize>(mut head: Vec<u8>, message: &T) -> Vec<u8> {
    head.push(PROTOCOL);
    encode_onto(head, message)
}

fn encode_onto<T: Serialize>(head: Vec<u8>, message: &T) -> Vec<u8> {
    // Serialising to a growing vector cannot fail for the types of this module.
    postcard::to_extend(message, head).unwrap_or_default()
}

/// Version of a message.
#[must_use]
pub fn version(bytes: &[u8]) -> Option<u8> {
    bytes.first().copied()
}

/// The inverse of [`encode`].
///
/// # Errors
/// When the bytes are empty, of another version or malformed.
pub fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, WireError> {
    match bytes.split_first() {
        None => Err(WireError::Empty),
        Some((OLDEST..=PROTOCOL, rest)) => {
            postcard::from_bytes(rest).map_err(|_| WireError::Malformed(bytes.len()))
        }
        Some((&version, _)) => Err(WireError::Version(version)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key;

    #[test]
    fn a_batch_is_read_without_copying() {
        let page = key::page(7);
        let batch = Batch {
            seq: 1,
            writes: vec![
                Write {
                    key: &page,
                    value: b"page",
                },
                Write {
                    key: &key::HEAD,
                    value: b"head",
                },
            ],
        };
        let bytes = encode(&batch);
        assert_eq!(decode::<Batch<'_>>(&bytes), Ok(batch));
    }

    #[test]
    fn other_versions_and_broken_bytes_are_refused() {
        let ack = Up::Ack(Ack {
            seq: 4,
            written_at_ns: 5,
            refused: 0,
        });
        let mut bytes = encode(&ack);
        assert_eq!(decode::<Up>(&bytes[..2]), Err(WireError::Malformed(2)));
        bytes[0] = 9;
        assert_eq!(decode::<Up>(&bytes), Err(WireError::Version(9)));
        assert_eq!(decode::<Up>(&[]), Err(WireError::Empty));
    }
}
