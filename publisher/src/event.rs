//! What an engine says: the body of `POST /v1/events`, as JSON or as MessagePack maps. Events have
//! the shape of vLLM's.

use serde::{Deserialize, Serialize};

/// One post: a batch of a numbered stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(
    feature = "schema",
    schemars(title = "kv-router events", description = "Body of POST /v1/events.")
)]
pub struct Post {
    /// The worker, as the router's configuration names it.
    pub worker_id: u64,
    /// Number of the stream among the worker's: 0, unless each data-parallel rank posts by itself.
    #[serde(default)]
    pub stream: u32,
    /// Name of the engine's run, anything that a restarted engine would not choose again. With
    /// another name all that was said before is forgotten.
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 128)))]
    pub incarnation: String,
    /// Number of the post in its incarnation, from 0, one more each time.
    pub sequence: u64,
    /// Data-parallel rank that the events are about; the stream's number unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dp_rank: Option<u32>,
    /// What happened, in order.
    pub events: Vec<Event>,
}

/// A change of the KV cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(tag = "type")]
pub enum Event {
    /// A chain of blocks was stored.
    BlockStored {
        /// The engine's names of the blocks, any 64-bit numbers, in order.
        block_hashes: Vec<u64>,
        /// Name of the block before the first; none at the beginning of a prompt.
        #[serde(default)]
        parent_block_hash: Option<u64>,
        /// Token ids of all blocks.
        token_ids: Vec<u32>,
        /// Tokens to a block.
        block_size: u32,
        /// Name of the medium; `GPU` unless given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        medium: Option<String>,
        /// LoRA adapter.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lora_name: Option<String>,
        /// Salt that keeps the blocks apart from equal ones of others.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cache_salt: Option<String>,
    },
    /// Blocks were dropped from a medium.
    BlockRemoved {
        /// The engine's names of the blocks.
        block_hashes: Vec<u64>,
        /// Name of the medium; `GPU` unless given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        medium: Option<String>,
    },
    /// The rank holds nothing more, on no medium.
    AllBlocksCleared {},
}

impl Event {
    /// Blocks stored in accelerator memory.
    #[must_use]
    pub fn stored(
        block_hashes: Vec<u64>,
        parent_block_hash: Option<u64>,
        token_ids: Vec<u32>,
        block_size: u32,
    ) -> Self {
        Self::BlockStored {
            block_hashes,
            parent_block_hash,
            token_ids,
            block_size,
            medium: None,
            lora_name: None,
            cache_salt: None,
        }
    }

    /// Blocks dropped from accelerator memory.
    #[must_use]
    pub fn removed(block_hashes: Vec<u64>) -> Self {
        Self::BlockRemoved {
            block_hashes,
            medium: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_written_as_vllm_writes_them() {
        let stored = Event::stored(vec![u64::MAX], None, vec![1, 2], 2);
        let json = serde_json::to_string(&stored).unwrap();
        let expected = r#"{"type":"BlockStored","block_hashes":[18446744073709551615],"parent_block_hash":null,"token_ids":[1,2],"block_size":2}"#;
        assert_eq!(json, expected);
        let cleared = serde_json::to_string(&Event::AllBlocksCleared {}).unwrap();
        assert_eq!(cleared, r#"{"type":"AllBlocksCleared"}"#);
    }
}
