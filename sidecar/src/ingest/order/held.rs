//! Frames held back while others before them are missing.

use std::collections::BTreeMap;

use super::{Frame, Limits};

/// The frames, by number.
#[derive(Debug)]
pub(super) struct Held {
    limits: Limits,
    frames: BTreeMap<u64, Frame>,
    bytes: usize,
}

impl Held {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            frames: BTreeMap::new(),
            bytes: 0,
        }
    }

    /// Frames and bytes.
    pub(super) fn size(&self) -> (usize, usize) {
        (self.frames.len(), self.bytes)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Keeps a frame; for the next one there is always room. `false` where it is left out, or
    /// where there is another under its number: a replay tells which of them is.
    pub(super) fn push(&mut self, frame: Frame, is_next: bool) -> bool {
        if let Some(held) = self.frames.get(&frame.sequence) {
            return held.payload == frame.payload;
        }
        let bytes = self.bytes + frame.payload.len();
        let is_full = self.frames.len() >= self.limits.frames || bytes > self.limits.bytes;
        if is_full && !is_next {
            return false;
        }
        self.bytes = bytes;
        self.frames.insert(frame.sequence, frame);
        true
    }

    /// Takes a frame out.
    pub(super) fn take(&mut self, sequence: u64) -> Option<Frame> {
        let frame = self.frames.remove(&sequence)?;
        self.bytes -= frame.payload.len();
        Some(frame)
    }

    /// Takes the frame with the least number out.
    pub(super) fn take_first(&mut self) -> Option<Frame> {
        let first = *self.frames.first_key_value()?.0;
        self.take(first)
    }

    /// Takes all out, ascending.
    pub(super) fn take_all(&mut self) -> impl Iterator<Item = Frame> + use<> {
        self.bytes = 0;
        std::mem::take(&mut self.frames).into_values()
    }

    /// Lets all go.
    pub(super) fn clear(&mut self) {
        self.frames.clear();
        self.bytes = 0;
    }
}
