//! What events did since the start, as metrics and for `/v1/index`.

use std::collections::BTreeMap;
use std::sync::Arc;

use kv_core::event::EventData;
use kv_core::index::Applied;
use prometheus_client::metrics::counter::Counter;
use serde::Serialize;

use crate::ingest::Plane;
use crate::metrics::{Kind, Metrics, PlaneKind};

/// Kinds of events.
const EVENTS: [&str; 3] = ["stored", "removed", "cleared"];
/// What is done with blocks.
const CHANGES: [&str; 10] = [
    "stored",
    "duplicate",
    "removed",
    "unknown",
    "orphaned",
    "adopted",
    "orphan_dropped",
    "renamed",
    "collision",
    "expired",
];

/// The counters, at hand: finding one by its labels takes longer than applying an event.
#[derive(Debug)]
pub(super) struct Tally {
    planes: BTreeMap<Plane, OnPlane>,
    changes: [Counter; CHANGES.len()],
    /// Jumps in event ids.
    pub(super) gaps: u64,
    metrics: Arc<Metrics>,
}

/// What came in on a plane.
#[derive(Debug)]
pub(super) struct OnPlane {
    /// Messages.
    pub(super) messages: u64,
    events: [Counter; EVENTS.len()],
    rejected: BTreeMap<&'static str, u64>,
}

/// What is counted, as `/v1/index` shows it.
#[derive(Clone, Debug, Serialize)]
pub struct Counts {
    /// By plane.
    pub planes: BTreeMap<Plane, PlaneCounts>,
    /// Blocks by what was done with them.
    pub blocks: BTreeMap<&'static str, u64>,
    /// Jumps in event ids.
    pub gaps: u64,
}

/// What came in on a plane, as `/v1/index` shows it.
#[derive(Clone, Debug, Serialize)]
pub struct PlaneCounts {
    /// Messages.
    pub messages: u64,
    /// Events applied, by kind.
    pub events: BTreeMap<&'static str, u64>,
    /// Events dropped, by reason.
    pub rejected: BTreeMap<&'static str, u64>,
}

impl Tally {
    pub(super) fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            planes: BTreeMap::new(),
            changes: CHANGES.map(|kind| metrics.changes.get_or_create_owned(&Kind { kind })),
            gaps: 0,
            metrics,
        }
    }

    pub(super) fn plane(&mut self, plane: Plane) -> &mut OnPlane {
        let events = &self.metrics.events;
        self.planes.entry(plane).or_insert_with(|| {
            let plane = plane.kind();
            let counter = |kind| events.get_or_create_owned(&PlaneKind { plane, kind });
            OnPlane {
                messages: 0,
                events: EVENTS.map(counter),
                rejected: BTreeMap::new(),
            }
        })
    }

    /// Blocks by what was done with them.
    pub(super) fn add(&self, applied: &Applied) {
        let blocks = [
            applied.stored,
            applied.duplicates,
            applied.removed,
            applied.unknown,
            applied.orphaned,
            applied.adopted,
            applied.orphans_dropped,
            applied.renamed,
            applied.collisions,
            applied.expired,
        ];
        for (counter, blocks) in self.changes.iter().zip(blocks) {
            if blocks > 0 {
                counter.inc_by(u64::from(blocks));
            }
        }
    }

    /// All that is counted.
    pub(super) fn counts(&self) -> Counts {
        let planes = self.planes.iter();
        Counts {
            planes: planes.map(|(plane, on)| (*plane, on.counts())).collect(),
            blocks: totals(&CHANGES, &self.changes).collect(),
            gaps: self.gaps,
        }
    }
}

impl OnPlane {
    pub(super) fn reject(&mut self, kind: &'static str) {
        *self.rejected.entry(kind).or_default() += 1;
    }

    pub(super) fn apply(&self, data: &EventData) {
        let [stored, removed, cleared] = &self.events;
        let counter = match data {
            EventData::Stored(_) => stored,
            EventData::Removed(_) => removed,
            EventData::Cleared => cleared,
        };
        counter.inc();
    }

    fn counts(&self) -> PlaneCounts {
        PlaneCounts {
            messages: self.messages,
            events: totals(&EVENTS, &self.events)
                .filter(|(_, total)| *total > 0)
                .collect(),
            rejected: self.rejected.clone(),
        }
    }
}

/// What has been counted, by kind.
fn totals<'a>(
    kinds: &'a [&'static str],
    counters: &'a [Counter],
) -> impl Iterator<Item = (&'static str, u64)> + 'a {
    let totals = kinds.iter().zip(counters);
    totals.map(|(kind, counter)| (*kind, counter.get()))
}
