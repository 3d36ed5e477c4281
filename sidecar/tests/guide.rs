//! The guide's pages on engines: each page's configuration, given such an engine's messages, leads
//! to the verdict that the page shows.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kv_router::check_events::Checker;
use kv_router::config::Config;
use kv_router::ingest::engine::Settings;
use serde_json::{Value, json};

/// A page of the guide on a source of events.
fn page(name: &str) -> String {
    let file = folder().join(name);
    std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()))
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/guide/events")
}

/// Contents of the fenced blocks of a language.
fn fenced<'t>(page: &'t str, language: &str) -> Vec<&'t str> {
    let opening = format!("\n```{language}\n");
    let blocks = page.split(&opening).skip(1);
    blocks
        .map(|block| block.split("\n```").next().unwrap())
        .collect()
}

/// Values by label, in their order.
fn rows(report: &str) -> BTreeMap<&str, Vec<&str>> {
    let mut rows: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut label = "";
    for line in report.lines() {
        let (start, value) = line.split_at(line.len().min(13));
        if !start.trim().is_empty() {
            label = start.trim();
        }
        rows.entry(label).or_default().push(value);
    }
    rows
}

/// Holds the page's verdict against what these messages come to.
fn holds(name: &str, messages: &[Vec<u8>]) {
    let page = page(name);
    let [configuration] = fenced(&page, "yaml")[..] else {
        panic!("{name}: not one configuration");
    };
    let config = Config::parse(configuration, &[]).unwrap_or_else(|e| panic!("{name}: {e}"));
    let mut checker = Checker::new(Settings::of(&config.pools[0]), 0);
    for message in messages {
        checker.message(None, message);
    }
    let report = checker.report().to_string();
    let printed = rows(&report);
    let shown: Vec<&str> = fenced(&page, "")
        .into_iter()
        .filter(|block| block.starts_with("verdict "))
        .collect();
    let [shown] = shown[..] else {
        panic!("{name}: not one verdict");
    };
    for (label, values) in rows(shown) {
        assert_eq!(printed.get(label), Some(&values), "{name}:\n{report}");
    }
    // Nothing that matters is left out.
    for label in ["dropped", "advice"] {
        assert_eq!(
            printed.contains_key(label),
            shown.contains(label),
            "{name}:\n{report}"
        );
    }
}

fn packed(events: &[Value]) -> Vec<u8> {
    rmp_serde::to_vec(&json!([1.5, events, 0])).unwrap()
}

/// A store of full blocks from a prompt's beginning.
fn store(medium: &str, first: i64, blocks: i64, size: i64, more: Value) -> Value {
    let mut event = json!({
        "type": "BlockStored", "block_hashes": (first..first + blocks).collect::<Vec<_>>(),
        "parent_block_hash": null, "token_ids": (0..blocks * size).collect::<Vec<_>>(),
        "block_size": size, "medium": medium,
    });
    let (Value::Object(event_fields), Value::Object(more)) = (&mut event, more) else {
        panic!("fields are a map");
    };
    event_fields.extend(more);
    event
}

/// As many stores of one block.
fn stores(medium: &str, count: i64, size: i64, more: &Value) -> Vec<Value> {
    let store = |i| store(medium, 1 + i, 1, size, more.clone());
    (0..count).map(store).collect()
}

#[test]
fn every_page_shows_the_verdict_that_its_configuration_leads_to() {
    let mut pages: Vec<String> = std::fs::read_dir(folder())
        .expect("the guide")
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    pages.sort();
    let vllm = json!({"lora_id": null, "lora_name": null});
    let expected: [(&str, Vec<Vec<u8>>); 9] = [
        (
            "custom.md",
            vec![fenced(&page("custom.md"), "json")[0].as_bytes().to_vec()],
        ),
        ("flexkv.md", {
            let named_only = json!({"token_ids": [], "lora_id": null, "lora_name": null});
            vec![
                packed(&stores("GPU", 40, 16, &vllm)),
                packed(&stores("CPU", 12, 16, &named_only)),
                packed(&stores("SSD", 12, 16, &named_only)),
            ]
        }),
        (
            "hicache.md",
            vec![
                packed(&stores("GPU", 40, 64, &json!({}))),
                packed(&stores("CPU_PINNED", 12, 64, &json!({}))),
            ],
        ),
        (
            "kvbm.md",
            vec![
                packed(&stores("GPU", 40, 16, &json!({}))),
                packed(&stores("CPU_TIER1", 8, 16, &json!({}))),
                packed(&stores("CPU_TIER2", 8, 16, &json!({}))),
            ],
        ),
        (
            "lmcache.md",
            vec![
                packed(&stores("GPU", 40, 16, &vllm)),
                packed(&stores("cpu", 5, 256, &vllm)),
            ],
        ),
        ("mooncake.md", {
            let object = |page: u32, part: &str| {
                json!({"event_type": "stored", "object_key": format!("{page:064x}_{part}"),
                       "tenant_id": "default", "group_id": null})
            };
            let page = |page| ["0_k", "0_v", "1_k", "1_v"].map(|part| object(page, part));
            vec![packed(&(0..3).flat_map(page).collect::<Vec<_>>())]
        }),
        (
            "sglang.md",
            vec![
                packed(&stores("GPU", 4, 16, &json!({}))),
                packed(&[store("GPU", -9, 1, 16, json!({}))]),
            ],
        ),
        ("tensorrt-llm.md", {
            let block = |hash: u32, tokens: u32| {
                let token =
                    |id| json!({"type": "unique_token", "token_id": id, "token_extra_id": 0});
                let tokens: Vec<Value> = (0..tokens).map(token).collect();
                json!({"type": "stored_block", "block_hash": hash, "tokens": tokens, "cache_level": 0})
            };
            let event = |id: u32| {
                let blocks = [block(2 * id, 32), block(2 * id + 1, 20)];
                let data = json!({"type": "stored", "parent_hash": null, "blocks": blocks});
                json!({"event_id": id, "data": data, "window_size": 4096})
            };
            vec![
                json!([event(0), event(1), event(2)])
                    .to_string()
                    .into_bytes(),
            ]
        }),
        ("vllm.md", {
            let batch = |i: i64| packed(&[store("GPU", 1 + 16 * i, 16, 16, vllm.clone())]);
            (0..4).map(batch).collect()
        }),
    ];
    assert_eq!(pages, expected.each_ref().map(|(name, _)| *name));
    for (name, messages) in &expected {
        holds(name, messages);
    }
}
