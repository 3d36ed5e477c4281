//! One streamed request and what its client saw.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper_util::client::legacy::Client as Pool;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Deserialize;

use crate::WORKER_ID_HEADER;

/// Bytes of one server-sent event.
const EVENT_BYTES: usize = 1024 * 1024;

/// Keep-alive connections to one endpoint.
#[derive(Clone, Debug)]
pub(super) struct Client {
    pool: Pool<HttpConnector, Full<Bytes>>,
    url: http::Uri,
    timeout: Duration,
}

/// A request that was answered in full.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Sample {
    pub(super) ttft: Duration,
    pub(super) gaps: Vec<Duration>,
    pub(super) prompt_tokens: u64,
    pub(super) completion_tokens: u64,
    /// As the engine counted; `None` where it does not say.
    pub(super) cached_tokens: Option<u64>,
    /// From `x-worker-id`.
    pub(super) worker: Option<String>,
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Failure {
    #[error("cannot connect or send: {0}")]
    Connect(String),
    #[error("status {status}: {body}")]
    Status { status: StatusCode, body: String },
    #[error("no answer in full after {0:?}")]
    Timeout(Duration),
    #[error("the stream broke: {0}")]
    Reset(String),
    #[error("the stream ended without [DONE]")]
    Truncated,
    #[error("not a chunk: {0}")]
    BadEvent(String),
    #[error("{got} tokens came, {asked} were asked for")]
    Short { got: u64, asked: u64 },
}

impl Failure {
    /// Label in reports.
    pub(super) fn kind(&self) -> String {
        match self {
            Self::Connect(_) => "connect".to_owned(),
            Self::Status { status, .. } => format!("status_{}", status.as_u16()),
            Self::Timeout(_) => "timeout".to_owned(),
            Self::Reset(_) => "reset".to_owned(),
            Self::Truncated => "truncated".to_owned(),
            Self::BadEvent(_) => "bad_event".to_owned(),
            Self::Short { .. } => "short".to_owned(),
        }
    }
}

#[derive(Debug, Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
}

#[derive(Debug, Deserialize)]
struct Choice {
    text: String,
}

#[derive(Debug, Deserialize)]
struct Usage {
    prompt_tokens: u64,
    completion_tokens: u64,
    prompt_tokens_details: Option<PromptDetails>,
}

#[derive(Debug, Deserialize)]
struct PromptDetails {
    cached_tokens: Option<u64>,
}

/// A stream being read.
#[derive(Debug, Default)]
struct Reader {
    pending: Vec<u8>,
    sample: Sample,
    chunks: u64,
    last: Option<Instant>,
    done: bool,
}

impl Client {
    pub(super) fn new(url: http::Uri, timeout: Duration) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        Self {
            pool: Pool::builder(TokioExecutor::new()).build(connector),
            url,
            timeout,
        }
    }

    /// Sends one body and reads its stream to the end. Times count from the call.
    pub(super) async fn send(&self, body: Bytes, max_tokens: usize) -> Result<Sample, Failure> {
        let asked = max_tokens as u64;
        match tokio::time::timeout(self.timeout, self.stream(body, asked)).await {
            Ok(result) => result,
            Err(_) => Err(Failure::Timeout(self.timeout)),
        }
    }

    async fn stream(&self, body: Bytes, asked: u64) -> Result<Sample, Failure> {
        let request = Request::post(self.url.clone())
            .header("content-type", "application/json")
            .body(Full::new(body))
            .map_err(|error| Failure::Connect(error.to_string()))?;
        let sent = Instant::now();
        let response = self
            .pool
            .request(request)
            .await
            .map_err(|error| Failure::Connect(chain(&error)))?;
        let (head, mut body) = response.into_parts();
        if head.status != StatusCode::OK {
            let text = match body.collect().await {
                Ok(body) => String::from_utf8_lossy(&body.to_bytes()).into_owned(),
                Err(error) => chain(&error),
            };
            return Err(Failure::Status {
                status: head.status,
                body: text,
            });
        }
        let mut reader = Reader::default();
        reader.sample.worker = head
            .headers
            .get(WORKER_ID_HEADER)
            .and_then(|id| id.to_str().ok())
            .map(str::to_owned);
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| Failure::Reset(chain(&error)))?;
            if let Some(bytes) = frame.data_ref() {
                reader.read(bytes, sent, Instant::now())?;
            }
        }
        reader.finish(asked)
    }
}

impl Reader {
    fn read(&mut self, bytes: &[u8], sent: Instant, now: Instant) -> Result<(), Failure> {
        self.pending.extend_from_slice(bytes);
        if self.pending.len() > EVENT_BYTES {
            return Err(Failure::BadEvent(format!("over {EVENT_BYTES} bytes")));
        }
        let pending = std::mem::take(&mut self.pending);
        let mut rest = pending.as_slice();
        while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
            self.line(rest[..end].trim_ascii(), sent, now)?;
            rest = &rest[end + 1..];
        }
        self.pending = rest.to_vec();
        Ok(())
    }

    fn line(&mut self, line: &[u8], sent: Instant, now: Instant) -> Result<(), Failure> {
        let Some(data) = line.strip_prefix(b"data:").map(<[u8]>::trim_ascii_start) else {
            return Ok(());
        };
        if data == b"[DONE]" {
            self.done = true;
            return Ok(());
        }
        let chunk: Chunk = serde_json::from_slice(data)
            .map_err(|error| Failure::BadEvent(format!("{error}: {}", data.escape_ascii())))?;
        if chunk.choices.iter().any(|choice| !choice.text.is_empty()) {
            match self.last.replace(now) {
                None => self.sample.ttft = now - sent,
                Some(last) => self.sample.gaps.push(now - last),
            }
            self.chunks += 1;
        }
        if let Some(usage) = chunk.usage {
            self.sample.prompt_tokens = usage.prompt_tokens;
            self.sample.completion_tokens = usage.completion_tokens;
            self.sample.cached_tokens = usage
                .prompt_tokens_details
                .and_then(|details| details.cached_tokens);
        }
        Ok(())
    }

    fn finish(self, asked: u64) -> Result<Sample, Failure> {
        if !self.done {
            return Err(Failure::Truncated);
        }
        // Engines may put several tokens in a chunk; the usage counts them all.
        let got = self.sample.completion_tokens.max(self.chunks);
        if got < asked {
            return Err(Failure::Short { got, asked });
        }
        Ok(Sample {
            completion_tokens: got,
            ..self.sample
        })
    }
}

/// An error with its causes; hyper's own text leaves them out.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &[u8] = b"data: {\"choices\":[{\"text\":\" t1\"}]}\r\n\r\n: comment\n\n\
        data: {\"choices\":[{\"text\":\" t2\"}]}\n\n\
        data: {\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":2,\
        \"prompt_tokens_details\":{\"cached_tokens\":8}}}\n\ndata: [DONE]\n\n";

    fn read(pieces: &[&[u8]]) -> Result<Sample, Failure> {
        let mut reader = Reader::default();
        let sent = Instant::now();
        for (at, piece) in (1..).zip(pieces) {
            reader.read(piece, sent, sent + Duration::from_millis(at))?;
        }
        reader.finish(2)
    }

    #[test]
    fn any_cut_of_a_stream_gives_the_same_counts() {
        for cut in 0..STREAM.len() {
            let sample = read(&[&STREAM[..cut], &STREAM[cut..]]).expect("complete");
            assert_eq!(sample.gaps.len(), 1, "cut at {cut}");
            assert_eq!(
                (sample.prompt_tokens, sample.completion_tokens),
                (9, 2),
                "cut at {cut}"
            );
            assert_eq!(sample.cached_tokens, Some(8));
        }
    }

    #[test]
    fn times_are_those_of_the_pieces() {
        let second = STREAM.windows(3).position(|part| part == b" t2").unwrap();
        let sample = read(&[&STREAM[..second], &[], &STREAM[second..]]).expect("complete");
        assert_eq!(sample.ttft, Duration::from_millis(1));
        assert_eq!(sample.gaps, [Duration::from_millis(2)]);
    }

    #[test]
    fn incomplete_and_wrong_streams_are_failures_of_their_kind() {
        let kind = |stream: &[u8]| read(&[stream]).expect_err("incomplete").kind();
        assert_eq!(kind(&STREAM[..STREAM.len() - 20]), "truncated");
        assert_eq!(kind(b"data: [DONE]\n"), "short");
        assert_eq!(kind(b"data: {]\n"), "bad_event");
    }
}
