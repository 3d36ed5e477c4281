//! Lookups and changes a second of one core, ours beside Dynamo's indexes.
//!
//! Time is the processor's, of all threads of the process, so that other processes don't count and
//! an index with a thread of its own has no second core. Indexes take turns, and the median of the
//! repeats counts. An argument picks one length of the sequences.

use std::fs;
use std::hint::black_box;

use kv_parity::workload::{ENTRIES, Prompt, Sent, Shape, Subject, Workload};

const REPEATS: usize = 3;
const SINGLES: usize = 100_000;
const QUERIES: usize = 2_000;
/// What is measured, in the order of the columns.
const WHAT: [&str; 6] = [
    "full hit k/s",
    "half hit k/s",
    "miss k/s",
    "stores of 64, M blocks/s",
    "stores of 1, M/s",
    "removals of 1, M/s",
];

/// Processor time of this process, seconds.
fn used() -> f64 {
    let tasks = fs::read_dir("/proc/self/task").expect("threads");
    let ns = |task: Result<fs::DirEntry, _>| {
        let text = fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<f64>().ok()
    };
    // The accounts of a running thread are brought up to date when it yields.
    std::thread::yield_now();
    tasks.filter_map(ns).sum::<f64>() * 1e-9
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, f64) {
    let before = used();
    let done = work();
    (done, used() - before)
}

struct Material {
    stores: Vec<Sent>,
    singles: (Vec<Sent>, Vec<Sent>),
    queries: [Vec<Prompt>; 3],
}

/// One measure of each kind, and the depths found.
fn measure(name: &str, material: &Material) -> ([f64; 6], [u64; 3]) {
    let mut subject = Subject::new(name);
    let stores = subject.events(&material.stores);
    let ((), bulk) = timed(|| subject.apply(stores));
    let mut rates = [0.0; 6];
    let mut found = [0; 3];
    for (i, prompts) in material.queries.iter().enumerate() {
        // Enough rounds for the clock's resolution.
        let rounds = [20, 20, 200][i];
        let mut seconds = 0.0;
        for _ in 0..rounds {
            let queries = subject.queries(prompts);
            let (depths, took) = timed(|| black_box(subject.find(queries)));
            found[i] = depths;
            seconds += took;
        }
        rates[i] = (rounds * prompts.len()) as f64 / seconds / 1e3;
    }
    let stores = subject.events(&material.singles.0);
    let removals = subject.events(&material.singles.1);
    let ((), stored) = timed(|| subject.apply(stores));
    let ((), removed) = timed(|| subject.apply(removals));
    rates[3] = ENTRIES as f64 / bulk / 1e6;
    rates[4] = SINGLES as f64 / stored / 1e6;
    rates[5] = SINGLES as f64 / removed / 1e6;
    (rates, found)
}

fn main() {
    let (mut missed, mut cells) = (0, 0);
    let only: Option<usize> = std::env::args().nth(1).and_then(|depth| depth.parse().ok());
    println!("{ENTRIES} entries; per second of processor time; medians of {REPEATS}");
    for (workers, copies) in [(8, 1), (64, 1), (64, 16)] {
        for depth in [128, 512, 2048] {
            if only.is_some_and(|only| only != depth) {
                continue;
            }
            let shape = Shape {
                depth,
                workers,
                copies,
            };
            let mut workload = Workload::new(shape);
            let material = Material {
                stores: workload.stores(),
                singles: workload.singles(SINGLES),
                queries: [1.0, 0.5, 0.0].map(|share| workload.queries(QUERIES, share)),
            };
            let mut all = vec![Vec::new(); Subject::ALL.len()];
            let mut depths = Vec::new();
            for _ in 0..REPEATS {
                for (name, rates) in Subject::ALL.iter().zip(&mut all) {
                    let (measured, found) = measure(name, &material);
                    rates.push(measured);
                    depths.push((*name, found));
                }
            }
            for (name, found) in &depths {
                assert_eq!(*found, depths[0].1, "{name} finds what ours finds");
            }
            println!("\ndepth {depth}, {workers} ranks, {copies} to a sequence");
            print!("{:12}", "");
            WHAT.iter().for_each(|what| print!("{what:>26}"));
            println!();
            let median = |rates: &[[f64; 6]], i: usize| {
                let mut of: Vec<f64> = rates.iter().map(|r| r[i]).collect();
                of.sort_by(f64::total_cmp);
                of[of.len() / 2]
            };
            for (name, rates) in Subject::ALL.iter().zip(&all) {
                print!("{name:12}");
                (0..6).for_each(|i| print!("{:>26.2}", median(rates, i)));
                println!();
            }
            print!("{:12}", "ours/best");
            for i in 0..6 {
                let best = all[1..].iter().map(|rates| median(rates, i));
                let ratio = median(&all[0], i) / best.fold(0.0, f64::max);
                missed += usize::from(ratio < 1.0);
                cells += 1;
                print!("{ratio:>26.2}");
            }
            println!();
        }
    }
    println!("\nours is below the best of the others in {missed} of {cells} cells");
}
