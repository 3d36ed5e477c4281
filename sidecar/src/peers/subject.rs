//! Subjects on which peers meet.

use kv_core::replica::TOPIC;

use crate::config::DynamoPlane;
use crate::ingest::subject::scope;

/// The endpoint whose subject routers publish on.
const ENDPOINT: &str = "generate";

/// Subjects of a component.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subjects {
    /// Where own events go.
    pub events: String,
    /// Where events come from.
    pub listen: [String; 2],
    /// Signs of life.
    pub alive: String,
    /// Requests for snapshots.
    pub snapshot: String,
}

impl Subjects {
    /// Those of a component: `namespace.{ns}.component.{c}.endpoint.generate.{topic}` and below.
    #[must_use]
    pub fn new(plane: &DynamoPlane) -> Self {
        let scope = scope(plane);
        let events = format!("{scope}.endpoint.{ENDPOINT}.{TOPIC}");
        Self {
            listen: [
                format!("{scope}.endpoint.*.{TOPIC}"),
                format!("{scope}.{TOPIC}"),
            ],
            alive: format!("{events}.alive"),
            snapshot: format!("{events}.snapshot"),
            events,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_go_where_those_of_the_capture_went() {
        let subjects = Subjects::new(&DynamoPlane {
            namespace: "dynamo".into(),
            component: "backend".into(),
        });
        let captured =
            "namespace.dynamo.component.backend.endpoint.generate.active_sequences_events";
        assert_eq!(subjects.events, captured);
        assert_eq!(subjects.alive, format!("{captured}.alive"));
        assert_eq!(subjects.snapshot, format!("{captured}.snapshot"));
    }
}
