//! The index service by itself, fed with scripted arrivals.

use std::collections::HashMap;
use std::sync::Arc;

use kv_core::event::EventData;
use kv_core::hash::{Hashing, Seed, sequence_hashes};
use kv_core::id::{Family, Tier, WorkerId};
use kv_core::index::Held;
use kv_router::config::Config;
use kv_router::dump::Line;
use kv_router::index::{Control, NotDumped, Service};
use kv_router::ingest::batch::{Batch, Change, Origin, Resume, Turn};
use kv_router::ingest::{Arrival, Plane};
use kv_router::metrics::Metrics;
use kv_router::state::{self, Restored};
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::engine::BLOCK;

/// A running service.
pub(crate) struct Scripted {
    folder: TempDir,
    yaml: String,
    arrivals: mpsc::Sender<Arrival>,
    control: mpsc::Sender<Control>,
    /// Workers that are asked for their snapshots: none answers.
    _requested: mpsc::Receiver<WorkerId>,
    pub(crate) metrics: Arc<Metrics>,
    /// Where streams were to be taken up at the start.
    pub(crate) resume: HashMap<Origin, Resume>,
    cancel: CancellationToken,
    task: JoinHandle<()>,
}

fn config(folder: &TempDir, yaml: &str) -> Config {
    let at = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(at("token"), "t").unwrap();
    let yaml = yaml.replace("TOKEN", &at("token"));
    let text = format!(
        "state_dir: {}\nkv_cache_block_size: {BLOCK}\n{yaml}",
        at("state")
    );
    Config::parse(&text, &[]).unwrap_or_else(|e| panic!("{e}"))
}

impl Scripted {
    /// Starts one; `TOKEN` in the YAML is a file.
    pub(crate) fn start(yaml: &str) -> Self {
        Self::start_in(TempDir::new().unwrap(), yaml, Vec::new())
    }

    /// Starts one on the dump of another.
    pub(crate) fn start_from(yaml: &str, dump: Vec<Line>) -> Self {
        Self::start_in(TempDir::new().unwrap(), yaml, dump)
    }

    fn start_in(folder: TempDir, yaml: &str, dump: Vec<Line>) -> Self {
        let config = config(&folder, yaml);
        let file = kv_router::index::state_file(&config);
        let restored = state::restore(file.as_deref());
        assert_ne!(restored, Restored::Corrupt);
        let metrics = Arc::new(Metrics::default());
        let (requests, requested) = mpsc::channel(64);
        let mut service = Service::new(&config, restored, requests, Arc::clone(&metrics));
        for line in dump {
            service.adopt(line).unwrap();
        }
        let resume = service.resumes();
        let (control, controlled) = mpsc::channel(64);
        let (arrivals, arrived) = mpsc::channel(64);
        let cancel = CancellationToken::new();
        let task = tokio::spawn(service.run(controlled, arrived, cancel.clone()));
        Self {
            folder,
            yaml: yaml.to_owned(),
            arrivals,
            control,
            _requested: requested,
            metrics,
            resume,
            cancel,
            task,
        }
    }

    /// Ends it in order and starts it again on what it saved.
    pub(crate) async fn restart(self) -> Self {
        let yaml = self.yaml.clone();
        self.restart_with(&yaml).await
    }

    /// The same with another configuration.
    pub(crate) async fn restart_with(self, yaml: &str) -> Self {
        self.cancel.cancel();
        self.task.await.unwrap();
        Self::start_in(self.folder, yaml, Vec::new())
    }

    /// Takes another configuration over while it runs.
    pub(crate) async fn configure(&self, yaml: &str) {
        let config = Arc::new(config(&self.folder, yaml));
        let (written, _) = oneshot::channel();
        let configure = Control::Configure { config, written };
        self.control.send(configure).await.unwrap();
    }

    pub(crate) async fn arrive(&self, arrival: Arrival) {
        self.arrivals.send(arrival).await.unwrap();
    }

    /// A message of a worker's stream 0.
    pub(crate) async fn batch(&self, worker: WorkerId, sequence: u64, changes: Vec<Change>) {
        let batch = Batch {
            sequence: Some(sequence),
            mark: sequence ^ 77,
            changes,
            ..Batch::default()
        };
        let arrival = Arrival::Batch(Origin { worker, stream: 0 }, Plane::Http, batch);
        self.arrive(arrival).await;
    }

    pub(crate) async fn turn(&self, worker: WorkerId, turn: Turn) {
        let arrival = Arrival::Turn(Origin { worker, stream: 0 }, Plane::Http, turn);
        self.arrive(arrival).await;
    }

    async fn ask<T>(&self, question: impl FnOnce(oneshot::Sender<T>) -> Control) -> T {
        // Arrivals are served after questions: those that were sent go first.
        while self.arrivals.capacity() < self.arrivals.max_capacity() {
            tokio::task::yield_now().await;
        }
        let (reply, answer) = oneshot::channel();
        self.control.send(question(reply)).await.unwrap();
        answer.await.unwrap()
    }

    pub(crate) async fn workers(&self) -> Value {
        serde_json::to_value(self.ask(Control::Workers).await).unwrap()
    }

    pub(crate) async fn index(&self) -> Value {
        serde_json::to_value(self.ask(Control::Index).await).unwrap()
    }

    pub(crate) async fn readiness(&self) -> Value {
        serde_json::to_value(self.ask(Control::Readiness).await).unwrap()
    }

    /// A rank of the first pool.
    pub(crate) async fn owner(&self, worker: WorkerId, rank: u32) -> Value {
        let workers = self.workers().await;
        let owners = workers["pools"][0]["owners"].as_array().unwrap();
        let is_it = |o: &&Value| o["worker"] == worker && o["rank"] == rank;
        owners.iter().find(is_it).unwrap().clone()
    }

    /// Blocks of a prompt that a rank holds, by tier.
    pub(crate) async fn overlap(&self, worker: WorkerId, rank: u32, prompt: &[u32]) -> [u32; 4] {
        let hashing = Hashing::new(BLOCK as usize, Seed::new("", ""));
        let prompt = sequence_hashes(prompt, hashing);
        let ask = |reply| Control::Overlaps {
            families: Vec::new(),
            pool: 0,
            prompt,
            reply,
        };
        let field = self.ask(ask).await.unwrap();
        let is_it = |o: &kv_core::table::Owner| o.id.worker == worker && o.id.rank == rank;
        let at = field.pool.owners.iter().position(is_it).unwrap();
        field.standings[at].overlap.by_tier()
    }

    /// Begins a dump that goes on only as it is read.
    pub(crate) async fn begin_dump(&self) -> Result<mpsc::Receiver<Line>, NotDumped> {
        let (out, lines) = mpsc::channel(1);
        self.ask(|reply| Control::Dump { out, reply }).await?;
        Ok(lines)
    }

    /// Everything that each rank holds.
    pub(crate) async fn dump(&self) -> Result<Vec<Line>, NotDumped> {
        let mut lines = self.begin_dump().await?;
        let mut all = Vec::new();
        while let Some(line) = lines.recv().await {
            all.push(line);
        }
        Ok(all)
    }

    /// Blocks of a dump by rank, in a fixed order.
    pub(crate) async fn blocks(&self) -> HashMap<(WorkerId, u32), Vec<Held>> {
        let mut blocks: HashMap<_, Vec<Held>> = HashMap::new();
        for line in self.dump().await.unwrap() {
            if let Line::Blocks {
                id, blocks: part, ..
            } = line
            {
                let all = blocks.entry((id.worker, id.rank)).or_default();
                all.extend(
                    part.into_iter()
                        .map(Held::from)
                        .filter(|b| b.name.is_some()),
                );
            }
        }
        for blocks in blocks.values_mut() {
            blocks.sort_by_key(|b| (b.sequence, b.name));
        }
        blocks
    }
}

/// A change of a rank's device memory.
pub(crate) fn change(rank: u32, data: EventData) -> Change {
    change_on(rank, Some(Tier::Device), data)
}

pub(crate) fn change_on(rank: u32, tier: Option<Tier>, data: EventData) -> Change {
    Change {
        rank,
        tier,
        family: Family::Dynamo,
        data,
    }
}
