//! Sums over the requests of a run.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;

use super::client::{Failure, Sample};
use super::report::{InterToken, Ttft};

/// Longest time that is told apart, in microseconds; longer ones count as this.
const MAX_MICROS: u64 = 3_600_000_000;

/// Workers and failure reasons that are told apart.
const LABELS: usize = 1024;

/// What a run has seen so far.
#[derive(Debug)]
pub(super) struct Stats {
    pub(super) ok: u64,
    pub(super) failed: BTreeMap<String, u64>,
    pub(super) workers: BTreeMap<String, u64>,
    pub(super) prompt_tokens: u64,
    pub(super) completion_tokens: u64,
    pub(super) cached_tokens: u64,
    /// Prompt tokens of the answers that said how many were cached.
    pub(super) cached_known: u64,
    ttft: Histogram<u64>,
    gaps: Histogram<u64>,
    late: Histogram<u64>,
}

impl Stats {
    pub(super) fn new() -> Result<Self, hdrhistogram::CreationError> {
        let micros = || Histogram::new_with_bounds(1, MAX_MICROS, 3);
        Ok(Self {
            ok: 0,
            failed: BTreeMap::new(),
            workers: BTreeMap::new(),
            prompt_tokens: 0,
            completion_tokens: 0,
            cached_tokens: 0,
            cached_known: 0,
            ttft: micros()?,
            gaps: micros()?,
            late: micros()?,
        })
    }

    /// Adds one request, sent `late` after it was due.
    pub(super) fn add(&mut self, late: Duration, result: Result<Sample, Failure>) {
        record(&mut self.late, late);
        match result {
            Ok(sample) => self.add_sample(sample),
            Err(failure) => count(&mut self.failed, failure.kind()),
        }
    }

    /// Requests that failed.
    pub(super) fn failures(&self) -> u64 {
        self.failed.values().sum()
    }

    pub(super) fn ttft(&self) -> Ttft {
        Ttft {
            p50: quantile(&self.ttft, 0.50),
            p95: quantile(&self.ttft, 0.95),
            p99: quantile(&self.ttft, 0.99),
            mean: self.ttft.mean() / 1_000.0,
        }
    }

    pub(super) fn inter_token(&self) -> InterToken {
        InterToken {
            p50: quantile(&self.gaps, 0.50),
            p99: quantile(&self.gaps, 0.99),
        }
    }

    pub(super) fn late_p99_ms(&self) -> f64 {
        quantile(&self.late, 0.99)
    }

    fn add_sample(&mut self, sample: Sample) {
        self.ok += 1;
        record(&mut self.ttft, sample.ttft);
        for gap in sample.gaps {
            record(&mut self.gaps, gap);
        }
        self.prompt_tokens += sample.prompt_tokens;
        self.completion_tokens += sample.completion_tokens;
        if let Some(cached) = sample.cached_tokens {
            self.cached_tokens += cached;
            self.cached_known += sample.prompt_tokens;
        }
        if let Some(worker) = sample.worker {
            count(&mut self.workers, worker);
        }
    }
}

fn record(histogram: &mut Histogram<u64>, value: Duration) {
    let micros = u64::try_from(value.as_micros()).unwrap_or(MAX_MICROS);
    histogram.saturating_record(micros.min(MAX_MICROS));
}

fn count(counts: &mut BTreeMap<String, u64>, label: String) {
    let label = if counts.len() < LABELS || counts.contains_key(&label) {
        label
    } else {
        "other".to_owned()
    };
    *counts.entry(label).or_default() += 1;
}

/// Milliseconds; 0 without observations.
fn quantile(histogram: &Histogram<u64>, quantile: f64) -> f64 {
    histogram.value_at_quantile(quantile) as f64 / 1_000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_the_observations() {
        let mut stats = Stats::new().unwrap();
        for millis in 1..=1_000 {
            let sample = Sample {
                ttft: Duration::from_millis(millis),
                ..Sample::default()
            };
            stats.add(Duration::ZERO, Ok(sample));
        }
        let ttft = stats.ttft();
        for (got, wanted) in [
            (ttft.p50, 500.0),
            (ttft.p95, 950.0),
            (ttft.p99, 990.0),
            (ttft.mean, 500.5),
        ] {
            assert!((got - wanted).abs() / wanted < 0.002, "{got} {wanted}");
        }
    }

    #[test]
    fn failures_are_counted_by_reason_and_leave_the_times_alone() {
        let mut stats = Stats::new().unwrap();
        stats.add(Duration::ZERO, Err(Failure::Truncated));
        stats.add(Duration::ZERO, Err(Failure::Truncated));
        stats.add(Duration::ZERO, Err(Failure::Connect("refused".to_owned())));
        assert_eq!(stats.failures(), 3);
        assert_eq!(stats.failed["truncated"], 2);
        assert_eq!(stats.ttft().p99, 0.0);
    }

    #[test]
    fn labels_are_bounded() {
        let mut stats = Stats::new().unwrap();
        for worker in 0..2_000 {
            let sample = Sample {
                worker: Some(worker.to_string()),
                ..Sample::default()
            };
            stats.add(Duration::ZERO, Ok(sample));
        }
        assert_eq!(stats.workers.len(), LABELS + 1);
        assert_eq!(stats.workers.values().sum::<u64>(), 2_000);
    }
}
