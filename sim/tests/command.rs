//! The `kv-sim` binary as scripts use it.

use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use kv_sim::load::Report;

struct EngineProcess {
    process: Child,
    address: String,
}

impl EngineProcess {
    fn start(args: &[&str]) -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_kv-sim"))
            .arg("engine")
            .args(args)
            .stdout(Stdio::piped())
            .spawn()
            .expect("engine starts");
        let mut first = String::new();
        BufReader::new(process.stdout.take().expect("stdout"))
            .read_line(&mut first)
            .expect("a line");
        let line: serde_json::Value = serde_json::from_str(&first).expect("json");
        Self {
            process,
            address: line["address"].as_str().expect("an address").to_owned(),
        }
    }
}

impl Drop for EngineProcess {
    fn drop(&mut self) {
        let _already_dead = self.process.kill();
        let _reaped = self.process.wait();
    }
}

fn kv_sim(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kv-sim"))
        .args(args)
        .output()
        .expect("kv-sim runs")
}

fn temporary(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("kv-sim-{}-{name}", std::process::id()))
}

#[test]
fn engine_load_and_report_work_together() {
    let engine = EngineProcess::start(&["--instant", "--worker-id", "3"]);
    let url = format!("http://{}", engine.address);
    let files = ["cold", "warm"].map(|label| (label, temporary(label)));
    for (label, file) in &files {
        let output = kv_sim(&[
            "load",
            "--url",
            &url,
            "--requests",
            "6",
            "--concurrency",
            "1",
            "--label",
            label,
            "--json",
            file.to_str().expect("a path"),
        ]);
        assert!(output.status.success(), "{output:?}");
        assert!(
            output.stderr.is_empty(),
            "no progress bar without a terminal"
        );
    }
    let reports = files.clone().map(|(_, file)| {
        let json = std::fs::read(file).expect("a file");
        serde_json::from_slice::<Report>(&json).expect("a report")
    });
    assert_eq!(reports[0].bodies, reports[1].bodies);
    assert!(reports[1].cached_tokens > reports[0].cached_tokens);
    let paths = files.map(|(_, file)| file.to_str().expect("a path").to_owned());
    let output = kv_sim(&["report", &paths[0], &paths[1]]);
    let table = String::from_utf8(output.stdout).expect("text");
    let head = table.lines().next().unwrap_or_default();
    assert!(head.contains("cold") && head.contains("warm"), "{table}");
    paths.iter().for_each(|path| {
        std::fs::remove_file(path).expect("a temporary file");
    });
}

#[test]
fn failures_above_the_allowed_number_fail_the_command() {
    let engine = EngineProcess::start(&["--instant", "--model", "other"]);
    let url = format!("http://{}", engine.address);
    let load = |allowed| {
        kv_sim(&[
            "load",
            "--url",
            &url,
            "--requests",
            "3",
            "--rate",
            "1000",
            "--max-failures",
            allowed,
        ])
    };
    assert!(load("3").status.success());
    let failed = load("2");
    assert_eq!(failed.status.code(), Some(1));
    let error = String::from_utf8(failed.stderr).expect("text");
    assert!(
        error.contains("3 requests failed; the first: status 404"),
        "{error}"
    );
}

#[test]
fn contradicting_flags_are_refused() {
    for args in [
        ["load", "--rate", "1", "--concurrency", "2"].as_slice(),
        &["load", "--speed", "2"],
        &["load", "--trace", "x", "--workload", "unique"],
        &["load", "--rate", "0"],
        &["engine", "--step-ms", "-1"],
        &["report"],
    ] {
        assert_eq!(kv_sim(args).status.code(), Some(2), "{args:?}");
    }
    let missing = kv_sim(&["load", "--trace", "/no/such/file"]);
    assert_eq!(missing.status.code(), Some(1));
    let zero = kv_sim(&["engine", "--blocks", "0"]);
    assert_eq!(zero.status.code(), Some(1));
}
