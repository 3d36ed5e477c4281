//! Keys of Envoy's shared data. Keys can't be deleted there, so the set of them only grows: one
//! per page, and a handful of fixed ones. Every key starts with the format's version.

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
/// The bridge's lease ([`crate::lease`]).
pub const LEASE: [u8; 2] = [FORMAT, b'l'];
/// Time stamp of VMs that carry no traffic, the preferred bridges.
pub const IDLE: [u8; 2] = [FORMAT, b'i'];
/// Nonce of the Envoy process, written by the first VM.
pub const PROCESS: [u8; 2] = [FORMAT, b'n'];

/// Key of a page.
#[must_use]
pub fn page(id: u32) -> [u8; 6] {
    let [a, b, c, d] = id.to_le_bytes();
    [FORMAT, b'p', a, b, c, d]
}

/// Whether the publisher may write this key through the bridge.
#[must_use]
pub fn is_published(key: &[u8]) -> bool {
    matches!(
        key,
        [FORMAT, b'h' | b't' | b'c'] | [FORMAT, b'p', _, _, _, _]
    )
}
