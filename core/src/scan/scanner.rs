//! The scanner of the top-level object.

use super::{
    Fault, Field, MAX_KEY, MAX_STRING, Prompt, Scan, ScanError, Step,
    ids::Ids,
    scalar::{Literal, Number},
    skip::Skip,
    text::Text,
};
use crate::hash::Hashing;

/// Reads one body, chunk by chunk.
///
/// ```
/// use kv_core::hash::{Hashing, Seed};
/// use kv_core::scan::{Prompt, Scanner};
///
/// let hashing = Hashing::new(2, Seed::default());
/// let mut scanner = Scanner::new(1_000_000);
/// for chunk in [&br#"{"model": "m", "prompt": [1, 2"#[..], br#"0, 3]}"#] {
///     scanner.feed(chunk);
///     // A later key may tell that this was the wrong hashing. That costs hashing again, no more.
///     scanner.hash(hashing);
/// }
/// let mut scan = scanner.finish()?;
/// assert_eq!(scan.model.value().map(String::as_str), Some("m"));
/// let Prompt::Tokens(tokens) = &mut scan.prompt else { panic!() };
/// assert_eq!(tokens.ids(), [1, 20, 3]);
/// assert_eq!(tokens.hashes(hashing).len(), 1);
/// # Ok::<(), kv_core::scan::ScanError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Scanner {
    state: State,
    error: Option<ScanError>,
    found: Scan,
    /// Bytes of all chunks before the one at hand.
    fed: usize,
    /// The key of the token ids, where the body may have one.
    prompt_key: Option<&'static str>,
    /// The key whose value comes or is being read.
    name: Name,
    /// Offset in the body of the value being read.
    start: usize,
    key: Text,
    text: Text,
    number: Number,
    literal: Literal,
    skip: Skip,
    ids: Ids,
}

/// What the next byte belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before the top-level object.
    Open,
    /// After `{`: a key or `}`.
    FirstKey,
    /// After `,`: a key.
    NextKey,
    /// Inside a key.
    Key,
    /// After a key.
    Colon,
    /// After `:`.
    Value,
    /// Inside the value.
    In(Kind),
    /// After a value: `,` or `}`.
    Comma,
    /// After the top-level object.
    Closed,
}

/// The readers of values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A string that is kept.
    Text,
    Number,
    Literal,
    /// The array of `prompt`.
    Ids,
    SkippedString,
    SkippedNested,
}

/// The keys that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Name {
    Prompt,
    Model,
    CacheSalt,
    Stream,
    MaxTokens,
    Other,
}

impl Name {
    fn of(key: &str, prompt_key: Option<&str>) -> Self {
        match key {
            key if Some(key) == prompt_key => Self::Prompt,
            "model" => Self::Model,
            "cache_salt" => Self::CacheSalt,
            "stream" => Self::Stream,
            "max_tokens" => Self::MaxTokens,
            _ => Self::Other,
        }
    }
}

impl Scanner {
    /// A scanner that keeps up to `max_tokens` token ids of `prompt`.
    #[must_use]
    pub fn new(max_tokens: usize) -> Self {
        Self::of(max_tokens, Some("prompt"))
    }

    /// A scanner that keeps up to `max_tokens` token ids of this key.
    #[must_use]
    pub fn of(max_tokens: usize, prompt_key: Option<&'static str>) -> Self {
        Self {
            state: State::Open,
            error: None,
            found: Scan::default(),
            fed: 0,
            prompt_key,
            name: Name::Other,
            start: 0,
            key: Text::new(MAX_KEY),
            text: Text::new(MAX_STRING),
            number: Number::default(),
            literal: Literal::default(),
            skip: Skip::default(),
            ids: Ids::new(max_tokens),
        }
    }

    /// Token ids that are kept at most.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.ids.limit()
    }

    /// Takes the next bytes of the body. After an error they are ignored.
    pub fn feed(&mut self, chunk: &[u8]) {
        if self.error.is_some() {
            return;
        }
        let mut at = 0;
        while let Some(&byte) = chunk.get(at) {
            match self.advance(chunk, at, byte) {
                Ok(next) => at = next,
                Err(error) => {
                    self.error = Some(error);
                    return;
                }
            }
        }
        self.fed += chunk.len();
    }

    /// Computes the sequence hashes of the token ids so far, so that little is left to do at the
    /// body's end. Ids hashed with another `hashing` before are hashed again.
    pub fn hash(&mut self, hashing: Hashing) {
        let tokens = match &mut self.found.prompt {
            Prompt::Tokens(tokens) => tokens,
            _ => &mut self.ids.tokens,
        };
        tokens.hashes(hashing);
    }

    /// What is known so far. A value counts once its last byte has come, until its key comes again.
    #[must_use]
    pub fn so_far(&self) -> &Scan {
        &self.found
    }

    /// What is wrong with the bytes so far.
    #[must_use]
    pub fn error(&self) -> Option<ScanError> {
        self.error
    }

    /// Ends the body.
    ///
    /// # Errors
    /// The body is not a complete JSON object, as far as that is validated.
    pub fn finish(self) -> Result<Scan, ScanError> {
        match (self.error, self.state) {
            (Some(error), _) => Err(error),
            (None, State::Closed) => Ok(self.found),
            (None, _) => Err(ScanError::Truncated),
        }
    }

    /// Reads `byte`, which is `chunk[at]`, and what follows it in the same value. Returns the index
    /// of the first byte not read.
    fn advance(&mut self, chunk: &[u8], at: usize, byte: u8) -> Result<usize, ScanError> {
        let step = match self.state {
            State::Key => self.key.feed(chunk, at),
            State::In(Kind::Text) => self.text.feed(chunk, at),
            State::In(Kind::Number) => self.number.feed(chunk, at),
            State::In(Kind::Literal) => self.literal.feed(chunk, at),
            State::In(Kind::Ids) => self.ids.feed(chunk, at),
            State::In(Kind::SkippedString | Kind::SkippedNested) => self.skip.feed(chunk, at),
            _ => return self.punctuation(at, byte),
        };
        match step {
            Ok(Step::More) => Ok(chunk.len()),
            Ok(Step::Done(end)) => {
                self.end(end)?;
                Ok(end)
            }
            Err(Fault::Syntax(at)) => Err(self.syntax(at)),
            Err(Fault::TooDeep(at)) => Err(ScanError::TooDeep {
                offset: self.fed + at,
            }),
        }
    }

    /// Reads one byte between values.
    fn punctuation(&mut self, at: usize, byte: u8) -> Result<usize, ScanError> {
        self.state = match (self.state, byte) {
            (state, b' ' | b'\t' | b'\n' | b'\r') => state,
            (State::Open, b'{') => State::FirstKey,
            (State::Open, _) => return Err(ScanError::NotAnObject),
            (State::FirstKey, b'}') | (State::Comma, b'}') => State::Closed,
            (State::FirstKey | State::NextKey, b'"') => {
                self.key.begin();
                State::Key
            }
            (State::Colon, b':') => State::Value,
            (State::Value, _) => return self.begin(at, byte),
            (State::Comma, b',') => State::NextKey,
            _ => return Err(self.syntax(at)),
        };
        Ok(at + 1)
    }

    /// Begins the value whose first byte is `byte`. Returns the index its reader begins at.
    fn begin(&mut self, at: usize, byte: u8) -> Result<usize, ScanError> {
        self.start = self.fed + at;
        let (kind, next) = match (byte, self.name) {
            (b'"', Name::Model | Name::CacheSalt) => {
                self.text.begin();
                (Kind::Text, at + 1)
            }
            (b'"', _) => {
                self.skip = Skip::in_string();
                (Kind::SkippedString, at + 1)
            }
            (b'[', Name::Prompt) => {
                self.ids.begin();
                (Kind::Ids, at + 1)
            }
            (b'[' | b'{', _) => {
                self.skip = Skip::default();
                (Kind::SkippedNested, at)
            }
            (b'-' | b'0'..=b'9', _) => {
                self.number = Number::default();
                (Kind::Number, at)
            }
            _ => {
                self.literal = Literal::of(byte).ok_or(self.syntax(at))?;
                (Kind::Literal, at)
            }
        };
        // Until the value's end is known, the value of an equal key before it counts no more.
        match self.name {
            Name::Prompt => self.found.prompt = Prompt::Absent,
            Name::Model => self.found.model = Field::Absent,
            Name::CacheSalt => self.found.cache_salt = Field::Absent,
            Name::Stream => self.found.stream = Field::Absent,
            Name::MaxTokens => self.found.max_tokens = Field::Absent,
            Name::Other => {}
        }
        self.state = State::In(kind);
        Ok(next)
    }

    /// Ends the key or value that ends before `end`.
    fn end(&mut self, end: usize) -> Result<(), ScanError> {
        let State::In(kind) = self.state else {
            let key = self.key.get().map_err(|_| self.syntax(end - 1))?;
            // A key too long to be kept is none that is read.
            self.name = key.map_or(Name::Other, |key| Name::of(key, self.prompt_key));
            self.state = State::Colon;
            return Ok(());
        };
        self.state = State::Comma;
        // The key was valid when it ended.
        let key = self.key.get().ok().flatten();
        self.found.members.add(key, self.start..self.fed + end);
        if kind == Kind::Literal && self.literal == Literal::NULL {
            return Ok(());
        }
        match self.name {
            Name::Prompt => {
                self.found.prompt = match kind {
                    Kind::Ids => self.ids.take(),
                    Kind::SkippedString => Prompt::Text,
                    _ => Prompt::Unsupported,
                };
            }
            Name::Model => self.found.model = self.string(kind, end)?,
            Name::CacheSalt => self.found.cache_salt = self.string(kind, end)?,
            Name::Stream => {
                self.found.stream = match kind {
                    Kind::Literal => Field::Value(self.literal == Literal::TRUE),
                    _ => Field::Other,
                };
            }
            Name::MaxTokens => {
                self.found.max_tokens = match (kind, self.number.integer()) {
                    (Kind::Number, Some(number)) => Field::Value(number),
                    _ => Field::Other,
                };
            }
            Name::Other => {}
        }
        Ok(())
    }

    /// The string that ends before `end`.
    fn string(&self, kind: Kind, end: usize) -> Result<Field<String>, ScanError> {
        if kind != Kind::Text {
            return Ok(Field::Other);
        }
        let text = self.text.get().map_err(|_| self.syntax(end - 1))?;
        Ok(text.map_or(Field::TooLong, |text| Field::Value(text.to_owned())))
    }

    fn syntax(&self, at: usize) -> ScanError {
        ScanError::Syntax {
            offset: self.fed + at,
        }
    }
}
