//! Queues as `/v1/queue` shows them.

use kv_core::queue::{Order, PolicyQueue, Thresholds, Usage};
use serde::Serialize;

use super::Queues;

/// A pool's queue.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct QueueReport {
    /// The pool.
    pub pool: String,
    /// Whether requests wait in it at all.
    pub queues: bool,
    /// Requests that were let go and are not booked yet.
    pub granted: usize,
    /// Past which load its workers take no requests.
    pub overload: Thresholds,
    /// Its classes.
    pub classes: Vec<ClassReport>,
}

/// A class.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ClassReport {
    /// Its name.
    pub class: String,
    /// Who of it goes first.
    pub policy: Order,
    /// Prompt tokens that it gets in a round.
    pub quantum: u64,
    /// Requests that wait.
    pub requests: u64,
    /// Their prompt tokens.
    pub tokens: u64,
    /// Prompt tokens among them that are cached.
    pub cached_tokens: u64,
    /// How long the one has waited that came first.
    pub longest_wait_ms: u64,
}

impl Queues {
    /// All queues.
    #[must_use]
    pub fn report(&self, now_ns: u64) -> Vec<QueueReport> {
        let lines = self.lines.iter().map(|line| {
            let profile = line.pool.queue.as_ref();
            let classes = profile.map_or(&[][..], |profile| profile.classes());
            let classes = classes.iter().enumerate().map(|(at, class)| {
                let queue = line.queue.as_ref();
                let Usage {
                    requests,
                    tokens,
                    cached_tokens,
                } = queue.map_or_else(Usage::default, |queue| queue.usage(at));
                let entries = queue.into_iter().flat_map(PolicyQueue::entries);
                let own = entries.filter(|entry| entry.request.class == at);
                let since = own.filter_map(|entry| Some(line.origins.get(&entry.id)?.since_ns));
                let first = since.min().unwrap_or(now_ns);
                ClassReport {
                    class: class.name.clone(),
                    policy: class.order,
                    quantum: class.quantum,
                    requests,
                    tokens,
                    cached_tokens,
                    longest_wait_ms: now_ns.saturating_sub(first) / 1_000_000,
                }
            });
            QueueReport {
                pool: line.pool.name.clone(),
                queues: line.queue.is_some(),
                granted: line.granted.len(),
                overload: line.pool.overload,
                classes: classes.collect(),
            }
        });
        lines.collect()
    }
}
