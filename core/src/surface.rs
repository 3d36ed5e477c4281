//! The requests whose bodies say where to go: paths of the APIs that engines serve, and where in a
//! body the prompt stands.

use serde::{Deserialize, Serialize};

/// The body's key with Dynamo's extensions.
pub const NVEXT: &str = "nvext";
/// Their key of token ids.
pub const TOKEN_DATA: &str = "token_data";
/// `SGLang`'s key of token ids.
pub const INPUT_IDS: &str = "input_ids";

/// A kind of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Surface {
    /// `OpenAI`'s `/v1/completions`: text, token ids, or a list with one of either.
    Completions,
    /// `OpenAI`'s `/v1/chat/completions`.
    Chat,
    /// `OpenAI`'s `/v1/responses`.
    Responses,
    /// Anthropic's `/v1/messages`.
    Messages,
    /// `OpenAI`'s `/v1/embeddings`, which reuses no blocks.
    Embeddings,
    /// vLLM's `/inference/v1/generate`: token ids.
    Inference,
    /// `SGLang`'s `/generate`: text or token ids.
    Generate,
}

impl Surface {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Completions,
        Self::Chat,
        Self::Responses,
        Self::Messages,
        Self::Embeddings,
        Self::Inference,
        Self::Generate,
    ];

    /// Its path.
    #[must_use]
    pub fn path(self) -> &'static str {
        match self {
            Self::Completions => "/v1/completions",
            Self::Chat => "/v1/chat/completions",
            Self::Responses => "/v1/responses",
            Self::Messages => "/v1/messages",
            Self::Embeddings => "/v1/embeddings",
            Self::Inference => "/inference/v1/generate",
            Self::Generate => "/generate",
        }
    }

    /// The kind of a path without query.
    #[must_use]
    pub fn of(path: &[u8]) -> Option<Self> {
        let mut all = Self::ALL.into_iter();
        all.find(|surface| surface.path().as_bytes() == path)
    }

    /// The top-level key of the body that may hold token ids.
    #[must_use]
    pub fn ids_key(self) -> Option<&'static str> {
        match self {
            Self::Completions => Some("prompt"),
            Self::Inference => Some("token_ids"),
            Self::Generate => Some(INPUT_IDS),
            Self::Chat | Self::Responses | Self::Messages | Self::Embeddings => None,
        }
    }

    /// The top-level key whose presence makes the prompt a text.
    #[must_use]
    pub fn text_key(self) -> Option<&'static str> {
        match self {
            Self::Chat | Self::Messages => Some("messages"),
            Self::Responses => Some("input"),
            Self::Generate => Some("text"),
            Self::Completions | Self::Inference | Self::Embeddings => None,
        }
    }

    /// The top-level key of a prompt that is text.
    #[must_use]
    pub fn prompt_key(self) -> Option<&'static str> {
        match self {
            Self::Completions => Some("prompt"),
            _ => self.text_key(),
        }
    }

    /// Whether Dynamo's `nvext.token_data` may stand in the body for its prompt.
    #[must_use]
    pub fn takes_token_data(self) -> bool {
        matches!(self, Self::Completions | Self::Chat)
    }
}

#[cfg(test)]
mod tests {
    use super::Surface;

    #[test]
    fn a_path_has_one_kind() {
        for surface in Surface::ALL {
            assert_eq!(Surface::of(surface.path().as_bytes()), Some(surface));
        }
        assert_eq!(Surface::of(b"/v1/models"), None);
        assert_eq!(Surface::of(b"/v1/chat/completions/"), None);
    }
}
