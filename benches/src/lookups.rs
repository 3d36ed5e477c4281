//! Requests for prompts of which it is known who holds what, held against what decisions credit.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::Context as _;
use kv_core::event::StorageTier;
use kv_core::rng::Rng;
use serde_json::Value;

use crate::corpus::BLOCK;
use crate::feed::Feed;
use crate::fleet::Fleet;
use crate::http::{Connection, header, request};
use crate::prompt::{Case, Prompt};

/// Prompts that are asked for.
const PROMPTS: usize = 256;
/// Least blocks of one: for fewer, a worker without any may be as good as the holder, gets the
/// request, and computes what it never says.
const LEAST: usize = 8;
const MOST: usize = 128;
/// Wrong credits that are kept to be shown.
const SHOWN: usize = 8;

/// A prompt: one worker holds all of it, another one the first half, after it has removed the rest.
#[derive(Clone, Debug)]
pub struct Known {
    request: Vec<u8>,
    /// The two workers and the leading blocks that each holds.
    held: [(u64, u64); 2],
}

/// A worker that a decision credited with another number of blocks than it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wrong {
    /// The worker.
    pub worker: u64,
    /// Blocks that it holds.
    pub held: u64,
    /// Blocks that it was credited with.
    pub seen: u64,
}

/// What decisions credited.
#[derive(Clone, Debug, Default)]
pub struct Credits {
    /// Decisions.
    pub lookups: usize,
    /// Those that credited some worker with more than it holds.
    pub over: usize,
    /// Those that credited a holder with less, or did not name it.
    pub under: usize,
    /// The first workers that were credited wrongly.
    pub wrong: Vec<Wrong>,
}

impl Known {
    /// Makes prompts that some of these workers hold, and waits until every Envoy knows of them.
    ///
    /// # Errors
    /// When NATS or the sidecar is gone.
    pub async fn publish(
        feed: &mut Feed,
        fleet: &Fleet,
        workers: usize,
    ) -> anyhow::Result<Vec<Self>> {
        let mut rng = Rng::new(17);
        let mut known = Vec::new();
        let mut removals = Vec::new();
        for i in 0..PROMPTS {
            let depth = LEAST + rng.below(MOST + 1 - LEAST);
            let [holder, other] = [i, i + 1].map(|i| 1 + (i % workers) as u64);
            let prompt = Prompt::new(Case::Miss, BLOCK * depth, 1, &mut rng);
            for worker in [holder, other] {
                let stores = prompt.chain.stores(worker, StorageTier::Device, 0, depth);
                feed.add(fleet, stores.collect::<Vec<_>>()).await?;
            }
            let kept = depth / 2;
            let gone = prompt.chain.sequence[kept..].iter().rev();
            removals.extend(gone.map(|hash| (other, *hash)));
            let held = [(holder, depth as u64), (other, kept as u64)];
            let request = request(&prompt.body());
            known.push(Self { request, held });
        }
        feed.finish(fleet).await?;
        feed.step(Vec::new(), &removals).await?;
        feed.finish(fleet).await?;
        Ok(known)
    }

    fn blocks_of(&self, worker: u64) -> u64 {
        let held = self.held.iter().find(|(of, _)| *of == worker);
        held.map_or(0, |(_, blocks)| *blocks)
    }
}

impl Credits {
    fn add(&mut self, known: &Known, seen: &[(u64, u64)]) {
        let wrong = seen.iter().map(|(worker, seen)| Wrong {
            worker: *worker,
            held: known.blocks_of(*worker),
            seen: *seen,
        });
        let wrong: Vec<Wrong> = wrong.filter(|wrong| wrong.seen != wrong.held).collect();
        let is_over = wrong.iter().any(|wrong| wrong.seen > wrong.held);
        let is_named = |worker: u64| seen.iter().any(|(of, _)| *of == worker);
        let is_under = wrong.iter().any(|wrong| wrong.seen < wrong.held)
            || !known.held.iter().all(|(worker, _)| is_named(*worker));
        self.lookups += 1;
        self.over += usize::from(is_over);
        self.under += usize::from(is_under);
        let room = SHOWN.saturating_sub(self.wrong.len());
        self.wrong.extend(wrong.into_iter().take(room));
    }
}

/// Requests for known prompts, one after the other, until told to stop.
#[derive(Debug)]
pub struct Lookups {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<Credits>>,
}

impl Lookups {
    /// Starts to ask the Envoy at a port on loopback.
    #[must_use]
    pub fn start(port: u16, known: Arc<Vec<Known>>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut connection = Connection::open(port)?;
            let mut credits = Credits::default();
            for known in known.iter().cycle() {
                if told.load(Ordering::Relaxed) {
                    break;
                }
                let head = connection.send(&known.request)?;
                credits.add(known, &overlaps(&head)?);
                // A client of many, which leaves the processor to what is measured.
                thread::sleep(Duration::from_millis(1));
            }
            Ok(credits)
        });
        Self { stop, thread }
    }

    /// Stops and tells what was credited.
    ///
    /// # Errors
    /// When a request was not answered with a decision record.
    ///
    /// # Panics
    /// When the asking thread did.
    pub fn stop(self) -> anyhow::Result<Credits> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the asking thread")
    }
}

/// Device blocks that a decision saw, by worker.
///
/// # Errors
/// When the head of the answer has no decision record.
pub fn overlaps(head: &str) -> anyhow::Result<Vec<(u64, u64)>> {
    let record = header(head, "x-kv-router-decision").context("no decision record")?;
    let record: Value = serde_json::from_str(record)?;
    let list = record["candidates"].as_array().context("no candidates")?;
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    let seen = |c: &Value| (number(&c["worker"]), number(&c["overlap"][0]));
    Ok(list.iter().map(seen).collect())
}
