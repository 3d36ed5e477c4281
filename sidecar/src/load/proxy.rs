//! One proxy: the VMs of one `vm_id` in one Envoy process.

use std::collections::HashSet;

use kv_core::ledger::Ledger;
use kv_core::loads::PoolLoads;
use serde::Serialize;

use super::correction::Passing;

/// Who a proxy is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct ProxyId {
    /// Nonce of the Envoy process.
    pub process: u64,
    /// The filter's `vm_id`.
    pub vm_id: String,
}

/// What is known of a proxy.
#[derive(Debug, Default)]
pub(super) struct Proxy {
    /// What its VMs added to its lanes.
    pub(super) ledger: Ledger,
    /// The subscription that serves it.
    pub(super) stream: Option<u64>,
    /// Since when it has that, or none.
    since_ms: u64,
    /// Whether its VMs know of each other's live prompts.
    pub(super) knows_its_own: bool,
    /// When others than its VMs had last booked anything.
    pub(super) crowded_ms: Option<u64>,
    /// What it was told last on this stream.
    pub(super) told: Option<Vec<PoolLoads>>,
    /// By position of the pool in the table.
    pub(super) passing: Vec<Passing>,
}

impl Proxy {
    pub(super) fn connect(&mut self, stream: u64, knows_its_own: bool, now_ms: u64) {
        self.stream = Some(stream);
        self.knows_its_own = knows_its_own;
        self.since_ms = now_ms;
        // Envoy may hold what an earlier run of the sidecar said.
        self.told = None;
    }

    pub(super) fn disconnect(&mut self, now_ms: u64) {
        self.stream = None;
        self.since_ms = now_ms;
    }

    /// VMs whose live prompts all of its VMs know of.
    pub(super) fn known_vms(&self) -> HashSet<u64> {
        let vms = self.knows_its_own.then(|| self.ledger.vms());
        vms.into_iter().flatten().collect()
    }

    /// VMs that had `silence_ms` to report through a stream and did not.
    pub(super) fn retire(
        &mut self,
        now_ms: u64,
        silence_ms: u64,
    ) -> impl Iterator<Item = u64> + use<> {
        let before_ms = now_ms.checked_sub(silence_ms);
        let before_ms =
            before_ms.filter(|before| self.stream.is_some() && self.since_ms <= *before);
        let retired = before_ms.map(|before| self.ledger.retire(before));
        retired.into_iter().flatten()
    }

    /// Whether it has had no stream for longer than `silence_ms`.
    pub(super) fn is_gone(&self, now_ms: u64, silence_ms: u64) -> bool {
        self.stream.is_none() && now_ms.saturating_sub(self.since_ms) > silence_ms
    }
}
