//! Subjects of both planes.

use kv_core::id::WorkerId;

use crate::config::DynamoPlane;

/// Topic of cache events on Dynamo's plane (`kv-events`).
pub const TOPIC: &str = "kv-events";
/// What a JSON subject ends with when a snapshot is asked for.
pub const SNAPSHOT: &str = ".snapshot";
/// Stands for the worker's id in a JSON subject.
const PLACEHOLDER: &str = "{worker_id}";

/// The subjects that carry a component's cache events:
/// `namespace.{ns}.component.{c}[.endpoint.{e}].kv-events`.
#[must_use]
pub fn dynamo(plane: &DynamoPlane) -> [String; 2] {
    let scope = scope(plane);
    [
        format!("{scope}.endpoint.*.{TOPIC}"),
        format!("{scope}.{TOPIC}"),
    ]
}

/// What the subjects of a component start with.
pub(crate) fn scope(plane: &DynamoPlane) -> String {
    let namespace = encode(&plane.namespace);
    let component = encode(&plane.component);
    format!("namespace.{namespace}.component.{component}")
}

/// One segment of a Dynamo subject: bytes outside `[A-Za-z0-9_-]` are percent-encoded.
fn encode(segment: &str) -> String {
    let mut encoded = String::with_capacity(segment.len());
    for byte in segment.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-') {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

/// A JSON subject with a place for the worker's id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    before: String,
    after: String,
}

/// A subject that is no template.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The worker's id has no place.
    #[error("must hold {PLACEHOLDER} once, as a token of its own")]
    Placeholder,
    /// A token is empty, a wildcard or holds white space.
    #[error("must be a NATS subject without wildcards or empty tokens")]
    Token,
}

impl Template {
    /// Reads a template such as `kv-events.{worker_id}`.
    ///
    /// # Errors
    /// When there isn't exactly one placeholder, or a token isn't allowed in a subject.
    pub fn new(text: &str) -> Result<Self, TemplateError> {
        let places = text.split('.').filter(|t| *t == PLACEHOLDER).count();
        let mut parts = text.split(PLACEHOLDER);
        let (Some(before), Some(after), None, 1) =
            (parts.next(), parts.next(), parts.next(), places)
        else {
            return Err(TemplateError::Placeholder);
        };
        let bad = |t: &str| {
            t.is_empty() || t.contains(['*', '>', '{', '}']) || t.contains(char::is_whitespace)
        };
        if text.split('.').any(|t| t != PLACEHOLDER && bad(t)) {
            return Err(TemplateError::Token);
        }
        Ok(Self {
            before: before.into(),
            after: after.into(),
        })
    }

    /// The subject that matches every worker.
    #[must_use]
    pub fn wildcard(&self) -> String {
        format!("{}*{}", self.before, self.after)
    }

    /// The subject of a worker.
    #[must_use]
    pub fn of(&self, worker: WorkerId) -> String {
        format!("{}{worker}{}", self.before, self.after)
    }

    /// Where a worker answers requests for its snapshot.
    #[must_use]
    pub fn snapshot(&self, worker: WorkerId) -> String {
        format!("{}{SNAPSHOT}", self.of(worker))
    }

    /// The worker a message on `subject` speaks for.
    #[must_use]
    pub fn worker(&self, subject: &str) -> Option<WorkerId> {
        let id = subject
            .strip_prefix(self.before.as_str())?
            .strip_suffix(self.after.as_str())?;
        // Only the plain decimal form: no sign, no leading zero.
        let worker: WorkerId = id.parse().ok()?;
        (worker.to_string() == id).then_some(worker)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_gives_subjects_and_takes_the_id_back() {
        let template = Template::new("kv-events.{worker_id}").unwrap();
        assert_eq!(template.wildcard(), "kv-events.*");
        assert_eq!(template.snapshot(7), "kv-events.7.snapshot");
        assert_eq!(
            template.worker("kv-events.18446744073709551615"),
            Some(u64::MAX)
        );
        for other in [
            "kv-events.x",
            "kv-events.07",
            "kv-events.+7",
            "events.7",
            "kv-events.7.x",
        ] {
            assert_eq!(template.worker(other), None, "{other}");
        }
        let inner = Template::new("a.{worker_id}.b").unwrap();
        assert_eq!(inner.worker("a.5.b"), Some(5));
    }

    #[test]
    fn subjects_that_name_no_worker_are_refused() {
        for text in ["kv-events", "kv-{worker_id}", "{worker_id}.{worker_id}"] {
            assert_eq!(
                Template::new(text),
                Err(TemplateError::Placeholder),
                "{text}"
            );
        }
        for text in [
            "a..{worker_id}",
            "*.{worker_id}",
            "a b.{worker_id}",
            "{worker_id}.>",
        ] {
            assert_eq!(Template::new(text), Err(TemplateError::Token), "{text}");
        }
    }

    #[test]
    fn dynamo_segments_are_percent_encoded() {
        let plane = DynamoPlane {
            namespace: "my.ns".into(),
            component: "back end_1-a".into(),
        };
        assert_eq!(
            dynamo(&plane),
            [
                "namespace.my%2Ens.component.back%20end_1-a.endpoint.*.kv-events",
                "namespace.my%2Ens.component.back%20end_1-a.kv-events"
            ]
        );
    }
}
