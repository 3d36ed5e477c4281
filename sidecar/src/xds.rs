//! Endpoint discovery (EDS) for Envoy, over the bridge's socket: each pool's endpoints, pushed when
//! they change, and what each Envoy has acknowledged.
//!
//! State of the world, version 3 of the API: `AggregatedDiscoveryService` and
//! `EndpointDiscoveryService`. No other resource is served.

mod message;
mod service;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prost::Message as _;
use tokio::sync::watch;

pub use message::{
    Address, Any, ClusterLoadAssignment, DiscoveryRequest, DiscoveryResponse, Endpoint, LbEndpoint,
    LocalityLbEndpoints, Node, SocketAddress, Status,
};
pub use service::routes;

/// Type of the one resource.
pub const ENDPOINTS_TYPE: &str =
    "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";

/// Endpoints by Envoy's name of the pool's cluster.
pub type Assignments = BTreeMap<String, BTreeSet<SocketAddr>>;

/// What Envoys are to have.
#[derive(Clone, Debug, Default)]
struct Current {
    version: u64,
    assignments: Arc<Assignments>,
}

/// Of one stream: the version that its Envoy has taken.
#[derive(Clone, Copy, Debug, Default)]
struct Taken {
    /// Whether it has asked for endpoints.
    is_subscribed: bool,
    version: u64,
}

/// The endpoints that Envoys are served, and how far each has them. Clones share them.
#[derive(Clone, Debug)]
pub struct Endpoints {
    current: watch::Sender<Current>,
    streams: Arc<Mutex<BTreeMap<u64, Taken>>>,
    /// Told whenever a stream has taken a version, has begun or has ended.
    taken: watch::Sender<u64>,
}

impl Default for Endpoints {
    fn default() -> Self {
        Self {
            current: watch::Sender::new(Current::default()),
            streams: Arc::default(),
            taken: watch::Sender::new(0),
        }
    }
}

impl Endpoints {
    /// Serves these from here on, if they differ from what is served. Returns their version.
    pub fn publish(&self, assignments: Assignments) -> u64 {
        self.current.send_if_modified(|current| {
            let differs = current.version == 0 || *current.assignments != assignments;
            if differs {
                *current = Current {
                    version: current.version + 1,
                    assignments: Arc::new(assignments),
                };
            }
            differs
        });
        self.current.borrow().version
    }

    /// Waits until every Envoy that asks for endpoints has this version.
    pub async fn taken(&self, version: u64) {
        let mut taken = self.taken.subscribe();
        let is_behind = |of: &Taken| of.is_subscribed && of.version < version;
        while self.streams().values().any(is_behind) {
            // It can't be closed while `self` is there.
            if taken.changed().await.is_err() {
                return;
            }
        }
    }

    /// Envoys that ask for endpoints.
    #[must_use]
    pub fn subscribers(&self) -> usize {
        self.streams().values().filter(|s| s.is_subscribed).count()
    }

    fn streams(&self) -> MutexGuard<'_, BTreeMap<u64, Taken>> {
        // A panic can't leave it half changed.
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn opened(&self) -> u64 {
        let mut streams = self.streams();
        let id = streams.last_key_value().map_or(0, |(id, _)| id + 1);
        streams.insert(id, Taken::default());
        id
    }

    fn closed(&self, id: u64) {
        self.streams().remove(&id);
        self.stir();
    }

    fn took(&self, id: u64, taken: Taken) {
        self.streams().insert(id, taken);
        self.stir();
    }

    fn stir(&self) {
        self.taken.send_modify(|n| *n = n.wrapping_add(1));
    }
}

impl Current {
    /// The answer to who asked for these clusters, or for all of them. A cluster that is not known
    /// has no endpoints: Envoy would wait for it.
    fn response(&self, names: &BTreeSet<String>) -> DiscoveryResponse {
        let none = BTreeSet::new();
        let named = names.iter().map(|name| {
            let endpoints = self.assignments.get(name).unwrap_or(&none);
            (name, endpoints)
        });
        let all = self.assignments.iter().filter(|_| names.is_empty());
        let resources = named.chain(all).map(|(name, endpoints)| Any {
            type_url: ENDPOINTS_TYPE.into(),
            value: assignment(name, endpoints).encode_to_vec(),
        });
        DiscoveryResponse {
            version_info: self.version.to_string(),
            resources: resources.collect(),
            type_url: ENDPOINTS_TYPE.into(),
            nonce: self.version.to_string(),
        }
    }
}

fn assignment(name: &str, endpoints: &BTreeSet<SocketAddr>) -> ClusterLoadAssignment {
    let lb_endpoints = endpoints.iter().map(|endpoint| LbEndpoint {
        endpoint: Some(Endpoint {
            address: Some(Address {
                socket_address: Some(SocketAddress {
                    address: endpoint.ip().to_string(),
                    port_value: endpoint.port().into(),
                }),
            }),
        }),
    });
    ClusterLoadAssignment {
        cluster_name: name.to_owned(),
        endpoints: vec![LocalityLbEndpoints {
            lb_endpoints: lb_endpoints.collect(),
        }],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assignments(port: u16) -> Assignments {
        let endpoint = SocketAddr::from(([10, 0, 0, 1], port));
        [("a".to_owned(), [endpoint].into())].into()
    }

    #[test]
    fn only_a_change_makes_a_version() {
        let endpoints = Endpoints::default();
        assert_eq!(endpoints.publish(Assignments::new()), 1);
        assert_eq!(endpoints.publish(assignments(1)), 2);
        assert_eq!(endpoints.publish(assignments(1)), 2);
        assert_eq!(endpoints.publish(assignments(2)), 3);
    }

    #[tokio::test]
    async fn a_version_is_taken_once_every_subscriber_has_it() {
        let endpoints = Endpoints::default();
        let version = endpoints.publish(assignments(1));
        endpoints.taken(version).await;
        let (one, other) = (endpoints.opened(), endpoints.opened());
        let has = |version| Taken {
            is_subscribed: true,
            version,
        };
        // One that hasn't asked is not waited for.
        endpoints.taken(version).await;
        endpoints.took(one, has(version));
        endpoints.took(other, has(0));
        let waiting = endpoints.clone();
        let mut waiting = tokio::spawn(async move { waiting.taken(version).await });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        endpoints.closed(other);
        (&mut waiting).await.unwrap();
        assert_eq!(endpoints.subscribers(), 1);
    }

    #[test]
    fn a_cluster_that_nobody_knows_has_no_endpoints() {
        let endpoints = Endpoints::default();
        endpoints.publish(assignments(1));
        let current = endpoints.current.borrow();
        let response = current.response(&["b".to_owned()].into());
        assert_eq!(response.resources.len(), 1);
        let decoded = ClusterLoadAssignment::decode(&*response.resources[0].value).unwrap();
        assert_eq!(decoded.cluster_name, "b");
        assert!(decoded.endpoints[0].lb_endpoints.is_empty());
        assert_eq!(current.response(&BTreeSet::new()).resources.len(), 1);
    }
}
