//! The door to TensorRT-LLM's `POST /kv_cache_events`. Reading takes the events away, so there may
//! be one reader alone; another shows as jumps in the ids although the engine's buffer was not full.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kv_core::id::DpRank;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::order::Frame;
use super::pause;
use super::stream::{Gone, Stream, unix_ns};

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(10);
/// Most bytes of an answer: refusing one loses what it holds.
const ANSWER_BYTES: usize = 64 << 20;

/// Why a poll brought nothing.
#[derive(Debug, thiserror::Error)]
enum PollError {
    #[error("no answer in {} s", LIMIT.as_secs())]
    Timeout,
    #[error("{0}")]
    Http(String),
    #[error("the answer's status is {0}")]
    Status(StatusCode),
    #[error("the answer is no list of events: {0}")]
    Body(#[from] serde_json::Error),
}

/// What of an event puts it in order.
#[derive(Debug, Deserialize)]
struct Head {
    event_id: u64,
    #[serde(default)]
    attention_dp_rank: Option<DpRank>,
}

/// Polls for ever. There is a stream to each rank.
///
/// # Errors
/// When the index is gone.
pub async fn run(
    url: Uri,
    every: Duration,
    streams: BTreeMap<DpRank, Stream>,
) -> Result<Gone, Gone> {
    let client = Client::builder(TokioExecutor::new())
        .pool_max_idle_per_host(1)
        .build_http();
    let mut reader = Reader {
        client,
        url,
        streams,
        longest: 0,
        is_open: false,
        is_sure: true,
    };
    let mut failed = 0;
    loop {
        match reader.poll().await {
            Ok(events) => {
                failed = 0;
                reader.take(&events).await?;
                tokio::time::sleep(every).await;
            }
            Err(why) => {
                reader.lose(&why).await?;
                tokio::time::sleep(pause::after(failed)).await;
                failed = failed.saturating_add(1);
            }
        }
    }
}

struct Reader {
    client: Client<HttpConnector, Empty<Bytes>>,
    url: Uri,
    streams: BTreeMap<DpRank, Stream>,
    /// Most events of one answer: the engine's buffer holds at least as many.
    longest: usize,
    is_open: bool,
    /// No answer with events can have been lost on the way.
    is_sure: bool,
}

impl Reader {
    async fn poll(&self) -> Result<Bytes, PollError> {
        let request = Request::post(self.url.clone())
            .header(header::ACCEPT, "application/json")
            .body(Empty::new())
            .map_err(|error| PollError::Http(error.to_string()))?;
        let exchange = async {
            let http = |error: &dyn std::fmt::Display| PollError::Http(error.to_string());
            let answer = self.client.request(request).await.map_err(|e| http(&e))?;
            if !answer.status().is_success() {
                return Err(PollError::Status(answer.status()));
            }
            let body = Limited::new(answer.into_body(), ANSWER_BYTES);
            let body = body.collect().await.map_err(|e| http(&e))?;
            Ok(body.to_bytes())
        };
        let answer = tokio::time::timeout(LIMIT, exchange).await;
        answer.unwrap_or(Err(PollError::Timeout))
    }

    async fn take(&mut self, answer: &[u8]) -> Result<(), Gone> {
        let events: Vec<&RawValue> = match serde_json::from_slice(answer) {
            Ok(events) => events,
            Err(error) => return self.lose(&error.into()).await,
        };
        if !self.is_open {
            self.is_open = true;
            for stream in self.streams.values_mut() {
                stream.order.opened();
            }
        }
        let received_ns = unix_ns();
        let mut has_jump = false;
        for event in &events {
            let head = serde_json::from_str::<Head>(event.get());
            let rank = head.as_ref().map(|h| h.attention_dp_rank.unwrap_or(0));
            let stream = rank.ok().and_then(|rank| self.streams.get_mut(&rank));
            let (Ok(head), Some(stream)) = (head, stream) else {
                if let Some((_, stream)) = self.streams.first_key_value() {
                    stream.outlet.count("malformed");
                }
                continue;
            };
            has_jump |= stream.order.misses(head.event_id);
            stream.outlet.admit(event.get().len()).await;
            stream.order.live(Frame {
                sequence: head.event_id,
                payload: Bytes::copy_from_slice(event.get().as_bytes()),
                received_ns,
            });
        }
        for stream in self.streams.values_mut() {
            stream.proceed().await?;
        }
        if has_jump && self.is_sure && events.len() < self.longest {
            self.warn();
        }
        self.longest = self.longest.max(events.len());
        self.is_sure = true;
        Ok(())
    }

    /// An engine's buffer that is not full loses nothing.
    fn warn(&self) {
        let Some((_, stream)) = self.streams.first_key_value() else {
            return;
        };
        stream.outlet.count("second_reader");
        let worker = stream.outlet.origin().worker;
        let url = self.url.to_string();
        tracing::error!(
            worker,
            url,
            "events vanish from the engine's buffer: somebody else polls them too"
        );
    }

    async fn lose(&mut self, why: &PollError) -> Result<(), Gone> {
        self.is_sure = false;
        let worker = self.streams.values().next();
        let worker = worker.map(|stream| stream.outlet.origin().worker);
        if let Some((_, stream)) = self.streams.first_key_value() {
            stream.outlet.count("failed");
        }
        if std::mem::take(&mut self.is_open) {
            tracing::warn!(worker, url = %self.url, %why, "no events by polling, trying again");
            for stream in self.streams.values_mut() {
                stream.order.closed();
                stream.proceed().await?;
            }
        }
        Ok(())
    }
}
