//! What knowing of slower tiers is worth: two simulated engines with small accelerator memories
//! and `FlexKV` below them, routed by accelerator memory alone and by all tiers, with tiers that
//! load fast and with such that load as slowly as blocks are computed.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use kv_benches::fleet::{Fleet, Options};
use kv_benches::report::{Report, Table};
use kv_benches::spread::Spread;
use kv_sim::Limits;
use kv_sim::engine::{Config, Engine};
use kv_sim::flexkv::{self, LevelConfig};
use kv_sim::load::{self, Format, Pace, Workload};
use kv_sim::own::{OwnEvents, Zmq};
use serde_json::{Value, json};

const ENGINES: u64 = 2;
const BLOCK: usize = 16;
const GPU_BLOCKS: usize = 1_500;
const CPU_BLOCKS: usize = 5_000;
const SSD_BLOCKS: usize = 20_000;
const PREFILL_US_PER_TOKEN: u64 = 80;
const REQUESTS: usize = 400;
const RATE: f64 = 7.0;
const REPEATS: u64 = 3;

/// Tiers of some speed.
#[derive(Clone, Copy)]
struct Speed {
    name: &'static str,
    cpu_us: u64,
    ssd_us: u64,
}

const SPEEDS: [Speed; 2] = [
    Speed {
        name: "fast tiers",
        cpu_us: 60,
        ssd_us: 320,
    },
    Speed {
        name: "slow tiers",
        cpu_us: 1_200,
        ssd_us: 2_500,
    },
];

/// What of one way of routing was measured, one number to a repeat.
#[derive(Default)]
struct Measured {
    p50: Vec<f64>,
    p95: Vec<f64>,
    cached: Vec<f64>,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut report = Report::new("tiers");
    for speed in SPEEDS {
        let (mut device, mut tiers) = (Measured::default(), Measured::default());
        for repeat in 0..REPEATS {
            // Each goes first as often as the machine allows.
            let by_turns = repeat % 2 == 0;
            for is_first in [true, false] {
                let is_aware = is_first == by_turns;
                let into = if is_aware { &mut tiers } else { &mut device };
                measure(into, speed, is_aware, repeat).await?;
            }
        }
        tell(&mut report, speed, device, tiers);
    }
    report.finish()
}

async fn measure(
    into: &mut Measured,
    speed: Speed,
    is_aware: bool,
    repeat: u64,
) -> anyhow::Result<()> {
    let mut engines = Vec::new();
    for id in 1..=ENGINES {
        engines.push(Engine::start(engine(id, speed)).await?);
    }
    let mut workers = Vec::new();
    for engine in &engines {
        let (endpoint, _) = engine.event_addresses();
        let endpoint = endpoint.context("an engine without a stream")?;
        workers.push(json!({
            "id": engine.worker_id(),
            "endpoint": engine.address(),
            "events": {"zmq": {"endpoint": endpoint, "topic": "kv-events"}},
        }));
    }
    let mut more = json!({"workers": workers});
    if is_aware {
        more["families"] = json!([{
            "family": "flex-kv",
            "media": ["CPU", "SSD"],
            "max_blocks": CPU_BLOCKS + SSD_BLOCKS,
        }]);
        more["host_cache_hit_weight"] = json!(weight(speed.cpu_us));
        more["disk_cache_hit_weight"] = json!(weight(speed.ssd_us));
    }
    let addresses: Vec<SocketAddr> = engines.iter().map(Engine::address).collect();
    let options = Options {
        tokenizer: None,
        workers: &addresses,
        mode: "kv",
        decision_header: false,
    };
    let fleet = Fleet::start_with(options, more).await?;
    let envoy = fleet.envoy(1, |_| ()).await?;
    let report = load::run(
        &load::Options {
            url: format!("http://127.0.0.1:{}", envoy.port),
            model: "sim".into(),
            label: speed.name.into(),
            workload: Workload::Agents,
            seed: 1 + repeat,
            requests: REQUESTS,
            pace: Pace::Rate(RATE),
            format: Format::Tokens,
            timeout: Duration::from_secs(120),
        },
        |_| (),
    )
    .await?;
    ensure!(report.failed.is_empty(), "{:?}", report.first_failure);
    let index: Value = fleet.index().await?;
    ensure!(index["gaps"] == 0, "events were lost: {index}");
    into.p50.push(report.ttft_ms.p50);
    into.p95.push(report.ttft_ms.p95);
    into.cached.push(100.0 * report.cached_share.unwrap_or(0.0));
    for engine in engines {
        engine.shutdown().await;
    }
    Ok(())
}

fn engine(worker_id: u64, speed: Speed) -> Config {
    let level = |blocks, us| LevelConfig {
        blocks,
        load_per_block: Duration::from_micros(us),
    };
    let default = Config::default();
    Config {
        worker_id,
        blocks: GPU_BLOCKS,
        limits: Limits {
            block_size: BLOCK,
            prefill_per_token: Duration::from_micros(PREFILL_US_PER_TOKEN),
            ..default.limits.clone()
        },
        own: Some(OwnEvents::Zmq(Zmq::default())),
        flexkv: Some(flexkv::Config {
            cpu: level(CPU_BLOCKS, speed.cpu_us),
            ssd: level(SSD_BLOCKS, speed.ssd_us),
        }),
        ..default
    }
}

/// The part of a block's prefill that a hit on a tier saves.
fn weight(load_us: u64) -> f64 {
    let compute_us = PREFILL_US_PER_TOKEN * BLOCK as u64;
    (1.0 - load_us as f64 / compute_us as f64).max(0.0)
}

fn tell(report: &mut Report, speed: Speed, device: Measured, tiers: Measured) {
    let title = format!(
        "{}: {} us a block from host memory, {} us from disk, {} us to compute; ms",
        speed.name,
        speed.cpu_us,
        speed.ssd_us,
        PREFILL_US_PER_TOKEN * BLOCK as u64
    );
    let columns = ["routed by", "TTFT p50", "TTFT p95", "cached tokens, %"];
    let mut table = Table::new(&title, &columns);
    let spreads = [("device alone", device), ("all tiers", tiers)].map(|(name, measured)| {
        let spreads = [measured.p50, measured.p95, measured.cached].map(Spread::of);
        let [p50, p95, cached] = spreads;
        table.row(vec![name.into(), p50.into(), p95.into(), cached.into()]);
        spreads
    });
    report.table(&table);
    let [[device_p50, device_p95, _], [tiers_p50, tiers_p95, _]] = spreads;
    let what = format!("{}: TTFT p50 by all tiers against device alone", speed.name);
    report.at_most(&what, tiers_p50.median, device_p50.median, "ms");
    let what = format!("{}: TTFT p95 by all tiers against device alone", speed.name);
    report.at_most(&what, tiers_p95.median, device_p95.median, "ms");
}
