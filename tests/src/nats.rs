//! A real NATS server.

use std::path::Path;
use std::process::Command;

use crate::place;
use crate::process::Process;
use crate::wait;

/// A running server; restarting it keeps its port.
#[derive(Debug)]
pub struct Nats {
    process: Process,
    port: u16,
    log: std::path::PathBuf,
}

impl Nats {
    /// Starts a server that logs into `dir`.
    pub async fn start(dir: &Path) -> Self {
        let (port, log) = (place::free_port(), dir.join("nats.log"));
        let nats = Self {
            process: spawn(port, &log),
            port,
            log,
        };
        nats.ready().await;
        nats
    }

    /// Its address.
    #[must_use]
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// Kills it.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Kills it and starts another on the same port.
    pub async fn restart(&mut self) {
        self.process.kill();
        self.process = spawn(self.port, &self.log);
        self.ready().await;
    }

    async fn ready(&self) {
        let url = self.url();
        wait::until("NATS", async || async_nats::connect(&url).await).await;
    }
}

fn spawn(port: u16, log: &Path) -> Process {
    let port = port.to_string();
    let mut command = Command::new(place::nats_server());
    command.args(["--addr", "127.0.0.1", "--port", &port]);
    // What streams keep outlives a restart.
    command
        .arg("--jetstream")
        .arg("--store_dir")
        .arg(log.with_extension("js"));
    Process::start(&mut command, log)
}
