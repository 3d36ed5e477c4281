//! An engine's side of the event planes.

use std::sync::{Arc, Mutex};

use async_nats::Client;
use futures::StreamExt as _;
use kv_core::event::{
    EventData, KvCacheEvent, Removed, RouterEvent, SnapshotPart, StorageTier, Stored, StoredBlock,
};
use kv_core::hash::Seed;
use tokio::task::JoinHandle;

/// Tokens to a block in these tests.
pub(crate) const BLOCK: u32 = 4;

/// Token ids of `blocks` blocks, told apart by `from`.
pub(crate) fn tokens(from: u32, blocks: u32) -> Vec<u32> {
    (from..from + blocks * BLOCK).collect()
}

/// A store of the blocks of a prompt after the first `skip`; engine hashes are `name` + position.
pub(crate) fn stored(tokens: &[u32], skip: u32, name: u64) -> EventData {
    let block = |(i, tokens): (u64, &[u32])| StoredBlock {
        block_hash: name + i,
        tokens_hash: Seed::new("", "").block(tokens),
        mm_extra_info: None,
    };
    let blocks = (0..).zip(tokens.chunks_exact(BLOCK as usize));
    EventData::Stored(Stored {
        parent_hash: skip.checked_sub(1).map(|last| name + u64::from(last)),
        start_position: None,
        blocks: blocks.skip(skip as usize).map(block).collect(),
    })
}

pub(crate) fn removed(hashes: &[u64]) -> EventData {
    EventData::Removed(Removed {
        block_hashes: hashes.to_vec(),
    })
}

pub(crate) fn event(worker_id: u64, event_id: u64, data: EventData) -> RouterEvent {
    RouterEvent {
        worker_id,
        storage_tier: StorageTier::Device,
        residency_domain: None,
        event: KvCacheEvent {
            event_id,
            data,
            dp_rank: 0,
        },
        session_id: None,
    }
}

/// A worker of the JSON plane.
pub(crate) struct Engine {
    pub(crate) client: Client,
    worker: u64,
    snapshot: Arc<Mutex<Vec<SnapshotPart>>>,
    asked: Arc<Mutex<u32>>,
    answering: JoinHandle<()>,
}

impl Engine {
    /// Connects and answers requests for a snapshot.
    pub(crate) async fn start(url: &str, worker: u64) -> Self {
        let client = async_nats::ConnectOptions::new()
            .retry_on_initial_connect()
            .connect(url)
            .await
            .unwrap();
        let mut requests = client
            .subscribe(format!("kv-events.{worker}.snapshot"))
            .await
            .unwrap();
        client.flush().await.unwrap();
        let snapshot: Arc<Mutex<Vec<SnapshotPart>>> = Arc::default();
        let asked: Arc<Mutex<u32>> = Arc::default();
        let (answer, count, out) = (Arc::clone(&snapshot), Arc::clone(&asked), client.clone());
        let answering = tokio::spawn(async move {
            while let Some(request) = requests.next().await {
                *count.lock().unwrap() += 1;
                let parts = answer.lock().unwrap().clone();
                let Some(reply) = request.reply else { continue };
                for part in parts {
                    let part = serde_json::to_vec(&part).unwrap();
                    out.publish(reply.clone(), part.into()).await.unwrap();
                }
            }
        });
        Self {
            client,
            worker,
            snapshot,
            asked,
            answering,
        }
    }

    /// What to answer from now on: up to which event, and the stores of each part.
    pub(crate) fn answer(&self, event_id: u64, parts: Vec<Vec<EventData>>) {
        let of = u32::try_from(parts.len()).unwrap();
        let part = |(part, stores): (u32, Vec<EventData>)| SnapshotPart {
            worker_id: self.worker,
            event_id,
            part,
            parts: of,
            events: stores
                .into_iter()
                .map(|s| event(self.worker, event_id, s))
                .collect(),
        };
        *self.snapshot.lock().unwrap() = (0..).zip(parts).map(part).collect();
    }

    /// How often it was asked.
    pub(crate) fn asked(&self) -> u32 {
        *self.asked.lock().unwrap()
    }

    /// Publishes an event.
    pub(crate) async fn publish(&self, event_id: u64, data: EventData) {
        let text = serde_json::to_vec(&event(self.worker, event_id, data)).unwrap();
        self.send(&format!("kv-events.{}", self.worker), text).await;
    }

    /// Publishes anything.
    pub(crate) async fn send(&self, subject: &str, payload: Vec<u8>) {
        let subject = subject.to_owned();
        self.client.publish(subject, payload.into()).await.unwrap();
        self.client.flush().await.unwrap();
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.answering.abort();
    }
}
