//! Messages that vLLM and SGLang published, dictionaries of TensorRT-LLM's serializer, and what is
//! made of them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use kv_core::event::{EventData, Stored};
use kv_core::hash::{CHAIN_SEED, Seed};
use kv_core::id::{Family, Tier};
use kv_router::ingest::Rejection;
use kv_router::ingest::batch::Change;
use kv_router::ingest::engine::media::Media;
use kv_router::ingest::engine::{Encoding, Normalised, Normaliser, Settings, mm_hash};
use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64_with_seed;

const HELD_BY_ENGINES: [&str; 3] = ["vllm", "vllm-0.20.0", "sglang"];

fn folder(name: &str) -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    tests.join("fixtures").join(name)
}

fn normaliser(block_size: u32) -> Normaliser {
    let settings = Settings {
        block_size,
        media: Media::default(),
        families: Vec::new(),
        image_token: None,
    };
    Normaliser::new(settings, 0)
}

fn payload(name: &str) -> Vec<u8> {
    std::fs::read(folder(&format!("{name}.bin"))).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn described(name: &str) -> Value {
    let text = std::fs::read(folder(&format!("{name}.json"))).expect("the description");
    serde_json::from_slice(&text).expect("JSON")
}

/// What a description says the message holds, with bytes as JSON can say them.
fn as_json(value: &Value) -> Value {
    match value {
        Value::Object(map) => match map.get("$bytes_hex") {
            Some(Value::String(hex)) => Value::from(hex[hex.len() - 16..].to_owned()),
            _ => map.iter().map(|(k, v)| (k.clone(), as_json(v))).collect(),
        },
        Value::Array(list) => list.iter().map(as_json).collect(),
        other => other.clone(),
    }
}

fn names() -> Vec<String> {
    let mut names = Vec::new();
    for engine in HELD_BY_ENGINES {
        for entry in std::fs::read_dir(folder(engine)).expect("the fixtures") {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|e| e == "bin") {
                let stem = path.file_stem().unwrap().to_str().unwrap();
                names.push(format!("{engine}/{stem}"));
            }
        }
    }
    names.sort();
    names
}

fn taken(name: &str, block_size: u32) -> Normalised {
    normaliser(block_size).batch(&payload(name), Encoding::MsgPack)
}

fn changes(name: &str, block_size: u32) -> Vec<Change> {
    let taken = taken(name, block_size);
    assert_eq!(taken.rejected, [], "{name}");
    taken.changes
}

fn only(name: &str, block_size: u32) -> Change {
    let [change] = <[Change; 1]>::try_from(changes(name, block_size)).expect("one change");
    change
}

fn stored(change: &Change) -> &Stored {
    match &change.data {
        EventData::Stored(stored) => stored,
        other => panic!("not stored: {other:?}"),
    }
}

fn hashes(stored: &Stored) -> Vec<u64> {
    stored.blocks.iter().map(|b| b.block_hash).collect()
}

/// Token ids of an event of a description, wherever its form has them.
fn tokens(event: &Value) -> Vec<u32> {
    let ids = event.get("token_ids").unwrap_or(&event[3]);
    let ids = ids.as_array().expect("token ids");
    ids.iter()
        .map(|id| u32::try_from(id.as_u64().unwrap()).unwrap())
        .collect()
}

fn described_tokens(name: &str) -> Vec<u32> {
    let events = &described(name)["wire_decoded"][1];
    let stores = events.as_array().unwrap().iter();
    let tags = |e: &Value| e["type"].as_str().or(e[0].as_str()).unwrap().to_owned();
    stores
        .filter(|e| tags(e) == "BlockStored")
        .flat_map(tokens)
        .collect()
}

fn tokens_hashes(stored: &Stored) -> Vec<u64> {
    stored.blocks.iter().map(|b| b.tokens_hash).collect()
}

fn expected(tokens: &[u32], block_size: usize, seed: Seed) -> Vec<u64> {
    tokens
        .chunks_exact(block_size)
        .map(|block| seed.block(block))
        .collect()
}

#[test]
fn every_message_means_the_same_in_both_encodings() {
    let names = names();
    assert_eq!(names.len(), 15 + 14 + 7);
    for name in names {
        let json = as_json(&described(&name)["wire_decoded"]).to_string();
        for block_size in [1, 16, 64] {
            let json = normaliser(block_size).batch(json.as_bytes(), Encoding::Json);
            assert_eq!(taken(&name, block_size), json, "{name}");
        }
    }
}

#[test]
fn every_message_of_vllm_is_understood_in_either_form() {
    for version in ["vllm", "vllm-0.20.0"] {
        let file = |name: &str| format!("{version}/{name}");
        let first = only(&file("01_stored_first"), 16);
        assert_eq!((first.rank, first.tier), (0, Some(Tier::Device)));
        assert_eq!(first.family, Family::Dynamo);
        let blocks = stored(&first);
        assert_eq!((blocks.parent_hash, blocks.start_position), (None, None));
        assert_eq!(hashes(blocks), [11_156_993_415_343_708_881]);
        let ids = described_tokens(&file("01_stored_first"));
        assert_eq!(tokens_hashes(blocks), expected(&ids, 16, Seed::default()));

        let many = only(&file("02_stored_multi"), 16);
        let blocks = stored(&many);
        assert_eq!(blocks.parent_hash, Some(11_156_993_415_343_708_881));
        assert_eq!(blocks.blocks.len(), 8);
        assert_eq!(blocks.blocks[7].block_hash, 16_891_508_959_540_787_150);
        let ids = described_tokens(&file("02_stored_multi"));
        assert_eq!(tokens_hashes(blocks), expected(&ids, 16, Seed::default()));

        let bytes = only(&file("03_stored_bytes_hash"), 16);
        let blocks = stored(&bytes);
        assert_eq!(blocks.parent_hash, Some(0x2777_8ea5_fcc8_21ee));
        assert_eq!(
            hashes(blocks),
            [0x9ad5_9a66_22ef_1ad1, 0x9343_e9a7_51d5_9191]
        );

        let adapter = only(&file("04_stored_lora"), 16);
        let ids = described_tokens(&file("04_stored_lora"));
        let of_adapter = expected(&ids, 16, Seed::new("sql-adapter", ""));
        assert_eq!(tokens_hashes(stored(&adapter)), of_adapter);

        let host = only(&file("05_stored_cpu_medium"), 16);
        assert_eq!(host.tier, Some(Tier::Host));

        let objects = only(&file("06_stored_extra_keys_mm_salt"), 16);
        let ids = described_tokens(&file("06_stored_extra_keys_mm_salt"));
        let image = "a1b2c3d4e5f60718".repeat(4);
        let image = mm_hash(&image).unwrap();
        let text = xxhash_rust::xxh3::xxh3_64(b"tenant-salt");
        let with = |tokens: &[u32], key: u64| {
            let bytes = tokens.iter().flat_map(|t| t.to_le_bytes());
            let bytes: Vec<u8> = bytes.chain(key.to_le_bytes()).collect();
            xxh3_64_with_seed(&bytes, CHAIN_SEED)
        };
        let mixed = [with(&ids[..16], image), with(&ids[16..], text)];
        assert_eq!(tokens_hashes(stored(&objects)), mixed);

        let window = taken(&file("07_stored_group1_swa"), 16);
        let refused = match version {
            "vllm" => Rejection::AttentionKind,
            // This version names the group alone.
            _ => Rejection::UnlearnedGroup,
        };
        assert_eq!((window.changes, window.rejected), (vec![], vec![refused]));

        let removed = only(&file("08_removed"), 16);
        assert_eq!(removed.tier, Some(Tier::Device));
        let EventData::Removed(gone) = &removed.data else {
            panic!("{removed:?}");
        };
        assert_eq!(gone.block_hashes, [16_891_508_959_540_787_150]);

        let host = only(&file("09_removed_multi_cpu"), 16);
        assert_eq!(host.tier, Some(Tier::Host));
        assert!(matches!(&host.data, EventData::Removed(r) if r.block_hashes.len() == 3));

        let cleared = only(&file("10_cleared"), 16);
        assert_eq!((cleared.tier, cleared.data), (None, EventData::Cleared));

        let step = changes(&file("11_mixed_step"), 16);
        let kinds: Vec<bool> = step
            .iter()
            .map(|change| matches!(change.data, EventData::Stored(_)))
            .collect();
        assert_eq!(kinds, [false, false, true]);

        let rank = only(&file("12_dp_rank3"), 64);
        assert_eq!((rank.rank, stored(&rank).blocks.len()), (3, 1));
        assert_eq!(only(&file("13_dp_none"), 16).rank, 0);
        assert_eq!(changes(&file("14_empty_events"), 16), []);
    }
    let remote = taken("vllm/15_all_optional", 16);
    assert_eq!(
        (remote.changes, remote.rejected),
        (vec![], vec![Rejection::Ownership])
    );
}

#[test]
fn a_batch_without_rank_is_of_the_rank_whose_stream_it_is() {
    let settings = Settings {
        block_size: 16,
        media: Media::default(),
        families: Vec::new(),
        image_token: None,
    };
    let mut normaliser = Normaliser::new(settings, 5);
    let mut rank = |name| {
        let taken = normaliser.batch(&payload(name), Encoding::MsgPack);
        taken.changes[0].rank
    };
    assert_eq!(rank("vllm/13_dp_none"), 5);
    assert_eq!(rank("vllm/12_dp_rank3"), 3);
}

#[test]
fn a_long_engine_block_is_cut_and_one_remove_clears_all_of_it() {
    let mut normaliser = normaliser(16);
    let taken = normaliser.batch(&payload("vllm/12_dp_rank3"), Encoding::MsgPack);
    assert_eq!(taken.rejected, []);
    let blocks = stored(&taken.changes[0]);
    let ids = described_tokens("vllm/12_dp_rank3");
    assert_eq!(tokens_hashes(blocks), expected(&ids, 16, Seed::default()));
    let names = hashes(blocks);
    assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), 4);
    assert_eq!(names[3], 13_185_905_108_976_998_604);
    let remove = r#"[0, [["BlockRemoved", [13185905108976998604], "GPU"]], 3]"#;
    let taken = normaliser.batch(remove.as_bytes(), Encoding::Json);
    let EventData::Removed(removed) = &taken.changes[0].data else {
        panic!("{taken:?}");
    };
    assert_eq!(removed.block_hashes, names);
}

#[test]
fn every_message_of_sglang_is_understood() {
    let first = only("sglang/01_stored_first", 1);
    assert_eq!(hashes(stored(&first)), [0x9ad5_9a66_22ef_1ad1]);
    assert_eq!(first.tier, Some(Tier::Device));
    // The default page of one token is shorter than a block.
    let short = taken("sglang/01_stored_first", 16);
    assert_eq!(short.rejected, [Rejection::BlockSizeMismatch]);

    let pages = changes("sglang/02_stored_signed", 64);
    let ids = described_tokens("sglang/02_stored_signed");
    let found: Vec<u64> = pages
        .iter()
        .flat_map(|p| tokens_hashes(stored(p)))
        .collect();
    assert_eq!(found, expected(&ids, 64, Seed::default()));
    assert_eq!(stored(&pages[0]).parent_hash, Some(0x9ad5_9a66_22ef_1ad1));
    for pair in pages.windows(2) {
        let before = hashes(stored(&pair[0]));
        assert_eq!(stored(&pair[1]).parent_hash, before.last().copied());
    }

    assert_eq!(only("sglang/03_removed", 64).tier, Some(Tier::Device));
    assert_eq!(only("sglang/04_removed_cpu", 64).tier, Some(Tier::Host));
    assert_eq!(only("sglang/05_cleared", 64).data, EventData::Cleared);
    let salted = only("sglang/06_salt_lora_session", 64);
    let ids = described_tokens("sglang/06_salt_lora_session");
    let seed = Seed::new("sql-adapter", "tenant-a");
    assert_eq!(tokens_hashes(stored(&salted)), expected(&ids, 64, seed));
    assert_eq!(only("sglang/07_attn_dp_rank2", 64).rank, 2);
}

/// The payload frames of a capture.
fn frames(engine: &str) -> Vec<Vec<u8>> {
    let capture = described(&format!("{engine}/frames_pub_and_replay"));
    let published = capture["pub"].as_array().unwrap().iter();
    let again = capture["replay_reply_as_seen_by_dealer"]
        .as_array()
        .unwrap()
        .iter();
    let last = |message: &Value| {
        let hex = message
            .as_array()
            .unwrap()
            .last()
            .unwrap()
            .as_str()
            .unwrap()
            .to_owned();
        let digits = |i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap();
        (0..hex.len()).step_by(2).map(digits).collect()
    };
    let all: Vec<Vec<u8>> = published.chain(again).map(last).collect();
    all.into_iter()
        .filter(|payload| !payload.is_empty())
        .collect()
}

#[test]
fn frames_as_subscribed_and_as_replayed_hold_blocks() {
    for (engine, block_size) in [("vllm", 16), ("sglang", 16)] {
        let frames = frames(engine);
        assert!(frames.len() > 3, "{engine}");
        for payload in frames {
            let taken = normaliser(block_size).batch(&payload, Encoding::MsgPack);
            assert_eq!(taken.rejected, [], "{engine}");
            assert!(!taken.changes.is_empty(), "{engine}");
        }
    }
}

/// A dictionary of TensorRT-LLM as the endpoint's answer.
fn polled(name: &str) -> Vec<u8> {
    let event = described(&format!("trtllm/{name}"))["event"].clone();
    Value::Array(vec![event]).to_string().into_bytes()
}

#[test]
fn a_history_of_tensorrt_llm_is_followed_through_levels_and_ranks() {
    let mut normaliser = normaliser(32);
    let mut poll = |name| normaliser.batch(&polled(name), Encoding::Json);
    assert_eq!(poll("01_created"), Normalised::default());

    let first = poll("02_stored_first");
    assert_eq!(first.rejected, []);
    let blocks = stored(&first.changes[0]);
    let ids: Vec<u32> = (0..64).collect();
    assert_eq!(tokens_hashes(blocks), expected(&ids, 32, Seed::default()));
    let names = [15_894_562_137_788_417_021, 7_315_890_211_462_205_107];
    assert_eq!(hashes(blocks), names);

    let partial = poll("03_stored_partial_tail");
    assert_eq!(partial.rejected, [Rejection::PartialBlock]);
    assert_eq!(hashes(stored(&partial.changes[0])), [1]);
    assert_eq!(stored(&partial.changes[0]).parent_hash, Some(names[1]));

    // The partial block's remove is not told: nothing was stored.
    let removed = poll("04_removed");
    assert_eq!(removed.rejected, []);
    let block_hashes = vec![1];
    let data = EventData::Removed(kv_core::event::Removed { block_hashes });
    assert_eq!(removed.changes[0].data, data);
    assert_eq!(removed.changes.len(), 1);

    let moved = poll("05_updated");
    assert_eq!(moved.rejected, []);
    assert_eq!(moved.changes[0].tier, Some(Tier::Host));
    assert_eq!(stored(&moved.changes[0]).blocks, blocks.blocks[..1]);
    assert_eq!(moved.changes[1].tier, Some(Tier::Device));
    let block_hashes = vec![names[0]];
    let data = EventData::Removed(kv_core::event::Removed { block_hashes });
    assert_eq!(moved.changes[1].data, data);
    assert_eq!(poll("05_updated"), Normalised::default());

    let window = poll("06_swa_window");
    assert_eq!(window.rejected, [Rejection::AttentionWindow]);
    assert_eq!(window.changes, []);

    let rank = poll("07_dp_rank_lora_salt");
    assert_eq!((rank.changes[0].rank, &rank.rejected[..]), (2, &[][..]));
    let seed = Seed::new("sql-adapter", "tenant-a");
    let of_rank = tokens_hashes(stored(&rank.changes[0]));
    assert_eq!(of_rank, expected(&ids[..32], 32, seed));

    let image = poll("08_mm_keys");
    assert_eq!(image.rejected, []);
    assert_ne!(tokens_hashes(stored(&image.changes[0])), of_rank);

    // What went to the host is removed there.
    let gone = br#"[{"event_id":9,"window_size":131072,"data":{"type":"removed",
        "block_hashes":[15894562137788417021]}}]"#;
    let gone = normaliser.batch(gone, Encoding::Json);
    assert_eq!(gone.changes[0].tier, Some(Tier::Host));
}
