//! Tokenizers of other formats than `tokenizer.json`, as Hugging Face's `transformers` converts
//! them. What would come out otherwise than there is refused.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use tokenizers::Tokenizer;
use tokenizers::processors::template::TemplateProcessing;

use super::named::Named;
use super::{sentencepiece, tiktoken};

/// Why a tokenizer can't be converted.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// A line of a tiktoken file.
    #[error("line {0} is not the base64 of a token and its rank")]
    Line(usize),
    /// A rank that is there twice, or leaves a gap before it.
    #[error("rank {0} is there twice or follows a gap")]
    Rank(u32),
    /// A token that is there twice.
    #[error("token {0:?} is there twice")]
    Twice(String),
    /// A byte without a token.
    #[error("no token for byte 0x{0:02x}")]
    Byte(u8),
    /// A tokenizer of which it isn't known how it takes texts apart.
    #[error(
        "not known how tokenizer_class {class:?} of model_type {model_type:?} takes texts apart"
    )]
    Family {
        /// `tokenizer_class` of `tokenizer_config.json`, or nothing.
        class: String,
        /// `model_type` of `config.json`, or nothing.
        model_type: String,
    },
    /// A setting that has to be there.
    #[error("tokenizer_config.json lacks {0}")]
    Lacks(&'static str),
    /// A token whose id belongs to another, or that has another.
    #[error("token {token:?} can't have id {id}: another has it, or it has another")]
    Taken {
        /// Its text.
        token: String,
        /// Its id.
        id: u32,
    },
    /// The id of a special token that is far beyond all others.
    #[error("special token with id {0}, far beyond the ranks")]
    Far(u32),
    /// A special token without id.
    #[error("special token {0:?} has no id")]
    Unnumbered(String),
    /// A SentencePiece model that isn't one.
    #[error("not a SentencePiece model: {0}")]
    Proto(#[from] prost::DecodeError),
    /// Something about a SentencePiece model that converts to nothing.
    #[error("{class} can't be converted with {what}")]
    Unsupported {
        /// The tokenizer's class.
        class: &'static str,
        /// What of the model.
        what: String,
    },
    /// What comes out is no tokenizer.
    #[error(transparent)]
    Build(#[from] tokenizers::Error),
}

/// What is needed of `config.json`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Config {
    pub(super) model_type: Option<String>,
}

/// The file that tells a folder's tokenizer: the first there is of `tokenizer.json`,
/// `tiktoken.model`, the only `*.tiktoken`, and `tokenizer.model`. Without any it is
/// `tokenizer.json` that is missing.
#[must_use]
pub fn tokenizer_file(folder: &Path) -> PathBuf {
    let json = folder.join("tokenizer.json");
    let models = ["tiktoken.model", "tokenizer.model"].map(|name| folder.join(name));
    let [tiktoken, model] = models;
    let found = [json.clone(), tiktoken]
        .into_iter()
        .find(|file| file.exists());
    found
        .or_else(|| only_tiktoken(folder))
        .or_else(|| model.exists().then_some(model))
        .unwrap_or(json)
}

fn only_tiktoken(folder: &Path) -> Option<PathBuf> {
    let files = std::fs::read_dir(folder).ok()?.flatten();
    let mut files = files
        .map(|entry| entry.path())
        .filter(|file| file.extension().is_some_and(|end| end == "tiktoken"));
    let file = files.next()?;
    files.next().is_none().then_some(file)
}

/// The tokenizer of a file that is no `tokenizer.json`.
///
/// # Errors
/// When the file is broken, or what comes out might differ from what an engine makes of it.
pub(super) fn convert(
    file: &Path,
    bytes: &[u8],
    named: &Named,
    config: &Config,
) -> Result<Tokenizer, ConvertError> {
    // A SentencePiece model begins with the tag of its first piece, a line feed. No base64 does.
    if bytes.first() == Some(&b'\n') {
        return sentencepiece::tokenizer(bytes, named);
    }
    let name = file.file_stem().and_then(|name| name.to_str());
    let family = tiktoken::Family::new(named, config, name.unwrap_or_default())?;
    tiktoken::tokenizer(bytes, family, named)
}

/// Puts tokens before and after each text to which special tokens are to be added.
pub(super) fn put_around(
    tokenizer: &mut Tokenizer,
    before: Option<&str>,
    after: Option<&str>,
) -> Result<(), ConvertError> {
    let single: Vec<&str> = before.into_iter().chain(["$A"]).chain(after).collect();
    let id = |token: &str| {
        let id = tokenizer.token_to_id(token);
        let id = id.ok_or_else(|| ConvertError::Unnumbered(token.to_owned()))?;
        Ok((token.to_owned(), id))
    };
    let tokens = before.into_iter().chain(after).map(id);
    let tokens = tokens.collect::<Result<Vec<_>, ConvertError>>()?;
    let template = TemplateProcessing::builder()
        .try_single(single)
        .map_err(tokenizers::Error::from)?
        .special_tokens(tokens)
        .build()
        .map_err(|error| tokenizers::Error::from(error.to_string()))?;
    tokenizer.with_post_processor(Some(template));
    Ok(())
}
