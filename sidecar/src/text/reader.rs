//! Answers what the filter asks about prompts that are text.
//!
//! A prompt of which nearly all is remembered is read at once. Any other takes a thread of its own
//! for as long as it lasts; how many read at a time and how many bytes wait for it is bounded, and
//! what is beyond that is refused at once.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kv_core::text::{Answer, Ask, Extent, Further, LONGEST_BODY, Refusal, Wanted};
use kv_core::wire;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::blocks::Blockwise;
use super::cached::Encoded;
use super::encoder::EncoderError;
use super::engine::{Engine, EngineError};
use super::model::{Model, ModelError};
use super::rendered::Rendered;
use crate::config::{self, Config, TokenizerFrom};
use crate::metrics::{Kind, Metrics};

/// Bytes of questions that may be there at a time.
const MAX_WAITING: usize = 16 * LONGEST_BODY;
/// Part of a budget after which nothing further is tokenized: the answer must be back in time.
const SPENT: (u32, u32) = (3, 4);

/// Longest body that is read without a thread of its own, in bytes.
const GLANCE_BODY: usize = 256 << 10;
/// Bytes of text that may be tokenized there.
const GLANCE_NEW: usize = 2 << 10;
/// Questions to engines under way at a time.
const MAX_ASKED: usize = 256;

/// Reads prompts.
pub struct Reader {
    models: HashMap<String, Model>,
    engines: HashMap<String, Engine>,
    metrics: Arc<Metrics>,
    threads: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
    asked: Semaphore,
}

impl Reader {
    /// A reader of the pools that have a tokenizer. Reads their files.
    ///
    /// # Errors
    /// When a file is missing or broken.
    pub fn load(pools: &[config::Pool], metrics: Arc<Metrics>) -> Result<Self, ModelError> {
        let mut models = HashMap::new();
        let mut engines = HashMap::new();
        for pool in pools {
            let Some(tokenizer) = &pool.tokenizer else {
                continue;
            };
            let seed = getrandom::u64().unwrap_or_default();
            let folder = match &tokenizer.from {
                TokenizerFrom::Folder(folder) => folder,
                TokenizerFrom::Engine(face) => {
                    let bytes = tokenizer.cache_bytes;
                    let engine = Engine::new(*face, endpoints(pool), bytes, seed);
                    engines.insert(pool.name.clone(), engine);
                    continue;
                }
            };
            let mut model = Model::load(folder, tokenizer.cache_bytes, seed)?;
            if let Some(token) = pool.image_token {
                model = model.with_vision(folder, token)?;
            }
            let (cuts, chat) = (
                model.tokens.encoder().cuts().any(),
                model.template.is_some(),
            );
            if !cuts {
                tracing::warn!(
                    pool = pool.name,
                    "this tokenizer reads each text as a whole"
                );
            }
            tracing::info!(pool = pool.name, chat, "tokenizer loaded");
            models.insert(pool.name.clone(), model);
        }
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self {
            models,
            engines,
            metrics,
            threads: Arc::new(Semaphore::new(threads)),
            waiting: Arc::new(Semaphore::new(MAX_WAITING)),
            asked: Semaphore::new(MAX_ASKED),
        })
    }

    /// The workers of a configuration are asked from here on.
    pub fn configure(&self, config: &Config) {
        for pool in &config.pools {
            if let Some(engine) = self.engines.get(&pool.name) {
                engine.ask_workers(endpoints(pool));
            }
        }
    }

    /// Answers a question put through [`wire::encode`].
    ///
    /// # Errors
    /// When it is none.
    pub async fn answer(self: Arc<Self>, message: Bytes) -> Result<Bytes, wire::WireError> {
        let since = Instant::now();
        let (ask, wanted) = Ask::decode(&message)?;
        let (spent, of) = SPENT;
        let deadline = since + Duration::from_micros(ask.budget_us) * spent / of;
        let outcome = match self.room(message.len()) {
            Err(refusal) => Err(refusal),
            Ok(room) => match self.engines.get(ask.pool) {
                Some(engine) => {
                    let read = self.hear(engine, &ask, &wanted);
                    let read = tokio::time::timeout_at(deadline.into(), read).await;
                    read.unwrap_or(Err(Refusal::Deadline))
                }
                None => self.read(&message, &ask, &wanted, room, deadline).await,
            },
        };
        let kind = match &outcome {
            Ok(read) => read.extent().name(),
            Err(refusal) => refusal.name(),
        };
        self.metrics.texts.get_or_create(&Kind { kind }).inc();
        let answer = match outcome {
            Ok(read) => read.encode(),
            Err(refusal) => Answer::Refused(refusal).encode(&Further::default()),
        };
        self.metrics
            .text_time
            .observe(since.elapsed().as_secs_f64());
        Ok(answer.into())
    }

    /// Room for a question.
    fn room(&self, bytes: usize) -> Result<OwnedSemaphorePermit, Refusal> {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let room = Arc::clone(&self.waiting).try_acquire_many_owned(bytes);
        room.map_err(|_| Refusal::Overloaded)
    }

    /// Reads a prompt: here and now where nearly all of it is remembered, since another thread would
    /// take longer to wake. Where none has come free in time, what is remembered of it counts.
    async fn read(
        self: &Arc<Self>,
        message: &Bytes,
        ask: &Ask<'_>,
        wanted: &Wanted<'_>,
        room: OwnedSemaphorePermit,
        deadline: Instant,
    ) -> Result<Blockwise, Refusal> {
        let model = self.models.get(ask.pool).ok_or(Refusal::NoTokenizer)?;
        if ask.body.len() > GLANCE_BODY {
            return self.study(message, None, room, deadline).await;
        }
        let (rendered, known) = guarded(|| {
            let rendered = Rendered::new(model, ask)?;
            let known = tokenized(model.tokens.encode_little(&rendered.text, GLANCE_NEW))?;
            Ok((Arc::new(rendered), known))
        })?;
        if !known.complete {
            let begun = Some(Arc::clone(&rendered));
            let studied = self.study(message, begun, room, deadline).await;
            if studied != Err(Refusal::Deadline) || known.ids.is_empty() {
                return studied;
            }
        }
        self.count(&known);
        guarded(|| Ok(rendered.blocks(model, known, ask, wanted)))
    }

    /// Reads a prompt on a thread, from its body or as it has been rendered.
    async fn study(
        self: &Arc<Self>,
        message: &Bytes,
        rendered: Option<Arc<Rendered>>,
        room: OwnedSemaphorePermit,
        deadline: Instant,
    ) -> Result<Blockwise, Refusal> {
        let thread = Arc::clone(&self.threads).acquire_owned();
        let thread = match tokio::time::timeout_at(deadline.into(), thread).await {
            Ok(Ok(thread)) => thread,
            Ok(Err(_)) | Err(_) => return Err(Refusal::Deadline),
        };
        let (reader, message) = (Arc::clone(self), message.clone());
        let read = move || {
            let _permits = (room, thread);
            let (ask, wanted) = Ask::decode(&message).map_err(|_| Refusal::Malformed)?;
            let model = reader.models.get(ask.pool).ok_or(Refusal::NoTokenizer)?;
            let rendered = match rendered {
                Some(rendered) => rendered,
                None => Arc::new(Rendered::new(model, &ask)?),
            };
            let encoded = tokenized(model.tokens.encode(&rendered.text, Some(deadline)))?;
            reader.count(&encoded);
            Ok(rendered.blocks(model, encoded, &ask, &wanted))
        };
        let read = tokio::task::spawn_blocking(read).await;
        read.unwrap_or(Err(Refusal::Malformed))
    }

    /// Has an engine read a prompt.
    async fn hear(
        &self,
        engine: &Engine,
        ask: &Ask<'_>,
        wanted: &Wanted<'_>,
    ) -> Result<Blockwise, Refusal> {
        let _place = self.asked.acquire().await;
        let told = engine.ids(ask.surface, ask.body).await.map_err(|error| {
            tracing::debug!(%error, pool = ask.pool, "prompt not read by an engine");
            match error {
                EngineError::Body(_) => Refusal::Malformed,
                EngineError::Refused { .. } => Refusal::Template,
                EngineError::Nobody | EngineError::Failed { .. } => Refusal::Engine,
            }
        })?;
        let encoded = told.ok_or(Refusal::NoTokenizer)?;
        self.count(&encoded);
        let tokens = encoded.ids.len();
        Ok(Blockwise::new(
            ask,
            wanted,
            tokens,
            Extent::Whole,
            &encoded.ids,
        ))
    }

    fn count(&self, encoded: &Encoded) {
        let kinds = [
            ("remembered", encoded.remembered),
            ("tokenized", encoded.ids.len() - encoded.remembered),
        ];
        for (kind, count) in kinds {
            let tokens = self.metrics.text_tokens.get_or_create(&Kind { kind });
            tokens.inc_by(u64::try_from(count).unwrap_or_default());
        }
        let read = self.models.values().map(|model| model.tokens.bytes());
        let told = self.engines.values().map(Engine::bytes);
        let remembered: u64 = read.chain(told).sum();
        let remembered = i64::try_from(remembered).unwrap_or(i64::MAX);
        self.metrics.text_remembered.set(remembered);
    }
}

/// What this returns. A panic in a template or tokenizer is that prompt's alone.
fn guarded<T>(read: impl FnOnce() -> Result<T, Refusal>) -> Result<T, Refusal> {
    std::panic::catch_unwind(AssertUnwindSafe(read)).unwrap_or(Err(Refusal::Malformed))
}

/// The ids of a text that the tokenizer takes.
fn tokenized(encoded: Result<Encoded, EncoderError>) -> Result<Encoded, Refusal> {
    encoded.map_err(|error| {
        tracing::debug!(%error, "prompt not tokenized");
        Refusal::Malformed
    })
}

/// Where a pool's workers take requests.
fn endpoints(pool: &config::Pool) -> Vec<SocketAddr> {
    pool.workers.iter().filter_map(|w| w.endpoint).collect()
}

#[cfg(test)]
mod tests {
    use kv_core::hash::{Hashing, Seed, sequence_hashes};
    use kv_core::surface::Surface;

    use super::*;
    use crate::text::cached::tests::byte_level;
    use crate::text::{Cached, Encoder};

    fn reader() -> Arc<Reader> {
        let encoder = Encoder::new(byte_level()).unwrap();
        let model = Model {
            tokens: Cached::new(encoder, 1 << 20, 7),
            template: None,
            vision: None,
        };
        Arc::new(Reader {
            models: HashMap::from([("p".to_owned(), model)]),
            engines: HashMap::new(),
            metrics: Arc::new(Metrics::default()),
            threads: Arc::new(Semaphore::new(1)),
            waiting: Arc::new(Semaphore::new(MAX_WAITING)),
            asked: Semaphore::new(1),
        })
    }

    fn question(text: &str, budget_us: u64) -> Bytes {
        let body = serde_json::json!({ "prompt": text }).to_string();
        let ask = Ask {
            pool: "p",
            surface: Surface::Completions,
            block_size: 4,
            seed: 3,
            budget_us,
            body: body.as_bytes(),
        };
        ask.encode(&Wanted::default()).into()
    }

    async fn answered(
        reader: &Arc<Reader>,
        question: Bytes,
    ) -> Result<(Extent, Vec<u64>), Refusal> {
        let answer = Arc::clone(reader).answer(question).await.unwrap();
        match Answer::decode(&answer).unwrap().0 {
            Answer::Read(blocks) => Ok((blocks.extent, blocks.hashes())),
            Answer::Refused(refusal) => Err(refusal),
        }
    }

    #[tokio::test]
    async fn without_a_thread_in_time_what_is_remembered_is_answered() {
        let reader = reader();
        let long = 60_000_000;
        let turn = "What is the time now, please tell me? ".repeat(60);
        let (extent, first) = answered(&reader, question(&turn, long)).await.unwrap();
        assert_eq!(extent, Extent::Whole);
        let next = turn.clone() + &"And which of them is it then? ".repeat(200);
        let taken = Arc::clone(&reader.threads).acquire_owned().await;
        let (extent, begun) = answered(&reader, question(&next, 1_000)).await.unwrap();
        assert_eq!(extent, Extent::Deadline);
        assert!(
            begun.len() > first.len() / 2,
            "{} of {}",
            begun.len(),
            first.len()
        );
        assert_eq!(begun, first[..begun.len()]);
        let unseen = question(&"nothing of this ".repeat(400), 1_000);
        assert_eq!(answered(&reader, unseen).await, Err(Refusal::Deadline));
        drop(taken);
        let whole = answered(&reader, question(&next, long)).await.unwrap();
        let model = &reader.models["p"];
        let ids = model.tokens.encoder().whole(&next).unwrap();
        let hashes = sequence_hashes(&ids, Hashing::new(4, Seed(3)));
        assert_eq!(whole, (Extent::Whole, hashes));
    }
}
