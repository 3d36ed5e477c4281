//! The report for people.

use std::fmt::{self, Display};

use kv_core::id::{Family, Tier};

use super::Report;

impl Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.messages == 0 {
            "nothing was seen"
        } else if self.understood {
            "understood"
        } else {
            "not understood"
        };
        for file in &self.files {
            let mark = if file.understood { "ok " } else { "?? " };
            write!(f, "{mark} {}: changes {}", file.name, file.changes)?;
            for (kind, events) in &file.dropped {
                write!(f, ", {kind} {events}")?;
            }
            writeln!(f)?;
        }
        writeln!(f, "verdict      {verdict}")?;
        writeln!(f, "messages     {} ({} bytes)", self.messages, self.bytes)?;
        row(f, "shape", &self.shapes)?;
        writeln!(f, "engine       {}", self.engine)?;
        row(
            f,
            "events",
            self.events.iter().map(|(name, n)| format!("{name} {n}")),
        )?;
        let sizes = self.block_sizes.keys();
        row(f, "block size", sizes.map(|size| format!("{size} tokens")))?;
        writeln!(
            f,
            "index        blocks of {} tokens",
            self.kv_cache_block_size
        )?;
        row(
            f,
            "media",
            self.media.iter().map(|(name, medium)| {
                let name = if name.is_empty() { "(none)" } else { name };
                let tier = medium.tier.map_or("no tier", tier);
                format!("{name} {}: {tier}", medium.events)
            }),
        )?;
        row(
            f,
            "groups",
            self.groups.iter().map(|(group, kind)| {
                format!("{group} {}", kind.as_deref().unwrap_or("(kind not named)"))
            }),
        )?;
        row(f, "hashes", &self.hashes)?;
        row(
            f,
            "family",
            self.families.keys().map(|name| match name.as_str() {
                "dynamo" => "the engine's own, matched by token ids",
                name => name,
            }),
        )?;
        row(f, "dp ranks", self.ranks.iter().map(u32::to_string))?;
        if let Some(s) = self.sequences {
            writeln!(
                f,
                "numbers      {} to {}, {} missing, {} restarts",
                s.first, s.last, s.missing, s.restarts
            )?;
        }
        if let Some(replay) = self.replay {
            let end = if replay.is_complete { "" } else { ", no end" };
            write!(f, "replay       {} messages", replay.messages)?;
            match replay.first {
                Some(first) => writeln!(f, " from {first} on{end}")?,
                None => writeln!(f, "{end}")?,
            }
        }
        let by_tier = |what: &'static str| {
            move |(of, blocks): (&Tier, &u64)| format!("blocks {what} {} {blocks}", tier(*of))
        };
        let stored = self.indexed.stored_blocks.iter().map(by_tier("stored on"));
        let removed = self
            .indexed
            .removed_blocks
            .iter()
            .map(by_tier("removed from"));
        let clears = (self.indexed.clears > 0).then(|| format!("clears {}", self.indexed.clears));
        row(f, "indexed", stored.chain(removed).chain(clears))?;
        row(
            f,
            "dropped",
            self.dropped
                .iter()
                .map(|(kind, dropped)| format!("{kind} {}: {}", dropped.events, dropped.why)),
        )?;
        row(f, "advice", &self.advice)
    }
}

/// A label and its values, one to a line; nothing without values.
fn row<V: Display>(
    f: &mut fmt::Formatter<'_>,
    label: &str,
    values: impl IntoIterator<Item = V>,
) -> fmt::Result {
    for (i, value) in values.into_iter().enumerate() {
        let label = if i == 0 { label } else { "" };
        writeln!(f, "{label:<12} {value}")?;
    }
    Ok(())
}

fn tier(tier: Tier) -> &'static str {
    match tier {
        Tier::Device => "device",
        Tier::Host => "host",
        Tier::Disk => "disk",
        Tier::External => "external",
    }
}

/// A family as the configuration names it.
pub(super) fn family(family: Family) -> String {
    match serde_json::to_value(family) {
        Ok(serde_json::Value::String(name)) => name,
        _ => format!("{family:?}"),
    }
}
