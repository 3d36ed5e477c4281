//! Head, worker table and loads as this VM sees them, and how old they are.

use std::rc::Rc;

use kv_core::decide;
use kv_core::head::Head;
use kv_core::key;
use kv_core::loads::Loads;
use kv_core::table::Table;

use crate::correction::Corrections;
use crate::fleet::Fleet;
use crate::host::{Host, Level};
use crate::lanes::Lanes;
use crate::metrics::{Fault, Metrics};

/// How long the head's beat may stand still before it counts as stale.
const STALE_NS: u64 = 5_000_000_000;

/// What this VM knows of the published state.
#[derive(Debug, Default)]
pub struct World {
    head: Option<Head>,
    /// When this VM first saw the head's present beat, by its own clock.
    beat_ns: u64,
    stale: bool,
    fleet: Option<Rc<Fleet>>,
    /// Epoch and version of the head for which the table was last read, readable or not.
    tried: Option<(u32, u64)>,
    corrections: Corrections,
}

/// The pages that may be used with the table.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Index {
    /// The head that describes them.
    pub head: Head,
    /// Share of an overlap that still counts.
    pub trust: f64,
}

impl World {
    /// Reads the head, and table and loads where they have changed. Returns the table that was
    /// replaced.
    pub fn refresh(
        &mut self,
        host: &impl Host,
        metrics: &mut Metrics,
        lanes: &mut Lanes,
        now_ns: u64,
    ) -> Option<Rc<Fleet>> {
        let shared = host.shared(&key::HEAD)?;
        match Head::decode(&shared.bytes) {
            Some(head) => self.take_head(head, now_ns),
            None => metrics.fault(host, Fault::Head),
        }
        self.watch(host, metrics, now_ns);
        if let Some(head) = &self.head {
            self.corrections.refresh(host, metrics, head);
        }
        self.read_table(host, metrics, lanes)
    }

    /// The table; `None` until one has been read.
    #[must_use]
    pub fn fleet(&self) -> Option<Rc<Fleet>> {
        self.fleet.clone()
    }

    /// The pages, if a complete set of the table's epoch is there.
    #[must_use]
    pub fn index(&self, now_ns: u64) -> Option<Index> {
        let head = self.head?;
        let epoch = self.fleet.as_ref()?.table.epoch;
        let age_ms = now_ns.saturating_sub(self.beat_ns) / 1_000_000;
        (head.ready && head.epoch == epoch).then(|| Index {
            head,
            trust: decide::trust(age_ms),
        })
    }

    /// What to correct the lanes by, unless it is too old: corrections that are not renewed may
    /// correct what is not there any more.
    #[must_use]
    pub fn loads(&self) -> Option<Rc<Loads>> {
        let epoch = self.fleet.as_ref()?.table.epoch;
        self.corrections.of(epoch).filter(|_| !self.stale)
    }

    /// Whether the sidecar has not been heard of for too long.
    #[must_use]
    pub fn is_stale(&self) -> bool {
        self.stale
    }

    fn take_head(&mut self, head: Head, now_ns: u64) {
        let beat = |head: Head| (head.epoch, head.beat);
        if self.head.map(beat) != Some(beat(head)) {
            self.beat_ns = now_ns;
        }
        self.head = Some(head);
    }

    fn watch(&mut self, host: &impl Host, metrics: &mut Metrics, now_ns: u64) {
        let stale = now_ns.saturating_sub(self.beat_ns) > STALE_NS;
        if stale == self.stale || self.head.is_none() {
            return;
        }
        self.stale = stale;
        if !metrics.stale(host, stale) {
            return;
        }
        if stale {
            host.log(
                Level::Warn,
                "the sidecar has been silent for 5 s; the index ages",
            );
        } else {
            host.log(Level::Info, "the sidecar is back");
        }
    }

    fn read_table(
        &mut self,
        host: &impl Host,
        metrics: &mut Metrics,
        lanes: &mut Lanes,
    ) -> Option<Rc<Fleet>> {
        let wanted = self.head.map(|head| (head.epoch, head.table_version));
        if wanted.is_none() || self.tried == wanted {
            return None;
        }
        self.tried = wanted;
        let read = host.shared(&key::TABLE);
        let Some(table) = read.and_then(|shared| Table::decode(&shared.bytes)) else {
            metrics.fault(host, Fault::Table);
            return None;
        };
        let fleet = Fleet::new(host, metrics, lanes, table);
        self.fleet.replace(Rc::new(fleet))
    }
}
