//! What `/v1/workers` and `/readyz` tell about workers' events.

use std::collections::BTreeMap;

use kv_core::id::{DpRank, Slot};
use serde::Serialize;
use tokio::time::Instant;

use super::doubt::Doubt;
use super::health::Ailment;
use super::knowledge::Knowledge;
use super::strangers::milliseconds;
use super::{Service, roster};
use crate::ingest::Plane;

/// Events of a worker, as `/v1/workers` shows them.
#[derive(Clone, Debug, Serialize)]
pub struct EventsReport {
    /// The plane they are taken from; `null` before any has come.
    pub source: Option<Plane>,
    /// Whether it can be read.
    pub connected: bool,
    /// Other planes that speak for the worker and are not taken.
    pub refused: Vec<Plane>,
    /// Since the rank's last event, milliseconds.
    pub last_event_ms: Option<u64>,
    /// Number of the last message of the rank's own stream.
    pub sequence: Option<u64>,
    /// Dropped events of the worker by reason.
    pub rejected: BTreeMap<&'static str, u64>,
    /// What is wrong, if anything: its blocks are predicted then.
    pub ailment: Option<&'static str>,
    /// Why most of its events are dropped, if all are.
    pub dropped_as: Option<&'static str>,
    /// Share of the worker's cached tokens that were predicted rightly, 0 to 1, over its last
    /// answers; `null` where they don't say.
    pub accuracy: Option<f64>,
}

/// Ranks by how much of their caches is known; those of pools without events are left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Known {
    /// All of it.
    pub whole: usize,
    /// Some may be missing or left over.
    pub partial: usize,
    /// Nothing has been heard.
    pub unknown: usize,
}

impl Service {
    pub(super) fn doubtful(&self, pool: usize, slot: Slot) -> usize {
        self.doubts.get(&(pool, slot)).map_or(0, Doubt::len)
    }

    pub(super) fn report_events(
        &self,
        worker: &roster::Worker,
        rank: DpRank,
        owner: &roster::Owner,
    ) -> EventsReport {
        let at = Instant::now();
        let mut of_rank = worker.streams.values().filter(|s| s.ranks.contains(&rank));
        let stream = of_rank.next();
        let source = worker.source.plane();
        let ailment = worker.health.ailment();
        EventsReport {
            source,
            connected: match source {
                Some(plane) if plane.is_shared() => self.connected.contains(&plane),
                _ => stream.is_some_and(|stream| stream.is_open),
            },
            refused: worker.source.refused(at).collect(),
            last_event_ms: owner.heard.map(|heard| milliseconds(at, heard)),
            sequence: stream.and_then(|s| s.last).map(|last| last.sequence),
            rejected: worker.health.all_dropped(),
            ailment: ailment.map(Ailment::kind),
            dropped_as: match ailment {
                Some(Ailment::Dropped(kind)) => Some(kind),
                _ => None,
            },
            accuracy: worker.health.accuracy(),
        }
    }

    pub(super) fn known(&self) -> Known {
        let mut known = Known::default();
        let pools = self.roster.pools.iter().filter(|p| p.config.kv_events);
        for owner in pools
            .flat_map(|p| p.workers.values())
            .flat_map(|w| &w.owners)
        {
            match owner.knowledge {
                Knowledge::Whole => known.whole += 1,
                Knowledge::Partial => known.partial += 1,
                Knowledge::Unknown => known.unknown += 1,
            }
        }
        known
    }
}
