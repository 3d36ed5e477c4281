//! A worker that only answers: it tells who it is and what reached it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::response::Response;
use http_body_util::BodyExt as _;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// A running worker.
#[derive(Debug)]
pub struct Upstream {
    /// While `false`, answers wait.
    pub gate: watch::Sender<bool>,
    /// Where it listens.
    pub address: SocketAddr,
    /// Requests that reached it.
    pub requests: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

#[derive(Clone)]
struct Identity {
    id: u64,
    gate: watch::Receiver<bool>,
    requests: Arc<AtomicU64>,
}

/// Ids and addresses of workers with the ids 1, 2 and so on.
#[must_use]
pub fn workers(upstreams: &[Upstream]) -> Vec<(u64, SocketAddr)> {
    (1..).zip(upstreams.iter().map(|u| u.address)).collect()
}

impl Upstream {
    /// Starts workers with the ids 1 to `n`.
    ///
    /// # Panics
    /// When no port is free.
    pub async fn start_all(n: u64) -> Vec<Self> {
        let mut all = Vec::new();
        for id in 1..=n {
            all.push(Self::start(id).await);
        }
        all
    }

    /// Starts a worker with this id.
    ///
    /// # Panics
    /// When no port is free.
    pub async fn start(id: u64) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0))
            .await
            .expect("a free port");
        let address = listener.local_addr().expect("a bound socket");
        let requests = Arc::new(AtomicU64::new(0));
        let (gate, open) = watch::channel(true);
        let identity = Identity {
            id,
            gate: open,
            requests: Arc::clone(&requests),
        };
        let router = Router::new().fallback(answer).with_state(identity);
        let serve = async move {
            let _ = axum::serve(listener, router).await;
        };
        Self {
            gate,
            address,
            requests,
            task: tokio::spawn(serve),
        }
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn answer(State(mut identity): State<Identity>, request: Request) -> Response {
    let order = identity.requests.fetch_add(1, Ordering::Relaxed);
    let (head, body) = request.into_parts();
    let body = body
        .collect()
        .await
        .map(http_body_util::Collected::to_bytes)
        .unwrap_or_default();
    // A gate that is gone holds nothing back.
    let _ = identity.gate.wait_for(|open| *open).await;
    let header = |(name, value): (&http::HeaderName, &http::HeaderValue)| {
        let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
        (name.to_string(), value.into())
    };
    let seen = json!({
        "worker": identity.id,
        "order": order,
        "method": head.method.as_str(),
        "path": head.uri.path(),
        "headers": head.headers.iter().map(header).collect::<serde_json::Map<_, _>>(),
        "bytes": body.len(),
        "hash": kv_core::hash::Seed::default().block(&checksum(&body)),
    });
    Response::builder()
        .header("content-type", "application/json")
        .header("x-worker-id", identity.id)
        .body(Body::from(seen.to_string()))
        .expect("a valid response")
}

/// Words of a body, so that a test can tell that it arrived whole.
#[must_use]
pub fn checksum(body: &Bytes) -> Vec<u32> {
    body.iter().map(|b| u32::from(*b)).collect()
}

/// A worker that sends back what it gets, as it comes.
#[derive(Debug)]
pub struct Echo {
    /// Where it listens.
    pub address: SocketAddr,
    task: JoinHandle<()>,
}

impl Echo {
    /// One that takes any HTTP/2 request and sends its body back part by part.
    ///
    /// # Panics
    /// When no port is free.
    pub async fn of_streams() -> Self {
        Self::start(|stream| {
            tokio::spawn(async move {
                let echo = async |request: hyper::Request<hyper::body::Incoming>| {
                    let answer = Response::builder().header("content-type", "application/grpc");
                    Ok::<_, std::convert::Infallible>(
                        answer.body(request.into_body()).expect("a valid response"),
                    )
                };
                let service = hyper::service::service_fn(echo);
                let io = hyper_util::rt::TokioIo::new(stream);
                let executor = hyper_util::rt::TokioExecutor::new();
                let http2 = hyper::server::conn::http2::Builder::new(executor);
                // A client that goes away ends it.
                let _ = http2.serve_connection(io, service).await;
            });
        })
        .await
    }

    /// One that switches any request to a WebSocket's bytes.
    ///
    /// # Panics
    /// When no port is free.
    pub async fn of_upgrades() -> Self {
        Self::start(|stream| {
            tokio::spawn(upgrade(stream));
        })
        .await
    }

    async fn start(serve: impl Fn(TcpStream) + Send + 'static) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0))
            .await
            .expect("a free port");
        let address = listener.local_addr().expect("a bound socket");
        let accept = async move {
            while let Ok((stream, _)) = listener.accept().await {
                serve(stream);
            }
        };
        Self {
            address,
            task: tokio::spawn(accept),
        }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn upgrade(mut stream: TcpStream) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    stream
        .write_all(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n")
        .await?;
    let (mut read, mut write) = stream.split();
    tokio::io::copy(&mut read, &mut write).await.map(|_| ())
}
