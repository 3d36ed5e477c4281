//! The door of engines that post their events: `POST /v1/events`.
//!
//! A post names the engine's run (`incarnation`) and its number there. The next one is taken, an
//! earlier one has been, a later one is refused with the number that is expected. A run's first
//! post is 0, and with it all that was said before is forgotten: who can't send what is expected
//! begins another run with its whole cache.

mod proof;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kv_core::id::WorkerId;
use schemars::generate::SchemaSettings;
use serde::Deserialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use xxhash_rust::xxh3::xxh3_64;

use super::batch::Turn;
use super::engine::Encoding;
use super::order::Frame;
use super::stream::{Gone, Outlet, unix_ns};
use proof::Proof;

pub use proof::Credentials;

/// Most bytes of a post.
pub const POST_BYTES: usize = 16 << 20;
/// Most bytes of a run's name.
const INCARNATION_BYTES: usize = 128;
/// Bodies that are read at a time.
const BODIES: usize = 16;

/// The JSON Schema (draft 2020-12) of a post.
#[must_use]
pub fn schema() -> serde_json::Value {
    let generator = SchemaSettings::draft2020_12().into_generator();
    generator
        .into_root_schema_for::<kv_publisher::Post>()
        .to_value()
}

/// Why a post is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PostError {
    /// No token, and no address, that is some worker's.
    #[error("no worker has this token")]
    Token,
    /// The token is another worker's.
    #[error("worker {0} has another token")]
    Worker(WorkerId),
    /// Nobody is to post for this worker.
    #[error("worker {0} posts no events")]
    NoSuchWorker(WorkerId),
    /// The worker has no such stream.
    #[error("worker {worker} has no stream {stream}")]
    NoSuchStream {
        /// The worker.
        worker: WorkerId,
        /// The stream.
        stream: u32,
    },
    /// Not a body of a post.
    #[error("the body is not valid: {0}")]
    Body(String),
    /// Posts are missing before this one.
    #[error("posts are missing: {expected} is expected")]
    Gap {
        /// The number that is expected.
        expected: u64,
    },
    /// The stream has said too much.
    #[error("too many bytes, the next post is taken in {} ms", wait.as_millis())]
    Quota {
        /// From when on the next post is taken.
        wait: Duration,
    },
    /// The stream's last post is still being taken, or too many others are, or none are taken yet.
    #[error("posts are being taken, try again")]
    Busy,
    /// The index takes nothing any more.
    #[error("the sidecar is shutting down")]
    Gone,
}

impl PostError {
    /// Label for metrics and field of the answer.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Token => "no_token",
            Self::Worker(_) => "other_token",
            Self::NoSuchWorker(_) => "no_such_worker",
            Self::NoSuchStream { .. } => "no_such_stream",
            Self::Body(_) => "invalid_body",
            Self::Gap { .. } => "gap",
            Self::Quota { .. } => "quota",
            Self::Busy => "busy",
            Self::Gone => "shutting_down",
        }
    }
}

/// What became of a post.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Taken {
    /// Number of the next post.
    pub next: u64,
    /// Changes that the index takes.
    pub changes: usize,
    /// Events that were dropped.
    pub rejected: usize,
    /// Whether the post was taken before; then nothing was done.
    pub duplicate: bool,
}

/// What a post says of itself.
#[derive(Debug, Deserialize)]
struct Head {
    worker_id: WorkerId,
    #[serde(default)]
    stream: u32,
    incarnation: String,
    sequence: u64,
}

/// Streams of the workers that post.
#[derive(Debug)]
pub struct Desk {
    workers: RwLock<BTreeMap<WorkerId, Arc<Worker>>>,
    /// Whether it is known who may post.
    is_open: AtomicBool,
    bodies: Arc<Semaphore>,
}

impl Default for Desk {
    fn default() -> Self {
        Self {
            workers: RwLock::default(),
            is_open: AtomicBool::new(false),
            bodies: Arc::new(Semaphore::new(BODIES)),
        }
    }
}

#[derive(Debug)]
struct Worker {
    proof: Arc<Proof>,
    streams: Vec<Arc<tokio::sync::Mutex<Stream>>>,
}

/// A worker's stream.
#[derive(Debug)]
struct Stream {
    outlet: Outlet,
    /// Hash of the run's name.
    run: Option<u64>,
    next: u64,
    is_opened: bool,
}

/// Workers that whoever is posting may post for.
#[derive(Debug)]
pub struct Poster {
    workers: BTreeMap<WorkerId, Arc<Worker>>,
    known: Vec<WorkerId>,
    _body: OwnedSemaphorePermit,
}

impl Desk {
    /// Takes posts of a worker with these streams. Nothing is taken up again after a restart of the
    /// sidecar: what later events refer to is known to the engine alone.
    pub fn open(
        &self,
        worker: WorkerId,
        credentials: Credentials,
        streams: impl IntoIterator<Item = Outlet>,
    ) {
        let stream = |outlet| {
            Arc::new(tokio::sync::Mutex::new(Stream {
                outlet,
                run: None,
                next: 0,
                is_opened: false,
            }))
        };
        let opened = Arc::new(Worker {
            proof: Arc::new(Proof::new(credentials)),
            streams: streams.into_iter().map(stream).collect(),
        });
        let mut workers = self.workers.write().unwrap_or_else(PoisonError::into_inner);
        workers.insert(worker, opened);
    }

    /// All workers that post at the start are known: others are refused from here on.
    pub fn begin(&self) {
        self.is_open.store(true, Ordering::Release);
    }

    /// Takes no more posts of a worker.
    pub fn close(&self, worker: WorkerId) {
        let mut workers = self.workers.write().unwrap_or_else(PoisonError::into_inner);
        workers.remove(&worker);
    }

    /// Who is posting, by what is known before the body is read.
    ///
    /// # Errors
    /// When it is nobody who may, or too many bodies are being read.
    pub async fn poster(&self, token: Option<&str>, from: IpAddr) -> Result<Poster, PostError> {
        if !self.is_open.load(Ordering::Acquire) {
            return Err(PostError::Busy);
        }
        let all = self
            .workers
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let known = all.keys().copied().collect();
        let mut workers = BTreeMap::new();
        for (id, worker) in all {
            if worker.proof.accepts(token, from).await {
                workers.insert(id, worker);
            }
        }
        if workers.is_empty() {
            return Err(PostError::Token);
        }
        let body = Arc::clone(&self.bodies).try_acquire_owned();
        Ok(Poster {
            workers,
            known,
            _body: body.map_err(|_| PostError::Busy)?,
        })
    }
}

impl Poster {
    /// Takes a post.
    ///
    /// # Errors
    /// Says why not.
    pub async fn post(&self, body: Bytes, encoding: Encoding) -> Result<Taken, PostError> {
        let head = head(&body, encoding)?;
        let worker = head.worker_id;
        let Some(found) = self.workers.get(&worker) else {
            return Err(if self.known.contains(&worker) {
                PostError::Worker(worker)
            } else {
                PostError::NoSuchWorker(worker)
            });
        };
        let number = usize::try_from(head.stream).ok();
        let stream = number.and_then(|n| found.streams.get(n));
        let stream = stream.ok_or(PostError::NoSuchStream {
            worker,
            stream: head.stream,
        })?;
        let mut stream = Arc::clone(stream)
            .try_lock_owned()
            .map_err(|_| PostError::Busy)?;
        // Whoever posts may go away; what has been begun is done.
        let taking = tokio::spawn(async move {
            let taken = stream.take(&head, body, encoding).await;
            if taken.is_err() {
                stream.outlet.count("refused");
            }
            taken
        });
        taking.await.unwrap_or(Err(PostError::Gone))
    }
}

fn head(body: &[u8], encoding: Encoding) -> Result<Head, PostError> {
    let head = match encoding {
        Encoding::Json => serde_json::from_slice::<Head>(body).map_err(|e| e.to_string()),
        Encoding::MsgPack => rmp_serde::from_slice::<Head>(body).map_err(|e| e.to_string()),
    };
    let head = head.map_err(PostError::Body)?;
    if !(1..=INCARNATION_BYTES).contains(&head.incarnation.len()) {
        let why = format!("incarnation must have 1 to {INCARNATION_BYTES} bytes");
        return Err(PostError::Body(why));
    }
    Ok(head)
}

impl Stream {
    async fn take(
        &mut self,
        head: &Head,
        body: Bytes,
        encoding: Encoding,
    ) -> Result<Taken, PostError> {
        let wait = self.outlet.quota().wait(Instant::now());
        if !wait.is_zero() {
            return Err(PostError::Quota { wait });
        }
        self.outlet.quota().take(body.len());
        let run = xxh3_64(head.incarnation.as_bytes());
        let is_same_run = self.run == Some(run);
        let expected = if is_same_run { self.next } else { 0 };
        if head.sequence > expected {
            return Err(PostError::Gap { expected });
        }
        if is_same_run && head.sequence < expected {
            return Ok(Taken {
                next: expected,
                changes: 0,
                rejected: 0,
                duplicate: true,
            });
        }
        let frame = Frame {
            sequence: head.sequence,
            payload: body,
            received_ns: unix_ns(),
        };
        let (changes, rejected) = self
            .hand_on(&frame, run, is_same_run, encoding)
            .await
            .map_err(|Gone| PostError::Gone)?;
        Ok(Taken {
            next: self.next,
            changes,
            rejected,
            duplicate: false,
        })
    }

    async fn hand_on(
        &mut self,
        frame: &Frame,
        run: u64,
        is_same_run: bool,
        encoding: Encoding,
    ) -> Result<(usize, usize), Gone> {
        if !self.is_opened {
            self.outlet.turn(Turn::Opened).await?;
            self.is_opened = true;
        }
        if !is_same_run {
            self.outlet.turn(Turn::Restarted).await?;
            self.outlet.turn(Turn::Whole).await?;
        }
        self.run = Some(run);
        self.next = frame.sequence.saturating_add(1);
        self.outlet.message(frame, run, encoding).await
    }
}
