//! What a worker says of its cache in the `usage` at the end of an answer:
//! `"prompt_tokens_details": {"cached_tokens": N}`, in the last event of a stream or at the end of
//! a JSON document.

use serde::Deserialize;

/// The body's key with the options of a streamed answer.
pub const STREAM_OPTIONS: &str = "stream_options";
/// Longest value of [`STREAM_OPTIONS`] that is read, in bytes.
pub const MAX_STREAM_OPTIONS: usize = 1 << 10;

/// Bytes at the end of an answer that are looked at.
const TAIL: usize = 2048;
/// The key, as it stands in JSON.
const KEY: &[u8] = b"\"cached_tokens\"";

/// Whether options of a streamed answer ask for its usage, which ends it only then. Of options that
/// can't be read that is not known.
#[must_use]
pub fn is_asked_for(options: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Options {
        include_usage: Option<bool>,
    }
    let options = serde_json::from_slice::<Options>(options).ok();
    options.is_none_or(|options| options.include_usage == Some(true))
}

/// The end of an answer, and what its worker was expected to find in its cache.
#[derive(Debug)]
pub struct Usage {
    /// Prompt tokens.
    predicted: u32,
    tail: Vec<u8>,
}

impl Usage {
    /// Of an answer that has not begun.
    #[must_use]
    pub fn new(predicted: u32) -> Self {
        Self {
            predicted,
            tail: Vec::new(),
        }
    }

    /// Prompt tokens that the decision took to be there.
    #[must_use]
    pub fn predicted(&self) -> u32 {
        self.predicted
    }

    /// Bytes at the end of a part of this size that are of interest: where they begin, and how
    /// many.
    #[must_use]
    pub fn wanted(size: usize) -> (usize, usize) {
        let wanted = size.min(TAIL);
        (size - wanted, wanted)
    }

    /// The end of the next part.
    pub fn take(&mut self, part: &[u8]) {
        let kept = TAIL.saturating_sub(part.len());
        let dropped = self.tail.len().saturating_sub(kept);
        self.tail.drain(..dropped);
        self.tail.extend(part);
    }

    /// Prompt tokens that the worker found in its cache, if it said so.
    #[must_use]
    pub fn found(&self) -> Option<u32> {
        let mut places = self.tail.windows(KEY.len()).enumerate();
        let (at, _) = places.rfind(|(at, window)| *window == KEY && self.is_key(*at))?;
        let rest = self.tail.get(at + KEY.len()..)?.trim_ascii_start();
        let rest = rest.strip_prefix(b":")?.trim_ascii_start();
        let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        // A number that is cut off is none.
        let (digits, after) = rest.split_at_checked(digits)?;
        let ends = matches!(after.first(), Some(b',' | b'}' | b' ' | b'\r' | b'\n'));
        let digits = std::str::from_utf8(digits).ok()?;
        digits.parse().ok().filter(|_| ends)
    }

    /// Whether what begins there is a key. Within a text, which a client may have dictated, the
    /// quote is escaped.
    fn is_key(&self, at: usize) -> bool {
        let before = at.checked_sub(1).and_then(|at| self.tail.get(at));
        before.is_some_and(|byte| *byte != b'\\')
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(parts: &[&str]) -> Option<u32> {
        let mut usage = Usage::new(0);
        for part in parts {
            let (start, size) = Usage::wanted(part.len());
            usage.take(&part.as_bytes()[start..start + size]);
            assert!(usage.tail.len() <= TAIL);
        }
        usage.found()
    }

    #[test]
    fn usage_is_looked_for_where_a_stream_may_have_it() {
        let asked = [
            &br#"{"include_usage": true, "continuous_usage_stats": false}"#[..],
            br#"{"include_usage": 1}"#,
        ];
        assert!(asked.into_iter().all(is_asked_for));
        let silent = [
            &b"{}"[..],
            br#"{"include_usage":false}"#,
            br#"{"include_usage":null}"#,
        ];
        assert!(!silent.into_iter().any(is_asked_for));
    }

    #[test]
    fn the_end_of_a_document_or_a_stream_tells() {
        let long = "x".repeat(10_000);
        let document = format!(
            "{{\"choices\":[{{\"text\":\"{long}\"}}],\"usage\":{{\"prompt_tokens\":900,\
             \"prompt_tokens_details\":{{\"cached_tokens\": 512 }}}}}}"
        );
        assert_eq!(found(&[&document]), Some(512));
        let cut: Vec<&str> = document
            .as_bytes()
            .chunks(7)
            .map(|c| std::str::from_utf8(c).unwrap())
            .collect();
        assert_eq!(found(&cut), Some(512));
        let stream = [
            "data: {\"choices\":[{\"text\":\"a\"}],\"usage\":null}\n\n",
            "data: {\"choices\":[],\"usage\":{\"prompt_tokens_details\":{\"cached_tokens\":16,\"audio_tokens\":0}}}\n\n",
            "data: [DONE]\n\n",
        ];
        assert_eq!(found(&stream), Some(16));
    }

    #[test]
    fn an_answer_that_does_not_say_tells_nothing() {
        let silent = [
            "",
            "{\"usage\":{\"prompt_tokens\":3,\"prompt_tokens_details\":null}}",
            "{\"usage\":{\"prompt_tokens_details\":{\"cached_tokens\":null}}}",
            "{\"usage\":{\"prompt_tokens_details\":{\"cached_tokens\":-1}}}",
            "{\"usage\":{\"prompt_tokens_details\":{\"cached_tokens\":99999999999}}}",
            "{\"usage\":{\"prompt_tokens_details\":{\"cached_tokens\":51",
            "\"cached_tokens\":3,",
        ];
        for text in silent {
            assert_eq!(found(&[text]), None, "{text}");
        }
    }

    #[test]
    fn generated_text_that_looks_like_usage_is_not_taken_for_it() {
        let text =
            r#"{"usage":{"d":{"cached_tokens":7}},"choices":[{"text":"\"cached_tokens\":9,"}]}"#;
        assert_eq!(found(&[text]), Some(7));
    }
}
