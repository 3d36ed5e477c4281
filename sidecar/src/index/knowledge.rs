//! How much of a cache is known, and where that knowledge comes from.

use std::collections::BTreeMap;
use std::time::Duration;

use kv_core::id::DpRank;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::config::Events;
use crate::ingest::Plane;
use crate::ingest::batch::Resume;

/// How long the plane that a worker's events are taken from must be silent before another one is
/// taken instead.
const PLANE_SILENCE: Duration = Duration::from_secs(30);

/// How much of an owner's cache is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Knowledge {
    /// Nothing has been heard of it.
    #[default]
    Unknown,
    /// Blocks may be missing or left over.
    Partial,
    /// All of it.
    Whole,
}

impl Knowledge {
    /// All of it, or not all.
    #[must_use]
    pub fn of(is_whole: bool) -> Self {
        if is_whole { Self::Whole } else { Self::Partial }
    }
}

/// A worker's own stream.
#[derive(Clone, Debug)]
pub(super) struct Stream {
    /// How it comes in.
    pub(super) plane: Plane,
    /// Whether it can be read.
    pub(super) is_open: bool,
    /// The last message that has been applied.
    pub(super) last: Option<Resume>,
    /// Whether all of it up to there has been.
    pub(super) knowledge: Knowledge,
    /// Times that messages were lost.
    pub(super) gaps: u64,
    /// Ranks it has spoken for.
    pub(super) ranks: Vec<DpRank>,
}

impl Stream {
    /// The stream of this number, of which nothing has come.
    pub(super) fn new(plane: Plane, number: u32, ranks: u32) -> Self {
        // A socket is one rank's until it speaks for others; all else carries all ranks.
        let ranks = match plane {
            Plane::Zmq if number < ranks => vec![number],
            _ => (0..ranks).collect(),
        };
        Self {
            plane,
            is_open: false,
            last: None,
            knowledge: Knowledge::Unknown,
            gaps: 0,
            ranks,
        }
    }

    /// It speaks for a rank.
    pub(super) fn speaks_for(&mut self, rank: DpRank) {
        if !self.ranks.contains(&rank) {
            self.ranks.push(rank);
        }
    }

    /// Where to take it up again.
    pub(super) fn resume(&self) -> Option<Resume> {
        let is_whole = self.knowledge == Knowledge::Whole;
        self.last.map(|last| Resume { is_whole, ..last })
    }
}

/// The plane that a worker's events are taken from. Of several that speak for it one counts: two
/// that tell of the same cache contradict each other.
#[derive(Clone, Debug, Default)]
pub(super) struct Source {
    configured: Option<Plane>,
    heard: Option<(Plane, Instant)>,
    /// Others, with how often each was turned away and when it last was.
    refused: BTreeMap<Plane, (u64, Instant)>,
}

/// What an event's plane says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// It is the worker's.
    Yes,
    /// It takes the place of one that fell silent: what that one told is stale.
    Instead(Plane),
    /// It is not; `true` for the first time.
    No(bool),
}

impl Source {
    /// What the configuration says.
    pub(super) fn configure(&mut self, events: Option<&Events>) {
        self.configured = events.map(|events| match events {
            Events::Zmq { .. } | Events::Sockets(_) => Plane::Zmq,
            Events::TrtLlm { .. } => Plane::Poll,
            Events::Http { .. } => Plane::Http,
        });
        if self.configured.is_some() && self.configured != self.plane() {
            self.heard = None;
        }
    }

    /// Whether the worker has a stream of its own.
    pub(super) fn is_own(&self) -> bool {
        self.configured.is_some()
    }

    /// The plane in use, or to be.
    pub(super) fn plane(&self) -> Option<Plane> {
        self.configured.or(self.heard.map(|(plane, _)| plane))
    }

    /// When it was last heard.
    pub(super) fn heard_at(&self) -> Option<Instant> {
        self.heard.map(|(_, at)| at)
    }

    /// Planes that were turned away lately.
    pub(super) fn refused(&self, at: Instant) -> impl Iterator<Item = Plane> + '_ {
        let lately = move |(_, last): &(u64, Instant)| at < *last + PLANE_SILENCE;
        let refused = self.refused.iter();
        refused.filter_map(move |(plane, times)| lately(times).then_some(*plane))
    }

    /// An event has come on a plane.
    pub(super) fn take(&mut self, plane: Plane, at: Instant) -> Taken {
        let taken = match (self.configured, self.heard) {
            (Some(own), _) if own != plane => Taken::No(true),
            (None, Some((other, last))) if other != plane && at < last + PLANE_SILENCE => {
                Taken::No(true)
            }
            (None, Some((other, _))) if other != plane => Taken::Instead(other),
            _ => Taken::Yes,
        };
        if taken == Taken::No(true) {
            let (times, last) = self.refused.entry(plane).or_insert((0, at));
            let is_first = *times == 0 || at >= *last + PLANE_SILENCE;
            *times += 1;
            *last = at;
            return Taken::No(is_first);
        }
        self.heard = Some((plane, at));
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_plane_heard_counts_until_it_falls_silent() {
        let mut source = Source::default();
        let at = Instant::now();
        assert_eq!(source.take(Plane::Dynamo, at), Taken::Yes);
        assert_eq!(source.take(Plane::Json, at), Taken::No(true));
        assert_eq!(source.take(Plane::Json, at), Taken::No(false));
        assert_eq!(source.refused(at).collect::<Vec<_>>(), [Plane::Json]);
        let later = at + PLANE_SILENCE;
        assert_eq!(source.refused(later).count(), 0);
        assert_eq!(
            source.take(Plane::Json, later),
            Taken::Instead(Plane::Dynamo)
        );
        assert_eq!(source.take(Plane::Json, later), Taken::Yes);
    }

    #[test]
    fn the_configured_plane_wins_whoever_speaks_first() {
        let mut source = Source::default();
        let at = Instant::now();
        source.take(Plane::Dynamo, at);
        source.configure(Some(&Events::Http {
            token_file: None,
            trusts_loopback: true,
        }));
        assert_eq!(
            source.take(Plane::Dynamo, at + 2 * PLANE_SILENCE),
            Taken::No(true)
        );
        assert_eq!(source.take(Plane::Http, at), Taken::Yes);
        assert_eq!(source.plane(), Some(Plane::Http));
    }

    #[test]
    fn a_socket_is_one_ranks_and_a_post_is_all_ranks() {
        assert_eq!(Stream::new(Plane::Zmq, 1, 4).ranks, [1]);
        assert_eq!(Stream::new(Plane::Http, 0, 2).ranks, [0, 1]);
        let mut stream = Stream::new(Plane::Zmq, 0, 2);
        stream.speaks_for(1);
        stream.speaks_for(1);
        assert_eq!(stream.ranks, [0, 1]);
    }
}
