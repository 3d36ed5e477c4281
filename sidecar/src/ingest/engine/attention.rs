//! Which events are wanted: those of the worker's own blocks, and of the attention that a prefix
//! cache is about.

use std::collections::HashMap;

use kv_core::id::DpRank;

use super::event::Place;
use crate::ingest::Rejection;

/// Most groups that are remembered over all ranks; engines have a handful to a rank.
const MAX_GROUPS: usize = 1 << 14;

/// Kinds whose blocks hold all of a prefix.
const MAIN: [&str; 3] = ["full_attention", "mla_attention", "sink_full_attention"];
/// Kinds whose blocks don't.
const OTHER: [&str; 6] = [
    "sliding_window",
    "sliding_window_mla",
    "mamba",
    "chunked_local_attention",
    "encoder_only_attention",
    "cross_attention",
];

/// What is known of the groups of a stream's ranks.
#[derive(Debug, Default)]
pub(super) struct Groups(HashMap<(DpRank, u32), Kind>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Main,
    Other,
    Unknown,
}

impl Kind {
    fn of(name: &str) -> Self {
        if MAIN.contains(&name) {
            Self::Main
        } else if OTHER.contains(&name) {
            Self::Other
        } else {
            Self::Unknown
        }
    }
}

impl Groups {
    /// Stores name the kind of their group, removes mostly the group alone.
    pub(super) fn learn(&mut self, rank: DpRank, place: &Place) {
        let (Some(group), Some(kind)) = (place.group, place.kind.as_deref()) else {
            return;
        };
        if self.0.len() < MAX_GROUPS || self.0.contains_key(&(rank, group)) {
            self.0.insert((rank, group), Kind::of(kind));
        }
    }

    pub(super) fn wanted(&self, rank: DpRank, place: &Place) -> Result<(), Rejection> {
        if let Some(kind) = place.kind.as_deref() {
            return match Kind::of(kind) {
                Kind::Main => Ok(()),
                Kind::Other => Err(Rejection::AttentionKind),
                Kind::Unknown => Err(Rejection::UnknownAttentionKind),
            };
        }
        let Some(group) = place.group else {
            return Ok(());
        };
        match self.0.get(&(rank, group)) {
            Some(Kind::Main) => Ok(()),
            Some(Kind::Other) => Err(Rejection::AttentionGroup),
            Some(Kind::Unknown) => Err(Rejection::UnknownAttentionKind),
            // Engines number the group of full attention first.
            None if group == 0 => Ok(()),
            None => Err(Rejection::UnlearnedGroup),
        }
    }
}

/// Refuses blocks that belong to something other than the worker.
pub(super) fn own(ownership: Option<&str>) -> Result<(), Rejection> {
    match ownership {
        None | Some("") => Ok(()),
        Some(_) => Err(Rejection::Ownership),
    }
}

/// Refuses blocks that lie elsewhere.
pub(super) fn local(locality: Option<&str>) -> Result<(), Rejection> {
    match locality {
        None | Some("") => Ok(()),
        Some(locality) if locality.eq_ignore_ascii_case("local") => Ok(()),
        Some(_) => Err(Rejection::NotLocal),
    }
}
