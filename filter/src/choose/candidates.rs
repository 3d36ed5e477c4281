//! The owners that are weighed against each other, and what each holds of the prompt.

use kv_core::decide::Candidate;
use kv_core::delay::Pace;
use kv_core::holdings::Pages;
use kv_core::id::{Family, Slot};
use kv_core::key;
use kv_core::load::Load;
use kv_core::overlap::Overlap;
use kv_core::policy::{Mode, Policy};
use kv_core::reader::View;

use super::{Ask, Chooser};
use crate::fleet::Served;
use crate::host::Host;
use crate::metrics::{Metrics, Timing};
use crate::world::Index;

/// Owners of a pool up to which all are scored.
const SCORE_ALL: usize = 128;
/// In a larger pool: owners scored because they have most of the prompt.
const DEEPEST: usize = 64;
/// In a larger pool: owners scored besides, at random.
const SAMPLED: usize = 32;

impl Chooser {
    /// The longest prefix that some owner holds, after a lookup.
    pub(super) fn prefix(&self, hashes: &[u64]) -> Option<(u32, u64)> {
        let depth = self.holdings.known();
        let last = usize::try_from(depth).ok()?.checked_sub(1)?;
        Some((depth, *hashes.get(last)?))
    }

    /// Finds out what every owner holds of the prompt.
    pub(super) fn look_up(
        &mut self,
        host: &impl Host,
        metrics: &mut Metrics,
        served: &Served<'_>,
        index: &Index,
        ask: &Ask<'_>,
    ) {
        let view = View {
            level: index.head.level,
            group: index.head.group,
            epoch: index.head.epoch,
            pool_key: served.pool.key,
            family: Family::Dynamo,
            slots: served.pool.slots(),
        };
        let since_ns = host.now_ns();
        let fetch = |id| host.shared(&key::page(id)).map(|page| page.bytes);
        let mut pages = Pages {
            reader: &mut self.reader,
            view,
            fetch,
        };
        let stores = &served.pool.stores;
        self.holdings
            .look_up(&mut pages, view.slots, stores, ask.hashes, ask.families);
        metrics.time(host, Timing::Lookup, since_ns, host.now_ns());
    }

    /// The owners to score, with overlap and without load.
    pub(super) fn candidates(
        &mut self,
        served: &Served<'_>,
        looked_up: bool,
        policy: &Policy,
        ask: &Ask<'_>,
    ) -> Vec<Candidate> {
        let accepting = ask.owners;
        if accepting.len() <= SCORE_ALL || policy.mode != Mode::Kv {
            let make = |owner: &usize| self.candidate(served, looked_up, ask, *owner);
            return accepting.iter().map(make).collect();
        }
        let mut owners = Vec::with_capacity(DEEPEST + SAMPLED);
        if looked_up {
            let mut holders: Vec<(f64, usize)> = self
                .holdings
                .held()
                .filter_map(|slot| {
                    let owner = served.owner_in(slot)?;
                    let depth = self.holdings.overlap(slot).effective(policy);
                    accepting.binary_search(&owner).ok()?;
                    Some((depth, owner))
                })
                .collect();
            if holders.len() > DEEPEST {
                holders.select_nth_unstable_by(DEEPEST, |a, b| b.0.total_cmp(&a.0));
                holders.truncate(DEEPEST);
            }
            owners.extend(holders.iter().map(|(_, owner)| *owner));
        }
        for _ in 0..SAMPLED {
            owners.extend(accepting.get(self.rng.below(accepting.len())));
        }
        let bound = ask.constraints.bound;
        owners.extend(bound.and_then(|bound| served.position(accepting, bound.owner)));
        owners.sort_unstable();
        owners.dedup();
        let make = |owner: &usize| self.candidate(served, looked_up, ask, *owner);
        owners.iter().map(make).collect()
    }

    /// An owner, without load.
    pub(super) fn candidate(
        &self,
        served: &Served<'_>,
        looked_up: bool,
        ask: &Ask<'_>,
        position: usize,
    ) -> Candidate {
        let owner = served.owner(position);
        let held = owner.map(|o| o.slot).filter(|_| looked_up);
        Candidate {
            owner: position,
            overlap: held.map_or_else(Overlap::default, |slot| self.holdings.overlap(slot)),
            load: Load::default(),
            shared_blocks: 0,
            pace: Pace::default(),
            factor: owner.map_or(1.0, |owner| ask.constraints.factor(owner)),
        }
    }

    /// Leading blocks of the prompt that requests of other proxies use.
    pub(super) fn in_use(&self, slot: Slot) -> u32 {
        let at = self.in_use.binary_search_by_key(&slot, |(s, _)| *s);
        let found = at.ok().and_then(|at| self.in_use.get(at));
        found.map_or(0, |(_, depth)| *depth)
    }
}
