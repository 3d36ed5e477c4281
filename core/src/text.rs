//! Prompts that are text: what the filter asks the sidecar about them, and its answers.
//!
//! The call is `kv.router.v1.Text/Read` on the socket of the bridge, each message put through
//! [`crate::wire::encode`]. Answers carry the hashes of blocks, and token ids only where they are
//! asked for.
//!
//! `kv.router.v1.Text/Stream` is the same for many questions: each message up is a question behind a
//! number ([`numbered`]), each message down its answer behind the same number, in any order.
//!
//! What later releases added stands behind what the first one reads: [`Wanted`] behind [`Ask`],
//! [`Further`] behind [`Answer`].

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::family::Scheme;
use crate::holdings::Named;
use crate::surface::Surface;
use crate::wire::{self, WireError};

/// gRPC service of the call.
pub const SERVICE: &str = "kv.router.v1.Text";
/// gRPC method of the call.
pub const METHOD: &str = "Read";
/// gRPC method of the stream.
pub const STREAM: &str = "Stream";
/// Bytes of the number before a message of the stream.
const NUMBER: usize = 8;
/// Longest body that is asked about, in bytes.
pub const LONGEST_BODY: usize = 4 << 20;
/// Bytes of a question besides its body, most often.
const ROOM: usize = 256;
/// Longest budget, in milliseconds.
pub const LONGEST_MS: u64 = 10_000;
/// Bytes of a thousand words.
const THOUSAND_WORDS: u64 = 6_000;

/// How long reading a text may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Budget {
    /// For any text, in milliseconds.
    pub base_ms: u32,
    /// Besides, for every thousand words, in milliseconds. A word is taken for six bytes.
    pub per_thousand_words_ms: u32,
}

impl Budget {
    /// Microseconds for a body of this size.
    #[must_use]
    pub fn of(self, bytes: usize) -> u64 {
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        let more = u64::from(self.per_thousand_words_ms).saturating_mul(bytes);
        let us = more.saturating_mul(1_000) / THOUSAND_WORDS;
        let base = 1_000 * u64::from(self.base_ms);
        base.saturating_add(us).min(1_000 * LONGEST_MS)
    }
}

/// A question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask<'a> {
    /// Name of the pool, whose tokenizer counts.
    pub pool: &'a str,
    /// Where in the body the text stands.
    pub surface: Surface,
    /// Tokens to a block.
    pub block_size: u32,
    /// [`crate::hash::Seed`] of the blocks.
    pub seed: u64,
    /// After how many microseconds nobody waits for the answer any more.
    pub budget_us: u64,
    /// The body, as it came.
    #[serde(borrow, serialize_with = "wire::at_once")]
    pub body: &'a [u8],
}

/// What is to be answered besides Dynamo's hashes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted<'a> {
    /// Families in which the pool looks blocks up.
    pub families: Cow<'a, [Scheme]>,
    /// LoRA adapter, empty for none.
    pub lora: &'a str,
    /// Cache salt, empty for none.
    pub salt: &'a str,
    /// Whether the token ids are to be handed over to the engine.
    pub ids: bool,
}

impl<'a> Ask<'a> {
    /// The question put through [`wire::encode`].
    #[must_use]
    pub fn encode(&self, wanted: &Wanted<'_>) -> Vec<u8> {
        wire::encode(&(self, wanted))
    }

    /// The same as message of a stream, behind its number.
    #[must_use]
    pub fn encode_numbered(&self, number: u64, wanted: &Wanted<'_>) -> Vec<u8> {
        let mut message = Vec::with_capacity(self.body.len() + ROOM);
        message.extend_from_slice(&number.to_le_bytes());
        wire::encode_behind(message, &(self, wanted))
    }

    /// The inverse of [`Ask::encode`]; an earlier filter wants nothing further.
    ///
    /// # Errors
    /// When the bytes are none.
    pub fn decode(bytes: &'a [u8]) -> Result<(Self, Wanted<'a>), WireError> {
        wire::decode(bytes).or_else(|_| Ok((wire::decode(bytes)?, Wanted::default())))
    }
}

/// Number and message of a message of the stream; `None` if it is too short for a number.
#[must_use]
pub fn numbered(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let (number, message) = bytes.split_first_chunk::<NUMBER>()?;
    Some((u64::from_le_bytes(*number), message))
}

/// What an answer has besides Dynamo's hashes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Further<'a> {
    /// The blocks in the families that were asked for.
    pub families: Vec<Named>,
    /// The token ids as a JSON array, where they were asked for and are those of the whole prompt.
    #[serde(borrow, serialize_with = "wire::at_once")]
    pub ids: &'a [u8],
}

impl<'a> Answer<'a> {
    /// The answer put through [`wire::encode`].
    #[must_use]
    pub fn encode(&self, further: &Further<'_>) -> Vec<u8> {
        wire::encode(&(self, further))
    }

    /// The inverse of [`Answer::encode`]; an earlier sidecar has nothing further.
    ///
    /// # Errors
    /// When the bytes are none.
    pub fn decode(bytes: &'a [u8]) -> Result<(Self, Further<'a>), WireError> {
        wire::decode(bytes).or_else(|_| Ok((wire::decode(bytes)?, Further::default())))
    }
}

/// An answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer<'a> {
    /// The prompt has been read.
    #[serde(borrow)]
    Read(Blocks<'a>),
    /// It has not.
    Refused(Refusal),
}

/// The blocks of a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocks<'a> {
    /// Tokens of the prompt; an estimate unless all of it was read.
    pub tokens: u32,
    /// How far it was read.
    pub extent: Extent,
    /// Sequence hashes of the blocks that were read, little-endian, 8 bytes each.
    #[serde(borrow, serialize_with = "wire::at_once")]
    pub hashes: &'a [u8],
}

impl Blocks<'_> {
    /// The sequence hashes; a part of one at the end counts for nothing.
    #[must_use]
    pub fn hashes(&self) -> Vec<u64> {
        let (hashes, _) = self.hashes.as_chunks();
        hashes
            .iter()
            .map(|hash| u64::from_le_bytes(*hash))
            .collect()
    }
}

/// How far a prompt was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Extent {
    /// To its end.
    Whole,
    /// As far as time sufficed.
    Deadline,
    /// To the first image, sound or film.
    Media,
}

impl Extent {
    /// Metric label.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Whole => "whole",
            Self::Deadline => "beginning",
            Self::Media => "before_media",
        }
    }
}

/// Why a prompt has not been read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Refusal {
    /// The pool has no tokenizer, or no chat template.
    NoTokenizer,
    /// The chat template refuses the conversation, or takes too long.
    Template,
    /// The body makes no sense, or asks for something that only the engine knows.
    Malformed,
    /// Too much is asked at a time.
    Overloaded,
    /// There was no time even to begin.
    Deadline,
    /// The engine that is asked does not answer.
    Engine,
}

impl Refusal {
    /// Metric label.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::NoTokenizer => "no_tokenizer",
            Self::Template => "template",
            Self::Malformed => "malformed",
            Self::Overloaded => "overloaded",
            Self::Deadline => "deadline",
            Self::Engine => "engine",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::Family;

    #[test]
    fn questions_and_answers_survive_encoding() {
        let ask = Ask {
            pool: "default",
            surface: Surface::Chat,
            block_size: 16,
            seed: u64::MAX,
            budget_us: 20_000,
            body: b"{}",
        };
        let schemes = [Scheme {
            family: Family::LmCache,
            block_size: 256,
            hash_seed: String::new(),
        }];
        let wanted = Wanted {
            families: Cow::Borrowed(&schemes),
            lora: "sql",
            salt: "s",
            ids: true,
        };
        let bytes = ask.encode(&wanted);
        let message = ask.encode_numbered(u64::MAX - 1, &wanted);
        assert_eq!(Ask::decode(&bytes), Ok((ask, wanted)));
        assert_eq!(numbered(&message), Some((u64::MAX - 1, &bytes[..])));
        assert_eq!(numbered(&message[..7]), None);
        // As an earlier release reads it, and writes it.
        assert_eq!(wire::decode(&bytes), Ok(ask));
        let bytes = wire::encode(&ask);
        assert_eq!(Ask::decode(&bytes), Ok((ask, Wanted::default())));
        let answer = Answer::Read(Blocks {
            tokens: 40,
            extent: Extent::Deadline,
            hashes: &[1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 1, 9],
        });
        let further = Further {
            families: vec![Named {
                family: Family::LmCache,
                blocks: 16,
                hashes: vec![u64::MAX, 3],
            }],
            ids: b"[1,2]",
        };
        let bytes = answer.encode(&further);
        assert_eq!(Answer::decode(&bytes), Ok((answer, further)));
        let bytes = wire::encode(&answer);
        assert_eq!(Answer::decode(&bytes), Ok((answer, Further::default())));
        let Ok(Answer::Read(blocks)) = wire::decode(&bytes) else {
            panic!("{bytes:?}")
        };
        assert_eq!(blocks.hashes(), [1, 2 + (1 << 56)]);
    }

    #[test]
    fn a_budget_grows_with_the_text_and_is_bounded() {
        let budget = Budget {
            base_ms: 20,
            per_thousand_words_ms: 2,
        };
        assert_eq!(budget.of(0), 20_000);
        assert_eq!(budget.of(24_000), 28_000);
        assert_eq!(budget.of(usize::MAX), 10_000_000);
    }
}
