//! From the index to every Envoy that subscribed, each at its own pace.
//!
//! A subscriber takes at most [`kv_core::wire::WINDOW`] batches ahead of its acknowledgements. What it can't take
//! is remembered as page ids and sent later as the page is then, so a slow one costs a bounded
//! amount of memory and holds up nobody else. The worker table keeps its place in that queue: all
//! pages that were to be written before it are written before it.

use std::sync::Arc;

use bytes::Bytes;
use kv_core::affinity::SHARDS;
use kv_core::head::Head;
use kv_core::index::{Index, PageWrite};
use kv_core::key;
use kv_core::table::Table;
use kv_core::wire::{Ack, Subscribe};
use serde::Serialize;
use tokio::sync::{mpsc, oneshot};

use super::pending::{Key, Pending};
use super::subscriber::{Item, Subscriber};
use crate::metrics::Metrics;

/// Most subscribers at a time.
const MAX_SUBSCRIBERS: usize = 256;
/// Most times of reception that wait for their pages, to a subscriber.
const MAX_RECEIVED: usize = 4096;

/// Why a subscription isn't taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Another page format.
    #[error("page format {0}, expected {expected}", expected = key::FORMAT)]
    Format(u8),
    /// A newer term holds the lease.
    #[error("term {0} is over, {1} holds the lease")]
    Term(u64, u64),
    /// Too many Envoys.
    #[error("{MAX_SUBSCRIBERS} subscribers are being served already")]
    TooMany,
}

impl Refusal {
    /// Label for metrics.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Format(_) => "format",
            Self::Term(..) => "term",
            Self::TooMany => "too_many",
        }
    }
}

/// A subscriber as `/v1/index` shows it.
#[derive(Clone, Debug, Serialize)]
pub struct SubscriberReport {
    /// Nonce of the Envoy process.
    pub process: u64,
    /// The filter's `vm_id`.
    pub vm_id: String,
    /// Term of its lease.
    pub term: u64,
    /// Version of its messages.
    pub protocol: u8,
    /// Whether it holds all pages.
    pub synced: bool,
    /// Pages to be written.
    pub queued_pages: usize,
    /// Batches sent and not acknowledged.
    pub unacked_batches: usize,
    /// Batches sent.
    pub batches: u64,
}

/// All subscribers, and what they are told besides pages.
#[derive(Debug)]
pub(super) struct Publisher {
    subscribers: Vec<Subscriber>,
    next_id: u64,
    head: Head,
    table: Arc<[u8]>,
    /// Sessions by shard; empty until some pool keeps any.
    sessions: Vec<Arc<[u8]>>,
    waiting: Vec<(u64, oneshot::Sender<()>)>,
    metrics: Arc<Metrics>,
}

impl Publisher {
    /// Nobody subscribed; `head` has epoch, group and readiness.
    #[must_use]
    pub(super) fn new(head: Head, metrics: Arc<Metrics>) -> Self {
        Self {
            subscribers: Vec::new(),
            next_id: 1,
            head,
            table: Arc::default(),
            sessions: Vec::new(),
            waiting: Vec::new(),
            metrics,
        }
    }

    /// Takes a subscriber: with the next [`Publisher::pump`] it gets all pages, the table and the
    /// head. Of the same Envoy and `vm_id` the newer term stays, and the other's stream ends.
    ///
    /// # Errors
    /// When it can't be served.
    pub(super) fn subscribe(
        &mut self,
        who: Subscribe,
        version: u8,
        out: mpsc::Sender<Bytes>,
        index: &Index,
    ) -> Result<u64, Refusal> {
        if who.format != key::FORMAT {
            return Err(Refusal::Format(who.format));
        }
        let same = |s: &Subscriber| s.who.process == who.process && s.who.vm_id == who.vm_id;
        let newest = self
            .subscribers
            .iter()
            .filter(|s| same(s))
            .map(|s| s.who.term);
        if let Some(newest) = newest.max().filter(|newest| *newest > who.term) {
            return Err(Refusal::Term(who.term, newest));
        }
        self.subscribers.retain(|s| !same(s));
        if self.subscribers.len() >= MAX_SUBSCRIBERS {
            return Err(Refusal::TooMany);
        }
        let id = self.next_id;
        self.next_id += 1;
        let mut subscriber = Subscriber::new(id, who, version, out);
        // A page that growth split off stands after the page it came from, and is to be there
        // before that one shrinks.
        for page in index.page_ids().rev() {
            subscriber.enqueue(page);
        }
        for shard in (0..SHARDS).take(self.sessions.len()) {
            subscriber.enqueue_sessions(shard);
        }
        subscriber.queue.push_back(Item::Table);
        self.subscribers.push(subscriber);
        self.metrics.subscribers.set(self.subscribers.len() as i64);
        Ok(id)
    }

    /// A stream has ended.
    pub(super) fn gone(&mut self, id: u64) {
        self.subscribers.retain(|s| s.id != id);
        self.metrics.subscribers.set(self.subscribers.len() as i64);
        self.settle();
    }

    /// A batch has been written.
    pub(super) fn acked(&mut self, id: u64, ack: Ack, index: &mut Index) {
        self.metrics.refused_writes.inc_by(u64::from(ack.refused));
        if ack.refused > 0 {
            tracing::error!(
                subscriber = id,
                refused = ack.refused,
                "the filter refused writes"
            );
        }
        let Some(subscriber) = self.subscribers.iter_mut().find(|s| s.id == id) else {
            return;
        };
        while let Some(sent) = subscriber.unacked.pop_front_if(|s| s.seq <= ack.seq) {
            subscriber.table_acked = sent.table.unwrap_or(subscriber.table_acked);
            for received_ns in sent.received_ns {
                let took = ack.written_at_ns.saturating_sub(received_ns);
                self.metrics.publish.observe(took as f64 * 1e-9);
            }
            if sent.ends_sync
                && let Some(since) = subscriber.syncing.take()
            {
                let took = since.elapsed();
                self.metrics.full_sync.observe(took.as_secs_f64());
                tracing::info!(
                    subscriber = id,
                    took_ms = took.as_millis(),
                    "envoy is in sync"
                );
            }
        }
        self.settle();
        self.pump(index);
    }

    /// Whether somebody could take pages at once; also when nobody is there to take any.
    #[must_use]
    pub(super) fn wants_pages(&self) -> bool {
        self.is_alone() || self.subscribers.iter().any(Subscriber::is_open)
    }

    /// Whether nobody subscribed.
    #[must_use]
    pub(super) fn is_alone(&self) -> bool {
        self.subscribers.is_empty()
    }

    /// Hands out pages that the index flushed. `received_ns` are events that are visible with them.
    pub(super) fn pages(&mut self, writes: &[PageWrite], received_ns: &[u64], index: &mut Index) {
        let (head, is_clean) = (self.current_head(index), !index.is_dirty());
        for subscriber in &mut self.subscribers {
            let room = MAX_RECEIVED.saturating_sub(subscriber.received_ns.len());
            subscriber.received_ns.extend(received_ns.iter().take(room));
            let is_direct = subscriber.queue.is_empty()
                && subscriber.head.is_some()
                && !holds_back(&head, &subscriber.who);
            let mut writes = writes.iter().peekable();
            while is_direct && subscriber.is_open() && writes.peek().is_some() {
                let mut batch = Pending::default();
                while let Some(write) = writes.next_if(|w| batch.fits(w.bytes.len())) {
                    batch.push(Key::page(write.id), Arc::clone(&write.bytes));
                }
                subscriber.head_due = true;
                if writes.peek().is_none() {
                    subscriber.end(&mut batch, head, is_clean);
                }
                subscriber.send(batch, &self.metrics);
            }
            for write in writes {
                subscriber.enqueue(write.id);
            }
        }
        self.pump(index);
    }

    /// A table to send. `written` is told once every subscriber has it.
    pub(super) fn table(
        &mut self,
        table: &Table,
        written: Option<oneshot::Sender<()>>,
        index: &mut Index,
    ) {
        self.head.table_version = table.version;
        self.table = table.encode().into();
        for subscriber in &mut self.subscribers {
            subscriber.queue.retain(|item| *item != Item::Table);
            subscriber.queue.push_back(Item::Table);
        }
        self.waiting.extend(written.map(|w| (table.version, w)));
        self.settle();
        self.pump(index);
    }

    /// Shards of sessions to send, in place of what they were.
    pub(super) fn sessions(&mut self, shards: Vec<(u16, Vec<u8>)>, index: &mut Index) {
        self.sessions.resize(usize::from(SHARDS), Arc::default());
        for (shard, bytes) in shards {
            for subscriber in &mut self.subscribers {
                subscriber.enqueue_sessions(shard);
            }
            if let Some(place) = self.sessions.get_mut(usize::from(shard)) {
                *place = Arc::from(bytes);
            }
        }
        self.pump(index);
    }

    /// Loads for one subscriber, in place of any that it has not been sent yet. The head that
    /// follows them beats, which is how VMs notice.
    pub(super) fn loads(&mut self, id: u64, loads: Vec<u8>, index: &mut Index) {
        self.head.beat += 1;
        let head = self.current_head(index);
        if let Some(subscriber) = self.subscribers.iter_mut().find(|s| s.id == id) {
            subscriber.loads = Some(loads.into());
            subscriber.beat(head, &self.metrics);
        }
        self.pump(index);
    }

    /// Sends the head again, as a sign of life.
    pub(super) fn beat(&mut self, ready: bool, index: &mut Index) {
        self.head.ready = ready;
        self.head.beat += 1;
        let head = self.current_head(index);
        for subscriber in &mut self.subscribers {
            subscriber.beat(head, &self.metrics);
        }
        self.pump(index);
    }

    /// How the subscribers do.
    #[must_use]
    pub(super) fn report(&self) -> Vec<SubscriberReport> {
        let report = |s: &Subscriber| SubscriberReport {
            process: s.who.process,
            vm_id: s.who.vm_id.clone(),
            term: s.who.term,
            protocol: s.version,
            synced: s.syncing.is_none(),
            queued_pages: s.queued.len(),
            unacked_batches: s.unacked.len(),
            batches: s.seq,
        };
        self.subscribers.iter().map(report).collect()
    }

    /// The head for whoever has all pages that the index flushed.
    fn current_head(&self, index: &Index) -> Head {
        Head {
            level: index.level(),
            ..self.head
        }
    }

    /// Sends what windows take.
    pub(super) fn pump(&mut self, index: &mut Index) {
        let head = self.current_head(index);
        let is_clean = !index.is_dirty();
        for subscriber in &mut self.subscribers {
            if holds_back(&head, &subscriber.who) {
                continue;
            }
            while subscriber.is_open() && subscriber.has_work() {
                let mut batch = Pending::default();
                let version = head.table_version;
                subscriber.fill(&mut batch, &self.table, version, &self.sessions, index);
                if subscriber.queue.is_empty() {
                    subscriber.end(&mut batch, head, is_clean);
                }
                subscriber.send(batch, &self.metrics);
            }
        }
        self.subscribers.retain(|s| s.alive);
        self.metrics.subscribers.set(self.subscribers.len() as i64);
    }

    /// Tells those who wait for a table that every subscriber has it.
    fn settle(&mut self) {
        let version = self.subscribers.iter().map(|s| s.table_acked).min();
        let version = version.unwrap_or(u64::MAX);
        let is_due = |(wanted, _): &mut (u64, _)| *wanted <= version;
        for (_, written) in self.waiting.extract_if(.., is_due) {
            // Whoever waited may have given up.
            let _ = written.send(());
        }
    }
}

/// Whether nothing is to be sent: Envoy serves from the pages of an earlier epoch, which are
/// better than none, until this one is complete.
fn holds_back(head: &Head, who: &Subscribe) -> bool {
    !head.ready && who.epoch.is_some_and(|epoch| epoch != head.epoch)
}
