//! Memory of sidecar and Envoy per block, and how long a started Envoy takes to get all pages.
//!
//! Arguments: sizes of the index in blocks, ascending, by default one and four million.

use kv_benches::corpus::Corpus;
use kv_benches::cpu;
use kv_benches::feed::Feed;
use kv_benches::fleet::{Fleet, Options};
use kv_benches::report::{Report, Table};
use kv_benches::sink;
use kv_benches::spread::Spread;

const OWNERS: usize = 64;
const REPEATS: usize = 5;
/// Bytes that a key costs in Envoy beside its value.
const KEY_BYTES: f64 = 94.0;

/// What starting an Envoy showed.
struct Started {
    /// Its memory once it holds all pages, in bytes.
    resident: Spread,
    /// From its subscription to its last page, in milliseconds.
    sync_ms: Spread,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let sizes: Result<Vec<usize>, _> = std::env::args().skip(1).map(|n| n.parse()).collect();
    let sizes = Some(sizes?)
        .filter(|s| !s.is_empty())
        .unwrap_or(vec![1_000_000, 4_000_000]);
    let mut report = Report::new("memory");
    let workers = sink::start(OWNERS)?;
    let options = Options {
        workers: &workers,
        mode: "kv",
        decision_header: false,
        tokenizer: None,
    };
    let fleet = Fleet::start(options).await?;
    let mut feed = Feed::connect(&fleet, 1).await?;
    let sidecar_empty = cpu::resident(fleet.sidecar.id())? as f64;
    let empty = start_envoys(&fleet).await?;
    let mut table = Table::new(
        &format!("{OWNERS} owners; Envoy's memory is against one with an empty index"),
        &[
            "blocks",
            "pages",
            "pages B/block",
            "with keys B/block",
            "Envoy B/block",
            "sidecar B/block",
            "full sync ms",
        ],
    );
    let most = sizes.iter().copied().max().unwrap_or(0);
    let mut corpus = Corpus::new(OWNERS, 1).of_size(most);
    let mut filled = 0;
    for size in sizes {
        while filled < size
            && let Some(conversation) = corpus.next()
        {
            filled += conversation.fresh;
            feed.add(&fleet, conversation.stores).await?;
        }
        feed.finish(&fleet).await?;
        let stats = fleet.index().await?["stats"].clone();
        let number = |key: &str| stats[key].as_f64().unwrap_or(f64::NAN);
        let (blocks, pages, bytes) = (number("blocks"), number("pages"), number("page_bytes"));
        let sidecar = (cpu::resident(fleet.sidecar.id())? as f64 - sidecar_empty) / blocks;
        let full = start_envoys(&fleet).await?;
        let resident = (full.resident.median - empty.resident.median) / blocks;
        let with_keys = (bytes + KEY_BYTES * pages) / blocks;
        table.row(vec![
            blocks.into(),
            pages.into(),
            (bytes / blocks).into(),
            with_keys.into(),
            resident.into(),
            sidecar.into(),
            full.sync_ms.into(),
        ]);
        let at = |what: &str| format!("{what} at {blocks} blocks");
        report.at_most(&at("pages and keys per block"), with_keys, 4.0, "B");
        report.at_most(&at("Envoy's memory per block"), resident, 4.0, "B");
        report.at_most(
            &at("full sync"),
            full.sync_ms.median,
            30.0 * blocks / 1e6,
            "ms",
        );
    }
    report.table(&table);
    let mut table = Table::new(
        "memory of an Envoy with the filter and an empty index",
        &["MB"],
    );
    table.row(vec![(empty.resident.median / 1e6).into()]);
    report.table(&table);
    report.finish()
}

async fn start_envoys(fleet: &Fleet) -> anyhow::Result<Started> {
    let sync = "kv_router_full_sync_seconds_sum";
    let (mut resident, mut sync_ms) = (Vec::new(), Vec::new());
    for _ in 0..REPEATS {
        let before = fleet.metric(sync).await?;
        let envoy = fleet.envoy(1, |_| ()).await?;
        sync_ms.push(1000.0 * (fleet.metric(sync).await? - before));
        resident.push(cpu::resident(envoy.process.id())? as f64);
    }
    Ok(Started {
        resident: Spread::of(resident),
        sync_ms: Spread::of(sync_ms),
    })
}
