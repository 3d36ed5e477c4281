//! Load of owners, from the gauges of the Envoy beside us.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kv_core::id::OwnerId;
use kv_core::load::Load;
use serde::{Deserialize, Serialize};

/// How long Envoy may take.
const PATIENCE: Duration = Duration::from_secs(1);
/// Longest answer, in bytes.
const LONGEST_ANSWER: usize = 64 << 20;
/// Names of the gauges before `<pool>.<worker>.<rank>`; Envoy puts a prefix before them.
const LANES: [&str; 2] = ["kv_router_lane_a.", "kv_router_lane_b."];

/// Envoy's admin interface.
#[derive(Clone, Debug)]
pub(super) struct Envoy {
    admin: SocketAddr,
    client: Client<HttpConnector, Empty<Bytes>>,
}

/// Why there is no load.
#[derive(Debug, thiserror::Error)]
pub(super) enum LoadError {
    #[error("envoy's admin at {0} did not answer within {PATIENCE:?}")]
    Timeout(SocketAddr),
    #[error("envoy's admin at {0} can't be reached: {1}")]
    Unreachable(SocketAddr, String),
    #[error("envoy's admin at {0} gave no readable stats: {1}")]
    Unreadable(SocketAddr, String),
}

/// Lanes by pool and owner.
#[derive(Debug, Default)]
pub(super) struct Loads(HashMap<(String, OwnerId), [u64; 2]>);

/// Whether load could be had, as answers say it.
#[derive(Debug, Serialize)]
pub(super) struct Available {
    available: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// A load as answers show it.
#[derive(Debug, Serialize)]
pub(super) struct LoadReport {
    prefill_tokens: u32,
    waiting: u16,
    decoding: u16,
    blocks: u32,
}

impl From<Load> for LoadReport {
    fn from(load: Load) -> Self {
        Self {
            prefill_tokens: load.prefill_tokens,
            waiting: load.waiting,
            decoding: load.decoding,
            blocks: load.blocks,
        }
    }
}

impl Available {
    pub(super) fn of(loads: &Result<Loads, LoadError>) -> Self {
        Self {
            available: loads.is_ok(),
            error: loads.as_ref().err().map(ToString::to_string),
        }
    }
}

#[derive(Deserialize)]
struct Stats {
    stats: Vec<Stat>,
}

#[derive(Deserialize)]
struct Stat {
    #[serde(default)]
    name: String,
    #[serde(default)]
    value: serde_json::Value,
}

impl Envoy {
    pub(super) fn new(admin: SocketAddr) -> Self {
        Self {
            admin,
            client: Client::builder(TokioExecutor::new()).build_http(),
        }
    }

    /// The load of every owner that has ever had a request.
    pub(super) async fn loads(&self) -> Result<Loads, LoadError> {
        tokio::time::timeout(PATIENCE, self.fetch())
            .await
            .map_err(|_| LoadError::Timeout(self.admin))?
    }

    async fn fetch(&self) -> Result<Loads, LoadError> {
        let admin = self.admin;
        let unreachable = |why: String| LoadError::Unreachable(admin, why);
        let unreadable = |why: String| LoadError::Unreadable(admin, why);
        let uri = format!("http://{admin}/stats?format=json&filter=kv_router_lane_");
        let uri = uri
            .parse()
            .map_err(|e: http::uri::InvalidUri| unreachable(e.to_string()))?;
        let answer = self
            .client
            .get(uri)
            .await
            .map_err(|e| unreachable(e.to_string()))?;
        let body = Limited::new(answer.into_body(), LONGEST_ANSWER)
            .collect()
            .await
            .map_err(|e| unreadable(e.to_string()))?
            .to_bytes();
        let stats: Stats = serde_json::from_slice(&body).map_err(|e| unreadable(e.to_string()))?;
        Ok(Loads::new(stats.stats))
    }
}

impl Loads {
    fn new(stats: Vec<Stat>) -> Self {
        let mut loads = Self::default();
        for stat in stats {
            let Some((lane, pool, owner)) = lane(&stat.name) else {
                continue;
            };
            let value = stat.value.as_u64().unwrap_or(0);
            let lanes = loads.0.entry((pool.to_owned(), owner)).or_default();
            lanes[lane] = value;
        }
        loads
    }

    /// An owner's load; none is booked where Envoy has no gauge.
    pub(super) fn of(&self, pool: &str, owner: OwnerId) -> Load {
        let lanes = self.0.get(&(pool.to_owned(), owner));
        lanes.map_or_else(Load::default, |[a, b]| Load::from_lanes(*a, *b))
    }
}

/// Lane, pool and owner of a gauge's name. A pool's name may have dots.
fn lane(name: &str) -> Option<(usize, &str, OwnerId)> {
    let find = |(lane, prefix): (usize, &&str)| {
        let at = name.find(prefix)?;
        Some((lane, &name[at + prefix.len()..]))
    };
    let (lane, rest) = LANES.iter().enumerate().find_map(find)?;
    let mut parts = rest.rsplitn(3, '.');
    let rank = parts.next()?.parse().ok()?;
    let worker = parts.next()?.parse().ok()?;
    Some((lane, parts.next()?, OwnerId { worker, rank }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gauges_are_told_apart_by_lane_pool_worker_and_rank() {
        let stats = r#"{"stats":[
            {"name":"wasmcustom.kv_router_lane_a.my.pool.18446744073709551615.3","value":4294967297},
            {"name":"wasmcustom.kv_router_lane_b.my.pool.18446744073709551615.3","value":30064771072},
            {"name":"wasmcustom.kv_router_lane_a.broken","value":7},
            {"histograms":{}}]}"#;
        let stats: Stats = serde_json::from_str(stats).unwrap();
        let loads = Loads::new(stats.stats);
        let owner = OwnerId {
            worker: u64::MAX,
            rank: 3,
        };
        let load = loads.of("my.pool", owner);
        assert_eq!((load.prefill_tokens, load.decoding, load.blocks), (1, 1, 7));
        assert_eq!(loads.of("other", owner), Load::default());
    }
}
