//! Load of an owner in two 64-bit lanes, kept in Envoy gauges that all threads share.
//!
//! Lane A is prefill tokens (32 bits) | requests waiting for their first token (16) | requests
//! decoding (16); lane B is blocks of all requests (32) | blocks among them that are counted more
//! than once (32). Every step of a request is a signed delta per lane, and arithmetic is modulo
//! 2^64, so releasing is the exact inverse of booking; what is counted more than once follows from
//! the [`crate::board`].

/// The load of one owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Prompt tokens still to be prefilled.
    pub prefill_tokens: u32,
    /// Requests without a first token.
    pub waiting: u16,
    /// Requests past their first token.
    pub decoding: u16,
    /// Distinct blocks in use by requests.
    pub blocks: u32,
}

/// A change of both lanes, to be added to the gauges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delta {
    /// Change of lane A.
    pub a: i64,
    /// Change of lane B.
    pub b: i64,
}

impl Load {
    /// Reads both lanes.
    #[must_use]
    #[allow(clippy::cast_possible_truncation)]
    pub fn from_lanes(a: u64, b: u64) -> Self {
        // What one thread takes off may come before what another has yet to add.
        let double = b as i32;
        let all = (b.wrapping_sub_signed(i64::from(double)) >> 32) as u32;
        Self {
            prefill_tokens: (a >> 32) as u32,
            waiting: (a >> 16) as u16,
            decoding: a as u16,
            blocks: all.saturating_add_signed(double.saturating_neg()),
        }
    }

    /// Requests on the owner.
    #[must_use]
    pub fn requests(&self) -> u32 {
        u32::from(self.waiting) + u32::from(self.decoding)
    }

    /// Whether a field is past three quarters of its range. Such an owner takes no more requests,
    /// so a field never wraps into its neighbour.
    #[must_use]
    pub fn is_saturated(&self) -> bool {
        const WIDE: u32 = u32::MAX / 4 * 3;
        const NARROW: u16 = u16::MAX / 4 * 3;
        self.prefill_tokens > WIDE
            || self.blocks > WIDE
            || self.waiting > NARROW
            || self.decoding > NARROW
    }
}

impl Delta {
    /// So many blocks more, or fewer, are counted more than once.
    #[must_use]
    pub fn double(blocks: i64) -> Self {
        Self { a: 0, b: blocks }
    }

    /// Both.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            a: self.a.wrapping_add(other.a),
            b: self.b.wrapping_add(other.b),
        }
    }
}

/// How far a leg has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Waiting,
    Decoding,
    Released,
}

/// One booking of a request on one owner. The deltas it hands out sum to zero once released,
/// whatever happened in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leg {
    prefill_tokens: u32,
    blocks: u32,
    phase: Phase,
}

impl Leg {
    /// Books `prefill_tokens` still to compute and `blocks` to hold, one request waiting.
    #[must_use]
    pub fn book(prefill_tokens: u32, blocks: u32) -> (Self, Delta) {
        let leg = Self {
            prefill_tokens,
            blocks,
            phase: Phase::Waiting,
        };
        let delta = Delta {
            a: lane_a(i64::from(prefill_tokens), 1, 0),
            b: i64::from(blocks) << 32,
        };
        (leg, delta)
    }

    /// The first token has come: prefill is done. Zero if it had come before.
    pub fn first_token(&mut self) -> Delta {
        if self.phase != Phase::Waiting {
            return Delta::default();
        }
        self.phase = Phase::Decoding;
        Delta {
            a: lane_a(-i64::from(self.prefill_tokens), -1, 1),
            b: 0,
        }
    }

    /// The answer has filled blocks.
    pub fn grow(&mut self, blocks: u32) -> Delta {
        let before = self.blocks;
        self.blocks = before.saturating_add(blocks);
        Delta {
            a: 0,
            b: i64::from(self.blocks - before) << 32,
        }
    }

    /// The request is over: takes back what is still booked. Zero the second time.
    pub fn release(&mut self) -> Delta {
        let a = match self.phase {
            Phase::Waiting => lane_a(-i64::from(self.prefill_tokens), -1, 0),
            Phase::Decoding => lane_a(0, 0, -1),
            Phase::Released => return Delta::default(),
        };
        self.phase = Phase::Released;
        Delta {
            a,
            b: -(i64::from(self.blocks) << 32),
        }
    }
}

/// Signed change of lane A; wraps for token counts past 2^31, which the modulus undoes.
fn lane_a(prefill_tokens: i64, waiting: i64, decoding: i64) -> i64 {
    (prefill_tokens << 32)
        .wrapping_add(waiting << 16)
        .wrapping_add(decoding)
}

#[cfg(test)]
mod tests {
    use super::{Delta, Leg, Load};

    #[derive(Default)]
    struct Gauges(u64, u64);

    impl Gauges {
        fn add(&mut self, delta: Delta) {
            self.0 = self.0.wrapping_add_signed(delta.a);
            self.1 = self.1.wrapping_add_signed(delta.b);
        }
        fn load(&self) -> Load {
            Load::from_lanes(self.0, self.1)
        }
    }

    #[test]
    fn a_leg_moves_through_the_lanes_and_leaves_nothing() {
        let mut gauges = Gauges::default();
        let (mut leg, booked) = Leg::book(1000, 70);
        gauges.add(booked);
        assert_eq!(
            gauges.load(),
            Load {
                prefill_tokens: 1000,
                waiting: 1,
                decoding: 0,
                blocks: 70
            }
        );
        gauges.add(leg.first_token());
        gauges.add(leg.first_token());
        assert_eq!(
            gauges.load(),
            Load {
                prefill_tokens: 0,
                waiting: 0,
                decoding: 1,
                blocks: 70
            }
        );
        gauges.add(leg.grow(2));
        assert_eq!(gauges.load().blocks, 72);
        gauges.add(leg.release());
        gauges.add(leg.release());
        assert_eq!((gauges.0, gauges.1), (0, 0));
    }

    #[test]
    fn blocks_that_are_counted_twice_are_taken_off() {
        let mut gauges = Gauges::default();
        let legs = [70, 50].map(|blocks| {
            let (leg, booked) = Leg::book(0, blocks);
            gauges.add(booked);
            leg
        });
        gauges.add(Delta::double(30));
        assert_eq!(gauges.load().blocks, 90);
        // Another thread is yet to add what this one takes off.
        gauges.add(Delta::double(-40));
        assert_eq!(gauges.load().blocks, 130);
        gauges.add(Delta::double(10));
        for mut leg in legs {
            gauges.add(leg.release());
        }
        assert_eq!((gauges.0, gauges.1), (0, 0));
    }

    #[test]
    fn interleaved_legs_of_any_size_sum_to_zero() {
        let mut gauges = Gauges::default();
        let mut legs = Vec::new();
        for i in 0..300_u32 {
            let (leg, booked) = Leg::book(i.wrapping_mul(0x9E37_79B1), i.wrapping_mul(77_777_777));
            gauges.add(booked);
            legs.push(leg);
        }
        for (i, leg) in legs.iter_mut().enumerate() {
            if i % 3 == 0 {
                gauges.add(leg.first_token());
            }
        }
        assert_eq!(gauges.load().decoding, 100);
        for leg in legs.iter_mut().rev() {
            gauges.add(leg.release());
        }
        assert_eq!((gauges.0, gauges.1), (0, 0));
    }

    #[test]
    fn a_field_near_its_end_saturates_the_owner() {
        assert!(
            !Load {
                waiting: 40_000,
                ..Load::default()
            }
            .is_saturated()
        );
        assert!(
            Load {
                waiting: 50_000,
                ..Load::default()
            }
            .is_saturated()
        );
        assert!(
            Load {
                prefill_tokens: 3_300_000_000,
                ..Load::default()
            }
            .is_saturated()
        );
        assert!(
            Load {
                blocks: 3_300_000_000,
                ..Load::default()
            }
            .is_saturated()
        );
    }
}
