//! Decisions of the real filter in the real Envoy, by the filter's own histograms.
//!
//! Arguments: sizes of the index in blocks, by default one and four million.

use std::net::SocketAddr;
use std::thread;

use anyhow::ensure;
use kv_benches::corpus::Corpus;
use kv_benches::feed::Feed;
use kv_benches::fleet::{Fleet, Options};
use kv_benches::histogram::{self, Timings};
use kv_benches::http::{Connection, header, request};
use kv_benches::prompt::{Case, Prompt};
use kv_benches::report::{Report, Table};
use kv_benches::sink;
use kv_benches::spread::Spread;
use kv_core::rng::Rng;
use kv_tests::envoy::Envoy;

const TOKENS: [usize; 4] = [2_000, 8_000, 32_000, 128_000];
const REPEATS: usize = 5;
/// Requests of one connection in one repeat.
const REQUESTS: usize = 48;

/// One line of the table: prompts of a size and a case, as requests with the worker to be chosen.
struct Cell {
    case: Case,
    tokens: usize,
    requests: Vec<(Vec<u8>, Option<u64>)>,
    found: Vec<Timings>,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let sizes: Result<Vec<usize>, _> = std::env::args().skip(1).map(|n| n.parse()).collect();
    let sizes = Some(sizes?)
        .filter(|s| !s.is_empty())
        .unwrap_or(vec![1_000_000, 4_000_000]);
    let mut report = Report::new("decision");
    let workers = sink::start(256)?;
    for blocks in sizes {
        for owners in [64, 256] {
            measure(&mut report, blocks, &workers[..owners]).await?;
        }
    }
    report.finish()
}

async fn measure(report: &mut Report, blocks: usize, workers: &[SocketAddr]) -> anyhow::Result<()> {
    let owners = workers.len();
    let options = Options {
        workers,
        mode: "kv",
        decision_header: false,
        tokenizer: None,
    };
    let fleet = Fleet::start(options).await?;
    let mut feed = Feed::connect(&fleet, 1).await?;
    let mut rng = Rng::new(2);
    let mut cells = Vec::new();
    let mut left = blocks;
    for case in Case::ALL {
        for tokens in TOKENS {
            let mut cell = Cell {
                case,
                tokens,
                requests: Vec::new(),
                found: Vec::new(),
            };
            for _ in 0..case.prompts() {
                let prompt = Prompt::new(case, tokens, owners, &mut rng);
                left -= if prompt.stores.is_empty() {
                    0
                } else {
                    prompt.chain.len()
                };
                cell.requests.push((request(&prompt.body()), prompt.worker));
                feed.add(&fleet, prompt.stores).await?;
            }
            cells.push(cell);
        }
    }
    for conversation in Corpus::new(owners, 1).of_size(left) {
        feed.add(&fleet, conversation.stores).await?;
    }
    feed.finish(&fleet).await?;
    let stats = fleet.index().await?["stats"].clone();
    for threads in [1, 2] {
        let envoy = fleet.envoy(threads, |_| ()).await?;
        let mut connections = one_to_each_thread(&envoy, threads as usize).await?;
        let mut sent = u64::from(threads);
        let mut before = Timings::default();
        for repeat in 0..=REPEATS {
            for cell in &mut cells {
                sent += run(cell, &mut connections)?;
                let after = histogram::read(&fleet.client, envoy.admin, sent).await?;
                // The first round warms up.
                if repeat > 0 {
                    cell.found.push(after.since(&before));
                }
                before = after;
            }
        }
        let title = format!(
            "{threads} thread(s), {} blocks in {} pages, {owners} owners",
            stats["blocks"], stats["pages"]
        );
        tell(report, &title, threads, &mut cells);
    }
    Ok(())
}

/// Opens connections until each thread has one: the kernel deals them out. Each has made one
/// request.
async fn one_to_each_thread(envoy: &Envoy, threads: usize) -> anyhow::Result<Vec<Connection>> {
    let mut connections: Vec<Option<Connection>> = (0..threads).map(|_| None).collect();
    let hello = request(br#"{"model":"sim","prompt":[1,2,3]}"#);
    for _ in 0..200 {
        let before = accepted(envoy, threads).await?;
        let mut connection = Connection::open(envoy.port)?;
        let thread = loop {
            let now = accepted(envoy, threads).await?;
            let grown = now
                .iter()
                .zip(&before)
                .position(|(now, before)| now > before);
            if let Some(thread) = grown {
                break thread;
            }
        };
        if connections[thread].is_none() {
            connection.send(&hello)?;
            connections[thread] = Some(connection);
        }
        if connections.iter().all(Option::is_some) {
            return Ok(connections.into_iter().flatten().collect());
        }
    }
    anyhow::bail!("200 connections did not reach every thread")
}

/// Connections that each thread has accepted.
async fn accepted(envoy: &Envoy, threads: usize) -> anyhow::Result<Vec<u64>> {
    let stats = envoy
        .stats(r"listener\.127.*worker_\d+\.downstream_cx_total")
        .await;
    let mut stats = stats.map_err(anyhow::Error::msg)?;
    stats.sort();
    ensure!(stats.len() == threads, "{stats:?}");
    Ok(stats.into_iter().map(|(_, n)| n).collect())
}

/// Sends the requests of a cell on every connection, one at a time on each.
fn run(cell: &Cell, connections: &mut [Connection]) -> anyhow::Result<u64> {
    let count = connections.len() as u64 * REQUESTS as u64;
    let is_shared = connections.len() > 1;
    thread::scope(|scope| {
        let workers: Vec<_> = connections
            .iter_mut()
            .enumerate()
            .map(|(start, connection)| {
                scope.spawn(move || -> anyhow::Result<()> {
                    let requests = cell.requests.iter().cycle().skip(start);
                    for (bytes, worker) in requests.take(REQUESTS) {
                        let head = connection.send(bytes)?;
                        let chosen = header(&head, sink::WORKER).and_then(|id| id.parse().ok());
                        // Requests at the same time give way to each other.
                        let right = worker.is_none() || *worker == chosen || is_shared;
                        ensure!(right, "{:?} went to {chosen:?}, not {worker:?}", cell.case);
                    }
                    Ok(())
                })
            })
            .collect();
        workers
            .into_iter()
            .try_for_each(|w| w.join().expect("a client thread"))
    })?;
    Ok(count)
}

fn tell(report: &mut Report, title: &str, threads: u32, cells: &mut [Cell]) {
    let mut table = Table::new(
        &format!("{title}; us"),
        &[
            "case",
            "tokens",
            "lookup p50",
            "lookup p99",
            "since headers p50",
            "after last chunk p50",
            "after last chunk p99",
        ],
    );
    for cell in cells {
        let found = std::mem::take(&mut cell.found);
        let spread = |of: &dyn Fn(&Timings) -> f64| Spread::of(found.iter().map(of).collect());
        let lookup = spread(&|t| t.lookup.quantile(0.5));
        let since_headers = spread(&|t| t.decision.quantile(0.5));
        let after_body = spread(&|t| t.after_body.quantile(0.5));
        table.row(vec![
            cell.case.name().into(),
            cell.tokens.into(),
            lookup.into(),
            spread(&|t| t.lookup.quantile(0.99)).into(),
            since_headers.into(),
            after_body.into(),
            spread(&|t| t.after_body.quantile(0.99)).into(),
        ]);
        if threads > 1 || cell.tokens != 32_000 {
            continue;
        }
        let limit = match cell.case {
            Case::Full => 10.0,
            Case::System => 15.0,
            Case::Depths => 70.0,
            Case::Miss => 1.0,
        };
        let name = |what: &str| format!("{what}, {}, {title}", cell.case.name());
        report.at_most(&name("lookup of 2,000 blocks"), lookup.median, limit, "us");
        if cell.case == Case::Full {
            report.at_most(
                &name("decision of 32k tokens"),
                since_headers.median,
                160.0,
                "us",
            );
            report.at_most(&name("after the last chunk"), after_body.median, 25.0, "us");
        }
    }
    report.table(&table);
}
