//! The background task that posts.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::{Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Deserialize;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::event::{Event, Post};

/// How long a post may take.
const LIMIT: Duration = Duration::from_secs(10);
/// Longest pause between attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Longest answer that is read, bytes.
const ANSWER: usize = 1 << 16;
/// Batches that wait to be posted.
const QUEUE: usize = 1024;
/// Events of one post of a whole cache.
const POST_EVENTS: usize = 512;

/// Where and as whom to post.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The sidecar's `http://host:port/v1/events`.
    pub url: String,
    /// The worker, as the router's configuration names it.
    pub worker_id: u64,
    /// Number of the stream among the worker's.
    pub stream: u32,
    /// The worker's token.
    pub token: Option<String>,
    /// Posts that are kept to be sent once more.
    pub keep: usize,
}

impl Settings {
    /// Stream 0 without a token.
    #[must_use]
    pub fn new(url: &str, worker_id: u64) -> Self {
        Self {
            url: url.to_owned(),
            worker_id,
            stream: 0,
            token: None,
            keep: 1024,
        }
    }
}

/// Settings that can't work.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// No address.
    #[error("{url:?} is no http url")]
    Url {
        /// What was given.
        url: String,
    },
    /// A token with other characters than a header takes.
    #[error("the token is no header value")]
    Token,
}

/// What became of batches.
#[derive(Debug, Default)]
pub struct Totals {
    /// Events that the sidecar has taken.
    pub taken: AtomicU64,
    /// Batches that found the queue full; the whole cache is told instead.
    pub dropped: AtomicU64,
    /// Times that the whole cache was told.
    pub anew: AtomicU64,
}

enum Item {
    Events(Vec<Event>),
    Flush(Arc<Notify>),
}

/// Posts an engine's events in the background, in order, for ever. Ends when dropped.
#[derive(Debug)]
pub struct Publisher {
    queue: mpsc::Sender<Item>,
    totals: Arc<Totals>,
    task: JoinHandle<()>,
}

impl Publisher {
    /// Starts. `cache` tells everything that is cached as stores, parents first; it is asked when
    /// the sidecar has lost more than is kept.
    ///
    /// # Errors
    /// When address or token can't be used. A sidecar that doesn't answer is no error.
    pub fn start(
        settings: Settings,
        cache: impl Fn() -> Vec<Event> + Send + Sync + 'static,
    ) -> Result<Self, SettingsError> {
        let is_http = |uri: &Uri| uri.scheme_str() == Some("http") && uri.host().is_some();
        let uri = settings.url.parse::<Uri>().ok().filter(is_http);
        let uri = uri.ok_or_else(|| SettingsError::Url {
            url: settings.url.clone(),
        })?;
        let bearer = settings.token.as_ref().map(|token| {
            header::HeaderValue::try_from(format!("Bearer {token}"))
                .map_err(|_| SettingsError::Token)
        });
        let (queue, items) = mpsc::channel(QUEUE);
        let totals = Arc::new(Totals::default());
        let poster = Poster {
            client: Client::builder(TokioExecutor::new()).build_http(),
            uri,
            bearer: bearer.transpose()?,
            incarnation: incarnation(0),
            run: 0,
            next: 0,
            kept: VecDeque::new(),
            settings,
            totals: Arc::clone(&totals),
            cache: Box::new(cache),
        };
        let task = tokio::spawn(poster.run(items));
        Ok(Self {
            queue,
            totals,
            task,
        })
    }

    /// Queues events without waiting. Where the queue is full they are dropped, and the whole cache
    /// is told later.
    pub fn publish(&self, events: Vec<Event>) {
        if self.queue.try_send(Item::Events(events)).is_err() {
            self.totals.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits until the sidecar has everything that was published before.
    pub async fn flush(&self) {
        let done = Arc::new(Notify::new());
        if self
            .queue
            .send(Item::Flush(Arc::clone(&done)))
            .await
            .is_ok()
        {
            done.notified().await;
        }
    }

    /// What became of batches.
    #[must_use]
    pub fn totals(&self) -> &Totals {
        &self.totals
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A name that no other run has.
fn incarnation(run: u64) -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let ns = since.map_or(0, |d| d.as_nanos());
    format!("{ns:x}-{}-{run}", std::process::id())
}

struct Poster {
    client: Client<HttpConnector, Full<Bytes>>,
    uri: Uri,
    bearer: Option<header::HeaderValue>,
    incarnation: String,
    run: u64,
    /// Number of the next post.
    next: u64,
    /// The last posts, each with its number and its events.
    kept: VecDeque<(u64, Bytes, u64)>,
    settings: Settings,
    totals: Arc<Totals>,
    cache: Box<dyn Fn() -> Vec<Event> + Send + Sync>,
}

/// What the sidecar says to a post.
enum Answer {
    Taken,
    Expected(u64),
    Later(String),
    Refused(String),
}

#[derive(Deserialize)]
struct Conflict {
    expected: u64,
}

impl Poster {
    async fn run(mut self, mut items: mpsc::Receiver<Item>) {
        let mut dropped = 0;
        while let Some(item) = items.recv().await {
            match item {
                Item::Events(events) => self.post(events).await,
                Item::Flush(done) => done.notify_one(),
            }
            let all = self.totals.dropped.load(Ordering::Relaxed);
            if all != dropped {
                dropped = all;
                self.anew().await;
            }
        }
    }

    /// Posts until the sidecar has taken it.
    async fn post(&mut self, events: Vec<Event>) {
        let sequence = self.keep(events);
        self.send_from(sequence).await;
    }

    /// Numbers a post and keeps it.
    fn keep(&mut self, events: Vec<Event>) -> u64 {
        let (sequence, count) = (self.next, events.len() as u64);
        let post = Post {
            worker_id: self.settings.worker_id,
            stream: self.settings.stream,
            incarnation: self.incarnation.clone(),
            sequence,
            dp_rank: None,
            events,
        };
        // Plain structs of numbers and strings: there is nothing to fail.
        let body = rmp_serde::to_vec_named(&post).unwrap_or_default();
        if self.kept.len() >= self.settings.keep.max(1) {
            self.kept.pop_front();
        }
        self.kept.push_back((sequence, body.into(), count));
        self.next += 1;
        sequence
    }

    async fn send_from(&mut self, mut sequence: u64) {
        let mut failed = 0;
        while sequence < self.next {
            let kept = self.kept.iter().find(|(number, ..)| *number == sequence);
            let Some((_, body, count)) = kept.cloned() else {
                sequence = self.begin_anew();
                continue;
            };
            match self.send(body).await {
                Answer::Taken => {
                    self.totals.taken.fetch_add(count, Ordering::Relaxed);
                    sequence += 1;
                    failed = 0;
                    continue;
                }
                // A sidecar that wants what there is not yet knows another past.
                Answer::Expected(number) if number < self.next && number != sequence => {
                    sequence = number;
                    continue;
                }
                Answer::Expected(_) => {
                    sequence = self.begin_anew();
                }
                Answer::Later(why) => {
                    if failed == 0 {
                        eprintln!("kv events wait for {}: {why}", self.uri);
                    }
                }
                Answer::Refused(why) => {
                    eprintln!("kv events refused by {}: {why}", self.uri);
                    sequence += 1;
                }
            }
            let pause = Duration::from_millis(50).saturating_mul(1 << failed.min(7));
            sleep(pause.min(LONGEST_PAUSE)).await;
            failed += 1;
        }
    }

    async fn anew(&mut self) {
        let first = self.begin_anew();
        self.send_from(first).await;
    }

    /// Begins another incarnation with the whole cache; gives its first number.
    fn begin_anew(&mut self) -> u64 {
        self.totals.anew.fetch_add(1, Ordering::Relaxed);
        self.run += 1;
        self.incarnation = incarnation(self.run);
        self.kept.clear();
        self.next = 0;
        let mut events = (self.cache)().into_iter().peekable();
        loop {
            let some = events.by_ref().take(POST_EVENTS).collect();
            // What is being told must not push itself out.
            self.settings.keep = self.settings.keep.max(self.kept.len() + 1);
            self.keep(some);
            if events.peek().is_none() {
                return 0;
            }
        }
    }

    async fn send(&self, body: Bytes) -> Answer {
        let mut request =
            Request::post(self.uri.clone()).header(header::CONTENT_TYPE, "application/msgpack");
        if let Some(bearer) = &self.bearer {
            request = request.header(header::AUTHORIZATION, bearer.clone());
        }
        let request = match request.body(Full::new(body)) {
            Ok(request) => request,
            Err(error) => return Answer::Refused(error.to_string()),
        };
        let exchange = async {
            let answer = self.client.request(request).await;
            let answer = answer.map_err(|error| error.to_string())?;
            let (head, body) = answer.into_parts();
            let body = Limited::new(body, ANSWER).collect().await;
            let body = body.map_err(|error| error.to_string())?.to_bytes();
            Ok::<_, String>((head.status, body))
        };
        let (status, body) = match timeout(LIMIT, exchange).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(why)) => return Answer::Later(why),
            Err(_) => return Answer::Later("no answer".to_owned()),
        };
        let text = || format!("{status}: {}", String::from_utf8_lossy(&body));
        match status {
            StatusCode::CONFLICT => match serde_json::from_slice::<Conflict>(&body) {
                Ok(conflict) => Answer::Expected(conflict.expected),
                Err(_) => Answer::Later(text()),
            },
            StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT => Answer::Later(text()),
            // The worker may join the configuration, the token be put right.
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::NOT_FOUND => {
                Answer::Later(text())
            }
            status if status.is_success() => Answer::Taken,
            status if status.is_client_error() => Answer::Refused(text()),
            _ => Answer::Later(text()),
        }
    }
}
