//! Tokens of a streamed answer, as far as its events show them: one to an event that carries an
//! object.

/// Counts events as the answer arrives. Chunks may end anywhere.
#[derive(Clone, Copy, Debug, Default)]
pub struct Events {
    place: Place,
    count: u32,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Place {
    /// At the start of a line, with so many bytes of [`FIELD`] read.
    Field(usize),
    /// After the field's name.
    Value,
    /// In a line that matters no more.
    #[default]
    Rest,
}

/// What a line with data begins with.
const FIELD: &[u8] = b"data:";

impl Events {
    /// An answer before its first byte.
    #[must_use]
    pub fn new() -> Self {
        Self {
            place: Place::Field(0),
            count: 0,
        }
    }

    /// Takes the next bytes. Returns how many events there were so far.
    pub fn feed(&mut self, chunk: &[u8]) -> u32 {
        for byte in chunk {
            self.place = match (self.place, byte) {
                (_, b'\n' | b'\r') => Place::Field(0),
                (Place::Field(read), byte) if FIELD.get(read) == Some(byte) => {
                    if read + 1 == FIELD.len() {
                        Place::Value
                    } else {
                        Place::Field(read + 1)
                    }
                }
                (Place::Value, b' ') => Place::Value,
                (Place::Value, b'{') => {
                    self.count = self.count.saturating_add(1);
                    Place::Rest
                }
                _ => Place::Rest,
            };
        }
        self.count
    }
}

/// Blocks that an answer fills.
#[derive(Clone, Copy, Debug)]
pub struct Growth {
    events: Events,
    /// Tokens of the prompt.
    prompt: u32,
    block_size: u32,
    /// Blocks of prompt and answer, the last one begun.
    blocks: u32,
    /// Tokens of the answer that the client expects; 0 where not known.
    expected: u32,
}

impl Growth {
    /// An answer to a prompt of so many tokens.
    #[must_use]
    pub fn new(prompt: u32, block_size: u32, expected: u32) -> Self {
        let block_size = block_size.max(1);
        Self {
            events: Events::new(),
            prompt,
            block_size,
            blocks: prompt.div_ceil(block_size),
            expected,
        }
    }

    /// Takes the next bytes of the answer. Returns how many blocks were begun with them, if any,
    /// and the share of the answer that is still to come.
    #[allow(clippy::cast_possible_truncation)]
    pub fn feed(&mut self, chunk: &[u8]) -> Option<(u32, f32)> {
        let tokens = self.events.feed(chunk);
        let blocks = self.prompt.saturating_add(tokens).div_ceil(self.block_size);
        let begun = blocks.saturating_sub(self.blocks);
        self.blocks = blocks;
        let left = match self.expected {
            0 => 1.0,
            expected => (1.0 - f64::from(tokens) / f64::from(expected)).max(0.0),
        };
        (begun > 0).then_some((begun, left as f32))
    }
}

#[cfg(test)]
mod tests {
    use super::{Events, Growth};

    const ANSWER: &[u8] =
        b": ping\n\nevent: x\ndata: {\"a\":\"data: {\"}\n\ndata:{\"b\":1}\r\n\r\ndata: [DONE]\n\n";

    #[test]
    fn events_are_counted_wherever_chunks_end() {
        for cut in 0..ANSWER.len() {
            let (first, rest) = ANSWER.split_at(cut);
            let mut events = Events::new();
            events.feed(first);
            assert_eq!(events.feed(rest), 2, "cut at {cut}");
        }
        assert_eq!(Events::new().feed(b"{\"object\":\"x\"}"), 0);
    }

    #[test]
    fn blocks_grow_with_the_answer_and_fade_with_what_was_expected() {
        let mut growth = Growth::new(10, 4, 10);
        let event = b"data: {}\n\n";
        // Prompt and answer begin the fourth block with the third token.
        let grown: Vec<_> = (0..7).map(|_| growth.feed(event)).collect();
        assert_eq!(grown[..2], [None, None]);
        let (blocks, left) = grown[2].unwrap();
        assert!(blocks == 1 && (left - 0.7).abs() < 1e-6);
        assert_eq!(grown[3..6], [None; 3]);
        assert_eq!(grown[6].map(|(blocks, _)| blocks), Some(1));
        let mut growth = Growth::new(0, 4, 0);
        assert_eq!(growth.feed(&event.repeat(9)), Some((3, 1.0)));
    }
}
