//! What a worker is said to be, besides what every decision needs.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Metadata of a worker, the same for all its ranks.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Metadata {
    /// LoRA adapters that it has loaded. Empty where it is not said, which stands for all of the
    /// pool's.
    pub lora: Vec<String>,
    /// Taints, which requests can require or prefer.
    pub taints: Vec<String>,
    /// Labels, its place in the topology among them, such as `zone: a`.
    pub labels: BTreeMap<String, String>,
    /// KV blocks that a rank of it can hold; 0 where not known.
    pub total_kv_blocks: u32,
    /// Requests that a rank of it takes at a time; 0 for any number.
    pub max_requests: u32,
    /// Prompt tokens that it computes in one batch; 0 where not known.
    pub max_num_batched_tokens: u32,
}

impl Metadata {
    /// Whether it serves an adapter of its pool.
    #[must_use]
    pub fn has_lora(&self, adapter: &str) -> bool {
        self.lora.is_empty() || self.lora.iter().any(|lora| lora == adapter)
    }

    /// Whether so many requests are as many as it takes.
    #[must_use]
    pub fn is_full(&self, requests: u32) -> bool {
        self.max_requests > 0 && requests >= self.max_requests
    }
}

#[cfg(test)]
mod tests {
    use super::Metadata;

    #[test]
    fn a_worker_that_says_nothing_takes_any_adapter_and_number() {
        let said = Metadata {
            lora: vec!["sql".into()],
            max_requests: 2,
            ..Metadata::default()
        };
        assert_eq!(["sql", "chat"].map(|l| said.has_lora(l)), [true, false]);
        assert_eq!(
            [0, 1, 2, 3].map(|n| said.is_full(n)),
            [false, false, true, true]
        );
        let silent = Metadata::default();
        assert!(silent.has_lora("chat") && !silent.is_full(u32::MAX));
    }
}
