//! Messages as they come over a door, for a while.

use std::time::Duration;

use anyhow::Context as _;
use bytes::{Buf as _, Bytes};
use futures::StreamExt as _;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde::Serialize;
use tokio::time::{Instant, timeout_at};

use crate::config::Nats;
use crate::ingest::nats::options;
use crate::ingest::zmq::MESSAGE_BYTES;
use crate::ingest::zmtp::{Connection, Role};

/// Most bytes that are watched; what comes later is not looked at.
const MAX_BYTES: usize = 256 << 20;
/// How long a replay may take to go on.
const REPLAY: Duration = Duration::from_secs(5);

/// A message and its number, where messages are numbered.
pub(super) type Message = (Option<u64>, Bytes);

/// What a replay socket has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Replay {
    /// Messages that it gave.
    pub messages: u64,
    /// Number of the first one.
    pub first: Option<u64>,
    /// Whether it said that these were all.
    pub is_complete: bool,
}

/// Where messages come from.
#[derive(Clone, Debug)]
pub(super) enum Door {
    /// `host:port` of a PUB socket, of its ROUTER socket, and the topic.
    Zmq {
        events: String,
        replay: Option<String>,
        topic: String,
    },
    /// A server and subjects.
    Nats { nats: Nats, subjects: Vec<String> },
    /// TensorRT-LLM's endpoint, asked this often.
    Poll { url: http::Uri, every: Duration },
}

/// Watches until the time is over, or there is more than can be kept.
pub(super) async fn watch(
    door: &Door,
    time: Duration,
) -> anyhow::Result<(Vec<Message>, Option<Replay>)> {
    let end = Instant::now() + time;
    let mut kept = Kept::default();
    let mut replayed = None;
    match door {
        Door::Zmq {
            events,
            replay,
            topic,
        } => {
            let place = || format!("zmq at {events}");
            let opened = Connection::open(events, Role::Sub, MESSAGE_BYTES).await;
            let mut connection = opened.with_context(place)?;
            connection.subscribe(topic).await.with_context(place)?;
            if let Some(endpoint) = replay {
                let place = || format!("replay at {endpoint}");
                replayed = Some(replay_of(endpoint).await.with_context(place)?);
            }
            while let Ok(message) = timeout_at(end, connection.receive()).await {
                let frames = message.with_context(place)?;
                // Dynamo's plane has the publisher before the number.
                let message = match frames.as_slice() {
                    [_, sequence, payload] | [_, _, sequence, payload] => {
                        (number(sequence), payload.clone())
                    }
                    _ => (None, Bytes::new()),
                };
                if !kept.keep(message) {
                    break;
                }
            }
        }
        Door::Nats { nats, subjects } => {
            let place = || format!("nats at {}", nats.urls.join(", "));
            let connecting = async {
                let client = options(nats).await?.connect(nats.urls.as_slice()).await?;
                // Answered only once the server is there.
                client.flush().await?;
                anyhow::Ok(client)
            };
            let client = timeout_at(end, connecting).await;
            let client = client.map_err(anyhow::Error::from).flatten();
            let client = client.with_context(place)?;
            let mut messages = futures::stream::SelectAll::new();
            for subject in subjects {
                let subscriber = client.subscribe(subject.clone()).await;
                messages.push(subscriber.with_context(place)?);
            }
            while let Ok(Some(message)) = timeout_at(end, messages.next()).await {
                if !kept.keep((None, message.payload)) {
                    break;
                }
            }
        }
        Door::Poll { url, every } => {
            let client = Client::builder(TokioExecutor::new()).build_http();
            while Instant::now() < end {
                let request = http::Request::post(url.clone()).body(Empty::<Bytes>::new())?;
                let Ok(answer) = timeout_at(end, client.request(request)).await else {
                    break;
                };
                let answer = answer.with_context(|| format!("polling {url}"))?;
                anyhow::ensure!(
                    answer.status().is_success(),
                    "{url} answers {}",
                    answer.status()
                );
                let body = Limited::new(answer.into_body(), MESSAGE_BYTES).collect();
                let body = body
                    .await
                    .map_err(|error| anyhow::anyhow!("{url}: {error}"))?;
                let body = body.to_bytes();
                if body.trim_ascii() != b"[]" && !kept.keep((None, body)) {
                    break;
                }
                tokio::time::sleep_until(end.min(Instant::now() + *every)).await;
            }
        }
    }
    Ok((kept.messages, replayed))
}

#[derive(Default)]
struct Kept {
    messages: Vec<Message>,
    bytes: usize,
}

impl Kept {
    /// Whether there is room for more.
    fn keep(&mut self, message: Message) -> bool {
        // An empty message takes room too.
        self.bytes += message.1.len() + 64;
        self.messages.push(message);
        self.bytes < MAX_BYTES
    }
}

/// Asks for everything, and only counts it.
async fn replay_of(endpoint: &str) -> anyhow::Result<Replay> {
    let mut connection = Connection::open(endpoint, Role::Dealer, MESSAGE_BYTES).await?;
    let start = Bytes::copy_from_slice(&0_u64.to_be_bytes());
    connection.send(vec![Bytes::new(), start]).await?;
    let mut replay = Replay::default();
    while let Ok(message) = tokio::time::timeout(REPLAY, connection.receive()).await {
        let frames = message?;
        let [.., sequence, payload] = frames.as_slice() else {
            anyhow::bail!("an answer of {} frames", frames.len());
        };
        if payload.is_empty() {
            replay.is_complete = true;
            break;
        }
        replay.messages += 1;
        replay.first = replay.first.or_else(|| number(sequence));
    }
    Ok(replay)
}

/// A number as a frame of eight bytes.
fn number(mut frame: &[u8]) -> Option<u64> {
    (frame.len() == 8).then(|| frame.get_u64())
}
