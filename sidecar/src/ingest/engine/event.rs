//! Events as vLLM, SGLang and those that follow them send them: tagged lists or maps.
//!
//! Positions of a list are those of vLLM. What stands after the extra keys differs between
//! versions and is told apart by type. Anything further is ignored, in lists and in maps.

use kv_core::id::Family;

use super::hash::hash;
use super::keys::{BlockKeys, Key, extra_keys, mm_infos};
use super::value::Value;
use crate::ingest::{MAX_EVENT_BLOCKS, Rejection};

/// One event.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Event {
    /// Blocks were stored.
    Stored(Stored),
    /// Blocks were dropped.
    Removed(Removed),
    /// Everything was dropped, on a medium or on all. Senders of lists disagree on whether a medium
    /// or an owner follows; it is the owner here.
    Cleared {
        medium: Option<String>,
        ownership: Option<String>,
    },
    /// Of TensorRT-LLM's own form.
    TrtLlm(super::trtllm::Event),
    /// Of a store of objects.
    Object(super::objects::Object),
}

/// Blocks in chain order.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Stored {
    pub(super) hashes: Vec<u64>,
    pub(super) parent: Option<u64>,
    pub(super) tokens: Tokens,
    pub(super) block_size: Option<u32>,
    pub(super) lora: Lora,
    pub(super) salt: Option<String>,
    /// By block; may be shorter.
    pub(super) keys: Vec<BlockKeys>,
    pub(super) place: Place,
}

/// Dropped blocks.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Removed {
    pub(super) hashes: Vec<u64>,
    pub(super) place: Place,
}

/// Token ids of blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Tokens {
    /// One after the other.
    pub(super) ids: Vec<u32>,
    /// EAGLE: they came as pairs with their successor, so that there is one more at the end.
    pub(super) eagle: bool,
}

/// The adapter of a store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Lora {
    /// The model itself.
    #[default]
    None,
    /// By the name that requests use.
    Named(String),
    /// By a number that only the engine knows.
    Numbered(i128),
}

/// What decides whether blocks are wanted, and on which tier they are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) medium: Option<String>,
    pub(super) group: Option<u32>,
    pub(super) kind: Option<String>,
    pub(super) window: Option<u32>,
    pub(super) locality: Option<String>,
    pub(super) ownership: Option<String>,
}

/// Names of a stored event, as vLLM and as our own schema have it.
const STORED: [&str; 2] = ["BlockStored", "stored"];
const REMOVED: [&str; 2] = ["BlockRemoved", "removed"];
const CLEARED: [&str; 2] = ["AllBlocksCleared", "cleared"];

/// Reads an event of any form. `family` tells what the names of blocks on a medium are hashes of.
///
/// # Errors
/// Why it can't be used.
pub(super) fn read(
    value: &Value<'_>,
    family: impl Fn(Option<&str>) -> Option<Family>,
) -> Result<Event, Rejection> {
    match value {
        Value::List(list) => {
            let tag = list.first().and_then(Value::text);
            let tag = tag.ok_or(Rejection::Malformed)?;
            of_list(tag, list, family)
        }
        Value::Map(_) => match value.get("type").and_then(Value::text) {
            Some(tag) => of_map(tag, value, family),
            None if value.get("data").is_some() => {
                let event = super::trtllm::read(value)?;
                Ok(Event::TrtLlm(event))
            }
            None => match super::objects::Object::read(value) {
                Some(object) => Ok(Event::Object(object?)),
                None => Err(Rejection::Malformed),
            },
        },
        _ => Err(Rejection::Malformed),
    }
}

fn of_map(
    tag: &str,
    map: &Value<'_>,
    family: impl Fn(Option<&str>) -> Option<Family>,
) -> Result<Event, Rejection> {
    let get = |key| map.get(key).unwrap_or(&Value::Nil);
    if CLEARED.contains(&tag) {
        let said = |key| get(key).text().map(str::to_owned);
        return Ok(Event::Cleared {
            medium: said("medium"),
            ownership: said("ownership"),
        });
    }
    let place = Place {
        medium: text(get("medium"))?,
        group: number(get("group_idx"))?,
        kind: text(get("kv_cache_spec_kind"))?,
        window: number(get("kv_cache_spec_sliding_window"))?,
        locality: text(get("locality"))?,
        ownership: text(get("ownership"))?,
    };
    let family = family(place.medium.as_deref());
    if REMOVED.contains(&tag) {
        let hashes = hashes(get("block_hashes"), family)?;
        return Ok(Event::Removed(Removed { hashes, place }));
    }
    if !STORED.contains(&tag) {
        return Err(unknown(tag));
    }
    let lora = lora(get("lora_name"), get("lora_id"))?;
    let salt = text(get("cache_salt"))?;
    let keys = (get("extra_keys"), get("block_mm_infos"));
    stored(
        [
            get("block_hashes"),
            get("parent_block_hash"),
            get("token_ids"),
            get("block_size"),
        ],
        lora,
        salt,
        keys,
        place,
        family,
    )
}

fn of_list(
    tag: &str,
    list: &[Value<'_>],
    family: impl Fn(Option<&str>) -> Option<Family>,
) -> Result<Event, Rejection> {
    let at = |i: usize| list.get(i).unwrap_or(&Value::Nil);
    if CLEARED.contains(&tag) {
        return Ok(Event::Cleared {
            medium: None,
            ownership: at(1).text().map(str::to_owned),
        });
    }
    if REMOVED.contains(&tag) {
        let mut place = place_of_tail(list.get(3..).unwrap_or_default());
        place.medium = text(at(2))?;
        let hashes = hashes(at(1), family(place.medium.as_deref()))?;
        return Ok(Event::Removed(Removed { hashes, place }));
    }
    if !STORED.contains(&tag) {
        return Err(unknown(tag));
    }
    // In the place of the adapter's name SGLang has a map of what tells its requests apart.
    let (named, salt) = match at(7) {
        map @ Value::Map(_) => (
            map.get("lora_name").unwrap_or(&Value::Nil),
            text(map.get("cache_salt").unwrap_or(&Value::Nil))?,
        ),
        other => (other, None),
    };
    let tail = list.get(8..).unwrap_or_default();
    let (keys, tail) = match tail {
        [keys @ (Value::List(_) | Value::Nil), rest @ ..] => (keys, rest),
        rest => (&Value::Nil, rest),
    };
    let is_infos = |value: &&Value<'_>| matches!(value, Value::List(_));
    let infos = tail.iter().find(is_infos).unwrap_or(&Value::Nil);
    let mut place = place_of_tail(tail);
    place.medium = text(at(6))?;
    let family = family(place.medium.as_deref());
    let lora = lora(named, at(5))?;
    stored(
        [at(1), at(2), at(3), at(4)],
        lora,
        salt,
        (keys, infos),
        place,
        family,
    )
}

fn unknown(tag: &str) -> Rejection {
    if tag == "Ignored" {
        Rejection::Ignored
    } else {
        Rejection::UnknownEvent
    }
}

fn stored(
    [names, parent, token_ids, block_size]: [&Value<'_>; 4],
    lora: Lora,
    salt: Option<String>,
    (keys, infos): (&Value<'_>, &Value<'_>),
    place: Place,
    family: Option<Family>,
) -> Result<Event, Rejection> {
    let mut stored = Stored {
        hashes: hashes(names, family)?,
        parent: match parent {
            Value::Nil => None,
            parent => Some(hash(parent, family).ok_or(Rejection::Malformed)?),
        },
        tokens: tokens(token_ids)?,
        block_size: number(block_size)?,
        keys: mm_infos(infos),
        lora,
        salt: salt.filter(|salt| !salt.is_empty()),
        place,
    };
    let name = match &stored.lora {
        Lora::Named(name) => name.as_str(),
        Lora::None | Lora::Numbered(_) => "",
    };
    let (keys, salt) = extra_keys(keys, name, stored.parent.is_none() && stored.salt.is_none());
    stored.salt = stored.salt.or(salt);
    if stored.keys.iter().all(Vec::is_empty) {
        stored.keys = keys;
    } else {
        // The same objects once more; what else shapes the hashes is only among the keys.
        for (i, keys) in keys.into_iter().enumerate() {
            let others = keys.into_iter().filter(|key| matches!(key, Key::Other(_)));
            if let Some(block) = stored.keys.get_mut(i) {
                block.extend(others);
            }
        }
    }
    Ok(Event::Stored(stored))
}

/// What follows the named positions. At least four of the right types stand in a fixed order:
/// group, kind, window, locality, ownership. Fewer come in the order of their types.
fn place_of_tail(tail: &[Value<'_>]) -> Place {
    let number = |at: usize| tail.get(at).and_then(Value::number::<u32>);
    let text = |at: usize| tail.get(at).and_then(Value::text).map(str::to_owned);
    let is_fixed = tail.len() >= 4
        && tail
            .iter()
            .take(5)
            .enumerate()
            .all(|(i, value)| match value {
                Value::Nil => true,
                Value::Int(_) => i == 0 || i == 2,
                Value::Str(_) => i == 1 || i > 2,
                _ => false,
            });
    if is_fixed {
        return Place {
            group: number(0),
            kind: text(1),
            window: number(2),
            locality: text(3),
            ownership: text(4),
            medium: None,
        };
    }
    let mut numbers = tail.iter().filter_map(Value::number::<u32>);
    let mut texts = tail.iter().filter_map(Value::text).map(str::to_owned);
    Place {
        group: numbers.next(),
        window: numbers.next(),
        kind: texts.next(),
        locality: texts.next(),
        ownership: texts.next(),
        medium: None,
    }
}

/// Text or nothing.
pub(super) fn text(value: &Value<'_>) -> Result<Option<String>, Rejection> {
    match value {
        Value::Nil => Ok(None),
        Value::Str(text) => Ok(Some(text.to_string())),
        _ => Err(Rejection::Malformed),
    }
}

/// A number that fits or nothing.
pub(super) fn number<N: TryFrom<i128>>(value: &Value<'_>) -> Result<Option<N>, Rejection> {
    match value {
        Value::Nil => Ok(None),
        value => value.number().map(Some).ok_or(Rejection::Malformed),
    }
}

/// An adapter's name, else its number; 0 is the model itself.
fn lora(name: &Value<'_>, number: &Value<'_>) -> Result<Lora, Rejection> {
    match (text(name)?, number) {
        (Some(name), _) if !name.is_empty() => Ok(Lora::Named(name)),
        (_, Value::Int(number)) if *number != 0 => Ok(Lora::Numbered(*number)),
        _ => Ok(Lora::None),
    }
}

/// Names of blocks.
pub(super) fn hashes(value: &Value<'_>, family: Option<Family>) -> Result<Vec<u64>, Rejection> {
    let list = value.list().ok_or(Rejection::Malformed)?;
    if list.len() > MAX_EVENT_BLOCKS {
        return Err(Rejection::TooManyBlocks);
    }
    let hashes = list.iter().map(|value| hash(value, family));
    hashes.collect::<Option<_>>().ok_or(Rejection::Malformed)
}

/// Token ids, flat or as pairs.
fn tokens(value: &Value<'_>) -> Result<Tokens, Rejection> {
    let list = match value {
        Value::Nil => return Ok(Tokens::default()),
        value => value.list().ok_or(Rejection::Malformed)?,
    };
    let eagle = matches!(list.first(), Some(Value::List(_)));
    let mut ids = Vec::with_capacity(list.len() + 1);
    let mut last = None;
    for value in list {
        let id = if eagle {
            let Some([first, second]) = value.list() else {
                return Err(Rejection::Malformed);
            };
            last = second.number::<u32>();
            first
        } else {
            value
        };
        ids.push(id.number::<u32>().ok_or(Rejection::Malformed)?);
    }
    if eagle {
        ids.push(last.ok_or(Rejection::Malformed)?);
    }
    Ok(Tokens { ids, eagle })
}
