//! What a worker says when it registers: the keys of a worker of the configuration file, and which
//! pool it belongs to.

use kv_core::id::WorkerId;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::outcome::RegisterError;
use crate::config::{self, Worker};

/// The keys that the configuration's workers lack.
const TERMS: [&str; 5] = ["pool", "model", "models", "block_size", "ttl_secs"];

/// A worker that registers.
#[derive(Clone, Debug, PartialEq)]
pub struct Said {
    /// The worker.
    pub worker: Worker,
    /// What it says besides.
    pub terms: Terms,
    /// All of it as it was said.
    pub(super) text: Map<String, Value>,
}

/// What a worker says besides what the configuration file would.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Terms {
    /// Name of its pool. Without it, the pool that serves its model.
    pub pool: Option<String>,
    /// Model that it serves.
    pub model: Option<String>,
    /// Models that it serves.
    pub models: Vec<String>,
    /// Tokens to a block, to be held against its pool's.
    pub block_size: Option<u32>,
    /// How long it counts without a sign of life.
    pub ttl_secs: Option<f64>,
}

impl Said {
    /// Reads JSON.
    ///
    /// # Errors
    /// When it is not what a worker says.
    pub fn read(bytes: &[u8]) -> Result<Self, RegisterError> {
        let body = |e: serde_json::Error| RegisterError::Body(e.to_string());
        Self::of(serde_json::from_slice(bytes).map_err(body)?)
    }

    /// Reads JSON of this very worker.
    ///
    /// # Errors
    /// When it is not what a worker says, or another worker's.
    pub fn read_of(bytes: &[u8], expected: WorkerId) -> Result<Self, RegisterError> {
        let read = Self::read(bytes)?;
        match read.id() {
            id if id == expected => Ok(read),
            said => Err(RegisterError::OtherWorker { said, expected }),
        }
    }

    pub(super) fn of(text: Map<String, Value>) -> Result<Self, RegisterError> {
        let mut worker = text.clone();
        let terms: Map<String, Value> = TERMS
            .iter()
            .filter_map(|key| worker.remove_entry(*key))
            .collect();
        let terms = serde_json::from_value(Value::Object(terms));
        let terms = terms.map_err(|e| RegisterError::Body(e.to_string()))?;
        let worker = config::worker(&Value::Object(worker));
        let worker = worker.map_err(|e| RegisterError::Body(e.to_string()))?;
        Ok(Self {
            worker,
            terms,
            text,
        })
    }

    /// The worker's id.
    #[must_use]
    pub fn id(&self) -> WorkerId {
        self.worker.id
    }
}

impl Terms {
    /// Models that it names.
    pub(super) fn models(&self) -> impl Iterator<Item = &str> {
        let all = self.model.iter().chain(&self.models);
        all.map(String::as_str)
    }
}
