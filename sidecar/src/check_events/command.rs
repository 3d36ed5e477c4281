//! The arguments of `kv-router check-events`.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use kv_core::id::{DpRank, WorkerId};

use super::live::{self, Door};
use super::{Checker, MAX_FILE_BYTES, Report, suggested_block_size};
use crate::config::{Config, Events, Layer, Nats, Pool, ZmqAddress};
use crate::ingest::engine::Settings;
use crate::ingest::engine::media::Media;
use crate::ingest::subject;

/// Block size where nothing says another one.
const BLOCK_SIZE: u32 = 16;
/// Pause between polls where nothing says another one.
const POLL: Duration = Duration::from_millis(50);

/// Where events come from and what they are held against. With none of `--file`, `--zmq`, `--nats`
/// and `--http` it is the configured door of `--worker`.
#[derive(Debug, clap::Args)]
pub struct Command {
    /// Files with one message each, MessagePack or JSON, taken as one stream in this order.
    #[arg(long = "file", value_name = "FILE", num_args = 1.., group = "source")]
    files: Vec<PathBuf>,
    /// `tcp://host:port` of an engine's PUB socket: rank 0's.
    #[arg(long, value_name = "ENDPOINT", group = "source")]
    zmq: Option<String>,
    /// Topic to subscribe to; empty takes all.
    #[arg(long, requires = "zmq", default_value = "")]
    topic: String,
    /// `tcp://host:port` of the engine's replay socket: what it has is counted.
    #[arg(long, value_name = "ENDPOINT", requires = "zmq")]
    replay: Option<String>,
    /// NATS server, with `--subject`.
    #[arg(long, value_name = "URL", group = "source", requires = "subject")]
    nats: Option<String>,
    /// Subject to subscribe to.
    #[arg(long, requires = "nats")]
    subject: Option<String>,
    /// TensorRT-LLM's `http://host:port/kv_cache_events`. Takes the events away from the router.
    #[arg(long, value_name = "URL", group = "source")]
    http: Option<String>,
    /// How long to watch a door.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// Configuration that says the pool's block size, media and families.
    #[arg(long, env = "KV_ROUTER_CONFIG")]
    config: Option<PathBuf>,
    /// Worker of the configuration; its first pool's settings count without.
    #[arg(long, requires = "config")]
    worker: Option<WorkerId>,
    /// Tokens to a block of the index; else the configuration's, else the smallest that is seen.
    #[arg(long)]
    block_size: Option<u32>,
    /// Data-parallel rank whose socket is watched, and of messages that name none.
    #[arg(long, default_value_t = 0)]
    rank: DpRank,
    /// Prints JSON.
    #[arg(long)]
    pub json: bool,
}

impl Command {
    /// Watches and reports.
    ///
    /// # Errors
    /// When a source can't be read.
    pub fn run(&self, layers: &[Layer]) -> anyhow::Result<Report> {
        let config = self.config(layers)?;
        let pool = config
            .as_ref()
            .map(|config| self.pool(config))
            .transpose()?;
        let mut replay = None;
        let messages = if self.files.is_empty() {
            let door = self.door(config.as_ref(), pool)?;
            let runtime = tokio::runtime::Runtime::new()?;
            let time = Duration::from_secs(self.seconds);
            let (messages, replayed) = runtime.block_on(live::watch(&door, time))?;
            replay = replayed;
            messages
        } else {
            let read = |file: &PathBuf| Ok((None, read(file)?.into()));
            self.files.iter().map(read).collect::<anyhow::Result<_>>()?
        };
        let mut settings = pool.map_or_else(defaults, Settings::of);
        if let Some(size) = self.block_size {
            settings.block_size = size;
        } else if pool.is_none() {
            let messages = messages.iter().map(|(_, bytes)| &**bytes);
            settings.block_size = suggested_block_size(messages).unwrap_or(BLOCK_SIZE);
        }
        let mut checker = Checker::new(settings, self.rank);
        if let Some(replay) = replay {
            checker.replay(replay);
        }
        for (i, (number, bytes)) in messages.iter().enumerate() {
            if let Some(number) = number {
                checker.sequence(*number);
            }
            let file = self.files.get(i).map(|file| file.to_string_lossy());
            checker.message(file.as_deref(), bytes);
        }
        Ok(checker.report())
    }

    fn config(&self, layers: &[Layer]) -> anyhow::Result<Option<Config>> {
        let Some(file) = &self.config else {
            return Ok(None);
        };
        let config = Config::load(file, layers).map_err(|errors| {
            anyhow::anyhow!("{} is not a valid configuration\n{errors}", file.display())
        })?;
        Ok(Some(config))
    }

    fn pool<'c>(&self, config: &'c Config) -> anyhow::Result<&'c Pool> {
        let has_worker = |pool: &&Pool| {
            let mut workers = pool.workers.iter();
            self.worker
                .is_none_or(|id| workers.any(|worker| worker.id == id))
        };
        let pool = config.pools.iter().find(has_worker);
        pool.with_context(|| format!("no worker {}", self.worker.unwrap_or_default()))
    }

    fn door(&self, config: Option<&Config>, pool: Option<&Pool>) -> anyhow::Result<Door> {
        let endpoint = |name, text: &str| {
            let address = ZmqAddress::parse(text);
            address.with_context(|| format!("{name}: must be tcp://host:port, got {text}"))
        };
        if let Some(events) = &self.zmq {
            let replay = self
                .replay
                .as_deref()
                .map(|text| endpoint("--replay", text));
            return self.zmq(
                &endpoint("--zmq", events)?,
                replay.transpose()?.as_ref(),
                &self.topic,
            );
        }
        if let (Some(url), Some(subject)) = (&self.nats, &self.subject) {
            let nats = Nats::at(url);
            let subjects = vec![subject.clone()];
            return Ok(Door::Nats { nats, subjects });
        }
        if let Some(url) = &self.http {
            let url = url.parse().with_context(|| format!("--http: {url}"))?;
            return Ok(Door::Poll { url, every: POLL });
        }
        let worker = pool.and_then(|pool| pool.workers.iter().find(|w| Some(w.id) == self.worker));
        let worker = worker.context(
            "say where the events are: --file, --zmq, --nats, --http, or --config with --worker",
        )?;
        match &worker.events {
            Some(Events::Zmq {
                endpoint,
                topic,
                replay,
            }) => self.zmq(endpoint, replay.as_ref(), topic),
            Some(Events::TrtLlm { url, poll }) => Ok(Door::Poll {
                url: url.clone(),
                every: *poll,
            }),
            Some(Events::Sockets(_)) => anyhow::bail!(
                "worker {} has registered rank by rank: --zmq takes one of its addresses",
                worker.id
            ),
            Some(Events::Http { .. }) => anyhow::bail!(
                "worker {} posts its events to the sidecar: /v1/workers of its admin port says what \
                 became of them, and --file takes a body",
                worker.id
            ),
            None => {
                let nats = config.and_then(|config| config.nats.clone());
                let nats = nats.with_context(|| {
                    format!("worker {} has no events, and there is no nats", worker.id)
                })?;
                let plane = nats.dynamo.iter().flat_map(subject::dynamo);
                let json = nats.json.iter().map(|template| template.of(worker.id));
                let subjects = plane.chain(json).collect();
                Ok(Door::Nats { nats, subjects })
            }
        }
    }

    /// The sockets of the rank.
    fn zmq(
        &self,
        events: &ZmqAddress,
        replay: Option<&ZmqAddress>,
        topic: &str,
    ) -> anyhow::Result<Door> {
        let of_rank = |address: &ZmqAddress| {
            let endpoint = address.of(self.rank);
            endpoint.with_context(|| format!("no port for rank {}", self.rank))
        };
        Ok(Door::Zmq {
            events: of_rank(events)?,
            replay: replay.map(of_rank).transpose()?,
            topic: topic.to_owned(),
        })
    }
}

fn defaults() -> Settings {
    Settings {
        block_size: BLOCK_SIZE,
        media: Media::default(),
        families: Vec::new(),
        image_token: None,
    }
}

/// A file, up to [`MAX_FILE_BYTES`].
fn read(file: &Path) -> anyhow::Result<Vec<u8>> {
    let place = || format!("can't read {}", file.display());
    let mut bytes = Vec::new();
    let opened = std::fs::File::open(file).with_context(place)?;
    opened
        .take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut bytes)
        .with_context(place)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        anyhow::bail!("{} has more than {MAX_FILE_BYTES} bytes", file.display());
    }
    Ok(bytes)
}
