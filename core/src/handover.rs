//! Handing the token ids of a prompt that came as text over to its worker, which need not tokenize
//! it again: the one case in which a body is altered, where a pool asks for it.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::scan::Members;
use crate::surface::{INPUT_IDS, NVEXT, Surface, TOKEN_DATA};

/// How workers get token ids.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Handover {
    /// Not at all.
    #[default]
    None,
    /// Where the API has a place for them: in `prompt` of completions, and in `input_ids` of
    /// `SGLang`'s `/generate`.
    Field,
    /// In Dynamo's `nvext.token_data`, of completions and chats.
    Nvext,
}

impl Handover {
    /// Whether requests of this API have a place for token ids.
    #[must_use]
    pub fn takes(self, surface: Surface) -> bool {
        match self {
            Self::None => false,
            Self::Field => matches!(surface, Surface::Completions | Surface::Generate),
            Self::Nvext => surface.takes_token_data(),
        }
    }

    /// The body with the ids, a JSON array, in it. `None` where there is no place for them, or it
    /// is taken.
    #[must_use]
    pub fn body(
        self,
        surface: Surface,
        body: &[u8],
        members: &Members,
        ids: &[u8],
    ) -> Option<Vec<u8>> {
        if !self.takes(surface) || members.unlisted() > 0 {
            return None;
        }
        let first = body.iter().position(|byte| *byte == b'{')? + 1;
        // A body without members has no prompt that the ids could be of.
        if body.get(first..)?.trim_ascii_start().first() == Some(&b'}') {
            return None;
        }
        match (self, surface) {
            (Self::Nvext, _) => match members.get(NVEXT) {
                None => {
                    let before = format!("\"{NVEXT}\":{{\"{TOKEN_DATA}\":");
                    let inserted = [before.as_bytes(), ids, b"},"].concat();
                    replaced(body, &[(first..first, &inserted)])
                }
                Some(place) => {
                    let nvext = extended(body.get(place.clone())?, ids)?;
                    replaced(body, &[(place, &nvext)])
                }
            },
            (_, Surface::Generate) if members.get(INPUT_IDS).is_none() => {
                let before = format!("\"{INPUT_IDS}\":");
                let inserted = [before.as_bytes(), ids, b","].concat();
                let text = members.get(surface.prompt_key()?)?;
                replaced(body, &[(first..first, &inserted), (text, b"null")])
            }
            (_, Surface::Completions) => {
                let prompt = members.get(surface.prompt_key()?)?;
                replaced(body, &[(prompt, ids)])
            }
            _ => None,
        }
    }
}

/// Extensions with token ids behind them.
fn extended(nvext: &[u8], ids: &[u8]) -> Option<Vec<u8>> {
    let quoted = format!("\"{TOKEN_DATA}\"");
    let is_taken = nvext.windows(quoted.len()).any(|w| w == quoted.as_bytes());
    let inner: &[u8] = match nvext {
        b"null" => b"",
        _ => nvext.strip_prefix(b"{")?.strip_suffix(b"}")?,
    };
    let comma: &[u8] = if inner.trim_ascii().is_empty() {
        b""
    } else {
        b","
    };
    let more = [quoted.as_bytes(), b":", ids, b"}"].concat();
    (!is_taken).then(|| [b"{", inner, comma, &more].concat())
}

/// A body with ranges of it, ascending, replaced.
fn replaced(body: &[u8], changes: &[(Range<usize>, &[u8])]) -> Option<Vec<u8>> {
    let more: usize = changes.iter().map(|(_, with)| with.len()).sum();
    let mut new = Vec::with_capacity(body.len() + more);
    let mut at = 0;
    for (range, with) in changes {
        new.extend_from_slice(body.get(at..range.start)?);
        new.extend_from_slice(with);
        at = range.end;
    }
    new.extend_from_slice(body.get(at..)?);
    Some(new)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::scan::Scanner;

    fn handed(handover: Handover, surface: Surface, body: &str) -> Option<Value> {
        let mut scanner = Scanner::of(10, surface.ids_key());
        scanner.feed(body.as_bytes());
        let members = scanner.finish().unwrap().members;
        let new = handover.body(surface, body.as_bytes(), &members, b"[1,2]")?;
        Some(serde_json::from_slice(&new).unwrap())
    }

    #[test]
    fn ids_take_the_place_of_the_text() {
        let body = r#" { "model": "m", "prompt" : "a\"b", "n": 1}"#;
        assert_eq!(
            handed(Handover::Field, Surface::Completions, body),
            Some(json!({"model": "m", "prompt": [1, 2], "n": 1}))
        );
        assert_eq!(
            handed(Handover::Field, Surface::Generate, r#"{"text":"a","x":{}}"#),
            Some(json!({"input_ids": [1, 2], "text": null, "x": {}}))
        );
    }

    #[test]
    fn ids_stand_among_dynamos_extensions() {
        let cases = [
            (r#"{"prompt":"a"}"#, json!({"token_data": [1, 2]})),
            (
                r#"{"nvext": {} ,"prompt":"a"}"#,
                json!({"token_data": [1, 2]}),
            ),
            (
                r#"{"nvext":null,"prompt":"a"}"#,
                json!({"token_data": [1, 2]}),
            ),
            (
                r#"{"prompt":"a","nvext":{"x":1}}"#,
                json!({"token_data": [1, 2], "x": 1}),
            ),
        ];
        for (body, nvext) in cases {
            let new = handed(Handover::Nvext, Surface::Completions, body);
            assert_eq!(new, Some(json!({"prompt": "a", "nvext": nvext})), "{body}");
        }
    }

    #[test]
    fn a_body_without_a_free_place_is_left_alone() {
        let taken = r#"{"prompt":"a","nvext":{"token_data":null}}"#;
        assert_eq!(handed(Handover::Nvext, Surface::Completions, taken), None);
        let odd = r#"{"prompt":"a","nvext":7}"#;
        assert_eq!(handed(Handover::Nvext, Surface::Completions, odd), None);
        let taken = r#"{"text":"a","input_ids":null}"#;
        assert_eq!(handed(Handover::Field, Surface::Generate, taken), None);
        let chat = r#"{"messages":[]}"#;
        assert_eq!(handed(Handover::Field, Surface::Chat, chat), None);
        assert_eq!(handed(Handover::None, Surface::Completions, odd), None);
        assert_eq!(handed(Handover::Nvext, Surface::Completions, "{ }"), None);
        let many: String = (0..70).map(|i| format!("\"k{i}\":1,")).collect();
        let many = format!("{{{many}\"prompt\":\"a\"}}");
        assert_eq!(handed(Handover::Field, Surface::Completions, &many), None);
    }
}
