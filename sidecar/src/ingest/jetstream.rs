//! The door to a JetStream stream that keeps the plain JSON subjects: nothing is lost while the
//! sidecar is away, and nobody needs to be asked for a snapshot.
//!
//! One consumer reads all workers. Messages are numbered by the stream, events by the worker; a
//! worker's ids tell of what never reached the stream, and of engines that began anew.

use std::collections::BTreeMap;
use std::time::Duration;

use async_nats::jetstream::consumer::pull::OrderedConfig;
use async_nats::jetstream::consumer::{Consumer, DeliverPolicy};
use async_nats::jetstream::{self, Message};
use async_nats::{Client, Subject};
use futures::StreamExt as _;
use kv_core::event::{EventData, RouterEvent};
use kv_core::id::{Family, WorkerId};
use tokio::sync::mpsc;
use xxhash_rust::xxh3::xxh3_64;

use super::batch::{self, Batch, Resume, Turn};
use super::stream::{Gone, Hall, Outlet, unix_ns};
use super::subject::Template;
use super::{Arrival, Plane, decode, pause};
use crate::metrics::PlaneKind;

/// How long the server may take to answer.
const LIMIT: Duration = Duration::from_secs(5);

/// A stream and the subject whose messages are read there.
#[derive(Clone, Debug)]
pub struct Source {
    /// The connection; it is made anew by itself.
    pub client: Client,
    /// Name of the stream.
    pub stream: String,
    /// Subject of the workers' events.
    pub template: Template,
}

/// A worker whose events are, or are no more, to be read.
#[derive(Debug)]
pub enum Change {
    /// From where a restored index ends.
    Add(Box<Outlet>, Option<Resume>),
    /// No more.
    Remove(WorkerId),
}

/// Why nothing is read.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error("other workers are to be read")]
    Workers,
    #[error("no answer in {} s", LIMIT.as_secs())]
    Timeout,
    #[error("{0}")]
    Server(String),
}

/// What is known of one worker's events.
#[derive(Debug)]
struct Worker {
    outlet: Outlet,
    /// Number in the stream of its last message.
    last: Option<u64>,
    /// Id of its last event; unknown where `last` was restored.
    event_id: Option<u64>,
    /// Mark of the stream that `last` is of.
    mark: Option<u64>,
    is_whole: bool,
    /// It has been told how complete the events are.
    is_told: bool,
}

/// The workers whose events are read.
#[derive(Debug, Default)]
struct Workers(BTreeMap<WorkerId, Worker>);

impl Workers {
    async fn change(&mut self, change: Change) -> Result<(), Gone> {
        match change {
            Change::Add(outlet, resume) => self.add(*outlet, resume).await,
            Change::Remove(worker) => {
                self.0.remove(&worker);
                Ok(())
            }
        }
    }

    async fn add(&mut self, mut outlet: Outlet, resume: Option<Resume>) -> Result<(), Gone> {
        if resume.is_none() {
            outlet.turn(Turn::Restarted).await?;
        }
        let worker = Worker {
            last: resume.map(|resume| resume.sequence),
            event_id: None,
            mark: resume.map(|resume| resume.mark),
            is_whole: resume.is_none_or(|resume| resume.is_whole),
            is_told: false,
            outlet,
        };
        self.0.insert(worker.outlet.origin().worker, worker);
        Ok(())
    }

    /// Where the consumer begins.
    fn start(&self) -> DeliverPolicy {
        let next = |worker: &Worker| worker.last.map(|last| last.saturating_add(1));
        let starts: Option<Vec<u64>> = self.0.values().map(next).collect();
        match starts.and_then(|starts| starts.into_iter().min()) {
            Some(start_sequence) => DeliverPolicy::ByStartSequence { start_sequence },
            None => DeliverPolicy::All,
        }
    }
}

/// Reads for ever the workers that `changes` names.
///
/// # Errors
/// When the index is gone.
pub async fn run(
    source: Source,
    hall: Hall,
    mut changes: mpsc::Receiver<Change>,
) -> Result<Gone, Gone> {
    let mut workers = Workers::default();
    let mut failed = 0_u32;
    loop {
        while let Ok(change) = changes.try_recv() {
            workers.change(change).await?;
        }
        if workers.0.is_empty() {
            match changes.recv().await {
                Some(change) => workers.change(change).await?,
                None => return Ok(Gone),
            }
            continue;
        }
        let why = match open(&source, &mut workers).await {
            Ok((consumer, state)) => {
                failed = 0;
                count(&hall, "opened");
                tell(&hall, Arrival::Connected(Plane::JetStream)).await?;
                let why =
                    read(&consumer, state, &source, &hall, &mut workers, &mut changes).await?;
                tell(&hall, Arrival::Disconnected(Plane::JetStream)).await?;
                if matches!(why, ReadError::Workers) {
                    continue;
                }
                why
            }
            Err(why) => why,
        };
        count(&hall, "failed");
        if failed == 0 {
            let stream = &source.stream;
            tracing::warn!(stream, %why, "no events from jetstream, trying again");
        }
        tokio::time::sleep(pause::after(failed)).await;
        failed = failed.saturating_add(1);
    }
}

async fn tell(hall: &Hall, arrival: Arrival) -> Result<(), Gone> {
    hall.arrivals.send(arrival).await.map_err(|_| Gone)
}

fn count(hall: &Hall, kind: &'static str) {
    let plane = Plane::JetStream.kind();
    let label = PlaneKind { plane, kind };
    hall.metrics.streams.get_or_create(&label).inc();
}

/// What a stream was when its reading began.
#[derive(Clone, Copy, Debug)]
struct State {
    /// By what the stream is told from an earlier one of its name.
    mark: u64,
    /// Number of the first message that it still has.
    first: u64,
    /// Whether nothing is left to be read.
    is_read: bool,
}

type Ordered = Consumer<OrderedConfig>;

async fn open(source: &Source, workers: &mut Workers) -> Result<(Ordered, State), ReadError> {
    let server = |error: &dyn std::fmt::Display| ReadError::Server(error.to_string());
    let opening = async {
        let context = jetstream::new(source.client.clone());
        let stream = context.get_stream(&source.stream).await;
        let mut stream = stream.map_err(|e| server(&e))?;
        let info = stream.info().await.map_err(|e| server(&e))?;
        let mark = xxh3_64(&info.created.unix_timestamp_nanos().to_le_bytes());
        let first = info.state.first_sequence;
        for worker in workers.0.values_mut() {
            if worker.mark.is_some_and(|known| known != mark) {
                // Another stream: its numbers say nothing about this one's.
                worker.last = None;
            }
        }
        let config = OrderedConfig {
            filter_subject: source.template.wildcard(),
            deliver_policy: workers.start(),
            ..OrderedConfig::default()
        };
        let consumer = stream
            .create_consumer(config)
            .await
            .map_err(|e| server(&e))?;
        let is_read = consumer.cached_info().num_pending == 0;
        Ok((
            consumer,
            State {
                mark,
                first,
                is_read,
            },
        ))
    };
    let opened = tokio::time::timeout(LIMIT, opening).await;
    opened.unwrap_or(Err(ReadError::Timeout))
}

async fn read(
    consumer: &Ordered,
    state: State,
    source: &Source,
    hall: &Hall,
    workers: &mut Workers,
    changes: &mut mpsc::Receiver<Change>,
) -> Result<ReadError, Gone> {
    for worker in workers.0.values_mut() {
        worker.open(state).await?;
    }
    if state.is_read {
        workers.caught_up().await?;
    }
    let mut messages = match consumer.clone().messages().await {
        Ok(messages) => messages,
        Err(error) => return Ok(ReadError::Server(error.to_string())),
    };
    loop {
        let next = tokio::select! {
            next = messages.next() => next,
            Some(change) = changes.recv() => {
                workers.change(change).await?;
                return Ok(ReadError::Workers);
            }
        };
        let message = match next {
            Some(Ok(message)) => message,
            Some(Err(error)) => return Ok(ReadError::Server(error.to_string())),
            None => return Ok(ReadError::Server("the consumer has ended".to_owned())),
        };
        let Ok(info) = message.info() else {
            count(hall, "malformed");
            continue;
        };
        let (sequence, is_last) = (info.stream_sequence, info.pending == 0);
        match find(&source.template, workers, &message.subject) {
            Some(worker) => worker.take(&message, sequence, state.mark).await?,
            None => count(hall, "unknown_worker"),
        }
        if is_last {
            workers.caught_up().await?;
        }
    }
}

fn find<'w>(
    template: &Template,
    workers: &'w mut Workers,
    subject: &Subject,
) -> Option<&'w mut Worker> {
    let id = template.worker(subject)?;
    workers.0.get_mut(&id)
}

impl Workers {
    async fn caught_up(&mut self) -> Result<(), Gone> {
        for worker in self.0.values_mut().filter(|w| !w.is_told) {
            let turn = if worker.is_whole {
                Turn::Whole
            } else {
                Turn::Gap { missing: 0 }
            };
            worker.outlet.turn(turn).await?;
            worker.is_told = true;
        }
        Ok(())
    }
}

impl Worker {
    async fn open(&mut self, state: State) -> Result<(), Gone> {
        self.outlet.turn(Turn::Opened).await?;
        let is_other = self.mark.is_some_and(|known| known != state.mark);
        if is_other {
            self.restart().await?;
        } else if let Some(last) = self.last
            && state.first > last.saturating_add(1)
        {
            // Perhaps another worker's, but nobody can tell.
            self.lose(0).await?;
        }
        self.mark = Some(state.mark);
        Ok(())
    }

    async fn take(&mut self, message: &Message, sequence: u64, mark: u64) -> Result<(), Gone> {
        if self.last.is_some_and(|last| sequence <= last) {
            return Ok(());
        }
        let decoded = decode::json(&message.payload, self.outlet.origin().worker);
        let mut batch = Batch {
            sequence: None,
            mark,
            received_ns: unix_ns(),
            changes: Vec::new(),
            rejected: Vec::new(),
        };
        for event in decoded.events {
            let id = event.event.event_id;
            if !self.follows(id) {
                // What came before the turn is applied before it.
                let changes = std::mem::take(&mut batch.changes);
                let before = Batch {
                    changes,
                    ..batch.clone()
                };
                self.outlet.batch(before).await?;
                self.turn(id).await?;
            }
            self.event_id = Some(id);
            batch.changes.push(cache_change(event));
        }
        batch.sequence = Some(sequence);
        batch.rejected = decoded.rejected;
        self.last = Some(sequence);
        self.outlet.batch(batch).await
    }

    /// Whether nothing is missing before the event with this id.
    fn follows(&self, id: u64) -> bool {
        match self.event_id {
            // Engines number from 0 or 1.
            None => self.last.is_some() || id <= 1,
            Some(last) => id == last.saturating_add(1),
        }
    }

    /// The event with this id does not follow the last one.
    async fn turn(&mut self, id: u64) -> Result<(), Gone> {
        match self.event_id {
            Some(last) if id > last => self.lose(id - last - 1).await,
            None => self.lose(id - 1).await,
            Some(_) => {
                self.restart().await?;
                if id > 1 {
                    self.lose(id - 1).await?;
                }
                Ok(())
            }
        }
    }

    async fn restart(&mut self) -> Result<(), Gone> {
        self.event_id = None;
        self.is_whole = true;
        self.is_told = false;
        self.outlet.turn(Turn::Restarted).await
    }

    async fn lose(&mut self, missing: u64) -> Result<(), Gone> {
        self.is_whole = false;
        self.is_told = true;
        self.outlet.turn(Turn::Gap { missing }).await
    }
}

fn cache_change(event: RouterEvent) -> batch::Change {
    let is_clear = event.event.data == EventData::Cleared;
    batch::Change {
        rank: event.event.dp_rank,
        tier: (!is_clear).then(|| event.storage_tier.into()),
        family: Family::Dynamo,
        data: event.event.data,
    }
}
