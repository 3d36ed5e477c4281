//! The dictionaries of TensorRT-LLM's `POST /kv_cache_events`.

use kv_core::id::Tier;

use super::event::{Lora, hashes, number, text};
use super::hash::hash;
use super::keys::{BlockKeys, Key, mm_hash};
use super::value::Value;
use crate::ingest::Rejection;

/// One dictionary.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Event {
    /// Its number; grows by one in each rank.
    pub(super) id: Option<u64>,
    /// Tokens that the cache's attention window spans.
    pub(super) window: Option<u64>,
    /// Attention-parallel rank.
    pub(super) rank: Option<u32>,
    pub(super) data: Data,
}

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Data {
    /// A cache of this window came into being.
    Created,
    /// Blocks were stored.
    Stored(Stored),
    /// Blocks were dropped from all levels.
    Removed(Vec<u64>),
    /// A block moved to another level, or changed its priority only.
    Updated { hash: u64, level: Option<u64> },
}

/// Blocks in chain order.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Stored {
    pub(super) parent: Option<u64>,
    pub(super) lora: Lora,
    pub(super) salt: Option<String>,
    pub(super) blocks: Vec<Block>,
}

/// One block.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Block {
    pub(super) hash: u64,
    pub(super) tokens: Vec<u32>,
    pub(super) level: u64,
    pub(super) keys: BlockKeys,
}

/// The tier of a cache level: 0 is the accelerator, 1 the host.
pub(super) fn tier(level: u64) -> Tier {
    match level {
        0 => Tier::Device,
        1 => Tier::Host,
        _ => Tier::Disk,
    }
}

/// Reads a dictionary.
pub(super) fn read(map: &Value<'_>) -> Result<Event, Rejection> {
    let get = |key| map.get(key).unwrap_or(&Value::Nil);
    let data = get("data");
    let of = |key| data.get(key).unwrap_or(&Value::Nil);
    let data = match of("type").text().ok_or(Rejection::Malformed)? {
        "created" => Data::Created,
        "stored" => Data::Stored(stored(data)?),
        "removed" => Data::Removed(hashes(of("block_hashes"), None)?),
        "updated" => Data::Updated {
            hash: hash(of("block_hash"), None).ok_or(Rejection::Malformed)?,
            level: match of("cache_level").get("new_value") {
                Some(level) => number(level)?,
                None => None,
            },
        },
        _ => return Err(Rejection::UnknownEvent),
    };
    Ok(Event {
        id: number(get("event_id"))?,
        window: number(get("window_size"))?,
        rank: number(get("attention_dp_rank"))?,
        data,
    })
}

fn stored(data: &Value<'_>) -> Result<Stored, Rejection> {
    let get = |key| data.get(key).unwrap_or(&Value::Nil);
    let blocks = get("blocks").list().ok_or(Rejection::Malformed)?;
    if blocks.len() > crate::ingest::MAX_EVENT_BLOCKS {
        return Err(Rejection::TooManyBlocks);
    }
    let name = text(get("lora_name"))?.filter(|name| !name.is_empty());
    let lora = match (name, get("lora_id")) {
        (Some(name), _) => Lora::Named(name),
        (None, Value::Int(id)) if *id != 0 => Lora::Numbered(*id),
        _ => Lora::None,
    };
    Ok(Stored {
        parent: match get("parent_hash") {
            Value::Nil => None,
            parent => Some(hash(parent, None).ok_or(Rejection::Malformed)?),
        },
        lora,
        salt: text(get("cache_salt"))?.filter(|salt| !salt.is_empty()),
        blocks: blocks.iter().map(block).collect::<Result<_, _>>()?,
    })
}

fn block(block: &Value<'_>) -> Result<Block, Rejection> {
    let get = |key| block.get(key).unwrap_or(&Value::Nil);
    let mut tokens = Vec::new();
    let mut keys = BlockKeys::new();
    for token in get("tokens").list().unwrap_or_default() {
        let id = token.get("token_id").unwrap_or(token);
        tokens.push(id.number::<u32>().ok_or(Rejection::Malformed)?);
    }
    for key in get("mm_keys").list().unwrap_or_default() {
        let identifier = key.get("hash").and_then(Value::text);
        keys.extend(identifier.and_then(mm_hash).map(Key::Object));
    }
    if keys.is_empty() {
        // Set for tokens that stand for something else, such as a part of an image or a prompt table.
        let tokens = get("tokens").list().unwrap_or_default().iter();
        let extra = tokens.filter_map(|token| hash(token.get("token_extra_id")?, None));
        keys.extend(extra.filter(|extra| *extra != 0).map(Key::Other));
        keys.dedup();
    }
    Ok(Block {
        hash: hash(get("block_hash"), None).ok_or(Rejection::Malformed)?,
        tokens,
        level: number(get("cache_level"))?.unwrap_or_default(),
        keys,
    })
}
