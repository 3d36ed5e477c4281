//! One decision under way.

use std::borrow::Cow;

use kv_core::decide::{self, Candidate, Request};
use kv_core::device;
use kv_core::load::Load;
use kv_core::loads::PoolLoads;

use super::Ask;
use crate::board::Glimpse;
use crate::fleet::Served;
use crate::host::Host;

/// Its request, and the owners that are left.
pub(super) struct Round<'a> {
    pub(super) served: &'a Served<'a>,
    pub(super) ask: &'a Ask<'a>,
    pub(super) loads: Option<&'a PoolLoads>,
    pub(super) request: Request,
    /// The prompt among the live ones of this process.
    pub(super) prompt: Option<Glimpse>,
    /// Whether workers take no more requests than they are said to.
    pub(super) is_capped: bool,
    /// Whether some were left out for that.
    pub(super) is_full: bool,
    /// Whether no owner that could take the request is missing among the candidates.
    pub(super) is_whole: bool,
    pub(super) candidates: Vec<Candidate>,
}

impl Round<'_> {
    /// The load of any owner of the pool.
    pub(super) fn load(&self, host: &impl Host, owner: usize) -> Load {
        let place = self.served.place(owner);
        let lanes = place.map_or_else(Load::default, |place| place.lane.read(host).load());
        match self.loads.zip(self.served.owner(owner)) {
            Some((loads, owner)) => loads.correction(owner.slot).apply(&lanes),
            None => lanes,
        }
    }

    /// Whether an owner has more requests than it takes, the one just booked among them.
    pub(super) fn is_over(&self, host: &impl Host, owner: usize) -> bool {
        let known = self.served.owner(owner).filter(|_| self.is_capped);
        let most = known.map_or(0, |owner| owner.metadata.max_requests);
        most > 0 && self.load(host, owner).requests() > most
    }

    /// The candidates that are compared with each other.
    pub(super) fn group(&self) -> Cow<'_, [Candidate]> {
        device::group(&self.candidates, self.served.pool)
    }

    /// Whether no candidate is better than this one.
    pub(super) fn is_least(&self, owner: usize) -> bool {
        let policy = &self.served.pool.policy;
        let scored = decide::score(&self.group(), &self.request, policy);
        if let Some(bound) = decide::bound(&scored, &self.request, policy.mode) {
            return scored
                .get(bound)
                .is_some_and(|s| s.candidate.owner == owner);
        }
        let own = scored.iter().find(|s| s.candidate.owner == owner);
        own.is_some_and(|own| {
            let own = own.compared(policy.mode) - policy.band().unwrap_or(0.0);
            scored.iter().all(|s| own <= s.compared(policy.mode))
        })
    }
}
