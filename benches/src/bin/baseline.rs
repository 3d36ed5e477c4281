//! What routing costs a request: the same Envoy without a filter, with a filter that does nothing,
//! and with ours in both modes.

use std::time::Instant;

use kv_benches::http::{Connection, request, together};
use kv_benches::modes::{self, Modes};
use kv_benches::report::{Report, Table};
use kv_benches::spread::{Spread, quantile};
use kv_benches::{cpu, noop, plain, sink};
use kv_tests::envoy::Envoy;

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
    let prompts = modes::prompts(TOKENS, WORKERS);
    let requests: Vec<Vec<u8>> = prompts.iter().map(|p| request(&p.body())).collect();
    let modes = Modes::start(&workers, BLOCKS, &prompts).await?;
    let dir = tempfile::tempdir()?;
    let module = dir.path().join("noop.wasm");
    std::fs::write(&module, noop::module())?;
    let module = module.to_string_lossy();
    for threads in [1, 2] {
        let (round_robin, kv) = (&modes.round_robin, &modes.kv);
        let unfiltered = round_robin.envoy(threads, |b| plain::change(b, None));
        let idle = round_robin.envoy(threads, |b| plain::change(b, Some(&module)));
        let started = [
            ("no filter, round robin", unfiltered.await?),
            ("no-op filter", idle.await?),
            (
                "our filter, round-robin",
                round_robin.envoy(threads, |_| ()).await?,
            ),
            ("our filter, kv", kv.envoy(threads, |_| ()).await?),
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

fn measure(variant: &mut Variant, requests: &[Vec<u8>], counts: bool) -> anyhow::Result<()> {
    let (port, process) = (variant.envoy.port, variant.envoy.process.id());
    let mut times = send(port, requests, ALONE)?;
    times.sort_by(f64::total_cmp);
    let (_, spent) = cpu::spent(&[process], || {
        together(CONNECTIONS, || send(port, requests, TOGETHER))
    })?;
    let sent = (CONNECTIONS * TOGETHER) as f64;
    if counts {
        variant.cpu_us.push(spent.cpu_us[0] / sent);
        variant.per_second.push(sent / spent.seconds);
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
