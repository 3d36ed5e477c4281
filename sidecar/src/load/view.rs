//! Load as answers show it.

use std::collections::BTreeSet;

use kv_core::id::{DpRank, WorkerId};
use kv_core::ledger::Lanes;
use kv_core::load::Load;
use kv_core::loads::Correction;
use kv_core::report::OwnerKey;
use kv_core::tracker::ActiveLoad;
use serde::Serialize;

use super::proxy::Proxy;
use super::{Accounts, ProxyId};

/// A load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LoadReport {
    /// Prompt tokens still to be prefilled.
    pub prefill_tokens: u64,
    /// Requests without a first token.
    pub waiting: u32,
    /// Requests past their first token.
    pub decoding: u32,
    /// Distinct blocks in use.
    pub blocks: u64,
}

/// Requests of one proxy on an owner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ProxyRequests {
    /// The proxy.
    #[serde(flatten)]
    pub proxy: ProxyId,
    /// How many.
    pub requests: u32,
}

/// Everything the corrections rest on.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RawReport {
    /// Bookings over all proxies.
    pub bookings: usize,
    /// True load of owners that have any.
    pub owners: Vec<RawOwner>,
    /// By proxy.
    pub proxies: Vec<RawProxy>,
}

/// An owner's true load.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RawOwner {
    /// Position of the pool in the table.
    pub pool: u16,
    /// The worker.
    pub worker: WorkerId,
    /// Its data-parallel rank.
    pub rank: DpRank,
    /// D.
    pub load: LoadReport,
}

/// A proxy.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RawProxy {
    /// Who it is.
    #[serde(flatten)]
    pub proxy: ProxyId,
    /// Whether it has a stream.
    pub connected: bool,
    /// VMs that report.
    pub vms: usize,
    /// Owners of the table, and those it ever booked on or showed.
    pub owners: Vec<RawLanes>,
}

/// An owner as one proxy has it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RawLanes {
    /// Position of the pool in the table.
    pub pool: u16,
    /// The worker.
    pub worker: WorkerId,
    /// Its data-parallel rank.
    pub rank: DpRank,
    /// Envoy's gauges as last shown.
    pub lanes: LoadReport,
    /// B: what they are known to hold.
    pub booked: LoadReport,
    /// D: the true load, over all proxies.
    pub load: LoadReport,
    /// C: D less B.
    pub correction: Correction,
}

impl From<ActiveLoad> for LoadReport {
    fn from(load: ActiveLoad) -> Self {
        Self {
            prefill_tokens: load.prefill_tokens,
            waiting: load.waiting,
            decoding: load.decoding,
            blocks: load.blocks,
        }
    }
}

impl From<Load> for LoadReport {
    fn from(load: Load) -> Self {
        Self {
            prefill_tokens: load.prefill_tokens.into(),
            waiting: load.waiting.into(),
            decoding: load.decoding.into(),
            blocks: load.blocks.into(),
        }
    }
}

impl From<Lanes> for LoadReport {
    fn from(lanes: Lanes) -> Self {
        lanes.load().into()
    }
}

impl Accounts {
    /// Lanes, B, D and C of everything.
    #[must_use]
    pub fn raw(&self) -> RawReport {
        let owners = self.tracker.loads().map(|(owner, load)| RawOwner {
            pool: owner.pool,
            worker: owner.id.worker,
            rank: owner.id.rank,
            load: load.into(),
        });
        let mut owners: Vec<RawOwner> = owners.collect();
        owners.sort_unstable_by_key(|o| (o.pool, o.worker, o.rank));
        let proxies = self.proxies.iter().map(|(id, proxy)| RawProxy {
            proxy: id.clone(),
            connected: proxy.stream.is_some(),
            vms: proxy.ledger.vms().count(),
            owners: self.raw_lanes(proxy),
        });
        RawReport {
            bookings: self.tracker.len(),
            owners,
            proxies: proxies.collect(),
        }
    }

    fn raw_lanes(&self, proxy: &Proxy) -> Vec<RawLanes> {
        let served = (0_u16..).zip(&self.owners);
        let served = served.flat_map(|(pool, owners)| {
            let key = move |id| OwnerKey { pool, id };
            owners.iter().map(move |(_, id)| key(*id))
        });
        let owners: BTreeSet<OwnerKey> = served.chain(proxy.ledger.owners()).collect();
        let lanes = |owner: OwnerKey| {
            let (load, booked) = (self.tracker.load(&owner), proxy.ledger.booked(&owner));
            RawLanes {
                pool: owner.pool,
                worker: owner.id.worker,
                rank: owner.id.rank,
                lanes: proxy.ledger.seen(&owner).into(),
                booked: booked.into(),
                load: load.into(),
                correction: Correction::between(&load, &booked.load()),
            }
        };
        owners.into_iter().map(lanes).collect()
    }
}
