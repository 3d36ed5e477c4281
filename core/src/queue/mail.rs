//! How the sidecar's word on a waiting request gets to the filter VM that holds it.
//!
//! Every VM that may hold requests claims a numbered mailbox: a record in shared data that says
//! whose it is, and a shared queue of the mailbox's name. The bridge puts what the sidecar writes
//! under the mailbox's key into that queue, which wakes the VM. Neither keys nor queues can be
//! deleted in Envoy, so mailboxes are reused: one whose stamp is old is free.

use serde::{Deserialize, Serialize};

use super::class::Full;
use crate::key;

/// Mailboxes in an Envoy process, for as many threads and the VMs that they drain.
pub const MAILBOXES: u8 = 255;
/// After this time without a stamp a mailbox is free.
const ABANDONED_NS: u64 = 30_000_000_000;

/// Name of a mailbox's shared queue.
#[must_use]
pub fn mailbox_name(mailbox: u8) -> String {
    format!("kv_router_mail_{mailbox}")
}

/// Whose a mailbox is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mailbox {
    /// Nonce of the VM.
    pub vm: u64,
    /// When it was last heard of, nanoseconds of the process's clock.
    pub stamp_ns: u64,
}

impl Mailbox {
    /// Little-endian fields.
    #[must_use]
    pub fn encode(&self) -> [u8; 16] {
        let [a, b, c, d, e, f, g, h] = self.vm.to_le_bytes();
        let [i, j, k, l, m, n, o, p] = self.stamp_ns.to_le_bytes();
        [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
    }

    /// The inverse of [`Mailbox::encode`]; `None` unless the length is right.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (vm, stamp) = bytes.split_first_chunk()?;
        Some(Self {
            vm: u64::from_le_bytes(*vm),
            stamp_ns: u64::from_le_bytes(stamp.try_into().ok()?),
        })
    }

    /// Whether another VM may take it.
    #[must_use]
    pub fn is_free(&self, now_ns: u64) -> bool {
        self.vm == 0 || now_ns.saturating_sub(self.stamp_ns) > ABANDONED_NS
    }
}

/// Verdicts for one VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mail {
    /// Nonce of the VM: its mailbox may have changed hands.
    pub vm: u64,
    /// By ticket.
    pub verdicts: Vec<(u64, Verdict)>,
}

/// What becomes of a waiting request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// It goes on: some worker has room for it.
    Go,
    /// Its class lets no more wait.
    Full(Full),
    /// It has waited too long.
    Late,
}

impl Mail {
    /// Version byte and the mail.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        key::encode(self)
    }

    /// The inverse of [`Mail::encode`]; `None` for another version or broken bytes.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        key::decode(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::Limit;

    #[test]
    fn mail_and_mailboxes_survive_encoding() {
        let mail = Mail {
            vm: u64::MAX,
            verdicts: vec![
                (1, Verdict::Go),
                (
                    2,
                    Verdict::Full(Full {
                        kind: Limit::Tokens,
                        current: 9,
                        limit: 8,
                    }),
                ),
                (3, Verdict::Late),
            ],
        };
        assert_eq!(Mail::decode(&mail.encode()), Some(mail));
        assert_eq!(Mail::decode(&[]), None);
        let mailbox = Mailbox {
            vm: 7,
            stamp_ns: 1 << 40,
        };
        assert_eq!(Mailbox::decode(&mailbox.encode()), Some(mailbox));
        assert_eq!(Mailbox::decode(&[0; 15]), None);
        assert!(!mailbox.is_free((1 << 40) + ABANDONED_NS));
        assert!(mailbox.is_free((1 << 40) + ABANDONED_NS + 1));
    }
}
