//! Hashes and scans are the same on wasm32, where the filter runs, as natively.
//!
//! The same tests run on both: against constants and against full computations, over the same
//! pseudo-random input.

use kv_core::hash::{Hashing, Seed, SequenceHasher, chain, sequence_hashes};
use kv_core::scan::{Field, Prompt, Scan, Scanner};
use serde_json::Value;
#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// Token ids of every length, most of them as a vocabulary has them.
    fn ids(&mut self, count: usize) -> Vec<u32> {
        let mut id = || match self.below(40) {
            0 => self.next() as u32,
            1 => self.below(100_000_000) as u32,
            2..5 => self.below(12) as u32,
            _ => self.below(200_000) as u32,
        };
        std::iter::repeat_with(&mut id).take(count).collect()
    }
}

fn xxh3(tokens: &[u32], seed: u64) -> u64 {
    let bytes: Vec<u8> = tokens.iter().flat_map(|id| id.to_le_bytes()).collect();
    xxh3_64_with_seed(&bytes, seed)
}

fn scan(body: &[u8], chunk: usize) -> Option<Scan> {
    let mut scanner = Scanner::new(1 << 20);
    for chunk in body.chunks(chunk) {
        scanner.feed(chunk);
    }
    scanner.finish().ok()
}

fn ids(prompt: &Prompt) -> Option<&[u32]> {
    match prompt {
        Prompt::Tokens(tokens) => Some(tokens.ids()),
        _ => None,
    }
}

#[test]
fn sequence_hashes_are_the_public_ones() {
    let tokens: Vec<u32> = (0..64).collect();
    let last = |hashing| sequence_hashes(&tokens, hashing).pop();
    let base = Seed::default();
    assert_eq!(last(Hashing::new(16, base)), Some(0x35f7_c0d1_1984_8950));
    assert_eq!(last(Hashing::new(32, base)), Some(0xe72e_765d_bbb3_fc6b));
    let eagle = Hashing {
        eagle: true,
        ..Hashing::new(16, base)
    };
    assert_eq!(last(eagle), Some(0x48cb_7de9_3d33_8bbe));
    let seeded = |lora, salt, size| last(Hashing::new(size, Seed::new(lora, salt)));
    assert_eq!(seeded("adapter-a", "", 16), Some(0xaa35_e4ae_5862_ac70));
    assert_eq!(seeded("", "tenant-1", 16), Some(0x283b_7893_b190_8237));
    assert_eq!(
        seeded("adapter-a", "tenant-1", 32),
        Some(0x617a_33f3_d3d3_4433)
    );
}

#[test]
fn long_sequences_end_in_their_constants() {
    let tokens = Random(1).ids(32_768);
    let last = |size| sequence_hashes(&tokens, Hashing::new(size, Seed(1337))).pop();
    assert_eq!(last(16), Some(0x90a3_704e_a159_495e));
    assert_eq!(last(32), Some(0x4533_6e76_023c_30c7));
    assert_eq!(last(64), Some(0xae65_9599_77fb_4de0));
}

#[test]
fn hashes_equal_xxh3() {
    let mut random = Random(2);
    for count in 0..=257 {
        let tokens = random.ids(count);
        let seed = random.next();
        assert_eq!(Seed(seed).block(&tokens), xxh3(&tokens, seed), "{count}");
        let (a, b) = (random.next(), random.next());
        let words = [a as u32, (a >> 32) as u32, b as u32, (b >> 32) as u32];
        assert_eq!(chain(a, b), xxh3(&words, 1337));
    }
    for size in [1, 16, 17, 32, 48, 64, 100] {
        for eagle in [false, true] {
            let hashing = Hashing {
                block_size: size,
                eagle,
                seed: Seed(random.next()),
            };
            let tokens = random.ids(500);
            let mut hasher = SequenceHasher::new(hashing);
            for piece in tokens.chunks(1 + random.below(90) as usize) {
                hasher.push(piece);
            }
            let windows = tokens.windows(size + usize::from(eagle)).step_by(size);
            let blocks = windows.map(|window| xxh3(window, hashing.seed.0));
            let mut expected: Vec<u64> = Vec::new();
            for block in blocks {
                let hash = expected.last().map_or(block, |last| chain(*last, block));
                expected.push(hash);
            }
            assert_eq!(hasher.hashes(), expected);
            assert_eq!(sequence_hashes(&tokens, hashing), expected);
        }
    }
}

#[test]
fn ids_are_read_with_any_separator_and_chunk() {
    let mut random = Random(3);
    for separator in [",", ", ", ",\n    ", " , ", ",\t"] {
        for count in [0, 1, 7, 64, 300, 3000] {
            let expected = random.ids(count);
            let texts: Vec<String> = expected.iter().map(u32::to_string).collect();
            let body = format!(
                "{{\"model\":\"m\",\"prompt\":[{}],\"max_tokens\":10}}",
                texts.join(separator)
            );
            for chunk in [1, 7, 64, 100, 1000, 16_384, usize::MAX] {
                let scan = scan(body.as_bytes(), chunk).unwrap();
                assert_eq!(
                    ids(&scan.prompt),
                    Some(&expected[..]),
                    "{separator:?} {chunk}"
                );
                assert_eq!(scan.max_tokens, Field::Value(10));
            }
        }
    }
}

#[test]
fn a_scanned_body_hashes_to_its_constant() {
    let body = format!(
        r#"{{"prompt": {:?}, "cache_salt": "tenant-1", "stream": true}}"#,
        Random(4).ids(10_000)
    );
    for chunk in [999, 16_384, usize::MAX] {
        let mut scan = scan(body.as_bytes(), chunk).unwrap();
        let salt = scan.cache_salt.value().map_or("", String::as_str);
        let hashing = Hashing::new(16, Seed::new("", salt));
        let Prompt::Tokens(tokens) = &mut scan.prompt else {
            panic!("{:?}", scan.prompt)
        };
        assert_eq!(tokens.hashes(hashing).last(), Some(&0x5ebc_bdbf_f65e_ca1d));
        assert_eq!(scan.stream, Field::Value(true));
    }
}

#[test]
fn strings_and_nested_values_are_skipped_to_their_end() {
    let body = r#"{"messages":[{"role":"user","content":"say \"]}\\\" {[ and more words to fill"},
        [[{"a":[1,2,{"b":"}"}]}]]],"nvext":{"x":"\\"},"\u006dodel":"\u8a9e\n","prompt":"text"}"#;
    for chunk in 1..body.len() {
        let scan = scan(body.as_bytes(), chunk).unwrap();
        assert_eq!(scan.model, Field::Value("語\n".to_owned()));
        assert_eq!(scan.prompt, Prompt::Text);
        assert_eq!(&body[scan.members.get("nvext").unwrap()], r#"{"x":"\\"}"#);
    }
}

#[test]
fn broken_bodies_read_as_a_full_parse_does() {
    let mut random = Random(5);
    let (mut good, mut bad) = (0, 0);
    for _ in 0..4000 {
        let separator = [",", ", ", ",\n  "][random.below(3) as usize];
        let texts: Vec<String> = random.ids(150).iter().map(u32::to_string).collect();
        let mut body = format!(
            "{{\"n\":[1,{{\"a\":\"b\"}}],\"prompt\":[{}],\"model\":\"m\"}}",
            texts.join(separator)
        )
        .into_bytes();
        for _ in 0..1 + random.below(2) {
            let at = random.below(body.len() as u64) as usize;
            let bytes = b"{}[]\",:\\0123456789 \n-.e\x00\xff";
            body[at] = bytes[random.below(bytes.len() as u64) as usize];
        }
        let found = scan(&body, 1 + random.below(2000) as usize);
        let Ok(value) = serde_json::from_slice::<Value>(&body) else {
            bad += 1;
            continue;
        };
        good += 1;
        let found = found.unwrap();
        assert_eq!(
            found.model.value().map(String::as_str),
            value["model"].as_str()
        );
        let expected: Option<Vec<u32>> = value["prompt"].as_array().and_then(|items| {
            let ids = items.iter().map(|id| id.as_u64()?.try_into().ok());
            ids.collect()
        });
        assert_eq!(ids(&found.prompt), expected.as_deref());
    }
    assert!(good > 500 && bad > 500, "{good} {bad}");
}
