//! What routing costs a request: the same Envoy without a filter, with a filter that does nothing,
//! and with ours in both modes.

use std::thread;
use std::time::Instant;

use kv_benches::corpus::Corpus;
use kv_benches::feed::Feed;
use kv_benches::fleet::{Fleet, Options};
use kv_benches::http::{Connection, request};
use kv_benches::prompt::{Case, Prompt};
use kv_benches::report::{Report, Table};
use kv_benches::spread::{Spread, quantile};
use kv_benches::{cpu, noop, sink};
use kv_core::rng::Rng;
use kv_tests::envoy::Envoy;
use serde_json::{Value, json};

const WORKERS: usize = 4;
const BLOCKS: usize = 200_000;
const TOKENS: usize = 2_000;
const REPEATS: usize = 5;
/// Requests of a repeat on one connection, for latency.
const ALONE: usize = 2_000;
/// Requests of a repeat on each of several connections, for CPU time.
const TOGETHER: usize = 2_000;
const CONNECTIONS: usize = 4;

/// An Envoy and what was measured of it.
struct Variant {
    name: &'static str,
    envoy: Envoy,
    cpu_us: Vec<f64>,
    p50_us: Vec<f64>,
    p99_us: Vec<f64>,
    per_second: Vec<f64>,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut report = Report::new("baseline");
    let workers = sink::start(WORKERS)?;
    let mut rng = Rng::new(4);
    let prompts: Vec<Prompt> = (0..16)
        .map(|_| Prompt::new(Case::Full, TOKENS, WORKERS, &mut rng))
        .collect();
    let requests: Vec<Vec<u8>> = prompts.iter().map(|p| request(&p.body())).collect();
    let mut fleets = Vec::new();
    for mode in ["round-robin", "kv"] {
        let options = Options {
            workers: &workers,
            mode,
            decision_header: false,
        };
        let fleet = Fleet::start(options).await?;
        let mut feed = Feed::connect(&fleet, 1).await?;
        for conversation in Corpus::new(WORKERS, 1).of_size(BLOCKS) {
            feed.add(&fleet, conversation.stores).await?;
        }
        feed.add(&fleet, prompts.iter().flat_map(|p| p.stores.clone()))
            .await?;
        feed.finish(&fleet).await?;
        fleets.push(fleet);
    }
    let dir = tempfile::tempdir()?;
    let module = dir.path().join("noop.wasm");
    std::fs::write(&module, noop::module())?;
    let module = module.to_string_lossy();
    for threads in [1, 2] {
        let started = [
            (
                "no filter, round robin",
                fleets[0].envoy(threads, |b| plain(b, None)).await?,
            ),
            (
                "no-op filter",
                fleets[0]
                    .envoy(threads, |b| plain(b, Some(&module)))
                    .await?,
            ),
            (
                "our filter, round-robin",
                fleets[0].envoy(threads, |_| ()).await?,
            ),
            ("our filter, kv", fleets[1].envoy(threads, |_| ()).await?),
        ];
        let mut variants = started.map(|(name, envoy)| Variant {
            name,
            envoy,
            cpu_us: Vec::new(),
            p50_us: Vec::new(),
            p99_us: Vec::new(),
            per_second: Vec::new(),
        });
        for repeat in 0..=REPEATS {
            for i in 0..variants.len() {
                let variant = &mut variants[(i + repeat) % 4];
                measure(variant, &requests, repeat > 0)?;
            }
        }
        tell(&mut report, threads, variants);
    }
    report.finish()
}

/// Takes our filter and its policy out of a bootstrap, and puts another filter in its place.
fn plain(bootstrap: &mut Value, filter: Option<&str>) {
    let manager =
        &mut bootstrap["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0];
    let filters = &mut manager["typed_config"]["http_filters"];
    let list = filters.as_array_mut().expect("HTTP filters");
    list.remove(0);
    list.splice(
        0..0,
        filter.map(|file| {
            json!({
                "name": "noop",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.filters.http.wasm.v3.Wasm",
                    "config": {"name": "noop", "root_id": "noop", "vm_config": {
                        "vm_id": "noop",
                        "runtime": "envoy.wasm.runtime.v8",
                        "code": {"local": {"filename": file}},
                    }},
                },
            })
        }),
    );
    let clusters = bootstrap["static_resources"]["clusters"]
        .as_array_mut()
        .expect("clusters");
    for cluster in clusters {
        if cluster["load_balancing_policy"].is_object() {
            cluster["load_balancing_policy"] = json!({"policies": [{"typed_extension_config": {
                "name": "envoy.load_balancing_policies.round_robin",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.load_balancing_policies\
                        .round_robin.v3.RoundRobin",
                },
            }}]});
        }
    }
}

fn measure(variant: &mut Variant, requests: &[Vec<u8>], counts: bool) -> anyhow::Result<()> {
    let (port, process) = (variant.envoy.port, variant.envoy.process.id());
    let mut times = send(port, requests, ALONE)?;
    times.sort_by(f64::total_cmp);
    let (before, since) = (cpu::total_ns(process)?, Instant::now());
    thread::scope(|scope| {
        let senders: Vec<_> = (0..CONNECTIONS)
            .map(|_| scope.spawn(|| send(port, requests, TOGETHER)))
            .collect();
        senders
            .into_iter()
            .try_for_each(|s| s.join().expect("a client thread").map(drop))
    })?;
    let sent = (CONNECTIONS * TOGETHER) as f64;
    let seconds = since.elapsed().as_secs_f64();
    let used_us = (cpu::total_ns(process)? - before) as f64 / 1e3;
    if counts {
        variant.cpu_us.push(used_us / sent);
        variant.per_second.push(sent / seconds);
        variant.p50_us.push(quantile(&times, 0.5));
        variant.p99_us.push(quantile(&times, 0.99));
    }
    Ok(())
}

/// Sends requests one after the other on one connection; their times in microseconds.
fn send(port: u16, requests: &[Vec<u8>], count: usize) -> anyhow::Result<Vec<f64>> {
    let mut connection = Connection::open(port)?;
    let mut times = Vec::with_capacity(count);
    for bytes in requests.iter().cycle().take(count) {
        let since = Instant::now();
        connection.send(bytes)?;
        times.push(since.elapsed().as_secs_f64() * 1e6);
    }
    Ok(times)
}

fn tell(report: &mut Report, threads: u32, variants: [Variant; 4]) {
    let title = format!("{threads} thread(s), {TOKENS} token ids, {WORKERS} workers; us");
    let mut table = Table::new(
        &title,
        &[
            "Envoy",
            "CPU/request",
            "more than no filter",
            "alone p50",
            "alone p99",
            "requests/s",
        ],
    );
    let base = Spread::of(variants[0].cpu_us.clone()).median;
    for variant in variants {
        let cpu = Spread::of(variant.cpu_us);
        table.row(vec![
            variant.name.into(),
            cpu.into(),
            (cpu.median - base).into(),
            Spread::of(variant.p50_us).into(),
            Spread::of(variant.p99_us).into(),
            Spread::of(variant.per_second).into(),
        ]);
    }
    report.table(&table);
}
