//! What a prompt costs that is text: the same Envoy without a filter, and ours with a tokenizer, for a
//! text that nobody has seen and for the next turn of a conversation. `KV_BENCH_WORDS` picks one size
//! of prompts.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::ensure;
use kv_benches::fleet::{Fleet, Options};
use kv_benches::http::{Connection, together};
use kv_benches::report::{Report, Table};
use kv_benches::spread::{Spread, quantile};
use kv_benches::{cpu, plain, sink};
use kv_core::rng::Rng;
use kv_tests::envoy::Envoy;

const WORKERS: usize = 4;
const REPEATS: usize = 5;
const THREADS: u32 = 2;
/// Words of the common language that prompts are made of.
const WORDS: &str = "time person year way day thing man world life hand part child eye woman place \
    work week case point government company number group problem fact be have do say get make go \
    know take see come think look want give use find tell ask seem feel try leave call good new \
    first last long great little own other old right big high different small large next early";

/// A size of prompts, and how many are sent in a repeat.
struct Size {
    words: usize,
    alone: usize,
    together: usize,
}

const SIZES: [Size; 3] = [
    Size {
        words: 64,
        alone: 300,
        together: 1_200,
    },
    Size {
        words: 4_096,
        alone: 60,
        together: 240,
    },
    Size {
        words: 36_000,
        alone: 12,
        together: 60,
    },
];

/// What a request's text has in common with those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Nothing.
    Cold,
    /// All but the last message.
    NextTurn,
}

/// A request whose every copy is another text.
struct Request {
    bytes: Vec<u8>,
    /// Where its number stands.
    at: usize,
    next: AtomicU64,
}

const MARK: &str = "0123456789abcdef";

impl Request {
    fn new(words: usize, kind: Kind, rng: &mut Rng) -> Self {
        let all: Vec<&str> = WORDS.split_whitespace().collect();
        let text: Vec<&str> = (0..words).map(|_| all[rng.below(all.len())]).collect();
        let text = text.join(" ");
        let (first, last) = match kind {
            Kind::Cold => (format!("{MARK} {text}"), "and then?".to_owned()),
            Kind::NextTurn => (text, format!("and then {MARK}?")),
        };
        let body = format!(
            r#"{{"model":"m","max_tokens":1,"messages":[{{"role":"user","content":"{first}"}},{{"role":"assistant","content":"I see."}},{{"role":"user","content":"{last}"}}]}}"#
        );
        let bytes = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        );
        Self {
            at: bytes.find(MARK).unwrap_or_default(),
            bytes: bytes.into_bytes(),
            next: AtomicU64::new(rng.next_u64()),
        }
    }

    /// A text that has not been before, in `buffer`.
    fn write(&self, buffer: &mut Vec<u8>) {
        let number = self
            .next
            .fetch_add(0x9E37_79B9_7F4A_7C15, Ordering::Relaxed);
        buffer.clone_from(&self.bytes);
        buffer[self.at..self.at + MARK.len()].copy_from_slice(format!("{number:016x}").as_bytes());
    }
}

#[derive(Default)]
struct Measured {
    envoy_us: Vec<f64>,
    sidecar_us: Vec<f64>,
    alone_us: Vec<f64>,
    per_second: Vec<f64>,
}

/// Sends requests one after the other and returns what each took, in microseconds.
fn send(port: u16, request: &Request, count: usize) -> anyhow::Result<Vec<f64>> {
    let mut connection = Connection::open(port)?;
    let mut buffer = Vec::new();
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        request.write(&mut buffer);
        let since = Instant::now();
        connection.send(&buffer)?;
        times.push(since.elapsed().as_secs_f64() * 1e6);
    }
    Ok(times)
}

fn measure(
    envoy: &Envoy,
    sidecar: u32,
    size: &Size,
    connections: usize,
    request: &Request,
    to: Option<&mut Measured>,
) -> anyhow::Result<()> {
    let mut alone = send(envoy.port, request, size.alone)?;
    alone.sort_by(f64::total_cmp);
    let each = (size.together / connections).max(1);
    let (_, spent) = cpu::spent(&[envoy.process.id(), sidecar], || {
        together(connections, || send(envoy.port, request, each))
    })?;
    let Some(to) = to else { return Ok(()) };
    let sent = (connections * each) as f64;
    to.envoy_us.push(spent.cpu_us[0] / sent);
    to.sidecar_us.push(spent.cpu_us[1] / sent);
    to.alone_us.push(quantile(&alone, 0.5));
    to.per_second.push(sent / spent.seconds);
    Ok(())
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
    let only = std::env::var("KV_BENCH_WORDS").ok();
    let is_wanted = |size: &&Size| {
        only.as_ref()
            .is_none_or(|only| *only == size.words.to_string())
    };
    for size in SIZES.iter().filter(is_wanted) {
        let next = Request::new(size.words, Kind::NextTurn, &mut rng);
        let cold = Request::new(size.words, Kind::Cold, &mut rng);
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
                    let to = (repeat > 0).then_some(&mut measured[i]);
                    measure(envoy, sidecar, size, connections, request, to)?;
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
