//! What the sidecar says of decisions when it holds them against the exact state.

use std::collections::BTreeMap;

use crate::sidecar::Sidecar;
use crate::wait;

/// Decisions judged, by verdict.
#[derive(Clone, Debug)]
pub struct Verdicts(BTreeMap<String, u64>);

impl Verdicts {
    /// Waits until this many decisions have been judged.
    pub async fn of(sidecar: &Sidecar, least: u64) -> Self {
        let judged = async || {
            let verdicts = Self::read(&sidecar.metrics().await?);
            if verdicts.all() >= least {
                Ok(verdicts)
            } else {
                Err(format!("{verdicts:?}"))
            }
        };
        wait::until("all decisions judged", judged).await
    }

    fn read(metrics: &str) -> Self {
        let lines = metrics
            .lines()
            .filter_map(|line| line.strip_prefix("kv_router_shadow_total{outcome=\""));
        let pair = |line: &str| {
            let (outcome, count) = line.split_once("\"} ")?;
            Some((outcome.to_owned(), count.parse().ok()?))
        };
        Self(lines.filter_map(pair).collect())
    }

    fn all(&self) -> u64 {
        self.0.values().sum()
    }

    /// Holds them to this: so many in a hundred agree with the exact state, and what is left was
    /// decided on events or bookings that were on their way.
    ///
    /// # Panics
    /// When that is not so.
    pub fn agree(&self, percent: u64) {
        let of = |verdict: &str| self.0.get(verdict).copied().unwrap_or(0);
        let (agree, all) = (of("agree") + of("tie"), self.all());
        assert!(agree * 100 >= all * percent, "{self:?}");
        let explained = agree + of("load") + of("overlap") + of("overlap_and_load");
        assert_eq!(explained, all, "{self:?}");
    }
}
