//! The frames delivered last, to know them again.

use std::collections::VecDeque;

use super::{Frame, mark};

/// A delivered frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) sequence: u64,
    pub(super) mark: u64,
}

impl Mark {
    pub(super) fn of(frame: &Frame) -> Self {
        Self {
            sequence: frame.sequence,
            mark: mark(&frame.payload),
        }
    }
}

/// What is known of a frame at or before the last delivered one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Known {
    /// It was delivered.
    Same,
    /// Another was delivered under its number.
    Other,
    /// Its number was passed over.
    Missed,
    /// It is too long ago.
    Unknown,
}

/// Up to so many frames, ascending.
#[derive(Debug)]
pub(super) struct Recent {
    most: usize,
    marks: VecDeque<Mark>,
}

impl Recent {
    pub(super) fn new(most: usize, last: Option<Mark>) -> Self {
        Self {
            most,
            marks: last.into_iter().collect(),
        }
    }

    pub(super) fn push(&mut self, mark: Mark) {
        if self.marks.len() > self.most {
            self.marks.pop_front();
        }
        self.marks.push_back(mark);
    }

    pub(super) fn clear(&mut self) {
        self.marks.clear();
    }

    pub(super) fn known(&self, frame: &Frame) -> Known {
        let at = self.marks.partition_point(|m| m.sequence < frame.sequence);
        match self.marks.get(at) {
            Some(delivered) if delivered.sequence == frame.sequence => {
                if *delivered == Mark::of(frame) {
                    Known::Same
                } else {
                    Known::Other
                }
            }
            Some(_) if at > 0 => Known::Missed,
            _ => Known::Unknown,
        }
    }
}
