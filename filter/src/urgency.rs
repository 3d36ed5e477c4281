//! What a client says about when its request should go, while all workers are busy.
//!
//! Going before others is privileged. Without trust no class, tier or deadline counts, and no more
//! priority than [`ANYBODYS`].

use serde::Deserialize;

use crate::host::{Headers, Host};

/// Header that names a class or a family of classes, Dynamo's.
pub const CLASS: &str = "x-dynamo-meta-policy-class";
/// Header with the priority, Dynamo's.
pub const PRIORITY: &str = "x-dynamo-request-priority";
/// Header with the tier, Dynamo's.
pub const STRICT: &str = "x-dynamo-request-strict-priority";
/// Header with the milliseconds after which the request is of no use any more.
pub const DEADLINE: &str = "x-kv-router-deadline-ms";

/// Longest name of a class that is read, in bytes.
const MAX_CLASS: usize = 64;
/// Priority that anybody may have by `latency_sensitivity`, in seconds.
const ANYBODYS: f64 = 1.0;

/// How urgent a request is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Urgency {
    /// Seconds that it counts as having come earlier.
    pub priority: f64,
    /// Its tier.
    pub strict: u32,
    /// Milliseconds after which it is of no use any more.
    pub due_ms: Option<u64>,
    /// Whether more was asked for than this client may.
    pub is_cut: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Nvext {
    agent_hints: Option<Hints>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
struct Hints {
    priority: Option<f64>,
    strict_priority: Option<u32>,
    latency_sensitivity: Option<f64>,
}

impl Urgency {
    /// Of the current request, whose body's extensions are these.
    #[must_use]
    pub fn of(host: &impl Host, nvext: &[u8], is_trusted: impl FnOnce() -> bool) -> Self {
        let hints = serde_json::from_slice::<Nvext>(nvext).unwrap_or_default();
        let hints = hints.agent_hints.unwrap_or_default();
        let asked = Self {
            priority: number(host, PRIORITY)
                .or(hints.priority)
                .or(hints.latency_sensitivity)
                .filter(|priority| priority.is_finite())
                .map_or(0.0, |priority| priority.max(0.0)),
            strict: number(host, STRICT).or(hints.strict_priority).unwrap_or(0),
            due_ms: number(host, DEADLINE),
            is_cut: false,
        };
        if asked == Self::default() || is_trusted() {
            return asked;
        }
        let sensitivity = hints.latency_sensitivity.unwrap_or(0.0);
        let granted = Self {
            priority: asked.priority.min(sensitivity.clamp(0.0, ANYBODYS)),
            ..Self::default()
        };
        Self {
            is_cut: granted != asked,
            ..granted
        }
    }
}

/// The class that the current request names, if any.
#[must_use]
pub fn class(host: &impl Host) -> Option<String> {
    let named = host.header(Headers::Request, CLASS)?;
    let named = String::from_utf8(named).ok()?;
    let named = named.trim();
    (1..=MAX_CLASS)
        .contains(&named.len())
        .then(|| named.to_owned())
}

fn number<N: std::str::FromStr>(host: &impl Host, name: &str) -> Option<N> {
    let value = host.header(Headers::Request, name)?;
    std::str::from_utf8(&value).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Fake;

    const HINTS: &[u8] = br#"{"agent_hints":{"priority":7,"strict_priority":2,"osl":3}}"#;

    #[test]
    fn a_trusted_client_is_believed_and_headers_come_first() {
        let host = Fake::default();
        let of = || Urgency::of(&host, HINTS, || true);
        let mut expected = Urgency {
            priority: 7.0,
            strict: 2,
            due_ms: None,
            is_cut: false,
        };
        assert_eq!(of(), expected);
        host.client_header(PRIORITY, b" 9 ");
        host.client_header(STRICT, b"-1");
        host.client_header(DEADLINE, b"250");
        expected.priority = 9.0;
        expected.due_ms = Some(250);
        assert_eq!(of(), expected);
        host.client_header(CLASS, b" batch ");
        assert_eq!(class(&host).as_deref(), Some("batch"));
        host.client_header(CLASS, &[b'x'; MAX_CLASS + 1]);
        assert_eq!(class(&host), None);
    }

    #[test]
    fn anybody_else_gets_a_second_at_most() {
        let host = Fake::default();
        let of = |json: &[u8]| {
            let urgency = Urgency::of(&host, json, || false);
            (urgency.priority, urgency.strict, urgency.is_cut)
        };
        assert_eq!(of(HINTS), (0.0, 0, true));
        assert_eq!(of(br#"{"agent_hints":{"priority":-5}}"#), (0.0, 0, false));
        let sensitive = br#"{"agent_hints":{"latency_sensitivity":0.5}}"#;
        assert_eq!(of(sensitive), (0.5, 0, false));
        let demanding = br#"{"agent_hints":{"latency_sensitivity":1e9}}"#;
        assert_eq!(of(demanding), (1.0, 0, true));
        assert_eq!(of(b"{"), (0.0, 0, false));
        host.client_header(DEADLINE, b"1");
        assert_eq!(Urgency::of(&host, b"", || false).due_ms, None);
    }
}
