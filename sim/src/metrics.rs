//! Counters of one engine and their text, under vLLM's names.

use std::fmt::Write as _;
use std::time::Duration;

/// Bounds of vLLM's time-to-first-token histogram, in seconds.
const TTFT_BOUNDS: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];

/// Totals since the engine's start.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// Prompt tokens of requests that gave a first token.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub generation_tokens: u64,
    /// Prompt tokens looked up in the cache, once per request.
    pub prefix_queries: u64,
    /// Of those, tokens found.
    pub prefix_hits: u64,
    /// Sequences that lost their blocks to an older one and started over.
    pub preemptions: u64,
    /// Requests answered in full.
    pub requests_finished: u64,
    /// Requests whose client went away.
    pub requests_aborted: u64,
    /// Arrival to first token, as the engine sees it.
    pub time_to_first_token: Histogram,
}

/// Counts per bucket of [`TTFT_BOUNDS`].
#[derive(Clone, Debug, Default)]
pub struct Histogram {
    buckets: [u64; TTFT_BOUNDS.len()],
    count: u64,
    sum: Duration,
}

/// What an engine's metrics page shows besides its counters.
#[derive(Clone, Debug, Default)]
pub struct Gauges {
    /// Sequences running.
    pub running: usize,
    /// Sequences waiting.
    pub waiting: usize,
    /// Blocks held by sequences.
    pub blocks_pinned: usize,
    /// Blocks in all.
    pub blocks: usize,
    /// Id of the last cache event.
    pub last_event_id: u64,
    /// Events handed to NATS.
    pub events_published: u64,
    /// Events lost because the publish buffer was full or NATS refused them.
    pub events_dropped: u64,
}

// === impl Histogram ===

impl Histogram {
    /// Adds one observation.
    pub fn observe(&mut self, value: Duration) {
        let seconds = value.as_secs_f64();
        for (bucket, bound) in self.buckets.iter_mut().zip(TTFT_BOUNDS) {
            *bucket += u64::from(seconds <= bound);
        }
        self.count += 1;
        self.sum += value;
    }
}

/// The metrics page in Prometheus text format.
#[must_use]
pub fn render(model: &str, counters: &Counters, gauges: &Gauges) -> String {
    let usage = gauges.blocks_pinned as f64 / gauges.blocks.max(1) as f64;
    let model = model.replace('\\', "\\\\").replace('"', "\\\"");
    let mut page = Page {
        text: String::new(),
        labels: format!("engine=\"0\",model_name=\"{model}\""),
    };
    page.gauge("vllm:num_requests_running", gauges.running as f64);
    page.gauge("vllm:num_requests_waiting", gauges.waiting as f64);
    page.gauge("vllm:kv_cache_usage_perc", usage);
    page.gauge("vllm:gpu_cache_usage_perc", usage);
    page.counter("vllm:prefix_cache_queries_total", counters.prefix_queries);
    page.counter("vllm:prefix_cache_hits_total", counters.prefix_hits);
    page.counter("vllm:prompt_tokens_total", counters.prompt_tokens);
    page.counter("vllm:generation_tokens_total", counters.generation_tokens);
    page.counter("vllm:num_preemptions_total", counters.preemptions);
    page.histogram(
        "vllm:time_to_first_token_seconds",
        &counters.time_to_first_token,
    );
    page.counter("kv_sim_requests_finished_total", counters.requests_finished);
    page.counter("kv_sim_requests_aborted_total", counters.requests_aborted);
    page.gauge("kv_sim_last_event_id", gauges.last_event_id as f64);
    page.counter("kv_sim_events_published_total", gauges.events_published);
    page.counter("kv_sim_events_dropped_total", gauges.events_dropped);
    page.text
}

struct Page {
    text: String,
    labels: String,
}

impl Page {
    fn line(&mut self, kind: &str, name: &str, value: &str) {
        let labels = &self.labels;
        let _infallible = writeln!(
            self.text,
            "# TYPE {name} {kind}\n{name}{{{labels}}} {value}"
        );
    }

    fn gauge(&mut self, name: &str, value: f64) {
        self.line("gauge", name, &value.to_string());
    }

    fn counter(&mut self, name: &str, value: u64) {
        self.line("counter", name, &value.to_string());
    }

    fn histogram(&mut self, name: &str, histogram: &Histogram) {
        let labels = &self.labels;
        let _infallible = writeln!(self.text, "# TYPE {name} histogram");
        for (bound, count) in TTFT_BOUNDS.iter().zip(histogram.buckets) {
            let _infallible = writeln!(
                self.text,
                "{name}_bucket{{{labels},le=\"{bound:?}\"}} {count}"
            );
        }
        let (count, sum) = (histogram.count, histogram.sum.as_secs_f64());
        let _infallible = write!(
            self.text,
            "{name}_bucket{{{labels},le=\"+Inf\"}} {count}\n\
             {name}_sum{{{labels}}} {sum}\n{name}_count{{{labels}}} {count}\n"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_cumulative_and_end_with_the_count() {
        let mut counters = Counters::default();
        for millis in [3, 30, 30, 10_000_000] {
            counters
                .time_to_first_token
                .observe(Duration::from_millis(millis));
        }
        let page = render("sim", &counters, &Gauges::default());
        let value = |bound: &str| {
            let wanted = format!("le=\"{bound}\"}} ");
            let line = page.lines().find(|line| line.contains(&wanted));
            line.and_then(|line| line.rsplit(' ').next())
                .map(str::to_owned)
        };
        assert_eq!(value("0.005").as_deref(), Some("1"));
        assert_eq!(value("0.04").as_deref(), Some("3"));
        assert_eq!(value("2560.0").as_deref(), Some("3"));
        assert_eq!(value("+Inf").as_deref(), Some("4"));
    }

    #[test]
    fn cache_usage_is_the_share_of_pinned_blocks() {
        let gauges = Gauges {
            blocks_pinned: 1,
            blocks: 4,
            ..Gauges::default()
        };
        let page = render("a\"b", &Counters::default(), &gauges);
        let line = "vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"a\\\"b\"} 0.25";
        assert!(page.contains(line), "{page}");
    }
}
