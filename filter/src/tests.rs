//! Whole VMs against the fake host.

mod answers;
mod board;
mod bridge;
mod delay;
mod direct;
mod failures;
mod hints;
mod load;
mod noise;
mod pools;
mod reports;
mod requests;
mod sessions;
mod staleness;
mod text;
mod waiting;

use kv_core::event::{EventData, Stored, StoredBlock};
use kv_core::hash::{Hashing, Seed, sequence_hashes};
use kv_core::head::Head;
use kv_core::id::{OwnerId, Role, Slot, Tier};
use kv_core::index::{Index, IndexConfig};
use kv_core::key;
use kv_core::ledger::Lanes;
use kv_core::load::Load;
use kv_core::policy::{Mode, Policy};
use kv_core::table::{Owner, Pool, Settings, Table, Traits};
use kv_core::wire::QUEUE;

use crate::fake::Fake;
use crate::host::{Expect, Headers, Host, Queue};
use crate::vm::{Action, Vm};

const ROOT: u32 = 1;
const EPOCH: u32 = 3;
const BLOCK: u32 = 4;
const BODY_LIMIT: usize = 4096;

/// A VM and its Envoy.
struct Site {
    host: Fake,
    vm: Vm<Fake>,
    next: u32,
}

impl Site {
    /// A VM of a new process.
    fn new() -> Self {
        Self::of(Fake::default())
    }

    /// Another VM of the same process.
    fn beside(&self) -> Self {
        Self::of(self.host.beside())
    }

    fn of(host: Fake) -> Self {
        host.configure(b"{}");
        let mut vm = Vm::new(host.clone());
        vm.on_create(ROOT, 0);
        assert!(vm.on_start());
        assert!(vm.on_configure(ROOT));
        Self {
            host,
            vm,
            next: ROOT + 1,
        }
    }

    /// Lets the sidecar publish a table and what owners hold of prompts.
    fn publish(&self, table: &Table, held: &[(usize, Slot, &[u32])]) {
        let mut index = Index::new(IndexConfig {
            epoch: table.epoch,
            level: 2,
            group: 8,
            max_orphans: 0,
            max_bytes: usize::MAX,
            max_page_bytes: usize::MAX,
        });
        for pool in &table.pools {
            index.add_pool(pool.key);
        }
        for (pool, slot, prompt) in held {
            let blocks = prompt.chunks_exact(BLOCK as usize).enumerate();
            let blocks = blocks.map(|(i, tokens)| StoredBlock {
                block_hash: i as u64,
                tokens_hash: Seed::default().block(tokens),
                mm_extra_info: None,
            });
            let stored = EventData::Stored(Stored {
                blocks: blocks.collect(),
                ..Stored::default()
            });
            index.apply(*pool, *slot, Tier::Device, &stored);
        }
        index.flush();
        for id in index.page_ids() {
            self.put(&key::page(id), &index.page(id));
        }
        self.put(&key::TABLE, &table.encode());
        let head = Head {
            epoch: table.epoch,
            level: index.level(),
            group: 8,
            ready: true,
            table_version: table.version,
            beat: 1,
        };
        self.put(&key::HEAD, &head.encode());
    }

    fn put(&self, key: &[u8], value: &[u8]) {
        assert!(self.host.set_shared(key, value, Expect::Anything));
    }

    /// Creates a request and makes it the current one.
    fn request(&mut self, headers: &[(&str, &[u8])]) -> u32 {
        let context = self.next;
        self.next += 1;
        self.vm.on_create(context, ROOT);
        assert!(self.host.enter(context));
        for (name, value) in headers {
            self.host.client_header(name, value);
        }
        context
    }

    /// A generation request up to its headers.
    fn post(&mut self) -> (u32, Action) {
        let context = self.request(&GENERATE);
        (context, self.vm.on_request_headers(context, false))
    }

    /// A generation request with this body, sent in one part.
    fn complete(&mut self, body: &[u8]) -> u32 {
        let (context, action) = self.post();
        assert_eq!(action, Action::Pause);
        assert_eq!(self.part(context, body, true), Action::Continue);
        context
    }

    fn part(&mut self, context: u32, part: &[u8], end: bool) -> Action {
        assert!(self.host.enter(context));
        let size = self.host.receive(part);
        self.vm.on_request_body(context, size, end)
    }

    fn over(&mut self, context: u32) {
        self.vm.on_done(context);
        self.vm.on_log(context);
        self.vm.on_delete(context);
        self.host.end(context);
    }

    fn tick(&mut self) {
        self.host.advance_ms(50);
        self.vm.on_tick(ROOT);
        self.told();
    }

    /// Envoy tells of arrivals in the queue.
    fn told(&mut self) {
        if self.host.is_told_of(QUEUE) && self.host.queued(QUEUE) > 0 {
            self.vm.on_queue_ready(ROOT, Queue(0));
        }
    }

    /// The endpoint of the chosen worker.
    fn destination(&self) -> Option<String> {
        self.destinations().into_iter().next()
    }

    fn destinations(&self) -> Vec<String> {
        let header = self
            .host
            .text(Headers::Request, crate::request::DESTINATION);
        let header = header.unwrap_or_default();
        let named = header.split(',').filter(|e| !e.is_empty());
        named.map(str::to_owned).collect()
    }

    fn routed(&self, pool: &str, reason: &str) -> u64 {
        let name = format!("kv_router_requests_total_pool=.={pool};.;_reason=.={reason};.;");
        self.host.named(&name)
    }

    fn faults(&self, kind: &str) -> u64 {
        let name = format!("kv_router_faults_total_kind=.={kind};.;");
        self.host.named(&name)
    }

    fn load(&self, worker: u64) -> Load {
        self.lanes(worker).load()
    }

    /// What the lanes of a worker hold.
    fn lanes(&self, worker: u64) -> Lanes {
        let lane = |lane: &str| {
            let name = format!("kv_router_lane_{lane}.default.{worker}.0");
            self.host.named(&name)
        };
        Lanes {
            a: lane("a"),
            b: lane("b"),
        }
    }

    /// Asserts that no lane of the process holds anything.
    fn assert_idle(&self) {
        for (name, value) in self.host.metrics_with("kv_router_lane_") {
            assert_eq!(value, 0, "{name}");
        }
    }
}

const GENERATE: [(&str, &[u8]); 3] = [
    (":method", b"POST"),
    (":path", b"/v1/completions"),
    ("content-type", b"application/json"),
];

fn owner(slot: u16) -> Owner {
    Owner {
        slot: Slot(slot),
        id: OwnerId {
            worker: u64::from(slot) + 10,
            rank: 0,
        },
        role: Role::Aggregated,
        endpoint: endpoint(slot),
        accepting: true,
        traits: Traits::default(),
        metadata: kv_core::table::Metadata::default(),
    }
}

fn endpoint(slot: u16) -> String {
    format!("10.0.{}.{}:8000", slot / 256, slot % 256)
}

fn pool(owners: u16, mode: Mode) -> Pool {
    Pool {
        name: "default".into(),
        key: 0x1234_5678_9abc_def1,
        block_size: BLOCK,
        policy: Policy {
            mode,
            ..Policy::default()
        },
        owners: (0..owners).map(owner).collect(),
        ..Pool::default()
    }
}

fn table(owners: u16, mode: Mode) -> Table {
    Table {
        epoch: EPOCH,
        version: 1,
        settings: Settings {
            body_limit: BODY_LIMIT as u64,
            token_limit: 1000,
            decision_header: true,
        },
        pools: vec![pool(owners, mode)],
    }
}

/// `count` token ids that no other `first` shares.
fn prompt(first: u32, count: u32) -> Vec<u32> {
    (first * 10_000..).take(count as usize).collect()
}

fn body(prompt: &[u32]) -> Vec<u8> {
    format!("{{\"prompt\":{prompt:?},\"max_tokens\":9}}").into_bytes()
}

#[test]
fn the_fixture_publishes_what_a_reader_finds() {
    let site = Site::new();
    let tokens = prompt(1, 40);
    site.publish(&table(2, Mode::Kv), &[(0, Slot(1), &tokens)]);
    let hashes = sequence_hashes(&tokens, Hashing::new(BLOCK as usize, Seed::default()));
    let mut reader = kv_core::reader::Reader::new();
    let head = Head::decode(&site.host.shared(&key::HEAD).unwrap().bytes).unwrap();
    let view = kv_core::reader::View {
        level: head.level,
        group: head.group,
        epoch: EPOCH,
        pool_key: 0x1234_5678_9abc_def1,
        family: kv_core::id::Family::Dynamo,
        slots: 2,
    };
    reader.gallop(&view, &hashes, |id| {
        Some(site.host.shared(&key::page(id))?.bytes)
    });
    assert_eq!(reader.overlap(Slot(1)).depth, [10; 4]);
}
