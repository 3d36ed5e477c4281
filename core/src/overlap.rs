//! How many leading blocks of a prompt an owner holds, by tier.

use crate::id::Tier;
use crate::policy::Policy;

/// Leading blocks held at a tier or a better one: `depth[0] <= depth[1] <= ...`, in blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Overlap {
    /// By tier index.
    pub depth: [u32; Tier::COUNT],
    /// Blocks beyond all of these that a store shared by the workers has.
    pub shared_cache: u32,
}

impl Overlap {
    /// That of an owner which shares no store.
    #[must_use]
    pub fn new(depth: [u32; Tier::COUNT]) -> Self {
        Self {
            depth,
            shared_cache: 0,
        }
    }

    /// Whether nothing is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let [.., all] = self.depth;
        all == 0
    }

    /// Blocks on each tier alone: device blocks, then what each slower tier adds.
    #[must_use]
    pub fn by_tier(&self) -> [u32; Tier::COUNT] {
        let [device, host, disk, external] = self.depth;
        [
            device,
            host.saturating_sub(device),
            disk.saturating_sub(host),
            external.saturating_sub(disk),
        ]
    }

    /// Blocks weighted by what a hit on their tier saves; device blocks count whole.
    #[must_use]
    pub fn effective(&self, policy: &Policy) -> f64 {
        let [device, host, disk, external] = self.by_tier().map(f64::from);
        device
            + policy.host_cache_hit_weight * host
            + policy.disk_cache_hit_weight * (disk + external)
    }
}

#[cfg(test)]
mod tests {
    use super::Overlap;
    use crate::policy::Policy;

    #[test]
    fn slower_tiers_count_by_their_weight() {
        let overlap = Overlap::new([3, 4, 4, 6]);
        assert_eq!(overlap.by_tier(), [3, 1, 0, 2]);
        assert!((overlap.effective(&Policy::default()) - 4.25).abs() < 1e-12);
        assert!(!overlap.is_empty());
        assert!(Overlap::default().is_empty());
    }
}
