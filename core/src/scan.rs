//! Reads what routing needs from a JSON request body, as the body arrives.
//!
//! No tree is built: the token ids, a few scalars and the place of every top-level value are kept,
//! everything else is skipped. Keys may come in any order, spacing and escaping; of a key that
//! comes more than once the last value counts. Chunks may end anywhere.
//!
//! # What is validated
//!
//! In full, as RFC 8259 has it: the top-level object, its keys, numbers and literals, `model` and
//! `cache_salt` up to [`MAX_STRING`], an array of token ids. Of every other string only the end is
//! looked for; of every other array or object only the strings and the brackets, by number and not
//! by kind. Keys and strings beyond the lengths that are kept may hold broken UTF-8.
//!
//! So a body that a full parser accepts is read here exactly as that parser reads it, if it nests
//! at most [`MAX_DEPTH`] deep. Of the bodies that a full parser refuses, some are accepted here.

mod ids;
mod lanes;
mod member;
mod run;
mod scalar;
mod scanner;
mod skip;
mod text;

pub use member::{MAX_KEY, MAX_MEMBERS, Members};
pub use scanner::Scanner;

use crate::hash::{Hashing, sequence_hashes};

/// Levels of arrays and objects below the top-level object that are followed.
pub const MAX_DEPTH: usize = 512;

/// Bytes of a decoded `model` or `cache_salt`.
pub const MAX_STRING: usize = 1024;

/// What a body said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scan {
    /// `prompt`, or what the scanner was told to read as such.
    pub prompt: Prompt,
    /// `model`.
    pub model: Field<String>,
    /// `cache_salt`.
    pub cache_salt: Field<String>,
    /// `stream`.
    pub stream: Field<bool>,
    /// `max_tokens`.
    pub max_tokens: Field<u64>,
    /// The place of every top-level value.
    pub members: Members,
}

/// A top-level scalar.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Field<T> {
    /// The key is missing or its value `null`.
    #[default]
    Absent,
    /// The value.
    Value(T),
    /// A string of more than [`MAX_STRING`] bytes.
    TooLong,
    /// A value of another type or out of range.
    Other,
}

impl<T> Field<T> {
    /// The value, where there is one.
    #[must_use]
    pub fn value(&self) -> Option<&T> {
        match self {
            Self::Value(value) => Some(value),
            Self::Absent | Self::TooLong | Self::Other => None,
        }
    }
}

/// The prompt of a body.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Prompt {
    /// No `prompt`, or `null`.
    #[default]
    Absent,
    /// An array of integers from 0 to [`u32::MAX`], or an array holding exactly one such array.
    Tokens(Tokens),
    /// An array of more ids than the scanner keeps.
    TooManyTokens,
    /// A string, or an array that begins with one.
    Text,
    /// Anything else: several prompts, or no prompt at all.
    Unsupported,
}

/// Token ids and, once asked for, their sequence hashes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tokens {
    ids: Vec<u32>,
    /// What `hashes` were computed with.
    hashing: Option<Hashing>,
    hashes: Vec<u64>,
}

impl Tokens {
    /// The ids.
    #[must_use]
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// The ids, without their hashes.
    #[must_use]
    pub fn into_ids(self) -> Vec<u32> {
        self.ids
    }

    /// Sequence hashes of every complete block. Hashes that an earlier call computed with an equal
    /// `hashing` are kept.
    pub fn hashes(&mut self, hashing: Hashing) -> &[u64] {
        if self.hashing == Some(hashing) {
            hashing.extend(&self.ids, &mut self.hashes);
        } else {
            self.hashing = Some(hashing);
            self.hashes = sequence_hashes(&self.ids, hashing);
        }
        &self.hashes
    }
}

/// Why a body could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScanError {
    /// The body does not begin with `{`.
    #[error("body is not a JSON object")]
    NotAnObject,
    /// The body ended inside the object.
    #[error("body ends before its JSON object does")]
    Truncated,
    /// The body is not JSON.
    #[error("body is not JSON at byte {offset}")]
    Syntax {
        /// Offset in the body of the byte that can't stand there.
        offset: usize,
    },
    /// The body nests deeper than [`MAX_DEPTH`].
    #[error("body nests more than {MAX_DEPTH} levels deep at byte {offset}")]
    TooDeep {
        /// Offset in the body of the bracket that opens one level too many.
        offset: usize,
    },
}

impl ScanError {
    /// Metric label.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::NotAnObject => "not_an_object",
            Self::Truncated => "truncated",
            Self::Syntax { .. } => "syntax",
            Self::TooDeep { .. } => "too_deep",
        }
    }
}

/// How far the reader of a value came in a chunk.
#[derive(Clone, Copy)]
enum Step {
    /// To the chunk's end; the value goes on.
    More,
    /// To the value's end. Holds the index of the first byte after it.
    Done(usize),
}

/// Why a reader stopped, with the index in the chunk.
#[derive(Clone, Copy)]
enum Fault {
    Syntax(usize),
    TooDeep(usize),
}

#[cfg(all(test, not(target_arch = "wasm32")))]
mod tests;
