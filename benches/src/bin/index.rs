//! The core alone, natively: the index, its pages, lookups, scanning and hashing.

use std::collections::HashMap;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use kv_benches::corpus::{Conversation, Corpus};
use kv_benches::cpu;
use kv_benches::prompt::{Case, Prompt};
use kv_benches::report::{Report, Table};
use kv_benches::spread::Spread;
use kv_core::event::{EventData, Removed};
use kv_core::hash::{Hashing, Seed, sequence_hashes};
use kv_core::id::{Slot, Tier};
use kv_core::index::{Index, IndexConfig};
use kv_core::reader::{Reader, View};
use kv_core::rng::Rng;
use kv_core::scan::Scanner;

const BLOCKS: usize = 1_000_000;
const OWNERS: usize = 64;
const GROUP: u8 = 32;
const POOL_KEY: u64 = 0x1234_5678_9abc_def1;
const REPEATS: usize = 5;

fn slot(worker: u64) -> Slot {
    Slot(u16::try_from(worker).expect("few workers"))
}

fn empty() -> (Index, usize) {
    let config = IndexConfig {
        epoch: 1,
        level: 6,
        group: GROUP,
        max_orphans: 0,
        max_bytes: usize::MAX,
        max_page_bytes: usize::MAX,
    };
    let mut index = Index::new(config);
    let pool = index.add_pool(POOL_KEY);
    (index, pool)
}

fn fill(index: &mut Index, pool: usize, conversations: &[Conversation]) -> usize {
    let mut blocks = 0;
    for store in conversations.iter().flat_map(|c| &c.stores) {
        blocks += store.data.blocks.len();
        let data = EventData::Stored(store.data.clone());
        index.apply(pool, slot(store.worker), Tier::from(store.tier), &data);
    }
    blocks
}

/// The pages as a reader has them.
fn write_all(index: &mut Index, pages: &mut HashMap<u32, Arc<[u8]>>) -> usize {
    let mut written = 0;
    while index.is_dirty() {
        for write in index.flush() {
            written += 1;
            pages.insert(write.id, write.bytes);
        }
    }
    written
}

fn micros(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e6
}

fn main() -> anyhow::Result<()> {
    let mut report = Report::new("index");
    let conversations: Vec<_> = Corpus::new(OWNERS, 1).of_size(BLOCKS).collect();
    changes(&mut report, &conversations)?;
    lookups(&mut report, &conversations);
    bodies(&mut report);
    report.finish()
}

fn changes(report: &mut Report, conversations: &[Conversation]) -> anyhow::Result<()> {
    let [
        mut stores,
        mut flushes,
        mut images,
        mut singles,
        mut removals,
        mut dumps,
    ] = [const { Vec::new() }; 6];
    let mut memory = 0.0;
    let mut stats = None;
    for repeat in 0..REPEATS {
        let before = cpu::resident(std::process::id())?;
        let (mut index, pool) = empty();
        let since = Instant::now();
        let stored = fill(&mut index, pool, conversations);
        stores.push(stored as f64 / micros(since));
        if repeat == 0 {
            memory = (cpu::resident(std::process::id())? - before) as f64;
        }

        let mut pages = HashMap::new();
        let since = Instant::now();
        let written = write_all(&mut index, &mut pages);
        flushes.push(micros(since) / written as f64);
        let since = Instant::now();
        for id in index.page_ids() {
            black_box(index.page(id));
        }
        images.push(micros(since) / f64::from(index.stats().pages));

        // One block appended to a conversation, and its page.
        let mut rng = Rng::new(7);
        let since = Instant::now();
        let appended = 2000;
        for _ in 0..appended {
            let of = &conversations[rng.below(conversations.len())];
            let grown = of.chain.fork(of.chain.len(), 1, &mut rng);
            let store = grown.stores(
                of.stores[0].worker,
                of.stores[0].tier,
                of.chain.len(),
                grown.len(),
            );
            for store in store {
                let data = EventData::Stored(store.data);
                index.apply(pool, slot(store.worker), Tier::from(store.tier), &data);
            }
            black_box(index.flush());
        }
        singles.push(micros(since) / f64::from(appended));
        stats = Some(index.stats());
        let since = Instant::now();
        for worker in 1..=8 {
            black_box(index.dump(pool, slot(worker)));
        }
        dumps.push(micros(since) / 8000.0);

        // Leaves first, as engines evict.
        let (mut removed, since) = (0, Instant::now());
        for store in conversations.iter().flat_map(|c| &c.stores).rev() {
            let names = store.data.blocks.iter().rev().map(|b| b.block_hash);
            let data = EventData::Removed(Removed {
                block_hashes: names.collect(),
            });
            let tier = Tier::from(store.tier);
            removed += index.apply(pool, slot(store.worker), tier, &data).removed;
        }
        removals.push(f64::from(removed) / micros(since));
    }
    let stats = stats.expect("a repeat");
    let blocks = stats.blocks as f64;
    let mut table = Table::new(
        &format!(
            "changes, {} blocks of {OWNERS} owners, {} pages",
            stats.blocks, stats.pages
        ),
        &["what", "value", "unit"],
    );
    let images_ms = Spread::of(
        images
            .iter()
            .map(|us| us * f64::from(stats.pages) / 1000.0)
            .collect(),
    );
    table.row(vec![
        "stores".into(),
        Spread::of(stores).into(),
        "M blocks/s".into(),
    ]);
    table.row(vec![
        "removals".into(),
        Spread::of(removals).into(),
        "M blocks/s".into(),
    ]);
    table.row(vec![
        "flush after a fill".into(),
        Spread::of(flushes).into(),
        "us/page".into(),
    ]);
    table.row(vec![
        "image of a page".into(),
        Spread::of(images).into(),
        "us/page".into(),
    ]);
    table.row(vec![
        "images of all pages".into(),
        images_ms.into(),
        "ms".into(),
    ]);
    table.row(vec![
        "append a block and flush".into(),
        Spread::of(singles).into(),
        "us".into(),
    ]);
    table.row(vec![
        "dump of an owner".into(),
        Spread::of(dumps).into(),
        "ms".into(),
    ]);
    table.row(vec![
        "mean page".into(),
        (stats.page_bytes / stats.pages as usize).into(),
        "B".into(),
    ]);
    let per_block = (stats.page_bytes as f64 + 94.0 * f64::from(stats.pages)) / blocks;
    table.row(vec![
        "pages".into(),
        (stats.page_bytes as f64 / blocks).into(),
        "B/block".into(),
    ]);
    table.row(vec![
        "pages and their keys (94 B)".into(),
        per_block.into(),
        "B/block".into(),
    ]);
    table.row(vec![
        "native index".into(),
        (memory / blocks).into(),
        "B/block".into(),
    ]);
    report.table(&table);
    report.at_most("pages and keys per block", per_block, 4.0, "B");
    Ok(())
}

fn lookups(report: &mut Report, conversations: &[Conversation]) {
    let (mut index, pool) = empty();
    fill(&mut index, pool, conversations);
    let mut rng = Rng::new(3);
    let mut cells = Vec::new();
    for tokens in [2_000, 8_000, 32_000, 128_000] {
        for case in Case::ALL {
            let prompt = |_| Prompt::new(case, tokens, OWNERS, &mut rng);
            let prompts: Vec<Prompt> = (0..case.prompts()).map(prompt).collect();
            for store in prompts.iter().flat_map(|p| &p.stores) {
                let data = EventData::Stored(store.data.clone());
                index.apply(pool, slot(store.worker), Tier::from(store.tier), &data);
            }
            cells.push((tokens, case, prompts));
        }
    }
    let mut pages = HashMap::new();
    write_all(&mut index, &mut pages);
    let view = View {
        level: index.level(),
        group: GROUP,
        epoch: 1,
        pool_key: POOL_KEY,
        family: kv_core::id::Family::Dynamo,
        slots: OWNERS + 1,
    };
    let mut table = Table::new(
        &format!("lookups, {OWNERS} owners, us"),
        &[
            "tokens",
            "case",
            "tree",
            "pages, gallop",
            "pages, linear",
            "pages read",
        ],
    );
    let mut reader = Reader::new();
    for (tokens, case, prompts) in &cells {
        let mut times = [const { Vec::new() }; 3];
        for _ in 0..REPEATS {
            let mut sums = [0.0; 3];
            let rounds = 64 / prompts.len();
            for prompt in std::iter::repeat_n(prompts, rounds).flatten() {
                let fetch = |id: u32| pages.get(&id).map(|page| page.to_vec());
                let since = Instant::now();
                black_box(index.overlaps(pool, &prompt.chain.sequence));
                sums[0] += micros(since);
                let since = Instant::now();
                reader.gallop(&view, &prompt.chain.sequence, fetch);
                sums[1] += micros(since);
                let since = Instant::now();
                reader.linear(&view, &prompt.chain.sequence, fetch);
                sums[2] += micros(since);
            }
            let count = (rounds * prompts.len()) as f64;
            times
                .iter_mut()
                .zip(sums)
                .for_each(|(t, sum)| t.push(sum / count));
        }
        reader.gallop(&view, &prompts[0].chain.sequence, |id| {
            pages.get(&id).map(|page| page.to_vec())
        });
        let [tree, gallop, linear] = times.map(Spread::of);
        table.row(vec![
            (*tokens).into(),
            case.name().into(),
            tree.into(),
            gallop.into(),
            linear.into(),
            (reader.fetched() as usize).into(),
        ]);
    }
    report.table(&table);
}

fn bodies(report: &mut Report) {
    let mut table = Table::new(
        "request bodies, in chunks of 16 KiB, ns/token",
        &["tokens", "bytes", "scan", "scan and hash", "hash alone"],
    );
    let hashing = Hashing::new(16, Seed::default());
    let mut rng = Rng::new(9);
    for tokens in [2_000, 8_000, 32_000, 128_000] {
        let prompt = Prompt::new(Case::Miss, tokens, 1, &mut rng);
        let body = prompt.body();
        let rounds = 2_000_000 / tokens;
        let mut times = [const { Vec::new() }; 3];
        for _ in 0..REPEATS {
            let per_token = |since: Instant| 1000.0 * micros(since) / (rounds * tokens) as f64;
            for (hash, times) in [false, true].into_iter().zip(&mut times) {
                let since = Instant::now();
                for _ in 0..rounds {
                    let mut scanner = Scanner::new(tokens);
                    for chunk in body.chunks(16 << 10) {
                        scanner.feed(chunk);
                        if hash {
                            scanner.hash(hashing);
                        }
                    }
                    black_box(scanner.finish().is_ok());
                }
                times.push(per_token(since));
            }
            let since = Instant::now();
            for _ in 0..rounds {
                black_box(sequence_hashes(&prompt.ids, hashing));
            }
            times[2].push(per_token(since));
        }
        let [scan, both, hash] = times.map(Spread::of);
        table.row(vec![
            tokens.into(),
            body.len().into(),
            scan.into(),
            both.into(),
            hash.into(),
        ]);
    }
    report.table(&table);
}
