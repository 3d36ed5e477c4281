//! Pauses between attempts: 100 ms, doubled each time up to five seconds.

use std::time::Duration;

const LONGEST: Duration = Duration::from_secs(5);

/// The pause before an attempt after this many that failed.
#[must_use]
pub fn after(failed: u32) -> Duration {
    Duration::from_millis(100)
        .saturating_mul(1 << failed.min(6))
        .min(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_five_seconds() {
        let ms: Vec<_> = (0..8).map(|n| after(n).as_millis()).collect();
        assert_eq!(ms, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(after(u32::MAX), LONGEST);
    }
}
