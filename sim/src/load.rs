//! The load generator: reproducible requests, and what came of them.

mod agents;
mod client;
mod report;
mod stats;
mod trace;
mod workload;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::Serialize;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use xxhash_rust::xxh3::Xxh3;

use self::client::{Client, Failure, Sample};
use self::stats::Stats;
use crate::token;

pub use self::report::{InterToken, Report, Ttft, table};
pub use self::trace::TraceError;
pub use self::workload::{Item, Workload};

/// Requests in flight in open loop; past this the generator waits and shows it as lateness.
const MAX_IN_FLIGHT: usize = 16_384;

/// How prompts are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Token ids.
    Tokens,
    /// One word per token.
    Text,
}

/// When requests are sent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pace {
    /// Poisson arrivals at this many requests a second (bursts: all 64 at once, at this mean).
    Rate(f64),
    /// At the times of the trace.
    Trace,
    /// This many in flight, the next as soon as one ends.
    Concurrency(usize),
}

/// One run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Base of the endpoint, such as `http://127.0.0.1:8000`.
    pub url: String,
    /// Model in the requests.
    pub model: String,
    /// Name of the run in tables.
    pub label: String,
    /// What is asked.
    pub workload: Workload,
    /// Seed of the workload and its arrivals.
    pub seed: u64,
    /// Requests; of a trace, at most this many.
    pub requests: usize,
    /// When they are sent.
    pub pace: Pace,
    /// How prompts are written.
    pub format: Format,
    /// Time for one request.
    pub timeout: Duration,
}

/// Why a run did not happen.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Not an `http://` URL.
    #[error("{url:?} is not an http:// url")]
    Url {
        /// The URL.
        url: String,
    },
    /// Rate or concurrency is not positive.
    #[error("the pace {0:?} is not above 0")]
    Pace(Pace),
    /// A trace's time only replays a trace.
    #[error("{0} has no times of its own: give a rate or a concurrency")]
    NoTimes(String),
    /// The trace cannot be replayed.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// The histograms could not be made.
    #[error("cannot make a histogram: {0}")]
    Histogram(#[from] hdrhistogram::CreationError),
}

/// The requests in their order, encoded one by one.
struct Feed {
    items: Box<dyn Iterator<Item = Item> + Send>,
    model: String,
    format: Format,
    digest: Xxh3,
    taken: u64,
}

struct Encoded {
    due: f64,
    body: Bytes,
    max_tokens: usize,
}

/// Field order is the order on the wire; the prompt comes second, as SDKs write it.
#[derive(Serialize)]
struct Body<'a> {
    model: &'a str,
    prompt: Prompt<'a>,
    max_tokens: usize,
    ignore_eos: bool,
    stream: bool,
    stream_options: StreamOptions,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Prompt<'a> {
    Tokens(&'a [u32]),
    Text(String),
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

struct Run {
    client: Client,
    feed: Mutex<Feed>,
    tally: Mutex<Tally>,
    total: u64,
    progress: Box<dyn Fn(Progress) + Send + Sync>,
}

/// How far a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Requests of the run.
    pub total: u64,
    /// Requests answered in full.
    pub ok: u64,
    /// Requests failed.
    pub failed: u64,
}

struct Tally {
    stats: Stats,
    first_failure: Option<String>,
}

/// Runs a workload to its end. `progress` is told how far it is after each request.
///
/// # Errors
///
/// Options that make no run. Failed requests are part of the report.
pub async fn run(
    options: &Options,
    progress: impl Fn(Progress) + Send + Sync + 'static,
) -> Result<Report, LoadError> {
    let feed = Feed::new(options)?;
    let run = Arc::new(Run {
        client: Client::new(endpoint(&options.url)?, options.timeout),
        tally: Mutex::new(Tally {
            stats: Stats::new()?,
            first_failure: None,
        }),
        total: feed.items.size_hint().1.unwrap_or(0) as u64,
        progress: Box::new(progress),
        feed: Mutex::new(feed),
    });
    let start = Instant::now();
    match options.pace {
        Pace::Rate(rate) if rate > 0.0 => open_loop(&run, rate, start).await,
        Pace::Trace if matches!(options.workload, Workload::Trace { .. }) => {
            open_loop(&run, 1.0, start).await;
        }
        Pace::Trace => return Err(LoadError::NoTimes(options.workload.name())),
        Pace::Concurrency(open) if open > 0 => closed_loop(&run, open).await,
        pace => return Err(LoadError::Pace(pace)),
    }
    Ok(run.report(options, start.elapsed()))
}

async fn open_loop(run: &Arc<Run>, rate: f64, start: Instant) {
    let slots = Arc::new(Semaphore::new(MAX_IN_FLIGHT));
    let mut sent = JoinSet::new();
    while let Some(item) = run.next() {
        let due = start + Duration::from_secs_f64((item.due / rate).max(0.0));
        tokio::time::sleep_until(due.into()).await;
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
            break;
        };
        let run = Arc::clone(run);
        sent.spawn(async move {
            run.send(item, due).await;
            drop(slot);
        });
        while sent.try_join_next().is_some() {}
    }
    while sent.join_next().await.is_some() {}
}

async fn closed_loop(run: &Arc<Run>, concurrency: usize) {
    let mut clients = JoinSet::new();
    for _ in 0..concurrency {
        let run = Arc::clone(run);
        clients.spawn(async move {
            while let Some(item) = run.next() {
                run.send(item, Instant::now()).await;
            }
        });
    }
    while clients.join_next().await.is_some() {}
}

fn endpoint(url: &str) -> Result<http::Uri, LoadError> {
    let base = url.trim_end_matches('/').trim_end_matches("/v1");
    let uri: Option<http::Uri> = format!("{base}/v1/completions").parse().ok();
    uri.filter(|uri| uri.scheme_str() == Some("http") && uri.host().is_some())
        .ok_or_else(|| LoadError::Url {
            url: url.to_owned(),
        })
}

// === impl Feed ===

impl Feed {
    fn new(options: &Options) -> Result<Self, LoadError> {
        let mut items = options.workload.items(options.seed, options.requests)?;
        if let (Workload::Trace { .. }, Pace::Rate(_)) = (&options.workload, options.pace) {
            items = Box::new(workload::with_poisson_arrivals(items, options.seed));
        }
        Ok(Self {
            items,
            model: options.model.clone(),
            format: options.format,
            digest: Xxh3::new(),
            taken: 0,
        })
    }

    fn next(&mut self) -> Option<Encoded> {
        let item = self.items.next()?;
        let body = encode(&self.model, &item, self.format);
        self.digest.update(&body);
        self.taken += 1;
        Some(Encoded {
            due: item.due,
            body: body.into(),
            max_tokens: item.max_tokens,
        })
    }
}

fn encode(model: &str, item: &Item, format: Format) -> Vec<u8> {
    let prompt = match format {
        Format::Tokens => Prompt::Tokens(&item.prompt),
        Format::Text => {
            let text: String = item.prompt.iter().map(|&t| token::decode(t)).collect();
            Prompt::Text(text)
        }
    };
    let body = Body {
        model,
        prompt,
        max_tokens: item.max_tokens,
        ignore_eos: true,
        stream: true,
        stream_options: StreamOptions {
            include_usage: true,
        },
    };
    // Strings, integers and booleans always serialise.
    serde_json::to_vec(&body).unwrap_or_default()
}

// === impl Run ===

impl Run {
    fn next(&self) -> Option<Encoded> {
        self.feed().next()
    }

    fn feed(&self) -> MutexGuard<'_, Feed> {
        self.feed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn send(&self, item: Encoded, due: Instant) {
        let late = due.elapsed();
        let result = self.client.send(item.body, item.max_tokens).await;
        self.add(late, result);
    }

    fn add(&self, late: Duration, result: Result<Sample, Failure>) {
        let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(failure) = &result
            && tally.first_failure.is_none()
        {
            tally.first_failure = Some(failure.to_string());
        }
        tally.stats.add(late, result);
        (self.progress)(Progress {
            total: self.total,
            ok: tally.stats.ok,
            failed: tally.stats.failures(),
        });
    }

    fn report(&self, options: &Options, took: Duration) -> Report {
        let feed = self.feed();
        let tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
        let stats = &tally.stats;
        let cached_tokens = (stats.cached_known > 0).then_some(stats.cached_tokens);
        let seconds = took.as_secs_f64();
        let per_second = |count: u64| count as f64 / seconds.max(1e-9);
        Report {
            label: options.label.clone(),
            url: options.url.clone(),
            workload: options.workload.name(),
            seed: options.seed,
            bodies: format!("{:016x}", feed.digest.digest()),
            rate: match options.pace {
                Pace::Rate(rate) => Some(rate),
                Pace::Trace | Pace::Concurrency(_) => None,
            },
            speed: match (options.pace, &options.workload) {
                (Pace::Trace, Workload::Trace { speed, .. }) => Some(*speed),
                _ => None,
            },
            concurrency: match options.pace {
                Pace::Concurrency(open) => Some(open),
                Pace::Rate(_) | Pace::Trace => None,
            },
            requests: feed.taken,
            ok: stats.ok,
            failed: stats.failed.clone(),
            first_failure: tally.first_failure.clone(),
            ttft_ms: stats.ttft(),
            itl_ms: stats.inter_token(),
            prompt_tokens: stats.prompt_tokens,
            cached_tokens,
            cached_share: cached_tokens.map(|cached| cached as f64 / stats.cached_known as f64),
            completion_tokens: stats.completion_tokens,
            workers: stats.workers.clone(),
            duration_s: seconds,
            requests_per_s: per_second(stats.ok),
            output_tokens_per_s: per_second(stats.completion_tokens),
            late_p99_ms: stats.late_p99_ms(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_are_byte_identical_for_a_seed() {
        let item = Item {
            due: 0.0,
            prompt: vec![300, 7],
            max_tokens: 2,
        };
        let body = |format| String::from_utf8(encode("sim", &item, format)).unwrap();
        let rest = r#""max_tokens":2,"ignore_eos":true,"stream":true,"stream_options":{"include_usage":true}}"#;
        assert_eq!(
            body(Format::Tokens),
            format!(r#"{{"model":"sim","prompt":[300,7],{rest}"#)
        );
        assert_eq!(
            body(Format::Text),
            format!(r#"{{"model":"sim","prompt":" qdaa qh",{rest}"#)
        );
    }

    #[test]
    fn urls_are_http_with_or_without_v1() {
        for url in ["http://a:1", "http://a:1/", "http://a:1/v1"] {
            assert_eq!(endpoint(url).unwrap(), "http://a:1/v1/completions");
        }
        for url in ["https://a", "a:1", "", "http://"] {
            assert!(endpoint(url).is_err(), "{url}");
        }
    }
}
