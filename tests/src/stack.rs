//! An installation in one value.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use kv_sim::engine::Engine;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::client::{Client, json_request};
use crate::envoy::{Envoy, bootstrap};
use crate::nats::Nats;
use crate::place;
use crate::sidecar::Sidecar;
use crate::wait;

/// How long load may last after the last request.
pub const IDLE: Duration = Duration::from_secs(15);

/// What to start.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Envoy's worker threads.
    pub threads: u32,
    /// Worker ids and where they listen, in the default pool.
    pub workers: Vec<(u64, SocketAddr)>,
    /// Further configuration keys; `null` takes one out.
    pub more: Value,
}

/// NATS, sidecar and Envoy, started and ready.
#[derive(Debug)]
pub struct Stack {
    /// Envoy.
    pub envoy: Envoy,
    /// The sidecar.
    pub sidecar: Sidecar,
    /// NATS.
    pub nats: Nats,
    /// A client.
    pub client: Client,
    /// The configuration as last written.
    pub config: Value,
    config_file: PathBuf,
    dir: TempDir,
}

impl Stack {
    /// Starts everything and waits until requests are routed by it.
    ///
    /// # Panics
    /// When something doesn't start.
    pub async fn start(setup: &Setup) -> Self {
        // Unix socket paths are short: not below the workspace.
        let dir = tempfile::Builder::new()
            .prefix("kvr")
            .tempdir()
            .expect("a temporary directory");
        let nats = Nats::start(dir.path()).await;
        let [port, admin, envoy_admin] = [(); 3].map(|()| place::free_port());
        let worker = |(id, address): &(u64, SocketAddr)| json!({"id": id, "endpoint": address});
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
                "json_subject": "kv-events.{worker_id}",
            },
            "decision_header": true,
            "workers": setup.workers.iter().map(worker).collect::<Vec<_>>(),
        });
        let (Value::Object(all), Value::Object(more)) = (&mut config, setup.more.clone()) else {
            panic!("further configuration must be a map");
        };
        if more.contains_key("pools") {
            all.remove("workers");
        }
        all.extend(more);
        all.retain(|_, value| !value.is_null());
        let config_file = dir.path().join("kv-router.yaml");
        std::fs::write(&config_file, config.to_string()).expect("a writable directory");
        let sidecar = Sidecar::start(dir.path(), &config_file, admin);
        let bootstrap = bootstrap(dir.path(), &config_file);
        let envoy = Envoy::start(dir.path(), &bootstrap, setup.threads, port, envoy_admin).await;
        sidecar.ready().await;
        let client = Client::default();
        Self {
            envoy,
            sidecar,
            nats,
            client,
            config,
            config_file,
            dir,
        }
    }

    /// Starts one more Envoy on the same sidecar; `change` may alter its filter's configuration.
    ///
    /// # Panics
    /// When it doesn't start.
    pub async fn another_envoy(
        &self,
        name: &str,
        threads: u32,
        change: impl FnOnce(String) -> String,
    ) -> Envoy {
        let (dir, state) = (
            self.dir.path().join(name),
            self.dir.path().join("state/envoy"),
        );
        std::fs::create_dir(&dir).expect("a writable directory");
        let (theirs, ours) = (state.join("ecds.yaml"), dir.join("ecds.yaml"));
        let filter = std::fs::read_to_string(&theirs).expect("the filter's file");
        std::fs::write(&ours, change(filter)).expect("a writable directory");
        let [port, admin] = [(); 2].map(|()| place::free_port());
        let file = self.dir.path().join("envoy.yaml");
        let bootstrap = std::fs::read_to_string(file).expect("a bootstrap");
        let bootstrap = bootstrap
            .replace(&theirs.display().to_string(), &ours.display().to_string())
            .replace(&self.envoy.port.to_string(), &port.to_string())
            .replace(&self.envoy.admin.to_string(), &admin.to_string());
        let file = dir.join("envoy.yaml");
        std::fs::write(&file, bootstrap).expect("a writable directory");
        let envoy = Envoy::start(&dir, &file, threads, port, admin).await;
        let decides = async || {
            let request = http::Request::get(crate::client::uri(port, "/health"));
            let request = request
                .body(http_body_util::Full::default())
                .expect("a request");
            let answer = self.client.send(request).await?;
            let decided = answer.headers().contains_key("x-kv-router-decision");
            if decided {
                Ok(())
            } else {
                Err("no worker table".to_owned())
            }
        };
        wait::until("the worker table", decides).await;
        envoy
    }

    /// Directory of everything it keeps.
    #[must_use]
    pub fn dir(&self) -> &std::path::Path {
        self.dir.path()
    }

    /// Rewrites the configuration file, as an operator or a `ConfigMap` does: by renaming.
    ///
    /// # Panics
    /// When the directory can't be written.
    pub fn configure(&mut self, change: impl FnOnce(&mut Value)) {
        change(&mut self.config);
        let draft = self.dir.path().join("kv-router.yaml.draft");
        std::fs::write(&draft, self.config.to_string()).expect("a writable directory");
        std::fs::rename(&draft, &self.config_file).expect("a writable directory");
    }

    /// Makes these engines the workers, and waits until Envoy has them.
    pub async fn serve(&mut self, engines: &[Engine]) {
        let version = self.table_version().await;
        let worker = |e: &Engine| json!({"id": e.worker_id(), "endpoint": e.address()});
        let workers: Vec<Value> = engines.iter().map(worker).collect();
        self.configure(|config| config["workers"] = workers.into());
        self.table_after(version).await;
    }

    /// Waits until Envoy holds a worker table later than `version`, and returns its version.
    pub async fn table_after(&self, version: u64) -> u64 {
        let newer = async || {
            let index = self.sidecar.index().await?;
            let at = index["table_version"].as_u64().unwrap_or(0);
            let done = at > version && index["settled"] == true;
            if done { Ok(at) } else { Err(index.to_string()) }
        };
        wait::until("the worker table", newer).await
    }

    /// Waits until nothing is booked anywhere: this Envoy's lanes, and lanes, reports, load and
    /// corrections as `/v1/workers?raw` has them.
    ///
    /// # Panics
    /// When that takes more than [`IDLE`].
    pub async fn idle(&self) {
        let mut last = String::new();
        let idle = async {
            self.envoy.idle().await;
            let zero = async || {
                let raw = self
                    .client
                    .get(self.sidecar.admin, "/v1/workers?raw")
                    .await?;
                last = raw.to_string();
                let mut loads = Vec::new();
                collect_loads(&raw, &mut loads);
                let is_idle = loads.iter().all(|n| *n == 0.0);
                if is_idle {
                    Ok(())
                } else {
                    Err(raw.to_string())
                }
            };
            wait::until("no load", zero).await;
        };
        let in_time = tokio::time::timeout(IDLE, idle).await;
        if in_time.is_err() {
            let lanes = self.envoy.stats("kv_router_lane").await;
            panic!("load is left after {IDLE:?}: {lanes:?} {last}");
        }
    }

    /// Version of the worker table.
    pub async fn table_version(&self) -> u64 {
        self.sidecar
            .index()
            .await
            .ok()
            .and_then(|i| i["table_version"].as_u64())
            .unwrap_or(0)
    }

    /// Sends a completion for token ids and returns the answer's body and its decision record.
    ///
    /// # Errors
    /// When there is no answer of 200.
    pub async fn complete(&self, tokens: &[u32]) -> Result<(Value, Value), String> {
        let body = json!({"model": "sim", "prompt": tokens, "max_tokens": 1});
        self.send(&body).await
    }

    /// Sends a completion request and returns the answer's body and its decision record.
    ///
    /// # Errors
    /// When there is no answer of 200.
    pub async fn send(&self, body: &Value) -> Result<(Value, Value), String> {
        let request = json_request(self.envoy.port, "/v1/completions", body);
        let answer = self
            .client
            .send(request.map_err(|e| e.to_string())?)
            .await?;
        let text = String::from_utf8_lossy(answer.body()).into_owned();
        if !answer.status().is_success() {
            return Err(format!("{}: {text}", answer.status()));
        }
        let decision = answer.headers().get("x-kv-router-decision");
        let decision = decision.and_then(|d| serde_json::from_slice(d.as_bytes()).ok());
        let body = serde_json::from_str(&text).map_err(|e| format!("{e}: {text}"))?;
        Ok((body, decision.unwrap_or(Value::Null)))
    }
}

/// All numbers of loads and corrections in an answer.
pub fn collect_loads(value: &Value, into: &mut Vec<f64>) {
    const KEYS: [&str; 4] = ["prefill_tokens", "waiting", "decoding", "blocks"];
    match value {
        Value::Object(map) => {
            let is_load = KEYS.iter().all(|key| map.contains_key(*key));
            for (key, value) in map {
                if is_load && KEYS.contains(&key.as_str()) {
                    into.extend(value.as_f64());
                } else {
                    collect_loads(value, into);
                }
            }
        }
        Value::Array(list) => list.iter().for_each(|value| collect_loads(value, into)),
        _ => {}
    }
}
