//! The little of canonical CBOR (RFC 8949, 4.2) that vLLM's block hashes are made of.

const UNSIGNED: u8 = 0;
const BYTES: u8 = 2;
const TEXT: u8 = 3;
const ARRAY: u8 = 4;
const NULL: u8 = 0xf6;

/// `[parent, [tokens], extra keys]`, with `null` for no extra keys.
pub(super) fn block(parent: &[u8], tokens: &[u32], extra_keys: &[&str], out: &mut Vec<u8>) {
    out.clear();
    head(ARRAY, 3, out);
    head(BYTES, parent.len() as u64, out);
    out.extend_from_slice(parent);
    head(ARRAY, tokens.len() as u64, out);
    for token in tokens {
        head(UNSIGNED, u64::from(*token), out);
    }
    if extra_keys.is_empty() {
        out.push(NULL);
        return;
    }
    head(ARRAY, extra_keys.len() as u64, out);
    for key in extra_keys {
        text(key, out);
    }
}

/// A text string.
pub(super) fn text(text: &str, out: &mut Vec<u8>) {
    head(TEXT, text.len() as u64, out);
    out.extend_from_slice(text.as_bytes());
}

/// A major type with its argument in the fewest bytes.
#[allow(clippy::cast_possible_truncation)]
fn head(major: u8, argument: u64, out: &mut Vec<u8>) {
    let major = major << 5;
    match argument {
        0..24 => out.push(major | argument as u8),
        24..0x100 => out.extend_from_slice(&[major | 24, argument as u8]),
        0x100..0x1_0000 => {
            out.push(major | 25);
            out.extend_from_slice(&(argument as u16).to_be_bytes());
        }
        0x1_0000..0x1_0000_0000 => {
            out.push(major | 26);
            out.extend_from_slice(&(argument as u32).to_be_bytes());
        }
        _ => {
            out.push(major | 27);
            out.extend_from_slice(&argument.to_be_bytes());
        }
    }
}
