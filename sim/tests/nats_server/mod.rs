//! A real NATS server of the test's own.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::support::eventually;

/// A server on a free port of loopback, stopped on drop.
pub(crate) struct Nats {
    process: Child,
    folder: PathBuf,
    pub(crate) url: String,
}

impl Nats {
    /// A server on a free port.
    pub(crate) async fn start(name: &str) -> Self {
        Self::listen(name, "-1").await
    }

    /// A server on a given port.
    pub(crate) async fn start_on(name: &str, port: u16) -> Self {
        Self::listen(name, &port.to_string()).await
    }

    async fn listen(name: &str, port: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("kv-sim-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("temporary folder");
        let process = Command::new(binary())
            .args(["-a", "127.0.0.1", "-p", port, "--ports_file_dir"])
            .arg(&folder)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("nats-server starts");
        let ports = folder.join(format!("nats-server_{}.ports", process.id()));
        let url = eventually("the ports file", || async { read_url(&ports) }).await;
        Self {
            process,
            folder,
            url,
        }
    }
}

impl Drop for Nats {
    fn drop(&mut self) {
        let _already_dead = self.process.kill();
        let _reaped = self.process.wait();
        let _left_behind = std::fs::remove_dir_all(&self.folder);
    }
}

fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("NATS_SERVER") {
        return path.into();
    }
    let local = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.tools/bin/nats-server");
    assert!(
        local.exists(),
        "no nats-server: set NATS_SERVER or put one at .tools/bin/nats-server"
    );
    local
}

fn read_url(ports: &Path) -> Option<String> {
    let text = std::fs::read(ports).ok()?;
    let ports: serde_json::Value = serde_json::from_slice(&text).ok()?;
    Some(ports["nats"][0].as_str()?.to_owned())
}
