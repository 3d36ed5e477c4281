//! KV events on NATS: the way out of an engine, and its answers to snapshot requests.

use std::collections::hash_map::RandomState;
use std::fmt::Write as _;
use std::hash::BuildHasher as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::StreamExt as _;
use kv_core::event::{Envelope, EventData, RouterEvent, SnapshotPart};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Messages that wait for NATS; past this they are dropped and counted, and receivers see the gap.
const QUEUE_MESSAGES: usize = 1024;

/// Events and blocks in one message, Dynamo's bounds but for half its blocks: as JSON they stay
/// below NATS's 1 MB.
const MESSAGE_EVENTS: usize = 128;
const MESSAGE_BLOCKS: usize = 4096;

/// Dynamo's topic of cache events.
const TOPIC: &str = "kv-events";

/// How long the start waits for NATS before it goes on without.
const CONNECT_WAIT: Duration = Duration::from_secs(2);

/// How events are written and where they go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// Dynamo's event plane: MessagePack envelopes on the subject of a component's endpoint.
    Dynamo {
        /// Namespace in the subject.
        namespace: String,
        /// Component in the subject.
        component: String,
        /// Endpoint in the subject.
        endpoint: String,
    },
    /// JSON arrays of events; `<subject>.snapshot` answers with the whole cache.
    Json {
        /// Subject, in which `{worker_id}` stands for the id.
        subject: String,
    },
}

/// NATS and the encoding spoken there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventPlane {
    /// `nats://host:port`.
    pub url: String,
    /// Encoding and subject.
    pub encoding: Encoding,
}

/// Why publishing could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The URL is not one, or NATS refused the connection for good.
    #[error("cannot use nats at {url}: {source}")]
    Connect {
        /// The URL.
        url: String,
        /// Why.
        source: async_nats::ConnectError,
    },
    /// The subject is not valid.
    #[error("cannot subscribe to {subject}: {source}")]
    Subscribe {
        /// The subject.
        subject: String,
        /// Why.
        source: async_nats::SubscribeError,
    },
}

/// Answers a snapshot request with the cache as it is.
pub(crate) type SnapshotSource = Arc<dyn Fn() -> Vec<SnapshotPart> + Send + Sync>;

/// The sending half: takes events without waiting.
#[derive(Clone, Debug)]
pub(crate) struct Publisher {
    queue: mpsc::Sender<Message>,
    totals: Arc<Totals>,
}

#[derive(Debug, Default)]
struct Totals {
    published: AtomicU64,
    dropped: AtomicU64,
    sequence: AtomicU64,
}

#[derive(Debug)]
struct Message {
    sequence: u64,
    events: Vec<RouterEvent>,
}

// === impl Encoding ===

impl Encoding {
    /// The subject events of a worker go to.
    #[must_use]
    pub fn subject(&self, worker_id: u64) -> String {
        match self {
            Self::Dynamo {
                namespace,
                component,
                endpoint,
            } => format!(
                "namespace.{}.component.{}.endpoint.{}.{TOPIC}",
                segment(namespace),
                segment(component),
                segment(endpoint)
            ),
            Self::Json { subject } => subject.replace("{worker_id}", &worker_id.to_string()),
        }
    }
}

/// A subject segment with everything but `[A-Za-z0-9_-]` percent-encoded, as Dynamo does.
fn segment(name: &str) -> String {
    let mut encoded = String::with_capacity(name.len());
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-' {
            encoded.push(char::from(byte));
        } else {
            let _infallible = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

// === impl Publisher ===

impl Publisher {
    /// Connects and starts sending; reconnects for ever. Where NATS is away at the start, events
    /// wait in the bounded queue.
    pub(crate) async fn start(
        plane: &EventPlane,
        worker_id: u64,
        snapshot: SnapshotSource,
        stop: CancellationToken,
    ) -> Result<(Self, Vec<JoinHandle<()>>), PublishError> {
        let mut tasks = Vec::new();
        let client = async_nats::ConnectOptions::new()
            .retry_on_initial_connect()
            .name(format!("kv-sim-{worker_id}"))
            .connect(plane.url.as_str())
            .await
            .map_err(|source| PublishError::Connect {
                url: plane.url.clone(),
                source,
            })?;
        let subject = plane.encoding.subject(worker_id);
        if let Encoding::Json { .. } = plane.encoding {
            let requests = format!("{subject}.snapshot");
            let subscriber = client.subscribe(requests.clone()).await.map_err(|source| {
                PublishError::Subscribe {
                    subject: requests,
                    source,
                }
            })?;
            let answers = answer_snapshots(client.clone(), subscriber, snapshot, stop.clone());
            tasks.push(tokio::spawn(answers));
        }
        let connected = tokio::time::timeout(CONNECT_WAIT, client.flush()).await;
        if !matches!(connected, Ok(Ok(()))) {
            eprintln!("nats at {} does not answer yet; events wait", plane.url);
        }
        let (queue, messages) = mpsc::channel(QUEUE_MESSAGES);
        let totals = Arc::new(Totals::default());
        let wire = Wire {
            client,
            subject,
            encoding: plane.encoding.clone(),
            publisher_id: RandomState::new().hash_one(worker_id) >> 11,
        };
        let sending = send_all(wire, messages, Arc::clone(&totals), stop);
        tasks.push(tokio::spawn(sending));
        Ok((Self { queue, totals }, tasks))
    }

    /// Queues events in order, in as few messages as their bounds allow.
    pub(crate) fn publish(&self, events: Vec<RouterEvent>) {
        let mut message = Vec::new();
        let mut blocks = 0;
        for event in events {
            let size = blocks_of(&event);
            let full = message.len() >= MESSAGE_EVENTS || blocks + size > MESSAGE_BLOCKS;
            if full && !message.is_empty() {
                self.enqueue(std::mem::take(&mut message));
                blocks = 0;
            }
            blocks += size;
            message.push(event);
        }
        if !message.is_empty() {
            self.enqueue(message);
        }
    }

    /// Events handed to NATS.
    pub(crate) fn published(&self) -> u64 {
        self.totals.published.load(Ordering::Relaxed)
    }

    /// Events lost.
    pub(crate) fn dropped(&self) -> u64 {
        self.totals.dropped.load(Ordering::Relaxed)
    }

    fn enqueue(&self, events: Vec<RouterEvent>) {
        // The number is spent even if the message is dropped, so that the loss shows as a gap.
        let sequence = self.totals.sequence.fetch_add(1, Ordering::Relaxed);
        let count = events.len() as u64;
        if self.queue.try_send(Message { sequence, events }).is_err() {
            self.totals.dropped.fetch_add(count, Ordering::Relaxed);
        }
    }
}

fn blocks_of(event: &RouterEvent) -> usize {
    match &event.event.data {
        EventData::Stored(run) => run.blocks.len(),
        EventData::Removed(run) => run.block_hashes.len(),
        EventData::Cleared => 0,
    }
}

struct Wire {
    client: async_nats::Client,
    subject: String,
    encoding: Encoding,
    publisher_id: u64,
}

impl Wire {
    /// Bytes of a message; an encoder's failure is worded for the log.
    fn encode(&self, message: &Message) -> Result<Vec<u8>, String> {
        match &self.encoding {
            Encoding::Json { .. } => {
                serde_json::to_vec(&message.events).map_err(|error| error.to_string())
            }
            Encoding::Dynamo { .. } => {
                let payload =
                    rmp_serde::to_vec_named(&message.events).map_err(|error| error.to_string())?;
                let envelope = Envelope {
                    publisher_id: self.publisher_id,
                    sequence: message.sequence,
                    published_at: unix_millis(),
                    topic: TOPIC.to_owned(),
                    payload,
                };
                rmp_serde::to_vec_named(&envelope).map_err(|error| error.to_string())
            }
        }
    }

    async fn send(&self, message: &Message) -> Result<(), String> {
        let payload = self.encode(message)?;
        self.client
            .publish(self.subject.clone(), payload.into())
            .await
            .map_err(|error| error.to_string())
    }

    async fn send_counted(&self, message: &Message, totals: &Totals) {
        let count = message.events.len() as u64;
        match self.send(message).await {
            Ok(()) => totals.published.fetch_add(count, Ordering::Relaxed),
            Err(error) => {
                eprintln!("{count} events lost on {}: {error}", self.subject);
                totals.dropped.fetch_add(count, Ordering::Relaxed)
            }
        };
    }
}

fn unix_millis() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX))
}

async fn send_all(
    wire: Wire,
    mut messages: mpsc::Receiver<Message>,
    totals: Arc<Totals>,
    stop: CancellationToken,
) {
    let sending = async {
        while let Some(message) = messages.recv().await {
            wire.send_counted(&message, &totals).await;
        }
    };
    tokio::select! {
        () = sending => {}
        () = stop.cancelled() => {}
    }
    // What was accepted before the stop still reaches a NATS that answers.
    let rest = async {
        while let Ok(message) = messages.try_recv() {
            wire.send_counted(&message, &totals).await;
        }
        wire.client.flush().await
    };
    if !matches!(tokio::time::timeout(CONNECT_WAIT, rest).await, Ok(Ok(()))) {
        eprintln!("last events on {} may be lost", wire.subject);
    }
}

async fn answer_snapshots(
    client: async_nats::Client,
    mut requests: async_nats::Subscriber,
    snapshot: SnapshotSource,
    stop: CancellationToken,
) {
    loop {
        let request = tokio::select! {
            request = requests.next() => request,
            () = stop.cancelled() => None,
        };
        let Some(request) = request else {
            return;
        };
        let Some(reply) = request.reply else {
            continue;
        };
        for part in snapshot() {
            let answered = match serde_json::to_vec(&part) {
                Ok(json) => client
                    .publish(reply.clone(), json.into())
                    .await
                    .map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            if let Err(error) = answered {
                eprintln!("snapshot part {} not sent: {error}", part.part);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dynamo_subjects_encode_what_nats_would_split_at() {
        let encoding = Encoding::Dynamo {
            namespace: "a.b".to_owned(),
            component: "back end".to_owned(),
            endpoint: "generate".to_owned(),
        };
        assert_eq!(
            encoding.subject(3),
            "namespace.a%2Eb.component.back%20end.endpoint.generate.kv-events"
        );
    }

    #[test]
    fn json_subjects_name_the_worker() {
        let encoding = Encoding::Json {
            subject: "kv-events.{worker_id}".to_owned(),
        };
        assert_eq!(encoding.subject(7), "kv-events.7");
    }

    #[tokio::test]
    async fn a_full_queue_drops_counts_and_leaves_a_gap() {
        let (queue, mut messages) = mpsc::channel(1);
        let publisher = Publisher {
            queue,
            totals: Arc::default(),
        };
        let cleared = |id| vec![crate::snapshot::event(1, id, EventData::Cleared)];
        publisher.publish(cleared(1));
        publisher.publish(cleared(2));
        assert_eq!(publisher.dropped(), 1);
        assert_eq!(
            messages.recv().await.map(|message| message.sequence),
            Some(0)
        );
        publisher.publish(cleared(3));
        assert_eq!(
            messages.recv().await.map(|message| message.sequence),
            Some(2)
        );
    }

    #[tokio::test]
    async fn messages_keep_their_bounds() {
        let (queue, mut messages) = mpsc::channel(16);
        let publisher = Publisher {
            queue,
            totals: Arc::default(),
        };
        let events = (1..=300)
            .map(|id| crate::snapshot::event(1, id, EventData::Cleared))
            .collect();
        publisher.publish(events);
        let mut sizes = Vec::new();
        while let Ok(message) = messages.try_recv() {
            sizes.push(message.events.len());
        }
        assert_eq!(sizes, [128, 128, 44]);
    }
}
