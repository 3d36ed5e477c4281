//! Workers that registered to be selected.

use std::collections::{BTreeMap, BTreeSet};

use kv_core::id::{OwnerId, WorkerId};

use super::record::{Lifecycle, Record};

/// All of them.
#[derive(Clone, Debug, Default)]
pub struct Catalog {
    pub(super) records: BTreeMap<WorkerId, Record>,
}

impl Catalog {
    /// A worker that takes requests.
    pub(super) fn schedulable(&self, worker: WorkerId) -> Option<&Record> {
        let record = self.records.get(&worker)?;
        (record.lifecycle == Lifecycle::Schedulable).then_some(record)
    }

    /// Whether an owner takes requests.
    #[must_use]
    pub fn has(&self, owner: OwnerId) -> bool {
        let record = self.schedulable(owner.worker);
        record.is_some_and(|record| record.traits.ranks().contains(&owner.rank))
    }

    /// Taints of a worker.
    #[must_use]
    pub fn taints(&self, worker: WorkerId) -> Option<&BTreeSet<String>> {
        self.records.get(&worker)?.traits.taints.as_ref()
    }

    /// Whether a model's blocks also cover the first token after them.
    pub(super) fn is_eagle(&self, model: &str, group: &str) -> bool {
        let mut records = self.records.values();
        records.any(|record| {
            record.model_name == model
                && record.routing_group == group
                && record.traits.is_eagle == Some(true)
        })
    }
}
