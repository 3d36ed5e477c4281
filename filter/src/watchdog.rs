//! Notices that Envoy lacks `allow_on_headers_stop_iteration`.
//!
//! Without it a request held at its headers never gets a body callback and hangs. This VM then
//! lets its held requests go and holds no more. A client that is merely slow to send its body must
//! not cause that, so the bytes that Envoy has received decide.

use crate::host::Host;

/// How long a request may be held without a body callback before its bytes are looked at.
const PATIENCE_NS: u64 = 1_000_000_000;

/// Requests held at a time until the first body callback has come.
const MAX_SUSPECTS: usize = 64;

/// Whether this VM may hold requests.
#[derive(Debug)]
pub enum Watchdog {
    /// No body callback has come yet. Holds the requests held so far.
    Unsure(Vec<Suspect>),
    /// Body callbacks come.
    Fine,
    /// They don't.
    Tripped,
}

/// A request held before any body callback came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suspect {
    context: u32,
    since_ns: u64,
    /// Bytes received when it was held: its headers.
    received: u64,
}

impl Default for Watchdog {
    fn default() -> Self {
        Self::Unsure(Vec::new())
    }
}

impl Watchdog {
    /// Asks to hold a request; `false` if it may not be held.
    pub fn hold(&mut self, host: &impl Host, context: u32, now_ns: u64) -> bool {
        match self {
            Self::Unsure(suspects) if suspects.len() < MAX_SUSPECTS => {
                suspects.push(Suspect {
                    context,
                    since_ns: now_ns,
                    received: received(host),
                });
                true
            }
            Self::Unsure(_) | Self::Tripped => false,
            Self::Fine => true,
        }
    }

    /// A body or trailers callback has come for a held request.
    pub fn body_seen(&mut self) {
        if !matches!(self, Self::Fine) {
            *self = Self::Fine;
        }
    }

    /// A held request is over.
    pub fn over(&mut self, context: u32) {
        if let Self::Unsure(suspects) = self {
            suspects.retain(|suspect| suspect.context != context);
        }
    }

    /// Looks at the held requests. Returns those to let go, if body callbacks are missing.
    pub fn check(&mut self, host: &impl Host, now_ns: u64) -> Vec<u32> {
        let Self::Unsure(suspects) = self else {
            return Vec::new();
        };
        let missed = |suspect: &Suspect| {
            now_ns.saturating_sub(suspect.since_ns) > PATIENCE_NS
                && host.enter(suspect.context)
                && received(host) > suspect.received
        };
        if !suspects.iter().any(missed) {
            return Vec::new();
        }
        let held = suspects.iter().map(|suspect| suspect.context).collect();
        *self = Self::Tripped;
        held
    }
}

/// Bytes of the current request that Envoy has received, headers included.
fn received(host: &impl Host) -> u64 {
    let size = host.property(b"request\0total_size").unwrap_or_default();
    size.try_into().map_or(0, u64::from_le_bytes)
}
