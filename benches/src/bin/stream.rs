//! What routing costs a streamed answer: the same Envoy without a filter and with ours in both
//! modes, and what the sidecar spends on the load reports of it. `KV_BENCH_TOKENS` picks one length.

use kv_benches::http::{Connection, Streamed, stream_request, together};
use kv_benches::modes::{self, Modes};
use kv_benches::report::{Report, Table};
use kv_benches::spread::{Spread, quantile};
use kv_benches::{cpu, plain, sink};
use kv_tests::envoy::Envoy;

const WORKERS: usize = 4;
const BLOCKS: usize = 200_000;
const TOKENS: usize = 2_000;
const REPEATS: usize = 5;
/// Most CPU of Envoy with our filter, as a multiple of that without a filter.
const AIM: f64 = 1.25;

/// A length of answers.
struct Length {
    /// Tokens of an answer, an event each.
    tokens: usize,
    /// Requests of a repeat on one connection, for latency.
    alone: usize,
    /// Connections at once, for CPU time: with few tokens they never wait for the worker.
    connections: usize,
    /// Requests of a repeat on each of them.
    together: usize,
}

/// The first has the aim.
const LENGTHS: [Length; 2] = [
    Length {
        tokens: 64,
        alone: 16,
        connections: 16,
        together: 40,
    },
    Length {
        tokens: 1,
        alone: 1_000,
        connections: 4,
        together: 1_000,
    },
];

/// An Envoy and the sidecar beside it.
struct Variant {
    name: &'static str,
    envoy: Envoy,
    sidecar: u32,
}

/// What was measured of a variant with one length of answers, a value per repeat.
#[derive(Default)]
struct Measured {
    envoy_us: Vec<f64>,
    sidecar_us: Vec<f64>,
    first_us: Vec<f64>,
    all_us: Vec<f64>,
    reads: Vec<f64>,
    per_second: Vec<f64>,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut report = Report::new("stream");
    let workers = sink::start(WORKERS)?;
    let prompts = modes::prompts(TOKENS, WORKERS);
    let modes = Modes::start(&workers, BLOCKS, &prompts).await?;
    let (round_robin, kv) = (&modes.round_robin, &modes.kv);
    let only = std::env::var("KV_BENCH_TOKENS").ok();
    let is_wanted = |length: &&Length| {
        let only = only.as_ref();
        only.is_none_or(|only| *only == length.tokens.to_string())
    };
    for threads in [1, 2] {
        let variant = |name, envoy, sidecar| Variant {
            name,
            envoy,
            sidecar,
        };
        // The sidecar beside the Envoy without a filter has nothing to do with the requests: its row
        // shows what it uses at rest.
        let variants = [
            variant(
                "no filter, round robin",
                kv.envoy(threads, |b| plain::change(b, None)).await?,
                kv.sidecar.id(),
            ),
            variant(
                "our filter, round-robin",
                round_robin.envoy(threads, |_| ()).await?,
                round_robin.sidecar.id(),
            ),
            variant(
                "our filter, kv",
                kv.envoy(threads, |_| ()).await?,
                kv.sidecar.id(),
            ),
        ];
        for length in LENGTHS.iter().filter(is_wanted) {
            let body = |tokens| prompts.iter().map(move |p| p.stream_body(tokens));
            let requests: Vec<Vec<u8>> = body(length.tokens)
                .map(|body| stream_request(&body, length.tokens))
                .collect();
            let mut measured = [(); 3].map(|()| Measured::default());
            for repeat in 0..=REPEATS {
                for i in 0..variants.len() {
                    let i = (i + repeat) % variants.len();
                    let to = (repeat > 0).then_some(&mut measured[i]);
                    measure(&variants[i], length, &requests, to)?;
                }
            }
            tell(&mut report, threads, length, &variants, measured);
        }
    }
    report.finish()
}

fn measure(
    variant: &Variant,
    length: &Length,
    requests: &[Vec<u8>],
    to: Option<&mut Measured>,
) -> anyhow::Result<()> {
    let port = variant.envoy.port;
    let send = |count| send(port, requests, length.tokens, count);
    let alone = send(length.alone)?;
    let processes = [variant.envoy.process.id(), variant.sidecar];
    let (answers, spent) = cpu::spent(&processes, || {
        together(length.connections, || send(length.together))
    })?;
    let Some(to) = to else { return Ok(()) };
    let sent = (length.connections * length.together) as f64;
    let reads: usize = answers.iter().flatten().map(|a| a.reads).sum();
    to.envoy_us.push(spent.cpu_us[0] / sent);
    to.sidecar_us.push(spent.cpu_us[1] / sent);
    to.first_us.push(median(alone.iter().map(|a| a.first_us)));
    to.all_us.push(median(alone.iter().map(|a| a.all_us)));
    to.reads.push(reads as f64 / sent);
    to.per_second.push(sent / spent.seconds);
    Ok(())
}

/// Sends requests one after the other on one connection.
fn send(
    port: u16,
    requests: &[Vec<u8>],
    events: usize,
    count: usize,
) -> anyhow::Result<Vec<Streamed>> {
    let mut connection = Connection::open(port)?;
    let requests = requests.iter().cycle().take(count);
    requests
        .map(|request| connection.stream(request, events))
        .collect()
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    quantile(&values, 0.5)
}

fn tell(
    report: &mut Report,
    threads: u32,
    length: &Length,
    variants: &[Variant; 3],
    measured: [Measured; 3],
) {
    let Length {
        tokens,
        connections,
        ..
    } = length;
    let title = format!(
        "{threads} thread(s), {TOKENS} token ids in, {tokens} event(s) out {} ms apart, \
         {connections} connections, {WORKERS} workers; us",
        sink::GAP.as_millis(),
    );
    let mut table = Table::new(
        &title,
        &[
            "Envoy",
            "CPU/request",
            "times no filter",
            "sidecar CPU/request",
            "alone first p50",
            "alone all p50",
            "reads/answer",
            "requests/s",
        ],
    );
    let base = measured[0].envoy_us.clone();
    for (variant, measured) in variants.iter().zip(measured) {
        // Of the same repeat: what else the machine did was nearest to the same then.
        let pairs = measured.envoy_us.iter().zip(&base);
        let ratio = Spread::of(pairs.map(|(us, base)| us / base).collect());
        table.row(vec![
            variant.name.into(),
            Spread::of(measured.envoy_us).into(),
            ratio.into(),
            Spread::of(measured.sidecar_us).into(),
            Spread::of(measured.first_us).into(),
            Spread::of(measured.all_us).into(),
            Spread::of(measured.reads).into(),
            Spread::of(measured.per_second).into(),
        ]);
        if variant.name != variants[0].name && *tokens == LENGTHS[0].tokens {
            let what = format!("{}, {threads} thread(s): Envoy's CPU", variant.name);
            report.at_most(&what, ratio.median, AIM, "times no filter");
        }
    }
    report.table(&table);
}
