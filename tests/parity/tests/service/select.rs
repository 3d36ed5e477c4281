//! The select service answers as Dynamo's own does: NVIDIA's crate has it as a library, which is
//! asked in process, while ours is asked over HTTP.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use dynamo_custom_policy_builtin::default_registry;
use dynamo_kv_router::services::indexer::backend::Indexer;
use dynamo_kv_router::services::indexer::registry::WorkerRegistry;
use dynamo_kv_router::services::selection::{
    KvEventIngress, KvIndexSource, SelectionError, SelectionService, SelectionServiceBuilder,
};
use dynamo_kv_router::{KvRouterConfig, RoutingPartitionId, WorkerType};
use kv_core::cost::{Cost, Demand};
use kv_core::id::OwnerId;
use kv_core::load::Load;
use kv_core::overlap::Overlap;
use kv_core::policy::Policy;
use kv_core::rng::Rng;
use kv_parity::history::{History, Manners, Prompt, Step};
use kv_parity::oracle::router_event;
use kv_router::select::{Face, router};
use reqwest::{Client, Method};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::sidecar::Sidecar;

const MODEL: &str = "tiny";
const BLOCK_SIZE: u32 = 16;

/// Status and body.
type Answer = (u16, Value);

/// Hands out the index of the one partition, to be fed.
#[derive(Clone, Default)]
struct Feed(Arc<Mutex<Option<Indexer>>>);

impl KvEventIngress for Feed {
    fn open(&self, registry: &WorkerRegistry, key: &RoutingPartitionId, size: u32) -> Indexer {
        let indexer = registry.get_or_create_indexer(key.clone(), size);
        *self.0.lock().unwrap() = Some(indexer.clone());
        indexer
    }
}

/// Dynamo's service.
struct Theirs {
    service: SelectionService,
    feed: Feed,
}

impl Theirs {
    /// Fed by hand.
    async fn new(config: KvRouterConfig) -> Self {
        let feed = Feed::default();
        let source = KvIndexSource::Owned(Arc::new(feed.clone()));
        let builder = Self::builder(config).kv_index(source);
        Self {
            service: builder.build().await.unwrap(),
            feed,
        }
    }

    /// Fed by its workers.
    async fn listening() -> Self {
        let builder = Self::builder(KvRouterConfig::default());
        Self {
            service: builder.build().await.unwrap(),
            feed: Feed::default(),
        }
    }

    fn builder(config: KvRouterConfig) -> SelectionServiceBuilder {
        SelectionServiceBuilder::new(config, WorkerType::Aggregated, default_registry())
            .indexer_threads(1)
    }

    fn indexer(&self) -> Indexer {
        self.feed.0.lock().unwrap().clone().unwrap()
    }

    async fn apply(&self, step: &Step) {
        let indexer = self.indexer();
        match step {
            Step::Event(owner, tier, data) => {
                let event = router_event(*owner, *tier, data);
                indexer.apply_event_routed(event).await.unwrap();
            }
            Step::Leave(owner) => {
                let reset = indexer.reset_worker_dp_rank_and_wait(owner.worker, owner.rank);
                reset.await.unwrap();
            }
        }
    }

    /// What its HTTP interface answers.
    async fn ask(&self, method: &Method, path: &str, body: &Value) -> Answer {
        let service = &self.service;
        let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
        match (method.as_str(), &parts[..]) {
            ("POST", ["select"]) => told(200, service.select(read(body)).await),
            ("POST", ["select_and_reserve"]) => {
                told(200, service.select_and_reserve(read(body)).await)
            }
            ("POST", ["reservations"]) => told(201, service.create_reservation(read(body)).await),
            ("POST", ["reservations", id, "prefill_complete"]) => {
                done(service.prefill_complete(id).await)
            }
            ("POST", ["reservations", id, "output_block"]) => {
                done(service.add_output_block(id, body["decay_fraction"].as_f64()))
            }
            ("DELETE", ["reservations", id]) => done(service.free_reservation(id).await),
            ("GET", ["loads"]) => (200, json!(service.loads(None, None))),
            ("POST", ["potential_loads"]) => told(200, service.potential_loads(read(body)).await),
            ("POST", ["overlap_scores"]) => told(200, service.overlap_scores(read(body)).await),
            ("GET", ["workers"]) => (200, json!(service.list_workers(None, None))),
            ("POST", ["workers"]) => told(201, service.upsert_worker(read(body)).await),
            ("PATCH", ["workers", id]) => {
                let id = id.parse().unwrap();
                told(200, service.patch_worker(id, read(body)).await)
            }
            ("DELETE", ["workers", id]) => {
                told(200, service.delete_worker(id.parse().unwrap()).await)
            }
            ("GET", ["ready"]) => {
                let ready = service.ready();
                (if ready.ready { 200 } else { 503 }, json!(ready))
            }
            _ => panic!("{method} {path}"),
        }
    }
}

fn read<T: DeserializeOwned>(body: &Value) -> T {
    serde_json::from_value(body.clone()).unwrap_or_else(|e| panic!("{e}: {body}"))
}

fn told<T: serde::Serialize>(status: u16, outcome: Result<T, SelectionError>) -> Answer {
    match outcome {
        Ok(answer) => (status, json!(answer)),
        Err(error) => (error.status_code(), json!({"error": error.to_string()})),
    }
}

fn done(outcome: Result<(), SelectionError>) -> Answer {
    told(200, outcome.map(|()| json!({"status": "ok"})))
}

/// Our service on a socket of its own.
struct Ours {
    sidecar: Sidecar,
    base: String,
    client: Client,
}

impl Ours {
    async fn new(yaml: &str, client: &Client) -> Self {
        let sidecar = Sidecar::new(yaml);
        let (control, registry) = (sidecar.control.clone(), sidecar.registry.clone());
        let app = router(Face::new(
            control,
            registry,
            Arc::clone(&sidecar.metrics),
            None,
        ));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self {
            sidecar,
            base,
            client: client.clone(),
        }
    }

    async fn ask(&self, method: &Method, path: &str, body: &Value) -> Answer {
        let url = format!("{}{path}", self.base);
        let request = self.client.request(method.clone(), url);
        let request = request.header("content-type", "application/json");
        let answer = request.body(body.to_string()).send().await.unwrap();
        let status = answer.status().as_u16();
        let text = answer.text().await.unwrap();
        (
            status,
            serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}")),
        )
    }
}

/// The knobs of a history.
fn policy(rng: &mut Rng) -> Policy {
    let mut weight = |usual: f64| [usual, usual, usual, 2.0 * rng.unit()][rng.below(4)];
    Policy {
        prefill_load_scale: weight(1.0),
        overlap_score_credit: weight(1.0).max(0.01),
        host_cache_hit_weight: weight(0.75).min(1.0),
        disk_cache_hit_weight: weight(0.25).min(1.0),
        decode_active_request_weight: weight(0.0),
        ..Policy::default()
    }
}

fn theirs_of(policy: &Policy) -> KvRouterConfig {
    KvRouterConfig {
        overlap_score_credit: policy.overlap_score_credit,
        prefill_load_scale: policy.prefill_load_scale,
        decode_active_request_weight: policy.decode_active_request_weight,
        host_cache_hit_weight: policy.host_cache_hit_weight,
        disk_cache_hit_weight: policy.disk_cache_hit_weight,
        ..KvRouterConfig::default()
    }
}

/// A configuration with these ranks.
fn yaml_of(policy: &Policy, workers: &BTreeMap<u64, u32>) -> String {
    let workers = workers.iter().map(|(id, ranks)| {
        let endpoint = format!("127.0.0.1:{}", 20_000 + id);
        json!({"id": id, "endpoint": endpoint, "data_parallel_size": ranks})
    });
    json!({
        "compat": "dynamo",
        "models": [MODEL],
        "kv_cache_block_size": BLOCK_SIZE,
        "overlap_score_credit": policy.overlap_score_credit,
        "prefill_load_scale": policy.prefill_load_scale,
        "decode_active_request_weight": policy.decode_active_request_weight,
        "host_cache_hit_weight": policy.host_cache_hit_weight,
        "disk_cache_hit_weight": policy.disk_cache_hit_weight,
        "workers": workers.collect::<Vec<_>>(),
    })
    .to_string()
}

/// Sorts what is listed in no order.
fn sorted((status, mut body): Answer) -> Answer {
    let key = |item: &Value| (item["worker_id"].as_u64(), item["dp_rank"].as_u64());
    let is_listed = body["workers"].is_array();
    let lists: Vec<&mut Value> = match &mut body {
        Value::Array(items) if items.iter().any(|item| item["loads"].is_array()) => {
            items.iter_mut().map(|item| &mut item["loads"]).collect()
        }
        Value::Array(_) => vec![&mut body],
        Value::Object(object) if is_listed => object.get_mut("workers").into_iter().collect(),
        _ => Vec::new(),
    };
    for list in lists {
        list.as_array_mut().unwrap().sort_by_key(key);
    }
    (status, body)
}

/// Both services.
struct Both {
    theirs: Theirs,
    ours: Ours,
    policy: Policy,
    compared: usize,
}

impl Both {
    /// Asks both and holds their answers equal.
    async fn equal(&mut self, method: Method, path: &str, body: &Value) -> Answer {
        let them = sorted(self.theirs.ask(&method, path, body).await);
        let us = sorted(self.ours.ask(&method, path, body).await);
        assert_eq!(us, them, "{method} {path} {body}");
        self.compared += 1;
        us
    }

    async fn post(&mut self, path: &str, body: &Value) -> Answer {
        self.equal(Method::POST, path, body).await
    }

    /// What each rank would cost, from answers that both give.
    async fn costs(&mut self, prompt: &Value, prefill: bool) -> BTreeMap<(u64, u64), f64> {
        let (_, loads) = self.equal(Method::GET, "/loads", &json!({})).await;
        self.post("/potential_loads", prompt).await;
        let (_, scores) = self.post("/overlap_scores", prompt).await;
        let demand = Demand {
            tokens: u32::try_from(prompt["isl_tokens"].as_u64().unwrap()).unwrap(),
            block_size: BLOCK_SIZE,
        };
        let mut policy = self.policy;
        policy.tracking.prefill_tokens = prefill;
        let (_, potential) = self.post("/potential_loads", prompt).await;
        let number = |value: &Value| u32::try_from(value.as_u64().unwrap()).unwrap();
        let loads = loads[0]["loads"].as_array().unwrap().iter();
        let scores = scores["workers"].as_array().unwrap().iter();
        let potential = potential.as_array().unwrap().iter();
        let cost = |((load, score), potential): ((&Value, &Value), &Value)| {
            let blocks = number(&load["potential_decode_blocks"]);
            let own = number(&potential["potential_decode_blocks"]) - blocks;
            let held = Overlap::new([
                number(&score["device_blocks"]),
                number(&score["host_pinned_blocks"]),
                number(&score["disk_blocks"]),
                number(&score["disk_blocks"]),
            ]);
            let load_there = Load {
                prefill_tokens: number(&load["potential_prefill_tokens"]),
                waiting: u16::try_from(number(&load["active_requests"])).unwrap(),
                decoding: 0,
                blocks,
            };
            let shared = demand.blocks() - own;
            let cost = Cost::new(demand, &held, &load_there, shared, &policy).total();
            let key = (load["worker_id"].as_u64(), load["dp_rank"].as_u64());
            ((key.0.unwrap(), key.1.unwrap()), cost)
        };
        loads.zip(scores).zip(potential).map(cost).collect()
    }

    /// Both choose equally for a prompt, up to exact ties. Returns Dynamo's choice and whether ours
    /// is another.
    async fn select(&mut self, body: &Value, among: &BTreeSet<u64>) -> (OwnerId, bool) {
        let prefill = body["router_config_override"]["track_prefill_tokens"] != json!(false);
        let costs = self.costs(body, prefill).await;
        let of_both = [
            self.theirs.ask(&Method::POST, "/select", body).await,
            self.ours.ask(&Method::POST, "/select", body).await,
        ];
        let allowed = costs
            .iter()
            .filter(|((worker, _), _)| among.contains(worker));
        let least = allowed.map(|(_, cost)| *cost).fold(f64::INFINITY, f64::min);
        let [theirs, ours] = of_both.each_ref().map(|(status, answer)| {
            assert_eq!(*status, 200, "{answer}");
            let owner = (answer["worker_id"].as_u64(), answer["dp_rank"].as_u64());
            let owner = (owner.0.unwrap(), owner.1.unwrap());
            let near = (costs[&owner] - least).abs() <= 1e-9 * least.abs().max(1.0);
            assert!(near, "{answer} {costs:?}");
            owner
        });
        let owner = OwnerId {
            worker: theirs.0,
            rank: u32::try_from(theirs.1).unwrap(),
        };
        if theirs == ours {
            assert_eq!(of_both[1], of_both[0]);
        }
        (owner, theirs != ours)
    }
}

/// A question about a prompt, by its hashes.
fn question(prompt: &Prompt, rng: &mut Rng) -> Value {
    let hashes: Vec<i64> = prompt.tokens.iter().map(|t| t.cast_signed()).collect();
    let mut before = None;
    let sequence = prompt.tokens.iter().map(|block| {
        let hash = before.map_or(*block, |before| kv_core::hash::chain(before, *block));
        before = Some(hash);
        hash.cast_signed()
    });
    let tail = rng.below(BLOCK_SIZE as usize);
    json!({
        "model_name": MODEL,
        "block_hashes": hashes,
        "sequence_hashes": sequence.collect::<Vec<_>>(),
        "isl_tokens": prompt.tokens.len() * BLOCK_SIZE as usize + tail,
    })
}

fn with(question: &Value, more: Value) -> Value {
    let mut body = question.clone();
    let Value::Object(more) = more else { panic!() };
    body.as_object_mut().unwrap().extend(more);
    body
}

/// A prompt of a client that says how far its answer is; nobody shares it, because Dynamo goes on
/// counting a shared block in part that was once counted in part.
fn unshared(rng: &mut Rng) -> Prompt {
    let tokens = (0..1 + rng.below(9)).map(|_| rng.next_u64() >> 1);
    let tokens: Vec<u64> = tokens.collect();
    Prompt {
        names: tokens.clone(),
        tokens,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn histories_are_answered_alike() {
    let client = Client::new();
    let (mut compared, mut chosen, mut tied, mut reserved) = (0, 0, 0, 0);
    for seed in 0..1_000 {
        let mut rng = Rng::new(seed ^ 0x5E1E);
        let mut history = History::new(seed, Manners::Orderly);
        let mut ranks: BTreeMap<u64, u32> = BTreeMap::new();
        for owner in history.contents.keys() {
            let ranks = ranks.entry(owner.worker).or_default();
            *ranks = (*ranks).max(owner.rank + 1);
        }
        let policy = policy(&mut rng);
        let theirs = Theirs::new(theirs_of(&policy)).await;
        for (worker, ranks) in &ranks {
            let body = json!({
                "worker_id": worker, "model_name": MODEL, "block_size": BLOCK_SIZE,
                "endpoint": format!("http://127.0.0.1:{}", 20_000 + worker),
                "data_parallel_size": ranks,
            });
            let (status, answer) = theirs.ask(&Method::POST, "/workers", &body).await;
            assert_eq!((status, &answer["lifecycle"]), (201, &json!("schedulable")));
        }
        let ours = Ours::new(&yaml_of(&policy, &ranks), &client).await;
        let mut both = Both {
            theirs,
            ours,
            policy,
            compared: 0,
        };
        let workers: BTreeSet<u64> = ranks.keys().copied().collect();
        let mut live: Vec<(String, bool)> = Vec::new();
        for number in 0..24 {
            for _ in 0..rng.below(6) {
                let step = history.step();
                both.theirs.apply(&step).await;
                both.ours.sidecar.apply(&step).await;
            }
            // A dump waits for all that was sent before.
            both.theirs.indexer().dump_events().await.unwrap();
            both.ours.sidecar.settle().await;
            let at = rng.below(live.len().max(1));
            match rng.below(8) {
                0..4 => {
                    let fades = rng.below(3) == 0;
                    let prompt = if fades {
                        unshared(&mut rng)
                    } else {
                        history.prompt()
                    };
                    // Where a slower tier holds what a faster one does after it, ours counts more.
                    let is_alike = history.contents.values().all(|content| {
                        let [device, ..] = content.reachable(&prompt.names);
                        let reached = content.reachable(&prompt.names);
                        reached == content.walked(&prompt.names, device)
                    });
                    if !is_alike {
                        continue;
                    }
                    let id = format!("r{number}");
                    let mut body = question(&prompt, &mut rng);
                    let mut among = workers.clone();
                    if rng.below(4) == 0 {
                        let of = json!({"track_prefill_tokens": rng.below(2) == 0});
                        body = with(&body, json!({"router_config_override": of}));
                    }
                    if rng.below(4) == 0 {
                        let one = rng.below(among.len());
                        among = among.into_iter().skip(one).collect();
                        body = with(&body, json!({"allowed_worker_ids": among}));
                    }
                    let (owner, is_tie) = both.select(&body, &among).await;
                    (chosen, tied) = (chosen + 1, tied + usize::from(is_tie));
                    let pinned = json!({"worker_id": owner.worker, "dp_rank": owner.rank});
                    let pinned = with(&body, json!({"pinned_worker": pinned, "selection_id": id}));
                    let status = match rng.below(4) {
                        0 => both.post("/select_and_reserve", &pinned).await.0,
                        1 => {
                            both.post("/select", &pinned).await;
                            let body = json!({"model_name": MODEL, "selection_id": id});
                            both.post("/reservations", &body).await.0
                        }
                        2 => {
                            let effective = rng.below(40);
                            let mut explicit = with(
                                &body,
                                json!({
                                    "selection_id": id, "worker_id": owner.worker,
                                    "dp_rank": owner.rank,
                                }),
                            );
                            if rng.below(2) == 0 {
                                explicit["effective_prefill_tokens"] = json!(effective);
                            }
                            both.post("/reservations", &explicit).await.0
                        }
                        _ => {
                            both.post("/select", &with(&pinned, json!({"advisory": true})))
                                .await;
                            continue;
                        }
                    };
                    if status < 300 {
                        live.push((id, fades));
                        reserved += 1;
                    }
                }
                4 if !live.is_empty() => {
                    let path = format!("/reservations/{}/prefill_complete", live[at].0);
                    both.post(&path, &json!({})).await;
                }
                5 if !live.is_empty() => {
                    let (id, fades) = &live[at];
                    let path = format!("/reservations/{id}/output_block");
                    let body = if *fades {
                        json!({"decay_fraction": rng.below(17) as f64 / 16.0})
                    } else {
                        json!({})
                    };
                    both.post(&path, &body).await;
                }
                6 if !live.is_empty() => {
                    let (id, _) = live.swap_remove(at);
                    let path = format!("/reservations/{id}");
                    assert_eq!(both.equal(Method::DELETE, &path, &json!({})).await.0, 200);
                    both.equal(Method::DELETE, &path, &json!({})).await;
                }
                _ => {
                    for path in ["prefill_complete", "output_block"] {
                        let path = format!("/reservations/nobody/{path}");
                        assert_eq!(both.post(&path, &json!({})).await.0, 404);
                    }
                }
            }
            both.equal(Method::GET, "/loads", &json!({})).await;
        }
        for (id, _) in live {
            let path = format!("/reservations/{id}");
            both.equal(Method::DELETE, &path, &json!({})).await;
        }
        let (_, loads) = both.equal(Method::GET, "/loads", &json!({})).await;
        for load in loads[0]["loads"].as_array().unwrap() {
            assert_eq!(load["active_requests"], 0, "seed {seed}");
            assert_eq!(load["potential_decode_blocks"], 0, "seed {seed}");
        }
        compared += both.compared;
    }
    println!("{compared} answers, {chosen} choices, {tied} by an exact tie, {reserved} reserved");
    assert!(chosen > 5_000 && reserved > 4_000 && tied < chosen / 2);
}

/// Two workers by their registration at both.
async fn registered(client: &Client) -> Both {
    let theirs = Theirs::listening().await;
    let ours = Ours::new("select: {}\nmodels: [other]\n", client).await;
    Both {
        theirs,
        ours,
        policy: Policy::default(),
        compared: 0,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_come_and_go_alike() {
    let client = Client::new();
    let mut both = registered(&client).await;
    both.equal(Method::GET, "/workers", &json!({})).await;
    let (status, _) = both.equal(Method::GET, "/ready", &json!({})).await;
    assert_eq!(status, 503);
    let worker = |id: u64, more: Value| {
        let body = json!({
            "worker_id": id, "model_name": "m", "endpoint": format!("http://w{id}:8000"),
            "block_size": 16, "kv_events_endpoint": "tcp://127.0.0.1:9",
        });
        with(&body, more)
    };
    for body in [
        json!({"worker_id": 1}),
        json!({"worker_id": 1, "model_name": "m", "endpoint": "", "block_size": 0}),
        worker(1, json!({"data_parallel_size": 2})),
        worker(1, json!({"data_parallel_size": 0})),
        worker(
            1,
            json!({"data_parallel_size": 2, "replay_endpoint": "tcp://127.0.0.1:9"}),
        ),
        worker(
            1,
            json!({"taints": ["spot"], "topology_domains": {"zone": "a"}}),
        ),
        worker(
            1,
            json!({"max_num_batched_tokens": 512, "total_kv_blocks": 100}),
        ),
        worker(
            2,
            json!({"routing_group": "b", "data_parallel_start_rank": 2}),
        ),
        worker(3, json!({"block_size": 32})),
    ] {
        let (status, answer) = both.theirs.ask(&Method::POST, "/workers", &body).await;
        let us = both.ours.ask(&Method::POST, "/workers", &body).await;
        let block_size = |answer: &Value| answer["not_schedulable_reasons"].to_string();
        if block_size(&answer).contains("mismatch") {
            // Ours names what is wrong in the words of its indexer.
            assert!(block_size(&us.1).contains("block_size mismatch"), "{us:?}");
            continue;
        }
        assert_eq!(us, (status, answer), "{body}");
    }
    let (status, ready) = both.theirs.ask(&Method::GET, "/ready", &json!({})).await;
    let us = both.ours.ask(&Method::GET, "/ready", &json!({})).await;
    assert_eq!((us.0, &us.1["ready"]), (status, &ready["ready"]));
    assert_eq!(us.1["schedulable_workers"], ready["schedulable_workers"]);
    for (id, patch) in [
        (1, json!({"endpoint": "http://elsewhere:8000"})),
        (1, json!({"taints": []})),
        (1, json!({"endpoint": null, "total_kv_blocks": 7})),
        (9, json!({"endpoint": "http://nobody:8000"})),
    ] {
        both.equal(Method::PATCH, &format!("/workers/{id}"), &patch)
            .await;
    }
    let tokens: Vec<u32> = (0..40).collect();
    let ask =
        |model: &str, more: Value| with(&json!({"model_name": model, "token_ids": tokens}), more);
    for body in [
        ask("m", json!({"selection_id": "a"})),
        ask("m", json!({"advisory": true})),
        ask("m", json!({"routing_group": "b"})),
        ask("m", json!({"routing_group": "c"})),
        ask("nobody", json!({})),
        ask(
            "m",
            json!({"pinned_worker": {"worker_id": 1, "dp_rank": 7}}),
        ),
        ask(
            "m",
            json!({"pinned_worker": {"worker_id": 8, "dp_rank": 0}}),
        ),
        ask(
            "m",
            json!({"pinned_worker": {"worker_id": 1, "dp_rank": 0}, "allowed_worker_ids": [2]}),
        ),
        ask("m", json!({"allowed_worker_ids": []})),
        ask(
            "m",
            json!({"affinity_target": {"worker_id": 1, "dp_rank": null}}),
        ),
        ask(
            "m",
            json!({"affinity_target": {"worker_id": 5, "dp_rank": 3}}),
        ),
        ask(
            "m",
            json!({"routing_constraints": {"required_taints": ["spot"]}}),
        ),
        ask("m", json!({"lora_name": "adapter", "cache_salt": "tenant"})),
        ask("m", json!({"is_eagle": true})),
        json!({"model_name": "m"}),
        json!({"model_name": "m", "block_hashes": [1]}),
        json!({"model_name": "m", "block_hashes": [1], "sequence_hashes": [1]}),
        json!({"model_name": "m", "block_hashes": [1], "sequence_hashes": [], "isl_tokens": 16}),
        json!({"model_name": "m", "block_hashes": [], "sequence_hashes": [], "isl_tokens": 0}),
        json!({"model_name": "m", "token_ids": []}),
    ] {
        both.post("/select", &body).await;
        both.post("/potential_loads", &body).await;
        both.post("/overlap_scores", &body).await;
    }
    for (path, body) in [
        (
            "/select_and_reserve",
            ask("m", json!({"selection_id": "b"})),
        ),
        (
            "/select_and_reserve",
            ask("m", json!({"selection_id": "b"})),
        ),
        (
            "/reservations",
            json!({"model_name": "m", "selection_id": "a"}),
        ),
        (
            "/reservations",
            json!({"model_name": "m", "selection_id": "a"}),
        ),
        (
            "/reservations",
            json!({"model_name": "m", "selection_id": "zz"}),
        ),
        (
            "/reservations",
            ask("m", json!({"selection_id": "c", "worker_id": 8})),
        ),
        (
            "/reservations",
            ask(
                "m",
                json!({"selection_id": "c", "worker_id": 1, "effective_prefill_tokens": 41}),
            ),
        ),
        (
            "/reservations",
            ask(
                "m",
                json!({"selection_id": "c", "worker_id": 1, "effective_prefill_tokens": 40}),
            ),
        ),
        (
            "/reservations/b/output_block",
            json!({"decay_fraction": 1.5}),
        ),
        (
            "/reservations/b/output_block",
            json!({"decay_fraction": 0.5}),
        ),
        ("/reservations/b/prefill_complete", json!({})),
        ("/reservations/b/prefill_complete", json!({})),
    ] {
        both.post(path, &body).await;
    }
    for path in [
        "/reservations/b",
        "/reservations/b",
        "/workers/2",
        "/workers/2",
        "/workers/3",
    ] {
        both.equal(Method::DELETE, path, &json!({})).await;
    }
    assert!(both.compared > 70);
}

/// Dynamo counts a block in part from the moment that its last user is a request whose answer fades,
/// whoever comes to use it afterwards. Ours counts a block in part while such a request is alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_block_that_another_request_comes_to_use_counts_whole() {
    let client = Client::new();
    let policy = Policy::default();
    let theirs = Theirs::new(theirs_of(&policy)).await;
    let body = json!({
        "worker_id": 7, "model_name": MODEL, "block_size": BLOCK_SIZE,
        "endpoint": "http://127.0.0.1:20007",
    });
    theirs.ask(&Method::POST, "/workers", &body).await;
    let ours = Ours::new(&yaml_of(&policy, &[(7, 1)].into()), &client).await;
    let tokens: Vec<u32> = (0..64).collect();
    let mut seen = Vec::new();
    for id in ["a", "b"] {
        let body = json!({"model_name": MODEL, "token_ids": tokens, "selection_id": id});
        let them = theirs
            .ask(&Method::POST, "/select_and_reserve", &body)
            .await;
        let us = ours.ask(&Method::POST, "/select_and_reserve", &body).await;
        assert_eq!((us.0, them.0), (200, 200));
        let path = "/reservations/a/output_block";
        if id == "a" {
            let half = json!({"decay_fraction": 0.5});
            theirs.ask(&Method::POST, path, &half).await;
            ours.ask(&Method::POST, path, &half).await;
        }
        let blocks = |answer: Answer| answer.1[0]["loads"][0]["potential_decode_blocks"].clone();
        let them = blocks(theirs.ask(&Method::GET, "/loads", &json!({})).await);
        let us = blocks(ours.ask(&Method::GET, "/loads", &json!({})).await);
        seen.push((us, them));
    }
    // Four blocks of the prompt and one of the answer; then the four are shared.
    assert_eq!(seen, [(json!(3), json!(3)), (json!(5), json!(3))]);
}
