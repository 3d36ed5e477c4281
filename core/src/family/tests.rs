use proptest::prelude::*;

use super::{FamilyHasher, Namespace, Scheme, chained};
use crate::hash::chain;
use crate::id::Family;

const NONE: [u64; 0] = [];
const TENANT: Namespace<'_> = Namespace {
    lora: "sql",
    salt: "tenant",
};
/// One of each length that CBOR gives an integer.
const MIXED: [u32; 8] = [0, 23, 24, 255, 256, 65_535, 65_536, u32::MAX];

fn scheme(family: Family, block_size: u32, seed: &str) -> Scheme {
    Scheme {
        family,
        block_size,
        hash_seed: seed.into(),
    }
}

fn named(scheme: &Scheme, tokens: &[u32], namespace: Namespace<'_>) -> Vec<u64> {
    let hasher = FamilyHasher::new(scheme, namespace);
    hasher.map_or_else(Vec::new, |mut hasher| {
        hasher.push(tokens);
        hasher.into_hashes()
    })
}

fn range(end: u32) -> Vec<u32> {
    (0..end).collect()
}

// The values of FlexKV and of SGLang's first page are those of the projects' own tests; all others
// were computed from the definitions by an implementation of its own in another language.

#[test]
fn flex_kv_hashes_the_whole_prefix() {
    let scheme = scheme(Family::FlexKv, 16, "");
    let expected = [
        0x00b4_7f43_944b_694b,
        0x2410_58c6_98b7_5225,
        0x0a62_7c7d_35ab_3716,
    ];
    assert_eq!(named(&scheme, &range(48), Namespace::default()), expected);
    assert_eq!(named(&scheme, &range(63), Namespace::default()), expected);
    let tenant = [0xb747_e84d_b39d_378c, 0xf996_3d89_8c05_0538];
    assert_eq!(named(&scheme, &range(32), TENANT), tenant);
    let salt = Namespace { lora: "", ..TENANT };
    let salted = [0xd7cb_3390_75a6_bbe6, 0x4493_71dc_5e57_ad52];
    assert_eq!(named(&scheme, &range(32), salt), salted);
}

#[test]
fn hi_cache_chains_pages() {
    let scheme = scheme(Family::HiCache, 4, "");
    let tokens: Vec<u32> = (1..=10).collect();
    let expected = [0xcf97_adee_db59_e05b, 0x4ebf_a8a1_f3c3_4151];
    assert_eq!(named(&scheme, &tokens, Namespace::default()), expected);
    // Its stores keep salted prompts apart otherwise.
    assert_eq!(named(&scheme, &tokens, TENANT), NONE);
}

#[test]
fn vllm_hashes_canonical_cbor() {
    let plain = Namespace::default();
    let sha = |seed| scheme(Family::VllmSha256Cbor, 4, seed);
    let expected = [0x0ab6_40f5_3e97_6f43, 0x4575_cf52_e0e0_a83a];
    assert_eq!(named(&sha("0"), &MIXED, plain), expected);
    let expected = [0x6e29_668f_1b39_3c12, 0x585e_d4bd_250a_8528];
    assert_eq!(named(&sha("42"), &MIXED, TENANT), expected);
    let xxh = |seed| scheme(Family::VllmXxhashCbor, 4, seed);
    let expected = [0xd72f_a41c_cddb_a746, 0x5232_83f9_976b_77b0];
    assert_eq!(named(&xxh("0"), &MIXED, plain), expected);
    let expected = [0xb95b_1775_1d8b_c816, 0x196a_34b0_3da6_56b7];
    assert_eq!(named(&xxh("42"), &MIXED, TENANT), expected);
}

#[test]
fn lm_cache_chains_chunks() {
    let chunks = named(
        &scheme(Family::LmCache, 256, ""),
        &range(1_100),
        Namespace::default(),
    );
    let expected = [
        0x0845_47b6_c40e_d5b0,
        0xe5ff_ee45_c2b9_db32,
        0x4d63_c631_39bf_d6f3,
        0xa0ec_7dfe_7261_a56b,
    ];
    assert_eq!(chunks, expected);
    let short = named(
        &scheme(Family::LmCache, 4, ""),
        &range(8),
        Namespace::default(),
    );
    assert_eq!(short, [0xa298_1a4d_792b_45f7, 0xf76a_7280_af54_e664]);
    assert_eq!(
        named(&scheme(Family::LmCache, 4, ""), &range(8), TENANT),
        NONE
    );
}

#[test]
fn a_digest_is_reduced_as_its_senders_do() {
    let digest: Vec<u8> = (1..=32).collect();
    let first = 0x0102_0304_0506_0708;
    assert_eq!(Family::HiCache.reduce(&digest), first);
    assert_eq!(Family::LmCache.reduce(&digest), first);
    let last = 0x191a_1b1c_1d1e_1f20;
    assert_eq!(Family::VllmSha256Cbor.reduce(&digest), last);
    assert_eq!(Family::FlexKv.reduce(&[1, 2]), 0x0102);
}

#[test]
fn chained_families_are_chained_once_more_and_flat_ones_are_not() {
    let tokens = range(48);
    let plain = Namespace::default();
    for family in [
        Family::FlexKv,
        Family::VllmSha256Cbor,
        Family::VllmXxhashCbor,
    ] {
        let scheme = scheme(family, 16, "0");
        let [a, b, c] = named(&scheme, &tokens, plain)[..] else {
            panic!("three blocks");
        };
        let expected = [a, chain(a, b), chain(chain(a, b), c)];
        assert_eq!(scheme.hashes(&tokens, plain), expected);
        let mut hashes = [a, b, c];
        chained(&mut hashes);
        assert_eq!(hashes, expected);
    }
    for family in [Family::HiCache, Family::LmCache] {
        let scheme = scheme(family, 16, "");
        assert_eq!(
            scheme.hashes(&tokens, plain),
            named(&scheme, &tokens, plain)
        );
    }
}

#[test]
fn without_a_block_size_or_with_dynamos_family_there_are_no_hashes() {
    let plain = Namespace::default();
    assert_eq!(scheme(Family::FlexKv, 0, "").hashes(&range(9), plain), NONE);
    assert_eq!(scheme(Family::Dynamo, 4, "").hashes(&range(9), plain), NONE);
}

proptest! {
    #[test]
    fn pieces_make_the_same_hashes_as_the_whole(
        tokens in prop::collection::vec(any::<u32>(), 0..200),
        cuts in prop::collection::vec(0usize..40, 0..20),
        block_size in 1u32..20,
    ) {
        for family in [Family::FlexKv, Family::HiCache, Family::VllmSha256Cbor,
                       Family::VllmXxhashCbor, Family::LmCache] {
            let scheme = scheme(family, block_size, "0");
            let mut hasher = FamilyHasher::new(&scheme, Namespace::default()).unwrap();
            let mut rest = &tokens[..];
            for cut in &cuts {
                let (piece, after) = rest.split_at((*cut).min(rest.len()));
                hasher.push(piece);
                rest = after;
            }
            hasher.push(rest);
            prop_assert_eq!(hasher.hashes().len(), tokens.len() / block_size as usize);
            prop_assert_eq!(hasher.hashes(), named(&scheme, &tokens, Namespace::default()));
        }
    }
}
