//! What the ids of a stream of events say about lost ones.

use serde::{Deserialize, Serialize};

/// Where a stream of numbered events has come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Id of the last event.
    pub last: Option<u64>,
    publisher: Option<u64>,
}

/// What an event's id says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The first event heard; `true` if none can have come before it.
    First(bool),
    /// The one after the last.
    Next,
    /// Events between it and the last are missing.
    Gap,
    /// The id has been passed already.
    Back,
    /// Another process publishes: what the one before it said no longer holds.
    Restart,
}

impl Cursor {
    /// A cursor after an event.
    #[must_use]
    pub fn after(last: Option<u64>) -> Self {
        Self {
            last,
            publisher: None,
        }
    }

    /// Moves to an event. Ids start at 0 or 1; `publisher` is the process, where it is known.
    pub fn step(&mut self, id: u64, publisher: Option<u64>) -> Step {
        let known = self.publisher;
        let step = match self.last {
            _ if known.is_some() && publisher.is_some() && known != publisher => Step::Restart,
            None => Step::First(id <= 1),
            Some(last) if id <= last => return Step::Back,
            Some(last) if id == last + 1 => Step::Next,
            Some(_) => Step::Gap,
        };
        self.last = Some(id);
        self.publisher = publisher.or(known);
        step
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_tell_order_gaps_and_repetition() {
        let mut cursor = Cursor::default();
        let mut step = |id| cursor.step(id, None);
        assert_eq!(step(1), Step::First(true));
        assert_eq!(step(2), Step::Next);
        assert_eq!(step(5), Step::Gap);
        assert_eq!(step(5), Step::Back);
        assert_eq!(step(6), Step::Next);
        assert_eq!(Cursor::default().step(9, None), Step::First(false));
    }

    #[test]
    fn another_publisher_starts_over() {
        let mut cursor = Cursor::default();
        cursor.step(40, Some(1));
        assert_eq!(cursor.step(1, Some(2)), Step::Restart);
        assert_eq!(cursor.step(2, Some(2)), Step::Next);
    }
}
