//! Slow start: a worker that has just joined gets a part of its share.

use super::Traits;

/// Share at the beginning.
const LEAST: f64 = 0.1;

impl Traits {
    /// How often it takes part in decisions: from a tenth of them when it joins to all of them after
    /// `slow_start_ms`, at `now_ms`, Unix milliseconds.
    #[must_use]
    #[allow(clippy::cast_precision_loss)]
    pub fn share(&self, slow_start_ms: u32, now_ms: u64) -> f64 {
        let age_ms = now_ms.saturating_sub(self.since_ms);
        if self.since_ms == 0 || age_ms >= u64::from(slow_start_ms) {
            return 1.0;
        }
        LEAST + (1.0 - LEAST) * age_ms as f64 / f64::from(slow_start_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::Traits;

    #[test]
    fn a_share_grows_from_a_tenth_to_the_whole() {
        let joined = Traits {
            since_ms: 5_000,
            ..Traits::default()
        };
        let shares = [4_000, 5_000, 10_000, 15_000, 99_000].map(|now| joined.share(10_000, now));
        assert_eq!(shares, [0.1, 0.1, 0.55, 1.0, 1.0]);
        assert_eq!(joined.share(0, 5_000), 1.0);
        assert_eq!(Traits::default().share(10_000, 1), 1.0);
    }
}
