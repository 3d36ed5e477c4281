//! The stream on which a VM asks the sidecar about prompts that are text.
//!
//! A call of its own for each question costs Envoy several times what the question does. So each VM
//! that carries such traffic keeps one stream of its root context, and questions and answers find
//! each other by number. What the stream can't do at a time is done by calls: before it is open,
//! after it has ended, and for as long as a question on it is late.
//!
//! A late question ends at the next tick, when its request goes on. From then on nothing more is
//! asked on the stream until all that is late has been answered, so what Envoy keeps for a sidecar
//! that has stopped reading is bounded by what was under way.

use std::collections::BTreeMap;

use kv_core::text::{LONGEST_MS, SERVICE, STREAM, numbered};

use crate::host::{Host, Token};
use crate::link::{Link, State};
use crate::metrics::{Fault, Metrics};

/// First and longest wait before the stream is opened again. A sidecar of an earlier release
/// refuses it each time.
const BACKOFF_NS: (u64, u64) = (100_000_000, 30_000_000_000);
/// Questions under way at a time.
const MAX_OPEN: usize = 1_024;
/// Bytes of them.
const MAX_BYTES: usize = 32 << 20;
/// How long after a late question the stream is given up. All others are late by then.
const GIVEN_UP_NS: u64 = LONGEST_MS * 1_000_000;

/// A question under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Open {
    /// Its request; `None` once that has gone on.
    context: Option<u32>,
    bytes: usize,
    deadline_ns: u64,
}

/// A request, and the number of the question that it waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiter {
    /// Its context.
    pub context: u32,
    /// The number.
    pub number: u64,
}

/// The questions of a VM that are under way on its stream.
#[derive(Debug)]
pub struct Inquiries {
    link: Link,
    /// The root context whose stream it is.
    root: u32,
    next: u64,
    open: BTreeMap<u64, Open>,
    bytes: usize,
    /// Those whose requests have gone on.
    late: usize,
}

impl Default for Inquiries {
    fn default() -> Self {
        Self {
            link: Link::new(BACKOFF_NS),
            root: 0,
            next: 0,
            open: BTreeMap::new(),
            bytes: 0,
            late: 0,
        }
    }
}

impl Inquiries {
    /// The number for a question of so many bytes, if the stream takes it.
    #[must_use]
    pub fn number(&self, bytes: usize) -> Option<u64> {
        let has_room = self.open.len() < MAX_OPEN && self.bytes.saturating_add(bytes) <= MAX_BYTES;
        let is_sound = self.link.up().is_some() && self.late == 0;
        (has_room && is_sound).then_some(self.next)
    }

    /// Asks a question under the number that it was given, on behalf of a request, whose context is
    /// the current one before and after. `false` if Envoy does not take it.
    pub fn ask<H: Host>(
        &mut self,
        host: &H,
        context: u32,
        message: &[u8],
        deadline_ns: u64,
    ) -> bool {
        let Some(token) = self.link.up() else {
            return false;
        };
        let is_sent = host.enter(self.root) && host.send(token, message);
        host.enter(context);
        if !is_sent {
            self.link.give_up();
            return false;
        }
        let bytes = message.len();
        let open = Open {
            context: Some(context),
            bytes,
            deadline_ns,
        };
        self.open.insert(self.next, open);
        self.next += 1;
        self.bytes += bytes;
        true
    }

    /// A message has come on a stream: the request that waits for it, and the answer. `None` if the
    /// stream is another, or the request has gone on.
    pub fn on_message<'a>(
        &mut self,
        token: Token,
        message: &'a [u8],
    ) -> Option<(Waiter, &'a [u8])> {
        if !self.is(token) {
            return None;
        }
        let (number, answer) = numbered(message)?;
        let open = self.open.remove(&number)?;
        self.bytes = self.bytes.saturating_sub(open.bytes);
        self.late -= usize::from(open.context.is_none());
        self.link.works();
        let context = open.context?;
        Some((Waiter { context, number }, answer))
    }

    /// Whether this is the stream.
    #[must_use]
    pub fn is(&self, token: Token) -> bool {
        self.link.token() == Some(token)
    }

    /// The stream was closed by the other side or could not be connected. Returns who waits in vain.
    pub fn on_close(
        &mut self,
        host: &impl Host,
        metrics: &mut Metrics,
        token: Token,
    ) -> Vec<Waiter> {
        if !self.is(token) {
            return Vec::new();
        }
        host.close_stream(token);
        metrics.fault(host, Fault::Closed);
        self.down(host.now_ns())
    }

    /// Time has passed in the root context in charge, the current one. Opens the stream if that is
    /// `wanted`, and returns who waits in vain.
    pub fn on_tick(
        &mut self,
        host: &impl Host,
        metrics: &mut Metrics,
        (root, cluster): (u32, &str),
        wanted: bool,
    ) -> Vec<Waiter> {
        let now_ns = host.now_ns();
        let is_given_up = |open: &Open| now_ns >= open.deadline_ns.saturating_add(GIVEN_UP_NS);
        match self.link.state() {
            State::Down { retry_ns } if wanted && now_ns >= retry_ns => {
                let Some(token) = host.open_stream(cluster, SERVICE, STREAM) else {
                    metrics.fault(host, Fault::Connect);
                    return self.down(now_ns);
                };
                self.link.opened(token);
                self.root = root;
            }
            State::Given(token) if self.root == root => {
                host.reset_stream(token);
                return self.down(now_ns);
            }
            State::Up(token) if self.root == root && self.open.values().any(is_given_up) => {
                metrics.fault(host, Fault::Closed);
                host.reset_stream(token);
                return self.down(now_ns);
            }
            State::Up(_) | State::Given(_) | State::Down { .. } => {}
        }
        let late = self.open.iter_mut();
        let late = late.filter(|(_, open)| now_ns >= open.deadline_ns);
        let late = late.filter_map(|(&number, open)| {
            let context = open.context.take()?;
            Some(Waiter { context, number })
        });
        let late: Vec<Waiter> = late.collect();
        self.late += late.len();
        late
    }

    /// A root context is no longer in charge, and the current one. Its stream ends once nothing is
    /// asked on it.
    pub fn step_aside(&mut self, host: &impl Host, root: u32) {
        if self.link.up().is_some() && self.root == root && self.open.is_empty() {
            self.link.reset(host);
        }
    }

    /// A root context, the current one, ends. Returns who waits in vain.
    pub fn leave(&mut self, host: &impl Host, root: u32) -> Vec<Waiter> {
        let Some(token) = self.link.token().filter(|_| self.root == root) else {
            return Vec::new();
        };
        host.reset_stream(token);
        self.down(host.now_ns())
    }

    /// There is no stream; plans the next one.
    fn down(&mut self, now_ns: u64) -> Vec<Waiter> {
        self.link.ended(now_ns);
        (self.bytes, self.late) = (0, 0);
        let open = std::mem::take(&mut self.open).into_iter();
        let waiting = open.filter_map(|(number, open)| {
            let context = open.context?;
            Some(Waiter { context, number })
        });
        waiting.collect()
    }
}
