//! What workers need, and how they are found and asked whether they are well, checked.

use std::time::Duration;

use kv_core::id::Role;
use kv_core::table::Metadata;

use super::{Check, UNKNOWN, milliseconds};
use crate::config::error::Problem;
use crate::config::{Dns, HealthCheck, Registration, Source, Worker, file};

impl Check {
    pub(super) fn worker(&mut self, worker: &file::Worker, prefix: &str) -> Worker {
        let path = |key: &str| format!("{prefix}{key}");
        if let Some(id) = worker.id
            && let Some(other) = self.workers.insert(id, path("id"))
        {
            self.refuse(path("id"), id, &format!("is taken by {other}"));
        }
        let why = "must be ip:port or [v6]:port";
        let is_store = worker.role == Role::Store;
        let endpoint = match &worker.endpoint {
            Some(endpoint) if is_store => {
                let why = "must be left out: a store takes no requests";
                self.refuse(path("endpoint"), endpoint, why);
                UNKNOWN
            }
            Some(endpoint) => self.address(&path("endpoint"), endpoint, why),
            None => {
                let path = path("endpoint");
                // What the schema has cut away has been reported.
                let known = self.problems.iter().any(|p| p.path() == Some(&path));
                if !is_store && !known {
                    self.problems.push(Problem::Missing { path });
                }
                UNKNOWN
            }
        };
        if endpoint != UNKNOWN
            && let Some(other) = self.endpoints.insert(endpoint, path("endpoint"))
        {
            self.refuse(path("endpoint"), endpoint, &format!("is taken by {other}"));
        }
        Worker {
            id: worker.id.unwrap_or_default(),
            endpoint: Some(endpoint).filter(|_| !is_store),
            role: worker.role,
            device: worker.device,
            ranks: worker.data_parallel_size,
            metadata: worker.metadata(),
            draining: worker.draining,
            source: Source::File,
            events: worker
                .events
                .as_ref()
                .and_then(|events| self.events(events, worker.data_parallel_size, &path("events"))),
        }
    }

    pub(super) fn registration(&mut self, registration: &file::Registration) -> Registration {
        let networks = registration.networks.iter().flatten().enumerate();
        let network = |(i, text): (usize, &String)| {
            let network = text.parse().ok();
            if network.is_none() {
                let why = "must be a network such as 10.0.0.0/8";
                self.refuse(format!("registration.networks[{i}]"), text, why);
            }
            network
        };
        let networks = networks.filter_map(network).collect();
        if registration.ttl_secs > registration.max_ttl_secs {
            let why = "must be at most registration.max_ttl_secs";
            self.refuse("registration.ttl_secs", registration.ttl_secs, why);
        }
        Registration {
            networks,
            max_workers: registration.max_workers,
            ttl_ms: milliseconds(registration.ttl_secs),
            max_ttl_ms: milliseconds(registration.max_ttl_secs),
        }
    }
}

pub(super) fn health_check(check: &file::HealthCheck) -> HealthCheck {
    HealthCheck {
        path: check.path.clone(),
        interval_ms: milliseconds(check.interval_secs),
        timeout_ms: milliseconds(check.timeout_secs),
        unwell_after: check.unwell_after,
    }
}

/// A name; what the schema has found missing is empty.
pub(super) fn dns(dns: &file::Dns) -> Dns {
    Dns {
        name: dns.name.clone().unwrap_or_default(),
        port: dns.port.unwrap_or_default(),
        family: dns.family,
        refresh: Duration::from_millis(milliseconds(dns.refresh_secs)),
        ranks: dns.data_parallel_size,
        metadata: Metadata {
            taints: dns.taints.clone(),
            total_kv_blocks: dns.total_kv_blocks,
            max_requests: dns.max_requests,
            ..Metadata::default()
        },
        zmq_port: dns.zmq_port,
        zmq_replay_port: dns.zmq_replay_port,
    }
}
