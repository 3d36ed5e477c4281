//! Why a request was routed the way it was: a label of metrics and decision records.

use kv_core::policy::Mode;

/// The closed set of reasons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// By cost, with the overlaps looked up.
    Kv,
    /// By cost, with the overlaps of the prompt's beginning: a longer text was not read in time.
    KvBeginning,
    /// By cost, with the overlaps of the text before the first image, sound or film.
    KvBeforeMedia,
    /// By cost, with the overlaps of chunks of the prompt's text: its pool has no tokenizer.
    KvText,
    /// In turn, as the pool's mode asks.
    RoundRobin,
    /// At random, as the pool's mode asks.
    Random,
    /// By the number of requests, as the pool's mode asks.
    LeastLoaded,
    /// By the number of requests of two at random, as the pool's mode asks.
    PowerOfTwo,
    /// To the worker that it names, as the pool's mode asks.
    Direct,
    /// By device and the number of requests, as the pool's mode asks.
    DeviceAwareWeighted,
    /// By load: no complete set of pages of the table's epoch is there.
    NoIndex,
    /// By load: the sidecar has been silent for so long that the pages count for nothing.
    Stale,
    /// By load: the prompt is text, and its pool has no tokenizer and has KV events.
    Text,
    /// By load: the prompt is text that was not read in time.
    TextLate,
    /// By load: the prompt is text, and the sidecar did not answer.
    TextFailed,
    /// By load: the prompt is text, and the sidecar has too much to read.
    TextOverloaded,
    /// By load: the prompt is text that can't be read: the chat template refuses it, the body makes
    /// no sense, or asks for something that only the engine knows.
    TextRefused,
    /// By load: the request reuses no blocks.
    NoReuse,
    /// By load: the body holds no single list of token ids, or a salt that can't be read.
    NoPrompt,
    /// By load: the body is not JSON.
    BadJson,
    /// By load: more token ids than the table's limit.
    TooManyTokens,
    /// By load: a body longer than the table's limit.
    TooLong,
    /// By load, without waiting for a body: not a generation request.
    Passed,
    /// By load, without waiting for a body: it is compressed.
    Compressed,
    /// By load: this VM can't hold requests.
    Unheld,
    /// Not at all, Envoy chose: no worker takes requests.
    NoOwner,
    /// Not at all, Envoy chose: no worker table is there.
    NoTable,
    /// Not at all, answered with an error: no pool serves the model, or the pool's mode asks for a
    /// worker that the request does not name or may not.
    Refused,
    /// Not at all, answered from the worker table.
    Answered,
}

impl Reason {
    /// Number of reasons.
    pub const COUNT: usize = 29;

    /// The reason as an index below [`Reason::COUNT`].
    #[must_use]
    pub fn index(self) -> usize {
        self as usize
    }

    /// Label in metrics and decision records.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kv => "kv",
            Self::KvBeginning => "kv_beginning",
            Self::KvBeforeMedia => "kv_before_media",
            Self::KvText => "kv_text",
            Self::RoundRobin => "round-robin",
            Self::Random => "random",
            Self::LeastLoaded => "least-loaded",
            Self::PowerOfTwo => "power-of-two",
            Self::Direct => "direct",
            Self::DeviceAwareWeighted => "device-aware-weighted",
            Self::NoIndex => "no_index",
            Self::Stale => "stale",
            Self::Text => "text",
            Self::TextLate => "text_late",
            Self::TextFailed => "text_failed",
            Self::TextOverloaded => "text_overloaded",
            Self::TextRefused => "text_refused",
            Self::NoReuse => "no_reuse",
            Self::NoPrompt => "no_prompt",
            Self::BadJson => "bad_json",
            Self::TooManyTokens => "too_many_tokens",
            Self::TooLong => "too_long",
            Self::Passed => "passed",
            Self::Compressed => "compressed",
            Self::Unheld => "unheld",
            Self::NoOwner => "no_owner",
            Self::NoTable => "no_table",
            Self::Refused => "refused",
            Self::Answered => "answered",
        }
    }

    /// Whether the prompt's blocks are known, or those of its beginning, or chunks of its text.
    #[must_use]
    pub fn has_blocks(self) -> bool {
        matches!(
            self,
            Self::Kv | Self::KvBeginning | Self::KvBeforeMedia | Self::KvText
        )
    }

    /// The reason in a pool of this mode. Modes other than kv look at no prompt, so nothing about
    /// it is the reason there.
    #[must_use]
    pub fn under(self, mode: Mode) -> Self {
        match (self, mode) {
            (Self::Passed | Self::Unheld | Self::NoOwner | Self::NoTable, _)
            | (Self::Refused | Self::Answered, _)
            | (_, Mode::Kv) => self,
            (_, Mode::RoundRobin) => Self::RoundRobin,
            (_, Mode::Random) => Self::Random,
            (_, Mode::LeastLoaded) => Self::LeastLoaded,
            (_, Mode::PowerOfTwo) => Self::PowerOfTwo,
            (_, Mode::Direct) => Self::Direct,
            (_, Mode::DeviceAwareWeighted) => Self::DeviceAwareWeighted,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Reason;

    #[test]
    fn indices_are_dense_and_end_with_the_last_reason() {
        assert_eq!(Reason::Kv.index(), 0);
        assert_eq!(Reason::Answered.index() + 1, Reason::COUNT);
    }
}
