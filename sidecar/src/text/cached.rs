//! Tokenizing only what has not been tokenized before.

use std::sync::Arc;
use std::time::Instant;

use quick_cache::sync::Cache;
use quick_cache::{DefaultHashBuilder, Lifecycle, Weighter};
use xxhash_rust::xxh3::Xxh3;

use super::cut::{Cut, WINDOW};
use super::encoder::{Encoder, EncoderError};

/// Bytes that an entry costs besides its ids.
const ENTRY_BYTES: u64 = 96;
/// How many times closer than elsewhere cuts lie near the end of what is known. The next turn of a
/// conversation has to tokenize what follows the last cut once more.
const CLOSER: usize = 8;

/// Ids of one chunk of text.
pub(super) type Ids = Arc<[u32]>;

/// A tokenizer that remembers.
///
/// Chunks are remembered by a hash of the whole text up to their end, so a hit vouches for
/// everything before it.
pub struct Cached {
    encoder: Encoder,
    chunks: Cache<u128, Ids, Weight, DefaultHashBuilder, Evictions>,
    evictions: Evictions,
    /// Secret: prompts can't be made to meet in one hash.
    seed: u64,
    window: usize,
}

/// Ids of a text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// The ids, of the text's beginning if it isn't complete.
    pub ids: Vec<u32>,
    /// Whether they are those of the whole text.
    pub complete: bool,
    /// How many of them were remembered.
    pub remembered: usize,
}

impl Cached {
    /// The same tokenizer, with cuts at another distance than [`WINDOW`].
    #[must_use]
    pub fn with_window(mut self, window: usize) -> Self {
        self.window = window;
        self
    }

    /// A tokenizer that remembers as many ids as fit into `bytes`.
    #[must_use]
    pub fn new(encoder: Encoder, bytes: u64, seed: u64) -> Self {
        let evictions = Evictions::default();
        let items = usize::try_from(bytes / WINDOW as u64).unwrap_or(usize::MAX);
        let hasher = DefaultHashBuilder::default();
        Self {
            encoder,
            chunks: Cache::with(items.max(16), bytes, Weight, hasher, evictions.clone()),
            evictions,
            seed,
            window: WINDOW,
        }
    }

    /// The tokenizer.
    #[must_use]
    pub fn encoder(&self) -> &Encoder {
        &self.encoder
    }

    /// Bytes that are remembered.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.chunks.weight()
    }

    /// Chunks that were forgotten for lack of room.
    #[must_use]
    pub fn evicted(&self) -> u64 {
        self.evictions.0.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// Ids of a text, without any that stand around it. After the deadline no further chunk is
    /// tokenized.
    ///
    /// # Errors
    /// When the tokenizer refuses the text.
    pub fn encode(&self, text: &str, deadline: Option<Instant>) -> Result<Encoded, EncoderError> {
        let is_late = || deadline.is_some_and(|deadline| Instant::now() >= deadline);
        self.walk(text, |_| !is_late())
    }

    /// Ids of a text of which at most so many bytes are not remembered; else of its beginning.
    ///
    /// # Errors
    /// When the tokenizer refuses the text.
    pub fn encode_little(&self, text: &str, most: usize) -> Result<Encoded, EncoderError> {
        self.walk(text, |rest| rest <= most)
    }

    /// Ids of a text up to the first unknown chunk that may not be tokenized, given the bytes from
    /// there on.
    fn walk(&self, text: &str, may: impl Fn(usize) -> bool) -> Result<Encoded, EncoderError> {
        let mut encoded = Encoded::default();
        if !self.encoder.cuts().any() {
            if may(text.len()) {
                encoded.ids = self.encoder.whole(text)?;
                encoded.complete = true;
            }
            return Ok(encoded);
        }
        let mut hasher = Xxh3::with_seed(self.seed);
        let mut start = 0;
        let mut from: Option<Cut> = None;
        let mut is_known = true;
        let cuts = self.encoder.cuts().of(text, self.window);
        let ends = cuts.map(Some).chain([None]);
        for cut in ends {
            let end = cut.map_or(text.len(), |cut| cut.at);
            let before = hasher.clone();
            hasher.update(text.as_bytes().get(start..end).unwrap_or_default());
            let key = hasher.digest128();
            // Past the first unknown chunk the others are not worth asking for.
            let was_known = is_known;
            let known = is_known.then(|| self.chunks.get(&key)).flatten();
            is_known = known.is_some();
            if let Some(ids) = known {
                encoded.take(&ids);
            } else if was_known || cut.is_none() {
                let first = encoded.ids.len();
                if !self.walk_closely(text, (from, start, end), before, &may, &mut encoded)? {
                    return Ok(encoded);
                }
                let ids = encoded.ids.get(first..).unwrap_or_default();
                self.chunks.insert(key, ids.into());
            } else {
                if !may(text.len() - start) {
                    return Ok(encoded);
                }
                let ids = self.encoder.part(text, from, end)?;
                encoded.ids.extend_from_slice(&ids);
                self.chunks.insert(key, ids.into());
            }
            start = end;
            from = cut;
        }
        encoded.complete = true;
        Ok(encoded)
    }

    /// Adds the ids of a chunk, in parts of which the first may be known. `hasher` has seen the text
    /// before it. `false` at an unknown part that may not be tokenized.
    fn walk_closely(
        &self,
        text: &str,
        (mut from, mut start, last): (Option<Cut>, usize, usize),
        mut hasher: Xxh3,
        may: &impl Fn(usize) -> bool,
        encoded: &mut Encoded,
    ) -> Result<bool, EncoderError> {
        let chunk = text.get(..last).unwrap_or(text);
        let window = self.window.div_ceil(CLOSER);
        let cuts = self.encoder.cuts().after(chunk, start, window);
        for cut in cuts.map(Some).chain([None]) {
            let end = cut.map_or(last, |cut| cut.at);
            hasher.update(text.as_bytes().get(start..end).unwrap_or_default());
            // A chunk may end there that begins elsewhere.
            let mut keyed = hasher.clone();
            keyed.update(&start.to_le_bytes());
            let key = keyed.digest128();
            if let Some(ids) = self.chunks.get(&key) {
                encoded.take(&ids);
            } else if may(text.len() - start) {
                let ids = self.encoder.part(text, from, end)?;
                encoded.ids.extend_from_slice(&ids);
                // What ends with the text is remembered with the chunk.
                if cut.is_some() {
                    self.chunks.insert(key, ids.into());
                }
            } else {
                return Ok(false);
            }
            start = end;
            from = cut;
        }
        Ok(true)
    }
}

impl Encoded {
    /// Adds ids that were remembered.
    fn take(&mut self, ids: &[u32]) {
        self.ids.extend_from_slice(ids);
        self.remembered += ids.len();
    }
}

/// Weighs an entry in bytes.
#[derive(Clone)]
pub(super) struct Weight;

impl Weighter<u128, Ids> for Weight {
    fn weight(&self, _: &u128, ids: &Ids) -> u64 {
        ENTRY_BYTES + 4 * ids.len() as u64
    }
}

/// Counts what is forgotten.
#[derive(Clone, Default)]
struct Evictions(Arc<std::sync::atomic::AtomicU64>);

impl Lifecycle<u128, Ids> for Evictions {
    type RequestState = ();

    fn begin_request(&self) {}

    fn on_evict(&self, (): &mut (), _: u128, _: Ids) {
        self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::{Duration, Instant};

    use tokenizers::models::TrainerWrapper;
    use tokenizers::models::bpe::{BPE, BpeTrainer};
    use tokenizers::normalizers::unicode::NFC;
    use tokenizers::normalizers::{Prepend, Replace, Sequence};
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    use tokenizers::{AddedToken, NormalizerWrapper, Tokenizer};

    use super::*;

    const TEXT: &str = "The router sends each request to the worker that holds its prefix. \
        A block of sixteen tokens is hashed; 12 blocks are 192 tokens!\n\n  def f(x):\n\treturn x  + 1\n\
        caf\u{e9} \u{4f60}\u{597d} \u{1f600} <|end|><|user|>What's the time now please tell me\r\n";

    fn trained(mut tokenizer: Tokenizer) -> Tokenizer {
        let end = |content: &str| AddedToken::from(content, true);
        let mut trainer = TrainerWrapper::BpeTrainer(
            BpeTrainer::builder()
                .vocab_size(600)
                .show_progress(false)
                .build(),
        );
        tokenizer
            .train(&mut trainer, [TEXT, "tell me what time it is"].into_iter())
            .unwrap();
        tokenizer
            .add_special_tokens([end("<|end|>"), end("<|user|>")])
            .unwrap();
        tokenizer
    }

    /// As GPT-2 and its followers have it.
    pub(in crate::text) fn byte_level() -> Tokenizer {
        let mut tokenizer = Tokenizer::new(BPE::default());
        tokenizer.with_normalizer(Some(NFC)).unwrap();
        tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
        tokenizer.with_post_processor(Some(ByteLevel::default()));
        trained(tokenizer)
    }

    /// As Llama 2 has it: no pre-tokenizer, spaces are letters, one is put before every text.
    fn sentence_piece() -> Tokenizer {
        let mut tokenizer = Tokenizer::new(BPE::default());
        let spaces = Replace::new(" ", "\u{2581}").unwrap();
        let steps: Vec<NormalizerWrapper> =
            vec![Prepend::new("\u{2581}".into()).into(), spaces.into()];
        tokenizer
            .with_normalizer(Some(Sequence::new(steps)))
            .unwrap();
        trained(tokenizer)
    }

    fn cached(tokenizer: Tokenizer, bytes: u64) -> Cached {
        Cached::new(Encoder::new(tokenizer).unwrap(), bytes, 7).with_window(24)
    }

    #[test]
    fn parts_have_the_ids_of_the_whole() {
        let cached = cached(byte_level(), 1 << 20);
        assert!(cached.encoder().cuts().any());
        let mut text = String::new();
        for turn in 0..40 {
            let before = cached.encode(&text, None).unwrap().ids.len();
            text.push_str(&TEXT[(turn * 13) % 60..]);
            let encoded = cached.encode(&text, None).unwrap();
            assert!(encoded.complete);
            assert_eq!(encoded.ids, cached.encoder().whole(&text).unwrap());
            assert!(
                encoded.remembered + 80 > before,
                "{} of {before}",
                encoded.remembered
            );
        }
    }

    #[test]
    fn the_end_of_a_text_is_remembered_in_small_parts() {
        let encoder = Encoder::new(byte_level()).unwrap();
        let cached = Cached::new(encoder, 1 << 20, 7);
        let text = TEXT.repeat(4);
        assert!(text.len() < WINDOW);
        cached.encode(&text, None).unwrap();
        let next = format!("{text} and then one more question?");
        let encoded = cached.encode_little(&next, WINDOW / 4).unwrap();
        assert!(encoded.complete);
        assert_eq!(encoded.ids, cached.encoder().whole(&next).unwrap());
        assert!(encoded.remembered > encoded.ids.len() / 2, "{encoded:?}");
    }

    #[test]
    fn a_vocabulary_with_tokens_across_words_is_not_cut() {
        // Without a pre-tokenizer a trainer learns such tokens from so small a text.
        let cached = cached(sentence_piece(), 1 << 20);
        let text = TEXT.replace("<|", "").repeat(40);
        let encoded = cached.encode(&text, None).unwrap();
        assert_eq!(encoded.ids, cached.encoder().whole(&text).unwrap());
        assert!(encoded.complete);
        let again = cached.encode(&text, None).unwrap();
        // All of it is one part.
        assert_eq!(again.remembered, encoded.ids.len());
        assert_eq!(cached.encoder().cuts().of(&text, 1).count(), 0);
    }

    #[test]
    fn what_is_remembered_stays_in_its_bounds() {
        let cached = cached(byte_level(), 8 << 10);
        for n in 0..200 {
            cached.encode(&format!("{n} {TEXT}"), None).unwrap();
        }
        assert!(cached.evicted() > 0);
        assert!(cached.bytes() <= 8 << 10, "{}", cached.bytes());
    }

    #[test]
    fn after_the_deadline_the_beginning_is_answered() {
        let cached = cached(byte_level(), 1 << 20);
        let whole = cached.encoder().whole(TEXT).unwrap();
        let passed = Instant::now().checked_sub(Duration::from_secs(1));
        let none = cached.encode(TEXT, passed).unwrap();
        assert_eq!((none.ids.len(), none.complete), (0, false));
        let none = cached.encode_little(TEXT, TEXT.len() - 1).unwrap();
        assert_eq!((none.ids.len(), none.complete), (0, false));
        cached.encode(&TEXT[..150], None).unwrap();
        let little = cached.encode_little(TEXT, TEXT.len() - 1).unwrap();
        assert_eq!((little.ids, little.complete), (whole.clone(), true));
        let cached = Cached::new(cached.encoder, 1 << 20, 8).with_window(24);
        cached.encode(&TEXT[..150], None).unwrap();
        let some = cached.encode(TEXT, passed).unwrap();
        assert!(!some.complete && !some.ids.is_empty());
        assert_eq!(some.ids, whole[..some.ids.len()]);
    }
}
