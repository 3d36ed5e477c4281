//! Block and sequence hashes are Dynamo's, bit for bit.

use dynamo_kv_router::protocols::{
    BlockHashOptions, compute_block_hash_for_seq, compute_seq_hash_for_block,
};
use kv_core::hash::{Hashing, Seed, sequence_hashes};
use kv_core::rng::Rng;

#[test]
fn hashes_of_random_prompts_are_equal() {
    let mut rng = Rng::new(42);
    let names = [
        "",
        "a",
        "adapter-a",
        "tenant-1",
        "\u{1F980} with spaces",
        "0",
    ];
    let mut blocks = 0;
    for _ in 0..20_000 {
        let block_size = [1, 2, 4, 7, 16, 16, 32, 32, 64, 128][rng.below(10)];
        let length = rng.below(6 * block_size + 3);
        let tokens: Vec<u32> = (0..length).map(|_| rng.next_u64() as u32).collect();
        let (lora, salt) = (names[rng.below(6)], names[rng.below(6)]);
        let eagle = rng.below(4) == 0;
        let options = BlockHashOptions {
            lora_name: Some(lora),
            cache_namespace: Some(salt),
            is_eagle: Some(eagle),
            ..Default::default()
        };
        let size = u32::try_from(block_size).unwrap();
        let local = compute_block_hash_for_seq(&tokens, size, options);
        let hashing = Hashing {
            block_size,
            eagle,
            seed: Seed::new(lora, salt),
        };
        let ours = sequence_hashes(&tokens, hashing);
        assert_eq!(
            ours,
            compute_seq_hash_for_block(&local),
            "{hashing:?} {length}"
        );
        blocks += ours.len();
    }
    assert!(blocks > 20_000);
}
