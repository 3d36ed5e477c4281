//! The stream that Envoy's bridge opens, as a gRPC method.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::routing::any;
use bytes::Bytes;
use futures::{Stream, StreamExt};
use kv_core::report::Report;
use kv_core::wire::{self, METHOD, SERVICE, Subscribe, Up, WINDOW};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::server::Grpc;
use tonic::{Request, Response, Status, Streaming};
use tower::service_fn;

use super::Raw;
use crate::ask::ask;
use crate::index::{Control, Refusal};
use crate::metrics::{Kind, Metrics};

/// How long a stream may take to say who it is.
const SUBSCRIBE_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest message from a bridge, in bytes: it sends at once what VMs left for it.
const LONGEST_MESSAGE: usize = 8 << 20;

type BatchStream = Pin<Box<dyn Stream<Item = Result<Bytes, Status>> + Send>>;

/// The service: one method, a stream both ways.
#[derive(Clone, Debug)]
pub(super) struct Bridge {
    control: mpsc::Sender<Control>,
    metrics: Arc<Metrics>,
    cancel: CancellationToken,
}

impl Bridge {
    pub(super) fn new(
        control: mpsc::Sender<Control>,
        metrics: Arc<Metrics>,
        cancel: CancellationToken,
    ) -> Self {
        Self {
            control,
            metrics,
            cancel,
        }
    }

    /// Its method.
    pub(super) fn routes(self) -> Router {
        let stream = |request| async move {
            let open = service_fn(|up: Request<_>| self.clone().open(up.into_inner()));
            let mut grpc = Grpc::new(Raw).max_decoding_message_size(LONGEST_MESSAGE);
            grpc.streaming(open, request).await
        };
        Router::new().route(&format!("/{SERVICE}/{METHOD}"), any(stream))
    }

    async fn open(self, mut up: Streaming<Bytes>) -> Result<Response<BatchStream>, Status> {
        let (who, version) = match self.first(&mut up).await {
            Ok(first) => first,
            Err((kind, status)) => {
                self.count(kind);
                tracing::error!(kind, message = status.message(), "bridge refused");
                return Err(status);
            }
        };
        let (process, term, vm_id) = (who.process, who.term, who.vm_id.clone());
        let (out, batches) = mpsc::channel(WINDOW);
        let subscribe = |reply| Control::Subscribe {
            who,
            version,
            out,
            reply,
        };
        let taken = ask(&self.control, subscribe).await;
        let id = match taken.ok_or_else(|| Status::unavailable("shutting down"))? {
            Ok(id) => id,
            Err(refusal) => {
                self.count(refusal.kind());
                tracing::error!(%refusal, process, vm_id, "bridge refused");
                return Err(refused(&refusal));
            }
        };
        self.count("accepted");
        tracing::info!(
            subscriber = id,
            process,
            vm_id,
            term,
            protocol = version,
            "bridge subscribed"
        );
        tokio::spawn(self.listen(id, up));
        Ok(Response::new(Box::pin(
            ReceiverStream::new(batches).map(Ok),
        )))
    }

    /// The first message says who is there, and in which version of the protocol.
    async fn first(
        &self,
        up: &mut Streaming<Bytes>,
    ) -> Result<(Subscribe, u8), (&'static str, Status)> {
        let silent = |why: &str| ("silent", Status::deadline_exceeded(why));
        let message = tokio::time::timeout(SUBSCRIBE_TIMEOUT, up.message())
            .await
            .map_err(|_| silent("no subscription in time"))?
            .map_err(|status| ("silent", status))?
            .ok_or_else(|| silent("the stream ended before a subscription"))?;
        match wire::decode(&message) {
            Ok(Up::Subscribe(who)) => Ok((who, wire::version(&message).unwrap_or_default())),
            Ok(Up::Ack(_) | Up::Reports(_) | Up::Lanes(_)) => {
                let why = "the first message must be a subscription";
                Err(("malformed", Status::invalid_argument(why)))
            }
            Err(error) => Err((error.kind(), Status::failed_precondition(error.to_string()))),
        }
    }

    /// Passes messages on until the stream ends.
    async fn listen(self, id: u64, mut up: Streaming<Bytes>) {
        loop {
            let message = tokio::select! {
                () = self.cancel.cancelled() => break,
                message = up.message() => message,
            };
            let Ok(Some(message)) = message else { break };
            let control = match wire::decode(&message) {
                Ok(Up::Ack(ack)) => Control::Ack(id, ack),
                Ok(Up::Reports(reports)) => Control::Reports(id, self.decoded(id, &reports)),
                Ok(Up::Lanes(lanes)) => Control::Lanes(id, lanes),
                Ok(Up::Subscribe(_)) => {
                    tracing::error!(subscriber = id, "a second subscription on one stream");
                    break;
                }
                Err(error) => {
                    tracing::error!(subscriber = id, %error, "unreadable message from the bridge");
                    break;
                }
            };
            if self.control.send(control).await.is_err() {
                break;
            }
        }
        tracing::info!(subscriber = id, "bridge stream ended");
        // The service is gone too when nobody takes this.
        let _ = self.control.send(Control::Gone(id)).await;
    }

    /// The reports that can be read.
    fn decoded(&self, id: u64, reports: &[Vec<u8>]) -> Vec<Report> {
        let decode = |bytes: &Vec<u8>| {
            let report = Report::decode(bytes);
            let lost = |error: &wire::WireError| {
                let kind = error.kind();
                self.metrics.reports.get_or_create(&Kind { kind }).inc();
                tracing::error!(subscriber = id, %error, "unreadable report");
            };
            report.inspect_err(lost).ok()
        };
        reports.iter().filter_map(decode).collect()
    }

    fn count(&self, kind: &'static str) {
        self.metrics
            .subscriptions
            .get_or_create(&Kind { kind })
            .inc();
    }
}

/// A refusal as a gRPC status.
fn refused(refusal: &Refusal) -> Status {
    match refusal {
        Refusal::Format(_) => Status::failed_precondition(refusal.to_string()),
        Refusal::Term(..) => Status::aborted(refusal.to_string()),
        Refusal::TooMany => Status::resource_exhausted(refusal.to_string()),
    }
}
