//! Blocks that are known by hashes of other families, through real Envoy: for every request of a
//! random history the overlaps by tier in the decision record, and what shared stores add, equal
//! the naive model.

mod mooncake;

use kv_core::event::{EventData, Removed, Stored, StoredBlock};
use kv_core::family::{FamilyHasher, Namespace, Scheme};
use kv_core::hash::{Hashing, Seed, sequence_hashes};
use kv_core::id::{Family, Slot, Tier};
use kv_core::naive::{Foreign, Naive};
use kv_core::rng::Rng;
use kv_tests::client::json_request;
use kv_tests::stack::{Setup, Stack};
use kv_tests::upstream::Upstream;
use mooncake::{MOONCAKE, Mooncake, PAGE, PARTS, WHOLE, digests, object};
use serde_json::{Value, json};

const WORKERS: u64 = 4;
const STORE: u64 = 90;
const BLOCK: usize = 16;
/// Milliseconds to a token of workers of which nothing is known.
const MS_PER_TOKEN: f64 = 0.05;
/// Part of its prefill that a block saves by tier, and in a store.
const SAVES: [f64; 5] = [1.0, 0.75, 0.25, 0.25, 0.5];

/// A family, its block size in tokens, and media with their tiers.
type Used = (Family, u32, &'static [(&'static str, Tier)]);

const FAMILIES: [Used; 4] = [
    (
        Family::FlexKv,
        16,
        &[("CPU", Tier::Host), ("SSD", Tier::Disk)],
    ),
    (Family::VllmSha256Cbor, 32, &[("FS", Tier::Disk)]),
    (Family::HiCache, PAGE, &[("EXTERNAL", Tier::External)]),
    (Family::LmCache, 128, &[("CXL", Tier::Host)]),
];

fn scheme((family, block_size, _): Used) -> Scheme {
    Scheme {
        family,
        block_size,
        hash_seed: "7".into(),
    }
}

fn hashes(used: Used, prompt: &[u32]) -> Vec<u64> {
    let mut hasher = FamilyHasher::new(&scheme(used), Namespace::default()).expect("a hasher");
    hasher.push(prompt);
    hasher.into_hashes()
}

/// A prompt that shares its beginning with others.
fn prompt(rng: &mut Rng) -> Vec<u32> {
    let (system, branch) = (rng.below(2), rng.below(3));
    let length = 1 + rng.below(1600);
    let token = |i: usize| {
        if i / 300 == 0 {
            system * 10_000 + i
        } else {
            system * 10_000 + branch * 1_000_000 + i
        }
    };
    (0..length)
        .map(|i| u32::try_from(token(i)).expect("a token id"))
        .collect()
}

/// Tells of workers' and stores' blocks, and tells the model.
struct Engines<'a> {
    stack: &'a Stack,
    mooncake: Mooncake,
    naive: Naive,
    /// As `naive`, but that it is not told of objects that leave.
    keeps: Naive,
    sequences: [u64; 100],
    events: u64,
}

impl Engines<'_> {
    /// Something happens to objects of some pages of a prompt.
    async fn change_objects(&mut self, rng: &mut Rng) {
        let prompt = prompt(rng);
        let pages: Vec<_> = digests(&prompt)
            .into_iter()
            .zip(prompt.chunks_exact(PAGE as usize))
            .collect();
        if pages.is_empty() {
            return;
        }
        let from = rng.below(pages.len());
        let to = from + 1 + rng.below(pages.len() - from);
        let is_stored = rng.below(3) > 0;
        // Another tenant's are none of ours.
        let mut events = vec![object(false, &pages[from].0, PARTS[0], "another")];
        let slot = Slot(MOONCAKE as u16);
        for (page, tokens) in &pages[from..to] {
            let name = u64::from_str_radix(&page[..16], 16).expect("hexadecimal");
            let only = (rng.below(4) == 0).then(|| rng.below(PARTS.len()));
            let parts = PARTS.iter().enumerate();
            for (at, part) in parts.filter(|(at, _)| only.is_none_or(|only| only == *at)) {
                events.push(object(is_stored, page, part, "default"));
                let there = self.mooncake.pages.entry(name).or_default();
                let before = *there;
                *there = if is_stored {
                    before | 1 << at
                } else {
                    before & !(1 << at)
                };
                let data = match (is_stored, before, *there) {
                    (true, _, WHOLE) => store(Family::HiCache, PAGE, "", &[name], tokens).1,
                    // Of a page of which nothing is known, too.
                    (false, WHOLE | 0, _) => removal(Family::HiCache, "", &[name]).1,
                    _ => continue,
                };
                self.events += 1;
                let family = Family::HiCache;
                let tier = Tier::External;
                self.naive.apply_family(0, family, slot, tier, &data);
                if is_stored {
                    self.keeps.apply_family(0, family, slot, tier, &data);
                }
            }
        }
        self.mooncake.publish(&events).await;
    }

    async fn change(&mut self, rng: &mut Rng) {
        if rng.below(5) == 0 {
            return self.change_objects(rng).await;
        }
        let used = FAMILIES.get(rng.below(FAMILIES.len() + 1)).copied();
        let prompt = prompt(rng);
        let worker = match used {
            Some((family, ..)) if family.is_flat() && rng.below(3) == 0 => STORE,
            _ => 1 + rng.below(WORKERS as usize) as u64,
        };
        let (family, size, medium, tier, names) = match used {
            None => {
                let hashing = Hashing::new(BLOCK, Seed::default());
                let names = sequence_hashes(&prompt, hashing);
                let names = names.iter().map(|name| name.rotate_left(9) ^ worker);
                (
                    Family::Dynamo,
                    BLOCK as u32,
                    "GPU",
                    Tier::Device,
                    names.collect(),
                )
            }
            Some(used) => {
                let (medium, tier) = used.2[rng.below(used.2.len())];
                (used.0, used.1, medium, tier, hashes(used, &prompt))
            }
        };
        if names.is_empty() {
            return;
        }
        let from = rng.below(names.len());
        let to = from + 1 + rng.below(names.len() - from);
        let (event, data) = if rng.below(3) == 0 {
            removal(family, medium, &names[from..to])
        } else {
            let from = if family.is_flat() { from } else { 0 };
            let tokens = &prompt[from * size as usize..to * size as usize];
            store(family, size, medium, &names[from..to], tokens)
        };
        let slot = Slot(u16::try_from(worker).expect("a small id"));
        for naive in [&mut self.naive, &mut self.keeps] {
            naive.apply_family(0, family, slot, tier, &data);
        }
        self.post(worker, event).await;
    }

    async fn post(&mut self, worker: u64, event: Value) {
        let sequence = &mut self.sequences[worker as usize];
        let body = json!({
            "worker_id": worker,
            "incarnation": "first",
            "sequence": *sequence,
            "events": [event],
        });
        *sequence += 1;
        self.events += 1;
        let admin = self.stack.sidecar.admin;
        let request = json_request(admin, "/v1/events", &body).expect("a request");
        let answer = self.stack.client.send(request).await.expect("an answer");
        let text = String::from_utf8_lossy(answer.body());
        assert!(answer.status().is_success(), "{text}");
        let taken: Value = serde_json::from_str(&text).expect("json");
        assert_eq!(
            (&taken["changes"], &taken["rejected"]),
            (&json!(1), &json!(0))
        );
    }
}

fn store(
    family: Family,
    size: u32,
    medium: &str,
    names: &[u64],
    tokens: &[u32],
) -> (Value, EventData) {
    let has_tokens = family == Family::Dynamo;
    let blocks = names.iter().zip(tokens.chunks_exact(size as usize));
    let blocks = blocks.map(|(name, block)| StoredBlock {
        block_hash: *name,
        tokens_hash: if has_tokens {
            Seed::default().block(block)
        } else {
            *name
        },
        mm_extra_info: None,
    });
    let data = EventData::Stored(Stored {
        parent_hash: None,
        start_position: None,
        blocks: blocks.collect(),
    });
    let event = json!({
        "type": "BlockStored",
        "block_hashes": names,
        "parent_block_hash": null,
        "token_ids": if has_tokens { tokens } else { &[] },
        "block_size": size,
        "medium": medium,
    });
    (event, data)
}

fn removal(family: Family, medium: &str, names: &[u64]) -> (Value, EventData) {
    let data = EventData::Removed(Removed {
        block_hashes: names.to_vec(),
    });
    // As FlexKV's accelerated path writes them.
    let signed = || {
        names
            .iter()
            .map(|name| name.cast_signed())
            .collect::<Vec<_>>()
    };
    let hashes = if family == Family::FlexKv {
        json!(signed())
    } else {
        json!(names)
    };
    let event = json!({"type": "BlockRemoved", "block_hashes": hashes, "medium": medium});
    (event, data)
}

#[tokio::test(flavor = "multi_thread")]
async fn overlaps_of_all_families_match_the_naive_model() {
    let mut workers = Vec::new();
    let mut upstreams = Vec::new();
    for id in 1..=WORKERS {
        let upstream = Upstream::start(id).await;
        let events = json!({"http": {"trust_loopback": true}});
        workers.push(json!({"id": id, "endpoint": upstream.address, "events": events}));
        upstreams.push(upstream);
    }
    let events = json!({"http": {"trust_loopback": true}});
    workers.push(json!({"id": STORE, "role": "store", "events": events}));
    let (mut mooncake, address) = Mooncake::start().await;
    let events = json!({"zmq": {"endpoint": address}});
    workers.push(json!({"id": MOONCAKE, "role": "store", "events": events}));
    let families = FAMILIES.map(|(family, block_size, media)| {
        json!({
            "family": family,
            "block_size": block_size,
            "media": media.iter().map(|(name, _)| *name).collect::<Vec<_>>(),
            "hash_seed": "7",
        })
    });
    let stack = Stack::start(&Setup {
        threads: 2,
        workers: Vec::new(),
        more: json!({
            "workers": workers, "families": families, "predicted_delay": {"band_ms": 0},
        }),
    })
    .await;
    let events = mooncake.heard(&stack).await;
    let mut engines = Engines {
        stack: &stack,
        mooncake,
        naive: Naive::default(),
        keeps: Naive::default(),
        sequences: [0; 100],
        events,
    };
    let mut rng = Rng::new(11);
    // Decisions in which some worker has blocks on each tier, and in the stores.
    let mut seen_on = [0; 5];
    // Decisions to which the objects matter, and to which those that left would.
    let (mut by_objects, mut by_gone) = (0, 0);
    for round in 0..300 {
        for _ in 0..rng.below(4) {
            engines.change(&mut rng).await;
        }
        stack.sidecar.settled(engines.events).await;
        let prompt = prompt(&mut rng);
        let (answer, decision) = stack.complete(&prompt).await.expect("an answer");
        let sequence = sequence_hashes(&prompt, Hashing::new(BLOCK, Seed::default()));
        let foreign = FAMILIES.map(|used| Foreign {
            family: used.0,
            blocks: used.1 / BLOCK as u32,
            hashes: hashes(used, &prompt),
        });
        let seen = decision["candidates"].as_array().expect("candidates");
        // Stores take no requests.
        assert_eq!(seen.len(), WORKERS as usize, "round {round}: {decision}");
        let mut most = [0; 5];
        let (mut adds, mut would_add) = (false, false);
        for candidate in seen {
            let worker = candidate["worker"].as_u64().expect("a worker");
            let slot = Slot(u16::try_from(worker).expect("a small id"));
            let stores = [STORE, MOONCAKE].map(|store| Slot(store as u16));
            let holding = |naive: &Naive, stores: &[Slot]| {
                naive.holding(0, slot, stores, &sequence, &foreign)
            };
            let held = holding(&engines.naive, &stores);
            let shared_cache = held.shared_cache;
            adds |= shared_cache > holding(&engines.naive, &stores[..1]).shared_cache;
            would_add |= holding(&engines.keeps, &stores).shared_cache > shared_cache;
            assert_eq!(
                (&candidate["overlap"], &candidate["shared_cache"]),
                (&json!(held.by_tier()), &json!(held.shared_cache)),
                "round {round}: {decision}"
            );
            let blocks = held.by_tier().into_iter().chain([held.shared_cache]);
            let saved = blocks
                .clone()
                .zip(SAVES)
                .map(|(n, part)| f64::from(n) * part);
            let usable = prompt.len().saturating_sub(1) / BLOCK;
            let cached = (saved.sum::<f64>().min(usable as f64) * BLOCK as f64).round();
            let own_ms = (prompt.len() as f64 - cached) * MS_PER_TOKEN;
            let seen_ms = candidate["prefill_ms"].as_f64().expect("a delay");
            assert!((seen_ms - own_ms).abs() < 1e-6, "{own_ms}: {decision}");
            most.iter_mut()
                .zip(blocks)
                .for_each(|(most, n)| *most = n.max(*most));
        }
        by_objects += usize::from(adds);
        by_gone += usize::from(would_add);
        for (seen, most) in seen_on.iter_mut().zip(most) {
            *seen += usize::from(most > 0);
        }
        let costs = seen.iter().filter_map(|c| c["cost"].as_f64());
        let least = costs.fold(f64::INFINITY, f64::min);
        assert_eq!(
            seen[0]["cost"],
            Value::from(least),
            "round {round}: {decision}"
        );
        assert_eq!(answer["worker"], decision["worker"], "round {round}");
    }
    assert!(seen_on.iter().all(|n| *n > 20), "{seen_on:?} of 300");
    assert!(
        by_objects > 20 && by_gone > 20,
        "{by_objects}, {by_gone} of 300"
    );
    stack.envoy.idle().await;
}
