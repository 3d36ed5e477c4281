//! Bootstraps that a real Envoy takes, and what is said of those that would not work.

mod support;

use std::process::Command;

use kv_router::config::Config;
use kv_router::envoy::{Discovery, Files, bootstrap, check};
use support::tool;
use tempfile::TempDir;

fn examples() -> Vec<(String, Config)> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../envoy/examples");
    let read = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.unwrap().path();
        let config = Config::load(&path, &[]).unwrap_or_else(|e| panic!("{e}"));
        (path.display().to_string(), config)
    };
    std::fs::read_dir(folder).unwrap().map(read).collect()
}

fn config() -> Config {
    let text = "workers: [{id: 1, endpoint: '10.0.0.1:80'}, {id: 2, endpoint: '[fd00::2]:80'}]";
    Config::parse(text, &[]).unwrap()
}

/// A bootstrap with its files in a folder.
fn printed(config: &Config, folder: &TempDir, discovery: Discovery) -> String {
    let files = Files::new(config, Some(folder.path().into())).unwrap();
    files.write(config).unwrap();
    bootstrap(config, &files, discovery)
}

/// Every example with each way of having endpoints.
fn all() -> impl Iterator<Item = (String, Config, Discovery)> {
    let ways = [Discovery::Grpc, Discovery::Files];
    let of = move |(name, config): (String, Config)| {
        ways.map(|discovery| (format!("{name} {discovery:?}"), config.clone(), discovery))
    };
    examples().into_iter().flat_map(of)
}

#[test]
fn a_real_envoy_takes_the_bootstrap_of_every_example() {
    for (name, config, discovery) in all() {
        let folder = TempDir::new().unwrap();
        let file = folder.path().join("bootstrap.yaml");
        std::fs::write(&file, printed(&config, &folder, discovery)).unwrap();
        let output = Command::new(tool("ENVOY", "envoy"))
            .args(["--mode", "validate", "--use-dynamic-base-id", "-c"])
            .arg(&file)
            .output()
            .unwrap();
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name}: {log}");
    }
}

#[test]
fn the_printed_bootstrap_lacks_nothing() {
    for (name, config, discovery) in all() {
        let folder = TempDir::new().unwrap();
        let lacks = check(&printed(&config, &folder, discovery), &config).unwrap();
        assert_eq!(lacks, [], "{name}");
    }
}

/// What is lacking once `from` has become `to` in the bootstrap or a file beside it.
fn lacking(from: &str, to: &str) -> Vec<String> {
    let folder = TempDir::new().unwrap();
    let config = config();
    let text = printed(&config, &folder, Discovery::Files);
    let mut is_changed = text.contains(from);
    for entry in std::fs::read_dir(folder.path()).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        is_changed |= text.contains(from);
        std::fs::write(&path, text.replace(from, to)).unwrap();
    }
    assert!(is_changed, "{from} is nowhere");
    let lacks = check(&text.replace(from, to), &config).unwrap();
    lacks.iter().map(ToString::to_string).collect()
}

#[test]
fn whatever_is_changed_for_the_worse_is_named() {
    let cases = [
        (
            "allow_on_headers_stop_iteration: true",
            "allow_on_headers_stop_iteration: false",
            "allow_on_headers_stop_iteration",
        ),
        (
            "fail_open: true",
            "failure_policy: FAIL_OPEN",
            "failure_policy",
        ),
        ("fail_open: true", "fail_open: false", "fail_open"),
        (
            "request_body_buffer_limit: 67108864",
            "request_body_buffer_limit: 1000",
            "request_body_buffer_limit is 1000",
        ),
        ("timeout: 0s", "timeout: 15s", "timeout must be 0s"),
        (
            "stream_idle_timeout: 300s",
            "stream_idle_timeout: 5s",
            "stream_idle_timeout 5 s",
        ),
        (
            "max_requests: 100000",
            "max_requests: 1024",
            "max_requests is 1024",
        ),
        (
            "{header: x-gateway-destination-endpoint}",
            "{header: x-other}",
            "override_host",
        ),
        (
            "http2_protocol_options: {}",
            "http_protocol_options: {}",
            "must speak HTTP/2",
        ),
        ("bridge.sock", "other.sock", "its pipe is"),
        ("10.0.0.1", "10.0.0.9", "none has worker 1 at 10.0.0.1:80"),
        ("tag_name: reason", "tag_name: cause", "no tag reason"),
        (
            "name: kv_router_sidecar\n",
            "name: elsewhere\n",
            "cluster kv_router_sidecar: missing",
        ),
        (
            "          - name: kv_router\n            config_discovery",
            "          - name: first\n            typed_config: {'@type': type.googleapis.com/envoy.extensions.filters.http.header_to_metadata.v3.Config}\n          - name: kv_router\n            config_discovery",
            "first must stand after the wasm filter",
        ),
        (
            "envoy.extensions.filters.http.wasm.v3.Wasm",
            "envoy.extensions.filters.http.buffer.v3.Buffer",
            "any client may send",
        ),
        (
            "                request_body_buffer_limit",
            "                request_headers_to_add: [{header: {key: X-Gateway-Destination-Endpoint, value: x}}]\n                request_body_buffer_limit",
            "overwrites x-gateway-destination-endpoint",
        ),
    ];
    for (from, to, said) in cases {
        let lacks = lacking(from, to);
        assert!(lacks.iter().any(|l| l.contains(said)), "{from}: {lacks:?}");
    }
}

#[test]
fn a_foreign_bootstrap_is_told_what_it_lacks() {
    let bare = r#"{"static_resources": {"listeners": [], "clusters": []}}"#;
    let lacks = check(bare, &config()).unwrap();
    let all: Vec<String> = lacks.iter().map(ToString::to_string).collect();
    for said in [
        "override_host",
        "no http connection manager has the wasm filter",
    ] {
        assert!(all.iter().any(|l| l.contains(said)), "{said}: {all:?}");
    }
    assert!(check("a: [", &config()).is_err());
}

#[test]
fn files_are_rewritten_only_when_they_differ() {
    let folder = TempDir::new().unwrap();
    let config = config();
    let files = Files::new(&config, Some(folder.path().into())).unwrap();
    files.write(&config).unwrap();
    let id = |path: std::path::PathBuf| {
        use std::os::unix::fs::MetadataExt as _;
        std::fs::metadata(path).unwrap().ino()
    };
    let before = (id(files.filter()), id(files.endpoints("default")));
    files.write(&config).unwrap();
    assert_eq!((id(files.filter()), id(files.endpoints("default"))), before);
    files
        .write_endpoints("default", &Default::default())
        .unwrap();
    let text = std::fs::read_to_string(files.endpoints("default")).unwrap();
    assert!(text.contains("endpoints: []"), "{text}");
    let value: serde_json::Value = serde_saphyr::from_str(&text).unwrap();
    assert_eq!(
        value["resources"][0]["cluster_name"],
        "kv_router_pool_default"
    );
}

#[test]
fn sources_are_trusted_by_their_connections() {
    let config = Config::parse("trusted_sources: [10.0.0.0/8]", &[]).unwrap();
    let folder = TempDir::new().unwrap();
    let text = printed(&config, &folder, Discovery::Grpc);
    assert_eq!(check(&text, &config).unwrap(), []);
    let spoofable = text.replace("use_remote_address: true", "use_remote_address: false");
    assert_ne!(text, spoofable);
    let lacks = check(&spoofable, &config).unwrap();
    let lacks: Vec<String> = lacks.iter().map(ToString::to_string).collect();
    assert!(
        lacks.len() == 1 && lacks[0].contains("x-forwarded-for"),
        "{lacks:?}"
    );
    let wrong = Config::parse("trusted_sources: [10.0.0.0/33]", &[]).unwrap_err();
    assert!(wrong.to_string().contains("trusted_sources[0]"), "{wrong}");
}
