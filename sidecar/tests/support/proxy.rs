//! An Envoy process of one VM: it books, reports, and is told of corrections.

use std::path::Path;

use kv_core::id::Slot;
use kv_core::load::Load;
use kv_core::loads::Loads;

use super::vm::{Gauges, Vm, owner};
use super::{Bridge, subscribe};

pub(crate) struct Proxy {
    pub(crate) bridge: Bridge,
    pub(crate) gauges: Gauges,
    pub(crate) vm: Vm,
}

impl Proxy {
    /// Subscribes to the sidecar behind a socket.
    pub(crate) async fn start(socket: &Path, process: u64) -> Self {
        let bridge = Bridge::open(socket, subscribe(process, 1)).await.unwrap();
        let gauges = Gauges::default();
        let mut vm = Vm::new(100 * process, &gauges);
        bridge.report(&[vm.whole()]).await;
        Self { bridge, gauges, vm }
    }

    pub(crate) async fn report(&mut self) {
        let report = self.vm.report();
        self.bridge.report(&[report]).await;
    }

    /// What the proxy takes for the load of a worker, once that is so.
    pub(crate) async fn sees(&mut self, worker: u64, expected: Load) {
        let gauges = self.gauges.clone();
        let is_so = |loads: &Loads| seen(&gauges, loads, worker) == expected;
        let what = format!("worker {worker} with {expected:?}");
        self.bridge.loads(&what, is_so).await;
    }
}

/// Lane plus correction.
pub(crate) fn seen(gauges: &Gauges, loads: &Loads, worker: u64) -> Load {
    let slot = Slot(u16::try_from(worker - 1).unwrap());
    let correction = loads.pools[0].correction(slot);
    correction.apply(&gauges.load(owner(worker)))
}

pub(crate) fn load(prefill_tokens: u32, waiting: u16, decoding: u16, blocks: u32) -> Load {
    Load {
        prefill_tokens,
        waiting,
        decoding,
        blocks,
    }
}
