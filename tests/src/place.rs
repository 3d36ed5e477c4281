//! Where the real parts are, and free ports.

use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU16, Ordering};

/// Root of the workspace.
#[must_use]
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A file named by an environment variable, else at its place below the root.
///
/// # Panics
/// When there is no such file.
fn file(variable: &str, fallback: PathBuf, hint: &str) -> PathBuf {
    let path = std::env::var_os(variable).map_or(fallback, PathBuf::from);
    assert!(path.exists(), "{} is missing: {hint}", path.display());
    path.canonicalize().expect("an existing path")
}

/// The Envoy binary.
#[must_use]
pub fn envoy() -> PathBuf {
    file("ENVOY", root().join(".tools/bin/envoy"), "make tools")
}

/// The NATS server.
#[must_use]
pub fn nats_server() -> PathBuf {
    file(
        "NATS_SERVER",
        root().join(".tools/bin/nats-server"),
        "make tools",
    )
}

/// The filter module.
#[must_use]
pub fn filter() -> PathBuf {
    let built = root().join("target/wasm32-unknown-unknown/wasm/kv_filter.wasm");
    file("KV_FILTER_WASM", built, "make filter")
}

/// The filter module that traps on request.
#[must_use]
pub fn chaos_filter() -> PathBuf {
    let built = root().join("target/chaos/wasm32-unknown-unknown/wasm/kv_filter.wasm");
    file("KV_FILTER_CHAOS_WASM", built, "make filter-chaos")
}

/// The filter module of the protocol before this one; `None` where a clone without history could
/// not build it.
#[must_use]
pub fn older_filter() -> Option<PathBuf> {
    let built = root().join("target/older/wasm32-unknown-unknown/wasm/kv_filter.wasm");
    let module = std::env::var_os("KV_FILTER_OLDER_WASM").map_or(built, PathBuf::from);
    module.exists().then_some(module)
}

/// The sidecar, from the same build as the test.
#[must_use]
pub fn kv_router() -> PathBuf {
    built("kv-router", "KV_ROUTER")
}

/// The simulated engine, from the same build as the test.
#[must_use]
pub fn kv_sim() -> PathBuf {
    built("kv-sim", "KV_SIM")
}

fn built(name: &str, variable: &str) -> PathBuf {
    let exe = std::env::current_exe().expect("a test has a path");
    let folder = exe.ancestors().nth(2).expect("target/PROFILE/deps/TEST");
    file(
        variable,
        folder.join(name),
        &format!("cargo build -p {name}"),
    )
}

/// A port that nothing listens on, below the range that outgoing connections take theirs from.
///
/// # Panics
/// When all are taken.
#[must_use]
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = std::process::id() % 10_000;
    for _ in 0..10_000 {
        let step = u32::from(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = u16::try_from(20_000 + (start * 37 + step) % 10_000).expect("below 30,000");
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
    panic!("no free port from 20000 to 30000");
}
