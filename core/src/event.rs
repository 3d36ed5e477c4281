//! KV cache events as Dynamo 1.6.1 puts them on the wire.
//!
//! The same structs serve JSON and MessagePack (named maps). Hashes are full-range `u64`.

use serde::{Deserialize, Serialize};

use crate::id::{DpRank, Tier, WorkerId};

/// One cache event of one worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RouterEvent {
    /// The worker whose cache changed.
    pub worker_id: WorkerId,
    /// The tier that changed.
    #[serde(default)]
    pub storage_tier: StorageTier,
    /// Whose residency this is; absent on events of older senders.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub residency_domain: Option<String>,
    /// What changed.
    pub event: KvCacheEvent,
    /// Session that caused a store, where the engine knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_id: Option<String>,
}

/// The numbered change of one rank.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KvCacheEvent {
    /// Number of the event within its worker; grows by one.
    pub event_id: u64,
    /// The change.
    pub data: EventData,
    /// Data-parallel rank.
    #[serde(default)]
    pub dp_rank: DpRank,
}

/// A change of a rank's cache.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventData {
    /// Blocks were stored, in chain order, below `parent_hash`.
    Stored(Stored),
    /// Blocks were dropped.
    Removed(Removed),
    /// Everything of the rank was dropped.
    Cleared,
}

/// A run of stored blocks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stored {
    /// Engine hash of the block before the first one; `None` at the root.
    pub parent_hash: Option<u64>,
    /// Position of the first block, where the sender knows it.
    #[serde(default)]
    pub start_position: Option<u32>,
    /// The blocks, each the child of the one before it.
    pub blocks: Vec<StoredBlock>,
}

/// One stored block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StoredBlock {
    /// The engine's own name for the block; opaque.
    pub block_hash: u64,
    /// Hash of the block's tokens alone (`hash::Seed::block`).
    pub tokens_hash: u64,
    /// Multimodal objects of the block, already mixed into `tokens_hash` by the sender.
    #[serde(default)]
    pub mm_extra_info: Option<MmExtraInfo>,
}

/// Multimodal objects in a block.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MmExtraInfo {
    /// The objects.
    pub mm_objects: Vec<MmObject>,
}

/// One multimodal object.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MmObject {
    /// Hash of the object's content.
    pub mm_hash: u64,
    /// Token ranges it fills, `[start, end)`.
    pub offsets: Vec<(u64, u64)>,
}

/// Dropped blocks, by engine hash.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Removed {
    /// The engine's names of the blocks.
    pub block_hashes: Vec<u64>,
}

/// A tier as Dynamo spells it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StorageTier {
    /// Accelerator memory.
    #[default]
    Device,
    /// Pinned host memory.
    HostPinned,
    /// Local disk.
    Disk,
    /// A store outside the worker.
    External,
}

impl From<StorageTier> for Tier {
    fn from(tier: StorageTier) -> Self {
        match tier {
            StorageTier::Device => Self::Device,
            StorageTier::HostPinned => Self::Host,
            StorageTier::Disk => Self::Disk,
            StorageTier::External => Self::External,
        }
    }
}

impl From<Tier> for StorageTier {
    fn from(tier: Tier) -> Self {
        match tier {
            Tier::Device => Self::Device,
            Tier::Host => Self::HostPinned,
            Tier::Disk => Self::Disk,
            Tier::External => Self::External,
        }
    }
}

/// The envelope of Dynamo's event plane: MessagePack, a named map.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Envelope {
    /// Random id of the publisher process.
    pub publisher_id: u64,
    /// Number of the message within its publisher, from 0.
    pub sequence: u64,
    /// Unix time in milliseconds.
    pub published_at: u64,
    /// Topic, `kv-events` for cache events.
    pub topic: String,
    /// MessagePack of the value; for `kv-events` an array of [`RouterEvent`].
    #[serde(with = "binary")]
    pub payload: Vec<u8>,
}

/// MessagePack `bin` rather than an array of integers.
mod binary {
    use serde::{Deserializer, Serializer, de};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_bytes(bytes)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Vec<u8>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("bytes")
            }
            fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
                Ok(bytes.to_vec())
            }
            fn visit_byte_buf<E: de::Error>(self, bytes: Vec<u8>) -> Result<Vec<u8>, E> {
                Ok(bytes)
            }
        }
        from.deserialize_byte_buf(Visitor)
    }
}

/// What an engine on a plain JSON subject answers to a request on `<subject>.snapshot`: its whole
/// cache as stores, in one or more messages to the reply subject.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotPart {
    /// The answering worker.
    pub worker_id: WorkerId,
    /// Id of the last event this snapshot includes; later events apply on top.
    pub event_id: u64,
    /// Number of this message, from 0.
    pub part: u32,
    /// Messages in all.
    pub parts: u32,
    /// Stores, parents first.
    pub events: Vec<RouterEvent>,
}
