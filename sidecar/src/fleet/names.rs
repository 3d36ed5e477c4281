//! The addresses behind DNS names, looked up again and again.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use kv_core::id::{Device, Role, Slot, WorkerId};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use xxhash_rust::xxh3::xxh3_64;

use super::Ask;
use crate::config::{AddressFamily, Config, Dns, Events, Source, Worker, ZmqAddress};
use crate::metrics::{Kind, Metrics};

/// How long a lookup may take.
const LOOKUP: Duration = Duration::from_secs(5);

/// A name of a pool.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name {
    /// The pool.
    pub pool: String,
    /// What is looked up there.
    pub dns: Dns,
}

/// All names and what they stand for.
#[derive(Debug)]
pub struct Names {
    names: BTreeMap<Name, Found>,
    asks: mpsc::Sender<Ask>,
    metrics: Arc<Metrics>,
}

#[derive(Debug)]
struct Found {
    addresses: BTreeSet<SocketAddr>,
    lookups: AbortHandle,
}

impl Drop for Found {
    fn drop(&mut self) {
        self.lookups.abort();
    }
}

impl Names {
    /// None; `asks` is told what names stand for.
    #[must_use]
    pub fn new(asks: mpsc::Sender<Ask>, metrics: Arc<Metrics>) -> Self {
        Self {
            names: BTreeMap::new(),
            asks,
            metrics,
        }
    }

    /// Looks up the names of a configuration from here on.
    pub fn configure(&mut self, config: &Config) {
        let of_pool = |pool: &crate::config::Pool| {
            let name = |dns: &Dns| Name {
                pool: pool.name.clone(),
                dns: dns.clone(),
            };
            pool.dns.iter().map(name).collect::<Vec<_>>()
        };
        let wanted: BTreeSet<Name> = config.pools.iter().flat_map(of_pool).collect();
        self.names.retain(|name, _| wanted.contains(name));
        for name in wanted {
            if !self.names.contains_key(&name) {
                let lookups = look_up(name.clone(), self.asks.clone(), Arc::clone(&self.metrics));
                let found = Found {
                    addresses: BTreeSet::new(),
                    lookups: tokio::spawn(lookups).abort_handle(),
                };
                self.names.insert(name, found);
            }
        }
    }

    /// A name stands for these; whether that is a change.
    pub fn resolved(&mut self, name: &Name, addresses: BTreeSet<SocketAddr>) -> bool {
        let Some(found) = self.names.get_mut(name) else {
            return false;
        };
        let is_changed = found.addresses != addresses;
        if is_changed {
            tracing::info!(
                pool = name.pool,
                name = name.dns.name,
                addresses = addresses.len(),
                "a name stands for other addresses"
            );
            found.addresses = addresses;
        }
        is_changed
    }

    /// The configuration with the workers behind the names. Those that are there already stay as
    /// they are.
    #[must_use]
    pub fn over(&self, mut config: Config) -> Config {
        for (name, found) in &self.names {
            for address in &found.addresses {
                config.admit(&name.pool, worker(&name.dns, *address));
            }
        }
        config
    }
}

/// Id of a worker that only its address is known of. It fits into the numbers of JSON.
#[must_use]
pub fn id_of(address: SocketAddr) -> WorkerId {
    xxh3_64(address.to_string().as_bytes()) >> 11
}

fn worker(dns: &Dns, address: SocketAddr) -> Worker {
    let host = match address {
        SocketAddr::V4(address) => address.ip().to_string(),
        SocketAddr::V6(address) => format!("[{}]", address.ip()),
    };
    let at = |port: u16| ZmqAddress {
        host: host.clone(),
        port,
    };
    Worker {
        id: id_of(address),
        endpoint: Some(address),
        role: Role::Aggregated,
        device: Device::default(),
        ranks: dns.ranks,
        metadata: dns.metadata.clone(),
        draining: false,
        source: Source::Dns,
        events: dns.zmq_port.map(|port| Events::Zmq {
            endpoint: at(port),
            topic: String::new(),
            replay: dns.zmq_replay_port.map(at),
        }),
    }
}

/// Looks a name up until nobody wants to know. What can't be looked up stays as it was.
async fn look_up(name: Name, asks: mpsc::Sender<Ask>, metrics: Arc<Metrics>) {
    let dns = &name.dns;
    let count = |kind| metrics.lookups.get_or_create(&Kind { kind }).inc();
    let mut failing = false;
    loop {
        let found = tokio::time::timeout(LOOKUP, tokio::net::lookup_host((&*dns.name, dns.port)));
        match found.await {
            Ok(Ok(found)) => {
                failing = false;
                let wanted = |address: &SocketAddr| match dns.family {
                    AddressFamily::Any => true,
                    AddressFamily::Ipv4 => address.is_ipv4(),
                    AddressFamily::Ipv6 => address.is_ipv6(),
                };
                let addresses: BTreeSet<_> = found.filter(wanted).collect();
                let most = usize::from(Slot::MAX) / usize::try_from(dns.ranks).unwrap_or(1).max(1);
                let addresses = addresses.into_iter().take(most).collect();
                count("found");
                if asks
                    .send(Ask::Resolved(name.clone(), addresses))
                    .await
                    .is_err()
                {
                    return;
                }
            }
            other => {
                count("failed");
                // Once, not each time.
                if !std::mem::replace(&mut failing, true) {
                    let error = match other {
                        Ok(Err(error)) => error.to_string(),
                        _ => "no answer in time".to_owned(),
                    };
                    tracing::warn!(error, pool = name.pool, name = dns.name, "can't look up");
                }
            }
        }
        tokio::time::sleep(dns.refresh).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        let text = "dns: [{name: localhost, port: 8000, data_parallel_size: 2, zmq_port: 5557, \
                    max_requests: 4, refresh_secs: 3600}]\n\
                    workers: [{id: 1, endpoint: '10.0.0.1:8000'}]";
        Config::parse(text, &[]).unwrap_or_else(|e| panic!("{e}"))
    }

    #[tokio::test]
    async fn a_name_is_the_workers_at_its_addresses() {
        let (asks, mut asked) = mpsc::channel(4);
        let mut names = Names::new(asks, Arc::default());
        let config = config();
        names.configure(&config);
        // What the system says of localhost is up to it.
        let Some(Ask::Resolved(name, _)) = asked.recv().await else {
            panic!("no answer");
        };
        let there: SocketAddr = "10.0.0.2:8000".parse().unwrap();
        let taken: SocketAddr = "10.0.0.1:8000".parse().unwrap();
        let v6: SocketAddr = "[fd00::1]:8000".parse().unwrap();
        assert!(names.resolved(&name, [there, taken, v6].into()));
        assert!(!names.resolved(&name, [v6, there, taken].into()));
        let over = names.over(config.clone());
        let workers = &over.pools[0].workers;
        assert_eq!(workers.len(), 3);
        assert_eq!(workers[0].source, Source::File);
        let of = |address| workers.iter().find(|w| w.id == id_of(address)).unwrap();
        assert_eq!((of(there).ranks, of(there).metadata.max_requests), (2, 4));
        let zmq = |address| of(address).events.as_ref().unwrap().zmq(1).unwrap();
        assert_eq!(zmq(there), "10.0.0.2:5558");
        assert_eq!(zmq(v6), "[fd00::1]:5558");
        assert!(id_of(there) < 1 << 53);
        names.configure(&Config::parse("workers: []", &[]).unwrap());
        assert!(!names.resolved(&name, [there].into()));
        assert_eq!(names.over(config).pools[0].workers.len(), 1);
    }
}
