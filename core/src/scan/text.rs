//! Strings that are kept, decoded as they come.

use std::str::{self, Utf8Error};

use super::{Fault, Step};

/// Reader of a string, from the byte after its opening quote.
#[derive(Clone, Debug)]
pub(super) struct Text {
    /// The decoded bytes, at most `limit`.
    bytes: Vec<u8>,
    limit: usize,
    too_long: bool,
    place: Place,
}

#[derive(Clone, Copy, Debug)]
enum Place {
    Plain,
    /// After `\`. Holds the high surrogate that the escape must complete.
    Escape(Option<u16>),
    /// In the digits of `\u`.
    Hex {
        high: Option<u16>,
        unit: u16,
        missing: u8,
    },
    /// After an escaped high surrogate: the `\` of its other half.
    Low(u16),
}

impl Text {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            bytes: Vec::new(),
            limit,
            too_long: false,
            place: Place::Plain,
        }
    }

    /// Begins a string.
    pub(super) fn begin(&mut self) {
        self.bytes.clear();
        self.too_long = false;
        self.place = Place::Plain;
    }

    /// The string that ended, `None` if it is longer than the limit.
    pub(super) fn get(&self) -> Result<Option<&str>, Utf8Error> {
        if self.too_long {
            return Ok(None);
        }
        str::from_utf8(&self.bytes).map(Some)
    }

    pub(super) fn feed(&mut self, chunk: &[u8], from: usize) -> Result<Step, Fault> {
        for (at, &byte) in chunk.iter().enumerate().skip(from) {
            self.place = match self.place {
                Place::Plain => match byte {
                    b'"' => return Ok(Step::Done(at + 1)),
                    b'\\' => Place::Escape(None),
                    0..0x20 => return Err(Fault::Syntax(at)),
                    _ => {
                        self.push(&[byte]);
                        Place::Plain
                    }
                },
                Place::Low(high) if byte == b'\\' => Place::Escape(Some(high)),
                Place::Low(_) => return Err(Fault::Syntax(at)),
                Place::Escape(high) => match (byte, high) {
                    (b'u', high) => Place::Hex {
                        high,
                        unit: 0,
                        missing: 4,
                    },
                    (_, Some(_)) => return Err(Fault::Syntax(at)),
                    (_, None) => {
                        self.push(&[unescaped(byte).ok_or(Fault::Syntax(at))?]);
                        Place::Plain
                    }
                },
                Place::Hex {
                    high,
                    unit,
                    missing,
                } => {
                    let digit = char::from(byte).to_digit(16).ok_or(Fault::Syntax(at))?;
                    let unit = unit << 4 | digit as u16;
                    if missing > 1 {
                        Place::Hex {
                            high,
                            unit,
                            missing: missing - 1,
                        }
                    } else {
                        self.unit(high, unit).ok_or(Fault::Syntax(at))?
                    }
                }
            };
        }
        Ok(Step::More)
    }

    /// Takes an escaped UTF-16 unit. `None` if it is half a surrogate pair without the other.
    fn unit(&mut self, high: Option<u16>, unit: u16) -> Option<Place> {
        if high.is_none() && (0xd800..0xdc00).contains(&unit) {
            return Some(Place::Low(unit));
        }
        let character = char::decode_utf16(high.into_iter().chain([unit]))
            .next()?
            .ok()?;
        self.push(character.encode_utf8(&mut [0; 4]).as_bytes());
        Some(Place::Plain)
    }

    fn push(&mut self, bytes: &[u8]) {
        if self.bytes.len() + bytes.len() <= self.limit {
            self.bytes.extend_from_slice(bytes);
        } else {
            self.too_long = true;
        }
    }
}

/// What `\` and `byte` stand for.
fn unescaped(byte: u8) -> Option<u8> {
    Some(match byte {
        b'"' | b'\\' | b'/' => byte,
        b'b' => 0x08,
        b'f' => 0x0c,
        b'n' => b'\n',
        b'r' => b'\r',
        b't' => b'\t',
        _ => return None,
    })
}
