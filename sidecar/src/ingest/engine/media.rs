//! Names of media in events, and the tiers they stand for.

use std::collections::BTreeMap;

use kv_core::id::Tier;

/// Names that engines and offloading layers are known to send.
const USUAL: [(&str, Tier); 20] = [
    ("GPU", Tier::Device),
    ("DEVICE", Tier::Device),
    ("CPU", Tier::Host),
    ("CPU_PINNED", Tier::Host),
    ("CPU_TIER1", Tier::Host),
    ("HOST", Tier::Host),
    ("HOST_PINNED", Tier::Host),
    ("CXL", Tier::Host),
    ("CPU_TIER2", Tier::Disk),
    ("DISK", Tier::Disk),
    ("SSD", Tier::Disk),
    ("NVME", Tier::Disk),
    ("STORAGE", Tier::Disk),
    ("FS", Tier::Disk),
    ("LOCAL_DISK", Tier::Disk),
    ("EXTERNAL", Tier::External),
    ("NETWORK", Tier::External),
    ("REMOTE", Tier::External),
    ("SHARED", Tier::External),
    ("OBJ", Tier::External),
];

/// Tiers by name, upper case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Media(BTreeMap<String, Tier>);

impl Media {
    /// The usual names and further ones, which win.
    pub fn new<'n>(further: impl IntoIterator<Item = (&'n str, Tier)>) -> Self {
        let usual = USUAL.into_iter().chain(further);
        Self(usual.map(|(name, tier)| (canonical(name), tier)).collect())
    }

    /// The tier of a name in any case; an empty name is the accelerator's memory.
    #[must_use]
    pub fn tier(&self, name: &str) -> Option<Tier> {
        let name = canonical(name);
        if name.is_empty() {
            return Some(Tier::Device);
        }
        // Some senders print the whole device: `device(type='cuda', index=0)`.
        let is_printed_device = name.starts_with("DEVICE(");
        let printed = || is_printed_device.then_some(Tier::Device);
        self.0.get(&name).copied().or_else(printed)
    }
}

impl Default for Media {
    fn default() -> Self {
        Self::new([])
    }
}

/// A name as the table has it.
#[must_use]
pub fn canonical(name: &str) -> String {
    name.trim().to_uppercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_in_the_field_has_its_tier() {
        let media = Media::default();
        let names = [
            ("", Some(Tier::Device)),
            ("GPU", Some(Tier::Device)),
            ("gpu", Some(Tier::Device)),
            ("device(type='cuda', index=0)", Some(Tier::Device)),
            ("CPU", Some(Tier::Host)),
            ("cpu", Some(Tier::Host)),
            ("CPU_PINNED", Some(Tier::Host)),
            ("CPU_TIER1", Some(Tier::Host)),
            ("CXL", Some(Tier::Host)),
            ("CPU_TIER2", Some(Tier::Disk)),
            ("SSD", Some(Tier::Disk)),
            ("FS", Some(Tier::Disk)),
            ("STORAGE", Some(Tier::Disk)),
            ("OBJ", Some(Tier::External)),
            ("SHARED", Some(Tier::External)),
            ("TAPE", None),
        ];
        for (name, tier) in names {
            assert_eq!(media.tier(name), tier, "{name}");
        }
    }

    #[test]
    fn configured_names_extend_and_override_the_usual_ones() {
        let media = Media::new([("tape", Tier::External), ("CXL", Tier::Device)]);
        assert_eq!(media.tier("TAPE"), Some(Tier::External));
        assert_eq!(media.tier("cxl"), Some(Tier::Device));
        assert_eq!(media.tier("GPU"), Some(Tier::Device));
    }
}
