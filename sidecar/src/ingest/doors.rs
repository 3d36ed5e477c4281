//! Which doors are open: one task to each stream that is read, opened and closed as workers come
//! and go.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use kv_core::id::{DpRank, WorkerId};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::Plane;
use super::batch::{Origin, Resume};
use super::engine::{Encoding, Normaliser, Settings};
use super::order::Source;
use super::post::{Credentials, Desk};
use super::stream::{Form, Gone, Hall, Outlet, Stream};
use super::{dynamo_zmq, jetstream, poll, zmq};
use crate::config::{Config, Events, Worker};

/// Changes of workers that wait for the reader of JetStream: as many as there may be workers.
const CHANGES: usize = 1 << 16;

/// A task that ends with its door.
type Task = AbortOnDropHandle<()>;

/// The doors of a sidecar.
#[derive(Debug)]
pub struct Doors {
    hall: Hall,
    desk: Arc<Desk>,
    /// Streams of a restored index, until their doors are opened.
    resumes: HashMap<Origin, Resume>,
    open: BTreeMap<WorkerId, Door>,
    stored: Option<Stored>,
    dynamo: Vec<Task>,
}

/// A worker's door.
#[derive(Debug)]
struct Door {
    /// By what it was opened; with other settings it is opened anew.
    settings: Settings,
    worker: Worker,
    /// By number of the stream; 0 where one task reads all of them.
    tasks: BTreeMap<u32, Task>,
}

impl Door {
    /// Tasks of the streams that stay as they are although the worker has changed: a rank that
    /// registers leaves the others alone.
    fn unchanged(self, settings: &Settings, next: &Worker) -> BTreeMap<u32, Task> {
        let (Some(Events::Sockets(before)), Some(Events::Sockets(after))) =
            (&self.worker.events, &next.events)
        else {
            return BTreeMap::new();
        };
        let is_same =
            |rank: &u32| self.settings == *settings && before.get(rank) == after.get(rank);
        let tasks = self.tasks.into_iter();
        tasks.filter(|(rank, _)| is_same(rank)).collect()
    }
}

/// The reader of a stream of all workers.
#[derive(Debug)]
struct Stored {
    /// With what their events are read.
    workers: BTreeMap<WorkerId, Settings>,
    changes: mpsc::Sender<jetstream::Change>,
    _task: Task,
}

impl Doors {
    /// Doors that are closed. `jetstream` says where the plain JSON events are kept.
    #[must_use]
    pub fn new(hall: Hall, jetstream: Option<jetstream::Source>) -> Self {
        let stored = jetstream.map(|source| Stored::new(source, hall.clone()));
        Self {
            hall,
            desk: Arc::default(),
            resumes: HashMap::new(),
            open: BTreeMap::new(),
            stored,
            dynamo: Vec::new(),
        }
    }

    /// Opens the doors of a configuration; `resumes` says up to where the index includes streams.
    pub fn open(&mut self, config: &Config, resumes: HashMap<Origin, Resume>) {
        let connected = Arc::new(AtomicUsize::new(0));
        let publisher = |address: &String| {
            let publisher = dynamo_zmq::Publisher {
                address: address.clone(),
                hall: self.hall.clone(),
                connected: Arc::clone(&connected),
            };
            spawn(publisher.run())
        };
        self.dynamo = config.dynamo_zmq.iter().map(publisher).collect();
        self.resumes = resumes;
        self.configure(config);
        self.resumes.clear();
        self.desk.begin();
    }

    /// Where posts are taken.
    #[must_use]
    pub fn desk(&self) -> Arc<Desk> {
        Arc::clone(&self.desk)
    }

    /// Opens and closes doors as a configuration says, which the index knows already.
    pub fn configure(&mut self, config: &Config) {
        let mut before = std::mem::take(&mut self.open);
        for pool in config.pools.iter().filter(|pool| pool.kv_events) {
            let settings = Settings::of(pool);
            for worker in pool.workers.iter().filter(|w| w.events.is_some()) {
                let door = before.remove(&worker.id);
                let is_same = |door: &Door| door.settings == settings && door.worker == *worker;
                let door = match door {
                    Some(door) if is_same(&door) => door,
                    other => {
                        let kept = other.map(|door| door.unchanged(&settings, worker));
                        self.desk.close(worker.id);
                        self.open_door(worker, settings.clone(), kept.unwrap_or_default())
                    }
                };
                self.open.insert(worker.id, door);
            }
        }
        for worker in before.into_keys() {
            self.desk.close(worker);
        }
        self.read_stored(config);
    }

    fn outlet(&self, worker: WorkerId, stream: u32, plane: Plane, settings: &Settings) -> Outlet {
        let origin = Origin { worker, stream };
        let normaliser = Normaliser::new(settings.clone(), stream);
        Outlet::new(self.hall.clone(), origin, plane, normaliser)
    }

    /// Opens the streams of a worker that `tasks` don't read already.
    fn open_door(
        &mut self,
        worker: &Worker,
        settings: Settings,
        mut tasks: BTreeMap<u32, Task>,
    ) -> Door {
        let id = worker.id;
        match &worker.events {
            Some(Events::Zmq {
                endpoint,
                topic,
                replay,
            }) => {
                for rank in 0..worker.ranks {
                    let Some(events) = endpoint.of(rank) else {
                        continue;
                    };
                    let address = zmq::Address {
                        events,
                        topic: topic.clone(),
                        replay: replay.as_ref().and_then(|replay| replay.of(rank)),
                    };
                    tasks.insert(rank, self.subscribe(id, rank, address, &settings));
                }
            }
            Some(Events::Sockets(sockets)) => {
                for (rank, socket) in sockets {
                    let Some(events) = socket.endpoint.of(0) else {
                        continue;
                    };
                    let address = zmq::Address {
                        events,
                        topic: String::new(),
                        replay: socket.replay.as_ref().and_then(|replay| replay.of(0)),
                    };
                    if !tasks.contains_key(rank) {
                        tasks.insert(*rank, self.subscribe(id, *rank, address, &settings));
                    }
                }
            }
            Some(Events::TrtLlm { url, poll }) => {
                let (url, every) = (url.clone(), *poll);
                let ranks: Vec<(DpRank, Outlet, Option<Resume>)> = (0..worker.ranks)
                    .map(|rank| {
                        let outlet = self.outlet(id, rank, Plane::Poll, &settings);
                        let resume = self.resumes.remove(&outlet.origin());
                        (rank, outlet, resume)
                    })
                    .collect();
                let task = spawn(async move {
                    let mut streams = BTreeMap::new();
                    for (rank, outlet, resume) in ranks {
                        let form = Form::JsonEvents;
                        let stream = Stream::start(outlet, Source::Queues, form, resume).await?;
                        streams.insert(rank, stream);
                    }
                    poll::run(url, every, streams).await
                });
                tasks.insert(0, task);
            }
            Some(Events::Http {
                token_file,
                trusts_loopback,
            }) => {
                let credentials = Credentials {
                    token_file: token_file.clone(),
                    trusts_loopback: *trusts_loopback,
                };
                let outlets: Vec<_> = (0..worker.ranks)
                    .map(|stream| self.outlet(id, stream, Plane::Http, &settings))
                    .collect();
                self.desk.open(id, credentials, outlets);
            }
            None => {}
        }
        Door {
            settings,
            worker: worker.clone(),
            tasks,
        }
    }

    fn subscribe(
        &mut self,
        worker: WorkerId,
        rank: DpRank,
        address: zmq::Address,
        settings: &Settings,
    ) -> Task {
        let source = if address.replay.is_some() {
            Source::Replays
        } else {
            Source::Live
        };
        let outlet = self.outlet(worker, rank, Plane::Zmq, settings);
        let resume = self.resumes.remove(&outlet.origin());
        spawn(async move {
            let form = Form::Batches(Encoding::MsgPack);
            let stream = Stream::start(outlet, source, form, resume).await?;
            zmq::run(address, stream).await
        })
    }

    /// The workers that have no stream of their own are read from the stream of all.
    fn read_stored(&mut self, config: &Config) {
        let Some(mut stored) = self.stored.take() else {
            return;
        };
        let mut before = std::mem::take(&mut stored.workers);
        for pool in config.pools.iter().filter(|pool| pool.kv_events) {
            for worker in pool.workers.iter().filter(|w| w.events.is_none()) {
                let settings = Settings::of(pool);
                let known = before.remove(&worker.id);
                stored.workers.insert(worker.id, settings.clone());
                match known {
                    Some(known) if known == settings => continue,
                    Some(_) => stored.tell(jetstream::Change::Remove(worker.id)),
                    None => {}
                }
                let outlet = self.outlet(worker.id, 0, Plane::JetStream, &settings);
                let resume = self.resumes.remove(&outlet.origin());
                stored.tell(jetstream::Change::Add(Box::new(outlet), resume));
            }
        }
        for worker in before.into_keys() {
            stored.tell(jetstream::Change::Remove(worker));
        }
        self.stored = Some(stored);
    }
}

impl Stored {
    fn new(source: jetstream::Source, hall: Hall) -> Self {
        let (changes, changed) = mpsc::channel(CHANGES);
        Self {
            workers: BTreeMap::new(),
            changes,
            _task: spawn(jetstream::run(source, hall, changed)),
        }
    }

    fn tell(&mut self, change: jetstream::Change) {
        let id = match &change {
            jetstream::Change::Add(outlet, _) => outlet.origin().worker,
            jetstream::Change::Remove(worker) => *worker,
        };
        if self.changes.try_send(change).is_err() {
            // It is told with the next change of the configuration.
            tracing::error!(
                worker = id,
                "the reader of jetstream is behind with the workers"
            );
            self.workers.remove(&id);
        }
    }
}

/// Runs a door until it is closed or the index is gone.
fn spawn(door: impl Future<Output = Result<Gone, Gone>> + Send + 'static) -> Task {
    AbortOnDropHandle::new(tokio::spawn(async move {
        // Both say the same: nobody takes events any more.
        let (Ok(Gone) | Err(Gone)) = door.await;
    }))
}
