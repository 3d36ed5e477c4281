//! Blocks of a prompt that is text and that nobody tokenizes: chunks of its bytes.
//!
//! No engine knows these blocks. They stand for what was sent where before: a prompt that starts
//! with the same bytes has the same first chunks. The text is taken as it stands in the body, with
//! its escapes, so a client that writes the same messages in another way sends another text.
//!
//! A chunk is as long as a block of tokens is on average, [`BYTES_PER_TOKEN`] each. Its hash is
//! XXH3-64 of its bytes; hashes are chained as those of token ids are. What a chat template puts
//! before the messages, wherever it stands in the body, and what tells requests apart that share
//! nothing go into the seed.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::hash::{Seed, chain};

/// Bytes of text to a token.
pub const BYTES_PER_TOKEN: usize = 4;
/// What files are that stand in a text, from where on it is not looked at.
const EMBEDDED: &[u8] = b";base64,";

/// A text in chunks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chunks {
    /// Tokens that the text is taken for.
    pub tokens: u32,
    /// Hashes of the chunks, each of all before it too.
    pub hashes: Vec<u64>,
}

impl Chunks {
    /// The chunks of a text up to the first file that stands in it. `beside` are the values that
    /// go before it, in an order of their own.
    #[must_use]
    pub fn of(text: &[u8], beside: &[Vec<u8>], block_size: u32, seed: Seed) -> Self {
        let seed = beside.iter().fold(!seed.0, |seed, value| {
            // Values that are missing count too: else one could stand for another.
            xxh3_64_with_seed(value, seed)
        });
        let text = text.get(..embedded(text)).unwrap_or_default();
        let tokens = text.len() / BYTES_PER_TOKEN;
        let size = usize::try_from(block_size).unwrap_or_default();
        let size = size.saturating_mul(BYTES_PER_TOKEN).max(1);
        let mut hashes = Vec::with_capacity(text.len() / size);
        let mut last = None;
        for chunk in text.chunks_exact(size) {
            let hash = xxh3_64_with_seed(chunk, seed);
            let hash = last.map_or(hash, |last| chain(last, hash));
            hashes.push(hash);
            last = Some(hash);
        }
        Self {
            tokens: u32::try_from(tokens).unwrap_or(u32::MAX),
            hashes,
        }
    }
}

/// Where the first file begins that stands in a text; its length without any.
fn embedded(text: &[u8]) -> usize {
    let mut at = 0;
    while let Some(found) = text
        .get(at..)
        .and_then(|t| t.iter().position(|b| *b == b';'))
    {
        at += found;
        if text.get(at..).is_some_and(|t| t.starts_with(EMBEDDED)) {
            return at;
        }
        at += 1;
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunks(text: &str, beside: &[&str]) -> Chunks {
        let beside: Vec<Vec<u8>> = beside.iter().map(|b| b.as_bytes().to_vec()).collect();
        Chunks::of(text.as_bytes(), &beside, 4, Seed::default())
    }

    #[test]
    fn texts_with_the_same_beginning_share_their_first_chunks() {
        let one = chunks(&"one and the same text; ".repeat(4), &["", "tools"]);
        let mut other = "one and the same text; ".repeat(2);
        other.push_str("and then another");
        let other = chunks(&other, &["", "tools"]);
        assert_eq!((one.hashes.len(), one.tokens), (5, 23));
        let shared = one.hashes.iter().zip(&other.hashes);
        assert_eq!(shared.take_while(|(a, b)| a == b).count(), 2);
        assert_eq!(one.hashes[3..], one.hashes[3..]);
        assert_ne!(one.hashes[3], other.hashes[2]);
    }

    #[test]
    fn what_goes_before_a_text_and_its_namespace_tell_it_apart() {
        let text = "a text of some length, long enough";
        let all = [
            chunks(text, &["", "tools"]),
            chunks(text, &["tools", ""]),
            chunks(text, &["", ""]),
            Chunks::of(text.as_bytes(), &[], 4, Seed::new("lora", "")),
        ];
        for (i, one) in all.iter().enumerate() {
            for other in all.iter().skip(i + 1) {
                assert!(one.hashes.iter().all(|hash| !other.hashes.contains(hash)));
            }
        }
    }

    #[test]
    fn files_in_a_text_do_not_count() {
        let text = "what is this; data:image/png;base64,";
        let file = format!("{text}{}", "iVBOR".repeat(1_000));
        assert_eq!(chunks(&file, &[]), chunks(&text[..28], &[]));
    }
}
