//! Changes in the words of engines.

use std::time::{SystemTime, UNIX_EPOCH};

use kv_publisher::Event;

use super::value::Value;
use super::zmq::Faults;
use crate::chain::Key;
use crate::change::Change;
use crate::flexkv;

/// How events are written on ZMQ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// vLLM's, events as maps.
    VllmMaps,
    /// An earlier vLLM's, events as lists.
    VllmLists,
    /// `SGLang`'s: a block to a store, signed hashes, short lists.
    Sglang,
}

/// A batch of events as MessagePack.
pub(super) fn batch(events: Vec<Value>, faults: &Faults) -> Vec<u8> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let mut batch = vec![
        Value::Float(since.map_or(0.0, |age| age.as_secs_f64())),
        Value::List(events),
    ];
    if !faults.short_batches {
        batch.push(Value::Uint(0));
    }
    Value::List(batch).pack()
}

/// The events of a change of the cache.
pub(super) fn events(
    dialect: Dialect,
    change: &Change,
    block_size: usize,
    faults: &Faults,
) -> Vec<Value> {
    let hash = |hash: u64| match dialect {
        _ if faults.bytes_hashes => {
            let mut bytes = vec![0xab; 24];
            bytes.extend(hash.to_be_bytes());
            Value::Bytes(bytes)
        }
        Dialect::Sglang => Value::Int(hash.cast_signed()),
        _ => Value::Uint(hash),
    };
    let size = Value::Uint(block_size as u64);
    match change {
        Change::Stored(run) if dialect == Dialect::Sglang => run
            .iter()
            .map(|key| stored(dialect, std::slice::from_ref(key), &hash, size.clone()))
            .collect(),
        Change::Stored(run) => vec![stored(dialect, run, &hash, size)],
        Change::Removed(run) => {
            let hashes = Value::List(run.iter().map(|h| hash(*h)).collect());
            vec![match dialect {
                Dialect::VllmMaps => Value::Map(vec![
                    ("type", Value::text("BlockRemoved")),
                    ("block_hashes", hashes),
                    ("medium", Value::text("GPU")),
                ]),
                Dialect::VllmLists => Value::List(vec![
                    Value::text("BlockRemoved"),
                    hashes,
                    Value::text("GPU"),
                ]),
                Dialect::Sglang => Value::List(vec![Value::text("BlockRemoved"), hashes]),
            }]
        }
        Change::Cleared => vec![match dialect {
            Dialect::VllmMaps => Value::Map(vec![("type", Value::text("AllBlocksCleared"))]),
            _ => Value::List(vec![Value::text("AllBlocksCleared")]),
        }],
    }
}

fn stored(dialect: Dialect, run: &[Key], hash: &dyn Fn(u64) -> Value, size: Value) -> Value {
    let hashes = Value::List(run.iter().map(|key| hash(key.engine_hash)).collect());
    let parent = run.first().and_then(|first| first.parent);
    let parent_hash = parent.map_or(Value::Nil, hash);
    let tokens = Value::tokens(run.iter().flat_map(|key| key.tokens.iter().copied()));
    let salt = run.first().map(|first| &first.salt);
    let salt = salt.filter(|salt| !salt.is_empty() && parent.is_none());
    let tag = Value::text("BlockStored");
    // The first block of a prompt alone tells the salt.
    let keys = salt.map_or(Value::Nil, |salt| {
        let mut keys = vec![Value::List(vec![Value::text(salt)])];
        keys.resize(run.len(), Value::Nil);
        Value::List(keys)
    });
    let medium = Value::text("GPU");
    match dialect {
        Dialect::VllmMaps => {
            let mut map = vec![
                ("type", tag),
                ("block_hashes", hashes),
                ("parent_block_hash", parent_hash),
                ("token_ids", tokens),
                ("block_size", size),
                ("lora_id", Value::Nil),
                ("medium", medium),
                ("lora_name", Value::Nil),
            ];
            if salt.is_some() {
                map.push(("extra_keys", keys));
            }
            map.push(("group_idx", Value::Uint(0)));
            Value::Map(map)
        }
        Dialect::VllmLists => Value::List(vec![
            tag,
            hashes,
            parent_hash,
            tokens,
            size,
            Value::Nil,
            medium,
            Value::Nil,
            keys,
        ]),
        Dialect::Sglang => {
            let mut list = vec![tag, hashes, parent_hash, tokens, size, Value::Nil];
            if let Some(salt) = salt {
                let salt = Value::Map(vec![("cache_salt", Value::text(salt))]);
                list.extend([medium, salt]);
            }
            Value::List(list)
        }
    }
}

/// The event of a change under the cache, as `FlexKV`'s collector writes it for vLLM: short lists
/// without token ids and parent, removed hashes with a sign.
pub(super) fn outside(change: &flexkv::Change, block_size: usize) -> Value {
    match change {
        flexkv::Change::Stored(medium, hashes) => Value::List(vec![
            Value::text("BlockStored"),
            Value::List(hashes.iter().map(|hash| Value::Uint(*hash)).collect()),
            Value::Nil,
            Value::List(Vec::new()),
            Value::Uint(block_size as u64),
            Value::Nil,
            Value::text(medium),
        ]),
        flexkv::Change::Removed(medium, hashes) => {
            let signed = hashes.iter().map(|hash| Value::Int(hash.cast_signed()));
            Value::List(vec![
                Value::text("BlockRemoved"),
                Value::List(signed.collect()),
                Value::text(medium),
            ])
        }
    }
}

/// A change under the cache as an engine of one's own posts it.
pub(super) fn post_outside(change: &flexkv::Change, block_size: usize) -> Event {
    match change {
        flexkv::Change::Stored(medium, hashes) => Event::BlockStored {
            block_hashes: hashes.clone(),
            parent_block_hash: None,
            token_ids: Vec::new(),
            block_size: u32::try_from(block_size).unwrap_or(u32::MAX),
            medium: Some((*medium).to_owned()),
            lora_name: None,
            cache_salt: None,
        },
        flexkv::Change::Removed(medium, hashes) => Event::BlockRemoved {
            block_hashes: hashes.clone(),
            medium: Some((*medium).to_owned()),
        },
    }
}

/// A change as an engine of one's own posts it.
pub(super) fn post(change: &Change, block_size: usize) -> Event {
    match change {
        Change::Stored(run) => Event::BlockStored {
            block_hashes: run.iter().map(|key| key.engine_hash).collect(),
            parent_block_hash: run.first().and_then(|first| first.parent),
            token_ids: run
                .iter()
                .flat_map(|key| key.tokens.iter().copied())
                .collect(),
            block_size: u32::try_from(block_size).unwrap_or(u32::MAX),
            medium: None,
            lora_name: None,
            cache_salt: run
                .first()
                .map(|first| first.salt.to_string())
                .filter(|salt| !salt.is_empty()),
        },
        Change::Removed(run) => Event::removed(run.clone()),
        Change::Cleared => Event::AllBlocksCleared {},
    }
}
