//! Both planes over one NATS connection, so that a worker's events and the parts of its snapshot
//! keep the order they were sent in.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_nats::{Client, ConnectOptions, Event, Message, StatusCode, Subscriber};
use futures::stream::SelectAll;
use futures::{FutureExt, StreamExt};
use kv_core::event::SnapshotPart;
use kv_core::id::WorkerId;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::subject::{self, Template};
use super::{Arrival, Decoded, NoSnapshot, Plane, decode, jetstream};
use crate::config::Nats;
use crate::metrics::{Metrics, PlaneKind};

/// Messages the client holds while the sidecar is behind; more are dropped and show as gaps.
const CLIENT_BUFFER: usize = 1 << 16;
/// Longest pause between attempts to connect.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Why the source can't start. A server that can't be reached is no such reason.
#[derive(Debug, thiserror::Error)]
pub enum NatsError {
    /// A credentials or seed file.
    #[error("{file}: {error}")]
    File {
        /// Its path.
        file: String,
        /// What the system says.
        error: std::io::Error,
    },
    /// The client refuses the settings.
    #[error("nats: {0}")]
    Connect(#[from] async_nats::ConnectError),
    /// A subject the client refuses.
    #[error("nats: {0}")]
    Subscribe(#[from] async_nats::SubscribeError),
}

/// The connection with its subscriptions.
pub struct Source {
    client: Client,
    status: mpsc::Receiver<Event>,
    dynamo: SelectAll<Subscriber>,
    json: Option<(Template, Subscriber)>,
    inbox: String,
    replies: Subscriber,
    /// Number of the latest request to each worker: answers to earlier ones come too late.
    asked: HashMap<WorkerId, u64>,
    arrivals: mpsc::Sender<Arrival>,
    requests: mpsc::Receiver<WorkerId>,
    metrics: Arc<Metrics>,
}

impl Source {
    /// Starts to connect and subscribes. Connecting goes on for ever, in the background.
    ///
    /// `requests` are workers of the JSON plane whose snapshot is wanted.
    ///
    /// # Errors
    /// When the settings can't work.
    pub async fn new(
        nats: &Nats,
        arrivals: mpsc::Sender<Arrival>,
        requests: mpsc::Receiver<WorkerId>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, NatsError> {
        let (events, status) = mpsc::channel(64);
        let on_event = move |event| {
            let events = events.clone();
            async move {
                // The source is gone: nobody is left to tell.
                let _ = events.send(event).await;
            }
        };
        let options = options(nats).await?.event_callback(on_event);
        let client = options.connect(nats.urls.as_slice()).await?;
        let mut dynamo = SelectAll::new();
        for subject in nats.dynamo.iter().flat_map(subject::dynamo) {
            dynamo.push(client.subscribe(subject).await?);
        }
        let json = nats.json.clone().filter(|_| nats.json_stream.is_none());
        let json = match json {
            Some(template) => {
                let subscriber = client.subscribe(template.wildcard()).await?;
                Some((template, subscriber))
            }
            None => None,
        };
        let inbox = client.new_inbox();
        let replies = client.subscribe(format!("{inbox}.*.*")).await?;
        Ok(Self {
            client,
            status,
            dynamo,
            json,
            inbox,
            replies,
            asked: HashMap::new(),
            arrivals,
            requests,
            metrics,
        })
    }

    /// Where the plain JSON events are kept, for who reads them there.
    #[must_use]
    pub fn stored(&self, nats: &Nats) -> Option<jetstream::Source> {
        Some(jetstream::Source {
            client: self.client.clone(),
            stream: nats.json_stream.clone()?,
            template: nats.json.clone()?,
        })
    }

    /// Hands on what arrives until cancelled or nobody takes it.
    pub async fn run(mut self, cancel: CancellationToken) {
        // `None` only when the index is gone.
        while self.step(&cancel).await.is_some() {}
    }

    async fn step(&mut self, cancel: &CancellationToken) -> Option<()> {
        tokio::select! {
            biased;
            () = cancel.cancelled() => None,
            Some(event) = self.status.recv() => self.status_changed(event).await,
            Some(worker) = self.requests.recv() => self.request(worker).await,
            Some(reply) = self.replies.next() => {
                // Events sent before the reply were received before it: they go first.
                while let Some(Some(message)) = next_json(&mut self.json).now_or_never() {
                    self.json_events(&message).await?;
                }
                self.snapshot_part(&reply).await
            }
            Some(message) = next_json(&mut self.json) => self.json_events(&message).await,
            Some(message) = self.dynamo.next() => {
                self.events(Plane::Dynamo, decode::dynamo(&message.payload)).await
            }
        }
    }

    async fn status_changed(&mut self, event: Event) -> Option<()> {
        match event {
            Event::Connected => {
                tracing::info!("connected to nats");
                self.metrics.nats_connected.set(1);
                self.metrics.nats_connects.inc();
                self.tell(Arrival::Connected).await
            }
            Event::Disconnected | Event::Closed => {
                tracing::warn!("nats connection lost, reconnecting");
                self.metrics.nats_connected.set(0);
                self.tell(Arrival::Disconnected).await
            }
            Event::SlowConsumer(_) => {
                self.metrics.nats_slow.inc();
                tracing::warn!("behind with nats messages, some were dropped");
                Some(())
            }
            Event::ServerError(error) => {
                tracing::warn!(%error, "nats server error");
                Some(())
            }
            Event::ClientError(error) => {
                tracing::warn!(%error, "nats client error");
                Some(())
            }
            Event::LameDuckMode | Event::Draining => Some(()),
        }
    }

    async fn tell(&self, what: fn(Plane) -> Arrival) -> Option<()> {
        if !self.dynamo.is_empty() {
            self.arrivals.send(what(Plane::Dynamo)).await.ok()?;
        }
        if self.json.is_some() {
            self.arrivals.send(what(Plane::Json)).await.ok()?;
        }
        Some(())
    }

    async fn json_events(&mut self, message: &Message) -> Option<()> {
        let worker = self
            .json
            .as_ref()
            .and_then(|(template, _)| template.worker(&message.subject));
        let decoded = match worker {
            Some(worker) => decode::json(&message.payload, worker),
            None => Decoded {
                rejected: vec![super::Rejection::WorkerMismatch],
                ..Decoded::default()
            },
        };
        self.events(Plane::Json, decoded).await
    }

    async fn events(&mut self, plane: Plane, decoded: Decoded) -> Option<()> {
        self.received(plane, "events");
        let arrival = Arrival::Events {
            plane,
            received_ns: unix_ns(),
            decoded,
        };
        self.arrivals.send(arrival).await.ok()
    }

    async fn request(&mut self, worker: WorkerId) -> Option<()> {
        let Some((template, _)) = &self.json else {
            return Some(());
        };
        let number = self.asked.entry(worker).or_default();
        *number += 1;
        let reply = format!("{}.{worker}.{number}", self.inbox);
        let sent = self
            .client
            .publish_with_reply(template.snapshot(worker), reply, "".into())
            .await;
        if let Err(error) = sent {
            tracing::warn!(worker, %error, "can't ask for a snapshot");
            let part = Err(NoSnapshot::Disconnected);
            self.arrivals
                .send(Arrival::Snapshot { worker, part })
                .await
                .ok()?;
        }
        Some(())
    }

    async fn snapshot_part(&mut self, reply: &Message) -> Option<()> {
        self.received(Plane::Json, "snapshot");
        let mut tokens = reply.subject.rsplit('.').map(str::parse::<u64>);
        let (Some(Ok(number)), Some(Ok(worker))) = (tokens.next(), tokens.next()) else {
            return Some(());
        };
        if self.asked.get(&worker) != Some(&number) {
            return Some(());
        }
        let part = if reply.status == Some(StatusCode::NO_RESPONDERS) {
            Err(NoSnapshot::NoResponders)
        } else {
            let part = serde_json::from_slice::<SnapshotPart>(&reply.payload);
            part.ok()
                .filter(|part| part.worker_id == worker)
                .ok_or(NoSnapshot::Malformed)
        };
        self.arrivals
            .send(Arrival::Snapshot { worker, part })
            .await
            .ok()
    }

    fn received(&self, plane: Plane, kind: &'static str) {
        let plane = plane.kind();
        self.metrics
            .messages
            .get_or_create(&PlaneKind { plane, kind })
            .inc();
    }
}

/// The next message of the JSON plane; never, without one.
async fn next_json(json: &mut Option<(Template, Subscriber)>) -> Option<Message> {
    match json {
        Some((_, subscriber)) => subscriber.next().await,
        None => None,
    }
}

pub(crate) async fn options(nats: &Nats) -> Result<ConnectOptions, NatsError> {
    let mut options = ConnectOptions::new()
        .name("kv-router")
        .retry_on_initial_connect()
        .max_reconnects(None)
        .subscription_capacity(CLIENT_BUFFER)
        .ping_interval(Duration::from_secs(10))
        .reconnect_delay_callback(pause);
    let read = async |file: &std::path::Path| {
        tokio::fs::read_to_string(file)
            .await
            .map_err(|error| file_error(file, error))
    };
    if let Some(file) = &nats.credentials_file {
        let text = read(file).await?;
        options = options
            .credentials(&text)
            .map_err(|error| file_error(file, error))?;
    }
    if let Some(file) = &nats.nkey_seed_file {
        options = options.nkey(read(file).await?.trim().to_owned());
    }
    if let Some(tls) = &nats.tls {
        options = options.require_tls(true);
        if let Some(ca) = &tls.ca_file {
            options = options.add_root_certificates(ca.clone());
        }
        if let (Some(cert), Some(key)) = (&tls.cert_file, &tls.key_file) {
            options = options.add_client_certificate(cert.clone(), key.clone());
        }
    }
    Ok(options)
}

fn file_error(file: &std::path::Path, error: std::io::Error) -> NatsError {
    NatsError::File {
        file: file.display().to_string(),
        error,
    }
}

/// The pause before an attempt: 100 ms, doubled each time up to [`LONGEST_PAUSE`].
fn pause(attempts: usize) -> Duration {
    let doublings = u32::try_from(attempts).unwrap_or(u32::MAX).min(6);
    Duration::from_millis(100)
        .saturating_mul(1 << doublings)
        .min(LONGEST_PAUSE)
}

/// The wall clock, Unix nanoseconds.
fn unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}
