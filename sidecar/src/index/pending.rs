//! A batch that is being put together for an Envoy. It shares the pages with the index.

use std::sync::Arc;

use kv_core::key;
use kv_core::wire::{self, BATCH_BYTES, Batch, Write};

/// A key of Envoy's shared data.
#[derive(Clone, Copy, Debug)]
pub(super) enum Key {
    Page([u8; 6]),
    Sessions([u8; 4]),
    Other([u8; 2]),
}

impl Key {
    pub(super) const HEAD: Self = Self::Other(key::HEAD);
    pub(super) const LOADS: Self = Self::Other(key::LOADS);
    pub(super) const TABLE: Self = Self::Other(key::TABLE);

    pub(super) fn page(id: u32) -> Self {
        Self::Page(key::page(id))
    }

    pub(super) fn sessions(shard: u16) -> Self {
        Self::Sessions(key::bound(shard))
    }

    fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Page(key) => key,
            Self::Sessions(key) => key,
            Self::Other(key) => key,
        }
    }
}

/// The batch.
#[derive(Debug, Default)]
pub(super) struct Pending {
    writes: Vec<(Key, Arc<[u8]>)>,
    /// Of all values.
    bytes: usize,
    /// Version of the table in it.
    pub(super) table: Option<u64>,
    /// When events that it makes visible were received, Unix nanoseconds.
    pub(super) received_ns: Vec<u64>,
    /// Whether it ends the full sync.
    pub(super) ends_sync: bool,
}

impl Pending {
    /// Whether a value fits; the first one always does.
    pub(super) fn fits(&self, bytes: usize) -> bool {
        self.writes.is_empty() || self.bytes + bytes <= BATCH_BYTES
    }

    pub(super) fn push(&mut self, key: Key, value: Arc<[u8]>) {
        self.bytes += value.len();
        self.writes.push((key, value));
    }

    /// Its message.
    pub(super) fn encode(&self, version: u8, seq: u64) -> Vec<u8> {
        let writes = self.writes.iter();
        let writes = writes.map(|(key, value)| Write {
            key: key.as_bytes(),
            value,
        });
        let batch = Batch {
            seq,
            writes: writes.collect(),
        };
        wire::encode_batch(version, &batch, self.bytes)
    }
}
