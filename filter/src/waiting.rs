//! The requests that this VM holds until some worker has room for them.
//!
//! Who goes when is the sidecar's to say ([`crate::mailbox`]). While it is not heard of, nobody is
//! held, and those who are go on in the order of their arrival.

use std::collections::BTreeMap;

use kv_core::key;
use kv_core::queue::Bounds;

use crate::host::Host;
use crate::mailbox::Mailbox;

/// How long the sidecar's stream may be gone until those who wait go on without it.
const PATIENCE_NS: u64 = 1_000_000_000;

/// A request that is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Its context.
    pub context: u32,
    /// When it gives up, by the process's clock.
    pub until_ns: u64,
    /// Key of its pool.
    pub pool: u64,
    /// Position of its class.
    pub class: usize,
    /// Prompt tokens.
    pub tokens: u32,
    /// Bytes of its body.
    pub body_bytes: usize,
}

/// All of them.
#[derive(Debug, Default)]
pub struct Waiting {
    /// Where verdicts come in.
    pub mailbox: Mailbox,
    /// The last ticket that was given.
    last: u64,
    /// By ticket, which is in the order of arrival.
    held: BTreeMap<u64, Held>,
    /// Their tokens.
    tokens: u64,
    /// Bytes of their bodies.
    body_bytes: u64,
    /// How many there are of each pool and class.
    classes: BTreeMap<(u64, usize), u64>,
}

impl Waiting {
    /// Whether nobody waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Whether the bounds leave room for one more.
    #[must_use]
    pub fn has_room(&self, bounds: &Bounds) -> bool {
        (self.held.len() as u64) < bounds.requests
            && self.tokens < bounds.tokens
            && self.body_bytes < bounds.body_bytes
    }

    /// Takes one in.
    pub fn enter(&mut self, held: Held) -> u64 {
        self.last += 1;
        self.tokens += u64::from(held.tokens);
        self.body_bytes += held.body_bytes as u64;
        *self.classes.entry((held.pool, held.class)).or_default() += 1;
        self.held.insert(self.last, held);
        self.last
    }

    /// Lets one out.
    pub fn leave(&mut self, ticket: u64) -> Option<Held> {
        let held = self.held.remove(&ticket)?;
        self.tokens = self.tokens.saturating_sub(held.tokens.into());
        self.body_bytes = self.body_bytes.saturating_sub(held.body_bytes as u64);
        if let Some(count) = self.classes.get_mut(&(held.pool, held.class)) {
            *count -= 1;
            if *count == 0 {
                self.classes.remove(&(held.pool, held.class));
            }
        }
        Some(held)
    }

    /// The context that holds a ticket.
    #[must_use]
    pub fn context(&self, ticket: u64) -> Option<u32> {
        self.held.get(&ticket).map(|held| held.context)
    }

    /// Classes of a pool in which requests wait here, as bits.
    #[must_use]
    pub fn backlog(&self, pool: u64) -> u64 {
        let classes = self.classes.range((pool, 0)..=(pool, usize::MAX));
        let bit = |((_, class), _): (&(u64, usize), &u64)| {
            let class = u32::try_from(*class).unwrap_or(u32::MAX);
            1_u64.checked_shl(class).unwrap_or(0)
        };
        classes.map(bit).fold(0, |all, bit| all | bit)
    }

    /// Tickets of all, in the order of their arrival.
    #[must_use]
    pub fn all(&self) -> Vec<u64> {
        self.held.keys().copied().collect()
    }

    /// Tickets of those who have waited too long.
    #[must_use]
    pub fn late(&self, now_ns: u64) -> Vec<u64> {
        let late = self.held.iter().filter(|(_, held)| held.until_ns <= now_ns);
        late.map(|(ticket, _)| *ticket).collect()
    }
}

/// Whether the bridge hears the sidecar.
#[must_use]
pub fn is_heard(host: &impl Host) -> bool {
    silent_since(host).is_none()
}

/// Whether it has not for so long that nobody is to wait for it.
#[must_use]
pub fn is_lost(host: &impl Host, now_ns: u64) -> bool {
    silent_since(host).is_some_and(|since| now_ns.saturating_sub(since) >= PATIENCE_NS)
}

fn silent_since(host: &impl Host) -> Option<u64> {
    let since = host.shared(&key::SILENT)?.bytes.try_into().ok()?;
    Some(u64::from_le_bytes(since)).filter(|since| *since > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_who_wait_are_counted_and_bounded() {
        let mut waiting = Waiting::default();
        let bounds = Bounds {
            requests: 3,
            tokens: 100,
            body_bytes: 1_000,
            ..Bounds::default()
        };
        let held = |class, tokens, body_bytes| Held {
            context: 7,
            until_ns: 50,
            pool: 9,
            class,
            tokens,
            body_bytes,
        };
        let first = waiting.enter(held(0, 60, 10));
        assert!(waiting.has_room(&bounds));
        let second = waiting.enter(held(5, 60, 10));
        assert!(!waiting.has_room(&bounds));
        assert_eq!((waiting.backlog(9), waiting.backlog(8)), (0b10_0001, 0));
        assert!(waiting.leave(first).is_some() && waiting.leave(first).is_none());
        assert_eq!(waiting.backlog(9), 0b10_0000);
        let third = waiting.enter(held(5, 0, 989));
        assert!(waiting.has_room(&bounds));
        waiting.enter(held(5, 0, 1));
        assert!(!waiting.has_room(&bounds));
        assert_eq!(waiting.all(), [second, third, third + 1]);
        assert_eq!((waiting.late(49).len(), waiting.late(50).len()), (0, 3));
        for ticket in waiting.all() {
            waiting.leave(ticket);
        }
        assert!(waiting.is_empty() && waiting.has_room(&bounds));
        assert_eq!(waiting.backlog(9), 0);
    }
}
