//! Requests that are answered here, because the pool's mode asks for what they do not say.

use std::fmt::Write as _;

use kv_core::id::WorkerId;

/// Why a request goes to no worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It names no worker.
    WorkerMissing,
    /// It names a worker, or a rank of it, that the pool does not have.
    WorkerUnknown(WorkerId),
    /// It names a worker, and its route does not let it.
    HintUntrusted,
}

impl Refusal {
    /// Number of kinds.
    pub const COUNT: usize = 3;

    /// The kind as an index below [`Refusal::COUNT`].
    #[must_use]
    pub fn index(self) -> usize {
        match self {
            Self::WorkerMissing => 0,
            Self::WorkerUnknown(_) => 1,
            Self::HintUntrusted => 2,
        }
    }

    /// Metric label, and the error's code.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::WorkerMissing => "worker_missing",
            Self::WorkerUnknown(_) => "worker_unknown",
            Self::HintUntrusted => "hint_untrusted",
        }
    }

    /// HTTP status.
    #[must_use]
    pub fn status(self) -> u32 {
        match self {
            Self::WorkerMissing | Self::WorkerUnknown(_) => 400,
            Self::HintUntrusted => 403,
        }
    }

    /// Body of the answer, an error as OpenAI's API has them.
    #[must_use]
    pub fn body(self) -> String {
        let kind = match self {
            Self::WorkerMissing | Self::WorkerUnknown(_) => "invalid_request_error",
            Self::HintUntrusted => "permission_error",
        };
        let mut message = String::new();
        // Writing to a string cannot fail.
        let _ = match self {
            Self::WorkerMissing => write!(
                message,
                "requests must name their worker, in nvext.backend_instance_id or the header \
                 x-dynamo-worker-instance-id"
            ),
            Self::WorkerUnknown(worker) => write!(
                message,
                "nvext.backend_instance_id={worker} does not identify a known worker"
            ),
            Self::HintUntrusted => write!(message, "this route does not let clients name workers"),
        };
        format!(
            r#"{{"error":{{"message":"{message}","type":"{kind}","param":"nvext.backend_instance_id","code":"{}"}}}}"#,
            self.name()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::Refusal;

    #[test]
    fn answers_are_json_as_openai_has_it() {
        let all = [
            Refusal::WorkerMissing,
            Refusal::WorkerUnknown(u64::MAX),
            Refusal::HintUntrusted,
        ];
        for (i, refusal) in all.into_iter().enumerate() {
            assert_eq!(refusal.index(), i);
            let body: serde_json::Value = serde_json::from_str(&refusal.body()).unwrap();
            assert_eq!(body["error"]["code"], refusal.name());
            assert!(body["error"]["message"].is_string());
        }
        assert!(all[1].body().contains("=18446744073709551615 does not"));
        assert_eq!(all.len(), Refusal::COUNT);
    }
}
