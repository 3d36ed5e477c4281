//! One numbered stream put in order.
//!
//! Frames go in as they come, replays among them; deliveries, requests for replays and turns come
//! out. Nothing here waits or reads a clock. What comes out keeps to this: between two `Restarted`
//! the delivered frames are of one run of the engine and their numbers only grow, and a number
//! that is passed over has been told as a `Gap` before. A run that can't be told from the one
//! before counts as another.

mod held;
mod recent;

use std::collections::VecDeque;

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use super::batch::{Resume, Turn};
use held::Held;
use recent::{Known, Mark, Recent};

/// Attempts at a replay that bring nothing before the stream goes on without.
const TRIES: u32 = 3;

/// A message of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Its number; the first of a run is 0.
    pub sequence: u64,
    /// What it says.
    pub payload: Bytes,
    /// Unix nanoseconds when it was received.
    pub received_ns: u64,
}

/// What is to be done next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Hand this frame on.
    Deliver(Frame),
    /// A frame that a restored index includes: it tells only what later ones refer to.
    Recall(Frame),
    /// Tell this.
    Turn(Turn),
    /// Ask for all frames from this number on; a replay under way is void.
    Replay {
        /// The first number.
        from: u64,
    },
}

/// What a source does for who comes late.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// It gives frames once more when asked.
    Replays,
    /// What is not heard is lost.
    Live,
    /// It keeps frames until they are read: only a full buffer loses some.
    Queues,
}

/// Most that is held back while frames before it are missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Frames.
    pub frames: usize,
    /// Bytes of payload.
    pub bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            frames: 16_384,
            bytes: 64 << 20,
        }
    }
}

/// A replay under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Asking {
    /// Whether the engine is known to be in the run of the last delivered frame.
    is_same_run: bool,
    /// Whether it has brought something.
    has_progress: bool,
}

/// The state of one stream.
#[derive(Debug)]
pub struct Order {
    source: Source,
    last: Option<Mark>,
    /// Delivered frames up to `last`, as many as may be held.
    recent: Recent,
    /// Nothing of the run is missing up to `last`.
    is_whole: bool,
    /// It has been told how complete the stream is.
    is_told: bool,
    /// Nothing but `last` is known of what was delivered: its frames are wanted once more.
    wants_past: bool,
    /// The connection that `last` came over is gone: the next one may lead to another run.
    is_unsure: bool,
    asking: Option<Asking>,
    fruitless: u32,
    held: Held,
    /// When the replay under way has ended, another is needed.
    asks_again: bool,
    /// A replay has shown in a quiet time that nothing follows `last`.
    is_checked: bool,
    /// The replay under way is such a check.
    is_checking: bool,
    steps: VecDeque<Step>,
}

/// By what a frame is known again.
#[must_use]
pub fn mark(payload: &[u8]) -> u64 {
    xxh3_64(payload)
}

impl Order {
    /// A stream of which nothing was delivered but what a restored index includes.
    #[must_use]
    pub fn new(source: Source, limits: Limits, resume: Option<Resume>) -> Self {
        let last = resume.map(|resume| Mark {
            sequence: resume.sequence,
            mark: resume.mark,
        });
        Self {
            source,
            last,
            recent: Recent::new(limits.frames, last),
            is_whole: resume.is_none_or(|resume| resume.is_whole),
            is_told: false,
            wants_past: last.is_some(),
            is_unsure: last.is_some() && source != Source::Queues,
            asking: None,
            fruitless: 0,
            held: Held::new(limits),
            asks_again: false,
            is_checked: false,
            is_checking: false,
            steps: VecDeque::new(),
        }
    }

    /// What is to be done next; `None` until something comes in.
    pub fn next_step(&mut self) -> Option<Step> {
        self.steps.pop_front()
    }

    /// Frames and bytes held back.
    #[must_use]
    pub fn held(&self) -> (usize, usize) {
        self.held.size()
    }

    /// The source can be read, for the first time or again.
    pub fn opened(&mut self) {
        self.steps.push_back(Step::Turn(Turn::Opened));
        self.is_unsure = self.last.is_some() && self.source != Source::Queues;
        self.asking = None;
        self.fruitless = 0;
        self.is_checked = false;
        self.is_checking = false;
        // Their run may be over.
        self.held.clear();
        self.ask();
    }

    /// The source can't be read.
    pub fn closed(&mut self) {
        self.asking = None;
        self.held.clear();
        self.steps.push_back(Step::Turn(Turn::Closed));
    }

    /// Nothing has come for a while: frames lost at the very end would stay unnoticed.
    pub fn quiet(&mut self) {
        if self.asking.is_none() && !self.is_checked {
            self.is_checking = true;
            self.ask();
        }
    }

    /// Whether frames are missing before this number.
    #[must_use]
    pub fn misses(&self, sequence: u64) -> bool {
        sequence > self.next()
    }

    /// A frame that was published.
    pub fn live(&mut self, frame: Frame) {
        self.is_checked = false;
        self.is_checking = false;
        if let Some(asking) = self.asking {
            let is_past = frame.sequence < self.next();
            if asking.is_same_run && is_past {
                self.asks_again |= self.recent.known(&frame) != Known::Same;
            } else {
                self.hold(frame);
            }
            self.pump();
        } else if frame.sequence == self.next() && !self.is_unsure {
            self.deliver(frame);
        } else if self.recent.known(&frame) == Known::Same {
            // A repetition.
        } else if self.source == Source::Replays {
            self.hold(frame);
            self.ask();
        } else {
            self.settle(frame);
        }
    }

    /// A frame of the replay under way.
    pub fn replayed(&mut self, frame: Frame) {
        let Some(asking) = &mut self.asking else {
            return;
        };
        if asking.is_same_run {
            let next = self.next();
            if frame.sequence < next {
                self.asks_again |= self.recent.known(&frame) == Known::Other;
                return;
            }
            self.hold(frame);
            self.pump();
            let has_progress = self.next() > next;
            if let Some(asking) = &mut self.asking {
                asking.has_progress |= has_progress;
            }
            return;
        }
        let Some(last) = self.last else {
            return;
        };
        if frame.sequence < last.sequence {
            if self.wants_past {
                self.steps.push_back(Step::Recall(frame));
            }
            return;
        }
        if Mark::of(&frame) == last {
            asking.is_same_run = true;
            if std::mem::take(&mut self.wants_past) {
                self.steps.push_back(Step::Recall(frame));
            }
            self.is_unsure = false;
            // What raised the question was old.
            let next = self.next();
            for frame in self.held.take_all().filter(|f| f.sequence >= next) {
                self.hold(frame);
            }
            self.pump();
        } else {
            self.restart();
            self.ask();
        }
    }

    /// The replay under way has come to its end, or has failed.
    pub fn replay_ended(&mut self, is_complete: bool) {
        let Some(asking) = self.asking.take() else {
            return;
        };
        if !asking.is_same_run && is_complete {
            // An engine of the same run would have had the last frame.
            self.restart();
            self.ask();
            return;
        }
        if asking.has_progress {
            self.fruitless = 0;
        }
        let is_done = is_complete && self.held.is_empty() && !self.asks_again;
        if is_done {
            self.fruitless = 0;
            self.is_checked = self.is_checking;
            self.caught_up();
            return;
        }
        if !asking.has_progress {
            self.fruitless += 1;
        }
        if self.fruitless < TRIES {
            self.ask();
            return;
        }
        self.fruitless = 0;
        self.asks_again = false;
        if is_complete {
            self.give_up_hole();
        } else {
            self.give_up_replay();
        }
        if self.asking.is_none() && self.last.is_some() && !self.is_unsure {
            self.caught_up();
        }
    }

    fn next(&self) -> u64 {
        self.last.map_or(0, |last| last.sequence.saturating_add(1))
    }

    /// Asks for the last frame too: it tells whether the run is the same.
    fn ask(&mut self) {
        if self.source != Source::Replays {
            return;
        }
        self.asks_again = false;
        self.asking = Some(Asking {
            is_same_run: self.last.is_none(),
            has_progress: false,
        });
        let from = match self.last {
            Some(last) if !self.wants_past => last.sequence,
            _ => 0,
        };
        self.steps.push_back(Step::Replay { from });
    }

    fn hold(&mut self, frame: Frame) {
        let is_next = frame.sequence == self.next();
        self.asks_again |= !self.held.push(frame, is_next);
    }

    /// Delivers what has nothing missing before it.
    fn pump(&mut self) {
        let is_same_run = self.asking.is_none_or(|asking| asking.is_same_run);
        while is_same_run && let Some(frame) = self.held.take(self.next()) {
            self.deliver(frame);
        }
    }

    fn deliver(&mut self, frame: Frame) {
        if self.last.is_none() && self.asking.is_none() {
            self.caught_up();
        }
        let mark = Mark::of(&frame);
        self.last = Some(mark);
        self.wants_past = false;
        self.is_unsure = false;
        self.recent.push(mark);
        self.steps.push_back(Step::Deliver(frame));
    }

    /// Tells how complete the stream is.
    fn caught_up(&mut self) {
        if self.is_whole {
            self.steps.push_back(Step::Turn(Turn::Whole));
        } else if !self.is_told {
            self.steps.push_back(Step::Turn(Turn::Gap { missing: 0 }));
        }
        self.is_told = true;
    }

    fn restart(&mut self) {
        self.steps.push_back(Step::Turn(Turn::Restarted));
        self.last = None;
        self.wants_past = false;
        self.recent.clear();
        self.is_whole = true;
        self.is_unsure = false;
        self.held.clear();
    }

    fn lose(&mut self, missing: u64) {
        self.is_whole = false;
        self.is_told = true;
        self.steps.push_back(Step::Turn(Turn::Gap { missing }));
    }

    /// The replay is complete and has not what is missing before the first held frame.
    fn give_up_hole(&mut self) {
        let Some(frame) = self.held.take_first() else {
            return;
        };
        self.lose(frame.sequence.saturating_sub(self.next()));
        self.deliver(frame);
        self.pump();
        if !self.held.is_empty() {
            self.ask();
        }
    }

    /// Nobody answers: what is held is judged by its numbers alone.
    fn give_up_replay(&mut self) {
        for frame in self.held.take_all() {
            self.settle(frame);
        }
    }

    /// Takes a frame that is out of order and can't be looked into.
    fn settle(&mut self, frame: Frame) {
        let next = self.next();
        let known = self.recent.known(&frame);
        if known == Known::Same {
            return;
        }
        let is_ahead = frame.sequence > next;
        if self.is_unsure && frame.sequence != next {
            self.start_over(frame.sequence);
        } else if self.is_unsure {
            // Another run that is as far is unlikely but possible.
            self.lose(0);
        } else if is_ahead {
            self.lose(frame.sequence - next);
        } else if frame.sequence < next {
            if known == Known::Missed {
                return;
            }
            self.start_over(frame.sequence);
        }
        self.deliver(frame);
    }

    /// Another run, heard from this number on.
    fn start_over(&mut self, from: u64) {
        self.restart();
        if from > 0 {
            self.lose(from);
        }
    }
}

#[cfg(test)]
mod tests;
