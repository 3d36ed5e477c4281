//! A tokenizer, and what must be known of it to tokenize a text in parts.

use std::path::Path;

use tokenizers::{AddedToken, Tokenizer};

use super::cut::{Cut, Cuts, crosses};

/// Why a tokenizer can't be used.
#[derive(Debug, thiserror::Error)]
pub enum EncoderError {
    /// Its file.
    #[error("tokenizer {file}: {error}")]
    Load {
        /// The path.
        file: String,
        /// What is wrong.
        error: tokenizers::Error,
    },
    /// A text that it refuses.
    #[error("text of {bytes} bytes: {error}")]
    Encode {
        /// Size of the text.
        bytes: usize,
        /// What is wrong.
        error: tokenizers::Error,
    },
}

impl EncoderError {
    /// Label for metrics.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Load { .. } => "load",
            Self::Encode { .. } => "encode",
        }
    }
}

/// A tokenizer.
pub struct Encoder {
    tokenizer: Tokenizer,
    /// Ids that the tokenizer puts around a text by itself.
    around: (Vec<u32>, Vec<u32>),
    cuts: Cuts,
}

impl Encoder {
    /// A tokenizer from a `tokenizer.json`.
    ///
    /// # Errors
    /// When the file can't be read or isn't one.
    pub fn load(file: &Path) -> Result<Self, EncoderError> {
        let tokenizer = Tokenizer::from_file(file).map_err(|error| EncoderError::Load {
            file: file.display().to_string(),
            error,
        })?;
        Self::new(tokenizer)
    }

    /// An encoder around a tokenizer. Truncation and padding are taken from it: an engine refuses
    /// what is too long and pads nothing.
    ///
    /// # Errors
    /// When it can't tokenize a plain text.
    pub fn new(mut tokenizer: Tokenizer) -> Result<Self, EncoderError> {
        let refused = |error| EncoderError::Encode { bytes: 0, error };
        tokenizer.with_truncation(None).map_err(refused)?;
        tokenizer.with_padding(None);
        let mut encoder = Self {
            tokenizer,
            around: Default::default(),
            cuts: Cuts::default(),
        };
        let bare = encoder.whole(SAMPLE)?;
        let dressed = encoder.tokenizer.encode(SAMPLE, true).map_err(refused)?;
        let dressed = dressed.get_ids();
        let before = dressed.windows(bare.len().max(1)).position(|w| w == bare);
        let before = before.unwrap_or_default();
        let (first, rest) = dressed.split_at(before);
        let last = rest.get(bare.len()..).unwrap_or_default();
        encoder.around = (first.to_vec(), last.to_vec());
        encoder.cuts = encoder.find_cuts()?;
        Ok(encoder)
    }

    /// Where texts may be cut to be tokenized in parts.
    #[must_use]
    pub fn cuts(&self) -> &Cuts {
        &self.cuts
    }

    /// Ids that go before and after a text to which special tokens are to be added.
    #[must_use]
    pub fn around(&self) -> (&[u32], &[u32]) {
        (&self.around.0, &self.around.1)
    }

    /// Ids of a text, without any that stand around it.
    ///
    /// # Errors
    /// When the tokenizer refuses the text.
    pub fn whole(&self, text: &str) -> Result<Vec<u32>, EncoderError> {
        let encoding = self.tokenizer.encode_fast(text, false);
        let encoding = encoding.map_err(|error| EncoderError::Encode {
            bytes: text.len(),
            error,
        })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Ids of the part of a text from one cut to another; from its beginning without a first cut.
    ///
    /// # Errors
    /// When the tokenizer refuses the text.
    pub fn part(&self, text: &str, from: Option<Cut>, to: usize) -> Result<Vec<u32>, EncoderError> {
        let Some(from) = from else {
            return self.whole(text.get(..to).unwrap_or(text));
        };
        let mut ids = self.whole(text.get(from.word..to).unwrap_or_default())?;
        if from.word < from.at {
            // Its ids are the same with nothing after it: there is a border.
            let word = self.whole(text.get(from.word..from.at).unwrap_or_default())?;
            ids.drain(..word.len().min(ids.len()));
        }
        Ok(ids)
    }

    /// The cuts at which a sample comes out the same in parts.
    fn find_cuts(&self) -> Result<Cuts, EncoderError> {
        let added = self.tokenizer.get_added_tokens_decoder();
        let all: Vec<String> = added.values().map(|token| token.content.clone()).collect();
        // Taken out of texts before anything is done to them, and with nothing around them.
        let is_plain = |token: &&AddedToken| {
            token.special && !token.lstrip && !token.single_word && !token.normalized
        };
        let plain = added.values().filter(is_plain);
        let mut specials: Vec<String> = plain.map(|token| token.content.clone()).collect();
        specials.sort_unstable();
        let mut vocabulary = self.tokenizer.get_vocab(true).into_keys();
        let words = !vocabulary.any(|token| crosses(&token));
        for (words, specials) in [
            (words, specials.clone()),
            (words, Vec::new()),
            (false, specials),
        ] {
            let cuts = Cuts::new(words, specials, &all);
            if cuts.any() && self.stands(&cuts, &all)? {
                return Ok(cuts);
            }
        }
        Ok(Cuts::default())
    }

    /// Whether a sample comes out the same in parts.
    fn stands(&self, cuts: &Cuts, tokens: &[String]) -> Result<bool, EncoderError> {
        let mut text = String::from(SAMPLE);
        for token in tokens.iter().take(64) {
            text.extend([token, "one two three", SAMPLE, token]);
        }
        let mut parts = Vec::new();
        let mut from = None;
        for cut in cuts.of(&text, 16) {
            parts.extend(self.part(&text, from, cut.at)?);
            from = Some(cut);
        }
        parts.extend(self.part(&text, from, text.len())?);
        Ok(parts == self.whole(&text)?)
    }
}

/// Words, numbers, code and several scripts.
const SAMPLE: &str = "The quick brown fox can't jump over 12345 lazy dogs. \
    Is it so?  Two  spaces and\ttabs\n\n    for i in range(10):\n        print(i * 2)  # a comment here\n\
    na\u{ef}ve caf\u{e9} \u{4f60}\u{597d} \u{4e16}\u{754c} \u{43f}\u{440}\u{438}\u{432}\u{435}\u{442} \u{43c}\u{438}\u{440} \
    \u{1f600} emoji and then some more words at the end\n";
