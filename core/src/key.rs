//! Keys of Envoy's shared data. Keys can't be deleted there, so the set of them only grows: one
//! per page, and a handful of fixed ones. Every key starts with the format's version.

use serde::{Deserialize, Serialize};

/// Version of keys, head, worker table and pages together.
pub const FORMAT: u8 = 1;

/// The [`crate::head::Head`].
pub const HEAD: [u8; 2] = [FORMAT, b'h'];
/// The [`crate::table::Table`].
pub const TABLE: [u8; 2] = [FORMAT, b't'];
/// The [`crate::loads::Loads`] of this process.
pub const LOADS: [u8; 2] = [FORMAT, b'c'];
/// Number of the bridge's current stream: VMs report whole when it changes.
pub const STREAM: [u8; 2] = [FORMAT, b's'];
/// Number of the last write-off that was taken out of the lanes ([`crate::loads::WriteOff`]).
pub const WRITTEN_OFF: [u8; 2] = [FORMAT, b'w'];
/// The bridge's lease ([`crate::lease`]).
pub const LEASE: [u8; 2] = [FORMAT, b'l'];
/// Time stamp of VMs that carry no traffic, the preferred bridges.
pub const IDLE: [u8; 2] = [FORMAT, b'i'];
/// Since when the sidecar has not been heard of on the bridge's stream, nanoseconds of the process's
/// clock as u64 LE; 0 while it is.
pub const SILENT: [u8; 2] = [FORMAT, b'd'];
/// Nonce of the Envoy process, written by the first VM.
pub const PROCESS: [u8; 2] = [FORMAT, b'n'];

/// A value kept under one of these keys: version byte and postcard form.
pub(crate) fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    // Serialising to a growing vector cannot fail for the types kept here.
    postcard::to_extend(value, vec![FORMAT]).unwrap_or_default()
}

/// The inverse of [`encode`], or the leading part of a value; `None` for another version or broken
/// bytes.
pub(crate) fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Option<T> {
    let (&FORMAT, rest) = bytes.split_first()? else {
        return None;
    };
    postcard::from_bytes(rest).ok()
}

/// Whose a mailbox is ([`crate::queue::Mailbox`]).
#[must_use]
pub fn mailbox(number: u8) -> [u8; 3] {
    [FORMAT, b'q', number]
}

/// Mail for a mailbox ([`crate::queue::Mail`]): the bridge puts it into the mailbox's queue.
#[must_use]
pub fn mail(mailbox: u8) -> [u8; 3] {
    [FORMAT, b'g', mailbox]
}

/// The mailbox of a key of [`mail`].
#[must_use]
pub fn mailed(key: &[u8]) -> Option<u8> {
    match key {
        [FORMAT, b'g', mailbox] => Some(*mailbox),
        _ => None,
    }
}

/// Key of a page.
#[must_use]
pub fn page(id: u32) -> [u8; 6] {
    let [a, b, c, d] = id.to_le_bytes();
    [FORMAT, b'p', a, b, c, d]
}

/// A board of live prompts ([`crate::board`]).
#[must_use]
pub fn board(shard: u8) -> [u8; 3] {
    [FORMAT, b'b', shard]
}

/// A shard of the sessions that the sidecar has bound ([`crate::affinity`]).
#[must_use]
pub fn bound(shard: u16) -> [u8; 4] {
    let [a, b] = shard.to_le_bytes();
    [FORMAT, b'a', a, b]
}

/// A shard of the sessions that VMs of this process have bound, of which the sidecar may not know
/// yet.
#[must_use]
pub fn binding(shard: u16) -> [u8; 4] {
    let [a, b] = shard.to_le_bytes();
    [FORMAT, b'm', a, b]
}

/// Whether the publisher may write this key through the bridge.
#[must_use]
pub fn is_published(key: &[u8]) -> bool {
    matches!(
        key,
        [FORMAT, b'h' | b't' | b'c'] | [FORMAT, b'a', _, _] | [FORMAT, b'p', _, _, _, _]
    )
}
