//! The public test vectors, and equality with XXH3-64 as xxhash-rust computes it.

use proptest::prelude::*;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::*;

fn count_up(tokens: u32) -> Vec<u32> {
    (0..tokens).collect()
}

fn bytes(tokens: &[u32]) -> Vec<u8> {
    tokens
        .iter()
        .flat_map(|token| token.to_le_bytes())
        .collect()
}

/// Block and sequence hashes straight from their definition.
fn defined(tokens: &[u32], hashing: Hashing) -> (Vec<u64>, Vec<u64>) {
    let window = hashing.block_size + usize::from(hashing.eagle);
    let mut blocks = Vec::new();
    let mut start = 0;
    while hashing.block_size > 0 && start + window <= tokens.len() {
        let input = bytes(&tokens[start..start + window]);
        blocks.push(xxh3_64_with_seed(&input, hashing.seed.0));
        start += hashing.block_size;
    }
    let mut sequence = Vec::<u64>::new();
    for &block in &blocks {
        let hash = sequence.last().map_or(block, |previous| {
            let mut input = previous.to_le_bytes().to_vec();
            input.extend(block.to_le_bytes());
            xxh3_64_with_seed(&input, CHAIN_SEED)
        });
        sequence.push(hash);
    }
    (blocks, sequence)
}

#[track_caller]
fn assert_vector(tokens: u32, hashing: Hashing, blocks: &[u64], sequence: &[u64]) {
    let tokens = count_up(tokens);
    assert_eq!(sequence_hashes(&tokens, hashing), sequence);
    let window = hashing.block_size + usize::from(hashing.eagle);
    let found: Vec<u64> = tokens
        .windows(window)
        .step_by(hashing.block_size)
        .map(|block| hashing.seed.block(block))
        .collect();
    assert_eq!(found, blocks);
}

#[test]
fn seeds_are_dynamos() {
    assert_eq!(Seed::new("", ""), Seed::default());
    assert_eq!(Seed::default().0, 1337);
    assert_eq!(Seed::new("adapter-a", "").0, 8_842_669_519_798_868_182);
    assert_eq!(Seed::new("", "tenant-1").0, 13_131_544_620_552_358_486);
    assert_eq!(
        Seed::new("adapter-a", "tenant-1").0,
        3_527_470_066_641_673_715
    );
}

#[test]
fn tv1_block_size_16() {
    assert_vector(
        64,
        Hashing::new(16, Seed::default()),
        &[
            0xd47a_8f41_c833_328a,
            0xd439_3917_8abd_00db,
            0x4cc8_f942_aaf4_01a2,
            0xcf2d_99a3_3cc4_2682,
        ],
        &[
            0xd47a_8f41_c833_328a,
            0xbf15_dffb_1644_7f38,
            0xa4dd_a066_f3c1_e1a0,
            0x35f7_c0d1_1984_8950,
        ],
    );
}

#[test]
fn tv2_block_size_32() {
    assert_vector(
        64,
        Hashing::new(32, Seed::default()),
        &[0x4fe4_b52e_3d3d_116c, 0xc1b5_5e9b_2a30_36c7],
        &[0x4fe4_b52e_3d3d_116c, 0xe72e_765d_bbb3_fc6b],
    );
}

#[test]
fn tv3_lora_adapter() {
    assert_vector(
        64,
        Hashing::new(16, Seed::new("adapter-a", "")),
        &[
            0xf1e2_0c61_558f_16bb,
            0x17ea_b460_7c24_352e,
            0x35be_62ed_7fc2_fd5d,
            0xe13d_c0b7_734f_1eda,
        ],
        &[
            0xf1e2_0c61_558f_16bb,
            0x3f9d_28e4_5320_c6b1,
            0xa1e1_f179_34a7_1770,
            0xaa35_e4ae_5862_ac70,
        ],
    );
}

#[test]
fn tv4_cache_salt() {
    assert_vector(
        64,
        Hashing::new(16, Seed::new("", "tenant-1")),
        &[
            0x5518_88c6_218a_d80d,
            0x32e0_3cca_8e60_d8d6,
            0x50fa_70b7_e169_1fee,
            0xab4b_b13b_b128_f177,
        ],
        &[
            0x5518_88c6_218a_d80d,
            0x0a57_8228_5119_e6a9,
            0x65bf_dafe_381c_6869,
            0x283b_7893_b190_8237,
        ],
    );
}

#[test]
fn tv5_lora_adapter_and_cache_salt() {
    assert_vector(
        64,
        Hashing::new(32, Seed::new("adapter-a", "tenant-1")),
        &[0x3a40_2f61_a2e6_2196, 0x1a46_a399_c802_d081],
        &[0x3a40_2f61_a2e6_2196, 0x617a_33f3_d3d3_4433],
    );
}

#[test]
fn tv6_eagle_windows_share_a_token() {
    let hashing = Hashing {
        eagle: true,
        ..Hashing::new(16, Seed::default())
    };
    assert_vector(
        64,
        hashing,
        &[
            0x9e88_375a_6f6e_426f,
            0x5af7_d904_020a_5678,
            0x5c01_4531_6415_4fbc,
        ],
        &[
            0x9e88_375a_6f6e_426f,
            0xc49b_3373_880f_4953,
            0x48cb_7de9_3d33_8bbe,
        ],
    );
}

#[test]
fn tv8_partial_tail_has_no_hash() {
    assert_vector(
        47,
        Hashing::new(16, Seed::new("", "")),
        &[0xd47a_8f41_c833_328a, 0xd439_3917_8abd_00db],
        &[0xd47a_8f41_c833_328a, 0xbf15_dffb_1644_7f38],
    );
}

#[test]
fn block_size_zero_has_no_hashes() {
    for eagle in [false, true] {
        let hashing = Hashing {
            eagle,
            ..Hashing::new(0, Seed::default())
        };
        assert!(sequence_hashes(&count_up(64), hashing).is_empty());
        let mut hasher = SequenceHasher::new(hashing);
        hasher.push(&count_up(64));
        assert!(hasher.hashes().is_empty());
    }
}

proptest! {
    #[test]
    fn blocks_equal_xxh3(tokens in prop::collection::vec(any::<u32>(), 0..=257), seed: u64) {
        prop_assert_eq!(Seed(seed).block(&tokens), xxh3_64_with_seed(&bytes(&tokens), seed));
    }

    #[test]
    fn chain_equals_xxh3(previous: u64, block: u64) {
        let mut input = previous.to_le_bytes().to_vec();
        input.extend(block.to_le_bytes());
        prop_assert_eq!(chain(previous, block), xxh3_64_with_seed(&input, CHAIN_SEED));
    }

    #[test]
    fn sequences_equal_their_definition(
        tokens in prop::collection::vec(any::<u32>(), 0..600),
        size in prop_oneof![Just(16), Just(32), 1usize..=256],
        eagle: bool,
        seed: u64,
    ) {
        let hashing = Hashing { block_size: size, eagle, seed: Seed(seed) };
        prop_assert_eq!(sequence_hashes(&tokens, hashing), defined(&tokens, hashing).1);
    }

    #[test]
    fn pieces_give_the_hashes_of_the_whole(
        pieces in prop::collection::vec(prop::collection::vec(any::<u32>(), 0..80), 0..8),
        size in prop_oneof![Just(16), 1usize..=40],
        eagle: bool,
        seed: u64,
    ) {
        let hashing = Hashing { block_size: size, eagle, seed: Seed(seed) };
        let mut hasher = SequenceHasher::new(hashing);
        let mut whole = Vec::new();
        let mut extended = Vec::new();
        for piece in &pieces {
            hasher.push(piece);
            whole.extend_from_slice(piece);
            hashing.extend(&whole, &mut extended);
            let expected = sequence_hashes(&whole, hashing);
            prop_assert_eq!(hasher.hashes(), &expected);
            prop_assert_eq!(&extended, &expected);
        }
    }
}
