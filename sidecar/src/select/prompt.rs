//! A prompt as the index and the load know it.

use kv_core::family::Namespace;
use kv_core::hash::{Hashing, Seed, chain, sequence_hashes};
use kv_core::holdings::{Named, named};
use kv_core::table::Pool;
use serde::Deserialize;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::SelectError;
use super::request::Asked;

/// Hashes of a prompt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hashed {
    /// Prompt tokens.
    pub tokens: u32,
    /// Sequence hashes by which the index knows its complete blocks.
    pub held: Vec<u64>,
    /// Sequence hashes by which load knows them.
    pub used: Vec<u64>,
    /// Its hashes in further families of the pool.
    pub families: Vec<Named>,
}

/// Media in a block.
#[derive(Debug, Default, Deserialize)]
pub(super) struct BlockMedia {
    #[serde(default)]
    mm_objects: Vec<Medium>,
}

#[derive(Debug, Deserialize)]
struct Medium {
    mm_hash: u64,
}

/// Token ids that stand for a prompt with media.
#[derive(Debug, Default, Deserialize)]
pub(super) struct RoutingTokens {
    routing_token_ids: Vec<u32>,
    #[serde(default)]
    block_mm_infos: Vec<Option<BlockMedia>>,
}

/// The token ids of a request and what media their blocks hold.
type Tokens<'a> = (&'a [u32], &'a [Option<BlockMedia>]);

impl Asked {
    /// Those of media before plain ones, as in Dynamo.
    fn tokens(&self) -> Option<Tokens<'_>> {
        let media = self.mm_routing_info.as_ref();
        let media = media.filter(|m| !m.routing_token_ids.is_empty());
        if let Some(media) = media {
            return Some((&media.routing_token_ids, &media.block_mm_infos));
        }
        let tokens = self.token_ids.as_deref()?;
        Some((tokens, self.block_mm_infos.as_deref().unwrap_or_default()))
    }

    /// The prompt in a pool.
    ///
    /// # Errors
    /// When it is given neither by its tokens nor by all of its hashes.
    pub(super) fn hashed(&self, pool: &Pool) -> Result<Hashed, SelectError> {
        if let Some(tokens) = self.tokens() {
            return Ok(self.of_tokens(tokens, pool));
        }
        let blocks = self.block_hashes.as_ref();
        let blocks = blocks.ok_or(SelectError::Missing("block_hashes"))?;
        let (used, tokens) = self.used()?;
        if tokens == 0 {
            return Err(SelectError::NoTokens);
        }
        if blocks.len() != used.len() {
            return Err(SelectError::Lengths {
                blocks: blocks.len(),
                sequences: used.len(),
            });
        }
        Ok(Hashed {
            tokens,
            held: chained(blocks.iter().map(|hash| hash.cast_unsigned())),
            used,
            families: Vec::new(),
        })
    }

    /// The prompt as load knows it; the index need not.
    ///
    /// # Errors
    /// As [`Asked::hashed`].
    pub(super) fn tracked(&self, pool: &Pool) -> Result<Hashed, SelectError> {
        if let Some(tokens) = self.tokens() {
            return Ok(self.of_tokens(tokens, pool));
        }
        let (used, tokens) = self.used()?;
        let blocks = self.block_hashes.iter().flatten();
        Ok(Hashed {
            tokens,
            held: chained(blocks.map(|hash| hash.cast_unsigned())),
            used,
            families: Vec::new(),
        })
    }

    fn used(&self) -> Result<(Vec<u64>, u32), SelectError> {
        let sequence = self.sequence_hashes.as_ref();
        let sequence = sequence.ok_or(SelectError::Missing("sequence_hashes"))?;
        let tokens = self.isl_tokens.ok_or(SelectError::Missing("isl_tokens"))?;
        let used = sequence.iter().map(|hash| hash.cast_unsigned());
        Ok((used.collect(), tokens))
    }

    fn of_tokens(&self, (tokens, media): Tokens<'_>, pool: &Pool) -> Hashed {
        let lora = self.lora_name.as_deref().unwrap_or_default();
        let salt = self.cache_salt.as_deref().unwrap_or_default();
        let hashing = Hashing {
            eagle: self.is_eagle.unwrap_or(false),
            ..Hashing::new(pool.block_size as usize, Seed::new(lora, salt))
        };
        let (held, families) = if media.iter().all(Option::is_none) {
            let namespace = Namespace { lora, salt };
            let families = named(&pool.families, pool.block_size, tokens, namespace);
            (sequence_hashes(tokens, hashing), families)
        } else {
            (with_media(tokens, media, hashing), Vec::new())
        };
        Hashed {
            tokens: u32::try_from(tokens.len()).unwrap_or(u32::MAX),
            used: held.clone(),
            held,
            families,
        }
    }
}

/// Sequence hashes of blocks.
fn chained(blocks: impl Iterator<Item = u64>) -> Vec<u64> {
    let mut before = None;
    let sequence = blocks.map(|block| {
        let hash = before.map_or(block, |before| chain(before, block));
        before = Some(hash);
        hash
    });
    sequence.collect()
}

/// As without media, but that the hashes of a block's media follow its tokens, the least first.
fn with_media(tokens: &[u32], media: &[Option<BlockMedia>], hashing: Hashing) -> Vec<u64> {
    if hashing.block_size == 0 {
        return Vec::new();
    }
    let window = hashing.block_size + usize::from(hashing.eagle);
    let windows = tokens.windows(window).step_by(hashing.block_size);
    let block = |(at, tokens): (usize, &[u32])| {
        let objects = media.get(at).and_then(Option::as_ref);
        let objects = objects.map_or(&[][..], |media| &media.mm_objects);
        let mut hashes: Vec<u64> = objects.iter().map(|object| object.mm_hash).collect();
        hashes.sort_unstable();
        let tokens = tokens.iter().flat_map(|token| token.to_le_bytes());
        let hashes = hashes.iter().flat_map(|hash| hash.to_le_bytes());
        let bytes: Vec<u8> = tokens.chain(hashes).collect();
        xxh3_64_with_seed(&bytes, hashing.seed.0)
    };
    chained(windows.enumerate().map(block))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> Pool {
        Pool {
            block_size: 4,
            ..Pool::default()
        }
    }

    fn asked(body: serde_json::Value) -> Asked {
        serde_json::from_value(body).unwrap()
    }

    #[test]
    fn tokens_and_the_hashes_of_their_blocks_are_the_same_prompt() {
        let by_tokens = asked(serde_json::json!({"token_ids": [1, 2, 3, 4, 5, 6, 7, 8, 9]}));
        let by_tokens = by_tokens.hashed(&pool()).unwrap();
        let seed = Seed::default();
        let blocks = [seed.block(&[1, 2, 3, 4]), seed.block(&[5, 6, 7, 8])];
        let signed = |hashes: &[u64]| hashes.iter().map(|h| h.cast_signed()).collect::<Vec<_>>();
        let by_hashes = asked(serde_json::json!({
            "block_hashes": signed(&blocks), "sequence_hashes": signed(&by_tokens.used),
            "isl_tokens": 9,
        }));
        assert_eq!(by_hashes.hashed(&pool()).unwrap(), by_tokens);
        assert_eq!(by_tokens.held.len(), 2);
    }

    #[test]
    fn media_change_their_blocks_alone_and_none_change_nothing() {
        let tokens = [1, 2, 3, 4, 5, 6, 7, 8];
        let with = |media: serde_json::Value| {
            let asked = asked(serde_json::json!({"token_ids": tokens, "block_mm_infos": media}));
            asked.hashed(&pool()).unwrap().held
        };
        let plain = with(serde_json::json!([null, null]));
        let empty = with(serde_json::json!([{"mm_objects": []}, null]));
        assert_eq!(plain, empty);
        let one = with(serde_json::json!([null, {"mm_objects": [{"mm_hash": 7}, {"mm_hash": 3}]}]));
        let same =
            with(serde_json::json!([null, {"mm_objects": [{"mm_hash": 3}, {"mm_hash": 7}]}]));
        assert_eq!(one, same);
        assert_eq!(one[0], plain[0]);
        assert_ne!(one[1], plain[1]);
    }

    #[test]
    fn what_is_missing_is_named() {
        let missing = |body| asked(body).hashed(&pool()).unwrap_err().to_string();
        let required = |key| format!("{key} is required without token_ids");
        assert_eq!(missing(serde_json::json!({})), required("block_hashes"));
        let body = serde_json::json!({"block_hashes": []});
        assert_eq!(missing(body), required("sequence_hashes"));
        let body = serde_json::json!({"block_hashes": [], "sequence_hashes": []});
        assert_eq!(missing(body), required("isl_tokens"));
        let body = serde_json::json!({"block_hashes": [1], "sequence_hashes": [], "isl_tokens": 1});
        let lengths = "block_hashes length 1 must match sequence_hashes length 0";
        assert_eq!(missing(body), lengths);
    }
}
