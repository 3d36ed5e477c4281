//! What shapes a block's hash besides its tokens: multimodal objects, adapters, salts.

use kv_core::hash::CHAIN_SEED;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::value::Value;

/// What a Dynamo frontend puts before a salt that it hands to vLLM.
const TAGGED_SALT: &str = "dynamo-cache-salt:";
/// First id of those that stand for multimodal objects, and how many there are.
const FIRST_PAD: u64 = 1_000_000;
const PADS: u64 = 1 << 30;

/// Something that is part of a block's hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key {
    /// A multimodal object.
    Object(u64),
    /// Of unknown meaning: such a block equals none of text alone.
    Other(u64),
}

/// Keys of one block, as its sender ordered them.
pub(super) type BlockKeys = Vec<Key>;

/// The hash that stands for a multimodal object: the first 16 digits of a digest, XXH3-64 of any
/// other name. `None` for an empty name.
#[must_use]
pub fn mm_hash(identifier: &str) -> Option<u64> {
    if identifier.is_empty() {
        return None;
    }
    Some(digest(identifier).unwrap_or_else(|| xxh3_64(identifier.as_bytes())))
}

/// The token id that stands for a multimodal object where its placeholders are replaced.
#[must_use]
pub fn pad(mm_hash: u64) -> u32 {
    u32::try_from(FIRST_PAD + mm_hash % PADS).unwrap_or_default()
}

/// The first 16 of 64 hexadecimal digits.
fn digest(text: &str) -> Option<u64> {
    let is_digest = text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
    let first = text.get(..16).filter(|_| is_digest)?;
    u64::from_str_radix(first, 16).ok()
}

/// Hash of a block with multimodal objects whose placeholders are left as they are: the objects'
/// hashes in ascending order after the tokens.
#[must_use]
pub(super) fn block_with(tokens: &[u32], seed: u64, keys: &mut [u64]) -> u64 {
    keys.sort_unstable();
    let tokens = tokens.iter().flat_map(|token| token.to_le_bytes());
    let keys = keys.iter().flat_map(|key| key.to_le_bytes());
    let bytes: Vec<u8> = tokens.chain(keys).collect();
    xxh3_64_with_seed(&bytes, seed)
}

/// Replaces each run of `placeholder` by what stands for the block's objects, in order; further
/// runs are the last object's.
pub(super) fn replace(tokens: &mut [u32], placeholder: u32, objects: &[u64]) {
    let Some(last) = objects.last() else {
        return;
    };
    let (mut runs, mut is_in_run) = (0, false);
    for token in tokens {
        if *token == placeholder {
            *token = pad(*objects.get(runs).unwrap_or(last));
            is_in_run = true;
        } else if is_in_run {
            runs += 1;
            is_in_run = false;
        }
    }
}

/// Keys by block and the salt among them.
///
/// vLLM lists for each block the adapter's name, then names of objects (bare, or with their offset),
/// then, for a prompt's first block, the salt. Dynamo's decoder takes a salt only with the mark that
/// its own frontend puts before it; here a bare text at the end of a prompt's first block
/// (`may_have_salt`) is one too, because plain vLLM behind this router has no such mark, and a
/// salted block that passes for an unsalted one would be credited to everybody.
pub(super) fn extra_keys(
    value: &Value<'_>,
    lora: &str,
    may_have_salt: bool,
) -> (Vec<BlockKeys>, Option<String>) {
    let mut salt = None;
    let blocks = value.list().unwrap_or_default();
    let keys = blocks.iter().enumerate().map(|(i, block)| {
        let mut adapter = Some(lora).filter(|lora| !lora.is_empty());
        let items = block.list().unwrap_or_default();
        let mut keys = BlockKeys::new();
        for (at, item) in items.iter().enumerate() {
            match item {
                Value::Str(name) if adapter.is_some_and(|adapter| adapter == name) => {
                    adapter = None;
                }
                Value::Str(text) => {
                    let tagged = text
                        .strip_prefix(TAGGED_SALT)
                        .filter(|salt| !salt.is_empty());
                    let object = digest(text);
                    let is_last = at + 1 == items.len();
                    if let Some(tagged) = tagged.filter(|_| i == 0) {
                        salt = Some(tagged.to_owned());
                    } else if let Some(object) = object {
                        keys.push(Key::Object(object));
                    } else if i == 0 && is_last && may_have_salt && salt.is_none() {
                        salt = Some(text.to_string()).filter(|salt| !salt.is_empty());
                    } else {
                        keys.push(Key::Other(xxh3_64(text.as_bytes())));
                    }
                }
                Value::List(pair) => {
                    let name = pair.first().and_then(Value::text);
                    keys.extend(name.and_then(mm_hash).map(Key::Object));
                }
                Value::Bytes(bytes) => keys.push(Key::Other(xxh3_64(bytes))),
                Value::Int(int) => keys.push(Key::Other(xxh3_64(&int.to_le_bytes()))),
                Value::Nil => {}
                // Not looked into, yet it makes the block another one.
                Value::Bool(_) | Value::Float(_) | Value::Map(_) | Value::Opaque => {
                    keys.push(Key::Other(CHAIN_SEED));
                }
            }
        }
        keys
    });
    (keys.collect(), salt)
}

/// Objects by block as Dynamo's publishers list them.
pub(super) fn mm_infos(value: &Value<'_>) -> Vec<BlockKeys> {
    let of_block = |info: &Value<'_>| {
        let objects = info.get("mm_objects").and_then(Value::list);
        let hashes = objects.into_iter().flatten().filter_map(|object| {
            let hash = object.get("mm_hash")?;
            super::hash::hash(hash, None).map(Key::Object)
        });
        hashes.collect()
    };
    value
        .list()
        .unwrap_or_default()
        .iter()
        .map(of_block)
        .collect()
}

#[cfg(test)]
mod tests {
    use kv_core::hash::Seed;

    use super::*;

    #[test]
    fn objects_are_named_and_hashed_as_dynamo_does() {
        assert_eq!(mm_hash("img-1"), Some(0xccfa_f1de_5eb1_c585));
        let digest = "0123456789abcdef".repeat(4);
        assert_eq!(mm_hash(&digest), Some(0x0123_4567_89ab_cdef));
        assert_eq!(mm_hash(""), None);
        assert_eq!(pad(0x1122_3344_5566_7788), 360_036_808);
        let tokens: Vec<u32> = (16..32).collect();
        let seed = Seed::default().0;
        let hash = block_with(&tokens, seed, &mut [0x1122_3344_5566_7788]);
        assert_eq!(hash, 0xe838_c3c9_8853_21ed);
        assert_eq!(block_with(&tokens, seed, &mut []), 0xd439_3917_8abd_00db);
        let both = block_with(&tokens, seed, &mut [2, 1]);
        assert_eq!(both, block_with(&tokens, seed, &mut [1, 2]));
    }

    #[test]
    fn each_run_of_placeholders_becomes_its_object() {
        let mut tokens = [7, 9, 9, 1, 9, 2, 9];
        replace(&mut tokens, 9, &[10, 20]);
        let (first, second) = (pad(10), pad(20));
        assert_eq!(tokens, [7, first, first, 1, second, 2, second]);
        let mut untouched = [9, 9];
        replace(&mut untouched, 9, &[]);
        assert_eq!(untouched, [9, 9]);
    }

    fn text(text: &str) -> Value<'_> {
        Value::Str(text.into())
    }

    fn keys_of<'v>(blocks: Vec<Vec<Value<'v>>>) -> Value<'v> {
        Value::List(blocks.into_iter().map(Value::List).collect())
    }

    #[test]
    fn keys_are_told_apart_by_form_and_place() {
        let digest = "a1b2c3d4e5f60718".repeat(4);
        let listed = keys_of(vec![
            vec![
                text("sql"),
                text(&digest),
                Value::List(vec![text("img-1"), Value::Int(-3)]),
                Value::Bytes(b"embeds".into()),
                text("tenant"),
            ],
            vec![text("sql"), text("tenant")],
        ]);
        let object = Key::Object(0xa1b2_c3d4_e5f6_0718);
        let image = Key::Object(0xccfa_f1de_5eb1_c585);
        let embeds = Key::Other(xxh3_64(b"embeds"));
        let tenant = Key::Other(xxh3_64(b"tenant"));
        let (keys, salt) = extra_keys(&listed, "sql", true);
        assert_eq!(salt.as_deref(), Some("tenant"));
        assert_eq!(keys, [vec![object, image, embeds], vec![tenant]]);
        // Below a parent the text means something else.
        let (keys, salt) = extra_keys(&listed, "sql", false);
        assert_eq!(salt, None);
        assert_eq!(keys, [vec![object, image, embeds, tenant], vec![tenant]]);
    }

    #[test]
    fn a_marked_salt_may_be_called_like_the_adapter() {
        let listed = keys_of(vec![vec![text("a"), text("dynamo-cache-salt:a")]]);
        let (keys, salt) = extra_keys(&listed, "a", false);
        assert_eq!((keys, salt.as_deref()), (vec![vec![]], Some("a")));
    }
}
