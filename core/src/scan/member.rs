//! Where the values of the top-level object are.

use std::ops::Range;

/// Top-level values whose place is kept.
pub const MAX_MEMBERS: usize = 64;

/// Bytes of a decoded top-level key that is kept.
pub const MAX_KEY: usize = 64;

/// The top-level values in the order of the body, equal keys each time they come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Members {
    /// The keys, one after the other.
    keys: String,
    listed: Vec<Member>,
    unlisted: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Member {
    key: Range<usize>,
    value: Range<usize>,
}

impl Members {
    /// Keys, without escapes, and the byte range of their values in the body.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (&str, Range<usize>)> {
        self.listed.iter().map(|member| {
            let key = self.keys.get(member.key.clone()).unwrap_or_default();
            (key, member.value.clone())
        })
    }

    /// Byte range in the body of the value that counts for `key`: the last one, if the key comes
    /// more than once.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<Range<usize>> {
        self.iter()
            .rev()
            .find_map(|(listed, value)| (listed == key).then_some(value))
    }

    /// Values that are not listed: those after the first [`MAX_MEMBERS`] and those whose key is
    /// longer than [`MAX_KEY`].
    #[must_use]
    pub fn unlisted(&self) -> usize {
        self.unlisted
    }

    /// Adds a value; `key` is `None` if it is too long.
    pub(super) fn add(&mut self, key: Option<&str>, value: Range<usize>) {
        match key {
            Some(key) if self.listed.len() < MAX_MEMBERS => {
                let start = self.keys.len();
                self.keys.push_str(key);
                let key = start..self.keys.len();
                self.listed.push(Member { key, value });
            }
            _ => self.unlisted += 1,
        }
    }
}
