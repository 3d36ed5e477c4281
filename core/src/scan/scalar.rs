//! Numbers and literals.

use super::{Fault, Step};

/// Reader of a number, from its first byte.
#[derive(Clone, Debug, Default)]
pub(super) struct Number {
    place: Place,
    /// The value, while it is an integer from 0 to [`u64::MAX`].
    value: Option<u64>,
}

#[derive(Clone, Copy, Debug, Default)]
enum Place {
    #[default]
    Start,
    /// After `-`.
    Minus,
    /// After a leading zero.
    Zero,
    /// In the integer part.
    Integer,
    /// After `.`.
    Point,
    /// In the fraction.
    Fraction,
    /// After `e`.
    Exponent,
    /// After the exponent's sign.
    ExponentSign,
    /// In the exponent.
    ExponentDigits,
}

impl Number {
    /// The number that ended, if it is an integer from 0 to [`u64::MAX`] and written as one.
    pub(super) fn integer(&self) -> Option<u64> {
        self.value
    }

    pub(super) fn feed(&mut self, chunk: &[u8], from: usize) -> Result<Step, Fault> {
        for (at, &byte) in chunk.iter().enumerate().skip(from) {
            self.place = match (self.place, byte) {
                (Place::Start, b'-') => Place::Minus,
                (Place::Start, b'0') => {
                    self.value = Some(0);
                    Place::Zero
                }
                (Place::Start, b'1'..=b'9') => {
                    self.value = Some(u64::from(byte - b'0'));
                    Place::Integer
                }
                (Place::Minus, b'0') => Place::Zero,
                (Place::Minus, b'1'..=b'9') => Place::Integer,
                (Place::Integer, b'0'..=b'9') => {
                    self.value = self.value.and_then(|value| {
                        value.checked_mul(10)?.checked_add(u64::from(byte - b'0'))
                    });
                    Place::Integer
                }
                (Place::Zero | Place::Integer, b'.') => Place::Point,
                (Place::Point | Place::Fraction, b'0'..=b'9') => Place::Fraction,
                (Place::Zero | Place::Integer | Place::Fraction, b'e' | b'E') => Place::Exponent,
                (Place::Exponent, b'+' | b'-') => Place::ExponentSign,
                (Place::Exponent | Place::ExponentSign | Place::ExponentDigits, b'0'..=b'9') => {
                    Place::ExponentDigits
                }
                (Place::Zero | Place::Integer | Place::Fraction | Place::ExponentDigits, _) => {
                    return Ok(Step::Done(at));
                }
                _ => return Err(Fault::Syntax(at)),
            };
            if matches!(self.place, Place::Point | Place::Exponent) {
                self.value = None;
            }
        }
        Ok(Step::More)
    }
}

/// Reader of `true`, `false` and `null`, from the first byte.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Literal {
    text: &'static str,
    read: usize,
}

impl Literal {
    /// `true`, read to its end.
    pub(super) const TRUE: Self = Self::ended("true");
    /// `null`, read to its end.
    pub(super) const NULL: Self = Self::ended("null");

    const fn ended(text: &'static str) -> Self {
        Self {
            text,
            read: text.len(),
        }
    }

    /// The literal that begins with `first`.
    pub(super) fn of(first: u8) -> Option<Self> {
        let text = match first {
            b't' => "true",
            b'f' => "false",
            b'n' => "null",
            _ => return None,
        };
        Some(Self { text, read: 0 })
    }

    pub(super) fn feed(&mut self, chunk: &[u8], from: usize) -> Result<Step, Fault> {
        for (at, &byte) in chunk.iter().enumerate().skip(from) {
            if self.text.as_bytes().get(self.read) != Some(&byte) {
                return Err(Fault::Syntax(at));
            }
            self.read += 1;
            if self.read == self.text.len() {
                return Ok(Step::Done(at + 1));
            }
        }
        Ok(Step::More)
    }
}
