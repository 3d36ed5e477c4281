//! Fills an index the way engines do: over NATS, on Dynamo's event plane, with large events.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context as _, bail};
use kv_core::event::{Envelope, EventData, KvCacheEvent, Removed, RouterEvent, StorageTier};

use tokio::time::sleep;

use crate::corpus::Store;
use crate::fleet::Fleet;

/// Where engines publish.
const SUBJECT: &str = "namespace.dynamo.component.backend.endpoint.generate.kv-events";
/// Blocks after which a message is sent.
const MESSAGE_BLOCKS: usize = 4096;
/// Messages that the sidecar may be behind; a server drops clients that are too far behind.
const AHEAD: u64 = 64;

/// A publisher for all workers.
#[derive(Debug)]
pub struct Feed {
    client: async_nats::Client,
    publisher: u64,
    ids: HashMap<u64, u64>,
    messages: u64,
    batch: Vec<RouterEvent>,
    batch_blocks: usize,
    /// Events by the messages that may be under way.
    marks: Vec<u64>,
    /// Events sent.
    pub events: u64,
}

impl Feed {
    /// Connects as the publisher with this id, and sends empty messages until the sidecar has seen one: what is published before
    /// it has subscribed is lost.
    ///
    /// # Errors
    /// When NATS can't be reached or the sidecar doesn't listen.
    pub async fn connect(fleet: &Fleet, publisher: u64) -> anyhow::Result<Self> {
        let mut feed = Self {
            client: async_nats::connect(fleet.nats.url()).await?,
            publisher,
            ids: HashMap::new(),
            messages: 0,
            batch: Vec::new(),
            batch_blocks: 0,
            marks: Vec::new(),
            events: 0,
        };
        for _ in 0..1000 {
            feed.send().await?;
            feed.client.flush().await?;
            if fleet.index().await?["planes"]["dynamo"]["messages"].as_u64() > Some(0) {
                feed.marks.clear();
                return Ok(feed);
            }
            sleep(Duration::from_millis(5)).await;
        }
        bail!("the sidecar does not listen to NATS")
    }

    /// Adds stores, sending what fills a message.
    ///
    /// # Errors
    /// When NATS or the sidecar is gone.
    pub async fn add(
        &mut self,
        fleet: &Fleet,
        stores: impl IntoIterator<Item = Store>,
    ) -> anyhow::Result<()> {
        for store in stores {
            self.batch_blocks += store.data.blocks.len();
            let event = self.event(store);
            self.batch.push(event);
            if self.batch_blocks >= MESSAGE_BLOCKS {
                self.send_some().await?;
            }
            if self.marks.len() as u64 >= AHEAD {
                self.client.flush().await?;
                let half = self.marks.len() / 2;
                fleet.applied(self.marks[half]).await?;
                self.marks.drain(..=half);
            }
        }
        Ok(())
    }

    /// Sends the rest and waits until it is applied and every Envoy holds it.
    ///
    /// # Errors
    /// When NATS or the sidecar is gone.
    pub async fn finish(&mut self, fleet: &Fleet) -> anyhow::Result<()> {
        self.send_some().await?;
        self.client.flush().await?;
        self.marks.clear();
        fleet.settled(self.events).await
    }

    /// Sends one store in a message of its own, at once.
    ///
    /// # Errors
    /// When NATS is gone.
    pub async fn publish(&mut self, store: Store) -> anyhow::Result<()> {
        let event = self.event(store);
        self.batch.push(event);
        self.send().await?;
        self.marks.clear();
        Ok(())
    }

    /// Sends one step of an engine in a message of its own, at once: stores, and removals of device
    /// blocks, each an event.
    ///
    /// # Errors
    /// When NATS is gone.
    pub async fn step(
        &mut self,
        stores: Vec<Store>,
        removals: &[(u64, u64)],
    ) -> anyhow::Result<()> {
        for store in stores {
            let event = self.event(store);
            self.batch.push(event);
        }
        for (worker, hash) in removals {
            let block_hashes = vec![*hash];
            let data = EventData::Removed(Removed { block_hashes });
            let event = self.numbered(*worker, StorageTier::Device, data);
            self.batch.push(event);
        }
        self.send().await?;
        self.marks.clear();
        Ok(())
    }

    /// Waits until what was sent has left.
    ///
    /// # Errors
    /// When NATS is gone.
    pub async fn flush(&self) -> anyhow::Result<()> {
        self.client.flush().await.context("flushing to NATS")
    }

    fn event(&mut self, store: Store) -> RouterEvent {
        self.numbered(store.worker, store.tier, EventData::Stored(store.data))
    }

    fn numbered(&mut self, worker_id: u64, tier: StorageTier, data: EventData) -> RouterEvent {
        let id = self.ids.entry(worker_id).or_default();
        *id += 1;
        RouterEvent {
            worker_id,
            storage_tier: tier,
            residency_domain: None,
            event: KvCacheEvent {
                event_id: *id,
                data,
                dp_rank: 0,
            },
            session_id: None,
        }
    }

    async fn send_some(&mut self) -> anyhow::Result<()> {
        if self.batch.is_empty() {
            Ok(())
        } else {
            self.send().await
        }
    }

    async fn send(&mut self) -> anyhow::Result<()> {
        let envelope = Envelope {
            publisher_id: self.publisher,
            sequence: self.messages,
            published_at: 0,
            topic: "kv-events".to_owned(),
            payload: rmp_serde::to_vec_named(&self.batch)?,
        };
        self.messages += 1;
        self.events += self.batch.len() as u64;
        self.marks.push(self.events);
        self.batch.clear();
        self.batch_blocks = 0;
        let bytes = rmp_serde::to_vec_named(&envelope)?;
        self.client.publish(SUBJECT, bytes.into()).await?;
        Ok(())
    }
}
