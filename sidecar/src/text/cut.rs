//! Where a text may be cut so that its parts have the same token ids as the whole.
//!
//! A cut lies before a space that stands between two ASCII words, of which the first follows a
//! space too: ` one| two`. There
//! - every pre-tokenizer in use has a border (a run of letters ends at a space, and a space goes
//!   with the letters after it), found from the left, so that what comes later doesn't move it;
//! - no vocabulary checked by [`crate::text::Encoder`] has a token across it, so that models
//!   without pre-tokenizer have one too;
//! - no normalizer joins the characters.
//!
//! The part after the cut is tokenized together with the word before it, whose ids are dropped:
//! what tokenizers do at the start of a text befalls that word.
//!
//! Which cuts a text has follows from the text near them alone, so two texts with the same
//! beginning have the same cuts in it.

/// Bytes of text between two places where a cut is looked for.
pub const WINDOW: usize = 4096;
/// Longest word before a cut, in bytes.
const LONGEST_WORD: usize = 64;

/// A place to cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// First byte of the word before the cut.
    pub word: usize,
    /// First byte after the cut: the space.
    pub at: usize,
}

/// The cuts of a text, ascending: the first of each window but the first.
pub fn cuts(text: &str, window: usize) -> impl Iterator<Item = Cut> + '_ {
    let bytes = text.as_bytes();
    let window = window.max(1);
    let starts = (1..).map(move |n: usize| n.saturating_mul(window));
    starts
        .take_while(|start| *start < bytes.len())
        .filter_map(move |start| {
            let end = start.saturating_add(window).min(bytes.len());
            first(bytes.get(..end)?, start)
        })
}

/// The last cut of a text, if there is one near its end.
#[must_use]
pub fn last(text: &str) -> Option<Cut> {
    let bytes = text.as_bytes();
    let mut at = bytes.len().saturating_sub(WINDOW);
    let mut last = None;
    while let Some(cut) = first(bytes, at) {
        last = Some(cut);
        // The next cut's word may follow the very space of this one.
        at = cut.at;
    }
    last
}

/// The first cut whose word follows a space at or after `start`. All of it, up to the letter after
/// the cut, lies in `bytes`.
fn first(bytes: &[u8], start: usize) -> Option<Cut> {
    let mut at = start;
    loop {
        let space = at + bytes.get(at..)?.iter().position(|b| *b == b' ')?;
        let word = space + 1;
        let letters = bytes.get(word..)?.iter().take(LONGEST_WORD + 1);
        let length = letters.take_while(|b| b.is_ascii_alphabetic()).count();
        let cut = word + length;
        let next = (bytes.get(cut), bytes.get(cut + 1));
        let is_cut = (1..=LONGEST_WORD).contains(&length)
            && matches!(next, (Some(b' '), Some(after)) if after.is_ascii_alphabetic());
        if is_cut {
            return Some(Cut { word, at: cut });
        }
        at = cut.max(word);
    }
}

/// Whether a token lies across a cut: a letter, a space as vocabularies write it, a letter.
#[must_use]
pub fn crosses(token: &str) -> bool {
    let mut two = [None, None];
    for c in token.chars() {
        if let [Some(a), Some(' ' | '\u{2581}' | '\u{120}')] = two
            && char::is_ascii_alphabetic(&a)
            && c.is_ascii_alphabetic()
        {
            return true;
        }
        two = [two[1], Some(c)];
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(text: &str, window: usize) -> Vec<&str> {
        let mut from = 0;
        let mut parts = Vec::new();
        for cut in cuts(text, window) {
            parts.push(&text[from..cut.at]);
            from = cut.at;
        }
        parts.push(&text[from..]);
        parts
    }

    #[test]
    fn cuts_lie_between_two_words() {
        assert_eq!(parts("aa bb cc dd", 3), ["aa bb cc dd"]);
        assert_eq!(parts("aa bb cc dd ee", 5), ["aa bb cc", " dd ee"]);
        assert_eq!(
            parts("one 1 two, three  four five six", 20).last(),
            Some(&" six")
        );
        assert!(cuts("no(space)here\nat\nall", 1).next().is_none());
        assert!(cuts("", 1).next().is_none());
    }

    #[test]
    fn the_last_cut_is_found() {
        let at = |text| last(text).map(|cut| cut.at);
        assert_eq!(at("a b c d"), Some(5));
        assert_eq!(at("one two three! x"), Some(7));
        assert_eq!(at("one two three four!"), Some(13));
        assert_eq!(at(""), None);
    }

    #[test]
    fn texts_with_the_same_beginning_have_the_same_cuts_in_it() {
        let text = "the quick brown fox jumps over the lazy dog ".repeat(20);
        let all: Vec<Cut> = cuts(&text, 50).collect();
        assert!(all.len() > 10);
        for end in (0..text.len()).step_by(7) {
            let of_part: Vec<Cut> = cuts(&text[..end], 50).collect();
            assert_eq!(of_part[..], all[..of_part.len()], "{end}");
            assert!(all.len() - of_part.len() <= (text.len() - end) / 50 + 2);
        }
    }

    #[test]
    fn tokens_across_a_cut_are_seen() {
        for token in ["a b", "the\u{2581}end", "x\u{120}y", "<a b>"] {
            assert!(crosses(token), "{token}");
        }
        for token in [
            "\u{2581}the",
            "\u{2581}\u{2581}",
            "\u{120}a",
            "a\u{2581}",
            "a.b",
            "1 b",
        ] {
            assert!(!crosses(token), "{token}");
        }
    }
}
