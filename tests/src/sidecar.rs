//! A real `kv-router serve`.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::client::Client;
use crate::place;
use crate::process::Process;
use crate::wait;

/// A running sidecar and its configuration file.
#[derive(Debug)]
pub struct Sidecar {
    /// The process, for its output.
    pub process: Process,
    /// Port of the admin listener.
    pub admin: u16,
    config: PathBuf,
    dir: PathBuf,
    client: Client,
}

impl Sidecar {
    /// Starts it on a configuration whose admin port is `admin`.
    #[must_use]
    pub fn start(dir: &Path, config: &Path, admin: u16) -> Self {
        Self {
            process: spawn(dir, config),
            admin,
            config: config.to_owned(),
            dir: dir.to_owned(),
            client: Client::default(),
        }
    }

    /// Kills it and starts another on the same configuration.
    pub fn restart(&mut self) {
        self.process.kill();
        self.process = spawn(&self.dir, &self.config);
    }

    /// Answer of `/v1/index`.
    ///
    /// # Errors
    /// When it doesn't answer.
    pub async fn index(&self) -> Result<Value, String> {
        self.client.get(self.admin, "/v1/index").await
    }

    /// Answer of `/v1/workers`.
    ///
    /// # Errors
    /// When it doesn't answer.
    pub async fn workers(&self) -> Result<Value, String> {
        self.client.get(self.admin, "/v1/workers").await
    }

    /// Its metrics.
    ///
    /// # Errors
    /// When it doesn't answer.
    pub async fn metrics(&self) -> Result<String, String> {
        let request = http::Request::get(crate::client::uri(self.admin, "/metrics"));
        let request = request.body(http_body_util::Full::default());
        let request = request.map_err(|e| e.to_string())?;
        let answer = self.client.send(request).await?;
        Ok(String::from_utf8_lossy(answer.body()).into_owned())
    }

    /// The value of a metric, named with its labels; 0 where it has none.
    ///
    /// # Panics
    /// When it doesn't answer, or the value is not a whole number.
    pub async fn metric(&self, name: &str) -> u64 {
        let metrics = self.metrics().await.expect("metrics");
        let mut lines = metrics.lines().filter_map(|line| line.strip_prefix(name));
        let value = lines.find_map(|rest| rest.strip_prefix(' '));
        value.map_or(0, |value| value.parse().expect("a whole number"))
    }

    /// What `kv_router_streams_total` counts.
    ///
    /// # Panics
    /// When it doesn't answer.
    pub async fn streams(&self, plane: &str, kind: &str) -> u64 {
        let labels = format!("{{plane=\"{plane}\",kind=\"{kind}\"}}");
        self.metric(&format!("kv_router_streams_total{labels}"))
            .await
    }

    /// Waits until it is ready.
    pub async fn ready(&self) {
        let ready = async || {
            let request = http::Request::get(crate::client::uri(self.admin, "/readyz"));
            let request = request
                .body(http_body_util::Full::default())
                .expect("a valid request");
            let answer = self.client.send(request).await?;
            let text = String::from_utf8_lossy(answer.body()).into_owned();
            if answer.status().is_success() {
                Ok(())
            } else {
                Err(text)
            }
        };
        wait::until("the sidecar", ready).await;
    }

    /// Waits until `events` events have been applied in all and Envoy holds what they changed.
    /// Returns the index's report.
    pub async fn settled(&self, events: u64) -> Value {
        let settled = async || {
            let index = self.index().await?;
            if applied(&index) >= events && index["settled"] == true {
                Ok(index)
            } else {
                Err(index.to_string())
            }
        };
        wait::until("the index", settled).await
    }
}

/// Events that have been applied in all, from the index's report.
#[must_use]
pub fn applied(index: &Value) -> u64 {
    let planes = index["planes"].as_object().into_iter().flatten();
    let kinds = planes
        .filter_map(|(_, plane)| plane["events"].as_object())
        .flatten();
    kinds.filter_map(|(_, n)| n.as_u64()).sum()
}

fn spawn(dir: &Path, config: &Path) -> Process {
    let mut command = Command::new(place::kv_router());
    let command = command
        .arg("serve")
        .arg("--config")
        .arg(config)
        .env("RUST_LOG", "info");
    Process::start(command, &dir.join("kv-router.log"))
}
