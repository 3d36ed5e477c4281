//! Our index and Dynamo's, fed the same random histories, credit the same overlaps.

use std::collections::BTreeMap;

use kv_core::hash::chain;
use kv_core::id::{OwnerId, Slot, Tier};
use kv_core::index::{Index, IndexConfig};
use kv_parity::content::Depths;
use kv_parity::history::{History, Manners, Prompt, Step};
use kv_parity::oracle::Oracle;

/// Our index of one pool.
struct Ours {
    index: Index,
    slots: Vec<OwnerId>,
}

impl Ours {
    fn new() -> Self {
        let mut index = Index::new(IndexConfig {
            epoch: 1,
            level: 0,
            group: 32,
            max_orphans: 1 << 20,
            max_bytes: usize::MAX,
            max_page_bytes: usize::MAX,
        });
        index.add_pool(1);
        Self {
            index,
            slots: Vec::new(),
        }
    }

    fn slot(&mut self, owner: OwnerId) -> Slot {
        let at = self.slots.iter().position(|o| *o == owner);
        let at = at.unwrap_or_else(|| {
            self.slots.push(owner);
            self.slots.len() - 1
        });
        Slot(u16::try_from(at).unwrap())
    }

    fn apply(&mut self, step: &Step) {
        match step {
            Step::Event(owner, tier, data) => {
                let slot = self.slot(*owner);
                self.index.apply(0, slot, *tier, data);
            }
            Step::Leave(owner) => {
                let slot = self.slot(*owner);
                self.index.remove_owner(0, slot);
            }
        }
    }

    fn depths(&self, prompt: &Prompt) -> BTreeMap<OwnerId, Depths> {
        let mut sequence: Vec<u64> = Vec::new();
        for block in &prompt.tokens {
            let hash = sequence
                .last()
                .map_or(*block, |before| chain(*before, *block));
            sequence.push(hash);
        }
        let found = self.index.overlaps(0, &sequence);
        let named = found
            .into_iter()
            .map(|(slot, overlap)| (self.slots[slot.index()], overlap.depth));
        named.collect()
    }
}

/// How many comparisons were alike, and how many were not for a reason.
#[derive(Debug, Default)]
struct Tally {
    credited: usize,
    forgotten: usize,
    tier_order: usize,
}

/// Runs one history and compares after every few steps.
fn compare(seed: u64, manners: Manners, tally: &mut Tally) {
    let mut history = History::new(seed, manners);
    let (mut ours, mut theirs) = (Ours::new(), Oracle::new());
    for at in 0..48 {
        let step = history.step();
        ours.apply(&step);
        match &step {
            Step::Event(owner, tier, data) => theirs.apply(*owner, *tier, data),
            Step::Leave(owner) => theirs.remove(*owner),
        }
        if at % 4 != 3 {
            continue;
        }
        let prompt = history.prompt();
        let mut by_us = ours.depths(&prompt);
        let mut by_them = theirs.depths(&prompt.tokens);
        for (owner, content) in &history.contents {
            let us = by_us.remove(owner).unwrap_or_default();
            let them = by_them.remove(owner).unwrap_or_default();
            let context = format!("seed {seed}, step {at}, {owner:?}: {us:?} {them:?}");
            assert_eq!(us, content.reachable(&prompt.names), "ours: {context}");
            let [device, ..] = us;
            let [their_device, ..] = them;
            if device != their_device {
                assert!(their_device < device, "over-credited: {context}");
                let lost = prompt.names[their_device as usize];
                assert!(content.is_doubtful(lost), "forgotten: {context}");
                tally.forgotten += 1;
            }
            let walked = content.walked(&prompt.names, their_device);
            assert_eq!(them, walked, "theirs: {context}");
            if device == their_device && us != them {
                // It does not go back to a faster tier: never more than is held.
                assert!(them.iter().zip(us).all(|(t, u)| *t <= u), "{context}");
                tally.tier_order += 1;
            }
            tally.credited += usize::from(us == them && us != [0; Tier::COUNT]);
        }
        assert!(by_us.is_empty() && by_them.is_empty());
    }
}

#[test]
fn orderly_histories_give_equal_device_overlaps_and_explained_tiers() {
    let mut tally = Tally::default();
    for seed in 0..5_000 {
        compare(seed, Manners::Orderly, &mut tally);
    }
    println!("orderly: {tally:?}");
    assert_eq!(tally.forgotten, 0, "{tally:?}");
    assert!(tally.credited > 10 * tally.tier_order, "{tally:?}");
}

#[test]
fn wild_histories_differ_only_where_dynamo_forgets() {
    let mut tally = Tally::default();
    for seed in 5_000..10_000 {
        compare(seed, Manners::Wild, &mut tally);
    }
    println!("wild: {tally:?}");
    assert!(tally.credited > 0 && tally.forgotten > 0, "{tally:?}");
}
