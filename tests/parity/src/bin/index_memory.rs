//! Bytes to a (rank, block) entry by a counting allocator, ours beside Dynamo's indexes, and ours
//! by its own account.

use std::alloc::System;

use kv_parity::workload::{ENTRIES, Shape, Subject, Workload};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Live bytes since a moment.
fn live(region: &Region<'_, System>) -> f64 {
    let change = region.change();
    change.bytes_allocated as f64 - change.bytes_deallocated as f64
}

fn main() {
    println!("{ENTRIES} entries; bytes to an entry by a counting allocator");
    print!("{:>6}{:>7}{:>8}", "depth", "ranks", "copies");
    Subject::ALL.iter().for_each(|name| print!("{name:>12}"));
    println!("{:>14}{:>12}", "own account", "ours/best");
    for (workers, copies) in [(8, 1), (64, 1), (64, 16)] {
        for depth in [128, 512, 2048] {
            let shape = Shape {
                depth,
                workers,
                copies,
            };
            let workload = Workload::new(shape);
            print!("{depth:>6}{workers:>7}{copies:>8}");
            let mut account = 0.0;
            let bytes = Subject::ALL.map(|name| {
                let stores = workload.stores();
                let region = Region::new(ALLOCATOR);
                let mut subject = Subject::new(name);
                // In parts, so that what waits for the thread is not counted.
                for part in stores.chunks(256) {
                    subject.apply(subject.events(part));
                }
                if let Subject::Ours(index, _) = &subject {
                    account = index.stats().bytes as f64 / ENTRIES as f64;
                }
                let bytes = live(&region) / ENTRIES as f64;
                print!("{bytes:>12.1}");
                bytes
            });
            let best = bytes[1..].iter().copied().fold(f64::INFINITY, f64::min);
            println!("{account:>14.1}{:>12.2}", bytes[0] / best);
        }
    }
}
