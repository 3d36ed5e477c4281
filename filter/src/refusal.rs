//! Requests that are answered here with an error: no pool serves their model, the pool's mode asks
//! for what they do not say, or there is too much load.

use kv_core::id::WorkerId;
use kv_core::queue::{Full, Refusing};
use serde_json::{Value, json};

/// Header that says why: [`Refusal::name`].
pub const REASON: &str = "x-kv-router-reason";
/// Header that says when to try again, in seconds.
pub const RETRY_AFTER: &str = "retry-after";

/// Why a request goes to no worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It names no worker.
    WorkerMissing,
    /// It names a worker, or a rank of it, that the pool does not have.
    WorkerUnknown(WorkerId),
    /// It names a worker, and its route does not let it.
    HintUntrusted,
    /// No pool serves its model.
    ModelUnknown,
    /// It names a rank and no worker.
    RankAlone,
    /// A hint of a trusted client can't be read: this one.
    HintMalformed(&'static str),
    /// No worker that takes requests is what it asks for.
    NoWorkerFits,
    /// All workers have as many requests as they take.
    WorkersFull,
    /// Its body was packed and did not unpack to JSON: it is broken, or grows too much.
    BodyBroken,
    /// Its body was packed and is too long.
    BodyTooLong,
    /// All workers that could take it have more load than they are to have.
    Overloaded,
    /// Its class lets no more requests wait.
    QueueFull(Full),
    /// This Envoy thread lets no more requests wait.
    HeldFull,
    /// It has waited too long.
    QueueLate,
    /// Its pool has no worker that takes requests.
    NoWorkers,
    /// It names a worker, and others only as those that it allows.
    WorkerNotAllowed(WorkerId),
}

impl Refusal {
    /// Number of kinds.
    pub const COUNT: usize = 16;

    /// The kind as an index below [`Refusal::COUNT`].
    #[must_use]
    pub fn index(self) -> usize {
        match self {
            Self::WorkerMissing => 0,
            Self::WorkerUnknown(_) => 1,
            Self::HintUntrusted => 2,
            Self::ModelUnknown => 3,
            Self::RankAlone => 4,
            Self::HintMalformed(_) => 5,
            Self::NoWorkerFits => 6,
            Self::WorkersFull => 7,
            Self::BodyBroken => 8,
            Self::BodyTooLong => 9,
            Self::Overloaded => 10,
            Self::QueueFull(_) => 11,
            Self::HeldFull => 12,
            Self::QueueLate => 13,
            Self::NoWorkers => 14,
            Self::WorkerNotAllowed(_) => 15,
        }
    }

    /// Metric label, and the error's code.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::WorkerMissing => "worker_missing",
            Self::WorkerUnknown(_) => "worker_unknown",
            Self::HintUntrusted => "hint_untrusted",
            // As OpenAI's API has it.
            Self::ModelUnknown => "model_not_found",
            Self::BodyBroken => "body_broken",
            Self::BodyTooLong => "body_too_long",
            Self::RankAlone => "rank_alone",
            Self::HintMalformed(_) => "hint_malformed",
            Self::NoWorkerFits => "no_worker_fits",
            Self::WorkersFull => "workers_full",
            Self::Overloaded => "overloaded",
            Self::QueueFull(_) => "queue_full",
            Self::HeldFull => "held_full",
            Self::QueueLate => "queue_late",
            Self::NoWorkers => "no_workers",
            Self::WorkerNotAllowed(_) => "worker_not_allowed",
        }
    }

    /// HTTP status, in a pool that refuses so.
    #[must_use]
    pub fn status(self, refusing: &Refusing) -> u32 {
        match self {
            Self::WorkerMissing
            | Self::WorkerUnknown(_)
            | Self::WorkerNotAllowed(_)
            | Self::RankAlone
            | Self::HintMalformed(_)
            | Self::BodyBroken => 400,
            Self::HintUntrusted => 403,
            Self::ModelUnknown => 404,
            Self::NoWorkerFits | Self::WorkersFull => 503,
            Self::BodyTooLong => 413,
            Self::Overloaded | Self::QueueFull(_) | Self::HeldFull => refusing.status.into(),
            Self::QueueLate => 429,
            Self::NoWorkers => 503,
        }
    }

    /// Whether the same request may be taken later.
    #[must_use]
    pub fn may_pass(self) -> bool {
        match self {
            Self::WorkerMissing
            | Self::WorkerUnknown(_)
            | Self::WorkerNotAllowed(_)
            | Self::HintUntrusted
            | Self::ModelUnknown
            | Self::RankAlone
            | Self::HintMalformed(_)
            | Self::BodyBroken
            | Self::BodyTooLong => false,
            Self::Overloaded
            | Self::QueueFull(_)
            | Self::HeldFull
            | Self::QueueLate
            | Self::NoWorkers
            | Self::NoWorkerFits
            | Self::WorkersFull => true,
        }
    }

    /// Body of the answer to a request for this model, an error as OpenAI's API has them.
    #[must_use]
    pub fn body(self, model: &str) -> String {
        let pin = "nvext.backend_instance_id";
        let (message, kind, param) = match self {
            Self::WorkerMissing => (
                format!(
                    "requests must name their worker, in {pin} or the header \
                     x-dynamo-worker-instance-id"
                ),
                "invalid_request_error",
                pin,
            ),
            Self::WorkerUnknown(worker) => (
                format!("{pin}={worker} does not identify a known worker"),
                "invalid_request_error",
                pin,
            ),
            Self::WorkerNotAllowed(worker) => (
                format!("{pin}={worker} is not among the allowed workers"),
                "invalid_request_error",
                pin,
            ),
            Self::HintUntrusted => (
                "this route does not let clients name workers".to_owned(),
                "permission_error",
                pin,
            ),
            Self::ModelUnknown => (
                format!("The model `{model}` does not exist"),
                "invalid_request_error",
                "model",
            ),
            Self::RankAlone => (
                "nvext.dp_rank needs a worker that it is a rank of".to_owned(),
                "invalid_request_error",
                "nvext.dp_rank",
            ),
            Self::HintMalformed(hint) => (
                format!("{hint} can't be read"),
                "invalid_request_error",
                hint,
            ),
            Self::NoWorkerFits => (
                "no worker that takes requests is among those asked for".to_owned(),
                "server_error",
                "nvext.routing_constraints",
            ),
            Self::WorkersFull => (
                "all workers have as many requests as they take".to_owned(),
                "server_error",
                "",
            ),
            Self::BodyBroken => (
                "the compressed body is broken, or grows too much when it is unpacked".to_owned(),
                "invalid_request_error",
                "body",
            ),
            Self::BodyTooLong => (
                "the compressed body is too long when it is unpacked".to_owned(),
                "invalid_request_error",
                "body",
            ),
            Self::Overloaded => overloaded("all workers are overloaded, try again later"),
            Self::QueueFull(_) | Self::HeldFull => {
                overloaded("too many requests wait for a worker, try again later")
            }
            Self::QueueLate => overloaded("no worker had room for the request in time"),
            Self::NoWorkers => overloaded("no worker takes requests, try again later"),
        };
        let param = Some(param).filter(|param| !param.is_empty());
        let code = self.name();
        let details = match self {
            Self::QueueFull(full) => json!({
                "limit_kind": full.kind.name(),
                "current": full.current,
                "limit": full.limit,
            }),
            _ => Value::Null,
        };
        let mut error = json!({"message": message, "type": kind, "param": param, "code": code});
        if let (Some(error), false) = (error.as_object_mut(), details.is_null()) {
            error.insert("details".to_owned(), details);
        }
        json!({"error": error}).to_string()
    }
}

fn overloaded(message: &str) -> (String, &'static str, &'static str) {
    (message.to_owned(), "overloaded_error", "")
}

#[cfg(test)]
mod tests {
    use super::*;
    use kv_core::queue::Limit;

    #[test]
    fn answers_are_json_as_openai_has_it() {
        let all = [
            Refusal::WorkerMissing,
            Refusal::WorkerUnknown(u64::MAX),
            Refusal::HintUntrusted,
            Refusal::ModelUnknown,
            Refusal::RankAlone,
            Refusal::HintMalformed("x-kv-required-taints"),
            Refusal::NoWorkerFits,
            Refusal::WorkersFull,
            Refusal::BodyBroken,
            Refusal::BodyTooLong,
            Refusal::Overloaded,
            Refusal::QueueFull(Full {
                kind: Limit::Tokens,
                current: 9,
                limit: 8,
            }),
            Refusal::HeldFull,
            Refusal::QueueLate,
            Refusal::NoWorkers,
            Refusal::WorkerNotAllowed(3),
        ];
        for (i, refusal) in all.into_iter().enumerate() {
            assert_eq!(refusal.index(), i);
            let body: serde_json::Value = serde_json::from_str(&refusal.body("a\"b")).unwrap();
            assert_eq!(body["error"]["code"], refusal.name());
            assert!(body["error"]["message"].is_string());
        }
        assert!(all[1].body("m").contains("=18446744073709551615 does not"));
        let body: serde_json::Value = serde_json::from_str(&all[3].body("a\"b")).unwrap();
        assert_eq!(body["error"]["message"], "The model `a\"b` does not exist");
        assert_eq!(all.len(), Refusal::COUNT);
        let body: serde_json::Value = serde_json::from_str(&all[11].body("m")).unwrap();
        assert_eq!(body["error"]["details"]["limit_kind"], "raw_isl_tokens");
        assert_eq!(body["error"]["param"], Value::Null);
        let statuses = all.map(|refusal| refusal.status(&Refusing::default()));
        assert_eq!(
            statuses,
            [
                400, 400, 403, 404, 400, 400, 503, 503, 400, 413, 529, 529, 529, 429, 503, 400
            ]
        );
    }
}
