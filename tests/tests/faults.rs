//! Parts that die, stall or are replaced while requests run.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use kv_core::event::StorageTier;
use kv_core::hash::{Seed, chain};
use kv_core::rng::Rng;
use kv_tests::client::{Client, json_request, uri};
use kv_tests::events::{Encoding, Publisher, stored};
use kv_tests::place;
use kv_tests::process::Process;
use kv_tests::rude::{Manner, Rude};
use kv_tests::stack::{Setup, Stack};
use kv_tests::wait;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

/// Requests at a time.
const CLIENTS: usize = 8;
/// How long the index may differ from the engines: some times what it takes on a machine of its own.
const RECOVERY: Duration = Duration::from_secs(20);

/// Engines as processes of their own.
struct Fleet {
    engines: Vec<Process>,
    ports: Vec<u16>,
}

impl Fleet {
    fn new(count: usize) -> Self {
        Self {
            engines: Vec::new(),
            ports: (0..count).map(|_| place::free_port()).collect(),
        }
    }

    fn spawn(&self, stack: &Stack, at: usize) -> Process {
        let mut command = Command::new(place::kv_sim());
        command.args([
            "engine",
            "--encoding",
            "json",
            "--prefill-us-per-token",
            "5",
        ]);
        command.args(["--step-ms", "1", "--nats", &stack.nats.url()]);
        command.args(["--worker-id", &(at + 1).to_string()]);
        command.args(["--port", &self.ports[at].to_string()]);
        Process::start(&mut command, &stack.dir().join(format!("engine-{at}.log")))
    }

    async fn is_there(&self, at: usize) {
        let client = Client::default();
        let there = async || client.get(self.ports[at], "/sim/blocks").await;
        wait::until("an engine", there).await;
    }

    /// Starts everything.
    async fn start(count: usize) -> (Stack, Self) {
        let mut fleet = Self::new(count);
        let worker = |(at, port): (usize, &u16)| json!({"id": at + 1, "endpoint": format!("127.0.0.1:{port}")});
        let workers: Vec<Value> = fleet.ports.iter().enumerate().map(worker).collect();
        let setup = Setup {
            threads: 2,
            workers: Vec::new(),
            more: json!({"workers": workers}),
        };
        let stack = Stack::start(&setup).await;
        for at in 0..count {
            fleet.engines.push(fleet.spawn(&stack, at));
            fleet.is_there(at).await;
        }
        (stack, fleet)
    }

    /// Kills an engine and starts it anew, with an empty cache.
    async fn restart(&mut self, stack: &Stack, at: usize) {
        self.engines[at].kill();
        self.engines[at] = self.spawn(stack, at);
        self.is_there(at).await;
    }

    /// Waits until the index has of each engine just the blocks that the engine itself has.
    async fn indexed(&self, stack: &Stack) {
        let is_equal = async || {
            let mut held = BTreeMap::new();
            for (at, port) in self.ports.iter().enumerate() {
                let answer = stack.client.get(*port, "/sim/blocks").await?;
                held.insert(at as u64 + 1, sequences(&answer)?);
            }
            let known = dumped(stack).await?;
            let is_equal = held.iter().all(|(worker, held)| {
                let known = known.get(worker);
                known.map_or(held.is_empty(), |known| known == held)
            });
            if is_equal && held.values().any(|held| !held.is_empty()) {
                Ok(())
            } else {
                let count = |of: &BTreeMap<u64, BTreeSet<u64>>| -> Vec<usize> {
                    of.values().map(BTreeSet::len).collect()
                };
                let (held, known) = (count(&held), count(&known));
                Err(format!("engines hold {held:?}, the index has {known:?}"))
            }
        };
        let equal = wait::until("the engines' blocks in the index", is_equal);
        let in_time = tokio::time::timeout(RECOVERY, equal).await;
        assert!(in_time.is_ok(), "the index is not what engines hold");
    }
}

/// Sequence hashes of the blocks that an engine says it has.
fn sequences(answer: &Value) -> Result<BTreeSet<u64>, String> {
    let blocks = answer["blocks"].as_array().ok_or("no blocks")?;
    let mut named = BTreeMap::new();
    for block in blocks {
        let name = block["engine_hash"].as_u64().ok_or("no name")?;
        let tokens = block["tokens_hash"].as_u64().ok_or("no hash")?;
        named.insert(name, (tokens, block["parent"].as_u64()));
    }
    let mut sequences = BTreeSet::new();
    for (tokens, parent) in named.values() {
        let (mut chained, mut above) = (vec![*tokens], *parent);
        while let Some(name) = above {
            let (tokens, parent) = named.get(&name).ok_or("a block without its parent")?;
            chained.push(*tokens);
            above = *parent;
        }
        let sequence = chained.into_iter().rev().reduce(chain);
        sequences.extend(sequence);
    }
    Ok(sequences)
}

/// Sequence hashes of the blocks that the sidecar has of each worker.
async fn dumped(stack: &Stack) -> Result<BTreeMap<u64, BTreeSet<u64>>, String> {
    let request = http::Request::get(uri(stack.sidecar.admin, "/v1/index/dump"));
    let request = request.body(http_body_util::Full::default());
    let answer = stack.client.send(request.expect("a request")).await?;
    let mut known: BTreeMap<u64, BTreeSet<u64>> = BTreeMap::new();
    for line in answer.body().split(|byte| *byte == b'\n') {
        let Ok(line) = serde_json::from_slice::<Value>(line) else {
            continue;
        };
        let part = &line["blocks"];
        let (Some(worker), Some(blocks)) = (part["worker"].as_u64(), part["blocks"].as_array())
        else {
            continue;
        };
        let sequences = blocks.iter().filter_map(|block| block[0].as_u64());
        known.entry(worker).or_default().extend(sequences);
    }
    Ok(known)
}

/// Requests one after the other by each of some clients, until told to stop.
struct Traffic {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    task: JoinHandle<Vec<(Option<u64>, String)>>,
}

impl Traffic {
    fn start(stack: &Stack) -> Self {
        let (stop, sent) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let (is_over, count) = (Arc::clone(&stop), Arc::clone(&sent));
        let (client, port) = (stack.client.clone(), stack.envoy.port);
        let task = tokio::spawn(async move {
            let one = async |seed: u64| {
                let (mut rng, mut failed) = (Rng::new(seed), Vec::new());
                while !is_over.load(Ordering::Relaxed) {
                    let (first, length) = (rng.below(12) * 10_000, 64 + rng.below(500));
                    let tokens: Vec<usize> = (first..first + length).collect();
                    let body = json!({"model": "sim", "prompt": tokens, "max_tokens": 4});
                    let request = json_request(port, "/v1/completions", &body);
                    let answer = client.send(request.expect("a request")).await;
                    count.fetch_add(1, Ordering::Relaxed);
                    match answer {
                        Ok(answer) if answer.status() == 200 => {}
                        Ok(answer) => {
                            let record = answer.headers().get("x-kv-router-decision");
                            let record = record
                                .and_then(|r| serde_json::from_slice::<Value>(r.as_bytes()).ok());
                            let worker = record.and_then(|record| record["worker"].as_u64());
                            failed.push((worker, format!("{answer:?}")));
                        }
                        Err(error) => failed.push((None, error)),
                    }
                }
                failed
            };
            let mut all: FuturesUnordered<_> = (0..CLIENTS as u64).map(one).collect();
            let mut failed = Vec::new();
            while let Some(more) = all.next().await {
                failed.extend(more);
            }
            failed
        });
        Self { stop, sent, task }
    }

    /// Waits until so many more requests were sent.
    async fn goes_on(&self, requests: u64) {
        let before = self.sent.load(Ordering::Relaxed);
        let sent = async || {
            let now = self.sent.load(Ordering::Relaxed);
            if now >= before + requests {
                Ok(())
            } else {
                Err(now)
            }
        };
        wait::until("traffic", sent).await;
    }

    /// Stops, and returns what failed: the worker chosen, and how.
    async fn stop(self) -> Vec<(Option<u64>, String)> {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.expect("the clients")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sidecar_killed_under_traffic_costs_no_request_and_knows_the_engines_blocks_again() {
    let (mut stack, fleet) = Fleet::start(3).await;
    let traffic = Traffic::start(&stack);
    traffic.goes_on(150).await;
    stack.sidecar.restart();
    traffic.goes_on(150).await;
    stack.sidecar.ready().await;
    assert_eq!(traffic.stop().await, []);
    fleet.indexed(&stack).await;
    stack.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nats_killed_under_traffic_costs_no_request_and_no_block() {
    let (mut stack, fleet) = Fleet::start(3).await;
    let traffic = Traffic::start(&stack);
    traffic.goes_on(150).await;
    stack.nats.kill();
    traffic.goes_on(150).await;
    stack.nats.restart().await;
    traffic.goes_on(150).await;
    assert_eq!(traffic.stop().await, []);
    fleet.indexed(&stack).await;
    stack.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_killed_under_traffic_fails_only_what_it_had_and_comes_back_empty() {
    let (stack, mut fleet) = Fleet::start(3).await;
    let traffic = Traffic::start(&stack);
    traffic.goes_on(150).await;
    fleet.engines[1].kill();
    traffic.goes_on(300).await;
    // What it had received when it died has failed, and nothing since.
    let left_out = async || {
        let workers = stack.sidecar.workers().await?;
        let owner = &workers["pools"][0]["owners"][1];
        if owner["accepting"] == false {
            Ok(())
        } else {
            Err(workers.to_string())
        }
    };
    wait::until("the engine to be left out", left_out).await;
    fleet.restart(&stack, 1).await;
    let back = async || {
        let workers = stack.sidecar.workers().await?;
        let owner = &workers["pools"][0]["owners"][1];
        if owner["accepting"] == true {
            Ok(())
        } else {
            Err(workers.to_string())
        }
    };
    wait::until("the engine to take requests", back).await;
    traffic.goes_on(300).await;
    let failed = traffic.stop().await;
    assert!(failed.len() <= CLIENTS, "{failed:?}");
    let others = failed.iter().filter(|(worker, _)| *worker != Some(2));
    assert_eq!(others.count(), 0, "{failed:?}");
    fleet.indexed(&stack).await;
    stack.idle().await;
}

/// A prompt that only one worker holds.
fn prompt(worker: u64) -> Vec<u32> {
    let first = u32::try_from(worker * 1_000).expect("a small number");
    (first..first + 320).collect()
}

/// Three workers of which each holds a prompt.
async fn holders(module: std::path::PathBuf) -> (Stack, Vec<Rude>, Publisher) {
    let mut rude = Vec::new();
    for id in 1..=3 {
        rude.push(Rude::start(id).await);
    }
    let workers = (1..).zip(rude.iter().map(|r| r.address)).collect();
    let stack = Stack::start(&Setup {
        threads: 2,
        workers,
        more: json!({"filter_wasm": module}),
    })
    .await;
    let mut publisher = Publisher::connect(&stack.nats.url()).await;
    for worker in 1..=3 {
        let data = stored(&prompt(worker), 16, Seed::default());
        publisher
            .publish(worker, StorageTier::Device, data, Encoding::Json)
            .await;
    }
    stack.sidecar.settled(3).await;
    (stack, rude, publisher)
}

/// Sends a prompt and returns the answer's status and decision record.
async fn decide(stack: &Stack, tokens: &[u32]) -> (u16, Value) {
    let body = json!({"model": "sim", "prompt": tokens, "stream": true});
    let request = json_request(stack.envoy.port, "/v1/completions", &body);
    let answer = stack.client.send(request.expect("a request")).await;
    let answer = answer.expect("an answer");
    let record = answer.headers().get("x-kv-router-decision");
    let record = record.and_then(|r| serde_json::from_slice(r.as_bytes()).ok());
    (answer.status().as_u16(), record.unwrap_or(Value::Null))
}

/// Asserts that every prompt is decided by what its worker holds.
async fn reads_right(stack: &Stack) {
    for worker in 1..=3_u64 {
        let (status, record) = decide(stack, &prompt(worker)).await;
        assert_eq!(status, 200);
        assert_eq!(record["worker"], worker, "{record}");
        assert_eq!(record["candidates"][0]["overlap"][0], 20, "{record}");
    }
}

async fn order(stack: &Stack, chaos: &str) {
    let request = http::Request::get(uri(stack.envoy.port, "/v1/models"));
    let request = request.header("x-kv-chaos", chaos);
    let request = request.body(http_body_util::Full::default());
    let answer = stack.client.send(request.expect("a request")).await;
    assert_eq!(answer.expect("an answer").status(), 200);
}

/// How often a line of Envoy's log has this text.
fn logged(stack: &Stack, text: &str) -> usize {
    stack.envoy.process.output().matches(text).count()
}

/// The bridge stops in this way; requests are decided right all the time, and another VM leads.
async fn another_takes_over(stack: &Stack, publisher: &mut Publisher, chaos: &str) {
    let leads = "bridge leads in term";
    // The main thread's, which has no requests: a worker's would let its requests pass by.
    let main = format!("[{}]", stack.envoy.process.id());
    let is_led = async || {
        reads_right(stack).await;
        let log = stack.envoy.process.output();
        let led = log.lines().rfind(|line| line.contains(leads));
        let is_main = led.is_some_and(|line| line.contains(&main));
        if is_main { Ok(()) } else { Err(log) }
    };
    wait::until("the main thread's bridge", is_led).await;
    let before = logged(stack, leads);
    order(stack, chaos).await;
    let taken = async || {
        reads_right(stack).await;
        let log = stack.envoy.process.output();
        let stopped = log.contains("chaos: the bridge stops");
        if stopped && logged(stack, leads) > before {
            Ok(())
        } else {
            Err(log)
        }
    };
    wait::until("another bridge", taken).await;
    reads_right(stack).await;
    // What comes after gets there.
    publisher
        .publish(
            2,
            StorageTier::Device,
            stored(&prompt(9), 16, Seed::default()),
            Encoding::Json,
        )
        .await;
    let seen = async || {
        let (_, record) = decide(stack, &prompt(9)).await;
        let is_seen = record["worker"] == 2 && record["candidates"][0]["overlap"][0] == 20;
        if is_seen { Ok(()) } else { Err(record) }
    };
    wait::until("an event after the takeover", seen).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_vm_takes_over_from_a_trapped_bridge_and_nothing_wrong_is_read() {
    let (stack, _rude, mut publisher) = holders(place::chaos_filter()).await;
    another_takes_over(&stack, &mut publisher, "bridge-trap").await;
    stack.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_vm_takes_over_from_a_blocked_bridge_before_it_goes_on() {
    let (stack, _rude, mut publisher) = holders(place::chaos_filter()).await;
    another_takes_over(&stack, &mut publisher, "bridge-block").await;
    let back = async || {
        let log = stack.envoy.process.output();
        if log.contains("chaos: the bridge goes on") {
            Ok(log)
        } else {
            Err(log)
        }
    };
    let log = wait::until("the blocked bridge", back).await;
    let at = |text: &str| log.rfind(text).expect("a line");
    let stops = at("chaos: the bridge stops");
    let leads = log[stops..]
        .find("bridge leads in term")
        .map(|after| stops + after);
    assert!(leads < Some(at("chaos: the bridge goes on")), "{log}");
    reads_right(&stack).await;
    stack.idle().await;
}

/// Starts requests that their workers hold back.
async fn held(stack: &Stack, rude: &[Rude], count: u64) -> Vec<JoinHandle<u16>> {
    let read = || rude.iter().map(Rude::read).sum::<u64>();
    let before = read();
    for rude in rude {
        rude.manner.send_replace(Manner::Hang);
    }
    let send = |i: u64| {
        let body = json!({"model": "sim", "prompt": prompt(20 + i), "stream": true});
        let request = json_request(stack.envoy.port, "/v1/completions", &body);
        let (client, request) = (stack.client.clone(), request.expect("a request"));
        tokio::spawn(async move {
            let answer = client.send(request).await;
            answer.map_or(0, |answer| answer.status().as_u16())
        })
    };
    let running = (0..count).map(send).collect();
    let arrived = async || {
        let now = read() - before;
        if now == count { Ok(()) } else { Err(now) }
    };
    wait::until("the requests at their workers", arrived).await;
    running
}

#[tokio::test(flavor = "multi_thread")]
async fn a_module_is_swapped_under_running_requests_and_no_vm_is_missed() {
    let (stack, rude, _publisher) = holders(place::filter()).await;
    reads_right(&stack).await;
    let running = held(&stack, &rude, 12).await;
    let file = stack.dir().join("state/envoy/ecds.yaml");
    let before = std::fs::read_to_string(&file).expect("the filter's file");
    let (from, to) = (place::filter(), place::chaos_filter());
    let after = before.replace(&from.display().to_string(), &to.display().to_string());
    assert_ne!(before, after);
    let draft = file.with_extension("draft");
    std::fs::write(&draft, after).expect("a writable directory");
    std::fs::rename(&draft, &file).expect("a writable directory");
    // The first one knows nothing of this.
    let swapped = async || {
        order(&stack, "call").await;
        let log = stack.envoy.process.output();
        if log.contains("chaos: the bridge was called") {
            Ok(())
        } else {
            Err(log)
        }
    };
    wait::until("the other module", swapped).await;
    for rude in &rude {
        rude.manner.send_replace(Manner::Serve);
    }
    for request in running {
        assert_eq!(request.await.expect("a task"), 200);
    }
    reads_right(&stack).await;
    stack.idle().await;
    let left = async || {
        let raw = stack
            .client
            .get(stack.sidecar.admin, "/v1/workers?raw")
            .await?;
        // Two threads and the main one.
        let vms = raw["raw"]["proxies"][0]["vms"].as_u64();
        if vms == Some(3) {
            Ok(())
        } else {
            Err(raw["raw"]["proxies"].to_string())
        }
    };
    wait::until("the VMs of the first module to end", left).await;
    let log = stack.sidecar.process.output();
    assert!(!log.contains("trapped"), "no VM was taken for trapped");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_filter_of_the_protocol_before_is_served() {
    let Some(module) = place::older_filter() else {
        eprintln!("not tested: `make filter-older` needs the history");
        return;
    };
    let (stack, rude, _publisher) = holders(module).await;
    let index = stack.sidecar.index().await.expect("an answer");
    assert_eq!(index["subscribers"][0]["protocol"], 2, "{index}");
    reads_right(&stack).await;
    let running = held(&stack, &rude, 6).await;
    let booked = async || {
        let workers = stack.sidecar.workers().await?;
        let owners = workers["pools"][0]["owners"].as_array().cloned();
        let owners = owners.unwrap_or_default();
        let waiting: u64 = owners
            .iter()
            .filter_map(|o| o["load"]["waiting"].as_u64())
            .sum();
        if waiting == 6 {
            Ok(())
        } else {
            Err(workers.to_string())
        }
    };
    wait::until("its bookings", booked).await;
    for rude in &rude {
        rude.manner.send_replace(Manner::Serve);
    }
    for request in running {
        assert_eq!(request.await.expect("a task"), 200);
    }
    reads_right(&stack).await;
    assert_eq!(stack.envoy.total("kv_router_faults_total").await, 0);
    stack.idle().await;
}
