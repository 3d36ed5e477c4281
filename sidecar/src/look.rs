//! Looks at workers: whether they accept connections or, where the configuration says how to ask,
//! whether they say that they are well.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Empty;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use tokio::net::TcpStream;

use crate::config::HealthCheck;
use crate::ejection::Look;

/// How long a worker may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(1);

/// Looks at workers.
#[derive(Clone, Debug)]
pub struct Looker {
    check: Option<HealthCheck>,
    client: Client<HttpConnector, Empty<Bytes>>,
}

impl Looker {
    /// One that asks as `check` says, and otherwise only connects.
    #[must_use]
    pub fn new(check: Option<HealthCheck>) -> Self {
        // Each look is a connection of its own: whether it can be made is part of the question.
        let client = Client::builder(TokioExecutor::new())
            .pool_max_idle_per_host(0)
            .build_http();
        Self { check, client }
    }

    /// Time between looks at workers that take requests; `None` where nobody asks for any.
    #[must_use]
    pub fn interval_ms(&self) -> Option<u64> {
        self.check.as_ref().map(|check| check.interval_ms)
    }

    /// Looks in a row that have to find a worker unwell.
    #[must_use]
    pub fn unwell_after(&self) -> u32 {
        self.check.as_ref().map_or(1, |check| check.unwell_after)
    }

    /// Looks.
    pub async fn look(&self, endpoint: SocketAddr) -> Look {
        let Some(check) = &self.check else {
            let connected = tokio::time::timeout(CONNECT, TcpStream::connect(endpoint)).await;
            return match connected {
                Ok(Ok(_)) => Look::Well,
                _ => Look::Gone,
            };
        };
        let uri = format!("http://{endpoint}{}", check.path);
        let Ok(request) = http::Request::get(uri).body(Empty::new()) else {
            return Look::Unwell;
        };
        let timeout = Duration::from_millis(check.timeout_ms);
        match tokio::time::timeout(timeout, self.client.request(request)).await {
            Ok(Ok(answer)) if answer.status().is_success() => Look::Well,
            Ok(Err(error)) if error.is_connect() => Look::Gone,
            _ => Look::Unwell,
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::http::StatusCode;
    use axum::routing::get;
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_worker_is_what_it_says_of_itself() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = listener.local_addr().unwrap();
        let silent = async || std::future::pending::<StatusCode>().await;
        let router = Router::new()
            .route("/health", get(async || StatusCode::OK))
            .route("/ill", get(async || StatusCode::SERVICE_UNAVAILABLE))
            .route("/silent", get(silent));
        let server = tokio::spawn(async move { axum::serve(listener, router).await });
        let asking = |path: &str| {
            Looker::new(Some(HealthCheck {
                path: path.into(),
                interval_ms: 1_000,
                timeout_ms: 200,
                unwell_after: 3,
            }))
        };
        assert_eq!(asking("/health").look(endpoint).await, Look::Well);
        assert_eq!(asking("/ill").look(endpoint).await, Look::Unwell);
        assert_eq!(asking("/silent").look(endpoint).await, Look::Unwell);
        assert_eq!(Looker::new(None).look(endpoint).await, Look::Well);
        server.abort();
        let _ = server.await;
        assert_eq!(asking("/health").look(endpoint).await, Look::Gone);
        assert_eq!(Looker::new(None).look(endpoint).await, Look::Gone);
    }
}
