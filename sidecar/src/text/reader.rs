//! Answers what the filter asks about prompts that are text.
//!
//! Reading takes a thread of its own for as long as it lasts; how many read at a time and how many
//! bytes wait for it is bounded, and what is beyond that is refused at once.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kv_core::hash::{Hashing, Seed, sequence_hashes};
use kv_core::text::{Answer, Ask, Blocks, Extent, LONGEST_BODY, Refusal};
use kv_core::wire;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::body::Prompt;
use super::cached::Encoded;
use super::chat::MEDIA;
use super::cut::Cuts;
use super::model::{Model, ModelError};
use crate::config;
use crate::metrics::{Kind, Metrics};

/// Bytes of questions that may be there at a time.
const MAX_WAITING: usize = 16 * LONGEST_BODY;
/// Part of a budget after which nothing further is tokenized: the answer must be back in time.
const SPENT: (u32, u32) = (3, 4);
/// Bytes of text to a token, where nothing better is known.
const BYTES_PER_TOKEN: usize = 4;

/// Reads prompts.
pub struct Reader {
    models: HashMap<String, Model>,
    metrics: Arc<Metrics>,
    threads: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
}

/// What has been read of a prompt.
struct Blockwise {
    tokens: usize,
    extent: Extent,
    hashes: Vec<u64>,
}

impl Reader {
    /// A reader of the pools that have a tokenizer. Reads their files.
    ///
    /// # Errors
    /// When a file is missing or broken.
    pub fn load(pools: &[config::Pool], metrics: Arc<Metrics>) -> Result<Self, ModelError> {
        let mut models = HashMap::new();
        for pool in pools {
            let Some(tokenizer) = &pool.tokenizer else {
                continue;
            };
            let seed = getrandom::u64().unwrap_or_default();
            let model = Model::load(&tokenizer.path, tokenizer.cache_bytes, seed)?;
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
            metrics,
            threads: Arc::new(Semaphore::new(threads)),
            waiting: Arc::new(Semaphore::new(MAX_WAITING)),
        })
    }

    /// Answers a question put through [`wire::encode`].
    ///
    /// # Errors
    /// When it is none.
    pub async fn answer(self: Arc<Self>, message: Bytes) -> Result<Bytes, wire::WireError> {
        let since = Instant::now();
        let ask: Ask<'_> = wire::decode(&message)?;
        let (spent, of) = SPENT;
        let deadline = since + Duration::from_micros(ask.budget_us) * spent / of;
        let outcome = match self.enter(message.len(), deadline).await {
            Ok(permits) => {
                let (reader, message) = (Arc::clone(&self), message.clone());
                let read = move || {
                    let _permits = permits;
                    let ask: Ask<'_> = wire::decode(&message).map_err(|_| Refusal::Malformed)?;
                    reader.read(&ask, deadline)
                };
                // A panic in a tokenizer is that prompt's alone.
                let read = tokio::task::spawn_blocking(read).await;
                read.unwrap_or(Err(Refusal::Malformed))
            }
            Err(refusal) => Err(refusal),
        };
        let kind = match &outcome {
            Ok(read) => read.extent.name(),
            Err(refusal) => refusal.name(),
        };
        self.metrics.texts.get_or_create(&Kind { kind }).inc();
        let bytes: Vec<u8>;
        let answer = match outcome {
            Ok(read) => {
                bytes = read.hashes.iter().flat_map(|h| h.to_le_bytes()).collect();
                Answer::Read(Blocks {
                    tokens: u32::try_from(read.tokens).unwrap_or(u32::MAX),
                    extent: read.extent,
                    hashes: &bytes,
                })
            }
            Err(refusal) => Answer::Refused(refusal),
        };
        let answer = wire::encode(&answer);
        self.metrics
            .text_time
            .observe(since.elapsed().as_secs_f64());
        Ok(answer.into())
    }

    /// Room for a question, and a thread.
    async fn enter(
        &self,
        bytes: usize,
        deadline: Instant,
    ) -> Result<[OwnedSemaphorePermit; 2], Refusal> {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let room = Arc::clone(&self.waiting).try_acquire_many_owned(bytes);
        let room = room.map_err(|_| Refusal::Overloaded)?;
        let thread = Arc::clone(&self.threads).acquire_owned();
        match tokio::time::timeout_at(deadline.into(), thread).await {
            Ok(Ok(thread)) => Ok([room, thread]),
            Ok(Err(_)) | Err(_) => Err(Refusal::Deadline),
        }
    }

    fn read(&self, ask: &Ask<'_>, deadline: Instant) -> Result<Blockwise, Refusal> {
        let model = self.models.get(ask.pool).ok_or(Refusal::NoTokenizer)?;
        let malformed = |error| {
            tracing::debug!(%error, pool = ask.pool, "prompt not read");
            Refusal::Malformed
        };
        let prompt = Prompt::parse(ask.surface, ask.body).map_err(malformed)?;
        let mut extent = Extent::Whole;
        let (text, special) = match prompt {
            Prompt::Text { text, special } => (text, special),
            Prompt::Chat(chat) => {
                let template = model.template.as_ref().ok_or(Refusal::NoTokenizer)?;
                let (special, has_media) = (chat.special(), chat.has_media());
                let chat = chat.into_chat(template.takes_parts());
                let mut text = template.render(&chat).map_err(|error| {
                    tracing::debug!(%error, pool = ask.pool, "prompt not rendered");
                    Refusal::Template
                })?;
                if has_media {
                    before_media(&mut text, model.tokens.encoder().cuts());
                    extent = Extent::Media;
                }
                (text, special)
            }
        };
        let encoded = model.tokens.encode(&text, Some(deadline));
        let encoded = encoded.map_err(|error| {
            tracing::debug!(%error, pool = ask.pool, "prompt not tokenized");
            Refusal::Malformed
        })?;
        self.count(&encoded);
        if !encoded.complete {
            extent = Extent::Deadline;
        }
        let estimated = estimate(&encoded, text.len(), ask.body.len(), extent);
        let ids = match (special, extent) {
            (false, _) => encoded.ids,
            (true, extent) => {
                let (before, after) = model.tokens.encoder().around();
                let mut ids = [before, &encoded.ids].concat();
                if extent == Extent::Whole {
                    ids.extend_from_slice(after);
                }
                ids
            }
        };
        let block_size = usize::try_from(ask.block_size).unwrap_or_default();
        Ok(Blockwise {
            tokens: estimated.max(ids.len()),
            extent,
            hashes: sequence_hashes(&ids, Hashing::new(block_size, Seed(ask.seed))),
        })
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
        let remembered: u64 = self.models.values().map(|m| m.tokens.bytes()).sum();
        let remembered = i64::try_from(remembered).unwrap_or(i64::MAX);
        self.metrics.text_remembered.set(remembered);
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
