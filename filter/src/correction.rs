//! The sidecar's corrections of the lanes, and the prefixes in use, as this VM sees them.

use std::rc::Rc;

use kv_core::head::Head;
use kv_core::key;
use kv_core::loads::Loads;

use crate::host::Host;
use crate::metrics::{Fault, Metrics};

/// The last loads that were published. Decoded once per version.
#[derive(Debug, Default)]
pub struct Corrections {
    /// Epoch and beat of the head at which they were last looked for.
    looked: Option<(u32, u64)>,
    /// Epoch and version of what was last decoded, readable or not.
    tried: Option<(u32, u64)>,
    loads: Option<Rc<Loads>>,
}

impl Corrections {
    /// Reads the loads where the head has changed.
    pub fn refresh(&mut self, host: &impl Host, metrics: &mut Metrics, head: &Head) {
        let beat = Some((head.epoch, head.beat));
        if self.looked == beat {
            return;
        }
        self.looked = beat;
        let Some(shared) = host.shared(&key::LOADS) else {
            return;
        };
        let version = Loads::peek(&shared.bytes);
        if version.is_some() && self.tried == version {
            return;
        }
        self.tried = version;
        // Broken ones leave the lanes as they are: what an older correction would add to them may
        // be wrong by any amount.
        self.loads = Loads::decode(&shared.bytes).map(Rc::new);
        if self.loads.is_none() {
            metrics.fault(host, Fault::Loads);
        }
    }

    /// The loads, if they are of this epoch.
    #[must_use]
    pub fn of(&self, epoch: u32) -> Option<Rc<Loads>> {
        let loads = self.loads.as_ref()?;
        (loads.epoch == epoch).then(|| Rc::clone(loads))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Fake;
    use crate::host::Expect;

    #[test]
    fn loads_are_decoded_when_the_head_beats_and_their_version_changed() {
        let host = Fake::default();
        let mut metrics = Metrics::default();
        let mut corrections = Corrections::default();
        let mut at = |beat: u64, bytes: Option<&[u8]>| {
            if let Some(bytes) = bytes {
                host.set_shared(&key::LOADS, bytes, Expect::Anything);
            }
            let head = Head {
                epoch: 3,
                beat,
                ..Head::default()
            };
            corrections.refresh(&host, &mut metrics, &head);
            corrections.of(3)
        };
        let loads = |version| {
            let loads = Loads {
                epoch: 3,
                version,
                ..Loads::default()
            };
            loads.encode()
        };
        assert_eq!(at(1, None), None);
        let first = at(2, Some(&loads(1))).unwrap();
        assert!(Rc::ptr_eq(&first, &at(3, None).unwrap()));
        let same_beat = at(3, Some(&loads(2))).unwrap();
        assert_eq!(same_beat.version, 1);
        assert_eq!(at(4, None).unwrap().version, 2);
        assert_eq!(at(5, Some(b"\x01")), None);
        assert_eq!(
            host.metrics_with("=.=loads;"),
            [("kv_router_faults_total_kind=.=loads;.;".to_owned(), 1)]
        );
        assert_eq!(at(6, Some(&loads(2))).unwrap().version, 2);
        assert_eq!(corrections.of(4), None);
    }
}
