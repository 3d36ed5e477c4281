//! What a prompt that is text costs in each router, before the same engines, beside Envoy alone.
//!
//! The argument is a JSON file that names the routers, which run already, Envoy alone first:
//! `[{"name": "envoy", "port": 1, "processes": [2, 3], "model": "sim"}]`. `benches/peers/text.py`
//! starts them.

use std::fs;

use anyhow::{Context as _, bail};
use kv_benches::chat::{Kind, Request, Size, Taken, measure, sizes};
use kv_benches::report::{Report, Table};
use kv_benches::spread::Spread;
use kv_core::rng::Rng;
use serde_json::Value;

const REPEATS: usize = 3;

/// A router.
struct Arm {
    name: String,
    port: u16,
    processes: Vec<u32>,
    model: String,
}

impl Arm {
    fn of(value: &Value) -> Option<Self> {
        let processes = value["processes"].as_array()?.iter();
        Some(Self {
            name: value["name"].as_str()?.to_owned(),
            port: u16::try_from(value["port"].as_u64()?).ok()?,
            processes: processes
                .map(|id| u32::try_from(id.as_u64()?).ok())
                .collect::<Option<_>>()?,
            model: value["model"].as_str()?.to_owned(),
        })
    }
}

/// What the repeats of a router took.
#[derive(Default)]
struct Measured {
    alone_us: Vec<f64>,
    cpu_us: Vec<f64>,
    per_second: Vec<f64>,
    /// Why there are no more of them.
    failed: Option<String>,
}

impl Measured {
    fn add(&mut self, taken: &Taken) {
        self.alone_us.push(taken.alone_us);
        self.cpu_us.push(taken.cpu_us.iter().sum());
        self.per_second.push(taken.per_second);
    }
}

fn main() -> anyhow::Result<()> {
    let file = std::env::args().nth(1).context("which routers?")?;
    let all: Value = serde_json::from_slice(&fs::read(&file)?)?;
    let arms = all.as_array().map(|all| all.iter().map(Arm::of).collect());
    let Some(Some(arms)) = arms else {
        bail!("{file}: no list of routers");
    };
    let arms: Vec<Arm> = arms;
    let mut report = Report::new("text-peers");
    let mut rng = Rng::new(1);
    for size in sizes() {
        for (kind, said) in [(Kind::NextTurn, "next turn"), (Kind::Cold, "cold")] {
            for connections in [1, 20, 64] {
                let title = format!("{} words, {said}, {connections} connection(s)", size.words);
                report.table(&compare(&arms, size, kind, connections, &title, &mut rng));
            }
        }
    }
    report.finish()
}

/// Has each router take the same requests in turn.
fn compare(
    arms: &[Arm],
    size: &Size,
    kind: Kind,
    connections: usize,
    title: &str,
    rng: &mut Rng,
) -> Table {
    let seed = rng.next_u64();
    let requests: Vec<Request> = arms
        .iter()
        .map(|arm| Request::new(&arm.model, size.words, kind, &mut Rng::new(seed)))
        .collect();
    let mut measured: Vec<Measured> = arms.iter().map(|_| Measured::default()).collect();
    for repeat in 0..=REPEATS {
        for i in 0..arms.len() {
            let i = (i + repeat) % arms.len();
            if measured[i].failed.is_some() {
                continue;
            }
            let (arm, request) = (&arms[i], &requests[i]);
            match measure(arm.port, &arm.processes, size, connections, request) {
                Err(error) => measured[i].failed = Some(error.to_string()),
                // The first one is for what they remember of the conversation.
                Ok(taken) if repeat > 0 => measured[i].add(&taken),
                Ok(_) => {}
            }
        }
    }
    let columns = [
        "us",
        "one alone, p50",
        "more than Envoy",
        "CPU a request",
        "requests/s",
        "times Envoy",
    ];
    let mut table = Table::new(title, &columns);
    let pairs = |ours: &[f64], base: &[f64], of: fn(f64, f64) -> f64| {
        Spread::of(ours.iter().zip(base).map(|(a, b)| of(*a, *b)).collect())
    };
    let (base_us, base_per_second) = (measured[0].alone_us.clone(), measured[0].per_second.clone());
    for (arm, measured) in arms.iter().zip(measured) {
        if let Some(why) = measured.failed {
            let why: String = why.chars().take(60).collect();
            let mut row = vec![arm.name.as_str().into(), why.into()];
            row.resize(columns.len(), "".into());
            table.row(row);
            continue;
        }
        table.row(vec![
            arm.name.as_str().into(),
            Spread::of(measured.alone_us.clone()).into(),
            pairs(&measured.alone_us, &base_us, |a, b| a - b).into(),
            Spread::of(measured.cpu_us).into(),
            Spread::of(measured.per_second.clone()).into(),
            pairs(&measured.per_second, &base_per_second, |a, b| a / b).into(),
        ]);
    }
    table
}
