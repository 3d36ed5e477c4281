//! Many bytes at once: with simd128 on wasm32, eight to a word elsewhere.

#[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
mod simd;
#[cfg(not(all(target_arch = "wasm32", target_feature = "simd128")))]
mod word;

#[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
use simd as bytes;
#[cfg(not(all(target_arch = "wasm32", target_feature = "simd128")))]
use word as bytes;

/// What the bytes of a block are; bit i tells of byte i.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Classes {
    /// `0` to `9`.
    pub(super) digits: u64,
    /// `0`.
    pub(super) zeros: u64,
    /// `,`.
    pub(super) commas: u64,
    /// Space and line feed.
    pub(super) blanks: u64,
}

/// Classifies the bytes of a block.
#[inline(always)]
pub(super) fn classify(block: &[u8; 64]) -> Classes {
    bytes::classify(block)
}

/// The values of four decimal numbers of at most 8 digits. A number's digits are the high bytes of
/// its word, the last one the highest; the bytes below are zero.
#[inline(always)]
pub(super) fn decimals(words: [u64; 4]) -> [u32; 4] {
    bytes::decimals(words)
}

/// The first `"` or `\` from `chunk[from]` on, with its index.
pub(super) fn find_string_mark(chunk: &[u8], from: usize) -> Option<(usize, u8)> {
    find(chunk, from, bytes::has_string_mark, |byte| {
        matches!(byte, b'"' | b'\\')
    })
}

/// The first `"` or bracket (`[`, `]`, `{`, `}`) from `chunk[from]` on, with its index.
pub(super) fn find_bracket_or_quote(chunk: &[u8], from: usize) -> Option<(usize, u8)> {
    find(chunk, from, bytes::has_bracket_or_quote, |byte| {
        matches!(byte, b'"' | b'[' | b']' | b'{' | b'}')
    })
}

/// The first byte that is `wanted`. `has` tells whether a group may hold one.
#[inline(always)]
fn find(
    chunk: &[u8],
    from: usize,
    has: impl Fn(&[u8; 16]) -> bool,
    wanted: impl Fn(u8) -> bool,
) -> Option<(usize, u8)> {
    let mut at = from;
    while let Some(group) = chunk.get(at..)?.first_chunk() {
        if has(group)
            && let Some(found) = first(group, at, &wanted)
        {
            return Some(found);
        }
        at += group.len();
    }
    first(chunk.get(at..)?, at, &wanted)
}

#[inline(always)]
fn first(bytes: &[u8], at: usize, wanted: impl Fn(u8) -> bool) -> Option<(usize, u8)> {
    let mut indexed = (at..).zip(bytes.iter().copied());
    indexed.find(|(_, byte)| wanted(*byte))
}

#[cfg(all(test, not(target_arch = "wasm32")))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mask(block: &[u8; 64], wanted: impl Fn(u8) -> bool) -> u64 {
        let bits = block.iter().zip(0..).filter(|(byte, _)| wanted(**byte));
        bits.fold(0, |mask, (_, bit)| mask | 1 << bit)
    }

    proptest! {
        #[test]
        fn classes_are_those_of_every_byte(
            block in prop::array::uniform::<_, 64>(prop_oneof![
                any::<u8>(),
                prop::sample::select(&b"0123456789,, \n\t/:;-+"[..]),
            ])
        ) {
            prop_assert_eq!(classify(&block), Classes {
                digits: mask(&block, |byte| byte.is_ascii_digit()),
                zeros: mask(&block, |byte| byte == b'0'),
                commas: mask(&block, |byte| byte == b','),
                blanks: mask(&block, |byte| matches!(byte, b' ' | b'\n')),
            });
        }

        #[test]
        fn decimals_are_the_numbers(numbers in prop::array::uniform4((0u32..100_000_000, 0u32..8))) {
            let numbers = numbers.map(|(number, cut)| number / 10u32.pow(cut));
            let words = numbers.map(|number| {
                let mut word = [0; 8];
                let text = number.to_string();
                word[8 - text.len()..].copy_from_slice(text.as_bytes());
                u64::from_le_bytes(word)
            });
            prop_assert_eq!(decimals(words), numbers);
        }

        #[test]
        fn marks_are_found(
            bytes in prop::collection::vec(prop_oneof![
                9 => Just(b'a'),
                1 => any::<u8>(),
                1 => prop::sample::select(&b"\"\\[]{}\x02\xa2\xdb\xfb"[..]),
            ], 0..100),
            from in 0usize..100,
        ) {
            let position = |wanted: &dyn Fn(u8) -> bool| {
                let mut indexed = bytes.iter().copied().enumerate().skip(from);
                indexed.find(|(_, byte)| wanted(*byte))
            };
            prop_assert_eq!(
                find_string_mark(&bytes, from),
                position(&|byte| b"\"\\".contains(&byte))
            );
            prop_assert_eq!(
                find_bracket_or_quote(&bytes, from),
                position(&|byte| b"\"[]{}".contains(&byte))
            );
        }
    }
}
