//! Load that routers tell each other, as Dynamo 1.6.1 puts it on the wire
//! (`active_sequences_events`).
//!
//! The payload of an [`Envelope`](crate::event::Envelope) is an [`ActiveSequenceEventBatch`] from a
//! router and a bare [`ActiveSequenceEvent`] from a worker, both MessagePack with named maps.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::id::{DpRank, OwnerId, WorkerId};

/// Topic of these events.
pub const TOPIC: &str = "active_sequences_events";

/// Events of one message, at most.
pub const MAX_BATCH_EVENTS: usize = 256;

/// Longest wait for further events before a batch goes out.
pub const MAX_BATCH_DELAY: Duration = Duration::from_millis(1);

/// What one message of a router holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActiveSequenceEventBatch {
    /// The events, in order.
    pub events: Vec<ActiveSequenceEvent>,
}

/// Progress of one request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActiveSequenceEvent {
    /// The request, unique over all routers. An id that was freed is never booked again.
    pub request_id: String,
    /// Where it is booked.
    pub worker: WorkerWithDpRank,
    /// What happened.
    pub data: ActiveSequenceEventData,
    /// Who says so: a router, or a worker about its own first token.
    pub router_id: u64,
    /// LoRA adapter of the request.
    #[serde(default)]
    pub lora_name: Option<String>,
}

/// An owner as it stands on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct WorkerWithDpRank {
    /// The worker.
    pub worker_id: WorkerId,
    /// Its data-parallel rank.
    pub dp_rank: DpRank,
}

impl From<OwnerId> for WorkerWithDpRank {
    fn from(owner: OwnerId) -> Self {
        Self {
            worker_id: owner.worker,
            dp_rank: owner.rank,
        }
    }
}

impl From<WorkerWithDpRank> for OwnerId {
    fn from(worker: WorkerWithDpRank) -> Self {
        Self {
            worker: worker.worker_id,
            rank: worker.dp_rank,
        }
    }
}

/// What happened to a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ActiveSequenceEventData {
    /// It was booked.
    AddRequest {
        /// Sequence hashes of its complete blocks; `None` where blocks are not tracked.
        token_sequence: Option<Vec<u64>>,
        /// Whether its prompt counts until the first token.
        #[serde(default = "tracked")]
        track_prefill_tokens: bool,
        /// Length of the answer, where it is known.
        expected_output_tokens: Option<u32>,
        /// What is left of its prompt to compute; `None` counts as nothing.
        #[serde(default)]
        prefill_load_hint: Option<PrefillLoadHint>,
    },
    /// It is over.
    Free,
    /// Its first token has come.
    MarkPrefillCompleted,
}

fn tracked() -> bool {
    true
}

/// Prefill of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrefillLoadHint {
    /// Prompt tokens that are not in the worker's cache.
    pub initial_effective_prefill_tokens: u64,
    /// How long they will take, where the router models it.
    pub expected_prefill_duration: Option<Duration>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_that_of_the_specification() {
        let event = ActiveSequenceEvent {
            request_id: "r1".into(),
            worker: WorkerWithDpRank {
                worker_id: 7,
                dp_rank: 1,
            },
            data: ActiveSequenceEventData::AddRequest {
                token_sequence: Some(vec![1, 2]),
                track_prefill_tokens: true,
                expected_output_tokens: Some(128),
                prefill_load_hint: Some(PrefillLoadHint {
                    initial_effective_prefill_tokens: 512,
                    expected_prefill_duration: Some(Duration::from_millis(250)),
                }),
            },
            router_id: 42,
            lora_name: None,
        };
        let text = r#"{"request_id":"r1","worker":{"worker_id":7,"dp_rank":1},"data":{"AddRequest":{"token_sequence":[1,2],"track_prefill_tokens":true,"expected_output_tokens":128,"prefill_load_hint":{"initial_effective_prefill_tokens":512,"expected_prefill_duration":{"secs":0,"nanos":250000000}}}},"router_id":42,"lora_name":null}"#;
        assert_eq!(serde_json::to_string(&event).unwrap(), text);
        assert_eq!(
            serde_json::from_str::<ActiveSequenceEvent>(text).unwrap(),
            event
        );
    }

    #[test]
    fn what_older_routers_leave_out_has_a_meaning() {
        let text = r#"{"request_id":"r","worker":{"worker_id":7,"dp_rank":0},"data":{"AddRequest":{"token_sequence":null,"expected_output_tokens":null}},"router_id":1}"#;
        let event: ActiveSequenceEvent = serde_json::from_str(text).unwrap();
        let expected = ActiveSequenceEventData::AddRequest {
            token_sequence: None,
            track_prefill_tokens: true,
            expected_output_tokens: None,
            prefill_load_hint: None,
        };
        assert_eq!((event.data, event.lora_name), (expected, None));
    }
}
