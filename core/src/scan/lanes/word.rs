//! Eight bytes to a word, without special instructions.

use super::Classes;

const ONES: u64 = 0x0101_0101_0101_0101;
const HIGH: u64 = 0x80 * ONES;
const LOW: u64 = 0x7f * ONES;

#[inline(always)]
pub(super) fn classify(block: &[u8; 64]) -> Classes {
    let mut classes = Classes::default();
    let (words, _) = block.as_chunks();
    for (word, shift) in words.iter().zip((0..).step_by(8)) {
        let word = u64::from_le_bytes(*word);
        // Only digits have bytes below 10.
        let value = word ^ (b'0' as u64 * ONES);
        classes.digits |= bits(!(((value & LOW) + 0x76 * ONES) | value)) << shift;
        classes.zeros |= bits(zeros(value)) << shift;
        classes.commas |= bits(equal(word, b',')) << shift;
        classes.blanks |= bits(equal(word, b' ') | equal(word, b'\n')) << shift;
    }
    classes
}

#[inline(always)]
pub(super) fn decimals(words: [u64; 4]) -> [u32; 4] {
    words.map(|word| {
        let ones = word & (0x0f * ONES);
        let pairs = (ones * 10 + (ones >> 8)) & 0x00ff_00ff_00ff_00ff;
        let fours = (pairs * 100 + (pairs >> 16)) & 0x0000_ffff_0000_ffff;
        (fours.wrapping_mul(10_000) + (fours >> 32)) as u32
    })
}

#[inline(always)]
pub(super) fn has_string_mark(group: &[u8; 16]) -> bool {
    any(group, |word| equal(word, b'"') | equal(word, b'\\'))
}

/// Also true for bytes that differ from a mark in bit 5 alone.
#[inline(always)]
pub(super) fn has_bracket_or_quote(group: &[u8; 16]) -> bool {
    any(group, |word| {
        let word = word | (0x20 * ONES);
        equal(word, b'"') | equal(word, b'{') | equal(word, b'}')
    })
}

#[inline(always)]
fn any(group: &[u8; 16], marks: impl Fn(u64) -> u64) -> bool {
    let (words, _) = group.as_chunks();
    let found = words
        .iter()
        .fold(0, |found, word| found | marks(u64::from_le_bytes(*word)));
    found & HIGH != 0
}

/// High bit of every byte that is `byte`. The other bits mean nothing.
#[inline(always)]
fn equal(word: u64, byte: u8) -> u64 {
    zeros(word ^ (u64::from(byte) * ONES))
}

/// High bit of every byte that is zero. The other bits mean nothing.
#[inline(always)]
fn zeros(word: u64) -> u64 {
    !(((word & LOW) + LOW) | word)
}

/// The high bits of the eight bytes, as the low byte.
#[inline(always)]
fn bits(word: u64) -> u64 {
    ((word & HIGH) >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56
}
