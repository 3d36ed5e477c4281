//! The documentation is held against the code: metrics, keys, examples, names of tests, links.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use kv_router::config::{Config, Flags, dynamo_settings, restart, schema};
use kv_router::metrics::{
    InPool, Kind, Metrics, OfClass, OfOwner, OfWorker, Outcome, PlaneKind, QueueOutcome,
};
use serde_json::Value;

const CONFIGURATION: &str = include_str!("../../docs/guide/configuration.md");
const METRICS: &str = include_str!("../../docs/guide/metrics.md");
const EVENTS: &str = include_str!("../../docs/guide/events.md");

/// The first line of an example that is a whole configuration file.
const EXAMPLE: &str = "# kv-router.yaml";

fn root() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().expect("the workspace").to_owned()
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Files below a folder of the repository with this extension.
fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        let entries = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{folder:?}: {e}"));
        for path in entries.map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == extension) {
                found.push(path);
            }
        }
    }
    assert!(!found.is_empty(), "no {extension} below {folder}");
    found
}

/// The part of a page from a heading to the next one of its level or above.
fn section<'t>(page: &'t str, heading: &str) -> &'t str {
    let start = page.find(&format!("\n{heading}\n")).expect("the heading") + 1;
    let rest = &page[start..];
    let level = heading.split(' ').next().unwrap().len();
    let ends = (1..=level).filter_map(|n| rest[1..].find(&format!("\n{} ", "#".repeat(n))));
    ends.min().map_or(rest, |end| &rest[..=end])
}

/// Cells of each table row whose first cell begins with a backtick.
fn rows(text: &str) -> Vec<Vec<&str>> {
    let rows = text.lines().filter(|line| line.starts_with("| `"));
    rows.map(|row| row.trim_matches('|').split('|').map(str::trim).collect())
        .collect()
}

/// The texts between backticks.
fn codes(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// Contents of the fenced blocks of a language.
fn fenced<'t>(page: &'t str, language: &str) -> Vec<&'t str> {
    let opening = format!("\n```{language}\n");
    let blocks = page.split(&opening).skip(1);
    blocks
        .map(|block| block.split("\n```").next().unwrap())
        .collect()
}

/// A metric's name without its labels.
fn bare(name: &str) -> String {
    name.split('{').next().unwrap().to_owned()
}

fn documented_metrics(heading: &str) -> BTreeSet<String> {
    let rows = rows(section(METRICS, heading));
    rows.iter()
        .map(|row| bare(codes(row[0])[0]))
        .filter(|name| name.starts_with("kv_router_"))
        .collect()
}

#[test]
fn every_metric_of_the_sidecar_is_in_the_catalogue() {
    let metrics = Metrics::default();
    let (plane, kind) = ("", "");
    let planes = [
        &metrics.messages,
        &metrics.events,
        &metrics.rejections,
        &metrics.streams,
    ];
    for family in planes {
        family.get_or_create(&PlaneKind { plane, kind }).inc();
    }
    let pool = String::new();
    metrics.gaps.get_or_create(&InPool { pool }).inc();
    for family in [
        &metrics.changes,
        &metrics.snapshots,
        &metrics.texts,
        &metrics.text_tokens,
        &metrics.subscriptions,
        &metrics.saves,
        &metrics.restores,
        &metrics.reloads,
        &metrics.reports,
        &metrics.steps,
        &metrics.selects,
        &metrics.peer_events,
        &metrics.peer_sent,
        &metrics.peer_dropped,
        &metrics.peer_snapshots,
        &metrics.revivals,
        &metrics.bootstraps,
        &metrics.worker_failures,
        &metrics.registrations,
        &metrics.lookups,
        &metrics.discovery,
        &metrics.worker_changes,
    ] {
        family.get_or_create(&Kind { kind }).inc();
    }
    metrics.unwell.get_or_create(&Kind { kind }).set(1);
    let (pool, worker) = (String::new(), 0);
    let of_worker = OfWorker { pool, worker };
    metrics.accuracy.get_or_create(&of_worker).set(1.0);
    for family in [&metrics.predicted_tokens, &metrics.found_tokens] {
        family.get_or_create(&of_worker).inc();
    }
    let (pool, class) = (String::new(), String::new());
    let of_class = OfClass { pool, class };
    metrics.queue_depth.get_or_create(&of_class).set(1);
    metrics.queue_wait.get_or_create(&of_class).observe(1.0);
    let OfClass { pool, class } = of_class;
    let outcome = QueueOutcome {
        pool,
        class,
        outcome: "",
    };
    metrics.queue.get_or_create(&outcome).inc();
    let outcome = "";
    metrics.shadow.get_or_create(&Outcome { outcome }).inc();
    metrics.sessions.get_or_create(&Outcome { outcome }).inc();
    for family in [
        &metrics.active_blocks,
        &metrics.active_prefill_tokens,
        &metrics.active_requests,
    ] {
        let (pool, worker, rank) = (String::new(), 0, 0);
        family.get_or_create(&OfOwner { pool, worker, rank }).set(1);
    }
    let text = metrics.encode();
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let names: BTreeSet<String> = types
        .map(|line| match line.split_once(' ') {
            Some((name, "counter")) => format!("{name}_total"),
            Some((name, _)) => name.to_owned(),
            None => panic!("{line}"),
        })
        .collect();
    // An empty family is not exposed: this sees one that the lists above lack.
    let registered = format!("{metrics:?}").matches("Descriptor {").count();
    assert_eq!(names.len(), registered, "families not touched above");
    assert_eq!(documented_metrics("## Metrics of the sidecar"), names);
}

#[test]
fn every_metric_of_the_filter_is_in_the_catalogue() {
    let mut names = BTreeSet::new();
    for file in files("filter/src", "rs") {
        let below = file.strip_prefix(root().join("filter/src")).unwrap();
        let is_test =
            below.starts_with("tests") || below.ends_with("tests.rs") || below.ends_with("fake.rs");
        let text = read(&file);
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
        for literal in code.split("\"kv_router_").skip(1).filter(|_| !is_test) {
            let name = literal.split('"').next().unwrap();
            match name {
                // A cluster.
                "sidecar" => {}
                "lane_{lane}.{pool}.{worker}.{rank}" => {
                    names.extend(["a", "b"].map(|lane| format!("kv_router_lane_{lane}")));
                }
                "clock.{pool}.{worker}.{rank}" => {
                    names.insert("kv_router_clock".to_owned());
                }
                name => {
                    names.insert(format!("kv_router_{name}"));
                }
            }
        }
    }
    assert_eq!(documented_metrics("## Metrics of the filter"), names);
}

/// The labels that a type of a source file gives its variants.
fn labels(file: &str, of: &str) -> BTreeSet<String> {
    let text = read(&root().join(file));
    let (_, rest) = text.split_once(&format!("impl {of} {{\n")).expect(of);
    let body = rest.split("\n}\n").next().unwrap();
    let literals = body.split("=> \"").skip(1);
    literals
        .map(|rest| rest.split('"').next().unwrap().to_owned())
        .collect()
}

#[test]
fn every_label_is_explained() {
    let first_cells = |page: &'static str, heading| -> BTreeSet<String> {
        let rows = rows(section(page, heading));
        let names = rows.iter().flat_map(|row| codes(row[0]));
        names.map(str::to_owned).collect()
    };
    let reasons = first_cells(METRICS, "## Reasons");
    assert_eq!(reasons, labels("filter/src/reason.rs", "Reason"));
    let mut faults = labels("filter/src/metrics.rs", "Fault");
    faults.extend(labels("core/src/wire.rs", "WireError"));
    assert_eq!(first_cells(METRICS, "### Faults"), faults);
    let misses = labels("filter/src/metrics.rs", "Miss");
    assert_eq!(first_cells(METRICS, "### Misses"), misses);
    let dropped = labels("sidecar/src/peers.rs", "Dropped");
    assert_eq!(first_cells(METRICS, "### Peers"), dropped);
    let verdicts = labels("sidecar/src/decision/shadow.rs", "Verdict");
    assert_eq!(first_cells(METRICS, "### Verdicts"), verdicts);
    let ailments = [
        first_cells(EVENTS, "## Workers whose events do not fit"),
        labels("sidecar/src/index/health.rs", "Ailment"),
    ];
    assert!(ailments[0].is_superset(&ailments[1]));
    let mut steps = labels("sidecar/src/load/outcome.rs", "Outcome");
    steps.extend(labels("core/src/tracker/booking.rs", "TrackError"));
    let named = |row: &&Vec<&str>| row[0].contains("kv_router_report_steps_total");
    let catalogue = rows(section(METRICS, "## Metrics of the sidecar"));
    let row = catalogue.iter().find(named).expect("the steps");
    let kinds = codes(row[1]).into_iter().map(str::to_owned);
    assert_eq!(kinds.collect::<BTreeSet<_>>(), steps);
    let wrong = section(EVENTS, "## What is counted when something is wrong");
    let (rejections, rest) = wrong
        .split_once("Outcomes of requests")
        .expect("the outcomes");
    let documented = rows(rejections);
    let documented = documented.iter().flat_map(|row| codes(row[0]));
    let documented = documented.map(str::to_owned);
    let expected = labels("sidecar/src/ingest.rs", "Rejection");
    assert_eq!(documented.collect::<BTreeSet<_>>(), expected);
    for outcome in labels("sidecar/src/ingest.rs", "NoSnapshot") {
        assert!(codes(rest).contains(&outcome.as_str()), "{outcome}");
    }
}

#[test]
fn every_example_is_a_configuration_that_makes_sense() {
    let mut examples = 0;
    for file in files("docs/guide", "md") {
        let page = read(&file);
        for block in fenced(&page, "yaml") {
            let place = file.display();
            assert!(block.starts_with(EXAMPLE), "{place}: not checked: {block}");
            let parsed = Config::parse(block, &[]);
            parsed.unwrap_or_else(|e| panic!("{place}: {e}\n{block}"));
            examples += 1;
        }
        for block in fenced(&page, "json") {
            let parsed = serde_json::from_str::<Value>(block);
            parsed.unwrap_or_else(|e| panic!("{}: {e}\n{block}", file.display()));
        }
    }
    assert!(examples >= 3);
}

/// Key path and default of every key below a schema node.
fn schema_keys(node: &Value, path: &str, keys: &mut BTreeMap<String, Value>) {
    let definition = |reference: &str| schema().pointer(reference.trim_start_matches('#')).unwrap();
    let alternatives = node["anyOf"].as_array();
    for part in alternatives.into_iter().flatten() {
        schema_keys(part, path, keys);
    }
    if let Some(reference) = node["$ref"].as_str() {
        schema_keys(definition(reference), path, keys);
    }
    if let Some(items) = node.get("items") {
        schema_keys(items, &format!("{path}[]"), keys);
    }
    for (key, value) in node["properties"].as_object().into_iter().flatten() {
        let at = if path.is_empty() {
            key.clone()
        } else {
            format!("{path}.{key}")
        };
        schema_keys(value, &at, keys);
        keys.insert(at, value["default"].clone());
    }
}

#[test]
fn every_key_is_documented_with_its_default() {
    let mut keys = BTreeMap::new();
    schema_keys(schema(), "", &mut keys);
    // A pool's keys are documented as they stand in the short form, where it has no name.
    let in_pool = |key: &String| key.strip_prefix("pools[].").map(str::to_owned);
    let keys: BTreeMap<String, Value> = keys
        .into_iter()
        .map(|(key, default)| (in_pool(&key).unwrap_or(key), default))
        .collect();
    let headings = [
        "## Keys for the whole installation",
        "## Keys of `nats`",
        "## Keys of `select`",
        "## Keys of `indexer`",
        "## Keys of a pool",
    ];
    let documented: BTreeMap<&str, &str> = headings
        .iter()
        .flat_map(|heading| rows(section(CONFIGURATION, heading)))
        .map(|row| (codes(row[0])[0], row[1]))
        .collect();
    let names = |keys: &mut dyn Iterator<Item = String>| keys.collect::<BTreeSet<_>>();
    assert_eq!(
        names(&mut documented.keys().map(|k| (*k).to_owned())),
        names(&mut keys.keys().cloned())
    );
    // The keys of a group have defaults of their own.
    let is_group = |default: &Value| default.as_object().is_some_and(|group| !group.is_empty());
    let defaults = keys.iter().filter(|(_, default)| !default.is_null());
    for (key, default) in defaults.filter(|(_, default)| !is_group(default)) {
        let text = codes(documented[key.as_str()]);
        let documented = text.first().copied().unwrap_or_default();
        let text = match default {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        assert_eq!(documented, text, "{key}");
    }
    let required = documented
        .iter()
        .filter(|(_, default)| **default == "required");
    let required: Vec<&str> = required.map(|(key, _)| *key).collect();
    let expected = [
        "dns[].name",
        "dns[].port",
        "families[].family",
        "families[].media",
        "nats.dynamo.component",
        "nats.dynamo.namespace",
        "nats.url",
        "queue.policy_classes[].name",
        "queue.uncached_isl_buckets[].bucket",
        "registration.networks",
        "workers[].endpoint",
        "workers[].events.trtllm.url",
        "workers[].events.zmq.endpoint",
        "workers[].id",
    ];
    assert_eq!(required, expected);
}

#[test]
fn what_a_change_restarts_is_documented() {
    for row in rows(section(CONFIGURATION, "## Keys for the whole installation")) {
        let key = codes(row[0])[0];
        let needed = restart(key).map_or("–", |(needed, _)| needed.name());
        assert_eq!(row[4], needed, "{key}");
    }
    for heading in ["## Keys of `nats`", "## Keys of `indexer`"] {
        for row in rows(section(CONFIGURATION, heading)) {
            assert!(restart(codes(row[0])[0]).is_some(), "{row:?}");
        }
    }
    let of_pools = rows(section(CONFIGURATION, "## Keys of a pool"));
    let keys = of_pools.iter().map(|row| codes(row[0])[0]);
    let restarting: BTreeSet<&str> = keys.filter(|key| restart(key).is_some()).collect();
    let is_restarting =
        |key: &&str| ["name", "trusted_sources"].contains(key) || key.starts_with("tokenizer");
    let expected = of_pools.iter().map(|row| codes(row[0])[0]);
    let expected = expected.filter(is_restarting).collect();
    assert_eq!(restarting, expected);
}

/// With `UPDATE_DOCS` set, the page is written.
#[test]
fn the_guide_has_dynamos_settings_as_the_program_has_them() {
    let path = root().join("docs/guide/dynamo.md");
    let page = read(&path);
    let table = dynamo_settings();
    let head = table.lines().next().expect("a heading");
    let (before, rest) = page.split_once(head).expect("the table");
    let (_, after) = rest.split_once("\n\n").expect("something after the table");
    let right = format!("{before}{table}\n{after}");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, &right).expect("a writable page");
    } else {
        let hint = "UPDATE_DOCS=1 makes this test write the table of docs/guide/dynamo.md";
        assert!(page == right, "{hint}");
    }
}

#[test]
fn every_flag_and_variable_is_documented() {
    let command = <Flags as clap::Args>::augment_args(clap::Command::new("serve"));
    let mut names = BTreeSet::new();
    // What is refused is in the table of Dynamo's settings, and what stands for several keys.
    let has_key = |argument: &&clap::Arg| {
        !argument.is_hide_set() && !argument.get_id().as_str().ends_with("load-aware")
    };
    for argument in command.get_arguments().filter(has_key) {
        let aliases = argument.get_visible_aliases().unwrap_or_default();
        let flags = argument.get_long().into_iter().chain(aliases);
        names.extend(flags.map(|flag| format!("--{flag}")));
        let help = argument.get_help().expect("help").to_string();
        let variables = help
            .split_once("[env: ")
            .and_then(|(_, rest)| rest.split_once(']'));
        let variables = variables.map_or("", |(variables, _)| variables);
        names.extend(
            variables
                .split(", ")
                .filter(|v| !v.is_empty())
                .map(str::to_owned),
        );
    }
    names.extend(["--config", "KV_ROUTER_CONFIG"].map(str::to_owned));
    let layers = section(CONFIGURATION, "## Layers");
    let table = rows(layers).into_iter().chain(
        // The file has no key.
        layers
            .lines()
            .filter(|l| l.starts_with("| the file"))
            .map(|l| vec!["", l]),
    );
    let documented: BTreeSet<String> = table
        .flat_map(|row| {
            row[1..]
                .iter()
                .flat_map(|cell| codes(cell))
                .collect::<Vec<_>>()
        })
        .map(str::to_owned)
        .collect();
    assert_eq!(documented, names);
}

#[test]
fn every_test_that_a_page_names_exists() {
    let folders = ["core", "filter/src", "sidecar", "sim", "tests"];
    let sources: String = folders
        .iter()
        .flat_map(|folder| files(folder, "rs"))
        .map(|file| read(&file))
        .collect();
    let mut named = 0;
    for file in files("docs/design", "md") {
        let page = read(&file);
        let Some((_, invariants)) = page.split_once("\n## Invariants\n") else {
            continue;
        };
        let table = invariants.lines().filter(|line| line.starts_with("| "));
        for row in table.skip(1) {
            let cells: Vec<&str> = row.trim_matches('|').split('|').collect();
            let tests = codes(cells[1]);
            assert!(!tests.is_empty(), "{}: {row}", file.display());
            for test in tests {
                let exists = sources.contains(&format!("fn {test}("));
                assert!(exists, "{}: {test}", file.display());
                named += 1;
            }
        }
    }
    assert!(named > 20);
}

/// The name under which a heading is linked to.
fn anchor(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = text
        .chars()
        .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn every_relative_link_leads_somewhere() {
    let mut pages = files("docs", "md");
    pages.push(root().join("README.md"));
    let mut broken = Vec::new();
    for page in &pages {
        let text = read(page);
        let targets = text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split_once(')'));
        for (target, _) in targets.filter(|(target, _)| !target.contains("://")) {
            let (path, fragment) = target.split_once('#').unwrap_or((target, ""));
            let to = if path.is_empty() {
                page.clone()
            } else {
                page.parent().unwrap().join(path)
            };
            let has_heading = || {
                let text = std::fs::read_to_string(&to).unwrap_or_default();
                let mut headings = text.lines().filter(|line| line.starts_with('#'));
                headings.any(|heading| anchor(heading) == fragment)
            };
            if !to.exists() || !(fragment.is_empty() || has_heading()) {
                broken.push(format!("{}: {target}", page.display()));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}
