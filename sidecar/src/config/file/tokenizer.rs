//! A pool's tokenizer as it is written.

use std::path::PathBuf;

use kv_core::handover::Handover;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A model's tokenizer and chat template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tokenizer {
    /// Folder as Hugging Face lays it out: `tokenizer.json` or a tokenizer of tiktoken or
    /// SentencePiece, `tokenizer_config.json`, `chat_template.jinja`. Either this or `engine`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "PathBuf")]
    pub path: Option<PathBuf>,
    /// Where the files are not at hand: which path of the pool's workers tells the token ids of a
    /// prompt, `tokenize` or `render`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "EngineFace")]
    pub engine: Option<EngineFace>,
    /// Bytes of token ids that are remembered, so that the next turn of a conversation tokenizes
    /// only what is new.
    #[serde(default = "cache_bytes")]
    #[schemars(range(min = 0, max = 1_099_511_627_776_u64))]
    pub cache_bytes: u64,
    /// Milliseconds that reading a prompt may take.
    #[serde(default = "budget_ms")]
    #[schemars(range(min = 1, max = 10_000))]
    pub budget_ms: u32,
    /// Milliseconds more for every thousand words.
    #[serde(default = "budget_ms_per_1000_words")]
    #[schemars(range(min = 0, max = 1_000))]
    pub budget_ms_per_1000_words: u32,
    /// How workers get the token ids of a prompt that came as text, so that they need not tokenize
    /// it again: `field`, where the API has a place for them (`prompt` of completions, `input_ids`
    /// of SGLang's `/generate`), `nvext`, in Dynamo's `nvext.token_data` of completions and chats,
    /// or not at all. Bodies are altered by nothing else.
    #[serde(default)]
    pub hand_over: Handover,
}

/// Which path of an engine tells token ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum EngineFace {
    /// `/tokenize`, as vLLM has it; SGLang's takes texts only.
    Tokenize,
    /// `/v1/chat/completions/render` and `/v1/completions/render`, as vLLM and TensorRT-LLM have
    /// them.
    Render,
}

fn cache_bytes() -> u64 {
    256 << 20
}

fn budget_ms() -> u32 {
    20
}

fn budget_ms_per_1000_words() -> u32 {
    2
}
