//! A real Envoy on the bootstrap that `kv-router envoy` prints.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::client::Client;
use crate::place;
use crate::process::Process;
use crate::wait;

/// A running Envoy.
#[derive(Debug)]
pub struct Envoy {
    /// The process, for its output.
    pub process: Process,
    /// Port of the listener.
    pub port: u16,
    /// Port of Envoy's admin.
    pub admin: u16,
    client: Client,
}

/// The bootstrap for a configuration.
///
/// # Panics
/// When `kv-router envoy` fails.
#[must_use]
pub fn bootstrap(dir: &Path, config: &Path) -> PathBuf {
    let mut command = Command::new(place::kv_router());
    let output = command
        .arg("envoy")
        .arg("--config")
        .arg(config)
        .output()
        .expect("kv-router");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let file = dir.join("envoy.yaml");
    std::fs::write(&file, output.stdout).expect("a writable directory");
    file
}

impl Envoy {
    /// Starts Envoy with `threads` workers.
    pub async fn start(dir: &Path, bootstrap: &Path, threads: u32, port: u16, admin: u16) -> Self {
        let mut command = Command::new(place::envoy());
        command.arg("-c").arg(bootstrap);
        command.args([
            "--concurrency",
            &threads.to_string(),
            "--disable-hot-restart",
        ]);
        command.args([
            "--log-level",
            "warning",
            "--component-log-level",
            "wasm:info",
        ]);
        let process = Process::start(&mut command, &dir.join("envoy.log"));
        let envoy = Self {
            process,
            port,
            admin,
            client: Client::default(),
        };
        let ready = async || match envoy.client.get(admin, "/server_info").await {
            Ok(info) if info["state"] == "LIVE" => Ok(()),
            other => Err(format!("{other:?}")),
        };
        wait::until("Envoy", ready).await;
        envoy
    }

    /// Values of the stats whose names match, by name.
    ///
    /// # Errors
    /// When Envoy doesn't answer.
    pub async fn stats(&self, filter: &str) -> Result<Vec<(String, u64)>, String> {
        let path = format!("/stats?format=json&filter={filter}");
        let stats = self.client.get(self.admin, &path).await?;
        let list = stats["stats"].as_array().cloned().unwrap_or_default();
        let pair = |s: &Value| Some((s["name"].as_str()?.to_owned(), s["value"].as_u64()?));
        Ok(list.iter().filter_map(pair).collect())
    }

    /// Sum of the stats whose names match.
    pub async fn total(&self, filter: &str) -> u64 {
        let stats = self.stats(filter).await.unwrap_or_default();
        stats.iter().map(|(_, value)| value).sum()
    }

    /// Waits until every load lane is back at zero.
    pub async fn idle(&self) {
        let idle = async || {
            let lanes = self.stats("kv_router_lane").await?;
            let busy: Vec<_> = lanes.into_iter().filter(|(_, value)| *value != 0).collect();
            if busy.is_empty() {
                Ok(())
            } else {
                Err(format!("{busy:?}"))
            }
        };
        wait::until("idle lanes", idle).await;
    }

    /// Waits until 98 % of the requests that are over were answered by the worker chosen for them.
    pub async fn intended(&self) {
        let share = async || {
            let intended = self.total("kv_router_routed_as_intended_total").await;
            let missed = self.total("kv_router_missed_total").await;
            if intended > 0 && intended * 100 >= (intended + missed) * 98 {
                Ok(())
            } else {
                Err((intended, missed))
            }
        };
        wait::until("98 % of requests routed as intended", share).await;
    }
}
