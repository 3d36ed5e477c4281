//! Writing pages.

use crate::id::{Slot, Tier};
use crate::page::image::{Image, Kept};
use crate::page::{HEADER, MAX_BYTES, VERSION, body_of, head_of};

/// A unit of more bytes than this splits.
pub const SPLIT_BYTES: usize = 2048;

/// An owner and its tier, as sets hold them.
#[must_use]
pub fn member(slot: Slot, tier: Tier) -> u16 {
    // Slots stay below `Slot::MAX` = 2^10, so two bits are free.
    slot.0 << 2 | tier as u16
}

/// One run of a unit, as the index hands it over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Run {
    /// Position of the first block in its group.
    pub position: u8,
    /// The index's id of the owner set.
    pub set: u32,
    /// Sequence hashes of the blocks.
    pub blocks: Vec<u64>,
}

impl Run {
    /// Bytes of the run in a page.
    #[must_use]
    pub fn bytes(&self) -> usize {
        8 + 2 * self.blocks.len().saturating_sub(1)
    }
}

/// One unit of a page.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unit {
    /// High half of its key.
    pub fingerprint: u32,
    /// Position from which its blocks are units of their own, or `WHOLE`.
    pub split: u8,
    /// Its runs.
    pub runs: Vec<Run>,
}

impl Unit {
    /// Bytes of the unit in a page, without its sets.
    #[must_use]
    pub fn bytes(&self) -> usize {
        10 + self.runs.iter().map(Run::bytes).sum::<usize>()
    }
}

/// Where a unit of a page comes from.
#[derive(Clone, Debug)]
pub enum Source<'a> {
    /// From the index.
    Index(Unit),
    /// From the page as it was encoded before.
    Before(Kept<'a>),
}

/// Encodes units into a page. `before` is the page that kept units are from; `members` gives a
/// set's members, ascending. Units that no longer fit into [`MAX_BYTES`] are left out; the caller
/// orders them by worth. Returns the page and the number of units left out.
#[must_use]
pub fn encode<'a>(
    units: &[Source<'_>],
    before: Image<'_>,
    level: u8,
    epoch: u32,
    members: impl Fn(u32) -> &'a [u16],
) -> (Vec<u8>, usize) {
    let mut sets = SetTable::default();
    let mut bodies: Vec<u8> = Vec::new();
    let mut taken: Vec<(u32, u16)> = Vec::with_capacity(units.len());
    let mut left_out = 0;
    for unit in units {
        let mark = (sets.offsets.len(), bodies.len());
        let offset = narrow(bodies.len());
        let fingerprint = match unit {
            Source::Index(unit) => {
                bodies.extend_from_slice(&narrow(unit.runs.len()).to_le_bytes());
                bodies.extend_from_slice(&[unit.split, 0]);
                for run in &unit.runs {
                    let set = sets.of_index(run.set, &members);
                    encode_run(run, set, &mut bodies);
                }
                unit.fingerprint
            }
            Source::Before(unit) => {
                unit.copy(&mut bodies, |set| sets.of_page(set, before.set(set)));
                unit.fingerprint
            }
        };
        taken.push((fingerprint, offset));
        let total = HEADER + 6 * taken.len() + bodies.len() + sets.len();
        if total > MAX_BYTES {
            left_out += 1;
            taken.pop();
            sets.truncate(mark.0);
            bodies.truncate(mark.1);
        }
    }

    let bodies_at = HEADER + 6 * taken.len();
    let offsets_at = bodies_at + bodies.len();
    let sets_at = offsets_at + 2 * sets.offsets.len();
    let mut page = Vec::with_capacity(sets_at + sets.bytes.len());
    page.extend_from_slice(&[level, VERSION]);
    page.extend_from_slice(&narrow(taken.len()).to_le_bytes());
    page.extend_from_slice(&epoch.to_le_bytes());
    page.extend_from_slice(&[0; 4]);
    page.extend_from_slice(&narrow(offsets_at).to_le_bytes());
    page.extend_from_slice(&narrow(sets.offsets.len()).to_le_bytes());
    for (fingerprint, _) in &taken {
        page.extend_from_slice(&fingerprint.to_le_bytes());
    }
    for (_, offset) in &taken {
        page.extend_from_slice(&(narrow(bodies_at) + offset).to_le_bytes());
    }
    page.extend_from_slice(&bodies);
    for offset in &sets.offsets {
        page.extend_from_slice(&(narrow(sets_at) + offset).to_le_bytes());
    }
    page.extend_from_slice(&sets.bytes);
    (page, left_out)
}

/// The sets of a page that is being put together, each once.
#[derive(Debug, Default)]
struct SetTable {
    offsets: Vec<u16>,
    bytes: Vec<u8>,
    /// Numbers by the index's ids.
    by_id: Vec<(u32, u16)>,
    /// Numbers by those in the page as it was.
    by_old: Vec<(u16, u16)>,
}

impl SetTable {
    /// Bytes in the page.
    fn len(&self) -> usize {
        2 * self.offsets.len() + self.bytes.len()
    }

    fn of_index<'a>(&mut self, id: u32, members: impl Fn(u32) -> &'a [u16]) -> u16 {
        if let Some((_, set)) = self.by_id.iter().find(|(other, _)| *other == id) {
            return *set;
        }
        let at = self.bytes.len();
        encode_set(members(id), &mut self.bytes);
        let set = self.one_of(at);
        self.by_id.push((id, set));
        set
    }

    fn of_page(&mut self, old: u16, set: &[u8]) -> u16 {
        if let Some((_, set)) = self.by_old.iter().find(|(other, _)| *other == old) {
            return *set;
        }
        let at = self.bytes.len();
        self.bytes.extend_from_slice(set);
        let set = self.one_of(at);
        self.by_old.push((old, set));
        set
    }

    /// The number of the set that has been appended at a place, which goes again if it is there
    /// already: a set has one encoding.
    fn one_of(&mut self, at: usize) -> u16 {
        let (before, new) = self.bytes.split_at_checked(at).unwrap_or_default();
        let is_it = |offset: &u16| {
            let same = before.get(usize::from(*offset)..);
            same.is_some_and(|set| set.starts_with(new))
        };
        if let Some(set) = self.offsets.iter().position(is_it) {
            self.bytes.truncate(at);
            return narrow(set);
        }
        self.offsets.push(narrow(at));
        narrow(self.offsets.len() - 1)
    }

    /// Takes back all but the first sets.
    fn truncate(&mut self, sets: usize) {
        if let Some(at) = self.offsets.get(sets) {
            self.bytes.truncate(usize::from(*at));
        }
        self.offsets.truncate(sets);
        self.by_id.retain(|(_, set)| usize::from(*set) < sets);
        self.by_old.retain(|(_, set)| usize::from(*set) < sets);
    }
}

/// Lengths and offsets inside a page: `MAX_BYTES` bounds them, and a unit that would pass it is
/// taken back, so a clamped value never reaches a page.
fn narrow(n: usize) -> u16 {
    u16::try_from(n).unwrap_or(u16::MAX)
}

fn encode_run(run: &Run, set: u16, out: &mut Vec<u8>) {
    let length = u8::try_from(run.blocks.len()).unwrap_or(u8::MAX);
    let Some((head, body)) = run.blocks.split_first() else {
        return;
    };
    out.extend_from_slice(&[run.position, length]);
    out.extend_from_slice(&set.to_le_bytes());
    out.extend_from_slice(&head_of(*head).to_le_bytes());
    for block in body {
        out.extend_from_slice(&body_of(*block).to_le_bytes());
    }
}

/// Bytes of a set: the shorter of list and bitmap.
#[must_use]
pub fn set_bytes(members: &[u16]) -> usize {
    let (_, words, tiers) = shape(members);
    (2 + 2 * members.len()).min(4 + 2 * words * tiers)
}

/// Mask of the tiers that occur, words of a bitmap over the slots, and number of tiers.
fn shape(members: &[u16]) -> (u16, usize, usize) {
    let mask = members.iter().fold(0_u16, |mask, m| mask | 1 << (m & 3));
    let words = members.last().map_or(0, |m| usize::from(m >> 6) + 1);
    (mask, words, mask.count_ones() as usize)
}

fn encode_set(members: &[u16], out: &mut Vec<u8>) {
    let (mask, words, tiers) = shape(members);
    if 4 + 2 * words * tiers >= 2 + 2 * members.len() {
        out.extend_from_slice(&narrow(members.len()).to_le_bytes());
        for m in members {
            out.extend_from_slice(&m.to_le_bytes());
        }
        return;
    }
    out.extend_from_slice(&(1 << 14 | narrow(words)).to_le_bytes());
    out.extend_from_slice(&mask.to_le_bytes());
    for tier in 0..4_u16 {
        if mask & (1 << tier) == 0 {
            continue;
        }
        let mut bitmap = vec![0_u16; words];
        for m in members.iter().filter(|m| *m & 3 == tier) {
            if let Some(word) = bitmap.get_mut(usize::from(m >> 6)) {
                *word |= 1 << (m >> 2 & 15);
            }
        }
        for word in bitmap {
            out.extend_from_slice(&word.to_le_bytes());
        }
    }
}
