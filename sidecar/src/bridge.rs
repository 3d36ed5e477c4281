//! The server of the stream that Envoy's bridge opens: raw messages of [`kv_core::wire`] over gRPC
//! on a Unix socket; and of the questions about prompts that are text ([`kv_core::text`]). No protobuf: a
//! message's bytes are the message.

mod codec;
mod service;
mod socket;
mod text;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::body::Body;
use tonic::transport::Server;

use crate::index::Control;
use crate::metrics::Metrics;
use crate::text::Reader;
use crate::xds::{self, Endpoints};
pub use codec::Raw;
pub use socket::SocketError;

/// Bytes that a stream may send before the sidecar has taken them.
const STREAM_WINDOW: u32 = 8 << 20;
/// Bytes that all streams of a connection may send before the sidecar has taken them.
const CONNECTION_WINDOW: u32 = 64 << 20;

/// A bound socket; its file is removed with it.
#[derive(Debug)]
pub struct Bridge {
    listener: UnixListener,
    path: PathBuf,
}

impl Bridge {
    /// Binds the socket, for its owner alone.
    ///
    /// # Errors
    /// When another process answers on it, or the system refuses.
    pub async fn bind(path: &Path) -> Result<Self, SocketError> {
        Ok(Self {
            listener: socket::bind(path).await?,
            path: path.into(),
        })
    }

    /// Serves streams until cancelled.
    ///
    /// # Errors
    /// When the socket fails.
    pub async fn run(
        self,
        control: mpsc::Sender<Control>,
        metrics: Arc<Metrics>,
        reader: Arc<Reader>,
        endpoints: Endpoints,
        cancel: CancellationToken,
    ) -> Result<(), tonic::transport::Error> {
        let discovery = xds::routes(endpoints, Arc::clone(&metrics), cancel.clone());
        let service = service::Bridge::new(control, metrics, cancel.clone());
        let text = text::Text {
            reader,
            cancel: cancel.clone(),
        };
        let unknown = async || Status::unimplemented("no such method").into_http::<Body>();
        let methods = service.routes().merge(text.routes()).merge(discovery);
        let served = Server::builder()
            // A body comes in one go.
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .add_routes(methods.fallback(unknown).into())
            .serve_with_incoming_shutdown(
                UnixListenerStream::new(self.listener),
                cancel.cancelled_owned(),
            )
            .await;
        // Nobody else can have bound it meanwhile: binding refuses a socket that answers.
        let _ = std::fs::remove_file(&self.path);
        served
    }
}
