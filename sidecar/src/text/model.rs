//! A model's folder, as Hugging Face lays it out.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use tokenizers::Tokenizer;

use super::cached::Cached;
use super::convert::{ConvertError, convert, tokenizer_file};
use super::encoder::{Encoder, EncoderError};
use super::named::Token;
use super::template::{Source, Template, TemplateError};
use super::vision::Vision;

/// Why a model's folder can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file that can't be read.
    #[error("{}: {error}", file.display())]
    File {
        /// Its path.
        file: PathBuf,
        /// What the system says.
        error: std::io::Error,
    },
    /// A file that isn't what its name says.
    #[error("{}: {error}", file.display())]
    Malformed {
        /// Its path.
        file: PathBuf,
        /// What is wrong.
        error: serde_json::Error,
    },
    /// A tokenizer that is no `tokenizer.json` and can't be made one.
    #[error("{}: {error}", file.display())]
    Convert {
        /// Its path.
        file: PathBuf,
        /// What is wrong.
        error: ConvertError,
    },
    /// The tokenizer.
    #[error(transparent)]
    Encoder(#[from] EncoderError),
    /// A chat template.
    #[error(transparent)]
    Template(#[from] TemplateError),
}

/// Tokenizer and chat template of a model.
pub struct Model {
    /// The tokenizer.
    pub tokens: Cached,
    /// The chat template; chats of a model without one can't be tokenized.
    pub template: Option<Template>,
    /// How it sees images, where that is known.
    pub vision: Option<Vision>,
}

/// What is needed of `tokenizer_config.json`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Settings {
    chat_template: Option<Source>,
    bos_token: Option<Token>,
    eos_token: Option<Token>,
    unk_token: Option<Token>,
    sep_token: Option<Token>,
    pad_token: Option<Token>,
    cls_token: Option<Token>,
    mask_token: Option<Token>,
}

impl Model {
    /// The model of a folder. Its tokenizer remembers as many ids as fit into `bytes`; `seed` is a
    /// secret.
    ///
    /// # Errors
    /// When a file is missing or broken.
    pub fn load(folder: &Path, bytes: u64, seed: u64) -> Result<Self, ModelError> {
        let encoder = match tokenizer_file(folder) {
            file if file.extension().is_some_and(|end| end == "json") => Encoder::load(&file)?,
            file => Encoder::new(converted(&file, folder)?)?,
        };
        let mut settings: Settings =
            json(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
        // Files of their own win over the template among the settings, as in `transformers`.
        let file = folder.join("chat_template.jinja");
        let source = match text(&file)? {
            Some(template) => Some(Source::One(template)),
            None => settings.chat_template.take(),
        };
        let specials = settings.specials();
        let template = source
            .map(|source| Template::new(source, specials))
            .transpose()?;
        Ok(Self {
            tokens: Cached::new(encoder, bytes, seed),
            template,
            vision: None,
        })
    }
}

impl Model {
    /// The same model, which sees images if the folder tells how. `token` is its placeholder.
    ///
    /// # Errors
    /// When a file is broken.
    pub fn with_vision(self, folder: &Path, token: u32) -> Result<Self, ModelError> {
        let vision = Vision::load(folder, token)?;
        Ok(Self { vision, ..self })
    }

    /// The same model, its texts cut at another distance than usual.
    #[must_use]
    pub fn with_window(self, window: usize) -> Self {
        Self {
            tokens: self.tokens.with_window(window),
            ..self
        }
    }
}

impl Settings {
    fn specials(self) -> BTreeMap<String, String> {
        let named = [
            ("bos_token", self.bos_token),
            ("eos_token", self.eos_token),
            ("unk_token", self.unk_token),
            ("sep_token", self.sep_token),
            ("pad_token", self.pad_token),
            ("cls_token", self.cls_token),
            ("mask_token", self.mask_token),
        ];
        let named = named.into_iter();
        named
            .filter_map(|(name, token)| Some((name.to_owned(), token?.text().to_owned())))
            .collect()
    }
}

/// The tokenizer of a file of a folder that is no `tokenizer.json`.
fn converted(file: &Path, folder: &Path) -> Result<Tokenizer, ModelError> {
    let path = || file.to_owned();
    let bytes = std::fs::read(file).map_err(|error| ModelError::File {
        file: path(),
        error,
    })?;
    let named = json(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
    let config = json(&folder.join("config.json"))?.unwrap_or_default();
    convert(file, &bytes, &named, &config).map_err(|error| ModelError::Convert {
        file: path(),
        error,
    })
}

/// A file's text; `None` if there is no such file.
fn text(file: &Path) -> Result<Option<String>, ModelError> {
    match std::fs::read_to_string(file) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(ModelError::File {
            file: file.to_owned(),
            error,
        }),
    }
}

/// A JSON file; `None` if there is no such file.
pub(super) fn json<T: serde::de::DeserializeOwned>(file: &Path) -> Result<Option<T>, ModelError> {
    let malformed = |error| ModelError::Malformed {
        file: file.to_owned(),
        error,
    };
    text(file)?
        .map(|text| serde_json::from_str(&text).map_err(malformed))
        .transpose()
}
