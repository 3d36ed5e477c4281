//! Where a request stands within its class.

use super::class::Order;
use super::policy::Request;

/// Sorts before the keys of requests that go later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    /// Inverted strict tier.
    tier: u32,
    /// Deadline; the largest value for none.
    due_ns: u64,
    /// Inverted score, as ordered bits.
    score: u64,
    /// Number of arrival in the queue, which no two share.
    pub(super) number: u64,
}

impl Key {
    pub(super) fn new(order: Order, request: &Request, number: u64) -> Self {
        Self {
            tier: !request.strict,
            due_ns: request.due_ns.unwrap_or(u64::MAX),
            score: !ordered(score(order, request)),
            number,
        }
    }
}

/// The larger goes first.
fn score(order: Order, request: &Request) -> f64 {
    let jump = if request.priority.is_finite() {
        request.priority.max(0.0)
    } else {
        0.0
    };
    let arrival = request.arrival_s.max(0.0);
    match order {
        Order::Fcfs => jump - arrival,
        Order::Lcfs => jump + arrival,
        Order::Wspt => (1.0 + jump) / f64::from(request.cost()),
    }
}

/// Bits that compare as unsigned numbers as the floats do; both zeros are the same.
fn ordered(score: f64) -> u64 {
    const SIGN: u64 = 1 << 63;
    let bits = (score + 0.0).to_bits();
    if bits & SIGN == 0 { bits | SIGN } else { !bits }
}

#[cfg(test)]
mod tests {
    use super::ordered;

    #[test]
    fn bits_are_in_the_order_of_the_floats() {
        let ascending = [-1e300, -2.0, -1.0, -1e-300, 0.0, 1e-300, 0.5, 7.0, 1e300];
        let bits: Vec<u64> = ascending.into_iter().map(ordered).collect();
        assert!(bits.is_sorted_by(|a, b| a < b), "{bits:?}");
        assert_eq!(ordered(-0.0), ordered(0.0));
    }
}
