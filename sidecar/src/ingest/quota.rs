//! How much a source may say: bytes a second, with a second's worth in reserve.

use std::time::{Duration, Instant};

/// What is left of a source's quota.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quota {
    per_second: f64,
    left: f64,
    at: Instant,
}

impl Quota {
    /// A full one.
    #[must_use]
    pub fn new(bytes_per_second: u64, now: Instant) -> Self {
        // Exact up to 2^53 bytes a second.
        let per_second = bytes_per_second as f64;
        Self {
            per_second,
            left: per_second,
            at: now,
        }
    }

    /// How long a source that has said too much must wait; nothing while something is left.
    #[must_use]
    pub fn wait(&mut self, now: Instant) -> Duration {
        let gained = now.saturating_duration_since(self.at).as_secs_f64() * self.per_second;
        self.left = (self.left + gained).min(self.per_second);
        self.at = now;
        Duration::try_from_secs_f64(-self.left / self.per_second).unwrap_or_default()
    }

    /// Takes what was said; a large message may leave a debt.
    pub fn take(&mut self, bytes: usize) {
        self.left -= bytes as f64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_debt_is_waited_for_and_rest_fills_up_to_a_second() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut quota = Quota::new(1000, start);
        quota.take(1000);
        assert_eq!(quota.wait(at(0)), Duration::ZERO);
        quota.take(500);
        assert_eq!(quota.wait(at(0)), Duration::from_millis(500));
        assert_eq!(quota.wait(at(250)), Duration::from_millis(250));
        assert_eq!(quota.wait(at(60_000)), Duration::ZERO);
        quota.take(1500);
        assert_eq!(quota.wait(at(60_000)), Duration::from_millis(500));
    }
}
