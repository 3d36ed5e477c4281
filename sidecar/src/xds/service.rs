//! The two gRPC services that Envoy may ask; both give the same.

use std::collections::BTreeSet;
use std::future::ready;
use std::pin::Pin;
use std::sync::Arc;

use axum::Router;
use axum::routing::any;
use bytes::Bytes;
use futures::Stream;
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::server::Grpc;
use tonic::{Request, Response, Status, Streaming};
use tower::service_fn;

use super::message::DiscoveryRequest;
use super::{ENDPOINTS_TYPE, Endpoints, Taken};
use crate::bridge::Raw;
use crate::metrics::{Kind, Metrics};

/// The method of `AggregatedDiscoveryService`.
const AGGREGATED: &str =
    "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources";
/// The method of `EndpointDiscoveryService`.
const OF_ENDPOINTS: &str = "/envoy.service.endpoint.v3.EndpointDiscoveryService/StreamEndpoints";
/// Responses that an Envoy has not read; it is told the latest state, so few are enough.
const UNREAD: usize = 4;
/// Clusters that one stream may ask for.
const MAX_NAMES: usize = 1024;

type Responses = Pin<Box<dyn Stream<Item = Result<Bytes, Status>> + Send>>;

/// What both services work with.
#[derive(Clone, Debug)]
struct Desk {
    endpoints: Endpoints,
    metrics: Arc<Metrics>,
    cancel: CancellationToken,
}

/// Both services.
pub fn routes(endpoints: Endpoints, metrics: Arc<Metrics>, cancel: CancellationToken) -> Router {
    let desk = Desk {
        endpoints,
        metrics,
        cancel,
    };
    let stream = |request| async move {
        let open = service_fn(|requests: Request<_>| {
            ready(Ok(Response::new(desk.open(requests.into_inner()))))
        });
        Grpc::new(Raw).streaming(open, request).await
    };
    Router::new()
        .route(AGGREGATED, any(stream.clone()))
        .route(OF_ENDPOINTS, any(stream))
}

impl Desk {
    fn open(&self, requests: Streaming<Bytes>) -> Responses {
        let (out, responses) = mpsc::channel(UNREAD);
        let talk = Talk {
            id: self.endpoints.opened(),
            desk: self.clone(),
            names: BTreeSet::new(),
            node: String::new(),
            taken: Taken::default(),
            out,
        };
        self.count("opened");
        tokio::spawn(talk.run(requests));
        Box::pin(ReceiverStream::new(responses))
    }

    fn count(&self, kind: &'static str) {
        self.metrics.discovery.get_or_create(&Kind { kind }).inc();
    }
}

/// One stream of an Envoy.
struct Talk {
    id: u64,
    desk: Desk,
    /// Clusters that it asks for.
    names: BTreeSet<String>,
    /// Name of the Envoy.
    node: String,
    taken: Taken,
    out: mpsc::Sender<Result<Bytes, Status>>,
}

impl Talk {
    async fn run(mut self, mut requests: Streaming<Bytes>) {
        let mut current = self.desk.endpoints.current.subscribe();
        let cancel = self.desk.cancel.clone();
        loop {
            let is_open = tokio::select! {
                () = cancel.cancelled() => false,
                request = requests.message() => match request {
                    Ok(Some(request)) => self.take(&request).await,
                    Ok(None) | Err(_) => false,
                },
                changed = current.changed() => changed.is_ok() && self.send().await,
            };
            if !is_open {
                break;
            }
        }
        self.desk.endpoints.closed(self.id);
        tracing::info!(node = self.node, "envoy asks for endpoints no more");
    }

    /// Whether the stream goes on.
    async fn take(&mut self, request: &[u8]) -> bool {
        let Ok(request) = DiscoveryRequest::decode(request) else {
            self.desk.count("malformed");
            let status = Status::invalid_argument("not a DiscoveryRequest");
            let _ = self.out.send(Err(status)).await;
            return false;
        };
        if let Some(node) = &request.node {
            self.node.clone_from(&node.id);
        }
        // The first request on a stream of one type need not name it.
        if !request.type_url.is_empty() && request.type_url != ENDPOINTS_TYPE {
            self.desk.count("other_type");
            return true;
        }
        if request.resource_names.len() > MAX_NAMES {
            let status = Status::resource_exhausted("too many clusters");
            let _ = self.out.send(Err(status)).await;
            return false;
        }
        let names: BTreeSet<String> = request.resource_names.into_iter().collect();
        let is_first = !std::mem::replace(&mut self.taken.is_subscribed, true);
        let asks_for_others = std::mem::replace(&mut self.names, names) != self.names;
        if let Some(refused) = request.error_detail {
            self.desk.count("refused");
            let why = refused.message;
            tracing::error!(node = self.node, why, "envoy refuses its endpoints");
        } else if let Ok(version) = request.response_nonce.parse::<u64>() {
            self.desk.count("taken");
            self.taken.version = self.taken.version.max(version);
        }
        self.desk.endpoints.took(self.id, self.taken);
        if is_first {
            tracing::info!(node = self.node, "envoy asks for endpoints");
        }
        if is_first || asks_for_others {
            return self.send().await;
        }
        true
    }

    /// Sends what is to be had, if it was asked for.
    async fn send(&self) -> bool {
        // Nothing has been published: an answer would take all endpoints away.
        let current = self.desk.endpoints.current.borrow().clone();
        if !self.taken.is_subscribed || current.version == 0 {
            return true;
        }
        let response = current.response(&self.names).encode_to_vec();
        self.desk.count("sent");
        self.out.send(Ok(response.into())).await.is_ok()
    }
}
