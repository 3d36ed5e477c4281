//! The session of a request, and where it is bound.
//!
//! Sessions are named in headers: those that the pool lists, Dynamo's, and those that agents send
//! of their own accord. A subagent, which names its parent too, shares a session with its siblings.

use kv_core::affinity::{self, Affinity, MAX_ID, Session};
use kv_core::id::OwnerId;
use kv_core::key;

use crate::header_map::HeaderMap;
use crate::host::{Expect, Host};

/// Headers with a session's id, and those with its parent's: Dynamo's, Claude Code's, Codex',
/// `OpenCode`'s. Of an agent of Claude Code, the session is the parent.
const NAMES: [(&str, Option<&str>); 5] = [
    ("x-dynamo-session-id", Some("x-dynamo-parent-session-id")),
    ("x-claude-code-agent-id", Some("x-claude-code-session-id")),
    ("x-claude-code-session-id", None),
    ("thread-id", Some("x-codex-parent-thread-id")),
    ("x-session-id", Some("x-parent-session-id")),
];
/// Says that no request of the session comes after this one.
const FINAL: &str = "x-dynamo-session-final";
/// Stands before the id of a parent, as Dynamo has it, so that its children are not with it.
const GROUP: &[u8] = b"\x01sg:";
/// Times that a shard is written again because another VM has written it meanwhile.
const ATTEMPTS: usize = 3;

/// The session of a request in the pool with this secret.
#[must_use]
pub fn of(headers: &HeaderMap, affinity: &Affinity, pool_key: u64) -> Option<Session> {
    let id = |name: &str| {
        let value = headers.get(name)?.trim_ascii();
        (1..=MAX_ID).contains(&value.len()).then_some(value)
    };
    let is_last =
        id(FINAL).is_some_and(|value| value == b"1" || value.eq_ignore_ascii_case(b"true"));
    let key = |id: &[u8]| affinity::key(id, pool_key);
    let own = affinity.headers.iter().find_map(|name| id(name));
    let key = own.map(key).or_else(|| {
        let mut named = NAMES.iter();
        named.find_map(|(name, parent)| {
            let child = id(name)?;
            let group = parent.and_then(id);
            Some(group.map_or_else(|| key(child), |group| key(&[GROUP, group].concat())))
        })
    })?;
    Some(Session { key, is_last })
}

/// Where a session is, and who says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Binding {
    /// Its owner.
    pub owner: OwnerId,
    /// When this process has last noted its use, seconds; `None` where the sidecar has published it.
    stamp_s: Option<u32>,
}

/// Where a session is bound: as the sidecar has published it, else as a VM of this process has
/// bound it. An owner that `takes` no requests counts only where there is no other: the sidecar may not
/// know yet that the session has left it.
#[must_use]
pub fn find(
    host: &impl Host,
    affinity: &Affinity,
    session: Session,
    takes: impl Fn(OwnerId) -> bool,
) -> Option<Binding> {
    let shard = affinity::shard(session.key);
    let published = host.shared(&key::bound(shard));
    let published = published.and_then(|shard| affinity::find(&shard.bytes, session.key));
    let published = published.map(|(owner, _)| Binding {
        owner,
        stamp_s: None,
    });
    if published.is_some_and(|binding| takes(binding.owner)) {
        return published;
    }
    let noted = host.shared(&key::binding(shard));
    let noted = noted.and_then(|shard| affinity::find(&shard.bytes, session.key));
    let is_fresh = |stamp_s| seconds(host).saturating_sub(stamp_s) < affinity.ttl_s;
    let noted = noted.filter(|(_, stamp_s)| is_fresh(*stamp_s));
    let noted = noted.map(|(owner, stamp_s)| Binding {
        owner,
        stamp_s: Some(stamp_s),
    });
    noted.or(published)
}

/// Notes for this process that a session is on an owner, where that is not known.
pub fn note(
    host: &impl Host,
    affinity: &Affinity,
    session: Session,
    before: Option<Binding>,
    owner: OwnerId,
) {
    let now_s = seconds(host);
    let is_known = before.is_some_and(|before| {
        // Noting every use would write for nothing.
        let is_noted = |stamp_s| now_s.saturating_sub(stamp_s) <= affinity.ttl_s / 4;
        before.owner == owner && before.stamp_s.is_none_or(is_noted)
    });
    if is_known && !session.is_last {
        return;
    }
    let key = key::binding(affinity::shard(session.key));
    for _ in 0..ATTEMPTS {
        let (bytes, expect) = match host.shared(&key) {
            Some(shared) => (shared.bytes, Expect::Version(shared.version)),
            None => (Vec::new(), Expect::Nothing),
        };
        let kept = (!session.is_last).then_some(owner);
        let bytes = affinity::rebound(&bytes, session.key, kept, now_s, affinity.ttl_s);
        if host.set_shared(&key, &bytes, expect) {
            return;
        }
    }
}

#[allow(clippy::cast_possible_truncation)]
fn seconds(host: &impl Host) -> u32 {
    (host.unix_ns() / 1_000_000_000) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Fake;
    use crate::host::Headers;

    const A: OwnerId = OwnerId { worker: 1, rank: 0 };
    const B: OwnerId = OwnerId { worker: 2, rank: 0 };

    fn affinity() -> Affinity {
        Affinity {
            ttl_s: 60,
            slack: None,
            headers: vec!["x-chat".into()],
        }
    }

    fn session(headers: &[(&str, &[u8])]) -> Option<Session> {
        let host = Fake::default();
        for (name, value) in headers {
            host.client_header(name, value);
        }
        of(&host.headers(Headers::Request).unwrap(), &affinity(), 9)
    }

    fn named(id: &[u8]) -> Option<Session> {
        Some(Session {
            key: affinity::key(id, 9),
            is_last: false,
        })
    }

    #[test]
    fn agents_sessions_are_known_by_their_own_headers() {
        let a: &[u8] = b"a";
        for name in [
            "x-chat",
            "x-dynamo-session-id",
            "x-claude-code-session-id",
            "thread-id",
            "x-session-id",
        ] {
            assert_eq!(session(&[(name, b" a ")]), named(a), "{name}");
        }
        assert_eq!(session(&[("x-session-id", b"b"), ("x-chat", a)]), named(a));
        assert_eq!(session(&[("x-session-id", &[b'a'; 257])]), None);
        assert_eq!(session(&[]), None);
        let last = session(&[("x-session-id", a), ("x-dynamo-session-final", b"true")]);
        assert!(last.unwrap().is_last);
    }

    #[test]
    fn siblings_share_a_session_apart_from_their_parent() {
        let pairs = [
            ("x-dynamo-session-id", "x-dynamo-parent-session-id"),
            ("x-claude-code-agent-id", "x-claude-code-session-id"),
            ("thread-id", "x-codex-parent-thread-id"),
            ("x-session-id", "x-parent-session-id"),
        ];
        for (child, parent) in pairs {
            let one = session(&[(child, b"c1"), (parent, b"p")]);
            let other = session(&[(child, b"c2"), (parent, b"p")]);
            assert_eq!(one, other, "{child}");
            assert_ne!(one, named(b"p"), "{child}");
        }
    }

    #[test]
    fn what_the_sidecar_has_published_counts_first() {
        let (host, affinity) = (Fake::default(), affinity());
        let session = named(b"a").unwrap();
        assert_eq!(find(&host, &affinity, session, |_| true), None);
        note(&host, &affinity, session, None, A);
        let noted = find(&host, &affinity, session, |_| true).unwrap();
        assert_eq!(noted.owner, A);
        let shard = affinity::shard(session.key);
        let mut bindings = affinity::Bindings::default();
        bindings.book(session, B, 1, 0, |_| true);
        let published = bindings.take_changed();
        assert!(host.set_shared(&key::bound(shard), &published[0].1, Expect::Anything));
        assert_eq!(find(&host, &affinity, session, |_| true).unwrap().owner, B);
        let without_b = find(&host, &affinity, session, |owner| owner != B);
        assert_eq!(without_b.unwrap().owner, A);
    }

    #[test]
    fn a_binding_of_the_process_is_noted_again_before_it_ends() {
        let (host, affinity) = (Fake::default(), affinity());
        let session = named(b"a").unwrap();
        note(&host, &affinity, session, None, A);
        let shard = key::binding(affinity::shard(session.key));
        let version = || host.shared(&shard).unwrap().version;
        let first = version();
        let use_it = || {
            let before = find(&host, &affinity, session, |_| true);
            note(&host, &affinity, session, before, A);
        };
        use_it();
        assert_eq!(version(), first);
        host.advance_ms(20_000);
        use_it();
        assert_ne!(version(), first);
        host.advance_ms(59_000);
        assert!(find(&host, &affinity, session, |_| true).is_some());
        host.advance_ms(1_000);
        assert_eq!(find(&host, &affinity, session, |_| true), None);
        use_it();
        let last = Session {
            is_last: true,
            ..session
        };
        note(
            &host,
            &affinity,
            last,
            find(&host, &affinity, last, |_| true),
            A,
        );
        assert_eq!(find(&host, &affinity, session, |_| true), None);
    }
}
