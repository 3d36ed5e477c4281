//! From an event's publication on NATS to its visibility in Envoy, under a load of single-block
//! stores, and what that load costs.
//!
//! Twice: by the sidecar's histogram (from receiving an event to Envoy's acknowledgement), and from
//! outside (from before the publication of a prompt's block to the answer of the first request
//! whose decision record shows the block; so it includes that request).

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::bail;
use kv_benches::corpus::{Chain, Corpus, Store};
use kv_benches::cpu;
use kv_benches::feed::Feed;
use kv_benches::fleet::{Fleet, Options};
use kv_benches::http::{Connection, request_to};
use kv_benches::lookups::{Known, Lookups, overlaps};
use kv_benches::prompt::{Case, Prompt};
use kv_benches::report::{Report, Table};
use kv_benches::sink;
use kv_benches::spread::quantile;
use kv_core::event::StorageTier;
use kv_core::rng::Rng;
use kv_tests::envoy::Envoy;
use serde_json::json;
use tokio::runtime::Handle;
use tokio::time::sleep;

const OWNERS: usize = 64;
const BLOCKS: usize = 1_000_000;
/// Conversations that grow at a time.
const LIVE: usize = 1024;
/// Blocks at which a conversation is over.
const CONVERSATION: usize = 256;
/// Blocks of those that grow which an engine holds at most; for more it evicts.
const CAPACITY: usize = 4096;
/// Messages a second of all engines, from which on steps have several blocks.
const MESSAGES: usize = 10_000;
/// How long each load is watched.
const WATCH: Duration = Duration::from_secs(8);
const PROBES: usize = 400;
/// How long the sidecar collects changes, which the targets don't include.
const COALESCE_MS: f64 = 1.0;

/// Shares of one core.
#[derive(Clone, Copy)]
struct Use {
    sidecar: f64,
    main: f64,
    worker: f64,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut report = Report::new("visible");
    let workers = sink::start(OWNERS + 1)?;
    let options = Options {
        workers: &workers,
        mode: "kv",
        decision_header: true,
        tokenizer: None,
    };
    // Probes name their worker.
    let trusting = json!({"trusted_sources": ["127.0.0.0/8"]});
    let fleet = Fleet::start_with(options, trusting).await?;
    let mut feed = Feed::connect(&fleet, 1).await?;
    for conversation in Corpus::new(OWNERS, 1).of_size(BLOCKS) {
        feed.add(&fleet, conversation.stores).await?;
    }
    feed.finish(&fleet).await?;
    let envoy = fleet.envoy(1, |_| ()).await?;
    let known = Arc::new(Known::publish(&mut feed, &fleet, OWNERS).await?);
    // The worker of the probes has a publisher of its own, so its events are numbered apart.
    let mut probes = Feed::connect(&fleet, 2).await?;
    let mut table = Table::new(
        &format!("{BLOCKS} blocks, {OWNERS} owners; times in ms, CPU in % of a core"),
        &[
            "stores/s",
            "sent/s",
            "sidecar p50",
            "sidecar p99",
            "outside p50",
            "outside p99",
            "sidecar CPU",
            "Envoy main CPU",
            "Envoy worker CPU",
            "writes/s",
            "lookups",
            "over",
            "under",
        ],
    );
    let mut wrong = Table::new(
        "wrong credits, the first of each rate",
        &["stores/s", "worker", "held", "seen"],
    );
    for rate in [0, 1_000, 10_000, 50_000] {
        let load = Growth::start(feed, rate);
        // By then engines are full at the highest rate.
        sleep(Duration::from_secs(if rate > 10_000 { 8 } else { 1 })).await;
        let lookups = Lookups::start(envoy.port, Arc::clone(&known));
        let before = (
            used(&fleet, &envoy)?,
            buckets(&fleet).await?,
            pages(&envoy).await,
        );
        let since = Instant::now();
        sleep(WATCH).await;
        let seconds = since.elapsed().as_secs_f64();
        let after = (
            used(&fleet, &envoy)?,
            buckets(&fleet).await?,
            pages(&envoy).await,
        );
        let share = |of: fn(&Use) -> f64| (of(&after.0) - of(&before.0)) / seconds / 1e7;
        let outside = probe(&mut probes, &envoy).await?;
        let credits = lookups.stop()?;
        let (back, sent) = load.stop()?;
        feed = back;
        let sidecar = [0.5, 0.99].map(|q| 1000.0 * bucket_quantile(&before.1, &after.1, q));
        let outside = [0.5, 0.99].map(|q| quantile(&outside, q));
        let main = share(|u| u.main);
        table.row(vec![
            rate.into(),
            sent.into(),
            sidecar[0].into(),
            sidecar[1].into(),
            outside[0].into(),
            outside[1].into(),
            share(|u| u.sidecar).into(),
            main.into(),
            share(|u| u.worker).into(),
            ((after.2 - before.2) as f64 / seconds).into(),
            credits.lookups.into(),
            credits.over.into(),
            credits.under.into(),
        ]);
        for w in &credits.wrong {
            let cells = [w.worker, w.held, w.seen].map(|n| (n as f64).into());
            wrong.row([vec![rate.into()], cells.to_vec()].concat());
        }
        let at = |what: &str| format!("{what} at {rate} stores/s");
        let unwell = fleet.samples("kv_router_unwell_workers").await?;
        for (what, got) in [
            ("lookups credited too much", credits.over as f64),
            ("lookups credited too little", credits.under as f64),
            // Their blocks are predicted as well, by which credits can't be judged.
            ("unwell workers", unwell.iter().map(|(_, n)| n).sum()),
        ] {
            report.at_most(&at(what), got, 0.0, "");
        }
        if rate > 10_000 {
            report.at_most(&at("event to visible p50"), outside[0], 5.0, "ms");
            report.at_most(&at("event to visible p99"), outside[1], 20.0, "ms");
        } else if rate > 0 {
            let limits = [0.1, 0.5].map(|limit| COALESCE_MS + limit);
            report.at_most(&at("received to visible p50"), sidecar[0], limits[0], "ms");
            report.at_most(&at("received to visible p99"), sidecar[1], limits[1], "ms");
            report.at_most(
                &at("Envoy's main thread, which bridges"),
                main,
                2.0,
                "% of a core",
            );
        }
    }
    report.table(&table);
    report.table(&wrong);
    report.finish()
}

/// Engines that store single blocks at random times, `rate` a second on average, until told to
/// stop. On a thread of its own, because the runtime's timers keep to whole milliseconds.
struct Growth {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<(Feed, f64)>>,
}

/// What one engine holds.
#[derive(Default)]
struct Engine {
    live: Vec<Chain>,
    /// Conversations that are over, the first one to be evicted first.
    over: VecDeque<Chain>,
    blocks: usize,
}

impl Engine {
    /// A step: some conversations grow by a block each, and for each block above the capacity one
    /// is evicted, from the end of what has been over for longest.
    fn step(&mut self, worker: u64, size: usize, rng: &mut Rng) -> (Vec<Store>, Vec<(u64, u64)>) {
        let (mut stores, mut removals) = (Vec::new(), Vec::new());
        self.live.resize_with(LIVE / OWNERS, Chain::default);
        let first = rng.below(self.live.len());
        for i in 0..size {
            let at = (first + i) % self.live.len();
            let chain = &mut self.live[at];
            chain.push(rng.next_u64());
            let last = chain.len() - 1;
            stores.extend(chain.stores(worker, StorageTier::Device, last, last + 1));
            self.blocks += 1;
            if chain.len() == CONVERSATION {
                self.over.push_back(std::mem::take(chain));
            }
            if self.blocks > CAPACITY
                && let Some(chain) = self.over.front_mut()
            {
                removals.extend(chain.sequence.pop().map(|hash| (worker, hash)));
                self.blocks -= 1;
                if chain.sequence.is_empty() {
                    self.over.pop_front();
                }
            }
        }
        (stores, removals)
    }
}

impl Growth {
    fn start(mut feed: Feed, rate: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (told, runtime) = (Arc::clone(&stop), Handle::current());
        // At high rates an engine's step has several blocks, which it sends together.
        let size = (rate / MESSAGES).max(1);
        let thread = thread::spawn(move || {
            let mut rng = Rng::new(rate as u64 + 11);
            let mut engines: Vec<Engine> = Vec::new();
            engines.resize_with(OWNERS, Engine::default);
            let (since, mut due, mut sent) = (Instant::now(), 0.0, 0_usize);
            while !told.load(Ordering::Relaxed) {
                if rate == 0 {
                    thread::sleep(Duration::from_millis(10));
                    continue;
                }
                due -= size as f64 * (1.0 - rng.unit()).ln() / rate as f64;
                let early = due - since.elapsed().as_secs_f64();
                if early > 0.0 {
                    thread::sleep(Duration::from_secs_f64(early));
                }
                let at = rng.below(OWNERS);
                let (stores, removals) = engines[at].step(1 + at as u64, size, &mut rng);
                sent += stores.len();
                runtime.block_on(feed.step(stores, &removals))?;
            }
            Ok((feed, sent as f64 / since.elapsed().as_secs_f64()))
        });
        Self { stop, thread }
    }

    /// Gives back the feed and tells how many stores a second there were.
    fn stop(self) -> anyhow::Result<(Feed, f64)> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the growing thread")
    }
}

/// Times from publication to visibility, sorted, in milliseconds. Requests go to the worker that
/// publishes: another one would compute what it never says, and soon be taken not to publish.
async fn probe(feed: &mut Feed, envoy: &Envoy) -> anyhow::Result<Vec<f64>> {
    let mut connection = Connection::open(envoy.port)?;
    // Other prompts than those of earlier probes.
    let mut rng = Rng::new(feed.events);
    let worker = OWNERS as u64 + 1;
    let mut times = Vec::new();
    for _ in 0..PROBES {
        let prompt = Prompt::new(Case::Miss, 32, 1, &mut rng);
        let bytes = request_to(worker, &prompt.body());
        let since = Instant::now();
        for store in prompt
            .chain
            .stores(worker, StorageTier::Device, 0, prompt.chain.len())
        {
            feed.publish(store).await?;
        }
        feed.flush().await?;
        loop {
            let head = connection.send(&bytes)?;
            let took = since.elapsed();
            if overlap(&head, worker)? > 0 {
                times.push(took.as_secs_f64() * 1e3);
                break;
            }
            if took > Duration::from_secs(5) {
                bail!("not visible after 5 s");
            }
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
}

/// Device blocks that a decision saw on a worker.
fn overlap(head: &str, worker: u64) -> anyhow::Result<u64> {
    let seen = overlaps(head)?;
    let of = seen.iter().find(|(of, _)| *of == worker);
    Ok(of.map_or(0, |(_, overlap)| *overlap))
}

fn used(fleet: &Fleet, envoy: &Envoy) -> anyhow::Result<Use> {
    let threads = cpu::threads(envoy.process.id())?;
    let sum = |of: &dyn Fn(&cpu::Thread) -> bool| -> f64 {
        threads.iter().filter(|t| of(t)).map(|t| t.ns as f64).sum()
    };
    Ok(Use {
        sidecar: cpu::total_ns(fleet.sidecar.id())? as f64,
        main: sum(&|t| t.id == envoy.process.id()),
        worker: sum(&|t| t.name.starts_with("wrk:worker")),
    })
}

async fn pages(envoy: &Envoy) -> u64 {
    envoy.total("kv_router_bridge_writes_total").await
}

/// Cumulative counts of the sidecar's histogram by upper bound, in seconds.
async fn buckets(fleet: &Fleet) -> anyhow::Result<Vec<(f64, f64)>> {
    let samples = fleet.samples("kv_router_publish_seconds_bucket").await?;
    let bound = |(labels, count): (String, f64)| {
        let le = labels.split('"').nth(1)?;
        let le = if le == "+Inf" {
            f64::INFINITY
        } else {
            le.parse().ok()?
        };
        Some((le, count))
    };
    Ok(samples.into_iter().filter_map(bound).collect())
}

/// A quantile between two states, linear within its bucket.
fn bucket_quantile(before: &[(f64, f64)], after: &[(f64, f64)], q: f64) -> f64 {
    let counts: Vec<(f64, f64)> = after
        .iter()
        .zip(before)
        .map(|((le, now), (_, then))| (*le, now - then))
        .collect();
    let wanted = q * counts.last().map_or(0.0, |(_, n)| *n);
    let (mut lower, mut below) = (0.0, 0.0);
    for (le, count) in counts {
        if count >= wanted && count > below {
            return lower + (le - lower) * (wanted - below) / (count - below);
        }
        (lower, below) = (le, count);
    }
    0.0
}
