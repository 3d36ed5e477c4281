//! Messages that nobody should send: arbitrary ones, genuine ones with bytes changed, and good
//! events beside bad ones.

/// What the fuzz targets do.
#[path = "../../fuzz/src/lib.rs"]
pub mod targets;

use std::path::Path;

use kv_core::event::EventData;
use kv_router::ingest::engine::media::Media;
use kv_router::ingest::engine::{Encoding, Normaliser, Settings};
use proptest::prelude::*;
use proptest::sample::select;
use serde_json::{Value, json};

/// Changed messages to each target.
const MUTATIONS: usize = 20_000;

/// A generator of numbers that are the same each time (SplitMix64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.roll() % end.max(1) as u64) as usize
    }
}

/// Changes a message in up to eight places.
fn mutated(dice: &mut Dice, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = corpus[dice.below(corpus.len())].clone();
    for _ in 0..=dice.below(8) {
        let at = dice.below(bytes.len() + 1);
        match dice.below(6) {
            0 if at < bytes.len() => bytes[at] ^= 1 << dice.below(8),
            // Markers of both encodings, and what is often at their edges.
            1 if at < bytes.len() => {
                let edges = b"\x80\x90\x91\xa0\xc0\xc1\xc4\xc6\xc9\xcb\xcf\xd3\xd9\xdc\xdd\xde\xdf\xff\x00[]{}\",:-e\\0";
                bytes[at] = edges[dice.below(edges.len())];
            }
            2 => bytes.insert(at, dice.roll() as u8),
            3 if at < bytes.len() => drop(bytes.remove(at)),
            4 => bytes.truncate(at),
            _ => {
                let other = &corpus[dice.below(corpus.len())];
                let from = dice.below(other.len());
                let to = from + dice.below(64.min(other.len() - from) + 1);
                bytes.splice(at..at, other[from..to].iter().copied());
            }
        }
    }
    bytes
}

#[test]
fn genuine_messages_with_bytes_changed_bring_no_decoder_down() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let messages = targets::corpus(&fixtures).expect("the fixtures");
    assert!(messages.len() > 80);
    for (i, target) in targets::TARGETS.iter().enumerate() {
        let mut dice = Dice(i as u64);
        let wrapped = messages.iter().map(|message| (target.wrap)(message));
        let corpus: Vec<Vec<u8>> = wrapped.collect();
        corpus.iter().for_each(|input| (target.run)(input));
        for _ in 0..MUTATIONS / target.cost {
            (target.run)(&mutated(&mut dice, &corpus));
        }
    }
}

/// Texts that mean something in events.
const NAMES: [&str; 11] = [
    "BlockStored",
    "BlockRemoved",
    "AllBlocksCleared",
    "Ignored",
    "GPU",
    "CPU",
    "REMOTE",
    "mamba",
    "stored",
    "updated",
    "é",
];

/// Keys of events.
const KEYS: [&str; 18] = [
    "type",
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "medium",
    "lora_name",
    "cache_salt",
    "extra_keys",
    "block_mm_infos",
    "mm_objects",
    "group_idx",
    "data",
    "blocks",
    "tokens",
    "block_hash",
    "event_id",
    "events",
];

/// A value with names that events have.
fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (0_u64..70).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        select(&NAMES[..]).prop_map(Value::from),
        ".{0,20}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 48, 12, move |inner| {
        let map = prop::collection::vec((select(&KEYS[..]), inner.clone()), 0..10);
        let map = map.prop_map(|entries| {
            let entries = entries
                .into_iter()
                .map(|(key, value)| (key.to_owned(), value));
            Value::Object(entries.collect())
        });
        prop_oneof![
            prop::collection::vec(inner, 0..10).prop_map(Value::Array),
            map
        ]
    })
}

fn good(name: u64) -> Value {
    let tokens: Vec<u64> = (name..name + 16).collect();
    json!(["BlockStored", [name], null, tokens, 16, null, "GPU"])
}

fn normaliser() -> Normaliser {
    let settings = Settings {
        block_size: 16,
        media: Media::default(),
        families: Vec::new(),
        image_token: None,
    };
    Normaliser::new(settings, 0)
}

/// What comes of the good events of a batch, which have names from 1000 on.
fn of_good(batch: &Value) -> Vec<EventData> {
    let packed = rmp_serde::to_vec(batch).unwrap();
    let taken = normaliser().batch(&packed, Encoding::MsgPack);
    let text = normaliser().batch(batch.to_string().as_bytes(), Encoding::Json);
    assert_eq!(taken, text);
    let stores = taken.changes.into_iter().map(|change| change.data);
    let is_good = |data: &EventData| match data {
        EventData::Stored(stored) => stored.blocks[0].block_hash >= 1000,
        _ => false,
    };
    stores.filter(is_good).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn arbitrary_bytes_bring_no_decoder_down(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        for target in targets::TARGETS {
            (target.run)(&bytes);
        }
    }

    #[test]
    fn arbitrary_values_bring_no_decoder_down(value in value()) {
        let packed = rmp_serde::to_vec(&value).unwrap();
        let text = value.to_string().into_bytes();
        for target in targets::TARGETS {
            (target.run)(&packed);
            (target.run)(&text);
        }
    }

    #[test]
    fn an_event_touches_no_other(bad in value()) {
        let small = |value: &Value| !value.to_string().contains("1000");
        prop_assume!(small(&bad));
        let alone = of_good(&json!([0, [good(1000), good(1001), good(1002)], 0]));
        let beside = of_good(&json!([0, [good(1000), &bad, good(1001), &bad, good(1002)], 0]));
        let beside: Vec<_> = beside.into_iter().filter(|data| alone.contains(data)).collect();
        prop_assert_eq!(alone, beside);
    }
}
