//! What steps come to.

use kv_core::tracker::TrackError;

/// What a step came to, as a metric's label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was booked.
    Booked,
    /// It was listed again in a complete report.
    Kept,
    /// It goes to another owner.
    Moved,
    /// Its first token came.
    FirstToken,
    /// Its prefill is done.
    Prefilled,
    /// Its answer has filled blocks.
    Grown,
    /// A worker failed it.
    Failed,
    /// It is about the VM and not a request.
    OfVm,
    /// It is over.
    Freed,
    /// Its worker said what it found in its cache.
    Cached,
    /// It waits for a worker to have room.
    Queued,
    /// It waits no more.
    Unqueued,
    /// It was not booked.
    Unknown,
    /// It could not be booked.
    Refused(TrackError),
}

impl Outcome {
    /// Label for metrics.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::Booked => "booked",
            Self::Kept => "kept",
            Self::Moved => "moved",
            Self::FirstToken => "first_token",
            Self::Prefilled => "prefilled",
            Self::Grown => "grown",
            Self::Failed => "failed",
            Self::OfVm => "vm",
            Self::Freed => "freed",
            Self::Cached => "cached",
            Self::Queued => "queued",
            Self::Unqueued => "unqueued",
            Self::Unknown => "unknown",
            Self::Refused(error) => error.kind(),
        }
    }
}
