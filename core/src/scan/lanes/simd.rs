//! Sixteen bytes to a simd128 vector.

use core::arch::wasm32::{
    i16x8, i16x8_add, i16x8_mul, i32x4_dot_i16x8, u8x16_bitmask, u8x16_eq, u8x16_lt, u8x16_splat,
    u8x16_sub, u16x8_narrow_i32x4, u16x8_shr, u16x8_splat, u32x4_extract_lane, u64x2, v128,
    v128_and, v128_any_true, v128_or,
};

use super::Classes;

#[inline(always)]
pub(super) fn classify(block: &[u8; 64]) -> Classes {
    let mut classes = Classes::default();
    let (groups, _) = block.as_chunks();
    for (group, shift) in groups.iter().zip((0..).step_by(16)) {
        let group = load(group);
        let bits = |mask| u64::from(u8x16_bitmask(mask)) << shift;
        let equal = |byte| u8x16_eq(group, u8x16_splat(byte));
        classes.digits |= bits(u8x16_lt(
            u8x16_sub(group, u8x16_splat(b'0')),
            u8x16_splat(10),
        ));
        classes.zeros |= bits(equal(b'0'));
        classes.commas |= bits(equal(b','));
        classes.blanks |= bits(v128_or(equal(b' '), equal(b'\n')));
    }
    classes
}

#[inline(always)]
pub(super) fn decimals(words: [u64; 4]) -> [u32; 4] {
    let [a, b, c, d] = words;
    let hundreds = i16x8(100, 1, 100, 1, 100, 1, 100, 1);
    let fours = u16x8_narrow_i32x4(
        i32x4_dot_i16x8(pairs(u64x2(a, b)), hundreds),
        i32x4_dot_i16x8(pairs(u64x2(c, d)), hundreds),
    );
    let values = i32x4_dot_i16x8(fours, i16x8(10_000, 1, 10_000, 1, 10_000, 1, 10_000, 1));
    [
        u32x4_extract_lane::<0>(values),
        u32x4_extract_lane::<1>(values),
        u32x4_extract_lane::<2>(values),
        u32x4_extract_lane::<3>(values),
    ]
}

/// The values of the pairs of digits, from 0 to 99.
#[inline(always)]
fn pairs(digits: v128) -> v128 {
    let ones = v128_and(digits, u8x16_splat(0x0f));
    let tens = i16x8_mul(v128_and(ones, u16x8_splat(0xff)), u16x8_splat(10));
    i16x8_add(tens, u16x8_shr(ones, 8))
}

#[inline(always)]
pub(super) fn has_string_mark(group: &[u8; 16]) -> bool {
    let group = load(group);
    v128_any_true(v128_or(
        u8x16_eq(group, u8x16_splat(b'"')),
        u8x16_eq(group, u8x16_splat(b'\\')),
    ))
}

/// Also true for bytes that differ from a mark in bit 5 alone.
#[inline(always)]
pub(super) fn has_bracket_or_quote(group: &[u8; 16]) -> bool {
    let group = v128_or(load(group), u8x16_splat(0x20));
    v128_any_true(v128_or(
        u8x16_eq(group, u8x16_splat(b'"')),
        v128_or(
            u8x16_eq(group, u8x16_splat(b'{')),
            u8x16_eq(group, u8x16_splat(b'}')),
        ),
    ))
}

#[inline(always)]
fn load(group: &[u8; 16]) -> v128 {
    let group = u128::from_le_bytes(*group);
    u64x2(group as u64, (group >> 64) as u64)
}
