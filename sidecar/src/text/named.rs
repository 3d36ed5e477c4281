//! Tokens that `tokenizer_config.json` names.

use std::collections::{BTreeMap, HashMap};

use serde::Deserialize;
use tokenizers::AddedToken;

use super::convert::ConvertError;

/// What is needed of `tokenizer_config.json` where there is no `tokenizer.json`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Named {
    pub(super) tokenizer_class: Option<String>,
    pub(super) added_tokens_decoder: BTreeMap<u32, AddedToken>,
    pub(super) add_bos_token: Option<bool>,
    pub(super) add_eos_token: Option<bool>,
    pub(super) add_prefix_space: Option<bool>,
    pub(super) legacy: Option<bool>,
    pub(super) bos_token: Option<Token>,
    pub(super) eos_token: Option<Token>,
    unk_token: Option<Token>,
    sep_token: Option<Token>,
    pad_token: Option<Token>,
    cls_token: Option<Token>,
    mask_token: Option<Token>,
    additional_special_tokens: Option<Tokens>,
    extra_special_tokens: Option<Tokens>,
}

/// A special token: its text, or what `AddedToken` is saved as.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Token {
    Text(String),
    Added { content: String },
}

impl Token {
    pub(super) fn text(&self) -> &str {
        match self {
            Self::Text(content) | Self::Added { content } => content,
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Tokens {
    List(Vec<Token>),
    Map(BTreeMap<String, Token>),
}

impl Tokens {
    fn all(&self) -> Box<dyn Iterator<Item = &Token> + '_> {
        match self {
            Self::List(list) => Box::new(list.iter()),
            Self::Map(map) => Box::new(map.values()),
        }
    }
}

impl Named {
    /// Tokens that are found in texts before anything else is done, by id: the model's `own`, those
    /// with an id here, and the special ones with a name alone. Ids beyond those of the vocabulary
    /// are put into it.
    ///
    /// # Errors
    /// When an id belongs to another token, or a token has none.
    pub(super) fn added(
        &self,
        own: BTreeMap<u32, AddedToken>,
        vocabulary: &mut HashMap<String, u32>,
    ) -> Result<Vec<AddedToken>, ConvertError> {
        let tokens: HashMap<u32, String> = vocabulary
            .iter()
            .map(|(token, id)| (*id, token.clone()))
            .collect();
        let mut all = own;
        let numbered = self.added_tokens_decoder.iter();
        all.extend(numbered.map(|(id, token)| (*id, token.clone())));
        for (id, token) in &all {
            let there = vocabulary.get(&token.content);
            let is_taken = there.is_some_and(|other| other != id);
            if is_taken || (there.is_none() && tokens.contains_key(id)) {
                let token = token.content.clone();
                return Err(ConvertError::Taken { token, id: *id });
            }
            vocabulary.insert(token.content.clone(), *id);
        }
        for name in self.specials() {
            let id = vocabulary.get(name).copied();
            let id = id.ok_or_else(|| ConvertError::Unnumbered(name.to_owned()))?;
            let token = || AddedToken::from(name, true);
            all.entry(id).or_insert_with(token);
        }
        Ok(all.into_values().collect())
    }

    fn specials(&self) -> impl Iterator<Item = &str> {
        let named = [
            &self.bos_token,
            &self.eos_token,
            &self.unk_token,
            &self.sep_token,
            &self.pad_token,
            &self.cls_token,
            &self.mask_token,
        ];
        let lists = [&self.additional_special_tokens, &self.extra_special_tokens];
        let lists = lists.into_iter().flatten().flat_map(Tokens::all);
        named.into_iter().flatten().chain(lists).map(Token::text)
    }
}
