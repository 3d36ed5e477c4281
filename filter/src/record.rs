//! What a decision rested on, for the response and for the sidecar.

use std::rc::Rc;

use kv_core::constraint::Constraints;
use kv_core::decide::{RECORDED, Record, Scored};
use kv_core::report;
use kv_core::table::Pool;

use crate::choose::Weighed;
use crate::fleet::Fleet;
use crate::reason::Reason;

/// Longest header value, in bytes.
const MAX_BYTES: usize = 4096;

/// What a record will be made of. It is written only when the response comes, because the worker
/// has the request by then and nobody waits.
#[derive(Debug)]
pub struct Evidence {
    fleet: Rc<Fleet>,
    pool: usize,
    reason: Reason,
    weighed: Weighed,
    constraints: Constraints,
}

impl Evidence {
    /// `pool` is its position in the table.
    #[must_use]
    pub fn new(
        fleet: Rc<Fleet>,
        pool: usize,
        reason: Reason,
        weighed: Weighed,
        constraints: Constraints,
    ) -> Self {
        Self {
            fleet,
            pool,
            reason,
            weighed,
            constraints,
        }
    }

    /// The record as JSON that fits a header, with fewer candidates if need be.
    #[must_use]
    pub fn to_header(&self) -> Option<String> {
        let pool = self.fleet.table.pools.get(self.pool)?;
        let Weighed {
            demand,
            scored,
            chosen,
            ..
        } = &self.weighed;
        let mut record = Record::new(pool, self.reason.name(), *demand, scored, *chosen);
        record.constraints = self.constraints.shown();
        loop {
            let json = record.to_json();
            if json.len() <= MAX_BYTES {
                return Some(json);
            }
            if record.candidates.pop().is_none() {
                record.constraints.take()?;
            }
        }
    }
}

/// The candidates as the sidecar is told of them: the chosen one first, the others in no order.
/// `weighed` is cut by [`keep_best`].
#[must_use]
pub fn told(pool: &Pool, weighed: &Weighed) -> Vec<report::Weighed> {
    let predicts_delay = pool.policy.predicts_delay();
    let tell = |s: &Scored| {
        let owner = pool.owners.get(s.candidate.owner)?;
        Some(report::Weighed {
            owner: owner.id,
            overlap: s.candidate.overlap.by_tier(),
            shared_cache: s.candidate.overlap.shared_cache,
            prefill_tokens: s.candidate.load.prefill_tokens,
            active_blocks: s.candidate.load.blocks,
            shared_blocks: s.candidate.shared_blocks,
            requests: s.candidate.load.requests(),
            cost: s.total(),
            paced: predicts_delay.then_some(report::Paced {
                waiting: s.candidate.load.waiting,
                finish_ms: s.candidate.pace.finish_ms,
                ms_per_token: s.candidate.pace.ms_per_token,
                typical_ms: weighed.typical_ms,
            }),
        })
    };
    weighed.scored.iter().filter_map(tell).collect()
}

/// Cuts the list to as many as a record names, the chosen one first, without sorting it.
pub fn keep_best(weighed: &mut Weighed) {
    let scored = &mut weighed.scored;
    if let Some(chosen) = &mut weighed.chosen
        && *chosen < scored.len()
    {
        scored.swap(0, *chosen);
        *chosen = 0;
    }
    if scored.len() <= RECORDED {
        return;
    }
    if let [_, others @ ..] = scored.as_mut_slice() {
        let cost = Scored::total;
        others.select_nth_unstable_by(RECORDED - 1, |a, b| cost(a).total_cmp(&cost(b)));
    }
    scored.truncate(RECORDED);
    scored.shrink_to_fit();
}

#[cfg(test)]
mod tests {
    use super::keep_best;
    use crate::choose::Weighed;
    use kv_core::cost::Cost;
    use kv_core::decide::{Candidate, Price, RECORDED, Scored};
    use kv_core::delay::Pace;
    use kv_core::load::Load;
    use kv_core::overlap::Overlap;

    fn weighed(costs: &[f64], chosen: Option<usize>) -> Weighed {
        let scored = costs.iter().enumerate().map(|(owner, cost)| Scored {
            candidate: Candidate {
                owner,
                overlap: Overlap::default(),
                load: Load::default(),
                shared_blocks: 0,
                pace: Pace::default(),
                factor: 1.0,
            },
            cost: Price::Blocks(Cost {
                prefill: *cost,
                ..Cost::default()
            }),
        });
        Weighed {
            scored: scored.collect(),
            chosen,
            ..Weighed::default()
        }
    }

    #[test]
    fn the_chosen_and_the_cheapest_others_are_kept() {
        let costs: Vec<f64> = (0..50).map(|i| f64::from((i * 37) % 50)).collect();
        let mut weighed = weighed(&costs, Some(20));
        keep_best(&mut weighed);
        assert_eq!(weighed.scored.len(), RECORDED);
        assert_eq!(weighed.scored[weighed.chosen.unwrap()].candidate.owner, 20);
        let mut kept: Vec<f64> = weighed.scored[1..].iter().map(Scored::total).collect();
        kept.sort_by(f64::total_cmp);
        assert_eq!(kept, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    }

    #[test]
    fn short_lists_are_kept_whole() {
        for length in 0..=RECORDED {
            let mut weighed = weighed(&vec![1.0; length], length.checked_sub(1));
            keep_best(&mut weighed);
            assert_eq!(weighed.scored.len(), length);
        }
    }
}
