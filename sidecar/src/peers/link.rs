//! The connection over which peers are met, apart from that of KV events so that a flood of those
//! delays no load.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_nats::{Client, Event, Message, Subscriber};
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::SelectAll;
use kv_core::replica::{ActiveSequenceEvent, MAX_BATCH_DELAY, MAX_BATCH_EVENTS};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::subject::Subjects;
use super::{Alive, Arrival, Ask, Departure, Dropped, codec};
use crate::config::{DynamoPlane, Nats};
use crate::index::{Control, random_u64};
use crate::ingest::nats::{NatsError, options};
use crate::metrics::{Kind, Metrics};

/// What waits for NATS; more is told later.
const DEPARTURES: usize = 64;
/// How long publishing the rest may take at the end.
const FLUSH: Duration = Duration::from_secs(1);

/// The connection with its subscriptions.
pub struct Link {
    router_id: u64,
    subjects: Subjects,
    client: Client,
    status: mpsc::Receiver<Event>,
    events: SelectAll<Subscriber>,
    alive: Subscriber,
    asks: Subscriber,
    inbox: String,
    snapshots: Subscriber,
    departures: mpsc::Receiver<Departure>,
    control: mpsc::Sender<Control>,
    metrics: Arc<Metrics>,
    /// Events that wait for more, and until when.
    pending: Vec<ActiveSequenceEvent>,
    flush_at: Option<Instant>,
    sequence: u64,
}

impl Link {
    /// Starts to connect and subscribes. What is sent into the second value goes to peers; what
    /// they send goes to `control`.
    ///
    /// # Errors
    /// When the settings can't work.
    pub async fn new(
        nats: &Nats,
        plane: &DynamoPlane,
        control: mpsc::Sender<Control>,
        metrics: Arc<Metrics>,
    ) -> Result<(Self, mpsc::Sender<Departure>), NatsError> {
        let (told, status) = mpsc::channel(64);
        let on_event = move |event| {
            let told = told.clone();
            async move {
                // The link is gone: nobody is left to tell.
                let _ = told.send(event).await;
            }
        };
        let options = options(nats).await?.event_callback(on_event);
        let client = options.connect(nats.urls.as_slice()).await?;
        let subjects = Subjects::new(plane);
        let mut events = SelectAll::new();
        for subject in subjects.listen.clone() {
            events.push(client.subscribe(subject).await?);
        }
        let alive = client.subscribe(subjects.alive.clone()).await?;
        let asks = client.subscribe(subjects.snapshot.clone()).await?;
        let inbox = client.new_inbox();
        let snapshots = client.subscribe(inbox.clone()).await?;
        let (out, departures) = mpsc::channel(DEPARTURES);
        let link = Self {
            // As long as Dynamo's ids.
            router_id: random_u64() >> 11,
            subjects,
            client,
            status,
            events,
            alive,
            asks,
            inbox,
            snapshots,
            departures,
            control,
            metrics,
            pending: Vec::new(),
            flush_at: None,
            sequence: 0,
        };
        Ok((link, out))
    }

    /// Id of this sidecar among routers.
    #[must_use]
    pub fn router_id(&self) -> u64 {
        self.router_id
    }

    /// Hands on what arrives and departs until cancelled or nobody takes it.
    pub async fn run(mut self, cancel: CancellationToken) {
        // `None` only when the index is gone.
        while self.step(&cancel).await.is_some() {}
        // Without a connection this takes for ever.
        let _ = tokio::time::timeout(FLUSH, async {
            self.flush().await;
            self.client.flush().await
        })
        .await;
    }

    /// Events are read before anything that may refer to them, so that a sign of life or a snapshot
    /// never overtakes what its sender sent before it.
    async fn step(&mut self, cancel: &CancellationToken) -> Option<()> {
        tokio::select! {
            biased;
            () = cancel.cancelled() => None,
            Some(event) = self.status.recv() => self.status_changed(event).await,
            () = due(self.flush_at) => {
                self.flush().await;
                Some(())
            }
            Some(departure) = self.departures.recv() => {
                self.depart(departure).await;
                Some(())
            }
            Some(message) = self.events.next() => {
                self.decoded(&message, Arrival::Events).await
            }
            Some(message) = self.snapshots.next() => self.snapshot(&message).await,
            Some(message) = self.alive.next() => self.alive(&message).await,
            Some(message) = self.asks.next() => self.asked(message).await,
        }
    }

    async fn tell(&self, arrival: Arrival) -> Option<()> {
        self.control.send(Control::Peer(arrival)).await.ok()
    }

    async fn status_changed(&mut self, event: Event) -> Option<()> {
        match event {
            Event::Connected => self.tell(Arrival::Connected).await,
            Event::Disconnected | Event::Closed => self.tell(Arrival::Disconnected).await,
            Event::SlowConsumer(_) => {
                tracing::warn!("behind with events of peers, some were dropped");
                Some(())
            }
            _ => Some(()),
        }
    }

    async fn decoded(
        &self,
        message: &Message,
        arrival: fn(codec::Decoded) -> Arrival,
    ) -> Option<()> {
        match codec::decode(&message.payload) {
            // Own events come back.
            Ok(decoded) if decoded.publisher == self.router_id => Some(()),
            Ok(decoded) => self.tell(arrival(decoded)).await,
            Err(dropped) => {
                self.count(dropped);
                Some(())
            }
        }
    }

    async fn snapshot(&self, message: &Message) -> Option<()> {
        if message.status.is_some() {
            // Nobody listens: there are no peers.
            return Some(());
        }
        self.decoded(message, Arrival::Snapshot).await
    }

    async fn alive(&self, message: &Message) -> Option<()> {
        match rmp_serde::from_slice::<Alive>(&message.payload) {
            Ok(alive) if alive.router_id == self.router_id => Some(()),
            Ok(alive) => self.tell(Arrival::Alive(alive)).await,
            Err(_) => {
                self.count(Dropped::Malformed);
                Some(())
            }
        }
    }

    async fn asked(&self, message: Message) -> Option<()> {
        let Ok(ask) = rmp_serde::from_slice::<Ask>(&message.payload) else {
            self.count(Dropped::Malformed);
            return Some(());
        };
        let is_meant =
            ask.router_id != self.router_id && ask.of.is_none_or(|of| of == self.router_id);
        match message.reply {
            Some(reply) if is_meant => {
                let reply = reply.into_string();
                self.tell(Arrival::Asked { reply }).await
            }
            _ => Some(()),
        }
    }

    async fn depart(&mut self, departure: Departure) {
        match departure {
            Departure::Events(events) => {
                self.pending.extend(events);
                while self.pending.len() >= MAX_BATCH_EVENTS {
                    self.publish_batch().await;
                }
                if self.pending.is_empty() {
                    self.flush_at = None;
                } else {
                    let at = Instant::now() + MAX_BATCH_DELAY;
                    self.flush_at.get_or_insert(at);
                }
            }
            Departure::Alive { live } => {
                self.flush().await;
                let alive = Alive {
                    router_id: self.router_id,
                    live,
                    next_sequence: self.sequence,
                };
                let subject = self.subjects.alive.clone();
                self.publish(subject, rmp_serde::to_vec_named(&alive)).await;
            }
            Departure::Ask { of } => self.ask(of).await,
            Departure::Snapshot { reply, events } => {
                self.flush().await;
                self.answer(&reply, events).await;
            }
        }
    }

    async fn flush(&mut self) {
        self.flush_at = None;
        while !self.pending.is_empty() {
            self.publish_batch().await;
        }
    }

    async fn publish_batch(&mut self) {
        let events = codec::batch(&mut self.pending);
        let message = codec::encode(self.router_id, self.sequence, unix_ms(), events);
        self.sequence += 1;
        self.publish(self.subjects.events.clone(), message).await;
    }

    async fn ask(&self, of: Option<u64>) {
        let ask = Ask {
            router_id: self.router_id,
            of,
        };
        let Ok(payload) = rmp_serde::to_vec_named(&ask) else {
            self.count(Dropped::Unsent);
            return;
        };
        let subject = self.subjects.snapshot.clone();
        let reply = self.inbox.clone();
        let sent = self
            .client
            .publish_with_reply(subject, reply, payload.into());
        if sent.await.is_err() {
            self.count(Dropped::Unsent);
        }
    }

    /// The parts are numbered; the last one is empty.
    async fn answer(&self, reply: &str, mut events: Vec<ActiveSequenceEvent>) {
        for part in 0.. {
            let batch = codec::batch(&mut events);
            let is_end = batch.is_empty();
            let message = codec::encode(self.router_id, part, unix_ms(), batch);
            self.publish(reply.to_owned(), message).await;
            if is_end {
                break;
            }
        }
    }

    async fn publish(&self, subject: String, message: Result<Vec<u8>, rmp_serde::encode::Error>) {
        let sent = match message {
            Ok(bytes) => self
                .client
                .publish(subject, Bytes::from(bytes))
                .await
                .is_ok(),
            Err(_) => false,
        };
        if !sent {
            self.count(Dropped::Unsent);
        }
    }

    fn count(&self, dropped: Dropped) {
        let kind = dropped.kind();
        self.metrics
            .peer_dropped
            .get_or_create(&Kind { kind })
            .inc();
    }
}

/// Waits for an instant; for ever without one.
async fn due(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}
