//! XXH3-64 for the lengths that blocks and chain links have.
//!
//! Between 17 and 128 bytes XXH3 reads 16-byte lanes from both ends of the input. A block's length
//! is a multiple of 4, so every lane begins at a token and no byte copy is needed.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::CHAIN_SEED;

/// The first 128 bytes of XXH3's default secret, as little-endian words.
const SECRET: [u64; 16] = [
    0xbe4b_a423_396c_feb8,
    0x1cad_21f7_2c81_017c,
    0xdb97_9083_e96d_d4de,
    0x1f67_b3b7_a4a4_4072,
    0x78e5_c0cc_4ee6_79cb,
    0x2172_ffcc_7dd0_5a82,
    0x8e24_43f7_7446_08b8,
    0x4c26_3a81_e690_35e0,
    0xcb00_c391_bb52_283c,
    0xa32e_531b_8b65_d088,
    0x4ef9_0da2_9748_6471,
    0xd8ac_dea9_46ef_1938,
    0x3f34_9ce3_3f76_faa8,
    0x1d4f_0bc7_c7bb_dcf9,
    0x3159_b4cd_4be0_518a,
    0x6473_78d9_c97e_9fc8,
];

const PRIME_1: u64 = 0x9E37_79B1_85EB_CA87;

/// XXH3-64 of any number of tokens. `bytes` is scratch space, kept by callers that hash many blocks.
#[inline]
pub(super) fn tokens(tokens: &[u32], seed: u64, bytes: &mut Vec<u8>) -> u64 {
    if let Ok(block) = <&[u32; 16]>::try_from(tokens) {
        return fixed(block, seed);
    }
    bytes.clear();
    bytes.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
    xxh3_64_with_seed(bytes, seed)
}

/// XXH3-64 of a block whose size, 5 to 32 tokens (20 to 128 bytes), is known to the compiler.
#[inline(always)]
pub(super) fn fixed<const N: usize>(tokens: &[u32; N], seed: u64) -> u64 {
    const { assert!(N >= 5 && N <= 32) };
    let word = |at: usize| {
        let low = tokens.get(at).copied().unwrap_or_default();
        let high = tokens.get(at + 1).copied().unwrap_or_default();
        u64::from(low) | u64::from(high) << 32
    };
    let key = |at: usize| SECRET.get(at).copied().unwrap_or_default();
    // The lane of four tokens at `at`, mixed with the `pair`-th 16 bytes of the secret.
    let lane = |at: usize, pair: usize| {
        fold(
            word(at) ^ key(2 * pair).wrapping_add(seed),
            word(at + 2) ^ key(2 * pair + 1).wrapping_sub(seed),
        )
    };
    let mut sum = (4 * N as u64).wrapping_mul(PRIME_1);
    let mut pair = 0;
    while pair == 0 || N > 8 * pair {
        sum = sum
            .wrapping_add(lane(4 * pair, 2 * pair))
            .wrapping_add(lane(N - 4 * (pair + 1), 2 * pair + 1));
        pair += 1;
    }
    avalanche(sum)
}

/// XXH3-64 of two words (16 bytes) under the chain's seed.
#[inline(always)]
pub(super) fn pair(first: u64, second: u64) -> u64 {
    const LOW: u64 = (SECRET[3] ^ SECRET[4]).wrapping_add(CHAIN_SEED);
    const HIGH: u64 = (SECRET[5] ^ SECRET[6]).wrapping_sub(CHAIN_SEED);
    let low = first ^ LOW;
    let high = second ^ HIGH;
    avalanche(
        16u64
            .wrapping_add(low.swap_bytes())
            .wrapping_add(high)
            .wrapping_add(fold(low, high)),
    )
}

/// Low half XOR high half of the 128-bit product.
#[cfg(not(target_arch = "wasm32"))]
#[inline(always)]
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product as u64 ^ (product >> 64) as u64
}

/// Low half XOR high half of the 128-bit product, from 32-bit limbs: wasm32 has no wide
/// multiplication, and a `u128` product would be a call.
#[cfg(target_arch = "wasm32")]
#[inline(always)]
fn fold(a: u64, b: u64) -> u64 {
    const LOW: u64 = 0xffff_ffff;
    let (a_low, a_high, b_low, b_high) = (a & LOW, a >> 32, b & LOW, b >> 32);
    let low = a_low * b_low;
    let high = a_high * b_high;
    let left = a_high * b_low;
    let cross = (low >> 32) + (left & LOW) + a_low * b_high;
    ((cross << 32) | (low & LOW)) ^ ((left >> 32) + (cross >> 32) + high)
}

#[inline(always)]
fn avalanche(mut hash: u64) -> u64 {
    hash ^= hash >> 37;
    hash = hash.wrapping_mul(0x1656_6791_9E37_79F9);
    hash ^ (hash >> 32)
}
