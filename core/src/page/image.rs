//! Parts of a page that go into its next encoding as they are.

use crate::page::HEADER;

/// A page that this index encoded; one of no bytes has nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Image<'a> {
    bytes: &'a [u8],
    keys: &'a [[u8; 4]],
    sets: usize,
    sets_at: usize,
}

/// A unit of such a page.
#[derive(Clone, Copy, Debug)]
pub struct Kept<'a> {
    /// High half of its key.
    pub fingerprint: u32,
    body: &'a [u8],
}

impl<'a> Image<'a> {
    /// The parts of a page.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        Self::read(bytes).unwrap_or_default()
    }

    fn read(bytes: &'a [u8]) -> Option<Self> {
        let units = usize::from(word(bytes, 2)?);
        let (keys, _) = bytes.get(HEADER..HEADER + 4 * units)?.as_chunks();
        Some(Self {
            bytes,
            keys,
            sets: usize::from(word(bytes, 14)?),
            sets_at: usize::from(word(bytes, 12)?),
        })
    }

    /// The unit with a fingerprint; `None` where two have it.
    #[must_use]
    pub fn unit(&self, fingerprint: u32) -> Option<Kept<'a>> {
        let wanted = fingerprint.to_le_bytes();
        let mut same = (0..).zip(self.keys).filter(|(_, key)| **key == wanted);
        let (at, None) = (same.next()?.0, same.next()) else {
            return None;
        };
        let offset = |unit| word(self.bytes, HEADER + 4 * self.keys.len() + 2 * unit);
        let end = if at + 1 < self.keys.len() {
            usize::from(offset(at + 1)?)
        } else {
            self.sets_at
        };
        let body = self.bytes.get(usize::from(offset(at)?)..end)?;
        Some(Kept { fingerprint, body })
    }

    /// A set as encoded.
    #[must_use]
    pub fn set(&self, set: u16) -> &'a [u8] {
        let set = usize::from(set);
        let offset = |set| word(self.bytes, self.sets_at + 2 * set).map(usize::from);
        let end = if set + 1 < self.sets {
            offset(set + 1)
        } else {
            Some(self.bytes.len())
        };
        let range = offset(set).zip(end);
        let bytes = range.and_then(|(from, to)| self.bytes.get(from..to));
        bytes.unwrap_or_default()
    }
}

impl Kept<'_> {
    /// Appends the unit, with its sets numbered anew.
    pub(super) fn copy(&self, out: &mut Vec<u8>, mut set_of: impl FnMut(u16) -> u16) {
        let from = out.len();
        out.extend_from_slice(self.body);
        let runs = out.get_mut(from..).and_then(<[u8]>::split_first_chunk_mut);
        let Some((_, mut runs)) = runs.map(|(head, runs): (&mut [u8; 4], _)| (head, runs)) else {
            return;
        };
        while let Some((head, rest)) = runs.split_first_chunk_mut::<8>() {
            let [_, length, s0, s1, ..] = head;
            [*s0, *s1] = set_of(u16::from_le_bytes([*s0, *s1])).to_le_bytes();
            let body = 2 * usize::from(length.saturating_sub(1));
            runs = rest.get_mut(body..).unwrap_or_default();
        }
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    let (word, _) = bytes.get(at..)?.split_first_chunk()?;
    Some(u16::from_le_bytes(*word))
}
