//! From the text of a request to the very token ids that the engine will see.
//!
//! A **model** is a folder as Hugging Face lays it out: a tokenizer and, for chat, a template. A
//! conversation's next turn repeats everything before it, so the ids of a text's beginning are
//! kept, chunk by chunk, and only what is new is tokenized ([`Cached`]). Chunks end where no
//! tokenizer can tell that the text was cut ([`cut`]). Where there are no files an engine is asked
//! ([`Engine`]).

mod blocks;
mod body;
mod cached;
mod chat;
mod convert;
pub mod cut;
mod encoder;
mod engine;
mod merges;
mod model;
mod named;
mod python;
mod reader;
mod rendered;
mod sentencepiece;
mod template;
mod tiktoken;
mod vision;

pub use body::{BodyError, Conversation, Prompt};
pub use cached::{Cached, Encoded};
pub use convert::{ConvertError, tokenizer_file};
pub use encoder::{Encoder, EncoderError};
pub use engine::{Engine, EngineError};
pub use model::{Model, ModelError};
pub use reader::Reader;
pub use template::{Chat, Template, TemplateError};
pub use vision::{Image, Vision};
