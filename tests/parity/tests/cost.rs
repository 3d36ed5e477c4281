//! The cost of an owner and the choice among owners are those of Dynamo's default policy.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex};

use dynamo_custom_policy_builtin::DefaultWorkerSelector;
use dynamo_kv_router::protocols::{RoutingConstraints, WorkerConfigLike, WorkerWithDpRank};
use dynamo_kv_router::scheduling::{OverlapSignals, ScheduleMode, SchedulingRequest};
use dynamo_kv_router::{
    KvRouterConfig, SharedCacheHits, WorkerLoadProjection, WorkerSelectionInput, WorkerSelector,
};
use kv_core::constraint::preference;
use kv_core::cost::Demand;
use kv_core::decide::{self, Candidate, Request, Scored};
use kv_core::delay::Pace;
use kv_core::load::Load;
use kv_core::overlap::Overlap;
use kv_core::pick::pick;
use kv_core::policy::Policy;
use kv_core::rng::Rng;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// Takes the cost from what the selector says about its choice.
#[derive(Clone, Default)]
struct Logit(Arc<Mutex<Option<f64>>>);

impl Visit for Logit {
    fn record_f64(&mut self, field: &Field, value: f64) {
        if field.name() == "logit" {
            *self.0.lock().unwrap() = Some(value);
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
}

impl Subscriber for Logit {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        event.record(&mut self.clone());
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// Taints that workers have and requests prefer, some of them.
const TAINTS: [&str; 3] = ["fast", "spot", "near"];

/// A worker of one rank.
struct Worker {
    taints: HashSet<String>,
}

impl WorkerConfigLike for Worker {
    fn data_parallel_start_rank(&self) -> u32 {
        0
    }

    fn data_parallel_size(&self) -> u32 {
        1
    }

    fn max_num_batched_tokens(&self) -> Option<u64> {
        None
    }

    fn total_kv_blocks(&self) -> Option<u64> {
        None
    }

    fn taints(&self) -> &HashSet<String> {
        &self.taints
    }
}

/// A random state: owners by worker id.
struct State {
    demand: Demand,
    policy: Policy,
    /// Leading blocks of the prompt that a store of all workers has.
    store: u32,
    /// Weights of taints that the request prefers.
    preferred: Vec<(String, f32)>,
    owners: BTreeMap<u64, Holder>,
}

/// What an owner has to do with the request.
#[derive(Default)]
struct Holder {
    held: Overlap,
    load: Load,
    /// Blocks of the prompt that are in use there.
    shared: u32,
    taints: Vec<String>,
}

fn state(rng: &mut Rng) -> State {
    let block_size = [1, 16, 32, 100][rng.below(4)];
    let tokens = u32::try_from(1 + rng.below(40 * block_size as usize)).unwrap();
    let demand = Demand { tokens, block_size };
    let blocks = demand.blocks() as usize;
    let below = |rng: &mut Rng, n: usize| u32::try_from(rng.below(n)).unwrap();
    let mut weight = |usual: f64| [usual, usual, 0.0, 4.0 * rng.unit()][rng.below(4)];
    let policy = Policy {
        prefill_load_scale: weight(1.0),
        // Without it Dynamo doesn't look at caches at all, slower tiers included.
        overlap_score_credit: weight(1.0).max(0.01),
        host_cache_hit_weight: weight(0.75),
        disk_cache_hit_weight: weight(0.25),
        decode_active_request_weight: weight(0.0),
        shared_cache_multiplier: weight(0.5),
        overlap_score_credit_decay: weight(0.0),
        ..Policy::default()
    };
    let preferred = TAINTS.iter().map(|taint| {
        let weight = [0.0, 2.0 * rng.unit() - 1.0][rng.below(2)];
        (String::from(*taint), weight as f32)
    });
    let preferred = preferred.filter(|(_, weight)| *weight != 0.0).collect();
    let store = [0, below(rng, blocks + 1)][rng.below(2)];
    let owners = (0..2 + rng.below(6) as u64).map(|id| {
        let mut depth = [0; 4].map(|_: u32| below(rng, blocks + 1));
        depth.sort_unstable();
        if store > 0 {
            // Of blocks in a store and on slower tiers, the two take different account.
            depth = [depth[0]; 4];
        }
        let held = Overlap {
            depth,
            shared_cache: store.saturating_sub(depth[0]),
        };
        let shared = below(rng, blocks + 1);
        let load = Load {
            prefill_tokens: [0, below(rng, 50_000)][rng.below(2)],
            waiting: below(rng, 5) as u16,
            decoding: below(rng, 50) as u16,
            blocks: shared + [0, below(rng, 3_000)][rng.below(2)],
        };
        let taints = TAINTS.iter().filter(|_| rng.below(2) == 0);
        let taints = taints.map(|taint| String::from(*taint)).collect();
        let holder = Holder {
            held,
            load,
            shared,
            taints,
        };
        (id, holder)
    });
    let owners = owners.collect();
    State {
        demand,
        policy,
        store,
        preferred,
        owners,
    }
}

impl State {
    fn config(&self) -> KvRouterConfig {
        KvRouterConfig {
            overlap_score_credit: self.policy.overlap_score_credit,
            prefill_load_scale: self.policy.prefill_load_scale,
            decode_active_request_weight: self.policy.decode_active_request_weight,
            host_cache_hit_weight: self.policy.host_cache_hit_weight,
            disk_cache_hit_weight: self.policy.disk_cache_hit_weight,
            shared_cache_multiplier: Some(self.policy.shared_cache_multiplier),
            overlap_score_credit_decay: self.policy.overlap_score_credit_decay,
            ..KvRouterConfig::default()
        }
    }

    /// The request as Dynamo's scheduler would see it, for some of the owners.
    fn request(&self, allowed: HashSet<u64>) -> SchedulingRequest {
        let mut overlap = OverlapSignals::default();
        let mut worker_loads = Default::default();
        let loads: &mut rustc_hash::FxHashMap<_, _> = &mut worker_loads;
        for (id, holder) in &self.owners {
            let Holder {
                held, load, shared, ..
            } = holder;
            let worker = WorkerWithDpRank::new(*id, 0);
            let [device, host, disk, external] = held.by_tier().map(|n| n as usize);
            let tiers = &mut overlap.tier_overlap_blocks;
            tiers.device.insert(worker, device);
            tiers.host_pinned.insert(worker, host);
            tiers.disk.insert(worker, disk + external);
            let effective = held.effective(&self.policy);
            overlap.effective_overlap_blocks.insert(worker, effective);
            let cached = effective * f64::from(self.demand.block_size);
            let cached = cached.round() as usize;
            overlap.effective_cached_tokens.insert(worker, cached);
            let projection = WorkerLoadProjection {
                active_prefill_tokens: load.prefill_tokens as usize,
                active_decode_blocks: load.blocks as usize,
                active_requests: load.requests() as usize,
                additional_active_blocks: (self.demand.blocks() - shared) as usize,
            };
            loads.insert(worker, projection);
        }
        SchedulingRequest {
            mode: ScheduleMode::QueryOnly { request_id: None },
            token_seq: None,
            isl_tokens: self.demand.tokens as usize,
            lora_name: None,
            expected_output_tokens: None,
            affinity_target: None,
            pinned_worker: None,
            allowed_worker_ids: Some(allowed),
            routing_constraints: RoutingConstraints {
                preferred_taints: self.preferred.iter().cloned().collect(),
                ..RoutingConstraints::default()
            },
            router_config_override: None,
            track_prefill_tokens: true,
            priority_jump: 0.0,
            strict_priority: 0,
            policy_class: None,
            session_context: None,
            overlap,
            kv_transfer_candidates: None,
            retain_kv_transfer_chain: false,
            shared_cache_hits: (self.store > 0)
                .then(|| SharedCacheHits::from_ranges(std::iter::once(0..self.store).collect())),
            worker_loads,
            resp_tx: None,
        }
    }

    /// The worker that Dynamo chooses among some, and its cost.
    fn theirs(&self, allowed: HashSet<u64>, logit: &Logit) -> (u64, f64) {
        let worker = |holder: &Holder| Worker {
            taints: holder.taints.iter().cloned().collect(),
        };
        let owners = self.owners.iter();
        let workers: HashMap<u64, Worker> = owners.map(|(id, h)| (*id, worker(h))).collect();
        let selector = DefaultWorkerSelector::new(Some(self.config()), "aggregated");
        let request = self.request(allowed);
        let eligibility = request.eligibility();
        let size = self.demand.block_size;
        let input = WorkerSelectionInput::configured(&workers, &request, eligibility, size);
        let chosen = selector.select_worker(input).unwrap().worker.worker_id;
        (chosen, logit.0.lock().unwrap().take().unwrap())
    }

    /// The costs of these owners, chosen among.
    fn ours(&self, among: &[u64]) -> Vec<f64> {
        let candidate = |id: &u64| {
            let holder = &self.owners[id];
            let taints = &holder.taints;
            let weights = self.preferred.iter().filter(|(t, _)| taints.contains(t));
            Candidate {
                owner: *id as usize,
                overlap: holder.held,
                load: holder.load,
                shared_blocks: holder.shared,
                pace: Pace::default(),
                factor: preference(weights.map(|(_, weight)| f64::from(*weight)).sum()),
            }
        };
        let candidates: Vec<Candidate> = among.iter().map(candidate).collect();
        let request = Request {
            demand: self.demand,
            trust: 1.0,
            turn: 0,
            typical_ms: 0.0,
            bound: None,
        };
        let scored = decide::score(&candidates, &request, &self.policy);
        assert_eq!(scored.len(), among.len());
        scored.iter().map(Scored::total).collect()
    }
}

#[test]
fn costs_and_choices_are_equal() {
    let mut rng = Rng::new(20);
    let logit = Logit::default();
    let _guard = tracing::subscriber::set_default(logit.clone());
    let (mut costs_compared, mut tied) = (0, 0);
    for case in 0..100_000 {
        let state = state(&mut rng);
        let all: Vec<u64> = state.owners.keys().copied().collect();
        let ours = state.ours(&all);
        for id in &all {
            let (_, theirs) = state.theirs(HashSet::from([*id]), &logit);
            let [cost] = state.ours(&[*id])[..] else {
                panic!("one owner has one cost");
            };
            let tolerance = 1e-9 * theirs.abs().max(1.0);
            assert!(
                (cost - theirs).abs() <= tolerance,
                "case {case}: {cost} {theirs}"
            );
            costs_compared += 1;
        }
        let (theirs, least) = state.theirs(all.iter().copied().collect(), &logit);
        let mine = pick(&ours, 0.0, &mut rng).unwrap() as u64;
        let near = |id: u64| (ours[id as usize] - least).abs() <= 1e-9 * least.abs().max(1.0);
        assert!(
            near(mine) && near(theirs),
            "case {case}: {mine} {theirs} {ours:?}"
        );
        tied += usize::from(mine != theirs);
    }
    assert!(costs_compared >= 200_000);
    println!("{costs_compared} costs, {tied} choices differ by an exact tie");
}

/// Dynamo credits what a shared store has beyond a worker's device blocks, also what the worker has
/// on its host: such a block counts for 1.25 at the usual weights, more than one on the device. Ours
/// counts each block once, on the best tier that has it.
#[test]
fn a_block_on_the_host_and_in_a_store_counts_once() {
    let logit = Logit::default();
    let _guard = tracing::subscriber::set_default(logit.clone());
    let held = Overlap {
        depth: [2, 6, 6, 6],
        shared_cache: 2,
    };
    let state = State {
        demand: Demand {
            tokens: 160,
            block_size: 16,
        },
        policy: Policy {
            shared_cache_multiplier: 0.5,
            ..Policy::default()
        },
        store: 8,
        preferred: Vec::new(),
        owners: BTreeMap::from([(
            0,
            Holder {
                held,
                ..Holder::default()
            },
        )]),
    };
    let (_, theirs) = state.theirs(HashSet::from([0]), &logit);
    let (once, twice) = (2.0 + 4.0 * 0.75 + 2.0 * 0.5, 2.0 + 4.0 * 0.75 + 6.0 * 0.5);
    assert!((state.ours(&[0])[0] - (20.0 - once)).abs() < 1e-9);
    assert!((theirs - (20.0 - twice)).abs() < 1e-9);
}
