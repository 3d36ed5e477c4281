//! Events as TensorRT-LLM keeps them to be polled: a ring of dictionaries with ids; reading takes
//! them away.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};

use crate::change::Change;

/// Tokens of the attention window.
const WINDOW: u32 = 131_072;

/// The ring.
#[derive(Clone, Debug)]
pub(crate) struct Buffer(Arc<Mutex<Ring>>);

#[derive(Debug)]
struct Ring {
    size: usize,
    blocks: usize,
    next: u64,
    events: VecDeque<Value>,
    /// What is cached: a clear is told as a removal.
    cached: HashSet<u64>,
    told: u64,
    lost: u64,
}

impl Buffer {
    pub(super) fn new(size: usize, blocks: usize) -> Self {
        let mut ring = Ring {
            size,
            blocks,
            next: 0,
            events: VecDeque::new(),
            cached: HashSet::new(),
            told: 0,
            lost: 0,
        };
        ring.created();
        Self(Arc::new(Mutex::new(ring)))
    }

    /// Takes everything away.
    pub(crate) fn take(&self) -> Vec<Value> {
        let mut ring = self.lock();
        let events: Vec<Value> = std::mem::take(&mut ring.events).into();
        ring.told += events.len() as u64;
        events
    }

    pub(super) fn push(&self, changes: &[Change]) {
        let mut ring = self.lock();
        for change in changes {
            ring.change(change);
        }
    }

    pub(super) fn restart(&self) {
        let mut ring = self.lock();
        ring.next = 0;
        ring.events.clear();
        ring.cached.clear();
        ring.created();
    }

    pub(super) fn totals(&self) -> (u64, u64) {
        let ring = self.lock();
        (ring.told, ring.lost)
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ring {
    fn created(&mut self) {
        let blocks = self.blocks;
        self.push(&json!({"type": "created", "num_blocks_per_cache_level": [blocks, 0]}));
    }

    fn change(&mut self, change: &Change) {
        let data = match change {
            Change::Stored(run) => {
                self.cached.extend(run.iter().map(|key| key.engine_hash));
                let block = |key: &crate::chain::Key| {
                    let token = |id: &u32| json!({"type": "unique_token", "token_id": id, "token_extra_id": 0});
                    let tokens: Vec<Value> = key.tokens.iter().map(token).collect();
                    json!({
                        "type": "stored_block",
                        "block_hash": key.engine_hash,
                        "tokens": tokens,
                        "cache_level": 0,
                        "priority": 35,
                    })
                };
                let blocks: Vec<Value> = run.iter().map(block).collect();
                let parent = run.first().and_then(|first| first.parent);
                let mut data = json!({"type": "stored", "parent_hash": parent, "blocks": blocks});
                let salt = run.first().map(|first| &*first.salt).unwrap_or_default();
                if let (false, Some(data)) = (salt.is_empty(), data.as_object_mut()) {
                    data.insert("cache_salt".to_owned(), salt.into());
                }
                data
            }
            Change::Removed(run) => {
                for hash in run {
                    self.cached.remove(hash);
                }
                json!({"type": "removed", "block_hashes": run})
            }
            Change::Cleared => {
                let all: Vec<u64> = self.cached.drain().collect();
                json!({"type": "removed", "block_hashes": all})
            }
        };
        self.push(&data);
    }

    fn push(&mut self, data: &Value) {
        if self.events.len() >= self.size {
            self.events.pop_front();
            self.lost += 1;
        }
        let id = self.next;
        self.next += 1;
        self.events
            .push_back(json!({"event_id": id, "data": data, "window_size": WINDOW}));
    }
}
