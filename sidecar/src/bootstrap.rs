//! A fresh sidecar takes over the index of another.

use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use http::header;
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::dump::Line;
use crate::index::{NotAdopted, Service};

/// Path of the dump.
const PATH: &str = "/v1/index/dump";
/// How long a peer may take to answer.
const ANSWER: Duration = Duration::from_secs(2);
/// How long it may pause while it answers.
const PAUSE: Duration = Duration::from_secs(5);
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
        }
    }
}

/// Takes over the index of the peer at `url`, with what came before an error.
///
/// # Errors
/// When it doesn't have one to give, or not to us.
pub async fn from_peer(
    url: &http::Uri,
    token: Option<&str>,
    service: &mut Service,
) -> Result<(), BootstrapError> {
    let answer = timeout(ANSWER, ask(url, token)).await;
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
            if service.adopt(line)? {
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

async fn ask(url: &http::Uri, token: Option<&str>) -> Result<Incoming, BootstrapError> {
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
