//! Streams of KV events as they are written.

use std::path::PathBuf;

use kv_core::id::Family;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A worker's own stream of events: one of the three.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Events {
    /// It is subscribed to over ZMQ: vLLM, SGLang, TensorRT-LLM, Dynamo's consolidator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Zmq")]
    pub zmq: Option<Zmq>,
    /// It is polled: TensorRT-LLM's HTTP server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "TrtLlm")]
    pub trtllm: Option<TrtLlm>,
    /// It posts its events to the sidecar's HTTP API.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Http")]
    pub http: Option<Http>,
}

/// Where an engine publishes over ZMQ.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Zmq {
    /// `tcp://host:port` of rank 0's PUB socket. Rank r is at port + r.
    #[schemars(required)]
    pub endpoint: Option<String>,
    /// Topic to subscribe to; empty takes all.
    #[serde(default)]
    pub topic: String,
    /// `tcp://host:port` of rank 0's replay socket. Rank r is at port + r.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "String")]
    pub replay_endpoint: Option<String>,
}

/// Where TensorRT-LLM's events are polled. Reading takes them away: one reader alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrtLlm {
    /// `http://host:port/kv_cache_events`.
    #[schemars(required)]
    pub url: Option<String>,
    /// Milliseconds between polls.
    #[serde(default = "fifty")]
    #[schemars(range(min = 1, max = 60_000))]
    pub poll_ms: u64,
}

fn fifty() -> u64 {
    50
}

/// How an engine that posts its events shows who it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Http {
    /// File with the token that it sends as `Authorization: Bearer`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "PathBuf")]
    pub token_file: Option<PathBuf>,
    /// Whether an engine on the sidecar's own machine needs no token.
    #[serde(default)]
    pub trust_loopback: bool,
}

/// Hashes that events without token ids carry, by the medium they are about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FamilyUse {
    /// How they are computed: any but `dynamo`.
    #[schemars(required)]
    pub family: Option<Family>,
    /// Names of media, each in one family at most.
    #[schemars(required, length(min = 1, max = 64))]
    pub media: Option<Vec<String>>,
    /// Tokens to a hash, a multiple of `kv_cache_block_size`, which it is unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "u32", range(min = 1, max = 65_536))]
    pub block_size: Option<u32>,
    /// `PYTHONHASHSEED` of the engines, which decides the hashes of vLLM's families; `0` unless
    /// given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "String", length(max = 64))]
    pub hash_seed: Option<String>,
    /// Hashes that one rank can hold, over all its media: beyond it, those not announced for
    /// longest are given up. For caches that drop blocks without a word, as `FlexKV`'s may.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "u32", range(min = 1))]
    pub max_blocks: Option<u32>,
    /// Objects in which a Mooncake store keeps one page of `HiCache`: two to each tensor-parallel
    /// and pipeline rank, which is 2 unless given; with MLA one to each pipeline rank.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "u32", range(min = 1, max = 64))]
    pub objects: Option<u32>,
}
