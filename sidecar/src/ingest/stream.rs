//! A worker's own stream on its way from a door to the index: put in order, translated, handed on.
//!
//! Each stream has at most one message under way to the index. Waiting streams are served in turn,
//! so a talkative one delays the others by one message at a time.

use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use bytes::{BufMut as _, BytesMut};
use tokio::sync::mpsc;

use super::batch::{Batch, Origin, Resume, Turn};
use super::engine::{Encoding, Normaliser};
use super::order::{self, Frame, Limits, Order, Source, Step};
use super::quota::Quota;
use super::{Arrival, Plane};
use crate::metrics::{Metrics, PlaneKind};

/// What all doors of a sidecar have in common.
#[derive(Clone, Debug)]
pub struct Hall {
    /// The way to the index.
    pub arrivals: mpsc::Sender<Arrival>,
    /// Most bytes a second of one stream.
    pub bytes_per_second: u64,
    /// Where everything is counted.
    pub metrics: Arc<Metrics>,
}

/// The index is gone: there is nobody to hand anything to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone;

/// The way out of one stream.
#[derive(Debug)]
pub struct Outlet {
    hall: Hall,
    origin: Origin,
    plane: Plane,
    normaliser: Normaliser,
    quota: Quota,
}

impl Outlet {
    /// A way out for what `normaliser` makes of the stream.
    #[must_use]
    pub fn new(hall: Hall, origin: Origin, plane: Plane, normaliser: Normaliser) -> Self {
        let quota = Quota::new(hall.bytes_per_second, Instant::now());
        Self {
            hall,
            origin,
            plane,
            normaliser,
            quota,
        }
    }

    /// Whose stream it is.
    #[must_use]
    pub fn origin(&self) -> Origin {
        self.origin
    }

    /// What is left of its quota.
    pub fn quota(&mut self) -> &mut Quota {
        &mut self.quota
    }

    /// Counts what became of the stream.
    pub fn count(&self, kind: &'static str) {
        let plane = self.plane.kind();
        let label = PlaneKind { plane, kind };
        self.hall.metrics.streams.get_or_create(&label).inc();
    }

    /// Waits while the stream has said too much, and takes `bytes` from its quota.
    pub async fn admit(&mut self, bytes: usize) {
        let wait = self.quota.wait(Instant::now());
        if !wait.is_zero() {
            self.count("throttled");
            tokio::time::sleep(wait).await;
        }
        self.quota.take(bytes);
    }

    /// Tells the index what became of the stream.
    ///
    /// # Errors
    /// When the index is gone.
    pub async fn turn(&mut self, turn: Turn) -> Result<(), Gone> {
        match turn {
            Turn::Opened => self.count("opened"),
            Turn::Closed => self.count("closed"),
            Turn::Whole => {}
            Turn::Gap { .. } => {
                self.count("gap");
                self.normaliser.lose();
            }
            Turn::Restarted => {
                self.count("restarted");
                self.normaliser.reset();
            }
        }
        let arrival = Arrival::Turn(self.origin, self.plane, turn);
        self.hall.arrivals.send(arrival).await.map_err(|_| Gone)
    }

    /// Translates a message and hands it on. Gives the numbers of changes and of events dropped.
    ///
    /// # Errors
    /// When the index is gone.
    pub async fn message(
        &mut self,
        frame: &Frame,
        mark: u64,
        encoding: Encoding,
    ) -> Result<(usize, usize), Gone> {
        let normalised = self.normaliser.batch(&frame.payload, encoding);
        let batch = Batch {
            sequence: Some(frame.sequence),
            mark,
            received_ns: frame.received_ns,
            changes: normalised.changes,
            rejected: normalised.rejected,
        };
        let counts = (batch.changes.len(), batch.rejected.len());
        self.batch(batch).await?;
        Ok(counts)
    }

    /// Lets a message that the index includes tell what later ones refer to.
    pub fn recall(&mut self, frame: &Frame, encoding: Encoding) {
        self.normaliser.batch(&frame.payload, encoding);
    }

    /// Hands a message on.
    ///
    /// # Errors
    /// When the index is gone.
    pub async fn batch(&mut self, batch: Batch) -> Result<(), Gone> {
        let arrival = Arrival::Batch(self.origin, self.plane, batch);
        self.hall.arrivals.send(arrival).await.map_err(|_| Gone)
    }
}

/// Most bytes of frames that are translated together.
const TOGETHER: usize = 8 << 20;

/// How a door's frames are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Each is a batch.
    Batches(Encoding),
    /// Each is one event as JSON; those that follow each other are translated together.
    JsonEvents,
}

/// A stream that a door reads frame by frame.
#[derive(Debug)]
pub struct Stream {
    /// Its order.
    pub order: Order,
    /// Its way out.
    pub outlet: Outlet,
    form: Form,
}

impl Stream {
    /// A stream that goes on where a restored index ends.
    ///
    /// # Errors
    /// When the index is gone.
    pub async fn start(
        mut outlet: Outlet,
        source: Source,
        form: Form,
        resume: Option<Resume>,
    ) -> Result<Self, Gone> {
        if resume.is_none() {
            // Whatever the index has of the worker is of unknown age.
            outlet.turn(Turn::Restarted).await?;
        } else if source == Source::Queues {
            // What later events refer to can't be read once more.
            outlet.turn(Turn::Gap { missing: 0 }).await?;
        }
        Ok(Self {
            order: Order::new(source, Limits::default(), resume),
            outlet,
            form,
        })
    }

    /// Does what the order asks for; gives the number from which a replay is to be asked for,
    /// which voids one under way.
    ///
    /// # Errors
    /// When the index is gone.
    pub async fn proceed(&mut self) -> Result<Option<u64>, Gone> {
        let mut replay = None;
        let mut together = Together::default();
        while let Some(step) = self.order.next_step() {
            match (step, self.form) {
                (Step::Deliver(frame), Form::Batches(encoding)) => {
                    let mark = order::mark(&frame.payload);
                    self.outlet.message(&frame, mark, encoding).await?;
                }
                (Step::Deliver(frame), Form::JsonEvents) => {
                    if together.bytes.len() > TOGETHER {
                        self.flush(&mut together).await?;
                    }
                    together.add(&frame);
                }
                (Step::Recall(frame), Form::Batches(encoding)) => {
                    self.outlet.recall(&frame, encoding);
                }
                (Step::Recall(frame), Form::JsonEvents) => {
                    self.outlet.recall(&frame, Encoding::Json);
                }
                (Step::Turn(turn), _) => {
                    self.flush(&mut together).await?;
                    self.outlet.turn(turn).await?;
                }
                (Step::Replay { from }, _) => replay = Some(from),
            }
        }
        self.flush(&mut together).await?;
        Ok(replay)
    }

    async fn flush(&mut self, together: &mut Together) -> Result<(), Gone> {
        let Some(last) = together.last.take() else {
            return Ok(());
        };
        together.bytes.put_u8(b']');
        let mark = order::mark(&last.payload);
        let frame = Frame {
            payload: together.bytes.split().freeze(),
            ..last
        };
        self.outlet.message(&frame, mark, Encoding::Json).await?;
        Ok(())
    }
}

/// Events that follow each other, as a JSON array that is not closed yet.
#[derive(Debug, Default)]
struct Together {
    bytes: BytesMut,
    last: Option<Frame>,
}

impl Together {
    fn add(&mut self, frame: &Frame) {
        self.bytes
            .put_u8(if self.last.is_some() { b',' } else { b'[' });
        self.bytes.put_slice(&frame.payload);
        self.last = Some(frame.clone());
    }
}

/// The wall clock, Unix nanoseconds.
#[must_use]
pub fn unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}
