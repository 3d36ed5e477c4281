//! Metrics of the standalone indexer, by Dynamo's names.

use std::time::Duration;

use axum::http::StatusCode;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Endpoint {
    endpoint: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EndpointMethod {
    endpoint: String,
    method: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EndpointClass {
    endpoint: String,
    status_class: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Status {
    status: &'static str,
}

/// The metrics and their registry.
#[derive(Debug)]
pub struct IndexerMetrics {
    registry: Registry,
    durations: Family<Endpoint, Histogram>,
    requests: Family<EndpointMethod, Counter>,
    errors: Family<EndpointClass, Counter>,
    models: Gauge,
    workers: Gauge,
    listeners: Family<Status, Gauge>,
}

impl Default for IndexerMetrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("dynamo_kvindexer");
        let histogram = || Histogram::new(exponential_buckets(0.000_1, 2.0, 20));
        let durations = Family::<Endpoint, Histogram>::new_with_constructor(histogram);
        let metrics = Self {
            durations: durations.clone(),
            requests: Family::default(),
            errors: Family::default(),
            models: Gauge::default(),
            workers: Gauge::default(),
            listeners: Family::default(),
            registry: Registry::default(),
        };
        registry.register(
            "request_duration_seconds",
            "HTTP request latency",
            durations,
        );
        registry.register("requests", "Total HTTP requests", metrics.requests.clone());
        let help = "HTTP error responses (4xx/5xx)";
        registry.register("errors", help, metrics.errors.clone());
        let help = "Number of active model+routing-group indexers";
        registry.register("models", help, metrics.models.clone());
        let help = "Number of registered worker instances";
        registry.register("workers", help, metrics.workers.clone());
        let help = "Number of ZMQ listeners by status";
        registry.register("listeners", help, metrics.listeners.clone());
        Self {
            registry,
            ..metrics
        }
    }
}

impl IndexerMetrics {
    pub(super) fn count(
        &self,
        endpoint: String,
        method: String,
        took: Duration,
        status: StatusCode,
    ) {
        let label = Endpoint {
            endpoint: endpoint.clone(),
        };
        let duration = self.durations.get_or_create(&label);
        duration.observe(took.as_secs_f64());
        drop(duration);
        let label = EndpointMethod {
            endpoint: endpoint.clone(),
            method,
        };
        self.requests.get_or_create(&label).inc();
        let status_class = match status.as_u16() {
            400..500 => "4xx",
            500.. => "5xx",
            _ => return,
        };
        let label = EndpointClass {
            endpoint,
            status_class,
        };
        self.errors.get_or_create(&label).inc();
    }

    pub(super) fn measure(
        &self,
        models: usize,
        workers: usize,
        listeners: [(&'static str, usize); 2],
    ) {
        for (status, count) in listeners {
            let gauge = self.listeners.get_or_create(&Status { status });
            gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        self.models.set(i64::try_from(models).unwrap_or(i64::MAX));
        self.workers.set(i64::try_from(workers).unwrap_or(i64::MAX));
    }

    /// OpenMetrics text.
    #[must_use]
    pub fn encode(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}
