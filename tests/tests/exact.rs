//! What the filter sees is what the engines hold: for every request of a random history the
//! overlaps in the decision record equal the naive index, and the choice is the cheapest.

use kv_core::event::{EventData, Removed, StorageTier, Stored, StoredBlock};
use kv_core::hash::{Seed, chain};
use kv_core::id::{Slot, Tier};
use kv_core::naive::Naive;
use kv_core::overlap::Overlap;
use kv_core::rng::Rng;
use kv_tests::events::{Encoding, Publisher};
use kv_tests::stack::{Setup, Stack};
use kv_tests::upstream::{self, Upstream};
use serde_json::{Value, json};

const WORKERS: u64 = 6;
const BLOCK: usize = 16;

/// A multi-turn conversation: a system prompt that others share, and turns of its own.
fn conversation(rng: &mut Rng, length: usize) -> Vec<u32> {
    let (system, branch) = (rng.below(3), rng.below(4));
    let token = |i: usize| match i / 200 {
        0 => system * 10_000 + i,
        1 | 2 => system * 10_000 + branch * 1_000_000 + i,
        _ => branch * 1_000_000 + i,
    };
    (0..length)
        .map(|i| u32::try_from(token(i)).expect("a token id"))
        .collect()
}

struct Hashed {
    tokens: Vec<u64>,
    sequence: Vec<u64>,
}

fn hashed(prompt: &[u32]) -> Hashed {
    let tokens: Vec<u64> = prompt
        .chunks_exact(BLOCK)
        .map(|b| Seed::default().block(b))
        .collect();
    let mut sequence: Vec<u64> = Vec::new();
    for block in &tokens {
        sequence.push(sequence.last().map_or(*block, |s| chain(*s, *block)));
    }
    Hashed { tokens, sequence }
}

/// A random change of a random worker's cache.
fn change(rng: &mut Rng) -> (u64, StorageTier, EventData) {
    let worker = 1 + rng.below(WORKERS as usize) as u64;
    let tiers = [
        StorageTier::Device,
        StorageTier::Device,
        StorageTier::HostPinned,
    ];
    let tier = tiers[rng.below(3)];
    let length = BLOCK * (1 + rng.below(90));
    let Hashed { tokens, sequence } = hashed(&conversation(rng, length));
    // Engine hashes differ from worker to worker.
    let names: Vec<u64> = sequence
        .iter()
        .map(|s| s.rotate_left(13) ^ worker)
        .collect();
    let data = match rng.below(12) {
        0 if rng.below(8) == 0 => EventData::Cleared,
        0..5 => {
            let from = rng.below(names.len());
            let to = names.len().min(from + 1 + rng.below(12));
            EventData::Removed(Removed {
                block_hashes: names[from..to].to_vec(),
            })
        }
        _ => {
            let blocks = names.iter().zip(&tokens).map(|(name, tokens)| StoredBlock {
                block_hash: *name,
                tokens_hash: *tokens,
                mm_extra_info: None,
            });
            EventData::Stored(Stored {
                parent_hash: None,
                start_position: None,
                blocks: blocks.collect(),
            })
        }
    };
    (worker, tier, data)
}

async fn decisions_match_the_naive_index(threads: u32) {
    let upstreams = Upstream::start_all(WORKERS).await;
    let workers = upstream::workers(&upstreams);
    let stack = Stack::start(&Setup {
        threads,
        workers,
        more: json!({"policy": "dynamo"}),
    })
    .await;
    let mut publisher = Publisher::connect(&stack.nats.url()).await;
    let mut rng = Rng::new(u64::from(threads));
    let mut naive = Naive::default();
    let mut some_overlap = 0;
    for round in 0..500 {
        for _ in 0..rng.below(4) {
            let (worker, tier, data) = change(&mut rng);
            naive.apply(0, Slot(worker as u16), Tier::from(tier), &data);
            let encoding = if worker % 2 == 0 {
                Encoding::Dynamo
            } else {
                Encoding::Json
            };
            publisher.publish(worker, tier, data, encoding).await;
        }
        stack.sidecar.settled(publisher.published).await;

        let length = 1 + rng.below(1600);
        let prompt = conversation(&mut rng, length);
        let (answer, decision) = stack.complete(&prompt).await.expect("an answer");
        let sequence = hashed(&prompt).sequence;
        let expected = naive.overlaps(0, &[sequence]).remove(0);
        some_overlap += usize::from(!expected.is_empty());
        let seen = decision["candidates"].as_array().expect("candidates");
        assert_eq!(seen.len(), WORKERS as usize, "round {round}: {decision}");
        for candidate in seen {
            let worker = candidate["worker"].as_u64().expect("a worker");
            let held = expected
                .iter()
                .find(|(slot, _)| u64::from(slot.0) == worker);
            let held = held
                .map_or(Overlap::default(), |(_, overlap)| *overlap)
                .by_tier();
            assert_eq!(
                candidate["overlap"],
                json!(held),
                "round {round}: {decision}"
            );
        }
        let costs = seen.iter().filter_map(|c| c["cost"].as_f64());
        let least = costs.fold(f64::INFINITY, f64::min);
        assert_eq!(seen[0]["worker"], decision["worker"], "round {round}");
        assert_eq!(
            seen[0]["cost"],
            Value::from(least),
            "round {round}: {decision}"
        );
        assert_eq!(
            answer["worker"], decision["worker"],
            "round {round}: {answer}"
        );
        assert_eq!(decision["reason"], "kv", "round {round}: {decision}");
    }
    assert!(
        some_overlap > 300,
        "{some_overlap} of 500 prompts were cached somewhere"
    );
    stack.envoy.idle().await;
    stack.envoy.intended().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn decisions_match_the_naive_index_on_one_thread() {
    decisions_match_the_naive_index(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn decisions_match_the_naive_index_on_four_threads() {
    decisions_match_the_naive_index(4).await;
}
