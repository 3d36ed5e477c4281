//! Pages: compact images of a part of the index, kept one to a key in Envoy's shared data.
//!
//! Blocks are grouped along the chain, `group` to a group. A **unit** is a group's part of one
//! subtree and is named by the sequence hash of its own first block. A unit's key is that hash
//! mixed with the pool's secret; its page id is the key's low `level` bits. A unit that grows past
//! [`encode::SPLIT_BYTES`] keeps its first positions and makes every block at its `split` position
//! a unit of its own.
//!
//! Inside a unit, blocks of a chain without forks and with one owner set are a **run** with short
//! fingerprints; owner sets stand once per page. All integers are little-endian.
//!
//! ```text
//! header 16 B : level u8 | version u8 | units u16 | epoch u32 | reserved u32 | sets at u16 | sets u16
//! unit keys   : u32 x units          high half of the key; the low bits chose the page
//! unit offsets: u16 x units
//! unit        : runs u16 | split u8 (255 = whole) | reserved u8 | runs...
//! run         : position u8 | length u8 | set u16 | head u32 | body u16 x (length - 1)
//! set offsets : u16 x sets
//! set         : kind << 14 | n u16, then
//!               kind 0: n x (slot << 2 | tier) u16, ascending
//!               kind 1: tier mask u16, then for each tier of the mask n u16 words of a slot bitmap
//! ```
//!
//! `head` is the low half of the first block's sequence hash, `body` bits 16..32 of the others'.
//! A sequence hash chains all blocks before it, so a matching head vouches for the whole prefix.
//! Every page carries its level, an empty one too: during growth a reader with an older level
//! finds the page's own level higher and goes to the right one.

pub mod decode;
pub mod encode;
pub mod image;

use crate::id::Family;

/// Bytes of the header.
pub const HEADER: usize = 16;
/// Version of the layout above.
pub const VERSION: u8 = 1;
/// A page never exceeds this.
pub const MAX_BYTES: usize = 32 << 10;
/// `split` of a unit that is whole.
pub const WHOLE: u8 = u8::MAX;
/// Largest group: positions must stay below [`WHOLE`].
pub const MAX_GROUP: u8 = 128;

/// Key of the unit whose first block has this sequence hash. The pool's secret keeps clients from
/// aiming prompts at one page.
#[must_use]
pub fn unit_key(sequence_hash: u64, pool_key: u64, family: Family) -> u64 {
    let salted = sequence_hash ^ pool_key.wrapping_add(family as u64);
    let mixed = (salted ^ (salted >> 32)).wrapping_mul(pool_key | 1);
    let mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    mixed ^ (mixed >> 32)
}

/// Page id of a key at a level of at most 32 bits.
#[must_use]
#[allow(clippy::cast_possible_truncation)]
pub fn page_id(key: u64, level: u8) -> u32 {
    let mask = (1_u64 << level.min(32)) - 1;
    (key & mask) as u32
}

/// High half of a unit key, which stands in the page.
#[must_use]
#[allow(clippy::cast_possible_truncation)]
pub fn fingerprint(key: u64) -> u32 {
    (key >> 32) as u32
}

/// Fingerprint of a run's first block.
#[must_use]
#[allow(clippy::cast_possible_truncation)]
pub fn head_of(sequence_hash: u64) -> u32 {
    sequence_hash as u32
}

/// Fingerprint of a run's other blocks.
#[must_use]
#[allow(clippy::cast_possible_truncation)]
pub fn body_of(sequence_hash: u64) -> u16 {
    (sequence_hash >> 16) as u16
}
