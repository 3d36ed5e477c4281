//! Request bodies: the fields the simulation acts on; all others are accepted and ignored.

use std::fmt;

use serde::Deserialize;
use serde::de::{self, SeqAccess, Visitor};

use crate::token;

/// `POST /v1/completions`.
#[derive(Debug, Deserialize)]
pub(super) struct CompletionRequest {
    pub(super) prompt: Prompt,
    #[serde(flatten)]
    pub(super) options: Options,
}

/// `POST /v1/chat/completions`.
#[derive(Debug, Deserialize)]
pub(super) struct ChatRequest {
    pub(super) messages: Vec<Message>,
    #[serde(flatten)]
    pub(super) options: Options,
}

/// A request whose token ids are asked for.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Tokenized {
    /// A chat.
    Chat(ChatRequest),
    /// A text.
    Completion(CompletionRequest),
}

/// What both have.
#[derive(Debug, Deserialize)]
pub(super) struct Options {
    pub(super) model: Option<String>,
    max_tokens: Option<usize>,
    max_completion_tokens: Option<usize>,
    pub(super) stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    pub(super) n: Option<u32>,
    pub(super) cache_salt: Option<String>,
}

#[derive(Debug, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

/// One message of a conversation.
#[derive(Debug, Deserialize)]
pub(super) struct Message {
    role: String,
    content: Option<Content>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Deserialize)]
struct Part {
    text: Option<String>,
}

/// One prompt: a text, token ids, or a list with one of either.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Prompt {
    /// Text for the tokenizer.
    Text(String),
    /// Token ids.
    Tokens(Vec<u32>),
}

impl Options {
    pub(super) fn max_tokens(&self) -> Option<usize> {
        self.max_completion_tokens.or(self.max_tokens)
    }

    pub(super) fn include_usage(&self) -> bool {
        self.stream_options
            .as_ref()
            .and_then(|options| options.include_usage)
            .unwrap_or(false)
    }
}

impl ChatRequest {
    /// Each message is its role's token and its words; the assistant's token asks for the answer.
    pub(super) fn tokens(&self) -> Vec<u32> {
        let mut tokens = Vec::new();
        for message in &self.messages {
            tokens.push(token::role(&message.role));
            match &message.content {
                Some(Content::Text(text)) => tokens.extend(token::encode(text)),
                Some(Content::Parts(parts)) => {
                    for text in parts.iter().filter_map(|part| part.text.as_deref()) {
                        tokens.extend(token::encode(text));
                    }
                }
                None => {}
            }
        }
        tokens.push(token::role("assistant"));
        tokens
    }
}

impl Tokenized {
    pub(super) fn into_tokens(self) -> Vec<u32> {
        match self {
            Self::Chat(chat) => chat.tokens(),
            Self::Completion(completion) => completion.prompt.into_tokens(),
        }
    }
}

impl Prompt {
    pub(super) fn into_tokens(self) -> Vec<u32> {
        match self {
            Self::Text(text) => token::encode(&text),
            Self::Tokens(tokens) => tokens,
        }
    }
}

/// An element of a prompt list. Read in one pass: prompts run to a million ids, and serde's
/// untagged enums would buffer them.
enum Element {
    Token(u32),
    Whole(Prompt),
}

impl<'de> Deserialize<'de> for Prompt {
    fn deserialize<D: de::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        match Element::deserialize(from)? {
            Element::Whole(prompt) => Ok(prompt),
            Element::Token(_) => Err(de::Error::custom("prompt is a number")),
        }
    }
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: de::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(ElementVisitor)
    }
}

struct ElementVisitor;

impl<'de> Visitor<'de> for ElementVisitor {
    type Value = Element;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text, token ids, or a list with one of either")
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<Element, E> {
        u32::try_from(number)
            .map(Element::Token)
            .map_err(|_| E::custom(format_args!("token id {number} is above 32 bits")))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Element, E> {
        Ok(Element::Whole(Prompt::Text(text.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Element, A::Error> {
        let mut tokens = Vec::new();
        while let Some(element) = list.next_element()? {
            match element {
                Element::Token(token) => tokens.push(token),
                Element::Whole(prompt) => {
                    if !tokens.is_empty() || list.next_element::<Element>()?.is_some() {
                        return Err(de::Error::custom("only one prompt is served at a time"));
                    }
                    return Ok(Element::Whole(prompt));
                }
            }
        }
        Ok(Element::Whole(Prompt::Tokens(tokens)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt(json: &str) -> Result<Prompt, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    #[test]
    fn prompts_come_in_four_forms() {
        assert_eq!(prompt("[1,2]"), Ok(Prompt::Tokens(vec![1, 2])));
        assert_eq!(prompt("[[1,2]]"), Ok(Prompt::Tokens(vec![1, 2])));
        assert_eq!(prompt("\"a b\""), Ok(Prompt::Text("a b".to_owned())));
        assert_eq!(prompt("[\"a b\"]"), Ok(Prompt::Text("a b".to_owned())));
        assert_eq!(prompt("[]"), Ok(Prompt::Tokens(Vec::new())));
    }

    #[test]
    fn wrong_prompts_name_what_is_wrong() {
        for (json, part) in [
            ("[[1],[2]]", "one prompt"),
            ("[1,[2]]", "one prompt"),
            ("[\"a\",1]", "one prompt"),
            ("[4294967296]", "4294967296"),
            ("[-1]", "-1"),
            ("[1.5]", "1.5"),
            ("7", "number"),
            ("{}", "token ids"),
        ] {
            let error = prompt(json).expect_err(json);
            assert!(error.contains(part), "{json}: {error}");
        }
    }

    #[test]
    fn a_conversation_is_a_prefix_of_its_continuation() {
        let tokens = |json: &str| {
            let request: ChatRequest = serde_json::from_str(json).expect(json);
            request.tokens()
        };
        let first = tokens(r#"{"messages":[{"role":"user","content":"hello there"}]}"#);
        let second = tokens(
            r#"{"messages":[{"role":"user","content":[{"type":"text","text":"hello there"}]},
                {"role":"assistant","content":"qeaa qfaa"},{"role":"user","content":"more"}]}"#,
        );
        assert_eq!(second[..first.len()], first);
        assert_eq!(second[first.len()..first.len() + 2], [400, 500]);
    }
}
