//! Values that are not kept: only their end is looked for.

use super::{Fault, MAX_DEPTH, Step, lanes};

/// Reader of an array or object from its opening bracket, or of the rest of one.
#[derive(Clone, Debug, Default)]
pub(super) struct Skip {
    /// Open brackets.
    depth: usize,
    in_string: bool,
    /// The byte before was an escaping `\`.
    escaped: bool,
}

impl Skip {
    /// Reader of a string, from the byte after its opening quote.
    pub(super) fn in_string() -> Self {
        Self {
            in_string: true,
            ..Self::default()
        }
    }

    /// Reader of what remains of `depth` arrays, one within the other.
    pub(super) fn in_arrays(depth: usize) -> Self {
        Self {
            depth,
            ..Self::default()
        }
    }

    pub(super) fn feed(&mut self, chunk: &[u8], from: usize) -> Result<Step, Fault> {
        let mut at = from;
        if self.escaped && at < chunk.len() {
            self.escaped = false;
            at += 1;
        }
        loop {
            let found = if self.in_string {
                lanes::find_string_mark(chunk, at)
            } else {
                lanes::find_bracket_or_quote(chunk, at)
            };
            let Some((mark, byte)) = found else {
                return Ok(Step::More);
            };
            at = mark + 1;
            match byte {
                b'"' => self.in_string = !self.in_string,
                b'\\' if at == chunk.len() => self.escaped = true,
                b'\\' => {
                    at += 1;
                    continue;
                }
                b'[' | b'{' => {
                    self.depth += 1;
                    if self.depth > MAX_DEPTH {
                        return Err(Fault::TooDeep(mark));
                    }
                }
                _ => self.depth = self.depth.saturating_sub(1),
            }
            if self.depth == 0 && !self.in_string {
                return Ok(Step::Done(at));
            }
        }
    }
}
