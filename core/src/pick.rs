//! Choosing among costs: the minimum with random ties, or softmax.

use crate::rng::Rng;

/// Position of the chosen cost; `None` for no costs. `temperature` 0 takes the minimum, exact ties
/// with equal chance; above 0 the chance is `exp(-(cost - min) / ((max - min) * temperature))`.
#[must_use]
pub fn pick(costs: &[f64], temperature: f64, rng: &mut Rng) -> Option<usize> {
    if temperature > 0.0 {
        softmax(costs, temperature, rng)
    } else {
        minimum(costs, rng)
    }
}

/// Position of the lesser of two costs at two distinct random positions, the first of them where
/// they are equal; `None` for no costs.
#[must_use]
pub fn lesser_of_two(costs: &[f64], rng: &mut Rng) -> Option<usize> {
    if costs.len() < 2 {
        return (!costs.is_empty()).then_some(0);
    }
    let first = rng.below(costs.len());
    let other = rng.below(costs.len() - 1);
    // The other positions, in order.
    let second = other + usize::from(other >= first);
    Some(if costs.get(second) < costs.get(first) {
        second
    } else {
        first
    })
}

fn minimum(costs: &[f64], rng: &mut Rng) -> Option<usize> {
    let mut best: Option<(usize, f64)> = None;
    let mut ties = 0;
    for (i, &cost) in costs.iter().enumerate() {
        let wins = match best {
            None => true,
            Some((_, least)) if cost < least => {
                ties = 0;
                true
            }
            // Reservoir sampling: the n-th tie replaces with chance 1/n.
            Some((_, least)) if cost == least => rng.below(ties + 1) == 0,
            Some(_) => {
                continue;
            }
        };
        ties += 1;
        if wins {
            best = Some((i, cost));
        }
    }
    best.map(|(i, _)| i)
}

fn softmax(costs: &[f64], temperature: f64, rng: &mut Rng) -> Option<usize> {
    let min = costs.iter().copied().fold(f64::INFINITY, f64::min);
    let max = costs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if costs.is_empty() || !(max - min).is_finite() || max <= min {
        return (!costs.is_empty()).then(|| rng.below(costs.len()));
    }
    let weight = |cost: &f64| (-(cost - min) / ((max - min) * temperature)).exp();
    let mut left = rng.unit() * costs.iter().map(weight).sum::<f64>();
    for (i, cost) in costs.iter().enumerate() {
        left -= weight(cost);
        if left < 0.0 {
            return Some(i);
        }
    }
    Some(costs.len() - 1)
}

#[cfg(test)]
mod tests {
    use super::{lesser_of_two, pick};
    use crate::rng::Rng;

    fn shares<const N: usize>(costs: [f64; N], temperature: f64) -> [f64; N] {
        let mut rng = Rng::new(7);
        let mut counts = [0.0; N];
        for _ in 0..20_000 {
            counts[pick(&costs, temperature, &mut rng).unwrap()] += 1.0 / 20_000.0;
        }
        counts
    }

    #[test]
    fn the_minimum_wins_and_ties_share() {
        let [a, b, c, d] = shares([3.0, 1.0, 1.0, 1.0], 0.0);
        assert_eq!(a, 0.0);
        for share in [b, c, d] {
            assert!((share - 1.0 / 3.0).abs() < 0.02, "{share}");
        }
    }

    #[test]
    fn softmax_follows_normalised_costs() {
        let [a, b, c] = shares([10.0, 15.0, 20.0], 0.5);
        let sum = 1.0 + (-1.0_f64).exp() + (-2.0_f64).exp();
        assert!((a - 1.0 / sum).abs() < 0.02, "{a}");
        assert!((b - (-1.0_f64).exp() / sum).abs() < 0.02, "{b}");
        assert!((c - (-2.0_f64).exp() / sum).abs() < 0.02, "{c}");
    }

    #[test]
    fn equal_costs_are_uniform_and_none_is_none() {
        let [a, b] = shares([5.0, 5.0], 0.7);
        assert!((a - b).abs() < 0.04);
        assert_eq!(pick(&[], 0.0, &mut Rng::new(0)), None);
        assert_eq!(pick(&[], 1.0, &mut Rng::new(0)), None);
    }

    #[test]
    fn the_lesser_of_two_is_never_the_greatest() {
        let mut rng = Rng::new(7);
        let mut counts = [0; 3];
        for _ in 0..3_000 {
            counts[lesser_of_two(&[2.0, 1.0, 3.0], &mut rng).unwrap()] += 1;
        }
        assert_eq!(counts[2], 0);
        // 1.0 wins in two of the three pairs.
        assert!((1_900..2_100).contains(&counts[1]), "{counts:?}");
        assert_eq!(lesser_of_two(&[5.0], &mut rng), Some(0));
        assert_eq!(lesser_of_two(&[], &mut rng), None);
        let mut equal = [0; 4];
        for _ in 0..4_000 {
            equal[lesser_of_two(&[1.0; 4], &mut rng).unwrap()] += 1;
        }
        assert!(equal.iter().all(|n| (850..1_150).contains(n)), "{equal:?}");
    }
}
