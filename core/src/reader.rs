//! Looking up a prompt in the pages.
//!
//! The pages are prefix-closed: an owner listed for a block is listed for all blocks before it,
//! and its tier never gets better along the chain. So "owner `w` holds block `i` at tier `t` or
//! better" is monotone in `i`, and the lookup gallops: it probes group 0, then groups ever further
//! on, and searches between two probes only while some owner is alive at the first and not at the
//! second.

use crate::id::{Family, Slot, Tier};
use crate::overlap::Overlap;
use crate::page::decode::Page;
use crate::page::{WHOLE, fingerprint, page_id, unit_key};

/// How to read the pages: what head and worker table say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// Level of page ids.
    pub level: u8,
    /// Blocks to a group; 0 reads nothing.
    pub group: u8,
    /// Epoch of the pages.
    pub epoch: u32,
    /// The pool's secret.
    pub pool_key: u64,
    /// What the hashes are.
    pub family: Family,
    /// Slots in use are below this, at most [`Slot::MAX`].
    pub slots: usize,
}

/// One group of the prompt, as the pages show it.
#[derive(Clone, Copy, Debug)]
struct Probe {
    group: usize,
    /// Owners of the group's first block: `Tier::COUNT * words` words from here in `bits`.
    alive: usize,
    /// Matching runs: a range of `hits`.
    hits: (usize, usize),
}

/// A matching run: blocks before `end` in its group are held by `set` of page `page`.
#[derive(Clone, Copy, Debug)]
struct Hit {
    end: usize,
    set: u16,
    page: usize,
}

/// A lookup and its result. Keep it between requests: its buffers are reused.
#[derive(Debug, Default)]
pub struct Reader {
    slots: usize,
    words: usize,
    /// By tier, then slot.
    depths: Vec<u32>,
    bits: Vec<u64>,
    scratch: Vec<u64>,
    hits: Vec<Hit>,
    pages: Vec<Vec<u8>>,
    /// Pages fetched by the last lookup.
    fetched: u32,
}

/// How a lookup walks the groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Walk {
    Gallop,
    Linear,
}

impl Reader {
    /// An empty reader.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Looks up the sequence hashes of a prompt. `fetch` gives the bytes of a page.
    pub fn gallop(
        &mut self,
        view: &View,
        prompt: &[u64],
        fetch: impl FnMut(u32) -> Option<Vec<u8>>,
    ) {
        self.walk(view, prompt, Walk::Gallop, fetch);
    }

    /// The same without skipping a group: the slow way that galloping is checked against.
    pub fn linear(
        &mut self,
        view: &View,
        prompt: &[u64],
        fetch: impl FnMut(u32) -> Option<Vec<u8>>,
    ) {
        self.walk(view, prompt, Walk::Linear, fetch);
    }

    /// The owners of one block of a flat family: by tier, a bit to each slot that holds it there or
    /// on a better one.
    pub fn holders(
        &mut self,
        view: &View,
        hash: u64,
        fetch: impl FnMut(u32) -> Option<Vec<u8>>,
    ) -> &[u64] {
        self.begin(view);
        let probe = self.probe(
            &mut Lookup {
                view,
                groups: 1,
                prompt: &[hash],
                size: 1,
                fetch,
            },
            0,
        );
        self.alive(probe)
    }

    /// What the owner in a slot holds of the prompt.
    #[must_use]
    pub fn overlap(&self, slot: Slot) -> Overlap {
        let at = |tier: usize| {
            let depth = self.depths.get(tier * self.slots + slot.index());
            depth
                .copied()
                .filter(|_| slot.index() < self.slots)
                .unwrap_or(0)
        };
        Overlap::new([at(0), at(1), at(2), at(3)])
    }

    /// Slots whose owner holds at least the prompt's first block.
    pub fn held(&self) -> impl Iterator<Item = Slot> + '_ {
        let slowest = self
            .depths
            .get((Tier::COUNT - 1) * self.slots..)
            .unwrap_or(&[]);
        let held = slowest.iter().zip(0_u16..).filter(|(depth, _)| **depth > 0);
        held.map(|(_, slot)| Slot(slot))
    }

    /// Pages fetched by the last lookup.
    #[must_use]
    pub fn fetched(&self) -> u32 {
        self.fetched
    }

    fn begin(&mut self, view: &View) {
        self.slots = view.slots.min(usize::from(Slot::MAX));
        self.words = self.slots.div_ceil(64);
        self.bits.clear();
        self.hits.clear();
        self.pages.clear();
        self.fetched = 0;
    }

    fn walk(
        &mut self,
        view: &View,
        prompt: &[u64],
        walk: Walk,
        fetch: impl FnMut(u32) -> Option<Vec<u8>>,
    ) {
        self.begin(view);
        self.depths.clear();
        self.depths.resize(Tier::COUNT * self.slots, 0);
        let size = usize::from(view.group);
        if size == 0 || prompt.is_empty() || self.slots == 0 {
            return;
        }
        let mut lookup = Lookup {
            view,
            groups: prompt.len().div_ceil(size),
            prompt,
            size,
            fetch,
        };
        let mut low = self.probe(&mut lookup, 0);
        let mut step = if walk == Walk::Linear { 1 } else { 2 };
        while self.is_alive(low) {
            let group = (low.group + step).min(lookup.groups);
            let high = self.probe(&mut lookup, group);
            self.between(&mut lookup, low, high);
            low = high;
            if walk == Walk::Gallop {
                step *= 4;
            }
        }
    }

    /// Settles the owners that are alive at `low` and not at `high`.
    fn between<F: FnMut(u32) -> Option<Vec<u8>>>(
        &mut self,
        lookup: &mut Lookup<'_, F>,
        low: Probe,
        high: Probe,
    ) {
        if !self.any_dies(low, high) {
            return;
        }
        if high.group - low.group <= 1 {
            self.settle(low, high, lookup.size);
            return;
        }
        let middle = self.probe(lookup, usize::midpoint(low.group, high.group));
        self.between(lookup, low, middle);
        self.between(lookup, middle, high);
    }

    /// Reads the units of one group; past the last group nobody is alive.
    fn probe<F: FnMut(u32) -> Option<Vec<u8>>>(
        &mut self,
        lookup: &mut Lookup<'_, F>,
        group: usize,
    ) -> Probe {
        let alive = self.bits.len();
        self.bits.resize(alive + Tier::COUNT * self.words, 0);
        let first_hit = self.hits.len();
        let blocks = lookup.group(group);
        let mut start = 0;
        while let Some(&first) = blocks.get(start) {
            let key = unit_key(first, lookup.view.pool_key, lookup.view.family);
            let Some(bytes) = lookup.page(key, &mut self.fetched) else {
                break;
            };
            let page_number = self.pages.len();
            self.pages.push(bytes);
            let Some(page) = self
                .pages
                .last()
                .and_then(|bytes| Page::new(bytes, lookup.view.epoch))
            else {
                break;
            };
            let Some(unit) = page.unit(fingerprint(key)) else {
                break;
            };
            let mut reached = 0;
            for run in unit {
                let matched = run.matched(blocks);
                if matched == 0 {
                    continue;
                }
                let end = usize::from(run.position) + matched;
                reached = reached.max(end);
                self.hits.push(Hit {
                    end,
                    set: run.set,
                    page: page_number,
                });
                if run.position == 0 {
                    let bits = self.bits.get_mut(alive..).unwrap_or(&mut []);
                    page.mark(run.set, self.words, bits);
                }
            }
            let split = usize::from(unit.split);
            // A unit below the split starts further on, so this ends.
            if unit.split == WHOLE || split <= start || reached < split {
                break;
            }
            start = split;
        }
        Probe {
            group,
            alive,
            hits: (first_hit, self.hits.len()),
        }
    }

    fn alive(&self, probe: Probe) -> &[u64] {
        let end = probe.alive + Tier::COUNT * self.words;
        self.bits.get(probe.alive..end).unwrap_or(&[])
    }

    fn is_alive(&self, probe: Probe) -> bool {
        self.alive(probe).iter().any(|word| *word != 0)
    }

    fn any_dies(&self, low: Probe, high: Probe) -> bool {
        let mut words = self.alive(low).iter().zip(self.alive(high));
        words.any(|(low, high)| low & !high != 0)
    }

    /// Owners alive at `low` and not in the next group end in `low`'s group: each at the longest
    /// matching run that lists it.
    fn settle(&mut self, low: Probe, high: Probe, size: usize) {
        let mut left: Vec<u64> = self
            .alive(low)
            .iter()
            .zip(self.alive(high))
            .map(|(low, high)| low & !high)
            .collect();
        let Some(hits) = self.hits.get_mut(low.hits.0..low.hits.1) else {
            return;
        };
        hits.sort_unstable_by_key(|hit| std::cmp::Reverse(hit.end));
        for hit in hits {
            let page = self.pages.get(hit.page);
            let Some(page) = page.map(|bytes| Page::assume(bytes)) else {
                continue;
            };
            self.scratch.clear();
            self.scratch.resize(Tier::COUNT * self.words, 0);
            page.mark(hit.set, self.words, &mut self.scratch);
            let depth = u32::try_from(low.group * size + hit.end).unwrap_or(u32::MAX);
            let mut rest = 0;
            for (i, (held, left)) in self.scratch.iter().zip(&mut left).enumerate() {
                let mut ends = held & *left;
                *left &= !ends;
                rest |= *left;
                let (tier, word) = (i / self.words, i % self.words);
                while ends != 0 {
                    let slot = 64 * word + ends.trailing_zeros() as usize;
                    ends &= ends - 1;
                    if slot < self.slots
                        && let Some(d) = self.depths.get_mut(tier * self.slots + slot)
                    {
                        *d = depth;
                    }
                }
            }
            if rest == 0 {
                break;
            }
        }
    }
}

/// What stays the same during a lookup.
struct Lookup<'a, F> {
    view: &'a View,
    prompt: &'a [u64],
    groups: usize,
    size: usize,
    fetch: F,
}

impl<'a, F: FnMut(u32) -> Option<Vec<u8>>> Lookup<'a, F> {
    fn group(&self, group: usize) -> &'a [u64] {
        let start = group * self.size;
        let end = (start + self.size).min(self.prompt.len());
        self.prompt.get(start..end).unwrap_or(&[])
    }

    /// The page of a key. A page made at a higher level sends the reader on to the right one.
    fn page(&mut self, key: u64, fetched: &mut u32) -> Option<Vec<u8>> {
        let mut level = self.view.level;
        loop {
            let id = page_id(key, level);
            *fetched += 1;
            let bytes = (self.fetch)(id)?;
            let own = Page::new(&bytes, self.view.epoch)?.level();
            if own <= level || page_id(key, own) == id {
                return Some(bytes);
            }
            level = own;
        }
    }
}
