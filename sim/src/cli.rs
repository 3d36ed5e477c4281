//! Command line of `kv-sim`.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use kv_sim::Limits;
use kv_sim::engine::Config;
use kv_sim::flexkv::{self, LevelConfig};
use kv_sim::load::{Format, Options, Pace, Workload};
use kv_sim::own::{Dialect, Faults, OwnEvents, Zmq};
use kv_sim::publish::{Encoding, EventPlane};

/// Simulated LLM engines with real KV events, and load for any OpenAI endpoint.
#[derive(Debug, Parser)]
#[command(name = "kv-sim", version)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve one simulated engine; the first line printed is its id and address as JSON.
    Engine(EngineArgs),
    /// Send a reproducible workload and report latencies, cache hits and spread.
    Load(LoadArgs),
    /// Print results of several runs side by side.
    Report(ReportArgs),
}

#[derive(Debug, Args)]
pub(crate) struct EngineArgs {
    /// Port; 0 takes a free one.
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// Address to listen on.
    #[arg(long, default_value = "127.0.0.1")]
    host: IpAddr,
    /// Identity in KV events and in the x-worker-id header.
    #[arg(long, default_value_t = 1)]
    worker_id: u64,
    /// Model name.
    #[arg(long, default_value = "sim")]
    model: String,
    /// Tokens per KV cache block.
    #[arg(long, default_value_t = 16)]
    block_size: usize,
    /// Blocks of the KV cache.
    #[arg(long, default_value_t = 3072)]
    blocks: usize,
    /// Microseconds per prompt token that is not cached.
    #[arg(long, default_value_t = 80.0, value_parser = non_negative)]
    prefill_us_per_token: f64,
    /// Tokens computed in one step; longer prefills are chunked.
    #[arg(long, default_value_t = 8192)]
    max_batched_tokens: usize,
    /// Sequences running at once.
    #[arg(long, default_value_t = 256)]
    max_seqs: usize,
    /// Milliseconds of a step before anything is computed.
    #[arg(long, default_value_t = 6.0, value_parser = non_negative)]
    step_ms: f64,
    /// Microseconds a step takes per decoding sequence.
    #[arg(long, default_value_t = 100.0, value_parser = non_negative)]
    decode_us_per_seq: f64,
    /// Steps take no time.
    #[arg(long)]
    instant: bool,
    /// The engine's own KV events: tcp://HOST:PORT to publish over ZMQ (port 0 takes a free one),
    /// http://HOST:PORT/v1/events to post them to the router, poll to keep them for
    /// POST /kv_cache_events.
    #[arg(long, value_parser = own_events)]
    events: Option<Own>,
    /// tcp://HOST:PORT for replays of what was published over ZMQ.
    #[arg(long, requires = "events")]
    replay: Option<String>,
    /// How the engine writes its own events over ZMQ.
    #[arg(long, value_enum, default_value_t = DialectName::Vllm)]
    dialect: DialectName,
    /// Topic of its own events over ZMQ.
    #[arg(long, default_value = "kv-events")]
    topic: String,
    /// Messages kept for replays, or events kept to be polled.
    #[arg(long, default_value_t = 10_000)]
    event_buffer: usize,
    /// File with the token to post events with.
    #[arg(long, requires = "events")]
    token_file: Option<PathBuf>,
    /// Numbers of ZMQ messages that are not sent, separated by commas.
    #[arg(long, value_delimiter = ',')]
    drop_messages: Vec<u64>,
    /// Write block hashes over ZMQ as 32 bytes.
    #[arg(long)]
    bytes_hashes: bool,
    /// Write batches over ZMQ without their rank.
    #[arg(long)]
    short_batches: bool,
    /// NATS server for KV events, such as nats://127.0.0.1:4222; without it none are published.
    #[arg(long)]
    nats: Option<String>,
    /// How KV events are written.
    #[arg(long, value_enum, default_value_t = EncodingName::Dynamo)]
    encoding: EncodingName,
    /// Namespace in the subject of the dynamo encoding.
    #[arg(long, default_value = "dynamo")]
    namespace: String,
    /// Component in the subject of the dynamo encoding.
    #[arg(long, default_value = "backend")]
    component: String,
    /// Endpoint in the subject of the dynamo encoding.
    #[arg(long, default_value = "generate")]
    endpoint: String,
    /// Subject of the json encoding; requests on SUBJECT.snapshot are answered with the cache.
    #[arg(long, default_value = "kv-events.{worker_id}")]
    json_subject: String,
    /// Blocks of FlexKV's host memory; with it or --flexkv-ssd-blocks, FlexKV is under the cache.
    #[arg(long, default_value_t = 0)]
    flexkv_cpu_blocks: usize,
    /// Blocks of FlexKV's disk.
    #[arg(long, default_value_t = 0)]
    flexkv_ssd_blocks: usize,
    /// Microseconds to load a block from host memory.
    #[arg(long, default_value_t = 100.0, value_parser = non_negative)]
    flexkv_cpu_us_per_block: f64,
    /// Microseconds to load a block from disk.
    #[arg(long, default_value_t = 800.0, value_parser = non_negative)]
    flexkv_ssd_us_per_block: f64,
}

/// Where an engine's own events go.
#[derive(Clone, Debug)]
enum Own {
    Zmq(String),
    Http(String),
    Poll,
}

fn own_events(text: &str) -> Result<Own, String> {
    match text {
        "poll" => Ok(Own::Poll),
        _ if text.starts_with("tcp://") => Ok(Own::Zmq(text.to_owned())),
        _ if text.starts_with("http://") => Ok(Own::Http(text.to_owned())),
        _ => Err(format!("{text:?} is neither tcp://, http:// nor poll")),
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DialectName {
    /// vLLM, events as maps.
    Vllm,
    /// An earlier vLLM, events as lists.
    VllmLists,
    /// SGLang, short lists and signed hashes.
    Sglang,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum EncodingName {
    /// Dynamo's event plane: MessagePack envelopes.
    Dynamo,
    /// JSON arrays of events, with snapshots.
    Json,
}

#[derive(Debug, Args)]
pub(crate) struct LoadArgs {
    /// Base URL of the endpoint.
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    url: String,
    /// Model name in the requests.
    #[arg(long, default_value = "sim")]
    model: String,
    /// Generated workload.
    #[arg(long, value_enum, default_value_t = WorkloadName::Agents, conflicts_with = "trace")]
    workload: WorkloadName,
    /// Replay a trace in Mooncake's schema, at its own times unless a rate or concurrency is given.
    #[arg(long)]
    trace: Option<PathBuf>,
    /// Factor on the trace's time; 10 replays ten times as fast.
    #[arg(long, default_value_t = 1.0, value_parser = positive, requires = "trace")]
    speed: f64,
    /// Factor on the trace's prompt and output lengths.
    #[arg(long, default_value_t = 1.0, value_parser = positive, requires = "trace")]
    length_scale: f64,
    /// Requests taken from the trace; all of it where not given.
    #[arg(long, requires = "trace")]
    limit: Option<usize>,
    /// Requests of a generated workload.
    #[arg(long, default_value_t = 1500, conflicts_with = "trace")]
    requests: usize,
    /// Seed of the workload: the same seed sends the same bytes in the same order.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Open loop: mean requests a second, Poisson arrivals; 10 for a generated workload where
    /// neither this nor a concurrency is given.
    #[arg(long, value_parser = positive, conflicts_with_all = ["concurrency", "speed"])]
    rate: Option<f64>,
    /// Closed loop: requests in flight.
    #[arg(long, conflicts_with = "speed")]
    concurrency: Option<usize>,
    /// How prompts are written.
    #[arg(long, value_enum, default_value_t = FormatName::Tokens)]
    format: FormatName,
    /// Seconds one request may take.
    #[arg(long, default_value_t = 600.0, value_parser = positive)]
    timeout_s: f64,
    /// Name of the run in tables; the workload where not given.
    #[arg(long)]
    label: Option<String>,
    /// File for the results as JSON.
    #[arg(long)]
    pub(crate) json: Option<PathBuf>,
    /// Failed requests past which the exit code is not 0.
    #[arg(long, default_value_t = 0)]
    pub(crate) max_failures: u64,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum WorkloadName {
    /// 48 shared system prompts of about 2,500 tokens, multi-turn.
    Agents,
    /// Prompts that share nothing.
    Unique,
    /// 64 requests at once over 24 prefixes.
    Burst,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum FormatName {
    /// Token ids.
    Tokens,
    /// A text of one word per token.
    Text,
}

#[derive(Debug, Args)]
pub(crate) struct ReportArgs {
    /// Files written by `kv-sim load --json`.
    #[arg(required = true)]
    pub(crate) files: Vec<PathBuf>,
}

/// Requests a second where nothing is said.
const DEFAULT_RATE: f64 = 10.0;

impl EngineArgs {
    fn own(&self) -> anyhow::Result<Option<OwnEvents>> {
        Ok(match &self.events {
            None => None,
            Some(Own::Poll) => Some(OwnEvents::Poll {
                buffer: self.event_buffer,
            }),
            Some(Own::Http(url)) => {
                let mut settings = kv_publisher::Settings::new(url, self.worker_id);
                if let Some(file) = &self.token_file {
                    settings.token = Some(std::fs::read_to_string(file)?.trim().to_owned());
                }
                Some(OwnEvents::Http(settings))
            }
            Some(Own::Zmq(listen)) => Some(OwnEvents::Zmq(Zmq {
                listen: listen.clone(),
                replay: self.replay.clone(),
                topic: self.topic.clone(),
                buffer: self.event_buffer,
                dialect: match self.dialect {
                    DialectName::Vllm => Dialect::VllmMaps,
                    DialectName::VllmLists => Dialect::VllmLists,
                    DialectName::Sglang => Dialect::Sglang,
                },
                faults: Faults {
                    drop: self.drop_messages.iter().copied().collect(),
                    bytes_hashes: self.bytes_hashes,
                    short_batches: self.short_batches,
                },
            })),
        })
    }

    pub(crate) fn config(self) -> anyhow::Result<Config> {
        let own = self.own()?;
        let encoding = match self.encoding {
            EncodingName::Dynamo => Encoding::Dynamo {
                namespace: self.namespace,
                component: self.component,
                endpoint: self.endpoint,
            },
            EncodingName::Json => Encoding::Json {
                subject: self.json_subject,
            },
        };
        let level = |blocks, us: f64| {
            let load_per_block = Duration::try_from_secs_f64(us / 1e6)?;
            anyhow::Ok(LevelConfig {
                blocks,
                load_per_block,
            })
        };
        let flexkv = flexkv::Config {
            cpu: level(self.flexkv_cpu_blocks, self.flexkv_cpu_us_per_block)?,
            ssd: level(self.flexkv_ssd_blocks, self.flexkv_ssd_us_per_block)?,
        };
        let offloads = flexkv.cpu.blocks + flexkv.ssd.blocks > 0;
        Ok(Config {
            listen: SocketAddr::new(self.host, self.port),
            worker_id: self.worker_id,
            model: self.model,
            blocks: self.blocks,
            limits: Limits {
                block_size: self.block_size,
                max_batched_tokens: self.max_batched_tokens,
                max_seqs: self.max_seqs,
                step: Duration::try_from_secs_f64(self.step_ms / 1e3)?,
                prefill_per_token: Duration::try_from_secs_f64(self.prefill_us_per_token / 1e6)?,
                decode_per_seq: Duration::try_from_secs_f64(self.decode_us_per_seq / 1e6)?,
            },
            instant: self.instant,
            events: self.nats.map(|url| EventPlane { url, encoding }),
            own,
            flexkv: offloads.then_some(flexkv),
        })
    }
}

impl LoadArgs {
    pub(crate) fn options(&self) -> Options {
        let pace = match (self.concurrency, self.rate, &self.trace) {
            (Some(open), _, _) => Pace::Concurrency(open),
            (_, Some(rate), _) => Pace::Rate(rate),
            (_, _, Some(_)) => Pace::Trace,
            (_, _, None) => Pace::Rate(DEFAULT_RATE),
        };
        let (workload, requests) = match (&self.trace, self.workload) {
            (Some(file), _) => (
                Workload::Trace {
                    file: file.clone(),
                    speed: self.speed,
                    length_scale: self.length_scale,
                },
                self.limit.unwrap_or(usize::MAX),
            ),
            (None, WorkloadName::Agents) => (Workload::Agents, self.requests),
            (None, WorkloadName::Unique) => (Workload::Unique, self.requests),
            (None, WorkloadName::Burst) => (Workload::Burst, self.requests),
        };
        Options {
            url: self.url.clone(),
            model: self.model.clone(),
            label: self.label.clone().unwrap_or_else(|| workload.name()),
            workload,
            seed: self.seed,
            requests,
            pace,
            format: match self.format {
                FormatName::Tokens => Format::Tokens,
                FormatName::Text => Format::Text,
            },
            timeout: Duration::from_secs_f64(self.timeout_s),
        }
    }
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value <= 1e9 => Ok(value),
        _ => Err(format!("{text:?} is not a number above 0")),
    }
}

fn non_negative(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if (0.0..=1e9).contains(&value) => Ok(value),
        _ => Err(format!("{text:?} is not a number from 0 up")),
    }
}
