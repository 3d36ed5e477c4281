//! Medians with their spread.

use serde_json::{Value, json};

/// A median and the range around it, over repeats.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spread {
    /// The median.
    pub median: f64,
    /// The least.
    pub least: f64,
    /// The most.
    pub most: f64,
    /// Repeats.
    pub repeats: usize,
}

impl Spread {
    /// Of these values; all 0 without any.
    #[must_use]
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |i: usize| values.get(i).copied().unwrap_or(0.0);
        let n = values.len();
        let median = f64::midpoint(at(n.saturating_sub(1) / 2), at(n / 2));
        Self {
            median,
            least: at(0),
            most: at(n.saturating_sub(1)),
            repeats: n,
        }
    }

    /// For the report.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({"median": self.median, "min": self.least, "max": self.most, "n": self.repeats})
    }
}

/// A quantile of sorted values, the nearest rank.
#[must_use]
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
pub fn quantile(sorted: &[f64], q: f64) -> f64 {
    let rank = (q * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::{Spread, quantile};

    #[test]
    fn the_median_of_an_even_number_is_between_the_two_in_the_middle() {
        let spread = Spread::of(vec![4.0, 1.0, 3.0, 10.0]);
        assert_eq!((spread.median, spread.least, spread.most), (3.5, 1.0, 10.0));
        assert_eq!(Spread::of(vec![7.0]).median, 7.0);
        assert_eq!(Spread::of(Vec::new()).median, 0.0);
    }

    #[test]
    fn a_quantile_is_the_nearest_rank() {
        let values: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!(
            [0.5, 0.99, 1.0].map(|q| quantile(&values, q)),
            [100.0, 198.0, 200.0]
        );
        assert_eq!(quantile(&[], 0.5), 0.0);
    }
}
