//! Which page lists which units, and which pages must be written. Pages multiply by linear
//! hashing: one page splits at a time, so growth never stalls and never needs a second copy.

use std::sync::Arc;

use hashbrown::HashMap;

use super::BOX_BYTES;
use super::unit::UnitId;
use crate::page::page_id;

/// Pages grow in number while their mean size is above this.
const MEAN_BYTES: usize = 1024;
/// Bytes that Envoy keeps for a page beside its image.
const KEY_BYTES: usize = 94;
/// Bytes of the counts before an image that is shared.
const COUNTS_BYTES: usize = 2 * size_of::<usize>();
/// Page ids stay below `2^MAX_LEVEL`.
const MAX_LEVEL: u8 = 24;

/// Why a page must be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Dirt {
    is_loss: bool,
    /// Least depth of a change.
    depth: u32,
}

#[derive(Debug, Default)]
struct Entry {
    units: Vec<UnitId>,
    /// As last encoded; empty before.
    image: Arc<[u8]>,
    /// Units that didn't fit when last encoded.
    left_out: usize,
}

/// The directory.
#[derive(Debug)]
pub(super) struct Directory {
    /// Pages `0..split` of this level, and their buddies, are a level further.
    level: u8,
    split: u32,
    pages: Vec<Entry>,
    dirty: HashMap<u32, Dirt>,
    /// New pages and their trimmed buddies, in the order in which they must be written.
    grown: Vec<u32>,
    bytes: usize,
    left_out: usize,
    /// Units that the pages have room for.
    room: usize,
}

impl Directory {
    pub(super) fn new(level: u8) -> Self {
        let level = level.min(MAX_LEVEL);
        let mut pages = Vec::new();
        pages.resize_with(1 << level, Entry::default);
        Self {
            level,
            split: 0,
            pages,
            dirty: HashMap::new(),
            grown: Vec::new(),
            bytes: 0,
            left_out: 0,
            room: 0,
        }
    }

    /// Level that readers start from.
    pub(super) fn level(&self) -> u8 {
        self.level
    }

    /// Level of one page.
    pub(super) fn level_of(&self, page: u32) -> u8 {
        let low = page & ((1 << self.level) - 1);
        self.level + u8::from(low < self.split)
    }

    fn page_of(&self, key: u64) -> u32 {
        let low = page_id(key, self.level);
        if low < self.split {
            page_id(key, self.level + 1)
        } else {
            low
        }
    }

    pub(super) fn pages(&self) -> u32 {
        u32::try_from(self.pages.len()).unwrap_or(u32::MAX)
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Bytes of the pages and their keys in Envoy.
    pub(super) fn envoy_bytes(&self) -> usize {
        self.bytes + KEY_BYTES * self.pages.len()
    }

    /// Bytes taken from the allocator.
    pub(super) fn own_bytes(&self) -> usize {
        let lists = self.room * size_of::<UnitId>() + self.grown.capacity() * size_of::<u32>();
        let pages = self.pages.capacity() * size_of::<Entry>() + self.bytes;
        let boxes = (2 * BOX_BYTES + COUNTS_BYTES) * self.pages.len();
        pages + lists + boxes + self.dirty.allocation_size()
    }

    /// Gives the units that the pages list other numbers.
    pub(super) fn renumber(&mut self, renumber: impl Fn(&mut UnitId)) {
        let units = self.pages.iter_mut().flat_map(|page| &mut page.units);
        units.for_each(renumber);
    }

    pub(super) fn left_out(&self) -> usize {
        self.left_out
    }

    pub(super) fn units(&self, page: u32) -> &[UnitId] {
        self.pages.get(page as usize).map_or(&[], |p| &p.units)
    }

    pub(super) fn insert(&mut self, key: u64, unit: UnitId) {
        let page = self.page_of(key);
        if let Some(page) = self.pages.get_mut(page as usize) {
            let before = page.units.capacity();
            page.units.push(unit);
            self.room += page.units.capacity() - before;
        }
    }

    pub(super) fn remove(&mut self, key: u64, unit: UnitId) {
        let page = self.page_of(key);
        if let Some(page) = self.pages.get_mut(page as usize)
            && let Some(at) = page.units.iter().position(|u| *u == unit)
        {
            page.units.swap_remove(at);
        }
    }

    /// Marks the page of a key for writing.
    pub(super) fn soil(&mut self, key: u64, depth: u32, is_loss: bool) {
        let dirt = Dirt { is_loss, depth };
        let page = self.page_of(key);
        let dirt = self.dirty.get(&page).map_or(dirt, |before| Dirt {
            is_loss: is_loss || before.is_loss,
            depth: depth.min(before.depth),
        });
        self.dirty.insert(page, dirt);
    }

    /// Keeps a page as encoded.
    pub(super) fn keep(&mut self, page: u32, image: Arc<[u8]>, left_out: usize) {
        if let Some(page) = self.pages.get_mut(page as usize) {
            self.bytes = self.bytes + image.len() - page.image.len();
            self.left_out = self.left_out + left_out - page.left_out;
            page.image = image;
            page.left_out = left_out;
        }
    }

    /// A page as last encoded; empty before.
    pub(super) fn image(&self, page: u32) -> &[u8] {
        self.pages.get(page as usize).map_or(&[], |p| &p.image)
    }

    /// The same for who keeps it; `None` before it was encoded.
    pub(super) fn shared_image(&self, page: u32) -> Option<Arc<[u8]>> {
        let page = self.pages.get(page as usize)?;
        (!page.image.is_empty()).then(|| Arc::clone(&page.image))
    }

    pub(super) fn is_dirty(&self) -> bool {
        !self.dirty.is_empty() || !self.grown.is_empty() || self.wants_growth()
    }

    /// Whether the pages are too large on average.
    pub(super) fn wants_growth(&self) -> bool {
        let bytes = self.bytes > MEAN_BYTES * self.pages.len();
        self.level < MAX_LEVEL && (bytes || self.split > 0)
    }

    /// Splits the next page: some of its units move to a page one level further.
    pub(super) fn grow(&mut self, key_of: impl Fn(UnitId) -> u64) {
        let (old, level) = (self.split, self.level + 1);
        let new = self.pages();
        let Some(entry) = self.pages.get_mut(old as usize) else {
            return;
        };
        let units = std::mem::take(&mut entry.units);
        let before = units.capacity();
        let (stay, go): (Vec<_>, Vec<_>) = units
            .into_iter()
            .partition(|u| page_id(key_of(*u), level) == old);
        self.room = self.room + stay.capacity() + go.capacity() - before;
        entry.units = stay;
        self.pages.push(Entry {
            units: go,
            ..Entry::default()
        });
        self.grown.extend([new, old]);
        self.split += 1;
        if self.split == 1 << self.level {
            self.level = level;
            self.split = 0;
        }
    }

    /// Up to `limit` pages to write, in order: new pages before their trimmed buddies; then pages
    /// that lost something, deepest first; then the others, shallowest first. So a reader between
    /// two writes sees a prefix-closed index.
    pub(super) fn take_dirty(&mut self, limit: usize) -> Vec<u32> {
        let mut order = std::mem::take(&mut self.grown);
        for page in &order {
            self.dirty.remove(page);
        }
        let mut rest: Vec<(u32, Dirt)> = self.dirty.iter().map(|(p, d)| (*p, *d)).collect();
        rest.sort_unstable_by_key(|(page, dirt)| {
            let depth = if dirt.is_loss {
                u32::MAX - dirt.depth
            } else {
                dirt.depth
            };
            (!dirt.is_loss, depth, *page)
        });
        rest.truncate(limit.saturating_sub(order.len()));
        for (page, _) in rest {
            self.dirty.remove(&page);
            order.push(page);
        }
        order
    }

    /// Pages waiting to be written.
    pub(super) fn dirty(&self) -> usize {
        self.dirty.len() + self.grown.len()
    }
}
