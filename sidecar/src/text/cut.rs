//! Where a text may be cut so that its parts have the same token ids as the whole.
//!
//! There are two kinds of cuts.
//!
//! One lies before a space that stands between two ASCII words, of which the first follows a space
//! too: ` one| two`. There
//! - every pre-tokenizer in use has a border (a run of letters ends at a space, and a space goes
//!   with the letters after it), found from the left, so that what comes later doesn't move it;
//! - no vocabulary checked by [`crate::text::Encoder`] has a token across it, so that models
//!   without pre-tokenizer have one too;
//! - no normalizer joins the characters.
//!
//! The part after the cut is tokenized together with the word before it, whose ids are dropped:
//! what tokenizers do at the start of a text befalls that word.
//!
//! The other lies before a special token, where tokenizers take a text apart before they do anything
//! else. Chat templates put one before every message, whatever its script.
//!
//! Which cuts a text has follows from the text near them alone, so two texts with the same
//! beginning have the same cuts in it.

use aho_corasick::{AhoCorasick, Input, MatchKind};

/// Bytes of text between two places where a cut is looked for. What a text ends with after its last
/// cut is tokenized each time, so they are few.
pub const WINDOW: usize = 1024;
/// Bytes before the end of a text in which its last cut is looked for.
const LAST: usize = 4096;
/// Longest word before a cut, in bytes.
const LONGEST_WORD: usize = 64;
/// Special tokens that are looked for.
const MAX_SPECIALS: usize = 32;

/// A place to cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// First byte of what must be tokenized with the text after the cut: of the word before it, or
    /// of the special token itself.
    pub word: usize,
    /// First byte after the cut: the space, or the special token.
    pub at: usize,
}

/// What cuts a tokenizer allows.
#[derive(Clone, Debug, Default)]
pub struct Cuts {
    /// Whether between words.
    words: bool,
    /// Before these.
    specials: Option<Specials>,
}

/// Special tokens to be found in texts.
#[derive(Clone, Debug)]
struct Specials {
    all: AhoCorasick,
    longest: usize,
}

impl Specials {
    fn new(tokens: &[String]) -> Option<Self> {
        let mut all = AhoCorasick::builder();
        let all = all.match_kind(MatchKind::LeftmostFirst).build(tokens);
        Some(Self {
            all: all.ok()?,
            longest: tokens.iter().map(String::len).max()?,
        })
    }

    /// Where the first one begins, in `start..end` of the text.
    fn first(&self, text: &[u8], start: usize, end: usize) -> Option<usize> {
        let most = end.saturating_add(self.longest).min(text.len());
        let place = Input::new(text).range(start.min(most)..most);
        let found = self.all.find(place)?.start();
        (found < end).then_some(found)
    }
}

impl Cuts {
    /// Cuts between words or not, and before those of these special tokens where the token is what
    /// any tokenizer finds there. `others` are all tokens that are looked for in texts as they are.
    #[must_use]
    pub fn new(words: bool, specials: Vec<String>, others: &[String]) -> Self {
        // Another token that begins before one of these and reaches into it would be found first.
        let is_reached = |special: &str, other: &str| {
            let mut tails = other.char_indices().skip(1).map(|(at, _)| &other[at..]);
            tails.any(|tail| tail.starts_with(special) || special.starts_with(tail))
        };
        let mut specials = specials;
        specials.retain(|special| {
            !special.is_empty() && !others.iter().any(|other| is_reached(special, other))
        });
        specials.truncate(MAX_SPECIALS);
        let specials = Specials::new(&specials);
        Self { words, specials }
    }

    /// Whether there are any.
    #[must_use]
    pub fn any(&self) -> bool {
        self.words || self.specials.is_some()
    }

    /// The cuts of a text, ascending: the first of each window but the first.
    pub fn of<'a>(&'a self, text: &'a str, window: usize) -> impl Iterator<Item = Cut> + 'a {
        self.after(text, 0, window)
    }

    /// The same after a place.
    pub fn after<'a>(
        &'a self,
        text: &'a str,
        place: usize,
        window: usize,
    ) -> impl Iterator<Item = Cut> + 'a {
        let bytes = text.as_bytes();
        let window = window.max(1);
        let first = place / window + 1;
        let starts = (first..).map(move |n: usize| n.saturating_mul(window));
        starts
            .take_while(|start| *start < bytes.len())
            .filter_map(move |start| {
                let end = start.saturating_add(window).min(bytes.len());
                self.first(bytes.get(..end)?, start)
            })
    }

    /// The last cut of a text, if there is one near its end.
    #[must_use]
    pub fn last(&self, text: &str) -> Option<Cut> {
        let bytes = text.as_bytes();
        let mut at = bytes.len().saturating_sub(LAST);
        let mut last = None;
        while let Some(cut) = self.first(bytes, at) {
            last = Some(cut);
            // A word that follows this cut may have one too.
            at = cut.at + usize::from(cut.word == cut.at);
        }
        last
    }

    /// The first cut at or after `start`.
    fn first(&self, bytes: &[u8], start: usize) -> Option<Cut> {
        let word = self.words.then(|| between_words(bytes, start)).flatten();
        let end = word.map_or(bytes.len(), |cut| cut.at);
        self.before_special(bytes, start, end).or(word)
    }

    /// The first special token that begins in `start..end`.
    fn before_special(&self, bytes: &[u8], start: usize, end: usize) -> Option<Cut> {
        let at = self.specials.as_ref()?.first(bytes, start, end)?;
        Some(Cut { word: at, at })
    }
}

/// The first cut whose word follows a space at or after `start`. All of it, up to the letter after
/// the cut, lies in `bytes`.
fn between_words(bytes: &[u8], start: usize) -> Option<Cut> {
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

    fn words() -> Cuts {
        Cuts::new(true, Vec::new(), &[])
    }

    fn parts<'t>(cuts: &Cuts, text: &'t str, window: usize) -> Vec<&'t str> {
        let mut from = 0;
        let mut parts = Vec::new();
        for cut in cuts.of(text, window) {
            parts.push(&text[from..cut.at]);
            from = cut.at;
        }
        parts.push(&text[from..]);
        parts
    }

    #[test]
    fn cuts_lie_between_two_words() {
        assert_eq!(parts(&words(), "aa bb cc dd", 3), ["aa bb cc dd"]);
        assert_eq!(parts(&words(), "aa bb cc dd ee", 5), ["aa bb cc", " dd ee"]);
        assert_eq!(
            parts(&words(), "one 1 two, three  four five six", 20).last(),
            Some(&" six")
        );
        assert!(words().of("no(space)here\nat\nall", 1).next().is_none());
        assert!(words().of("", 1).next().is_none());
    }

    #[test]
    fn cuts_lie_before_special_tokens() {
        let specials = ["<|a|>", "[b"].map(str::to_owned);
        let cuts = Cuts::new(false, specials.to_vec(), &specials);
        let text = "\u{4f60}\u{597d} one two three<|a|>x<|a|><|a[b";
        let mut found = Vec::new();
        while let Some(cut) = cuts.first(text.as_bytes(), found.last().map_or(0, |at| at + 1)) {
            found.push(cut.at);
        }
        assert_eq!(found, [20, 26, 34]);
        assert_eq!(cuts.last(text).map(|cut| cut.at), Some(34));
        // Where another token may be found across its beginning, one can't be relied on.
        let others = ["<|a|>", "[b", "x[", "y<|a|>z"].map(str::to_owned);
        let cuts = Cuts::new(false, specials.to_vec(), &others);
        assert!(!cuts.any());
    }

    #[test]
    fn the_last_cut_is_found() {
        let at = |text| words().last(text).map(|cut| cut.at);
        assert_eq!(at("a b c d"), Some(5));
        assert_eq!(at("one two three! x"), Some(7));
        assert_eq!(at("one two three four!"), Some(13));
        assert_eq!(at(""), None);
    }

    #[test]
    fn texts_with_the_same_beginning_have_the_same_cuts_in_it() {
        let text = "the quick brown fox<|a|>jumps over the lazy dog<|a|> ".repeat(20);
        let cuts = Cuts::new(true, vec!["<|a|>".into()], &[]);
        let all: Vec<Cut> = cuts.of(&text, 50).collect();
        assert!(all.len() > 10);
        for end in (0..text.len()).step_by(7) {
            let of_part: Vec<Cut> = cuts.of(&text[..end], 50).collect();
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
