//! Head and worker table as this VM sees them, and how old they are.

use std::rc::Rc;

use kv_core::decide;
use kv_core::head::Head;
use kv_core::key;
use kv_core::table::Table;

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
    /// Reads the head, and the table where it has changed.
    pub fn refresh(
        &mut self,
        host: &impl Host,
        metrics: &mut Metrics,
        lanes: &mut Lanes,
        now_ns: u64,
    ) {
        let Some(shared) = host.shared(&key::HEAD) else {
            return;
        };
        match Head::decode(&shared.bytes) {
            Some(head) => self.take_head(head, now_ns),
            None => metrics.fault(host, Fault::Head),
        }
        self.watch(host, metrics, now_ns);
        self.read_table(host, metrics, lanes);
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

    fn read_table(&mut self, host: &impl Host, metrics: &mut Metrics, lanes: &mut Lanes) {
        let wanted = self.head.map(|head| (head.epoch, head.table_version));
        if wanted.is_none() || self.tried == wanted {
            return;
        }
        self.tried = wanted;
        let read = host.shared(&key::TABLE);
        match read.and_then(|shared| Table::decode(&shared.bytes)) {
            Some(table) => {
                self.fleet = Some(Rc::new(Fleet::new(host, metrics, lanes, table)));
            }
            None => metrics.fault(host, Fault::Table),
        }
    }
}
