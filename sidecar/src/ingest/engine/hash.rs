//! Engines' names for blocks: 64 bits, however they are written.

use kv_core::hash::chain;
use kv_core::id::Family;

use super::value::Value;

/// The 64 bits of a name.
///
/// - An integer counts by its bits, so that one engine may send it with and without sign.
/// - Of bytes those count, big-endian, that the family shortens its digests to; the last eight where
///   there is none, as vLLM does with its own hashes.
/// - A text is a decimal number, or hexadecimal if it begins with `0x`, has 16, 32 or more digits,
///   or is no decimal number. Of a digest in hexadecimal the first 16 digits count, as SGLang does.
pub(super) fn hash(value: &Value<'_>, family: Option<Family>) -> Option<u64> {
    match value {
        Value::Int(int) => bits(*int),
        Value::Bytes(bytes) if bytes.is_empty() => None,
        Value::Bytes(bytes) => Some(family.unwrap_or(Family::VllmSha256Cbor).reduce(bytes)),
        Value::Str(text) => written(text),
        _ => None,
    }
}

fn bits(int: i128) -> Option<u64> {
    let unsigned = u64::try_from(int).ok();
    unsigned.or_else(|| i64::try_from(int).ok().map(i64::cast_unsigned))
}

fn written(text: &str) -> Option<u64> {
    let marked = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    let digits = marked.unwrap_or(text);
    let is_hex = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_hexdigit());
    let is_digest = is_hex && (digits.len() == 16 || digits.len() >= 32);
    if marked.is_none() && !is_digest {
        let decimal = text.parse().ok().and_then(bits);
        if decimal.is_some() {
            return decimal;
        }
    }
    let first = digits.get(..digits.len().min(16))?;
    let fits = digits.len() <= 16 || is_digest;
    let value = || u64::from_str_radix(first, 16).ok();
    if is_hex && fits { value() } else { None }
}

/// Names of the `parts` blocks that one engine block is cut into. The last one has the engine's own
/// name, so that what hangs below it is found by that name alone.
pub(super) fn names(hash: u64, parts: u64) -> impl Iterator<Item = u64> {
    let inner = (0..parts.saturating_sub(1)).map(move |i| chain(hash, i));
    inner.chain(std::iter::once(hash))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_in_bytes_is_shortened_as_its_family_does() {
        let digest = Value::Bytes((1..=32).collect::<Vec<u8>>().into());
        let (first, last) = (0x0102_0304_0506_0708, 0x191a_1b1c_1d1e_1f20);
        assert_eq!(hash(&digest, None), Some(last));
        for (family, expected) in [
            (Family::LmCache, first),
            (Family::HiCache, first),
            (Family::VllmSha256Cbor, last),
            (Family::VllmXxhashCbor, last),
        ] {
            assert_eq!(hash(&digest, Some(family)), Some(expected), "{family:?}");
        }
    }

    #[test]
    fn hashes_in_every_form_are_the_same_bits() {
        let text = |text: &'static str| Value::Str(text.into());
        let bytes = |bytes: &'static [u8]| Value::Bytes(bytes.into());
        let cases = [
            (Value::Int(5), Some(5)),
            (Value::Int(-1), Some(u64::MAX)),
            (Value::Int(u64::MAX.into()), Some(u64::MAX)),
            (Value::Int(i128::from(u64::MAX) + 1), None),
            (Value::Int(i128::from(i64::MIN) - 1), None),
            (Value::Float(1.0), None),
            (Value::Nil, None),
            (bytes(&[]), None),
            (bytes(&[1, 2]), Some(0x0102)),
            (
                bytes(&[9, 9, 1, 2, 3, 4, 5, 6, 7, 8]),
                Some(0x0102_0304_0506_0708),
            ),
            (text("18446744073709551615"), Some(u64::MAX)),
            (text("-1"), Some(u64::MAX)),
            (text("0x10"), Some(16)),
            (text("00b47f43944b694b"), Some(0x00b4_7f43_944b_694b)),
            (text("1234567890123456"), Some(0x1234_5678_9012_3456)),
            (
                text("cf97adee000000010000000000000000000000000000000000000000000000ff"),
                Some(0xcf97_adee_0000_0001),
            ),
            (text("beef"), Some(0xbeef)),
            (text("18446744073709551616"), None),
            (text("0x11112222333344445"), None),
            (text(""), None),
            (text("0x"), None),
            (text("page"), None),
            (text("é234567890123456"), None),
        ];
        for (value, expected) in cases {
            assert_eq!(hash(&value, None), expected, "{value:?}");
        }
    }
}
