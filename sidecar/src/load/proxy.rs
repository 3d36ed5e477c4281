//! One proxy: the VMs of one `vm_id` in one Envoy process.

use std::collections::HashSet;

use kv_core::ledger::{Ledger, Retired};
use kv_core::loads::{PoolLoads, WriteOff};
use serde::Serialize;

use super::correction::Passing;

/// How long a proxy may take to report that it has taken something out of its lanes.
const WRITE_OFF_REPEAT_MS: u64 = 5_000;
/// Time between two different requests for that.
const WRITE_OFF_PAUSE_MS: u64 = 1_000;

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
    pub(super) told: Option<Told>,
    /// By position of the pool in the table.
    pub(super) passing: Vec<Passing>,
    /// Whether its filter takes out of the lanes what it is told to.
    pub(super) writes_off: bool,
    /// What is to be taken out of its lanes.
    pub(super) write_off: WriteOff,
    /// Since when.
    write_off_ms: u64,
}

/// What a proxy is told.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Told {
    pub(super) pools: Vec<PoolLoads>,
    pub(super) write_off: WriteOff,
    pub(super) backlogs: Vec<u64>,
    pub(super) is_alone: bool,
}

impl Proxy {
    pub(super) fn connect(&mut self, stream: u64, knows_its_own: bool, now_ms: u64) {
        self.stream = Some(stream);
        self.knows_its_own = knows_its_own;
        self.since_ms = now_ms;
        // Envoy may hold what an earlier run of the sidecar said.
        self.told = None;
        self.writes_off = false;
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

    /// VMs that had `silence_ms` to report through a stream and did not; those that are leaving
    /// have `leaving_ms`.
    pub(super) fn retire(
        &mut self,
        now_ms: u64,
        silence_ms: u64,
        leaving_ms: u64,
    ) -> impl Iterator<Item = Retired> + use<> {
        let before_ms = now_ms.checked_sub(silence_ms);
        let before_ms =
            before_ms.filter(|before| self.stream.is_some() && self.since_ms <= *before);
        let leaving_before_ms = now_ms.saturating_sub(leaving_ms);
        let retired = before_ms.map(|before| self.ledger.retire(before, leaving_before_ms));
        retired.into_iter().flatten()
    }

    /// Asks for what the lanes hold of nobody to be taken out. Asked again when nothing has come of
    /// it for too long, and not before the last one should have come to something: what is done
    /// twice is to be undone. Returns how many owners are asked for anew.
    pub(super) fn write_off(&mut self, now_ms: u64, number: impl FnOnce() -> u64) -> usize {
        let sums = self.ledger.orphaned();
        if sums.is_empty() || self.stream.is_none() || !self.writes_off {
            self.write_off.sums.clear();
            return 0;
        }
        let pause_ms = if self.write_off.sums.is_empty() {
            0
        } else if self.write_off.sums == sums {
            WRITE_OFF_REPEAT_MS
        } else {
            WRITE_OFF_PAUSE_MS
        };
        if now_ms.saturating_sub(self.write_off_ms) < pause_ms {
            return 0;
        }
        self.write_off_ms = now_ms;
        let owners = sums.len();
        self.write_off = WriteOff {
            number: number(),
            sums,
        };
        owners
    }

    /// Whether it has had no stream for longer than `silence_ms`.
    pub(super) fn is_gone(&self, now_ms: u64, silence_ms: u64) -> bool {
        self.stream.is_none() && now_ms.saturating_sub(self.since_ms) > silence_ms
    }
}
