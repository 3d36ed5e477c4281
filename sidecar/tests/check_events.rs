//! The verdict on what engines send, as the command prints it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

fn fixtures(pattern: &str, extension: &str) -> Vec<PathBuf> {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let entries = std::fs::read_dir(tests.join(pattern)).expect("the fixtures");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|e| e == extension));
    files.sort();
    files
}

fn check(files: &[PathBuf], arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kv-router"))
        .arg("check-events")
        .args(arguments)
        .arg("--file")
        .args(files)
        .output()
        .expect("the command")
}

fn report(files: &[PathBuf], arguments: &[&str]) -> (bool, Value) {
    let arguments: Vec<&str> = ["--json"].iter().chain(arguments).copied().collect();
    let output = check(files, &arguments);
    let report = serde_json::from_slice(&output.stdout);
    (output.status.success(), report.expect("JSON"))
}

#[test]
fn genuine_messages_of_every_engine_are_understood() {
    let engines = [
        ("vllm", "bin", "vLLM, 0.31 or later"),
        (
            "vllm-0.20.0",
            "bin",
            "vLLM, a version with events as lists, such as 0.20",
        ),
        (
            "sglang",
            "bin",
            "SGLang, a version with events as maps, such as 0.5.23; with HiCache",
        ),
        ("trtllm", "json", "TensorRT-LLM, its polled endpoint"),
    ];
    for (folder, extension, engine) in engines {
        let files = fixtures(folder, extension);
        let (succeeds, report) = report(&files, &[]);
        assert!(succeeds, "{folder}: {report:#}");
        assert_eq!(report["engine"], engine);
        assert_eq!(report["messages"], files.len());
        let stored = report["indexed"]["stored_blocks"]["device"].as_u64();
        assert!(stored > Some(3), "{folder}: {report:#}");
        // And each by itself.
        for file in files {
            let alone = check(std::slice::from_ref(&file), &[]);
            assert!(alone.status.success(), "{}", file.display());
        }
    }
}

#[test]
fn a_verdict_says_what_is_dropped_and_why() {
    let (_, report) = report(&fixtures("vllm", "bin"), &[]);
    assert_eq!(report["kv_cache_block_size"], 16);
    assert_eq!(report["block_sizes"], json!({"16": 9, "64": 1}));
    assert_eq!(report["media"]["CPU"], json!({"tier": "host", "events": 2}));
    assert_eq!(report["groups"]["1"], "sliding_window");
    assert_eq!(report["ranks"], json!([0, 3]));
    assert_eq!(report["families"], json!({"dynamo": 13}));
    assert_eq!(report["dropped"]["attention_kind"]["events"], 1);
    assert_eq!(report["dropped"]["ownership"]["events"], 1);
    assert_eq!(report["indexed"]["clears"], 1);
}

#[test]
fn a_block_size_that_can_not_match_is_advised_on() {
    let files = fixtures("sglang", "bin");
    let output = check(&files[..1], &["--block-size", "16"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success());
    assert!(text.contains("set kv_cache_block_size: 1"), "{text}");
    assert!(text.contains("no block of this would be indexed"), "{text}");
}

#[test]
fn events_without_token_ids_are_advised_on_and_indexed_as_configured() {
    let folder = tempfile::tempdir().unwrap();
    let message = folder.path().join("flexkv.json");
    let event = json!([
        0.5,
        [["BlockStored", [-5, 6], null, [], 16, null, "SSD"]],
        0
    ]);
    std::fs::write(&message, event.to_string()).unwrap();
    let files = [message];
    let (succeeds, without) = report(&files, &[]);
    assert!(succeeds);
    assert_eq!(without["dropped"]["no_tokens"]["events"], 1);
    let advice = without["advice"][0].as_str().unwrap();
    assert!(
        advice.contains("{family: flex-kv, media: [SSD]}"),
        "{advice}"
    );
    let config = folder.path().join("kv-router.yaml");
    let text = "families: [{family: flex-kv, media: [SSD]}]\n\
                workers: [{id: 7, endpoint: '127.0.0.1:8000'}]\n";
    std::fs::write(&config, text).unwrap();
    let config = config.to_str().unwrap();
    let (_, with) = report(&files, &["--config", config, "--worker", "7"]);
    assert_eq!(with["families"], json!({"flex-kv": 1}));
    assert_eq!(with["indexed"]["stored_blocks"], json!({"disk": 2}));
    assert!(
        !check(&files, &["--config", config, "--worker", "8"])
            .status
            .success()
    );
}

#[test]
fn what_is_not_understood_fails() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let file = folder.path().join(name);
        std::fs::write(&file, bytes).unwrap();
        file
    };
    let files = [
        write("broken.bin", b"\x93\x00\x91\x93\xacBlockStored"),
        write("empty.bin", b""),
        write("other.json", br#"[0, [["Weather", "sun"]], 0]"#),
    ];
    for file in &files {
        let (succeeds, report) = report(std::slice::from_ref(file), &[]);
        assert!(!succeeds, "{}", file.display());
        assert_eq!(report["understood"], false);
        assert_eq!(report["files"][0]["understood"], false);
    }
    let missing = check(&[folder.path().join("none.bin")], &[]);
    assert!(!missing.status.success());
    assert!(String::from_utf8_lossy(&missing.stderr).contains("none.bin"));
}

#[test]
fn messages_of_dynamo_are_told_from_those_of_engines() {
    let files = fixtures(".", "bin");
    let named = |part: &str| -> Vec<PathBuf> {
        let has = |file: &&PathBuf| file.to_str().unwrap().contains(part);
        files.iter().filter(has).cloned().collect()
    };
    let (succeeds, events) = report(&named("kv_events"), &[]);
    assert!(succeeds, "{events:#}");
    assert_eq!(events["events"]["stored"], 3);
    assert_eq!(events["shapes"].as_array().unwrap().len(), 2);
    let (succeeds, load) = report(&named("kv_metrics"), &[]);
    assert!(!succeeds);
    assert_eq!(load["dropped"]["wrong_topic"]["events"], 1);
}
