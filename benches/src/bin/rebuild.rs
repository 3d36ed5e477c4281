//! How long an index service takes to rebuild its index from the events that engines replay, from
//! their bytes to the last page, and from the snapshot of its last run.
//!
//! Seven workers, 2.3 million events: conversations that grew block by block, one event a block.

use std::time::Instant;

use anyhow::Context as _;
use kv_benches::corpus::Chain;
use kv_benches::report::{Report, Table};
use kv_benches::spread::Spread;
use kv_core::event::{Envelope, EventData, KvCacheEvent, RouterEvent, StorageTier};
use kv_core::rng::Rng;
use kv_router::config::Config;
use kv_router::index::{Control, IndexReport, Service};
use kv_router::ingest::{Arrival, Plane, decode};
use kv_router::state::{self, Restored};
use serde_json::json;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

const WORKERS: u64 = 7;
const EVENTS: usize = 2_300_000;
/// Blocks of a conversation, of which a system prompt of this many is shared.
const BLOCKS: usize = 400;
const SHARED: usize = 64;
/// Events of a message, as Dynamo's publisher has at most.
const MESSAGE_EVENTS: usize = 128;
const REPEATS: usize = 3;

/// The payloads that a worker replays.
fn replay(worker: u64) -> anyhow::Result<Vec<Vec<u8>>> {
    let mut rng = Rng::new(worker);
    let system = Chain::default().fork(0, SHARED, &mut Rng::new(99));
    let of_worker = EVENTS / usize::try_from(WORKERS)?;
    let (mut messages, mut batch) = (Vec::new(), Vec::new());
    let mut id = 0;
    while id < of_worker {
        let chain = system.fork(SHARED, BLOCKS - SHARED, &mut rng);
        let from = if id == 0 { 0 } else { SHARED };
        for at in from..chain.len().min(from + of_worker - id) {
            id += 1;
            let store = chain.stores(worker, StorageTier::Device, at, at + 1).next();
            let data = EventData::Stored(store.context("one store")?.data);
            batch.push(RouterEvent {
                worker_id: worker,
                storage_tier: StorageTier::Device,
                residency_domain: None,
                event: KvCacheEvent {
                    event_id: id as u64,
                    data,
                    dp_rank: 0,
                },
                session_id: None,
            });
            if batch.len() == MESSAGE_EVENTS || id == of_worker {
                let envelope = Envelope {
                    publisher_id: worker,
                    sequence: messages.len() as u64,
                    published_at: 0,
                    topic: "kv-events".to_owned(),
                    payload: rmp_serde::to_vec_named(&batch)?,
                };
                messages.push(rmp_serde::to_vec_named(&envelope)?);
                batch.clear();
            }
        }
    }
    Ok(messages)
}

async fn report(control: &mpsc::Sender<Control>) -> anyhow::Result<IndexReport> {
    let (reply, answer) = oneshot::channel();
    control.send(Control::Index(reply)).await?;
    Ok(answer.await?)
}

/// A running service.
struct Running {
    control: mpsc::Sender<Control>,
    arrivals: mpsc::Sender<Arrival>,
    cancel: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Running {
    fn start(config: &Config, restored: Restored) -> Self {
        let (arrivals, arrived) = mpsc::channel(1024);
        let (control, controlled) = mpsc::channel(64);
        let (requests, _) = mpsc::channel(64);
        let service = Service::new(config, restored, requests, std::sync::Arc::default());
        let cancel = CancellationToken::new();
        let task = tokio::spawn(service.run(controlled, arrived, cancel.clone()));
        Self {
            control,
            arrivals,
            cancel,
            task,
        }
    }

    /// Waits until all is applied and every page is encoded.
    async fn settled(&self, blocks: usize) -> anyhow::Result<IndexReport> {
        loop {
            let report = report(&self.control).await?;
            if report.stats.owner_blocks >= blocks && report.stats.dirty_pages == 0 {
                return Ok(report);
            }
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    }

    /// Stops it, which saves its state.
    async fn stop(self) -> anyhow::Result<()> {
        self.cancel.cancel();
        Ok(self.task.await?)
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut out = Report::new("rebuild");
    let messages: Result<Vec<_>, _> = (1..=WORKERS).map(replay).collect();
    let messages = messages?;
    let dir = tempfile::tempdir()?;
    let workers: Vec<_> = (1..=WORKERS)
        .map(|id| json!({"id": id, "endpoint": format!("127.0.0.1:{}", 9000 + id)}))
        .collect();
    let file = json!({
        "state_dir": dir.path(),
        "nats": {"url": "nats://127.0.0.1:4222",
                 "dynamo": {"namespace": "dynamo", "component": "backend"}},
        "workers": workers,
    });
    let path = dir.path().join("kv-router.yaml");
    std::fs::write(&path, file.to_string())?;
    let config = Config::load(&path, &[])?;
    let blocks = EVENTS / usize::try_from(WORKERS)? * usize::try_from(WORKERS)?;
    let [mut replays, mut snapshots] = [const { Vec::new() }; 2];
    let mut last = None;
    for _ in 0..REPEATS {
        // All workers at a time, each by a task that decodes: as the sources do.
        let running = Running::start(&config, Restored::Absent);
        let since = Instant::now();
        let sources = messages.iter().map(|messages| {
            let (messages, arrivals) = (messages.clone(), running.arrivals.clone());
            tokio::spawn(async move {
                for payload in messages {
                    let arrival = Arrival::Events {
                        plane: Plane::Dynamo,
                        received_ns: 0,
                        decoded: decode::dynamo(&payload),
                    };
                    arrivals.send(arrival).await.expect("the service runs");
                }
            })
        });
        for source in sources.collect::<Vec<_>>() {
            source.await?;
        }
        let report = running.settled(blocks).await?;
        replays.push(since.elapsed().as_secs_f64());
        last = Some(report.stats);
        running.stop().await?;

        let since = Instant::now();
        let state = state::file(dir.path());
        let running = Running::start(&config, state::restore(Some(&state)));
        running.settled(blocks).await?;
        snapshots.push(since.elapsed().as_secs_f64());
        running.stop().await?;
        std::fs::remove_file(state)?;
    }
    let stats = last.context("a repeat")?;
    let (replay, snapshot) = (Spread::of(replays), Spread::of(snapshots));
    let title = format!(
        "{blocks} events of one block from {WORKERS} workers: {} blocks, {} pages, {} MB",
        stats.blocks,
        stats.pages,
        stats.bytes / 1_000_000
    );
    let mut table = Table::new(&title, &["rebuilt from", "s"]);
    let medians = [replay.median, snapshot.median];
    table.row(vec!["replayed events".into(), replay.into()]);
    table.row(vec!["snapshot".into(), snapshot.into()]);
    out.table(&table);
    out.at_most("rebuilding from events", medians[0], 2.0, "s");
    out.at_most("rebuilding from the snapshot", medians[1], 2.0, "s");
    out.finish()
}
