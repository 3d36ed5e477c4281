//! Our sidecar's index and configuration, without its sockets.

use std::collections::BTreeMap;
use std::sync::Arc;

use kv_core::event::{EventData, KvCacheEvent, RouterEvent};
use kv_core::id::{OwnerId, Tier};
use kv_parity::history::Step;
use kv_router::config::Config;
use kv_router::index::{Control, Service};
use kv_router::indexer::{Ask, Registry};
use kv_router::ingest::{Arrival, Decoded, Plane};
use kv_router::metrics::Metrics;
use kv_router::state::Restored;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

/// The index with what keeps its configuration.
pub(crate) struct Sidecar {
    /// What the index is asked by.
    pub(crate) control: mpsc::Sender<Control>,
    /// What workers register by.
    pub(crate) registry: mpsc::Sender<Ask>,
    /// Its metrics.
    pub(crate) metrics: Arc<Metrics>,
    arrivals: mpsc::Sender<Arrival>,
    ids: BTreeMap<OwnerId, u64>,
    _cancel: tokio_util::sync::DropGuard,
}

impl Sidecar {
    /// As a configuration has it.
    pub(crate) fn new(yaml: &str) -> Self {
        let config = Config::parse(yaml, &[]).unwrap();
        let (control, controlled) = mpsc::channel(64);
        let (arrivals, arrived) = mpsc::channel(64);
        let (requests, _) = mpsc::channel(1);
        let (registry, asked) = mpsc::channel(8);
        let metrics = Arc::new(Metrics::default());
        let service = Service::new(&config, Restored::Absent, requests, Arc::clone(&metrics));
        let cancel = CancellationToken::new();
        tokio::spawn(service.run(controlled, arrived, cancel.clone()));
        tokio::spawn(keep(config, asked, control.clone()));
        Self {
            control,
            registry,
            metrics,
            arrivals,
            ids: BTreeMap::new(),
            _cancel: cancel.drop_guard(),
        }
    }

    /// Lets a step happen.
    pub(crate) async fn apply(&mut self, step: &Step) {
        let (owner, tier, data) = match step {
            Step::Event(owner, tier, data) => (*owner, *tier, data.clone()),
            // To our index a rank that left has nothing more.
            Step::Leave(owner) => (*owner, Tier::Device, EventData::Cleared),
        };
        let id = self.ids.entry(owner).or_default();
        *id += 1;
        let event = RouterEvent {
            worker_id: owner.worker,
            storage_tier: tier.into(),
            residency_domain: Some("worker".into()),
            event: KvCacheEvent {
                event_id: *id,
                data,
                dp_rank: owner.rank,
            },
            session_id: None,
        };
        let arrival = Arrival::Events {
            plane: Plane::Dynamo,
            received_ns: 0,
            decoded: Decoded {
                events: vec![event],
                ..Decoded::default()
            },
        };
        self.arrivals.send(arrival).await.unwrap();
    }

    /// Waits until the index has applied as many events as were sent.
    pub(crate) async fn settle(&self) {
        let sent: u64 = self.ids.values().sum();
        loop {
            let (reply, answer) = oneshot::channel();
            self.control.send(Control::Index(reply)).await.unwrap();
            let report = answer.await.unwrap();
            let planes = report.counts.planes.values();
            let applied: u64 = planes.flat_map(|plane| plane.events.values()).sum();
            if applied == sent {
                return;
            }
            tokio::task::yield_now().await;
        }
    }
}

/// Answers as the running sidecar does.
async fn keep(config: Config, mut asked: mpsc::Receiver<Ask>, control: mpsc::Sender<Control>) {
    let mut registry = Registry::default();
    while let Some(ask) = asked.recv().await {
        let (outcome, reply) = match ask {
            Ask::Register(asked, reply) => (registry.register(&config, asked), reply),
            Ask::Unregister(asked, reply) => (registry.unregister(&asked), reply),
            Ask::Workers(reply) => {
                reply.send(registry.list(&config)).unwrap();
                continue;
            }
        };
        let (written, _) = oneshot::channel();
        let config = Arc::new(registry.over(&config));
        control
            .send(Control::Configure { config, written })
            .await
            .unwrap();
        reply.send(outcome).unwrap();
    }
}
