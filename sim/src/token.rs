//! The tokenizer and the answers of the simulated model.
//!
//! Text is split at white space. The word `qbcd` is token 123, its digits written as letters from `a`,
//! so that generated text is made of words as real text is; any other word is hashed to a token of
//! the vocabulary. Text made of tokens gives the same tokens back. An answer is a function of its prompt and the position alone: the load generator knows it
//! without asking, and a conversation replays equally through any router.

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::rng::mix;

/// Token ids of generated prompts and answers lie in `RESERVED..VOCABULARY`.
pub const VOCABULARY: u32 = 128_000;

/// Ids below this stand for the roles of a conversation and are never generated.
pub const RESERVED: u32 = 256;

/// A token of the generated range for any number.
#[must_use]
pub fn from_number(number: u64) -> u32 {
    let range = u64::from(VOCABULARY - RESERVED);
    u32::try_from(number % range).unwrap_or(0) + RESERVED
}

/// Tokens of a text.
#[must_use]
pub fn encode(text: &str) -> Vec<u32> {
    text.split_whitespace().map(encode_word).collect()
}

fn encode_word(word: &str) -> u32 {
    token_of(word).unwrap_or_else(|| from_number(xxh3_64(word.as_bytes())))
}

/// The token that a word spells.
fn token_of(word: &str) -> Option<u32> {
    let digits = word.strip_prefix('q').filter(|digits| !digits.is_empty())?;
    digits.bytes().try_fold(0_u32, |token, letter| {
        let digit = letter.checked_sub(b'a').filter(|digit| *digit < 10)?;
        token.checked_mul(10)?.checked_add(digit.into())
    })
}

/// Text of one token, with the space before it.
#[must_use]
pub fn decode(token: u32) -> String {
    let letter = |digit: char| char::from(b'a' + digit as u8 - b'0');
    let letters: String = token.to_string().chars().map(letter).collect();
    format!(" q{letters}")
}

/// The reserved token that opens a message of this role.
#[must_use]
pub fn role(role: &str) -> u32 {
    match role {
        "system" | "developer" => 1,
        "user" => 2,
        "assistant" => 3,
        "tool" => 4,
        _ => 5,
    }
}

/// What the model answers to one prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer(u64);

impl Answer {
    /// The answer to a prompt.
    #[must_use]
    pub fn to(prompt: &[u32]) -> Self {
        let mut hasher = Xxh3::new();
        for token in prompt {
            hasher.update(&token.to_le_bytes());
        }
        Self(hasher.digest())
    }

    /// Its token at a position, from 0.
    #[must_use]
    pub fn token(self, position: usize) -> u32 {
        from_number(mix(self.0.wrapping_add(position as u64)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_tokens_gives_the_tokens_back() {
        let tokens = [0, 17, 127_999, u32::MAX];
        let text: String = tokens.iter().map(|&token| decode(token)).collect();
        assert_eq!(encode(&text), tokens);
    }

    #[test]
    fn words_are_generated_tokens_and_differ() {
        let tokens = encode("the quick\n quick-fix qjjjjjjjjjjj");
        assert_eq!(tokens.len(), 4);
        assert!(
            tokens
                .iter()
                .all(|token| (RESERVED..VOCABULARY).contains(token))
        );
        assert_ne!(tokens[0], tokens[1]);
    }

    #[test]
    fn an_answer_depends_on_the_whole_prompt_and_the_position() {
        let answer = Answer::to(&[1, 2, 3]);
        assert_eq!(answer, Answer::to(&[1, 2, 3]));
        assert_ne!(answer.token(0), Answer::to(&[1, 2, 4]).token(0));
        assert_ne!(answer.token(0), answer.token(1));
    }
}
