//! `/query` and `/query_by_hash`: who holds how many tokens of a prompt, and where.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use kv_core::hash::{Hashing, Seed, chain, sequence_hashes};
use kv_core::id::{DpRank, OwnerId};
use kv_core::overlap::Overlap;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::DEFAULT_GROUP;
use super::routes::{Face, Gone, failed};
use crate::index::Control;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum QueryError {
    #[error("no indexer for model={model} routing_group={group}")]
    NoIndexer { model: String, group: String },
    #[error(
        "cache_salt is not accepted by /query_by_hash; block_hashes must already include the intended cache salt"
    )]
    SaltWithHashes,
    #[error("the indexer is shutting down")]
    Gone,
}

impl From<Gone> for QueryError {
    fn from(_: Gone) -> Self {
        Self::Gone
    }
}

impl IntoResponse for QueryError {
    fn into_response(self) -> Response {
        let status = match self {
            Self::NoIndexer { .. } => StatusCode::NOT_FOUND,
            Self::SaltWithHashes => StatusCode::BAD_REQUEST,
            Self::Gone => StatusCode::SERVICE_UNAVAILABLE,
        };
        failed(status, self)
    }
}

/// Body of `/query`. `tenant_id` is taken and means nothing.
#[derive(Deserialize)]
pub(super) struct ByTokens {
    token_ids: Vec<u32>,
    model_name: String,
    #[serde(default = "super::query::default_group")]
    routing_group: String,
    lora_name: Option<String>,
    cache_salt: Option<String>,
}

/// Body of `/query_by_hash`: hashes of the blocks' tokens, as signed numbers.
#[derive(Deserialize)]
pub(super) struct ByHash {
    block_hashes: Vec<i64>,
    model_name: String,
    #[serde(default = "super::query::default_group")]
    routing_group: String,
    cache_salt: Option<String>,
}

pub(super) fn default_group() -> String {
    DEFAULT_GROUP.to_owned()
}

/// The answer of both: tokens, not blocks.
#[derive(Debug, Default, PartialEq, Serialize)]
struct Scores {
    /// Always empty, as in Dynamo 1.6.1.
    frequencies: [u32; 0],
    /// By worker.
    instances: BTreeMap<String, Held>,
    /// Device tokens by worker and rank, without those that hold none.
    scores: BTreeMap<String, BTreeMap<String, u32>>,
}

/// What a worker holds, the best of its ranks. Each tier includes those before it; the disk's
/// includes external stores.
#[derive(Debug, Default, PartialEq, Serialize)]
pub(crate) struct Held {
    cpu: u32,
    disk: u32,
    /// Device tokens by rank.
    dp: BTreeMap<String, u32>,
    gpu: u32,
    longest_matched: u32,
}

pub(super) async fn by_tokens(
    State(face): State<Face>,
    Json(asked): Json<ByTokens>,
) -> Result<Json<Value>, QueryError> {
    let partition = face
        .partition(&asked.model_name, &asked.routing_group)
        .await?;
    let seed = Seed::new(
        asked.lora_name.as_deref().unwrap_or_default(),
        asked.cache_salt.as_deref().unwrap_or_default(),
    );
    let hashing = Hashing::new(partition.block_size as usize, seed);
    let prompt = sequence_hashes(&asked.token_ids, hashing);
    answer(&face, partition.pool, prompt, partition.block_size).await
}

pub(super) async fn by_hash(
    State(face): State<Face>,
    Json(asked): Json<ByHash>,
) -> Result<Json<Value>, QueryError> {
    if asked.cache_salt.is_some() {
        return Err(QueryError::SaltWithHashes);
    }
    let partition = face
        .partition(&asked.model_name, &asked.routing_group)
        .await?;
    let blocks = asked.block_hashes.iter().map(|hash| hash.cast_unsigned());
    let mut before = None;
    let sequence = blocks.map(|block| {
        let hash = before.map_or(block, |before| chain(before, block));
        before = Some(hash);
        hash
    });
    let prompt = sequence.collect();
    answer(&face, partition.pool, prompt, partition.block_size).await
}

async fn answer(
    face: &Face,
    pool: usize,
    prompt: Vec<u64>,
    block_size: u32,
) -> Result<Json<Value>, QueryError> {
    let ask = |reply| Control::Held {
        pool,
        prompt,
        reply,
    };
    let scores = scores(&face.ask(ask).await?, block_size);
    // As a value, its keys are in order like Dynamo's.
    Ok(Json(serde_json::json!(scores)))
}

fn scores(held: &[(OwnerId, Overlap)], block_size: u32) -> Scores {
    let mut scores = Scores::default();
    for (owner, overlap) in held {
        let worker = owner.worker.to_string();
        let instance = scores.instances.entry(worker.clone()).or_default();
        let gpu = instance.add(owner.rank, overlap, block_size);
        if gpu > 0 {
            let ranks = scores.scores.entry(worker).or_default();
            ranks.insert(owner.rank.to_string(), gpu);
        }
    }
    scores
}

impl Held {
    /// Adds a rank, and returns its device tokens.
    pub(crate) fn add(&mut self, rank: DpRank, overlap: &Overlap, block_size: u32) -> u32 {
        let [gpu, cpu, _, disk] = overlap.depth.map(|depth| depth.saturating_mul(block_size));
        self.dp.insert(rank.to_string(), gpu);
        self.gpu = self.gpu.max(gpu);
        self.cpu = self.cpu.max(cpu);
        self.disk = self.disk.max(disk);
        self.longest_matched = self.longest_matched.max(disk);
        gpu
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiers_add_up_and_the_best_rank_counts() {
        let owner = |worker, rank| OwnerId { worker, rank };
        let held = [
            (owner(7, 0), Overlap::new([2, 3, 3, 5])),
            (owner(7, 1), Overlap::new([1, 1, 2, 2])),
            (owner(9, 3), Overlap::new([0, 1, 1, 1])),
        ];
        let expected = serde_json::json!({
            "frequencies": [],
            "instances": {
                "7": {"cpu": 48, "disk": 80, "dp": {"0": 32, "1": 16}, "gpu": 32, "longest_matched": 80},
                "9": {"cpu": 16, "disk": 16, "dp": {"3": 0}, "gpu": 0, "longest_matched": 16},
            },
            "scores": {"7": {"0": 32, "1": 16}},
        });
        assert_eq!(serde_json::json!(scores(&held, 16)), expected);
    }
}
