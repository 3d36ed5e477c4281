//! HTTP as clients speak it: whole requests, and raw bytes where a request must be odd.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper_util::client::legacy::Client as Hyper;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Longest wait for an answer: a request that hangs is a failure.
const LIMIT: Duration = Duration::from_secs(10);

/// A keep-alive client.
#[derive(Clone, Debug)]
pub struct Client {
    hyper: Hyper<HttpConnector, Full<Bytes>>,
}

impl Default for Client {
    fn default() -> Self {
        Self {
            hyper: Hyper::builder(TokioExecutor::new()).build_http(),
        }
    }
}

impl Client {
    /// Sends a request and reads the whole answer.
    ///
    /// # Errors
    /// When there is no answer, or none within ten seconds.
    pub async fn send(&self, request: Request<Full<Bytes>>) -> Result<Response<Bytes>, String> {
        let (head, body) = self.receive(request).await?.into_parts();
        Ok(Response::from_parts(head, body?))
    }

    /// Sends a request and reads the answer as far as it comes: its body may break off.
    ///
    /// # Errors
    /// When there is no answer, or none within ten seconds.
    pub async fn receive(
        &self,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Result<Bytes, String>>, String> {
        let answer = async {
            let answer = self
                .hyper
                .request(request)
                .await
                .map_err(|e| format!("{e:?}"))?;
            let (head, body) = answer.into_parts();
            let body = body.collect().await.map_err(|e| format!("{e:?}"));
            let body = body.map(http_body_util::Collected::to_bytes);
            Ok(Response::from_parts(head, body))
        };
        timeout(LIMIT, answer)
            .await
            .unwrap_or_else(|_| Err("no answer in 10 s".to_owned()))
    }

    /// Gets JSON.
    ///
    /// # Errors
    /// When the answer is not 200 and JSON.
    pub async fn get(&self, port: u16, path: &str) -> Result<Value, String> {
        self.json(Request::get(uri(port, path)).body(Full::default()))
            .await
    }

    /// Posts JSON and reads JSON.
    ///
    /// # Errors
    /// When the answer is not 200 and JSON.
    pub async fn post(&self, port: u16, path: &str, body: &Value) -> Result<Value, String> {
        self.json(json_request(port, path, body)).await
    }

    async fn json(&self, request: http::Result<Request<Full<Bytes>>>) -> Result<Value, String> {
        let answer = self.send(request.map_err(|e| e.to_string())?).await?;
        let text = String::from_utf8_lossy(answer.body()).into_owned();
        if !answer.status().is_success() {
            return Err(format!("{}: {text}", answer.status()));
        }
        serde_json::from_str(&text).map_err(|e| format!("{e}: {text}"))
    }
}

/// Address of a path on loopback.
#[must_use]
pub fn uri(port: u16, path: &str) -> String {
    format!("http://127.0.0.1:{port}{path}")
}

/// A POST with a JSON body.
///
/// # Errors
/// When the path makes no URI.
pub fn json_request(port: u16, path: &str, body: &Value) -> http::Result<Request<Full<Bytes>>> {
    Request::post(uri(port, path))
        .header("content-type", "application/json")
        .body(Full::from(body.to_string()))
}

/// Sends bytes as they are, in the given pieces, and reads until `enough` says so or the peer
/// closes.
///
/// # Panics
/// When that takes more than ten seconds.
pub async fn raw(port: u16, pieces: &[&[u8]], enough: impl Fn(&str) -> bool) -> String {
    let exchange = async {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let mut stream = TcpStream::connect(address).await.expect("a listener");
        stream.set_nodelay(true).expect("an open socket");
        let mut answer = Vec::new();
        for piece in pieces {
            if stream.write_all(piece).await.is_err() {
                break;
            }
            stream.flush().await.ok();
            tokio::task::yield_now().await;
        }
        let mut buffer = [0; 16 << 10];
        while !enough(&String::from_utf8_lossy(&answer)) {
            match stream.read(&mut buffer).await {
                Ok(0) | Err(_) => break,
                Ok(n) => answer.extend_from_slice(&buffer[..n]),
            }
        }
        String::from_utf8_lossy(&answer).into_owned()
    };
    let head = String::from_utf8_lossy(pieces.first().copied().unwrap_or_default()).into_owned();
    timeout(LIMIT, exchange)
        .await
        .unwrap_or_else(|_| panic!("no answer in 10 s to {head}"))
}
