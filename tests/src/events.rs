//! Engines' KV events, published by the test itself, and answers to snapshot requests.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use async_nats::Client;
use futures::StreamExt as _;
use kv_core::event::{
    Envelope, EventData, KvCacheEvent, RouterEvent, SnapshotPart, StorageTier, Stored, StoredBlock,
};
use kv_core::hash::{Hashing, Seed, sequence_hashes};
use tokio::task::JoinHandle;

/// That the complete blocks of a prompt are stored, as an engine tells which names blocks by all
/// that is before them.
#[must_use]
pub fn stored(prompt: &[u32], block_size: usize, seed: Seed) -> EventData {
    let names = sequence_hashes(prompt, Hashing::new(block_size, seed));
    let blocks = prompt.chunks_exact(block_size).zip(names);
    let block = |(tokens, block_hash)| StoredBlock {
        block_hash,
        tokens_hash: seed.block(tokens),
        mm_extra_info: None,
    };
    EventData::Stored(Stored {
        blocks: blocks.map(block).collect(),
        ..Stored::default()
    })
}

/// How a worker's events are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// JSON on `kv-events.ID`.
    Json,
    /// Dynamo's event plane.
    Dynamo,
}

/// All events of one worker, in order.
type Log = Arc<Mutex<HashMap<u64, Vec<RouterEvent>>>>;

/// A publisher for any number of workers.
#[derive(Debug)]
pub struct Publisher {
    client: Client,
    log: Log,
    /// Events published in all.
    pub published: u64,
    responder: JoinHandle<()>,
}

impl Publisher {
    /// Connects, and answers snapshot requests of workers that publish JSON by replaying all their
    /// events.
    ///
    /// # Panics
    /// When NATS can't be reached.
    pub async fn connect(url: &str) -> Self {
        let client = async_nats::connect(url).await.expect("a NATS server");
        let log = Log::default();
        let mut requests = client
            .subscribe("kv-events.*.snapshot")
            .await
            .expect("a connection");
        let (answers, events) = (client.clone(), Arc::clone(&log));
        let responder = tokio::spawn(async move {
            while let Some(request) = requests.next().await {
                let worker = request
                    .subject
                    .split('.')
                    .nth(1)
                    .and_then(|id| id.parse().ok());
                let (Some(worker_id), Some(reply)) = (worker, request.reply) else {
                    continue;
                };
                let events = events.lock().expect("a sound log").get(&worker_id).cloned();
                let events = events.unwrap_or_default();
                let event_id = events.last().map_or(0, |e| e.event.event_id);
                let part = SnapshotPart {
                    worker_id,
                    event_id,
                    part: 0,
                    parts: 1,
                    events,
                };
                let json = serde_json::to_vec(&part).expect("serialisable");
                let _ = answers.publish(reply, json.into()).await;
            }
        });
        Self {
            client,
            log,
            published: 0,
            responder,
        }
    }

    /// Continues the events of another publisher.
    ///
    /// # Panics
    /// When a log is poisoned.
    pub fn adopt(&mut self, other: &Self) {
        let events = other.log.lock().expect("a sound log").clone();
        *self.log.lock().expect("a sound log") = events;
        self.published = other.published;
    }

    /// Publishes one event of a worker's rank 0.
    ///
    /// # Panics
    /// When NATS is gone.
    pub async fn publish(
        &mut self,
        worker_id: u64,
        tier: StorageTier,
        data: EventData,
        encoding: Encoding,
    ) {
        let event = {
            let mut log = self.log.lock().expect("a sound log");
            let events = log.entry(worker_id).or_default();
            let event_id = events.len() as u64 + 1;
            let event = RouterEvent {
                worker_id,
                storage_tier: tier,
                residency_domain: Some("worker".to_owned()),
                event: KvCacheEvent {
                    event_id,
                    data,
                    dp_rank: 0,
                },
                session_id: None,
            };
            events.push(event.clone());
            event
        };
        let sequence = self.published;
        self.published += 1;
        let (subject, payload) = match encoding {
            Encoding::Json => {
                let json = serde_json::to_vec(&event).expect("serialisable");
                (format!("kv-events.{worker_id}"), json)
            }
            Encoding::Dynamo => {
                let payload = rmp_serde::to_vec_named(&[event]).expect("serialisable");
                let envelope = Envelope {
                    publisher_id: 7,
                    sequence,
                    published_at: 1_700_000_000_000,
                    topic: "kv-events".to_owned(),
                    payload,
                };
                let subject = "namespace.dynamo.component.backend.endpoint.generate.kv-events";
                (
                    subject.to_owned(),
                    rmp_serde::to_vec_named(&envelope).expect("serialisable"),
                )
            }
        };
        self.client
            .publish(subject, payload.into())
            .await
            .expect("a connection");
        self.client.flush().await.expect("a connection");
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.responder.abort();
    }
}
