//! Envoy's histograms, bin by bin. The bins are those that Envoy keeps: two significant digits, so a
//! time below 100 µs is exact to the microsecond it was recorded with.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, bail};
use kv_tests::client::Client;
use serde_json::Value;
use tokio::time::{Instant, sleep};

/// Counts by the middle of their bin, in microseconds times two.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Histogram {
    bins: BTreeMap<u64, u64>,
}

impl Histogram {
    /// Values in all.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.bins.values().sum()
    }

    /// What was added since an earlier state of the same histogram.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let rest = |(bin, n): (&u64, &u64)| {
            let n = n - before.bins.get(bin).copied().unwrap_or(0);
            (n > 0).then_some((*bin, n))
        };
        Self {
            bins: self.bins.iter().filter_map(rest).collect(),
        }
    }

    /// A quantile, in microseconds.
    #[must_use]
    pub fn quantile(&self, q: f64) -> f64 {
        let wanted = q * self.count() as f64;
        let mut seen = 0;
        for (bin, n) in &self.bins {
            seen += n;
            if seen as f64 >= wanted {
                return *bin as f64 / 2.0;
            }
        }
        0.0
    }

    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    fn read(bins: &Value) -> Option<Self> {
        let mut histogram = Self::default();
        for bin in bins.as_array()? {
            let (lower, width) = (bin["lower_bound"].as_f64()?, bin["width"].as_f64()?);
            // The filter cuts to whole microseconds: 7 stands for all from 7 to before 8.
            let middle = 2.0 * lower.floor() + width.max(1.0).round();
            *histogram.bins.entry(middle as u64).or_default() += bin["count"].as_u64()?;
        }
        Some(histogram)
    }
}

/// The filter's histograms.
#[derive(Clone, Debug, Default)]
pub struct Timings {
    /// From headers to decision.
    pub decision: Histogram,
    /// From the last part of the body to decision.
    pub after_body: Histogram,
    /// Finding the overlaps.
    pub lookup: Histogram,
}

impl Timings {
    /// What was added since an earlier state.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        Self {
            decision: self.decision.since(&before.decision),
            after_body: self.after_body.since(&before.after_body),
            lookup: self.lookup.since(&before.lookup),
        }
    }
}

/// Reads the histograms once they hold `count` decisions in all: Envoy merges them from its
/// threads as it is asked.
///
/// # Errors
/// When they don't in ten seconds.
pub async fn read(client: &Client, admin: u16, count: u64) -> anyhow::Result<Timings> {
    let start = Instant::now();
    let path =
        "/stats?filter=kv_router_.*_us&type=Histograms&histogram_buckets=detailed&format=json";
    loop {
        let stats = client.get(admin, path).await.map_err(anyhow::Error::msg)?;
        let timings = parse(&stats).with_context(|| stats.to_string())?;
        if timings.decision.count() >= count {
            return Ok(timings);
        }
        if start.elapsed() > Duration::from_secs(10) {
            bail!(
                "{} of {count} decisions in {stats}",
                timings.decision.count()
            );
        }
        sleep(Duration::from_millis(5)).await;
    }
}

fn parse(stats: &Value) -> Option<Timings> {
    let mut timings = Timings::default();
    let all = stats["stats"].as_array()?;
    let details = all
        .iter()
        .filter_map(|s| s["histograms"]["details"].as_array())
        .flatten();
    for histogram in details {
        let read = Histogram::read(&histogram["totals"])?;
        match histogram["name"].as_str()? {
            name if name.ends_with("kv_router_decision_us") => timings.decision = read,
            name if name.ends_with("kv_router_decision_after_body_us") => timings.after_body = read,
            name if name.ends_with("kv_router_lookup_us") => timings.lookup = read,
            _ => {}
        }
    }
    Some(timings)
}
