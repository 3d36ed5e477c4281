//! What is made of every form in the field, and of what is broken.

use kv_core::id::Tier;
use serde_json::{Value as Json, json};

use super::*;

/// Block hashes of the tokens 0..64 by 16: plain, of the adapter `adapter-a`, of the salt `tenant-1`.
const PLAIN: [u64; 4] = [
    0xd47a_8f41_c833_328a,
    0xd439_3917_8abd_00db,
    0x4cc8_f942_aaf4_01a2,
    0xcf2d_99a3_3cc4_2682,
];
const ADAPTER: u64 = 0xf1e2_0c61_558f_16bb;
const SALTED: [u64; 2] = [0x5518_88c6_218a_d80d, 0x32e0_3cca_8e60_d8d6];
/// Of the first block with EAGLE's window of 17 tokens.
const EAGLE: u64 = 0x9e88_375a_6f6e_426f;

fn settings() -> Settings {
    Settings {
        block_size: 16,
        media: Media::default(),
        families: Vec::new(),
        image_token: None,
    }
}

fn with_families() -> Settings {
    let used = |family, media: &[&str], block_size| FamilyUse {
        family,
        media: media.iter().map(|&m| m.to_owned()).collect(),
        block_size,
        hash_seed: "0".into(),
        max_blocks: None,
        objects: 2,
    };
    Settings {
        families: vec![
            used(Family::FlexKv, &["CPU", "SSD"], 16),
            used(Family::LmCache, &["CXL"], 256),
        ],
        ..settings()
    }
}

fn tokens(range: std::ops::Range<u32>) -> Vec<u32> {
    range.collect()
}

/// The same batch in both encodings to two normalisers, which must agree.
struct Both(Normaliser, Normaliser);

impl Both {
    fn new(settings: &Settings) -> Self {
        let normaliser = || Normaliser::new(settings.clone(), 0);
        Self(normaliser(), normaliser())
    }

    fn take(&mut self, batch: &Json) -> Normalised {
        let packed = rmp_serde::to_vec(batch).unwrap();
        let packed = self.0.batch(&packed, Encoding::MsgPack);
        let text = self.1.batch(batch.to_string().as_bytes(), Encoding::Json);
        assert_eq!(packed, text);
        packed
    }

    fn event(&mut self, event: &Json) -> Normalised {
        self.take(&json!([0.5, [event], 0]))
    }
}

/// One event to a fresh normaliser.
fn once(event: &Json) -> Normalised {
    Both::new(&settings()).event(event)
}

fn refused(event: &Json) -> Rejection {
    let taken = once(event);
    assert_eq!(taken.changes, []);
    let [rejection] = taken.rejected[..] else {
        panic!("{taken:?}");
    };
    rejection
}

/// (tier, name and hash of each block) of the only store.
fn blocks(taken: &Normalised) -> (Tier, Vec<(u64, u64)>) {
    let [change] = &taken.changes[..] else {
        panic!("{taken:?}");
    };
    let EventData::Stored(stored) = &change.data else {
        panic!("{change:?}");
    };
    let blocks = stored.blocks.iter().map(|b| (b.block_hash, b.tokens_hash));
    (change.tier.unwrap(), blocks.collect())
}

fn gone(taken: &Normalised) -> Vec<(Tier, Family, Vec<u64>)> {
    let removed = |change: &Change| match &change.data {
        EventData::Removed(removed) => (
            change.tier.unwrap(),
            change.family,
            removed.block_hashes.clone(),
        ),
        other => panic!("{other:?}"),
    };
    taken.changes.iter().map(removed).collect()
}

fn store(hash: u64, more: &Json) -> Json {
    let mut event = json!({"type": "BlockStored", "block_hashes": [hash],
        "parent_block_hash": null, "token_ids": tokens(0..16), "block_size": 16});
    for (key, value) in more.as_object().unwrap() {
        event[key] = value.clone();
    }
    event
}

#[test]
fn d1_batches_of_any_shape_hold_the_same_events() {
    let list = json!(["BlockStored", [7], null, tokens(0..16), 16]);
    let long = json!(["BlockStored", [7], null, tokens(0..16), 16, null, "GPU", null, null, 0,
        "full_attention", null, "LOCAL", null, "later", {"more": [1]}]);
    let map = store(7, &json!({"unknown": {"deep": [[1]]}}));
    let shapes = [
        json!([0.5, [&list, &map]]),
        json!([0.5, [&list, &map], null]),
        json!([1, [&map, &long], 0]),
        json!([null, [&map, &long], 0, "later", [1, 2]]),
        json!({"ts": 0.5, "events": [&list, &long]}),
        json!({"events": [&map, &map], "data_parallel_rank": 0, "later": {"a": 1}}),
        json!([&list, &map]),
        json!([&map, &list]),
    ];
    for shape in shapes {
        let taken = Both::new(&settings()).take(&shape);
        assert_eq!(taken.rejected, [], "{shape}");
        assert_eq!(taken.changes.len(), 2, "{shape}");
        assert_eq!(taken.changes[0], taken.changes[1], "{shape}");
        assert_eq!(taken.changes[0].rank, 0);
    }
    let alone = Both::new(&settings()).take(&map);
    assert_eq!(blocks(&alone), (Tier::Device, vec![(7, PLAIN[0])]));
    for empty in [
        json!([]),
        json!([0.5, []]),
        json!({"events": []}),
        json!({"events": null}),
    ] {
        assert_eq!(Both::new(&settings()).take(&empty), Normalised::default());
    }
}

#[test]
fn d2_an_event_that_can_not_be_read_costs_itself_alone() {
    let good = store(7, &json!({}));
    let bad = [
        json!(["WeirdEvent", 1]),
        json!({"type": "WeirdEvent"}),
        json!(["Ignored"]),
        json!(5),
        json!("text"),
        json!(null),
        json!([]),
        json!({}),
        json!([[1]]),
        json!(["BlockStored"]),
        json!({"type": "BlockStored", "block_hashes": [1.5], "token_ids": [], "block_size": 16}),
        json!(["BlockRemoved", {"a": 1}]),
        json!({"type": "BlockRemoved", "block_hashes": [1], "medium": 3}),
        store(8, &json!({"token_ids": [0, -1]})),
        store(8, &json!({"token_ids": [0, 4_294_967_296_u64]})),
        store(8, &json!({"token_ids": [[0, 1], [2]]})),
        store(8, &json!({"block_size": -16})),
        store(8, &json!({"parent_block_hash": {}})),
    ];
    for bad in bad {
        let taken = Both::new(&settings()).take(&json!([0.5, [&good, &bad, &good], 0]));
        assert_eq!(taken.changes.len(), 2, "{bad}");
        assert_eq!(taken.rejected.len(), 1, "{bad}");
    }
    assert_eq!(refused(&json!(["WeirdEvent"])), Rejection::UnknownEvent);
    assert_eq!(refused(&json!(["Ignored"])), Rejection::Ignored);
}

#[test]
fn what_stands_before_a_broken_encoding_is_taken() {
    let batch = json!([0.5, [store(7, &json!({})), store(8, &json!({}))], 0]);
    let packed = rmp_serde::to_vec(&batch).unwrap();
    for cut in [packed.len() - 2, packed.len() - 20] {
        let mut normaliser = Normaliser::new(settings(), 0);
        let taken = normaliser.batch(&packed[..cut], Encoding::MsgPack);
        assert!(!taken.changes.is_empty());
        assert_eq!(taken.rejected, [Rejection::Malformed]);
    }
    let mut text = batch.to_string().into_bytes();
    text.extend_from_slice(b" tail");
    let taken = Normaliser::new(settings(), 0).batch(&text, Encoding::Json);
    assert_eq!(
        (taken.changes.len(), &taken.rejected[..]),
        (2, &[Rejection::Malformed][..])
    );
}

#[test]
fn d3_a_block_has_one_name_however_its_hash_is_written() {
    let mut normaliser = Normaliser::new(settings(), 0);
    let mut remove = |hash: &[u8]| {
        let head = b"\x92\x00\x91\x92\xacBlockRemoved\x91";
        let message = [head.as_slice(), hash].concat();
        let taken = normaliser.batch(&message, Encoding::MsgPack);
        gone(&taken)[0].2[0]
    };
    let name = 0xffff_ffff_ffff_fffb;
    assert_eq!(remove(b"\xfb"), name);
    assert_eq!(remove(b"\xcf\xff\xff\xff\xff\xff\xff\xff\xfb"), name);
    assert_eq!(remove(b"\xd3\xff\xff\xff\xff\xff\xff\xff\xfb"), name);
    assert_eq!(
        remove(b"\xc4\x0a\x01\x02\xff\xff\xff\xff\xff\xff\xff\xfb"),
        name
    );
    assert_eq!(remove(b"\xb0fffffffffffffffb"), name);
}

#[test]
fn d4_media_are_found_in_any_case_and_unknown_ones_cost_the_event() {
    let cases = [
        ("GPU", Tier::Device),
        ("gpu", Tier::Device),
        ("", Tier::Device),
        ("CPU_PINNED", Tier::Host),
        ("cpu", Tier::Host),
        ("CPU_TIER2", Tier::Disk),
        ("DISK", Tier::Disk),
        ("SSD", Tier::Disk),
        ("OBJ", Tier::External),
        ("device(type='cuda', index=0)", Tier::Device),
    ];
    for (medium, tier) in cases {
        let taken = once(&store(1, &json!({"medium": medium})));
        assert_eq!(blocks(&taken), (tier, vec![(1, PLAIN[0])]), "{medium}");
    }
    let taken = once(&store(1, &json!({"medium": null})));
    assert_eq!(blocks(&taken).0, Tier::Device);
    let tape = json!({"medium": "tape"});
    assert_eq!(refused(&store(1, &tape)), Rejection::UnknownMedium);
    let removed = json!({"type": "BlockRemoved", "block_hashes": [1], "medium": "TAPE"});
    assert_eq!(refused(&removed), Rejection::UnknownMedium);
    let media = Media::new([("tape", Tier::External)]);
    let taken = Both::new(&Settings {
        media,
        ..settings()
    })
    .event(&store(1, &tape));
    assert_eq!(blocks(&taken).0, Tier::External);
}

#[test]
fn d5_blocks_without_token_ids_are_of_their_mediums_family_or_refused() {
    let listed = |medium: &str, hashes: Json, size: u32| {
        json!(["BlockStored", hashes, null, [], size, null, medium])
    };
    assert_eq!(refused(&listed("CPU", json!([1]), 16)), Rejection::NoTokens);
    let mut both = Both::new(&with_families());
    let taken = both.event(&listed("cpu", json!([5, -5]), 16));
    assert_eq!(
        blocks(&taken),
        (Tier::Host, vec![(5, 5), (u64::MAX - 4, u64::MAX - 4)])
    );
    assert_eq!(taken.changes[0].family, Family::FlexKv);
    let taken = both.event(&listed("CXL", json!([5]), 256));
    assert_eq!(taken.changes[0].family, Family::LmCache);
    let taken = both.event(&listed("CXL", json!([5]), 16));
    assert_eq!(taken.rejected, [Rejection::BlockSizeMismatch]);
    let taken = both.event(&listed("GPU", json!([5]), 16));
    assert_eq!(taken.rejected, [Rejection::NoTokens]);
    // A remove says no more than a name, and the family is the medium's.
    let removed = json!(["BlockRemoved", [-5], "CPU"]);
    let taken = both.event(&removed);
    assert_eq!(
        gone(&taken),
        [(Tier::Host, Family::FlexKv, vec![u64::MAX - 4])]
    );
    // Where a medium has had both, a remove is of either.
    both.event(&store(9, &json!({"medium": "CPU"})));
    let taken = both.event(&removed);
    assert_eq!(
        gone(&taken)[1],
        (Tier::Host, Family::Dynamo, vec![u64::MAX - 4])
    );
}

#[test]
fn d6_a_block_of_k_router_blocks_is_k_blocks_under_one_name() {
    let mut both = Both::new(&settings());
    let event = |hash: u64, parent: Json, range| {
        json!([
            "BlockStored",
            [hash],
            parent,
            tokens(range),
            32,
            null,
            "GPU"
        ])
    };
    let first = both.event(&event(70, json!(null), 0..32));
    let (_, first) = blocks(&first);
    assert_eq!([first[0].1, first[1].1], PLAIN[..2]);
    assert_eq!(first[1].0, 70);
    // The next block hangs on the name that the engine gave.
    let second = both.event(&event(71, json!(70), 32..64));
    let EventData::Stored(stored) = &second.changes[0].data else {
        panic!("{second:?}");
    };
    assert_eq!(stored.parent_hash, Some(70));
    let (_, second) = blocks(&second);
    assert_eq!([second[0].1, second[1].1], PLAIN[2..]);
    let taken = both.event(&json!(["BlockRemoved", [70, 71], "GPU"]));
    let names: Vec<u64> = first.iter().chain(&second).map(|(name, _)| *name).collect();
    assert_eq!(gone(&taken), [(Tier::Device, Family::Dynamo, names)]);
    // Another tier's blocks have been as long as the index's.
    let taken = both.event(&json!(["BlockRemoved", [70], "CPU"]));
    assert_eq!(gone(&taken), [(Tier::Host, Family::Dynamo, vec![70])]);
}

#[test]
fn d7_a_block_size_that_does_not_fit_is_told() {
    for size in [0, 1, 8, 17, 24] {
        let event = store(1, &json!({"block_size": size, "token_ids": tokens(0..64)}));
        assert_eq!(refused(&event), Rejection::BlockSizeMismatch, "{size}");
    }
    // Without a size it is what the tokens make it.
    let event = store(1, &json!({"block_size": null, "token_ids": tokens(0..32)}));
    assert_eq!(blocks(&once(&event)).1.len(), 2);
}

#[test]
fn d9_the_batchs_rank_goes_before_the_streams() {
    let mut normaliser = Normaliser::new(settings(), 3);
    let mut rank = |batch: Json| {
        let taken = normaliser.batch(batch.to_string().as_bytes(), Encoding::Json);
        taken.changes.first().map(|change| change.rank)
    };
    let event = store(1, &json!({}));
    assert_eq!(rank(json!([0, [event]])), Some(3));
    assert_eq!(rank(json!([0, [event], null])), Some(3));
    assert_eq!(rank(json!([0, [event], 1])), Some(1));
    assert_eq!(
        rank(json!({"data_parallel_rank": 2, "events": [event]})),
        Some(2)
    );
    assert_eq!(rank(json!({"events": [event], "dp_rank": 0})), Some(0));
    assert_eq!(rank(json!([0, [event], 1024])), None);
}

#[test]
fn d10_a_chain_ends_before_a_hash_that_comes_twice() {
    let event = |hashes: Json, parent: Json| {
        json!([
            "BlockStored",
            hashes,
            parent,
            tokens(0..64),
            16,
            null,
            "GPU"
        ])
    };
    let taken = once(&event(json!([5, 5]), json!(null)));
    assert_eq!(taken.rejected, [Rejection::RepeatedHash]);
    assert_eq!(blocks(&taken).1, [(5, PLAIN[0])]);
    let taken = once(&event(json!([5, 6, 4, 7]), json!(4)));
    assert_eq!(taken.rejected, [Rejection::RepeatedHash]);
    assert_eq!(blocks(&taken).1, [(5, PLAIN[0]), (6, PLAIN[1])]);
    assert_eq!(
        refused(&event(json!([4]), json!(4))),
        Rejection::RepeatedHash
    );
}

#[test]
fn too_few_tokens_end_a_chain() {
    let event = json!(["BlockStored", [1, 2], null, tokens(0..16), 16, null, "GPU"]);
    let taken = once(&event);
    assert_eq!(taken.rejected, [Rejection::TooFewTokens]);
    assert_eq!(blocks(&taken).1, [(1, PLAIN[0])]);
}

#[test]
fn groups_of_attention_are_learned_from_stores() {
    let mut both = Both::new(&settings());
    let mut outcome = |more: Json| {
        let taken = both.event(&store(1, &more));
        assert_eq!(taken.changes.len() + taken.rejected.len(), 1);
        taken.rejected.first().copied()
    };
    let kind = |kind: &str, group: u32| json!({"kv_cache_spec_kind": kind, "group_idx": group});
    assert_eq!(outcome(kind("mamba", 1)), Some(Rejection::AttentionKind));
    assert_eq!(
        outcome(json!({"group_idx": 1})),
        Some(Rejection::AttentionGroup)
    );
    assert_eq!(outcome(kind("full_attention", 2)), None);
    assert_eq!(outcome(json!({"group_idx": 2})), None);
    assert_eq!(
        outcome(json!({"group_idx": 3})),
        Some(Rejection::UnlearnedGroup)
    );
    assert_eq!(outcome(json!({"group_idx": 0})), None);
    assert_eq!(
        outcome(kind("quantum", 4)),
        Some(Rejection::UnknownAttentionKind)
    );
    assert_eq!(
        outcome(json!({"group_idx": 4})),
        Some(Rejection::UnknownAttentionKind)
    );
    assert_eq!(outcome(kind("mla_attention", 5)), None);
    // On disk there are whole prefixes.
    let mut disk = kind("mamba", 1);
    disk["medium"] = json!("DISK");
    assert_eq!(outcome(disk), None);
    let removed = both.event(&json!(["BlockRemoved", [1], "GPU", 1]));
    assert_eq!(removed.rejected, [Rejection::AttentionGroup]);
    let removed = both.event(&json!(["BlockRemoved", [1], "GPU", 2]));
    assert_eq!(gone(&removed).len(), 1);
    // Another rank's groups are its own, and a new start has none.
    let taken = both.take(&json!([0, [store(1, &json!({"group_idx": 1}))], 1]));
    assert_eq!(taken.rejected, [Rejection::UnlearnedGroup]);
    both.0.reset();
    both.1.reset();
    let taken = both.event(&store(1, &json!({"group_idx": 2})));
    assert_eq!(taken.rejected, [Rejection::UnlearnedGroup]);
}

#[test]
fn the_tail_of_a_list_is_told_apart_by_type() {
    let head = json!([
        "BlockStored",
        [1],
        null,
        tokens(0..16),
        16,
        null,
        "GPU",
        null
    ]);
    let with = |tail: Json| {
        let mut event = head.clone();
        event
            .as_array_mut()
            .unwrap()
            .extend(tail.as_array().unwrap().clone());
        once(&event).rejected.first().copied()
    };
    assert_eq!(with(json!([null, 1])), Some(Rejection::UnlearnedGroup));
    assert_eq!(
        with(json!([null, 1, "mamba", 1024])),
        Some(Rejection::AttentionKind)
    );
    assert_eq!(
        with(json!([null, null, 1])),
        Some(Rejection::UnlearnedGroup)
    );
    assert_eq!(
        with(json!([1, "sliding_window"])),
        Some(Rejection::AttentionKind)
    );
    assert_eq!(
        with(json!([null, 0, null, null, "REMOTE", null])),
        Some(Rejection::NotLocal)
    );
    assert_eq!(
        with(json!([null, 0, null, null, "LOCAL", "kvcr"])),
        Some(Rejection::Ownership)
    );
    let infos = json!([null, [{"mm_objects": [{"mm_hash": 5, "offsets": [[0, 3]]}]}], 0,
        "full_attention"]);
    assert_eq!(with(infos), None);
}

#[test]
fn what_lies_elsewhere_or_is_another_ones_is_refused() {
    let refused = |more: Json| refused(&store(1, &more));
    assert_eq!(refused(json!({"locality": "REMOTE"})), Rejection::NotLocal);
    assert_eq!(refused(json!({"locality": "ORBIT"})), Rejection::NotLocal);
    assert_eq!(refused(json!({"ownership": "kvcr"})), Rejection::Ownership);
    let local = once(&store(1, &json!({"locality": "LOCAL", "ownership": ""})));
    assert_eq!(blocks(&local).1.len(), 1);
}

#[test]
fn clears_are_of_a_medium_or_of_everything() {
    let tier = |event: Json| {
        let taken = once(&event);
        let cleared = taken.changes.first().map(|change| {
            assert_eq!(change.data, EventData::Cleared);
            change.tier
        });
        cleared.ok_or_else(|| taken.rejected[0])
    };
    assert_eq!(tier(json!(["AllBlocksCleared"])), Ok(None));
    assert_eq!(tier(json!({"type": "AllBlocksCleared"})), Ok(None));
    assert_eq!(tier(json!(["AllBlocksCleared", null])), Ok(None));
    assert_eq!(tier(json!(["AllBlocksCleared", 5])), Ok(None));
    assert_eq!(
        tier(json!(["AllBlocksCleared", "cpu"])),
        Ok(Some(Tier::Host))
    );
    let named = json!({"type": "AllBlocksCleared", "medium": "DISK"});
    assert_eq!(tier(named), Ok(Some(Tier::Disk)));
    assert_eq!(
        tier(json!(["AllBlocksCleared", "kvcr"])),
        Err(Rejection::Ownership)
    );
    let named = json!({"type": "AllBlocksCleared", "medium": "TAPE"});
    assert_eq!(tier(named), Err(Rejection::UnknownMedium));
}

#[test]
fn adapters_and_salts_are_part_of_the_hash() {
    let hash = |more: Json| blocks(&once(&store(1, &more))).1[0].1;
    assert_eq!(
        hash(json!({"lora_name": "adapter-a", "lora_id": 3})),
        ADAPTER
    );
    assert_eq!(hash(json!({"lora_name": ""})), PLAIN[0]);
    assert_eq!(hash(json!({"cache_salt": "tenant-1"})), SALTED[0]);
    assert_eq!(hash(json!({"cache_salt": ""})), PLAIN[0]);
    assert_eq!(
        hash(json!({"extra_keys": [["dynamo-cache-salt:tenant-1"]]})),
        SALTED[0]
    );
    assert_eq!(hash(json!({"extra_keys": [["tenant-1"]]})), SALTED[0]);
    let both = json!({"lora_name": "adapter-a", "extra_keys": [["adapter-a"]]});
    assert_eq!(hash(both), ADAPTER);
    // An adapter without a name is none that a request names.
    assert_ne!(hash(json!({"lora_id": 3})), PLAIN[0]);
    let listed = |at: Json| json!(["BlockStored", [1], null, tokens(0..16), 16, null, "GPU", at]);
    let hash = |event: &Json| blocks(&once(event)).1[0].1;
    assert_eq!(hash(&listed(json!({"cache_salt": "tenant-1"}))), SALTED[0]);
    assert_eq!(hash(&listed(json!("adapter-a"))), ADAPTER);
}

#[test]
fn a_salt_goes_down_the_chain() {
    let mut both = Both::new(&settings());
    both.event(&store(
        1,
        &json!({"extra_keys": [["dynamo-cache-salt:tenant-1"]]}),
    ));
    let child = json!({"parent_block_hash": 1, "token_ids": tokens(16..32)});
    let taken = both.event(&store(2, &child));
    assert_eq!(blocks(&taken).1, [(2, SALTED[1])]);
    both.event(&store(1, &json!({"cache_salt": "tenant-2"})));
    let taken = both.event(&store(2, &child));
    assert_eq!(taken.rejected, [Rejection::AmbiguousSalt]);
    // A clear ends the ambiguity.
    both.event(&json!(["AllBlocksCleared"]));
    let taken = both.event(&store(2, &child));
    assert_eq!(blocks(&taken).1, [(2, PLAIN[1])]);
}

#[test]
fn pairs_are_hashed_with_eagles_windows() {
    let pairs: Vec<[u32; 2]> = (0..16).map(|i| [i, i + 1]).collect();
    let taken = once(&store(1, &json!({"token_ids": pairs})));
    assert_eq!(blocks(&taken).1, [(1, EAGLE)]);
}

#[test]
fn objects_are_mixed_in_or_replaced_as_the_pool_has_it() {
    let object = 0x1122_3344_5566_7788_u64;
    let infos = json!([{"mm_objects": [{"mm_hash": object, "offsets": [[0, 3]]}]}]);
    let event = store(
        1,
        &json!({"token_ids": tokens(16..32), "block_mm_infos": infos}),
    );
    assert_eq!(blocks(&once(&event)).1, [(1, 0xe838_c3c9_8853_21ed)]);
    let mut with_image = tokens(0..16);
    with_image[2] = 500;
    with_image[3] = 500;
    let event = store(
        1,
        &json!({"token_ids": with_image, "extra_keys": [[["img-1", 2]]]}),
    );
    let settings = Settings {
        image_token: Some(500),
        ..settings()
    };
    let taken = Both::new(&settings).event(&event);
    let stands_for = pad(mm_hash("img-1").unwrap());
    with_image[2] = stands_for;
    with_image[3] = stands_for;
    let expected = Seed::default().block(&with_image);
    assert_eq!(blocks(&taken).1, [(1, expected)]);
}

#[test]
fn a_message_that_is_too_large_is_refused_as_a_whole() {
    let mut normaliser = Normaliser::new(settings(), 0);
    let large = vec![b' '; MAX_BATCH_BYTES + 1];
    let taken = normaliser.batch(&large, Encoding::Json);
    assert_eq!(
        (taken.changes, taken.rejected),
        (vec![], vec![Rejection::BatchTooLarge])
    );
}

#[test]
fn events_past_the_most_are_refused_one_by_one() {
    let event = json!(["BlockRemoved", [1]]);
    let batch = json!([0, vec![event; MAX_BATCH_EVENTS + 2]]);
    let taken = Both::new(&settings()).take(&batch);
    assert_eq!(taken.changes.len(), MAX_BATCH_EVENTS);
    assert_eq!(taken.rejected, [Rejection::TooManyEvents; 2]);
}

#[test]
fn an_event_of_too_many_blocks_is_refused() {
    let hashes: Vec<u64> = (0..=MAX_EVENT_BLOCKS as u64).collect();
    assert_eq!(
        refused(&json!(["BlockRemoved", hashes])),
        Rejection::TooManyBlocks
    );
    let hashes: Vec<u64> = (0..MAX_EVENT_BLOCKS as u64).collect();
    let halved = json!(["BlockStored", hashes, null, [1], 32, null, "GPU"]);
    assert_eq!(refused(&halved), Rejection::TooManyBlocks);
    let tokens = vec![1; 1_300_000];
    let large = json!(["BlockStored", [1], null, tokens, 16]);
    let taken = Both::new(&settings()).take(&json!([0, [large, store(1, &json!({}))], 0]));
    assert_eq!(taken.rejected, [Rejection::TooManyBlocks]);
    assert_eq!(taken.changes.len(), 1);
}

#[test]
fn what_is_nested_too_deeply_costs_its_event_at_most() {
    let deep = (0..40).fold(json!(1), |inner, _| json!([inner]));
    let taken = once(&store(1, &json!({"unknown": deep})));
    assert_eq!(blocks(&taken).1.len(), 1);
    let taken = Both::new(&settings()).take(&json!([0, [deep, store(1, &json!({}))]]));
    assert_eq!((taken.changes.len(), taken.rejected.len()), (1, 1));
    // No encoding brings a stack to its end.
    for (byte, encoding) in [(b'[', Encoding::Json), (0x91, Encoding::MsgPack)] {
        let taken = Normaliser::new(settings(), 0).batch(&vec![byte; 1 << 20], encoding);
        assert!(taken.rejected.contains(&Rejection::Malformed));
    }
}

#[test]
fn extensions_are_read_over() {
    // A timestamp for the time, another extension among a map's fields.
    let head = b"\x93\xd6\xff\x00\x00\x00\x01\x91\x83\xa4type\xacBlockRemoved";
    let rest = b"\xacblock_hashes\x91\x01\xa5later\xc7\x03\x05abc\xc0";
    let message = [head.as_slice(), rest].concat();
    let taken = Normaliser::new(settings(), 0).batch(&message, Encoding::MsgPack);
    assert_eq!(taken.rejected, []);
    assert_eq!(gone(&taken), [(Tier::Device, Family::Dynamo, vec![1])]);
}

#[test]
fn a_block_of_tensorrt_llm_in_several_parts_moves_as_one() {
    let mut both = Both::new(&settings());
    let token = |id: &u32| json!({"token_id": id, "token_extra_id": 0});
    let of = |range| tokens(range).iter().map(token).collect::<Vec<_>>();
    let stored = json!([{"event_id": 1, "data": {"type": "stored", "parent_hash": null, "blocks": [
        {"block_hash": 70, "tokens": of(0..32), "cache_level": 0},
        {"block_hash": 71, "tokens": of(32..64), "cache_level": 1}]}}]);
    let taken = both.take(&stored);
    assert_eq!((taken.changes.len(), &taken.rejected[..]), (2, &[][..]));
    let EventData::Stored(lower) = &taken.changes[1].data else {
        panic!("{taken:?}");
    };
    assert_eq!(
        (taken.changes[1].tier, lower.parent_hash),
        (Some(Tier::Host), Some(70))
    );
    let update = |hash: u64, level: Json| {
        json!([{"event_id": 2, "data": {"type": "updated", "block_hash": hash,
            "cache_level": {"old_value": 0, "new_value": level}}}])
    };
    let moved = both.take(&update(70, json!(1)));
    let EventData::Removed(left) = &moved.changes[1].data else {
        panic!("{moved:?}");
    };
    let EventData::Stored(upper) = &taken.changes[0].data else {
        panic!("{taken:?}");
    };
    let names: Vec<u64> = upper.blocks.iter().map(|b| b.block_hash).collect();
    assert_eq!(left.block_hashes, names);
    assert_eq!(moved.changes[0].data, taken.changes[0].data);
    let unknown = both.take(&update(5, json!(1)));
    assert_eq!(unknown.rejected, [Rejection::UnknownBlock]);
    let priority = json!([{"event_id": 3, "data": {"type": "updated", "block_hash": 70,
        "cache_level": null, "priority": {"old_value": 1, "new_value": 2}}}]);
    assert_eq!(both.take(&priority), Normalised::default());
    let removed = json!([{"event_id": 4, "data": {"type": "removed", "block_hashes": [70]}}]);
    assert_eq!(
        gone(&both.take(&removed)),
        [(Tier::Host, Family::Dynamo, names)]
    );
}

#[test]
fn a_page_of_a_store_is_there_while_all_its_objects_are() {
    // Tokens 1 to 4 and 5 to 8 in pages of four, as SGLang hashes them.
    let hashes = [
        "cf97adeedb59e05bfd73a2b4c2a8885708c4f4f70c84c64b27120e72ab733b72",
        "4ebfa8a1f3c341517621838c6e1b9aa350307e3f00b3cbd1a07ef740f54396d6",
    ];
    let pages = [0xcf97_adee_db59_e05b, 0x4ebf_a8a1_f3c3_4151];
    let event = |kind: &str, key: &str| {
        json!({"event_type": kind, "object_key": key, "tenant_id": "default",
               "group_id": format!("sglang-hicache:{}", hashes[0])})
    };
    let object =
        |kind: &str, page: usize, part: &str| event(kind, &format!("{}_0_{part}", hashes[page]));
    let mut used = with_families();
    used.families[1].family = Family::HiCache;
    let mut both = Both::new(&used);
    let batch = json!([
        0,
        [
            object("stored", 0, "k"),
            object("stored", 0, "v"),
            object("stored", 1, "k"),
            event("stored", "model/config.json"),
            json!({"event_type": "stored", "object_key": format!("{}_0_v", hashes[1]),
                   "tenant_id": "another", "group_id": null}),
        ],
        0
    ]);
    let taken = both.take(&batch);
    assert_eq!(blocks(&taken), (Tier::External, vec![(pages[0], pages[0])]));
    assert_eq!(taken.changes[0].family, Family::HiCache);
    assert_eq!(taken.rejected, [Rejection::UnknownObject; 2]);
    let taken = both.event(&object("removed", 0, "v"));
    let gone_page = (Tier::External, Family::HiCache, vec![pages[0]]);
    assert_eq!(gone(&taken), [gone_page]);
    // After a loss nothing that was there is certain.
    both.0.lose();
    both.1.lose();
    let taken = both.event(&object("stored", 1, "v"));
    let cleared = &taken.changes[0];
    assert_eq!(
        (&cleared.data, cleared.tier),
        (&EventData::Cleared, Some(Tier::External))
    );
    assert_eq!(taken.changes.len(), 1);
    // Without the family its hashes mean nothing.
    assert_eq!(refused(&object("stored", 0, "k")), Rejection::NoTokens);
}
