//! Engines' own messages mean the same to our normaliser and to Dynamo's, wherever Dynamo's takes
//! them.

use std::collections::BTreeMap;

use dynamo_kv_router::protocols::{KvCacheEventData, StorageTier, WorkerWithDpRank};
use dynamo_kv_router::zmq_wire::{ZmqEventNormalizer, decode_event_batch};
use kv_core::event::EventData;
use kv_core::hash::Seed;
use kv_core::id::Tier;
use kv_core::rng::Rng;
use kv_router::ingest::batch::Change;
use kv_router::ingest::engine::media::Media;
use kv_router::ingest::engine::{Encoding, Normaliser, Settings};
use serde_json::{Value, json};

const BLOCK_SIZE: u32 = 16;

/// Genuine messages in which the two differ, of two versions of vLLM.
const DIFFERING: [&str; 2] = ["06_stored_extra_keys_mm_salt.bin"; 2];

/// What an event comes to.
#[derive(Clone, Debug, PartialEq)]
enum Meaning {
    /// Tier, parent, and name and tokens' hash of each block.
    Stored(Tier, Option<u64>, Vec<(u64, u64)>),
    Removed(Tier, Vec<u64>),
    Cleared,
}

/// An engine that says what it does in any of the ways there are.
struct Engine {
    rng: Rng,
    names: u64,
    /// Blocks that children may be stored below.
    held: Vec<u64>,
    /// The media it has. Where children inherit salts, it has one tier alone.
    media: &'static [&'static str],
}

/// Media of all kinds, known and unknown.
const ANY: &[&str] = &[
    "GPU",
    "CPU",
    "CPU_PINNED",
    "CPU_TIER1",
    "CPU_TIER2",
    "DISK",
    "NVME",
    "STORAGE",
    "EXTERNAL",
    "SHARED",
    "DEVICE",
    "TAPE",
    "",
];

impl Engine {
    fn below(&mut self, n: usize) -> usize {
        self.rng.below(n)
    }

    fn one<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.rng.below(of.len())].clone()
    }

    fn place(&mut self) -> BTreeMap<&'static str, Value> {
        let mut place = BTreeMap::new();
        let medium = self.one(self.media);
        let spelled = if self.media == ANY || medium == "GPU" {
            vec![Value::Null, json!(medium), json!("GPU")]
        } else {
            vec![json!(medium)]
        };
        place.insert("medium", self.one(&spelled));
        // A group keeps its kind for good.
        let groups = [
            (json!(0), json!("full_attention")),
            (json!(1), json!("mamba")),
            (json!(2), json!("mla_attention")),
            (json!(3), json!("cross_attention")),
            (json!(4), json!("something_new")),
        ];
        let (group, kind) = self.one(&groups);
        if self.below(3) == 0 {
            place.insert("group_idx", group);
            if self.below(3) > 0 {
                place.insert("kv_cache_spec_kind", kind);
            }
        }
        if self.below(8) == 0 {
            place.insert(
                "locality",
                self.one(&[json!("LOCAL"), json!("REMOTE"), Value::Null]),
            );
        }
        place
    }

    fn name(&mut self) -> (u64, Value) {
        self.names += 1;
        let name = self.names.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        // As vLLM spells it or as SGLang does.
        let spelled = self.one(&[json!(name), json!(name.cast_signed())]);
        (name, spelled)
    }

    fn store(&mut self) -> Value {
        let count = 1 + self.below(4);
        let mut named: Vec<(u64, Value)> = (0..count).map(|_| self.name()).collect();
        if self.below(20) == 0 && !self.held.is_empty() {
            // Stored once more, maybe with another salt.
            let again = self.held[self.rng.below(self.held.len())];
            named[0] = (again, json!(again));
        }
        let parent = match self.held.len() {
            0 => Value::Null,
            n => {
                let at = self.below(n);
                let parent = self.held[at];
                let parent = if parent == named[0].0 {
                    Value::Null
                } else {
                    json!(parent)
                };
                self.one(&[Value::Null, parent])
            }
        };
        let names: Vec<u64> = named.iter().map(|(name, _)| *name).collect();
        let hashes: Vec<Value> = named.into_iter().map(|(_, spelled)| spelled).collect();
        let length = count * BLOCK_SIZE as usize;
        // Sometimes fewer than the blocks need.
        let length = length - [0, 0, 0, 5][self.below(4)];
        let tokens: Vec<u32> = (0..length).map(|_| self.below(150_000) as u32).collect();
        let tokens = if self.below(8) == 0 {
            let pairs = tokens.iter().zip(tokens.iter().skip(1).chain([&7]));
            json!(pairs.map(|(a, b)| [a, b]).collect::<Vec<_>>())
        } else {
            json!(tokens)
        };
        let mut fields = self.place();
        fields.insert("block_hashes", json!(hashes));
        fields.insert("parent_block_hash", parent.clone());
        fields.insert("token_ids", tokens);
        fields.insert("block_size", json!(BLOCK_SIZE));
        if self.below(3) == 0 {
            fields.insert("lora_id", json!(3));
            fields.insert("lora_name", json!("adapter-a"));
        }
        let is_salted = parent.is_null() && self.below(3) == 0;
        if is_salted {
            let salt = self.one(&["dynamo-cache-salt:a", "dynamo-cache-salt:tenant-1"]);
            let keys = std::iter::once(json!([salt])).chain(vec![Value::Null; count - 1]);
            fields.insert("extra_keys", Value::Array(keys.collect()));
        }
        // Over several tiers, what becomes of salts is the subject of tests below.
        if !is_salted || self.media != ANY {
            self.held.extend(names);
        } else {
            self.held.retain(|held| !names.contains(held));
        }
        let order = [
            "block_hashes",
            "parent_block_hash",
            "token_ids",
            "block_size",
            "lora_id",
            "medium",
            "lora_name",
            "extra_keys",
        ];
        self.shape("BlockStored", fields, &order)
    }

    fn remove(&mut self) -> Value {
        let mut fields = self.place();
        let names: Vec<u64> = (0..1 + self.below(3))
            .filter_map(|_| match self.held.len() {
                0 => None,
                n => {
                    let at = self.below(n);
                    Some(self.held.remove(at))
                }
            })
            .collect();
        fields.insert("block_hashes", json!(names));
        self.shape("BlockRemoved", fields, &["block_hashes", "medium"])
    }

    /// As a map, or as an array whose tail has all fields or none.
    fn shape(&mut self, tag: &str, fields: BTreeMap<&'static str, Value>, order: &[&str]) -> Value {
        if self.below(2) == 0 {
            let mut map: serde_json::Map<String, Value> =
                fields.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
            map.insert("type".into(), tag.into());
            return map.into();
        }
        let tail = [
            "group_idx",
            "kv_cache_spec_kind",
            "kv_cache_spec_sliding_window",
            "locality",
            "ownership",
        ];
        let field = |name: &&str| fields.get(*name).cloned().unwrap_or_default();
        let mut array = vec![json!(tag)];
        array.extend(order.iter().map(field));
        if tail.iter().any(|name| fields.contains_key(name)) {
            array.extend(tail.iter().map(field));
        }
        array.into()
    }

    fn event(&mut self) -> Value {
        match self.below(40) {
            0 => {
                self.held.clear();
                self.one(&[
                    json!(["AllBlocksCleared"]),
                    json!({"type": "AllBlocksCleared"}),
                ])
            }
            1 => json!(["Ignored"]),
            2..=24 => self.store(),
            _ => self.remove(),
        }
    }
}

/// Stores that name the kind of each group.
fn kinds() -> Vec<Value> {
    let kinds = [
        "full_attention",
        "mamba",
        "mla_attention",
        "cross_attention",
        "something_new",
    ];
    let said = kinds.iter().zip(0..).map(|(kind, group)| {
        json!({
            "type": "BlockStored", "block_hashes": [group], "parent_block_hash": null,
            "token_ids": vec![7; 16], "block_size": 16, "group_idx": group,
            "kv_cache_spec_kind": kind,
        })
    });
    said.collect()
}

fn settings(block_size: u32) -> Settings {
    Settings {
        block_size,
        media: Media::default(),
        families: Vec::new(),
        image_token: None,
    }
}

fn theirs(normaliser: &mut ZmqEventNormalizer, payload: &[u8]) -> Vec<(u32, Meaning)> {
    let batch = decode_event_batch(payload).unwrap_or_else(|e| panic!("{e}"));
    let rank = u32::try_from(batch.data_parallel_rank.unwrap_or(0)).unwrap();
    let worker = WorkerWithDpRank::new(7, rank);
    let mut meanings = Vec::new();
    for raw in batch.events {
        let Some(event) = normaliser.normalize(raw, 0, worker) else {
            continue;
        };
        let event = event.into_router_event().unwrap();
        let tier = match event.storage_tier {
            StorageTier::Device => Tier::Device,
            StorageTier::HostPinned => Tier::Host,
            StorageTier::Disk => Tier::Disk,
            StorageTier::External => Tier::External,
        };
        let meaning = match event.event.data {
            KvCacheEventData::Stored(stored) => {
                let blocks = stored.blocks.iter();
                let blocks: Vec<_> = blocks.map(|b| (b.block_hash.0, b.tokens_hash.0)).collect();
                let parent = stored.parent_hash.map(|hash| hash.0);
                Meaning::Stored(tier, parent, blocks)
            }
            KvCacheEventData::Removed(removed) => {
                Meaning::Removed(tier, removed.block_hashes.iter().map(|h| h.0).collect())
            }
            KvCacheEventData::Cleared => Meaning::Cleared,
        };
        meanings.push((rank, meaning));
    }
    meanings
}

fn ours(normaliser: &mut Normaliser, payload: &[u8]) -> Vec<(u32, Meaning)> {
    let changes = normaliser.batch(payload, Encoding::MsgPack).changes;
    let meaning = |change: Change| {
        let meaning = match change.data {
            EventData::Stored(stored) => {
                let blocks = stored.blocks.iter().map(|b| (b.block_hash, b.tokens_hash));
                Meaning::Stored(change.tier.unwrap(), stored.parent_hash, blocks.collect())
            }
            EventData::Removed(removed) => {
                Meaning::Removed(change.tier.unwrap(), removed.block_hashes)
            }
            EventData::Cleared => Meaning::Cleared,
        };
        (change.rank, meaning)
    };
    changes.into_iter().map(meaning).collect()
}

/// An event without blocks changes nothing: one may be said or left out.
fn is_something((_, meaning): &(u32, Meaning)) -> bool {
    match meaning {
        Meaning::Stored(_, _, blocks) => !blocks.is_empty(),
        Meaning::Removed(_, names) => !names.is_empty(),
        Meaning::Cleared => true,
    }
}

#[test]
fn messages_of_random_engines_mean_the_same() {
    let (mut events, mut meanings) = (0, 0);
    for seed in 0..2_000 {
        let mut engine = Engine {
            rng: Rng::new(seed),
            names: seed << 32,
            held: Vec::new(),
            media: [ANY, &["GPU"], &["CPU", "CPU_PINNED"]][seed as usize / 3 % 3],
        };
        let mut us = Normaliser::new(settings(BLOCK_SIZE), 0);
        let mut them = ZmqEventNormalizer::new(BLOCK_SIZE);
        let rank = [json!(null), json!(0), json!(1)][seed as usize % 3].clone();
        for at in 0..12 {
            let said: Vec<Value> = (0..engine.below(4)).map(|_| engine.event()).collect();
            // What kinds the groups are is said first: from events that it drops, Dynamo learns
            // nothing.
            let said = if at == 0 { kinds() } else { said };
            let payload = rmp_serde::to_vec(&json!([1.5, said, rank])).unwrap();
            let mut us = ours(&mut us, &payload);
            let mut them = theirs(&mut them, &payload);
            us.retain(is_something);
            them.retain(is_something);
            assert_eq!(us, them, "seed {seed}: {}", json!(said));
            events += said.len();
            meanings += us.len();
        }
    }
    println!("{events} events, {meanings} of them taken");
    assert!(
        events > 30_000 && meanings > events / 4,
        "{events} {meanings}"
    );
}

/// The genuine messages of engines that the sidecar's own tests are held against, as far as
/// Dynamo's decoder reads them.
#[test]
fn genuine_messages_mean_the_same() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../sidecar/tests/fixtures");
    let (mut compared, mut differing) = (0, Vec::new());
    let mut folders = vec![std::path::PathBuf::from(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let Ok(payload) = std::fs::read(&path) else {
                continue;
            };
            let Ok(batch) = decode_event_batch(&payload) else {
                continue;
            };
            let sizes = batch
                .events
                .iter()
                .filter_map(dynamo_kv_router::zmq_wire::RawKvEvent::block_size);
            let size = u32::try_from(sizes.max().unwrap_or(16)).unwrap();
            let mut us = ours(&mut Normaliser::new(settings(size), 0), &payload);
            let mut them = theirs(&mut ZmqEventNormalizer::new(size), &payload);
            us.retain(is_something);
            them.retain(is_something);
            if us != them {
                differing.push(path.file_name().unwrap().to_str().unwrap().to_owned());
            }
            compared += 1;
        }
    }
    differing.sort_unstable();
    // What differs in each is the subject of the tests below.
    assert_eq!(differing, DIFFERING);
    assert!(compared > 20, "{compared}");
}

/// What both make of one store of the tokens 0 to 15.
fn one_block(extra: &Value) -> (u64, u64) {
    let mut store = json!({
        "type": "BlockStored", "block_hashes": [5], "parent_block_hash": null,
        "token_ids": (0..16).collect::<Vec<u32>>(), "block_size": 16,
    });
    let extra = extra.as_object().unwrap().clone();
    store.as_object_mut().unwrap().extend(extra);
    let payload = rmp_serde::to_vec(&json!([1.5, [store], null])).unwrap();
    let us = ours(&mut Normaliser::new(settings(BLOCK_SIZE), 0), &payload);
    let them = theirs(&mut ZmqEventNormalizer::new(BLOCK_SIZE), &payload);
    let tokens = |meanings: &[(u32, Meaning)]| match meanings {
        [(0, Meaning::Stored(Tier::Device, None, blocks))] => blocks[0].1,
        other => panic!("{other:?}"),
    };
    (tokens(&us), tokens(&them))
}

/// Dynamo does not look at the number of an adapter without a name, so its blocks pass for the base
/// model's. To us they are blocks of their own, which no request asks for.
#[test]
fn an_adapter_with_a_number_alone_is_not_taken_for_the_base_model() {
    let base = Seed::default().block(&(0..16).collect::<Vec<u32>>());
    let (us, them) = one_block(&json!({"lora_id": 3}));
    assert_eq!(them, base);
    assert_ne!(us, base);
}

/// Dynamo takes a salt only with the mark of its own frontend, so blocks that a request salted pass
/// for anybody's. To us a first block's last key is a salt without it, too.
#[test]
fn a_salt_without_dynamos_mark_is_a_salt() {
    let tokens: Vec<u32> = (0..16).collect();
    let (us, them) = one_block(&json!({"extra_keys": [["tenant-1"]]}));
    assert_eq!(them, Seed::default().block(&tokens));
    assert_eq!(us, Seed::new("", "tenant-1").block(&tokens));
    let (us, them) = one_block(&json!({"extra_keys": [["dynamo-cache-salt:tenant-1"]]}));
    assert_eq!(us, them);
}

/// Makes both take stores and removals of single blocks, and gives what the last one's tokens hash
/// to: ours, Dynamo's.
fn last(said: &[Value]) -> (u64, u64) {
    let payload = rmp_serde::to_vec(&json!([1.5, said, null])).unwrap();
    let us = ours(&mut Normaliser::new(settings(BLOCK_SIZE), 0), &payload);
    let them = theirs(&mut ZmqEventNormalizer::new(BLOCK_SIZE), &payload);
    let tokens = |meanings: &[(u32, Meaning)]| match meanings.last() {
        Some((0, Meaning::Stored(_, _, blocks))) => blocks[0].1,
        other => panic!("{other:?}"),
    };
    (tokens(&us), tokens(&them))
}

fn stored(name: u64, parent: Option<u64>, medium: &str, salt: Option<&str>) -> Value {
    json!({
        "type": "BlockStored", "block_hashes": [name], "parent_block_hash": parent,
        "token_ids": (0..16).collect::<Vec<u32>>(), "block_size": 16, "medium": medium,
        "cache_salt": salt,
    })
}

/// Dynamo holds blocks on disk and in stores for unsalted unless they say otherwise, also below a
/// salted parent. Tokens that are cached under a salt are found with it alone, wherever they lie.
#[test]
fn a_child_on_disk_has_its_parents_salt() {
    let tokens: Vec<u32> = (0..16).collect();
    let (plain, salted) = (
        Seed::default().block(&tokens),
        Seed::new("", "a").block(&tokens),
    );
    let first = stored(1, None, "GPU", Some("a"));
    assert_eq!(
        last(&[first.clone(), stored(2, Some(1), "GPU", None)]),
        (salted, salted)
    );
    assert_eq!(
        last(&[first, stored(2, Some(1), "DISK", None)]),
        (salted, plain)
    );
}

/// Dynamo forgets a block's salt when the block leaves the host or the device, though it is still on
/// the other. To us a salt lasts as long as the block.
#[test]
fn a_salt_lasts_until_the_block_has_left_every_tier() {
    let tokens: Vec<u32> = (0..16).collect();
    let (plain, salted) = (
        Seed::default().block(&tokens),
        Seed::new("", "a").block(&tokens),
    );
    let removed =
        |medium: &str| json!({"type": "BlockRemoved", "block_hashes": [1], "medium": medium});
    let child = || stored(2, Some(1), "GPU", None);
    let both = [
        stored(1, None, "GPU", Some("a")),
        stored(1, None, "CPU", Some("a")),
    ];
    let after = |gone: &[&str]| {
        let gone = gone.iter().map(|medium| removed(medium));
        let said: Vec<Value> = both.iter().cloned().chain(gone).chain([child()]).collect();
        last(&said)
    };
    assert_eq!(after(&[]), (salted, salted));
    assert_eq!(after(&["CPU"]), (salted, plain));
    assert_eq!(after(&["GPU"]), (salted, plain));
    assert_eq!(after(&["CPU", "GPU"]), (plain, plain));
}

/// Dynamo drops a whole store in which a hash comes twice. The blocks before the repetition are a
/// sound chain that the engine holds: we take them.
#[test]
fn a_store_that_repeats_a_hash_is_taken_up_to_there() {
    let store = json!({
        "type": "BlockStored", "block_hashes": [5, 6, 5], "parent_block_hash": null,
        "token_ids": vec![7; 48], "block_size": 16,
    });
    let payload = rmp_serde::to_vec(&json!([1.5, [store], null])).unwrap();
    let us = ours(&mut Normaliser::new(settings(BLOCK_SIZE), 0), &payload);
    let them = theirs(&mut ZmqEventNormalizer::new(BLOCK_SIZE), &payload);
    let block = Seed::default().block(&[7; 16]);
    let taken = Meaning::Stored(Tier::Device, None, vec![(5, block), (6, block)]);
    assert_eq!(us, [(0, taken)]);
    assert!(!them.iter().any(is_something), "{them:?}");
}
