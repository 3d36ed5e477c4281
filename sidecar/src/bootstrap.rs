//! A fresh sidecar takes over the index of another.

use std::collections::HashMap;
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use http::header;
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::ask::ask;
use crate::config::Config;
use crate::dump::Line;
use crate::index::{Control, NotAdopted};
use crate::ingest::batch::{Origin, Resume};
use crate::metrics::{Kind, Metrics};

/// Path of the dump.
const PATH: &str = "/v1/index/dump";
/// How long a peer may take to answer.
const ANSWER: Duration = Duration::from_secs(2);
/// How long it may pause while it answers.
const PAUSE: Duration = Duration::from_secs(5);
/// How long a start that asks peers waits for NATS.
const NATS_FIRST: Duration = Duration::from_secs(1);
/// Pause between looks at it.
const NATS_POLL: Duration = Duration::from_millis(10);
/// Longest line, bytes.
const LONGEST_LINE: usize = 64 << 20;

/// Why a peer's index is not taken over.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    /// It can't be reached.
    #[error("{0}")]
    Connect(#[from] std::io::Error),
    /// It doesn't speak HTTP.
    #[error("{0}")]
    Http(#[from] hyper::Error),
    /// It is too slow.
    #[error("no answer in time")]
    Timeout,
    /// It answers something else.
    #[error("status {0}")]
    Status(http::StatusCode),
    /// A URL without a host, or a request that can't be made of it.
    #[error("not a URL to ask: {0}")]
    Url(http::Uri),
    /// The answer can't be read.
    #[error("malformed: {0}")]
    Malformed(#[from] serde_json::Error),
    /// A line that is too long.
    #[error("a line of more than {LONGEST_LINE} bytes")]
    TooLong,
    /// The answer contradicts itself.
    #[error("{0}")]
    Refused(#[from] NotAdopted),
    /// The answer ends in the middle.
    #[error("cut off")]
    CutOff,
    /// The index takes nothing any more.
    #[error("shutting down")]
    Gone,
}

impl BootstrapError {
    /// Label for metrics.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Connect(_) => "unreachable",
            Self::Http(_) | Self::CutOff => "broken_off",
            Self::Timeout => "timeout",
            Self::Status(_) => "status",
            Self::Url(_) => "url",
            Self::Malformed(_) | Self::TooLong | Self::Refused(_) => "malformed",
            Self::Gone => "shutting_down",
        }
    }
}

/// Takes the index of the first peer over that has one, for an index that awaits it. Returns where
/// workers' own streams are to be taken up.
pub async fn take_over(
    config: &Config,
    token: Option<&str>,
    control: &mpsc::Sender<Control>,
    metrics: &Metrics,
) -> HashMap<Origin, Resume> {
    if config.nats.is_some() {
        // What is published from the dump on must not be missed.
        let connected = async {
            while metrics.nats_connected.get() == 0 {
                tokio::time::sleep(NATS_POLL).await;
            }
        };
        let _ = timeout(NATS_FIRST, connected).await;
    }
    for peer in &config.peers {
        let outcome = from_peer(peer, token, control).await;
        let kind = outcome
            .as_ref()
            .map_or_else(BootstrapError::kind, |()| "taken");
        metrics.bootstraps.get_or_create(&Kind { kind }).inc();
        match outcome {
            Ok(()) => {
                tracing::info!(%peer, "took over the index of a peer");
                break;
            }
            Err(error) => tracing::warn!(%peer, %error, "can't take over the index of a peer"),
        }
    }
    // Nobody needs them when the index is gone.
    ask(control, Control::Adopted).await.unwrap_or_default()
}

/// Takes over the index of the peer at `url`, with what came before an error.
async fn from_peer(
    url: &http::Uri,
    token: Option<&str>,
    control: &mpsc::Sender<Control>,
) -> Result<(), BootstrapError> {
    let answer = timeout(ANSWER, get(url, token)).await;
    let mut body = answer.map_err(|_| BootstrapError::Timeout)??;
    let mut bytes = BytesMut::new();
    loop {
        let frame = timeout(PAUSE, body.frame()).await;
        let frame = frame.map_err(|_| BootstrapError::Timeout)?;
        let frame = frame.ok_or(BootstrapError::CutOff)??;
        let part = frame.into_data().unwrap_or_default();
        let mut searched = bytes.len();
        bytes.extend_from_slice(&part);
        while let Some(end) = bytes.iter().skip(searched).position(|byte| *byte == b'\n') {
            let line: Line = serde_json::from_slice(&bytes[..searched + end])?;
            let adopted = ask(control, |reply| Control::Adopt { line, reply }).await;
            if adopted.ok_or(BootstrapError::Gone)?? {
                return Ok(());
            }
            bytes.advance(searched + end + 1);
            searched = 0;
        }
        if bytes.len() > LONGEST_LINE {
            return Err(BootstrapError::TooLong);
        }
    }
}

async fn get(url: &http::Uri, token: Option<&str>) -> Result<Incoming, BootstrapError> {
    let refused = || BootstrapError::Url(url.clone());
    let authority = url.authority().ok_or_else(refused)?;
    let port = authority.port_u16().unwrap_or(80);
    let host = authority.host().trim_matches(['[', ']']);
    let stream = TcpStream::connect((host, port)).await?;
    let io = TokioIo::new(stream);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await?;
    // Ends with the answer.
    tokio::spawn(connection);
    let mut request = http::Request::get(PATH).header(header::HOST, authority.as_str());
    if let Some(token) = token {
        request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
    }
    let request = request.body(Empty::<Bytes>::new()).map_err(|_| refused())?;
    let answer = sender.send_request(request).await?;
    if !answer.status().is_success() {
        return Err(BootstrapError::Status(answer.status()));
    }
    Ok(answer.into_body())
}
