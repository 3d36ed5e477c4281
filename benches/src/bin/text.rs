//! What a prompt costs that is text: the same Envoy without a filter, and ours with a tokenizer, for a
//! text that nobody has seen and for the next turn of a conversation. `KV_BENCH_WORDS` picks one size
//! of prompts.

use std::path::PathBuf;

use anyhow::ensure;
use kv_benches::chat::{Kind, Request, Taken, measure, sizes};
use kv_benches::fleet::{Fleet, Options};
use kv_benches::report::{Report, Table};
use kv_benches::spread::Spread;
use kv_benches::{plain, sink};
use kv_core::rng::Rng;

const WORKERS: usize = 4;
const REPEATS: usize = 5;
const THREADS: u32 = 2;

#[derive(Default)]
struct Measured {
    envoy_us: Vec<f64>,
    sidecar_us: Vec<f64>,
    alone_us: Vec<f64>,
    per_second: Vec<f64>,
}

impl Measured {
    fn add(&mut self, taken: &Taken) {
        self.envoy_us.push(taken.cpu_us[0]);
        self.sidecar_us.push(taken.cpu_us[1]);
        self.alone_us.push(taken.alone_us);
        self.per_second.push(taken.per_second);
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let folder = std::env::var_os("KV_BENCH_MODEL").map_or_else(
        || PathBuf::from("target/tokenizer-parity/models/trl-deepseekv3"),
        PathBuf::from,
    );
    ensure!(
        folder.exists(),
        "{}: no model; run make tokenizer-parity CONVERSATIONS=1, or set KV_BENCH_MODEL",
        folder.display()
    );
    let folder = std::path::absolute(folder)?;
    let mut report = Report::new("text");
    let workers = sink::start(WORKERS)?;
    let fleet = Fleet::start(Options {
        workers: &workers,
        mode: "kv",
        decision_header: false,
        tokenizer: Some(&folder),
    })
    .await?;
    let bare = fleet.envoy(THREADS, |b| plain::change(b, None)).await?;
    let ours = fleet.envoy(THREADS, |_| ()).await?;
    let sidecar = fleet.sidecar.id();
    let mut rng = Rng::new(1);
    for size in sizes() {
        let next = Request::new("m", size.words, Kind::NextTurn, &mut rng);
        let cold = Request::new("m", size.words, Kind::Cold, &mut rng);
        for connections in [1, 20, 64] {
            let variants = [
                ("no filter", &bare, &next),
                ("ours, next turn", &ours, &next),
                ("ours, cold", &ours, &cold),
            ];
            let mut measured = [(); 3].map(|()| Measured::default());
            for repeat in 0..=REPEATS {
                for i in 0..variants.len() {
                    let i = (i + repeat) % variants.len();
                    let (_, envoy, request) = variants[i];
                    let processes = [envoy.process.id(), sidecar];
                    let taken = measure(envoy.port, &processes, size, connections, request)?;
                    if repeat > 0 {
                        measured[i].add(&taken);
                    }
                }
            }
            let title = format!(
                "{} words, {connections} connection(s), {THREADS} threads; us",
                size.words
            );
            let columns = [
                "",
                "alone p50",
                "Envoy CPU",
                "sidecar CPU",
                "requests/s",
                "times no filter",
            ];
            let mut table = Table::new(&title, &columns);
            let base = measured[0].per_second.clone();
            for ((name, ..), measured) in variants.into_iter().zip(measured) {
                let pairs = measured.per_second.iter().zip(&base);
                let ratio = Spread::of(pairs.map(|(ours, base)| ours / base).collect());
                table.row(vec![
                    name.into(),
                    Spread::of(measured.alone_us).into(),
                    Spread::of(measured.envoy_us).into(),
                    Spread::of(measured.sidecar_us).into(),
                    Spread::of(measured.per_second).into(),
                    ratio.into(),
                ]);
            }
            report.table(&table);
        }
    }
    let read = fleet.samples("kv_router_texts_total").await?;
    let texts: f64 = read.iter().map(|(_, n)| n).sum();
    let whole = read.iter().filter(|(kind, _)| kind.contains("whole"));
    println!(
        "read to their end: {} of {texts}",
        whole.map(|(_, n)| n).sum::<f64>()
    );
    report.finish()
}
