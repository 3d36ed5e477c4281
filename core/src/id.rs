//! Who is who: workers, data-parallel ranks, owners, slots, roles, tiers and hash families.

use serde::{Deserialize, Serialize};

/// Identity of an engine instance, as the engine or the discovery system names it.
pub type WorkerId = u64;

/// Data-parallel rank within a worker; 0 where the engine has only one.
pub type DpRank = u32;

/// One cache: a (worker, dp rank) of a pool. Every rank owns its blocks independently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct OwnerId {
    /// The worker.
    pub worker: WorkerId,
    /// Its data-parallel rank.
    pub rank: DpRank,
}

/// An owner's number within its pool while it is in the worker table. Pages name owners by slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Slot(pub u16);

impl Slot {
    /// Slots of one pool, which bounds the owners of a pool.
    pub const MAX: u16 = 1024;

    /// The slot as an index.
    #[must_use]
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// Where a block lies, best first. `Ord` follows speed: `Device < Host < Disk < External`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum Tier {
    /// Accelerator memory.
    #[default]
    Device = 0,
    /// Pinned host memory.
    Host = 1,
    /// Local disk.
    Disk = 2,
    /// A store outside the worker.
    External = 3,
}

impl Tier {
    /// Number of tiers.
    pub const COUNT: usize = 4;
    /// All tiers, best first.
    pub const ALL: [Self; Self::COUNT] = [Self::Device, Self::Host, Self::Disk, Self::External];

    /// The tier as an index, 0 for device.
    #[must_use]
    pub fn index(self) -> usize {
        self as usize
    }

    /// The tier of an index; anything above 3 is external.
    #[must_use]
    pub fn from_index(index: usize) -> Self {
        match index {
            0 => Self::Device,
            1 => Self::Host,
            2 => Self::Disk,
            _ => Self::External,
        }
    }
}

/// What a worker computes with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// A GPU or another accelerator.
    #[default]
    Accelerator,
    /// The CPU.
    Cpu,
}

/// What a worker does for a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Prefill and decode on the same worker.
    #[default]
    Aggregated,
    /// Prefill only.
    Prefill,
    /// Decode only.
    Decode,
    /// No engine: a store of KV blocks that all workers of the pool can load from.
    Store,
}

/// How block hashes are computed. Blocks of different families never match each other.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub enum Family {
    /// Dynamo's public hashes (`XXH3-64`, seed 1337).
    #[default]
    Dynamo = 0,
    /// FlexKV: `XXH64` of the whole prefix as `i64` token ids.
    FlexKv = 1,
    /// `SGLang` and its `HiCache` stores: chained SHA-256 of a page's token ids.
    HiCache = 2,
    /// vLLM with `--prefix-caching-hash-algo sha256_cbor`.
    VllmSha256Cbor = 3,
    /// vLLM with `--prefix-caching-hash-algo xxhash_cbor`.
    VllmXxhashCbor = 4,
    /// `LMCache`: chained BLAKE3 of a chunk's token ids.
    LmCache = 5,
    /// Dynamo's hashes again, of blocks that are predicted beside what events say.
    #[cfg_attr(feature = "schema", schemars(skip))]
    Predicted = 6,
}

impl Family {
    /// All families, Dynamo's first.
    pub const ALL: [Self; 7] = [
        Self::Dynamo,
        Self::FlexKv,
        Self::HiCache,
        Self::VllmSha256Cbor,
        Self::VllmXxhashCbor,
        Self::LmCache,
        Self::Predicted,
    ];

    /// The family's name in configuration and records.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Dynamo => "dynamo",
            Self::FlexKv => "flex-kv",
            Self::HiCache => "hi-cache",
            Self::VllmSha256Cbor => "vllm-sha256-cbor",
            Self::VllmXxhashCbor => "vllm-xxhash-cbor",
            Self::LmCache => "lm-cache",
            Self::Predicted => "predicted",
        }
    }
}
