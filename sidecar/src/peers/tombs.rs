//! What came before the booking it is about, or closely after its end: a bounded memory.

use std::collections::{HashMap, VecDeque};

/// How long anything is remembered.
const MEMORY_MS: u64 = 5_000;
/// Requests remembered at most; the oldest go first.
const MAX_REMEMBERED: usize = 1 << 16;

/// What is known of a request that isn't booked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tomb {
    /// Its first token has come.
    Prefilled,
    /// It is over.
    Freed,
}

/// Requests by hash.
#[derive(Debug, Default)]
pub(super) struct Tombs {
    by_request: HashMap<u64, (Tomb, u64)>,
    order: VecDeque<(u64, u64)>,
}

impl Tombs {
    /// Remembers something of a request; that it is over outweighs its first token.
    pub(super) fn remember(&mut self, request: u64, tomb: Tomb, now_ms: u64) {
        let known = self.by_request.get(&request);
        if known.is_some_and(|(known, _)| *known == Tomb::Freed) {
            return;
        }
        self.by_request.insert(request, (tomb, now_ms));
        self.order.push_back((now_ms, request));
        if self.order.len() > MAX_REMEMBERED {
            self.drop_oldest();
        }
    }

    /// What is remembered of a request. A first token is told once.
    pub(super) fn recall(&mut self, request: u64) -> Option<Tomb> {
        let (tomb, _) = *self.by_request.get(&request)?;
        if tomb == Tomb::Prefilled {
            self.by_request.remove(&request);
        }
        Some(tomb)
    }

    /// Forgets what is too old.
    pub(super) fn prune(&mut self, now_ms: u64) {
        let is_old = |(since, _): &(u64, u64)| now_ms.saturating_sub(*since) > MEMORY_MS;
        while self.order.front().is_some_and(is_old) {
            self.drop_oldest();
        }
    }

    fn drop_oldest(&mut self) {
        let Some((since, request)) = self.order.pop_front() else {
            return;
        };
        // It may have been remembered again since.
        if self
            .by_request
            .get(&request)
            .is_some_and(|(_, at)| *at == since)
        {
            self.by_request.remove(&request);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_ends_with_time_and_at_its_bound() {
        let mut tombs = Tombs::default();
        tombs.remember(1, Tomb::Prefilled, 0);
        tombs.remember(2, Tomb::Freed, 1_000);
        tombs.remember(2, Tomb::Prefilled, 1_000);
        assert_eq!(tombs.recall(1), Some(Tomb::Prefilled));
        assert_eq!(tombs.recall(1), None);
        tombs.prune(6_000);
        assert_eq!(tombs.recall(2), Some(Tomb::Freed));
        tombs.prune(6_001);
        assert_eq!(tombs.recall(2), None);
        for request in 0..2 * MAX_REMEMBERED as u64 {
            tombs.remember(request, Tomb::Freed, 7_000);
        }
        assert_eq!(tombs.by_request.len(), MAX_REMEMBERED);
        assert_eq!(tombs.recall(0), None);
    }
}
