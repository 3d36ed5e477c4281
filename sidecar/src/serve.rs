//! The running sidecar: its tasks, and changes of its configuration.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::bridge::Bridge;
use crate::config::{self, Config, ConfigErrors, Layer};
use crate::envoy::{Files, FilesError, cluster};
use crate::fleet::{self, Fleet};
use crate::index::{Control, Service, state_file};
use crate::indexer::{self, Ask, Registry};
use crate::ingest::doors::Doors;
use crate::ingest::nats;
use crate::ingest::stream::Hall;
use crate::metrics::{Kind, Metrics};
use crate::peers::Link;
use crate::state;
use crate::text::Reader;
use crate::watch::Watch;
use crate::xds::{Assignments, Endpoints};
use crate::{admin, bootstrap, select};

/// Messages of events that wait for the index; a full channel slows the source down.
const ARRIVALS: usize = 256;
/// Anything else that waits for the index.
const CONTROLS: usize = 1024;
/// Requests for snapshots under way, at most one to a worker.
const REQUESTS: usize = 1 << 16;
/// Registrations that wait for the configuration.
const ASKED: usize = 64;
/// Least time between two replacements of trapped VMs: one that was taken for trapped wrongly must
/// not keep Envoy busy.
const REPLACE_PAUSE: Duration = Duration::from_secs(10);
/// How long Envoys may take to have endpoints before the worker table names them.
const ENDPOINTS_TAKEN: Duration = Duration::from_secs(1);
/// How long Envoy may take to have a worker table before its endpoints follow.
const TABLE_WRITTEN: Duration = Duration::from_secs(2);
/// How long tasks may take to end.
const SHUTDOWN: Duration = Duration::from_secs(10);

/// Where the configuration comes from, to read it again.
#[derive(Debug)]
pub struct Source {
    /// The file.
    pub file: PathBuf,
    /// What lies over it.
    pub layers: Vec<Layer>,
    /// Folder for the files Envoy watches, instead of one in the state folder.
    pub envoy_files: Option<PathBuf>,
}

/// Runs until cancelled.
///
/// # Errors
/// When it can't start, or a part of it fails.
pub async fn run(config: Config, source: Source, cancel: CancellationToken) -> anyhow::Result<()> {
    let is_unnamed = |pool: &&config::Pool| pool.models.is_empty() && pool.lora_adapters.is_empty();
    for pool in config.pools.iter().skip(1).filter(is_unnamed) {
        tracing::warn!(
            pool = pool.name,
            "names no models: it serves what a route, listener or trusted client sends there"
        );
    }
    let metrics = Arc::new(Metrics::default());
    let (pools, text_metrics) = (config.pools.clone(), Arc::clone(&metrics));
    let reader = tokio::task::spawn_blocking(move || Reader::load(&pools, text_metrics)).await?;
    let reader = Arc::new(reader.context("can't load a tokenizer")?);
    let bridge = Bridge::bind(&config.socket).await?;
    let listener = tokio::net::TcpListener::bind(config.admin)
        .await
        .with_context(|| format!("can't listen on admin {}", config.admin))?;
    let (fleet, front) = Fleet::restore(&config, Arc::clone(&metrics));
    let served = fleet.over(config.clone());
    let endpoints = Endpoints::default();
    endpoints.publish(fleet::assignments(&served));
    let files = if source.envoy_files.is_some() || config.state_dir.is_some() {
        let files = Files::new(&config, source.envoy_files.clone())?;
        files.write(&served)?;
        Some(files)
    } else {
        tracing::warn!("without state_dir nothing is saved and no files are written for envoy");
        None
    };
    let (arrivals, arrived) = mpsc::channel(ARRIVALS);
    let (control, controlled) = mpsc::channel(CONTROLS);
    let (requests, requested) = mpsc::channel(REQUESTS);
    let (registry, asked) = mpsc::channel(ASKED);
    let state_file = state_file(&config);
    let restored =
        tokio::task::spawn_blocking(move || state::restore(state_file.as_deref())).await?;
    let mut service = Service::new(&served, restored, requests, Arc::clone(&metrics));
    let silence = service.silence();
    let token = match &config.admin_token_file {
        Some(file) => Some(read_token("admin_token_file", file).await?),
        None => None,
    };

    let mut tasks: JoinSet<anyhow::Result<()>> = JoinSet::new();
    let mut stored = None;
    if let Some(settings) = &config.nats {
        let arrivals = arrivals.clone();
        let nats = nats::Source::new(settings, arrivals, requested, Arc::clone(&metrics)).await?;
        stored = nats.stored(settings);
        let cancel = cancel.clone();
        tasks.spawn(async move {
            nats.run(cancel).await;
            Ok(())
        });
    }
    let registering = config.nats.as_ref();
    if let Some((nats, subject)) = registering.and_then(|n| Some((n, n.workers.as_ref()?))) {
        let desk = fleet::subject::Desk::open(nats, subject, front.asks().clone()).await?;
        let cancel = cancel.clone();
        tasks.spawn(async move {
            desk.run(cancel.clone()).await;
            // Without a connection the others go on.
            cancel.cancelled().await;
            Ok(())
        });
    }
    let peers = config.nats.as_ref().filter(|nats| nats.replica_sync);
    if let Some((nats, plane)) = peers.and_then(|nats| Some((nats, nats.dynamo.as_ref()?))) {
        let metrics = Arc::clone(&metrics);
        let (link, out) = Link::new(nats, plane, control.clone(), metrics).await?;
        service = service.with_peers(link.router_id(), out);
        let cancel = cancel.clone();
        tasks.spawn(async move {
            link.run(cancel).await;
            Ok(())
        });
    }
    let hall = Hall {
        arrivals,
        bytes_per_second: config.event_bytes_per_second,
        metrics: Arc::clone(&metrics),
    };
    let mut doors = Doors::new(hall, stored);
    let events = if !service.is_restored() && !config.peers.is_empty() {
        service = service.awaiting_peer();
        Events::AfterPeer(token.clone())
    } else {
        doors.open(&served, service.resumes());
        Events::Open
    };
    let (index_cancel, bridge_cancel) = (cancel.clone(), cancel.clone());
    tasks.spawn(async move {
        service.run(controlled, arrived, index_cancel).await;
        Ok(())
    });
    let (bridge_control, bridge_metrics) = (control.clone(), Arc::clone(&metrics));
    let (bridge_reader, served_endpoints) = (Arc::clone(&reader), endpoints.clone());
    tasks.spawn(async move {
        let served = bridge.run(
            bridge_control,
            bridge_metrics,
            bridge_reader,
            served_endpoints,
            bridge_cancel,
        );
        served.await.context("the bridge's socket failed")
    });
    let api = admin::Admin::new(control.clone(), doors.desk(), Arc::clone(&metrics));
    let app = admin::router(api.with_token(token).with_fleet(front));
    let admin_cancel = cancel.clone();
    tasks.spawn(async move {
        let app = app.into_make_service_with_connect_info::<std::net::SocketAddr>();
        axum::serve(listener, app)
            .with_graceful_shutdown(admin_cancel.cancelled_owned())
            .await
            .context("the admin listener failed")
    });
    if let Some(api) = &config.indexer {
        let token = token_of("indexer", api).await?;
        let face = indexer::Face::new(control.clone(), registry.clone(), token);
        tasks.spawn(serve_api("indexer", api, indexer::router(face), cancel.clone()).await?);
    }
    if let Some(api) = &config.select {
        let token = token_of("select", api).await?;
        let face = select::Face::new(control.clone(), registry, Arc::clone(&metrics), token);
        tasks.spawn(serve_api("select", api, select::router(face), cancel.clone()).await?);
    }
    tracing::info!(admin = %config.admin, socket = %config.socket.display(), "serving");
    let reloader = Reloader {
        config,
        served,
        fleet,
        endpoints,
        registry: Registry::default(),
        asked,
        source,
        files,
        control,
        doors,
        events,
        reader,
        metrics,
        silence,
    };
    let reload_cancel = cancel.clone();
    tasks.spawn(async move {
        tokio::select! {
            () = reload_cancel.cancelled() => {}
            () = reloader.run() => {}
        }
        Ok(())
    });
    supervise(tasks, &cancel).await
}

/// The token of an interface, if it has one.
async fn token_of(key: &str, api: &config::Api) -> anyhow::Result<Option<String>> {
    match &api.token_file {
        Some(file) => Ok(Some(read_token(&format!("{key}.token_file"), file).await?)),
        None => Ok(None),
    }
}

/// An interface, once it listens.
async fn serve_api(
    key: &'static str,
    api: &config::Api,
    app: axum::Router,
    cancel: CancellationToken,
) -> anyhow::Result<impl Future<Output = anyhow::Result<()>> + use<>> {
    let listener = tokio::net::TcpListener::bind(api.listen)
        .await
        .with_context(|| format!("can't listen on {key} {}", api.listen))?;
    Ok(async move {
        axum::serve(listener, app)
            .with_graceful_shutdown(cancel.cancelled_owned())
            .await
            .with_context(|| format!("the listener of {key} failed"))
    })
}

async fn read_token(key: &str, file: &Path) -> anyhow::Result<String> {
    let token = tokio::fs::read_to_string(file).await;
    let token = token.with_context(|| format!("{key} {}", file.display()))?;
    let token = token.trim();
    // Anybody can show an empty one.
    anyhow::ensure!(!token.is_empty(), "{key} {} is empty", file.display());
    Ok(token.to_owned())
}

/// Waits for all tasks; one that ends before its time ends the others.
async fn supervise(
    mut tasks: JoinSet<anyhow::Result<()>>,
    cancel: &CancellationToken,
) -> anyhow::Result<()> {
    let mut outcome = Ok(());
    loop {
        let ended = tokio::select! {
            ended = tasks.join_next() => ended,
            () = after_shutdown(cancel) => {
                tracing::warn!("some tasks did not end in time");
                return outcome;
            }
        };
        match ended {
            None => return outcome,
            Some(Ok(Ok(()))) => {
                if !cancel.is_cancelled() {
                    outcome = outcome.and(Err(anyhow::anyhow!("a task ended unexpectedly")));
                }
            }
            Some(Ok(Err(error))) => outcome = outcome.and(Err(error)),
            Some(Err(error)) => outcome = outcome.and(Err(error.into())),
        }
        cancel.cancel();
    }
}

async fn after_shutdown(cancel: &CancellationToken) {
    cancel.cancelled().await;
    tokio::time::sleep(SHUTDOWN).await;
}

/// A VM has fallen silent, and the last replacement is long enough ago.
async fn silence(silence: &Notify, replaced_at: Option<Instant>) {
    if let Some(at) = replaced_at {
        tokio::time::sleep_until(at + REPLACE_PAUSE).await;
    }
    silence.notified().await;
}

fn refuse(errors: &ConfigErrors) {
    for line in errors.to_string().lines() {
        tracing::error!("configuration refused: {line}");
    }
}

/// Keeps the running sidecar in line with its file.
struct Reloader {
    /// As the file has it.
    config: Config,
    /// With what lies over it at run time.
    served: Config,
    /// Workers that come and go.
    fleet: Fleet,
    /// What Envoys are served of them.
    endpoints: Endpoints,
    /// Workers that are indexed alone.
    registry: Registry,
    asked: mpsc::Receiver<Ask>,
    source: Source,
    files: Option<Files>,
    control: mpsc::Sender<Control>,
    doors: Doors,
    events: Events,
    reader: Arc<Reader>,
    metrics: Arc<Metrics>,
    silence: Arc<Notify>,
}

/// Whether workers' own streams are read.
enum Events {
    /// They are.
    Open,
    /// They will be, from where a peer's index leaves them; the token is for peers.
    AfterPeer(Option<String>),
}

impl Reloader {
    /// Never returns.
    async fn run(mut self) {
        if let Events::AfterPeer(token) = std::mem::replace(&mut self.events, Events::Open) {
            let (config, token) = (&self.config, token.as_deref());
            let taken = bootstrap::take_over(config, token, &self.control, &self.metrics);
            let resumes = taken.await;
            self.doors.open(&self.served, resumes);
        }
        let mut replaced_at = None;
        match Watch::new(&self.source.file) {
            Ok(mut watch) => {
                // It may have changed after it was read and before it was watched.
                let read = Config::load(&self.source.file, &self.source.layers);
                if !read.is_ok_and(|read| read == self.config) {
                    self.reload().await;
                }
                loop {
                    tokio::select! {
                        changed = watch.changed() => match changed {
                            Some(_) => self.reload().await,
                            None => break,
                        },
                        () = silence(&self.silence, replaced_at) => {
                            self.replace_trapped();
                            replaced_at = Some(Instant::now());
                        }
                        Some(ask) = self.asked.recv() => self.answer(ask).await,
                        asks = self.fleet.due() => self.fleet_asked(asks).await,
                    }
                }
                tracing::error!("watching the configuration has failed, changes need a restart");
            }
            Err(error) => {
                tracing::error!(%error, "can't watch the configuration, changes need a restart");
            }
        }
        loop {
            tokio::select! {
                () = silence(&self.silence, replaced_at) => {
                    self.replace_trapped();
                    replaced_at = Some(Instant::now());
                }
                Some(ask) = self.asked.recv() => self.answer(ask).await,
                asks = self.fleet.due() => self.fleet_asked(asks).await,
            }
        }
    }

    /// Workers that take requests come and go.
    async fn fleet_asked(&mut self, asks: Vec<fleet::Ask>) {
        let round = self.fleet.take(&self.config, asks);
        if round.is_changed
            && let Err(error) = self.apply(self.config.clone()).await
        {
            tracing::error!(%error, "can't write envoy's files");
        }
        round.answer();
    }

    /// Workers to be indexed alone come and go. They take no requests, so Envoy's endpoints stay as
    /// they are.
    async fn answer(&mut self, ask: Ask) {
        // Whoever asked may have gone away.
        match ask {
            Ask::Register(asked, reply) => {
                let outcome = self.registry.register(&self.config, asked);
                if outcome.is_ok() {
                    self.registry_changed().await;
                }
                let _ = reply.send(outcome);
            }
            Ask::Unregister(asked, reply) => {
                let outcome = self.registry.unregister(&asked);
                if outcome.is_ok() {
                    self.registry_changed().await;
                }
                let _ = reply.send(outcome);
            }
            Ask::Workers(reply) => {
                let _ = reply.send(self.registry.list(&self.config));
            }
        }
    }

    async fn registry_changed(&mut self) {
        let served = self.over(&self.config);
        self.configure(&served).await;
        self.doors.configure(&served);
        self.served = served;
    }

    /// A configuration with everything that lies over it.
    fn over(&self, config: &Config) -> Config {
        self.registry.over(&self.fleet.over(config.clone()))
    }

    /// Tells the index. The channel says when every Envoy has the table.
    async fn configure(&self, served: &Config) -> Option<oneshot::Receiver<()>> {
        let (written, has_table) = oneshot::channel();
        let config = Arc::new(served.clone());
        let told = Control::Configure { config, written };
        self.control.send(told).await.ok().map(|()| has_table)
    }

    /// A trapped VM lets its thread's requests pass by until the filter's configuration changes.
    fn replace_trapped(&self) {
        let Some(files) = &self.files else {
            tracing::error!("a filter VM has trapped, and there is no filter file to rewrite");
            return;
        };
        let outcome = files.write_filter(&self.config, files.generation() + 1);
        let kind = if outcome.is_ok() {
            "replaced"
        } else {
            "failed"
        };
        self.metrics.revivals.get_or_create(&Kind { kind }).inc();
        match outcome {
            Ok(()) => tracing::error!("a filter VM has trapped, envoy is told to replace it"),
            Err(error) => tracing::error!(%error, "a filter VM has trapped and can't be replaced"),
        }
    }

    async fn reload(&mut self) {
        let kind = match Config::load(&self.source.file, &self.source.layers) {
            Ok(next) => self.take(next).await,
            Err(errors) => {
                refuse(&errors);
                "refused"
            }
        };
        self.metrics.reloads.get_or_create(&Kind { kind }).inc();
        let is_pending = i64::from(kind != "applied");
        self.metrics.configuration_pending.set(is_pending);
    }

    async fn take(&mut self, next: Config) -> &'static str {
        let (next, restart) = match self.config.reloaded(&next) {
            Ok(taken) => taken,
            Err(errors) => {
                refuse(&errors);
                return "refused";
            }
        };
        for key in &restart {
            let why = config::restart(key).map_or("", |(_, why)| why);
            tracing::warn!(
                "configuration: a change of {key} needs a restart and is not applied: {why}"
            );
        }
        if next != self.config
            && let Err(error) = self.apply(next).await
        {
            tracing::error!(%error, "can't write envoy's files");
            return "failed";
        }
        if restart.is_empty() {
            "applied"
        } else {
            "restart_needed"
        }
    }

    /// Envoy knows a joining worker's endpoint before the table names it, and a leaving one's
    /// until no table does.
    async fn apply(&mut self, next: Config) -> Result<(), FilesError> {
        self.fleet.configure(&next);
        let served = self.over(&next);
        let both = fleet::both(&self.served, &served);
        self.write_endpoints(&both)?;
        let version = self.endpoints.publish(both);
        let taken = self.endpoints.taken(version);
        if tokio::time::timeout(ENDPOINTS_TAKEN, taken).await.is_err() {
            tracing::warn!("not every envoy has the endpoints yet, the worker table goes ahead");
        }
        if let Some(has_table) = self.configure(&served).await
            && tokio::time::timeout(TABLE_WRITTEN, has_table)
                .await
                .is_err()
        {
            tracing::warn!("not every envoy has the worker table yet, endpoints go ahead");
        }
        self.doors.configure(&served);
        self.reader.configure(&served);
        let after = fleet::assignments(&served);
        self.config = next;
        self.served = served;
        let written = self.write_endpoints(&after);
        self.endpoints.publish(after);
        written
    }

    fn write_endpoints(&self, assignments: &Assignments) -> Result<(), FilesError> {
        let Some(files) = &self.files else {
            return Ok(());
        };
        for pool in &self.config.pools {
            if let Some(endpoints) = assignments.get(&cluster(&pool.name)) {
                files.write_endpoints(&pool.name, endpoints)?;
            }
        }
        Ok(())
    }
}
