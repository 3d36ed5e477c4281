//! Configuration: one YAML file, over it `DYN_*` variables, over them flags.
//!
//! The file's structs give serde its fields and the JSON Schema its rules. A file is held against
//! the schema first, then its offending nodes are cut away and the rest is checked for sense, so
//! that everything wrong is reported at once.

mod check;
mod compat;
mod dynamo;
mod effective;
mod error;
mod events;
mod file;
mod guide;
mod layer;
mod lines;
mod queue;
mod restart;
mod schema;
mod setting;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use kv_core::affinity::Affinity;
use kv_core::handover::Handover;
use kv_core::id::{Device, OwnerId, Role, WorkerId};
use kv_core::policy::Policy;
use kv_core::queue::{Profile, Refusing, Thresholds};
use kv_core::table::{Metadata, Settings};
use kv_core::text::Budget;
use serde::Serialize;
use serde_json::{Value, json};

use crate::ingest::engine::{self, media::Media};
use crate::ingest::subject::Template;
use crate::load;

pub use effective::{Effective, From, Key};
pub use error::{ConfigErrors, Problem};
pub use events::{Events, FamilyUse, Socket, ZmqAddress};
pub use file::{AddressFamily, CachePolicy, EngineFace, File, Tls};
pub use guide::dynamo_settings;
pub use layer::{Layer, Note, Origin};
pub use restart::{Restart, restart};
pub use schema::schema;
pub use setting::{Flags, from_environment};

/// Name of the one pool of the short form.
pub const DEFAULT_POOL: &str = "default";

/// A configuration that makes sense.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Where Envoy listens.
    pub listen: SocketAddr,
    /// Where the sidecar's HTTP API listens.
    pub admin: SocketAddr,
    /// File with the token by which other machines may ask it for content.
    pub admin_token_file: Option<PathBuf>,
    /// Other sidecars' HTTP APIs, to take the index over from.
    pub peers: Vec<http::Uri>,
    /// Envoy's admin interface.
    pub envoy_admin: SocketAddr,
    /// Unix socket of the bridge.
    pub socket: PathBuf,
    /// Folder for snapshot and Envoy's files.
    pub state_dir: Option<PathBuf>,
    /// The filter's module.
    pub filter_wasm: PathBuf,
    /// Where events come from.
    pub nats: Option<Nats>,
    /// Where the select service listens.
    pub select: Option<Api>,
    /// Where the standalone indexer listens.
    pub indexer: Option<Api>,
    /// `host:port` of the sockets of Dynamo's event plane over ZMQ.
    pub dynamo_zmq: Vec<String>,
    /// Most bytes a second of a worker's own stream of events.
    pub event_bytes_per_second: u64,
    /// Memory of the index, in bytes.
    pub index_bytes: usize,
    /// Memory of the pages in each Envoy, in bytes.
    pub page_bytes: usize,
    /// How load is tracked.
    pub load: load::Settings,
    /// Whether workers that fail are left out.
    pub eject_workers: bool,
    /// Share of a pool's workers that stay though they fail.
    pub eject_floor: f64,
    /// How workers are asked whether they are well, if they are.
    pub health_check: Option<HealthCheck>,
    /// Which workers may register at run time, if any.
    pub registration: Option<Registration>,
    /// Workers that have to be there before the sidecar counts as ready for the first time.
    pub min_initial_workers: u32,
    /// What holds for all pools.
    pub settings: Settings,
    /// The pools, at least one; the first serves requests that name no known model.
    pub pools: Vec<Pool>,
    /// What it was made of, with the layers in it.
    file: File,
}

/// How workers are asked whether they are well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// Path of a GET.
    pub path: String,
    /// Time between two, milliseconds.
    pub interval_ms: u64,
    /// How long an answer may take, milliseconds.
    pub timeout_ms: u64,
    /// Bad answers in a row after which a worker is left out.
    pub unwell_after: u32,
}

/// Workers that may register at run time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registration {
    /// Networks inside which their addresses must be.
    pub networks: Vec<ipnet::IpNet>,
    /// How many there may be.
    pub max_workers: usize,
    /// How long one counts that does not say for how long, milliseconds.
    pub ttl_ms: u64,
    /// The longest that one may ask for, milliseconds.
    pub max_ttl_ms: u64,
}

/// An HTTP interface on a port of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Api {
    /// Where it listens.
    pub listen: SocketAddr,
    /// File with the token that clients show.
    pub token_file: Option<PathBuf>,
}

/// A NATS server and the planes to read there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nats {
    /// Its URLs.
    pub urls: Vec<String>,
    /// Dynamo's event plane.
    pub dynamo: Option<DynamoPlane>,
    /// Subject of plain JSON events.
    pub json: Option<Template>,
    /// JetStream stream that keeps them; they are read from there.
    pub json_stream: Option<String>,
    /// Subject on which workers register.
    pub workers: Option<Box<Template>>,
    /// Whether load is exchanged with other sidecars and Dynamo's routers; needs `dynamo`.
    pub replica_sync: bool,
    /// Credentials file.
    pub credentials_file: Option<PathBuf>,
    /// File with an nkey seed.
    pub nkey_seed_file: Option<PathBuf>,
    /// TLS settings.
    pub tls: Option<Tls>,
}

impl Nats {
    /// A server with nothing to read, without credentials; several URLs are separated by commas.
    #[must_use]
    pub fn at(url: &str) -> Self {
        Self {
            urls: url.split(',').map(|one| one.trim().to_owned()).collect(),
            dynamo: None,
            json: None,
            json_stream: None,
            workers: None,
            replica_sync: false,
            credentials_file: None,
            nkey_seed_file: None,
            tls: None,
        }
    }
}

/// A component of Dynamo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DynamoPlane {
    /// Dynamo namespace.
    pub namespace: String,
    /// Dynamo component.
    pub component: String,
}

/// Workers that serve the same models.
#[derive(Clone, Debug, PartialEq)]
pub struct Pool {
    /// Name, unique.
    pub name: String,
    /// Model names served.
    pub models: Vec<String>,
    /// LoRA adapters.
    pub lora_adapters: Vec<String>,
    /// Tokens to a block.
    pub block_size: u32,
    /// How a worker is chosen.
    pub policy: Policy,
    /// Whether KV events of its workers are indexed; otherwise their blocks are predicted.
    pub kv_events: bool,
    /// How long a predicted block is believed in, milliseconds.
    pub ttl_ms: u64,
    /// What predicted blocks are forgotten by.
    pub cache_policy: CachePolicy,
    /// How long a block of a routed prompt is believed in beside events, milliseconds; `None` for
    /// not at all.
    pub predicted_ttl_ms: Option<u64>,
    /// Tiers by the names of media that engines use.
    pub media: Media,
    /// Hash families of events without token ids.
    pub families: Vec<FamilyUse>,
    /// The model's placeholder token of images, where requests have it replaced.
    pub image_token: Option<u32>,
    /// Whether any client's privileged hints count.
    pub trusts_hints: bool,
    /// Addresses whose privileged hints count.
    pub trusted_sources: Vec<IpNet>,
    /// How sessions are kept together.
    pub affinity: Option<Affinity>,
    /// Requests on a worker with an accelerator for each on one without.
    pub device_ratio: u32,
    /// How requests wait while all workers are busy.
    pub queue: Option<Profile>,
    /// Past which load a worker takes no requests.
    pub overload: Thresholds,
    /// How requests are refused because of load.
    pub refusing: Refusing,
    /// How long the share of a worker grows that joins, milliseconds.
    pub slow_start_ms: u32,
    /// How prompts that are text are read.
    pub tokenizer: Option<Tokenizer>,
    /// The workers.
    pub workers: Vec<Worker>,
    /// Names that stand for further workers.
    pub dns: Vec<Dns>,
    /// Routing group, of a pool that workers registered for at run time. No request is routed to it.
    pub routing_group: Option<String>,
}

impl Pool {
    /// Whether events or prompts come to other blocks in `next`.
    #[must_use]
    pub fn reads_otherwise(&self, next: &Self) -> bool {
        let settings = engine::Settings::of;
        self.kv_events != next.kv_events || settings(self) != settings(next)
    }
}

/// How prompts that are text are read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokenizer {
    /// Who knows.
    pub from: TokenizerFrom,
    /// Bytes of token ids that are remembered.
    pub cache_bytes: u64,
    /// How long reading may take.
    pub budget: Budget,
    /// How workers get the token ids.
    pub handover: Handover,
}

/// Who knows the token ids of a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenizerFrom {
    /// The model's folder.
    Folder(PathBuf),
    /// The pool's workers.
    Engine(EngineFace),
}

/// A DNS name that stands for workers.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Dns {
    /// The name.
    pub name: String,
    /// Where the workers take requests.
    pub port: u16,
    /// Which addresses count.
    pub family: AddressFamily,
    /// Time between lookups.
    pub refresh: Duration,
    /// Data-parallel ranks of each.
    pub ranks: u32,
    /// What each is said to be.
    pub metadata: Metadata,
    /// Port of rank 0's socket of events.
    pub zmq_port: Option<u16>,
    /// Port of rank 0's socket of replays.
    pub zmq_replay_port: Option<u16>,
}

/// How a worker came to be known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// The configuration file names it.
    #[default]
    File,
    /// It registered, under a lease.
    Registered,
    /// A DNS name stands for it.
    Dns,
    /// It registered with the standalone indexer, to be indexed alone.
    Indexer,
}

/// One engine instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Worker {
    /// Its id, unique over all pools.
    pub id: WorkerId,
    /// Where it takes requests, unique over all pools; `None` for one that registered to be indexed
    /// alone.
    pub endpoint: Option<SocketAddr>,
    /// What it does.
    pub role: Role,
    /// What it computes with.
    pub device: Device,
    /// Its data-parallel ranks.
    pub ranks: u32,
    /// What it is said to be.
    pub metadata: Metadata,
    /// Whether it is to get no more requests.
    pub draining: bool,
    /// How it came to be known.
    pub source: Source,
    /// The stream of events that it publishes itself.
    pub events: Option<Events>,
}

impl Worker {
    /// One owner to a rank.
    pub fn owners(&self) -> impl Iterator<Item = OwnerId> + use<> {
        let worker = self.id;
        (0..self.ranks).map(move |rank| OwnerId { worker, rank })
    }
}

/// A worker by itself, as the file would have it.
///
/// # Errors
/// Everything that is wrong with it.
pub fn worker(said: &Value) -> Result<Worker, ConfigErrors> {
    let mut root = json!({"pools": [{"name": DEFAULT_POOL, "workers": [said]}]});
    let problems = schema::prune(&mut root);
    let problems = problems.into_iter().map(Problem::of_worker).collect();
    let file: Result<File, _> = serde_json::from_value(root);
    let file = file.map_err(|e| ConfigErrors::from(Problem::Syntax { why: e.to_string() }))?;
    check::worker(&file, problems)
}

impl Config {
    /// Reads a file and puts the layers over it, the last one on top.
    ///
    /// # Errors
    /// Everything that is wrong, each with its key path and the offending value.
    pub fn load(file: &Path, layers: &[Layer]) -> Result<Self, ConfigErrors> {
        Self::parse(&read(file)?, layers)
    }

    /// Reads YAML text and puts the layers over it, the last one on top.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str, layers: &[Layer]) -> Result<Self, ConfigErrors> {
        let mut root = layer::parse(text)?;
        for layer in layers {
            layer.put(&mut root);
        }
        let mut problems = schema::prune(&mut root);
        problems.extend(layers.iter().filter_map(Layer::refusal));
        problems.extend(layer::to_long_form(&mut root));
        compat::put(&mut root);
        match serde_json::from_value::<File>(root) {
            Ok(file) => check::check(&file, problems, layers),
            Err(e) => {
                // The schema and serde are generated from the same structs; what one refuses and
                // the other lets pass still has to be told.
                problems.push(Problem::Syntax { why: e.to_string() });
                Err(ConfigErrors::new(problems, layers))
            }
        }
    }

    /// The workers of all pools.
    pub fn workers(&self) -> impl Iterator<Item = &Worker> {
        self.pools.iter().flat_map(|pool| &pool.workers)
    }

    /// Takes a worker into a pool, unless there is no such pool or its id or endpoint is taken.
    pub fn admit(&mut self, pool: &str, worker: Worker) {
        let is_same = |other: &Worker| {
            let has_its_place = worker.endpoint.is_some() && other.endpoint == worker.endpoint;
            other.id == worker.id || has_its_place
        };
        if self.workers().any(is_same) {
            return;
        }
        if let Some(pool) = self.pools.iter_mut().find(|p| p.name == pool) {
            pool.workers.push(worker);
        }
    }

    /// Whether some pool trusts clients by their addresses.
    #[must_use]
    pub fn trusts_sources(&self) -> bool {
        let mut pools = self.pools.iter();
        pools.any(|pool| !pool.trusted_sources.is_empty())
    }

    /// `next`, as far as a running sidecar can take it over, and the keys that need a restart.
    ///
    /// # Errors
    /// When what is taken over doesn't go with what stays.
    pub fn reloaded(&self, next: &Self) -> Result<(Self, Vec<String>), ConfigErrors> {
        let syntax = |why: String| ConfigErrors::from(Problem::Syntax { why });
        let (file, kept) = restart::taken_over(&self.file, &next.file).map_err(syntax)?;
        let config = check::check(&file, Vec::new(), &[])?;
        let is_short = next.file.is_short();
        let shown = |path: String| match path.strip_prefix("pools[0].") {
            Some(key) if is_short => key.to_owned(),
            _ => path,
        };
        Ok((config, kept.into_iter().map(shown).collect()))
    }
}

fn read(file: &Path) -> Result<String, ConfigErrors> {
    std::fs::read_to_string(file).map_err(|e| {
        ConfigErrors::from(Problem::Unreadable {
            file: file.into(),
            why: e.to_string(),
        })
    })
}
