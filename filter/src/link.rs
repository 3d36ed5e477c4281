//! A stream to the sidecar, which is opened again some time after it has ended: each time in a row
//! after twice as long.

use crate::host::{Host, Token};

/// How it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// There is none; it is opened again at this time.
    Down {
        /// By the clock of the process, nanoseconds.
        retry_ns: u64,
    },
    /// It is open.
    Up(Token),
    /// It is no more used, and to be reset when that is possible.
    Given(Token),
}

/// The stream.
#[derive(Debug)]
pub struct Link {
    state: State,
    /// First and longest wait before it is opened again, nanoseconds.
    waits_ns: (u64, u64),
    wait_ns: u64,
}

impl Link {
    /// A stream that is to be opened, with its first and longest wait in nanoseconds.
    #[must_use]
    pub fn new(waits_ns: (u64, u64)) -> Self {
        Self {
            state: State::Down { retry_ns: 0 },
            waits_ns,
            wait_ns: waits_ns.0,
        }
    }

    /// How it stands.
    #[must_use]
    pub fn state(&self) -> State {
        self.state
    }

    /// The stream, if it is open.
    #[must_use]
    pub fn up(&self) -> Option<Token> {
        match self.state {
            State::Up(token) => Some(token),
            State::Given(_) | State::Down { .. } => None,
        }
    }

    /// The stream, used or not.
    #[must_use]
    pub fn token(&self) -> Option<Token> {
        match self.state {
            State::Up(token) | State::Given(token) => Some(token),
            State::Down { .. } => None,
        }
    }

    /// It has been opened.
    pub fn opened(&mut self, token: Token) {
        self.state = State::Up(token);
    }

    /// It works: the next wait is the first one again.
    pub fn works(&mut self) {
        self.wait_ns = self.waits_ns.0;
    }

    /// It is not used any more.
    pub fn give_up(&mut self) {
        if let State::Up(token) = self.state {
            self.state = State::Given(token);
        }
    }

    /// It has ended, or could not be opened.
    pub fn ended(&mut self, now_ns: u64) {
        let (_, longest) = self.waits_ns;
        self.state = State::Down {
            retry_ns: now_ns.saturating_add(self.wait_ns),
        };
        self.wait_ns = self.wait_ns.saturating_mul(2).min(longest);
    }

    /// Nothing speaks against opening it at once.
    pub fn hurry(&mut self) {
        self.works();
        if let State::Down { retry_ns } = &mut self.state {
            *retry_ns = 0;
        }
    }

    /// Ends it, if it is there. It may be opened at once.
    pub fn reset(&mut self, host: &impl Host) {
        if let Some(token) = self.token() {
            host.reset_stream(token);
            self.state = State::Down { retry_ns: 0 };
        }
    }
}
