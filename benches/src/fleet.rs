//! NATS, a sidecar from the release build, and any number of Envoys on it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use kv_tests::client::Client;
use kv_tests::envoy::Envoy;
use kv_tests::nats::Nats;
use kv_tests::place;
use kv_tests::process::Process;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

/// Longest wait for an index to take what it was sent.
const LIMIT: Duration = Duration::from_secs(60);

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// Where the workers listen; ids count from 1.
    pub workers: &'a [SocketAddr],
    /// `kv`, `round-robin` or `random`.
    pub mode: &'a str,
    /// Whether answers carry the decision record.
    pub decision_header: bool,
    /// Folder of the model whose texts are read.
    pub tokenizer: Option<&'a Path>,
}

/// The running parts.
#[derive(Debug)]
pub struct Fleet {
    /// The sidecar.
    pub sidecar: Process,
    /// NATS.
    pub nats: Nats,
    /// A client for admin requests.
    pub client: Client,
    admin: u16,
    bootstrap: Value,
    dir: TempDir,
}

/// The sidecar: `KV_ROUTER`, or that of the build this bench is from.
fn kv_router() -> anyhow::Result<PathBuf> {
    let path = match std::env::var_os("KV_ROUTER") {
        Some(path) => PathBuf::from(path),
        None => std::env::current_exe()?.with_file_name("kv-router"),
    };
    ensure!(
        path.exists(),
        "{}: run cargo build --release -p kv-router",
        path.display()
    );
    Ok(path)
}

impl Fleet {
    /// Starts NATS and a sidecar with an empty index.
    ///
    /// # Errors
    /// When something doesn't start.
    pub async fn start(options: Options<'_>) -> anyhow::Result<Self> {
        Self::start_with(options, json!({})).await
    }

    /// The same with further configuration keys, which go before all others.
    ///
    /// # Errors
    /// When something doesn't start.
    pub async fn start_with(options: Options<'_>, more: Value) -> anyhow::Result<Self> {
        // Unix socket paths are short: not below the workspace.
        let dir = tempfile::Builder::new().prefix("kvb").tempdir()?;
        let nats = Nats::start(dir.path()).await;
        let [port, admin, envoy_admin] = [(); 3].map(|()| place::free_port());
        let workers = options.workers.iter().zip(1_u64..);
        let workers = workers.map(|(address, id)| json!({"id": id, "endpoint": address}));
        let mut config = json!({
            "http_port": port,
            "http_host": "127.0.0.1",
            "admin": format!("127.0.0.1:{admin}"),
            "envoy_admin": format!("127.0.0.1:{envoy_admin}"),
            "socket": dir.path().join("bridge.sock"),
            "state_dir": dir.path().join("state"),
            "filter_wasm": place::filter(),
            "nats": {
                "url": nats.url(),
                "dynamo": {"namespace": "dynamo", "component": "backend"},
            },
            "decision_header": options.decision_header,
            "router_mode": options.mode,
            "workers": workers.collect::<Vec<_>>(),
        });
        if let (Some(all), Value::Object(more)) = (config.as_object_mut(), more) {
            all.extend(more);
        }
        if let Some(folder) = options.tokenizer {
            config["tokenizer"] = json!({"path": folder});
        }
        let file = dir.path().join("kv-router.yaml");
        std::fs::write(&file, config.to_string())?;
        let kv_router = kv_router()?;
        let printed = Command::new(&kv_router)
            .arg("envoy")
            .arg("--config")
            .arg(&file)
            .output()?;
        ensure!(
            printed.status.success(),
            "{}",
            String::from_utf8_lossy(&printed.stderr)
        );
        let bootstrap = serde_saphyr::from_str(std::str::from_utf8(&printed.stdout)?)?;
        let mut serve = Command::new(&kv_router);
        serve
            .arg("serve")
            .arg("--config")
            .arg(&file)
            .env("RUST_LOG", "warn");
        let sidecar = Process::start(&mut serve, &dir.path().join("kv-router.log"));
        let client = Client::default();
        let fleet = Self {
            sidecar,
            nats,
            client,
            admin,
            bootstrap,
            dir,
        };
        fleet
            .wait("the sidecar", |index| index["ready"] == true)
            .await?;
        Ok(fleet)
    }

    /// Starts an Envoy beside those there are; it may be changed before. Waits until it holds all
    /// pages, if it has the filter.
    ///
    /// # Errors
    /// When it doesn't start or isn't brought up to date.
    pub async fn envoy(
        &self,
        threads: u32,
        change: impl FnOnce(&mut Value),
    ) -> anyhow::Result<Envoy> {
        let before = processes(&self.index().await?);
        let [port, admin] = [(); 2].map(|()| place::free_port());
        let mut bootstrap = self.bootstrap.clone();
        bootstrap["admin"]["address"]["socket_address"]["port_value"] = json!(admin);
        let listener = &mut bootstrap["static_resources"]["listeners"][0];
        listener["address"]["socket_address"]["port_value"] = json!(port);
        // Histograms are merged when they are asked for, not every few seconds.
        bootstrap["stats_flush_on_admin"] = json!(true);
        change(&mut bootstrap);
        let dir = self.dir.path().join(format!("envoy-{port}"));
        std::fs::create_dir(&dir)?;
        let file = dir.join("envoy.json");
        std::fs::write(&file, bootstrap.to_string())?;
        let envoy = Envoy::start(&dir, &file, threads, port, admin).await;
        if bootstrap.to_string().contains("config_discovery") {
            let synced = |index: &Value| {
                let is_there = processes(index).iter().any(|p| !before.contains(p));
                is_there && index["settled"] == true
            };
            self.wait("Envoy", synced).await?;
        }
        Ok(envoy)
    }

    /// Answer of `/v1/index`.
    ///
    /// # Errors
    /// When the sidecar doesn't answer.
    pub async fn index(&self) -> anyhow::Result<Value> {
        self.client
            .get(self.admin, "/v1/index")
            .await
            .map_err(anyhow::Error::msg)
    }

    /// A sample of the sidecar's metrics.
    ///
    /// # Errors
    /// When there is none of this name.
    pub async fn metric(&self, name: &str) -> anyhow::Result<f64> {
        let samples = self.samples(name).await?;
        samples
            .first()
            .map(|(_, value)| *value)
            .with_context(|| format!("no metric {name}"))
    }

    /// Samples of the sidecar's metrics whose names begin like this, with the rest of the name.
    ///
    /// # Errors
    /// When the sidecar doesn't answer.
    pub async fn samples(&self, name: &str) -> anyhow::Result<Vec<(String, f64)>> {
        let text = kv_tests::client::raw(
            self.admin,
            &[b"GET /metrics HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n"],
            |_| false,
        )
        .await;
        ensure!(text.starts_with("HTTP/1.1 200"), "{text}");
        let sample = |line: &str| {
            let (key, value) = line.rsplit_once(' ')?;
            Some((key.strip_prefix(name)?.to_owned(), value.parse().ok()?))
        };
        Ok(text.lines().filter_map(sample).collect())
    }

    /// Waits until this many events have been applied.
    ///
    /// # Errors
    /// When they aren't in a minute.
    pub async fn applied(&self, events: u64) -> anyhow::Result<()> {
        self.wait("events", |index| applied(index) >= events)
            .await?;
        Ok(())
    }

    /// Waits until this many events have been applied and every Envoy, if there is one, holds what
    /// they changed.
    ///
    /// # Errors
    /// When they aren't in a minute.
    pub async fn settled(&self, events: u64) -> anyhow::Result<()> {
        let quiet = |index: &Value| {
            let is_alone = processes(index).is_empty() && index["stats"]["dirty_pages"] == 0;
            is_alone || index["settled"] == true
        };
        let done = |index: &Value| applied(index) >= events && quiet(index);
        let index = self.wait("the index", done).await?;
        ensure!(index["gaps"] == 0, "events were lost: {index}");
        Ok(())
    }

    async fn wait(&self, what: &str, done: impl Fn(&Value) -> bool) -> anyhow::Result<Value> {
        let start = Instant::now();
        loop {
            match self.index().await {
                Ok(index) if done(&index) => return Ok(index),
                other if start.elapsed() > LIMIT => bail!("waited in vain for {what}: {other:?}"),
                _ => sleep(Duration::from_millis(3)).await,
            }
        }
    }
}

/// Nonces of the Envoys being fed.
fn processes(index: &Value) -> Vec<u64> {
    let list = index["subscribers"].as_array().into_iter().flatten();
    list.filter_map(|s| s["process"].as_u64()).collect()
}

/// Events of all planes and kinds.
fn applied(index: &Value) -> u64 {
    let planes = index["planes"].as_object().into_iter().flatten();
    let kinds = planes
        .filter_map(|(_, plane)| plane["events"].as_object())
        .flatten();
    kinds.filter_map(|(_, n)| n.as_u64()).sum()
}
