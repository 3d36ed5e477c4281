//! The result of a run: JSON, and tables of one or several.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

/// One run of a workload against one endpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Name of the run in tables.
    pub label: String,
    /// Endpoint.
    pub url: String,
    /// Workload.
    pub workload: String,
    /// Its seed.
    pub seed: u64,
    /// Hash of all request bodies in order: equal means the same requests.
    pub bodies: String,
    /// Requests a second, in open loop.
    pub rate: Option<f64>,
    /// Factor on a trace's time, in open loop.
    pub speed: Option<f64>,
    /// Requests in flight, in closed loop.
    pub concurrency: Option<usize>,
    /// Requests sent.
    pub requests: u64,
    /// Requests answered in full.
    pub ok: u64,
    /// Failed requests by reason.
    pub failed: BTreeMap<String, u64>,
    /// First failure of the run, in words.
    pub first_failure: Option<String>,
    /// Time to first token, of requests answered in full.
    pub ttft_ms: Ttft,
    /// Time between two tokens of a stream.
    pub itl_ms: InterToken,
    /// Prompt tokens as the engines counted.
    pub prompt_tokens: u64,
    /// Prompt tokens found in a cache as the engines counted; `None` where none said.
    pub cached_tokens: Option<u64>,
    /// Share of prompt tokens that were cached, 0 to 1, over the requests whose engine said.
    pub cached_share: Option<f64>,
    /// Output tokens.
    pub completion_tokens: u64,
    /// Requests per `x-worker-id`.
    pub workers: BTreeMap<String, u64>,
    /// First request sent to last answer, in seconds.
    pub duration_s: f64,
    /// Requests answered in full a second.
    pub requests_per_s: f64,
    /// Output tokens a second.
    pub output_tokens_per_s: f64,
    /// 99th percentile of how late the generator itself sent, in milliseconds.
    pub late_p99_ms: f64,
}

/// Time to first token in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ttft {
    /// Median.
    pub p50: f64,
    /// 95th percentile.
    pub p95: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Mean.
    pub mean: f64,
}

/// Inter-token latency in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct InterToken {
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
}

type Row = (&'static str, fn(&Report) -> String);

const ROWS: [Row; 18] = [
    ("workload", |r| format!("{}, seed {}", r.workload, r.seed)),
    ("pace", Report::pace),
    ("requests ok", |r| format!("{}/{}", r.ok, r.requests)),
    ("failed", Report::failures),
    ("TTFT p50 ms", |r| millis(r.ttft_ms.p50)),
    ("TTFT p95 ms", |r| millis(r.ttft_ms.p95)),
    ("TTFT p99 ms", |r| millis(r.ttft_ms.p99)),
    ("TTFT mean ms", |r| millis(r.ttft_ms.mean)),
    ("ITL p50 ms", |r| millis(r.itl_ms.p50)),
    ("ITL p99 ms", |r| millis(r.itl_ms.p99)),
    ("prompt tokens", |r| r.prompt_tokens.to_string()),
    ("cached tokens", |r| {
        r.cached_tokens
            .map_or_else(|| "not told".to_owned(), |tokens| tokens.to_string())
    }),
    ("cached share", |r| {
        r.cached_share.map_or_else(
            || "not told".to_owned(),
            |share| format!("{:.1} %", share * 100.0),
        )
    }),
    ("requests per worker", Report::spread),
    ("duration s", |r| format!("{:.1}", r.duration_s)),
    ("requests/s", |r| format!("{:.1}", r.requests_per_s)),
    ("output tokens/s", |r| {
        format!("{:.0}", r.output_tokens_per_s)
    }),
    ("sent late p99 ms", |r| millis(r.late_p99_ms)),
];

impl Report {
    fn pace(&self) -> String {
        match (self.concurrency, self.rate, self.speed) {
            (Some(open), _, _) => format!("{open} in flight"),
            (_, Some(rate), _) => format!("{rate} req/s"),
            (_, _, Some(speed)) => format!("trace x {speed}"),
            _ => "-".to_owned(),
        }
    }

    fn failures(&self) -> String {
        if self.failed.is_empty() {
            return "0".to_owned();
        }
        let reasons: Vec<String> = self
            .failed
            .iter()
            .map(|(reason, count)| format!("{count} {reason}"))
            .collect();
        reasons.join(", ")
    }

    fn spread(&self) -> String {
        let counts = self.workers.values();
        match (counts.clone().min(), counts.max()) {
            (Some(min), Some(max)) => format!("{min}..{max} on {}", self.workers.len()),
            _ => "not told".to_owned(),
        }
    }
}

/// A table with one column per report.
#[must_use]
pub fn table(reports: &[Report]) -> String {
    let mut lines = vec![String::new(); ROWS.len() + 1];
    pad_column(&mut lines, |row| match row {
        0 => String::new(),
        row => ROWS[row - 1].0.to_owned(),
    });
    for report in reports {
        pad_column(&mut lines, |row| match row {
            0 => report.label.clone(),
            row => ROWS[row - 1].1(report),
        });
    }
    let mut text = String::new();
    for line in lines {
        let _infallible = writeln!(text, "{}", line.trim_end());
    }
    if reports
        .iter()
        .any(|report| report.bodies != reports[0].bodies)
    {
        text.push_str("\nThe runs sent different requests: their columns do not compare.\n");
    }
    text
}

fn pad_column(lines: &mut [String], cell: impl Fn(usize) -> String) {
    let cells: Vec<String> = (0..lines.len()).map(cell).collect();
    let width = cells.iter().map(|cell| cell.chars().count()).max();
    let width = width.unwrap_or(0) + 2;
    for (line, cell) in lines.iter_mut().zip(cells) {
        let _infallible = write!(line, "{cell:width$}");
    }
}

fn millis(value: f64) -> String {
    if value < 10.0 {
        format!("{value:.2}")
    } else {
        format!("{value:.0}")
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::load) fn report(label: &str) -> Report {
        Report {
            label: label.to_owned(),
            url: "http://127.0.0.1:8000".to_owned(),
            workload: "agents".to_owned(),
            seed: 1,
            bodies: "00ff".to_owned(),
            rate: Some(20.0),
            speed: None,
            concurrency: None,
            requests: 3,
            ok: 2,
            failed: BTreeMap::from([("reset".to_owned(), 1)]),
            first_failure: Some("the stream broke".to_owned()),
            ttft_ms: Ttft {
                p50: 1.5,
                p95: 20.0,
                p99: 30.0,
                mean: 9.0,
            },
            itl_ms: InterToken { p50: 6.1, p99: 7.0 },
            prompt_tokens: 200,
            cached_tokens: Some(50),
            cached_share: Some(0.25),
            completion_tokens: 20,
            workers: BTreeMap::from([("1".to_owned(), 2), ("2".to_owned(), 0)]),
            duration_s: 1.0,
            requests_per_s: 2.0,
            output_tokens_per_s: 20.0,
            late_p99_ms: 0.1,
        }
    }

    #[test]
    fn columns_stand_side_by_side_under_their_labels() {
        let table = table(&[report("round-robin"), report("kv")]);
        let lines: Vec<&str> = table.lines().collect();
        let at = lines[0].find("kv").unwrap();
        assert!(lines[0].contains("round-robin"));
        let ok = lines
            .iter()
            .find(|line| line.starts_with("requests ok"))
            .unwrap();
        assert_eq!(&ok[at..], "2/3");
        assert!(table.contains("1 reset"));
        assert!(table.contains("25.0 %"));
        assert!(table.contains("0..2 on 2"));
        assert!(!table.contains("do not compare"));
    }

    #[test]
    fn runs_with_other_bodies_are_called_out() {
        let mut other = report("kv");
        other.bodies = "00fe".to_owned();
        assert!(table(&[report("rr"), other]).contains("do not compare"));
    }

    #[test]
    fn json_gives_the_report_back() {
        let before = report("kv");
        let json = serde_json::to_string(&before).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), before);
    }
}
