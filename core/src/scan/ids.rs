//! The array of `prompt`, which may hold token ids.

use std::mem;

use super::{Fault, Prompt, Step, Tokens, run, skip::Skip};

/// Bytes read one by one after [`run::read`] came to nothing; twice as many each further time.
const PAUSE: usize = 64;
const MAX_PAUSE: usize = 64 * PAUSE;

/// Reader of an array, from the byte after its opening bracket.
#[derive(Clone, Debug)]
pub(super) struct Ids {
    pub(super) tokens: Tokens,
    limit: usize,
    place: Place,
    /// The ids are in an array within the array.
    nested: bool,
    /// The id being read.
    id: u64,
    /// What the array is, if it is not token ids.
    other: Prompt,
    skip: Skip,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// After `[`: an id or `]`.
    First,
    /// After `,`: an id.
    Next,
    /// In an id.
    Digits,
    /// After an id: `,` or `]`.
    Comma,
    /// After the inner array: the `]` of the outer one.
    Outer,
    /// In an array that is not token ids.
    Skip,
}

impl Ids {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            tokens: Tokens::default(),
            limit,
            place: Place::First,
            nested: false,
            id: 0,
            other: Prompt::Absent,
            skip: Skip::default(),
        }
    }

    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// Begins an array.
    pub(super) fn begin(&mut self) {
        self.tokens = Tokens::default();
        self.place = Place::First;
        self.nested = false;
    }

    /// The array that ended.
    pub(super) fn take(&mut self) -> Prompt {
        if self.place == Place::Skip {
            mem::take(&mut self.other)
        } else {
            Prompt::Tokens(mem::take(&mut self.tokens))
        }
    }

    pub(super) fn feed(&mut self, chunk: &[u8], from: usize) -> Result<Step, Fault> {
        let mut at = from;
        let mut pause = PAUSE;
        let mut resume = from;
        while let Some(&byte) = chunk.get(at) {
            match (self.place, byte) {
                (Place::Skip, _) => return self.skip.feed(chunk, at),
                (Place::Digits, b'0'..=b'9') if self.id == 0 => return Err(Fault::Syntax(at)),
                (Place::Digits, b'0'..=b'9') => {
                    self.id = 10 * self.id + u64::from(byte - b'0');
                    if self.id > u64::from(u32::MAX) {
                        self.give_up(Prompt::Unsupported);
                    }
                }
                (Place::Digits, b'.' | b'e' | b'E') => self.give_up(Prompt::Unsupported),
                (Place::Digits, _) => {
                    self.push();
                    continue;
                }
                (Place::First | Place::Next, b'0'..=b'9') => {
                    if at >= resume {
                        let next = run::read(chunk, at, &mut self.tokens.ids, self.limit);
                        if next > at {
                            self.place = Place::Next;
                            at = next;
                            pause = PAUSE;
                            continue;
                        }
                        resume = at + pause;
                        pause = MAX_PAUSE.min(2 * pause);
                    }
                    self.id = u64::from(byte - b'0');
                    self.place = Place::Digits;
                }
                (_, b' ' | b'\t' | b'\n' | b'\r') => {}
                (Place::Comma, b',') => self.place = Place::Next,
                (Place::First | Place::Comma, b']') if self.nested => self.place = Place::Outer,
                (Place::First | Place::Comma | Place::Outer, b']') => {
                    return Ok(Step::Done(at + 1));
                }
                (Place::First, b'[') if !self.nested => self.nested = true,
                (Place::First, b'"') if !self.nested => {
                    self.give_up(Prompt::Text);
                    continue;
                }
                (Place::First | Place::Next, b'"' | b'[' | b'{' | b'-' | b't' | b'f' | b'n')
                | (Place::Outer, b',') => {
                    self.give_up(Prompt::Unsupported);
                    continue;
                }
                _ => return Err(Fault::Syntax(at)),
            }
            at += 1;
        }
        Ok(Step::More)
    }

    /// Takes the id that was read.
    fn push(&mut self) {
        match u32::try_from(self.id) {
            Ok(id) if self.tokens.ids.len() < self.limit => {
                self.tokens.ids.push(id);
                self.place = Place::Comma;
            }
            _ => self.give_up(Prompt::TooManyTokens),
        }
    }

    /// Skips the rest of an array that is not token ids.
    fn give_up(&mut self, other: Prompt) {
        let inner = self.nested && self.place != Place::Outer;
        self.skip = Skip::in_arrays(1 + usize::from(inner));
        self.other = other;
        self.place = Place::Skip;
        self.tokens = Tokens::default();
    }
}
