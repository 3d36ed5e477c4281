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
use kv_core::family::Namespace;
use kv_core::hash::{Hashing, Seed, sequence_hashes};
use kv_core::holdings::{self, Named};
use kv_core::text::{Answer, Ask, Blocks, Extent, Further, LONGEST_BODY, Refusal, Wanted};
use kv_core::wire;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::body::Prompt;
use super::cached::Encoded;
use super::chat::MEDIA;
use super::cut::Cuts;
use super::encoder::EncoderError;
use super::engine::{Engine, EngineError};
use super::model::{Model, ModelError};
use crate::config::{self, Config, TokenizerFrom};
use crate::metrics::{Kind, Metrics};

/// Bytes of questions that may be there at a time.
const MAX_WAITING: usize = 16 * LONGEST_BODY;
/// Part of a budget after which nothing further is tokenized: the answer must be back in time.
const SPENT: (u32, u32) = (3, 4);
/// Bytes of text to a token, where nothing better is known.
const BYTES_PER_TOKEN: usize = 4;

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

/// What has been read of a prompt.
struct Blockwise {
    tokens: usize,
    extent: Extent,
    hashes: Vec<u64>,
    families: Vec<Named>,
    /// As a JSON array, where they are wanted.
    ids: Vec<u8>,
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
                None => match self.glance(&ask, &wanted) {
                    Some(read) => read,
                    None => Arc::clone(&self).study(&message, room, deadline).await,
                },
            },
        };
        let kind = match &outcome {
            Ok(read) => read.extent.name(),
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

    /// Reads a prompt of which nearly all is remembered, here and now: another thread would take
    /// longer to wake.
    fn glance(&self, ask: &Ask<'_>, wanted: &Wanted<'_>) -> Option<Result<Blockwise, Refusal>> {
        if ask.body.len() > GLANCE_BODY {
            return None;
        }
        let encode = |model: &Model, text: &str| {
            let encoded = tokenized(model.tokens.encode_little(text, GLANCE_NEW))?;
            encoded.complete.then_some(encoded).ok_or(Refusal::Deadline)
        };
        let read = AssertUnwindSafe(|| self.read(ask, wanted, encode));
        // A panic in a tokenizer is that prompt's alone.
        match std::panic::catch_unwind(read) {
            Ok(Err(Refusal::Deadline)) => None,
            Ok(read) => Some(read),
            Err(_) => Some(Err(Refusal::Malformed)),
        }
    }

    /// Reads a prompt on a thread.
    async fn study(
        self: Arc<Self>,
        message: &Bytes,
        room: OwnedSemaphorePermit,
        deadline: Instant,
    ) -> Result<Blockwise, Refusal> {
        let thread = Arc::clone(&self.threads).acquire_owned();
        let thread = match tokio::time::timeout_at(deadline.into(), thread).await {
            Ok(Ok(thread)) => thread,
            Ok(Err(_)) | Err(_) => return Err(Refusal::Deadline),
        };
        let message = message.clone();
        let read = move || {
            let _permits = (room, thread);
            let (ask, wanted) = Ask::decode(&message).map_err(|_| Refusal::Malformed)?;
            self.read(&ask, &wanted, |model, text| {
                tokenized(model.tokens.encode(text, Some(deadline)))
            })
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

    fn read(
        &self,
        ask: &Ask<'_>,
        wanted: &Wanted<'_>,
        encode: impl Fn(&Model, &str) -> Result<Encoded, Refusal>,
    ) -> Result<Blockwise, Refusal> {
        let model = self.models.get(ask.pool).ok_or(Refusal::NoTokenizer)?;
        let malformed = |error| {
            tracing::debug!(%error, pool = ask.pool, "prompt not read");
            Refusal::Malformed
        };
        let prompt = Prompt::parse(ask.surface, ask.body).map_err(malformed)?;
        let mut extent = Extent::Whole;
        let mut seen = None;
        let (text, special) = match prompt {
            Prompt::Text { text, special } => (text, special),
            Prompt::Chat(mut chat) => {
                let template = model.template.as_ref().ok_or(Refusal::NoTokenizer)?;
                let (special, has_media) = (chat.special(), chat.has_media());
                let vision = model.vision.as_ref().filter(|_| template.takes_parts());
                let mut is_clear = !has_media;
                if let Some(vision) = vision.filter(|_| has_media) {
                    let (images, is_all) = chat.images();
                    is_clear = is_all;
                    seen = Some((vision, images));
                    chat = chat.seeing();
                }
                let chat = chat.into_chat(template.takes_parts());
                let mut text = template.render(&chat).map_err(|error| {
                    tracing::debug!(%error, pool = ask.pool, "prompt not rendered");
                    Refusal::Template
                })?;
                if !is_clear {
                    before_media(&mut text, model.tokens.encoder().cuts());
                    extent = Extent::Media;
                }
                (text, special)
            }
        };
        let encoded = encode(model, &text)?;
        self.count(&encoded);
        if !encoded.complete {
            extent = Extent::Deadline;
        }
        let estimated = estimate(&encoded, text.len(), ask.body.len(), extent);
        let mut ids = encoded.ids;
        if let Some((vision, images)) = &seen
            && !vision.expand(&mut ids, images, extent == Extent::Whole)
        {
            extent = Extent::Media;
        }
        if special {
            let (before, after) = model.tokens.encoder().around();
            ids.splice(..0, before.iter().copied());
            if extent == Extent::Whole {
                ids.extend_from_slice(after);
            }
        }
        let tokens = estimated.max(ids.len());
        let wanted = Wanted {
            // What stands for an image is none of the engine's tokens.
            ids: wanted.ids && seen.is_none(),
            ..wanted.clone()
        };
        Ok(Blockwise::new(ask, &wanted, tokens, extent, &ids))
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

impl Blockwise {
    /// The blocks of a prompt's ids, as far as it was read.
    fn new(ask: &Ask<'_>, wanted: &Wanted<'_>, tokens: usize, extent: Extent, ids: &[u32]) -> Self {
        let namespace = Namespace {
            lora: wanted.lora,
            salt: wanted.salt,
        };
        let block_size = usize::try_from(ask.block_size).unwrap_or_default();
        let handed_over = if wanted.ids && extent == Extent::Whole {
            serde_json::to_vec(ids).unwrap_or_default()
        } else {
            Vec::new()
        };
        Self {
            tokens,
            extent,
            hashes: sequence_hashes(ids, Hashing::new(block_size, Seed(ask.seed))),
            families: holdings::named(&wanted.families, ask.block_size, ids, namespace),
            ids: handed_over,
        }
    }

    /// The answer.
    fn encode(self) -> Vec<u8> {
        let hashes: Vec<u8> = self.hashes.iter().flat_map(|h| h.to_le_bytes()).collect();
        let blocks = Blocks {
            tokens: u32::try_from(self.tokens).unwrap_or(u32::MAX),
            extent: self.extent,
            hashes: &hashes,
        };
        Answer::Read(blocks).encode(&Further {
            families: self.families,
            ids: &self.ids,
        })
    }
}

/// Cuts a text before what stands for an image, where its beginning has the ids that it has in the
/// engine's prompt, whatever stands for the image there.
fn before_media(text: &mut String, cuts: &Cuts) {
    let end = text.find(MEDIA).unwrap_or(text.len());
    let cut = text.get(..end).and_then(|text| cuts.last(text));
    text.truncate(cut.map_or(0, |cut| cut.at));
}

/// Tokens of a prompt that was not read to its end, by what is known of its beginning.
fn estimate(encoded: &Encoded, text: usize, body: usize, extent: Extent) -> usize {
    match extent {
        Extent::Whole => encoded.ids.len(),
        Extent::Deadline => text / BYTES_PER_TOKEN,
        // What an image takes can't be known.
        Extent::Media => encoded.ids.len() + body.saturating_sub(text).min(4096) / BYTES_PER_TOKEN,
    }
}
