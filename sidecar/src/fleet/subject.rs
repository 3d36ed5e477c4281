//! Registration over NATS: a message on a worker's own subject is what it says; an empty one is its
//! farewell. A message with a reply subject is answered.
//!
//! A worker speaks for itself alone: its id is in the subject, which NATS permissions bind.

use async_nats::{Client, Message, Subscriber};
use futures::StreamExt as _;
use serde_json::json;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::outcome::RegisterError;
use super::said::Said;
use super::{Ask, Joined};
use crate::config::Nats;
use crate::ingest::nats::{NatsError, options};
use crate::ingest::subject::Template;

/// Longest message, in bytes.
const LONGEST: usize = 64 << 10;

/// The subscription.
pub struct Desk {
    client: Client,
    messages: Subscriber,
    template: Template,
    asks: mpsc::Sender<Ask>,
}

impl Desk {
    /// Subscribes; the connection may come later.
    ///
    /// # Errors
    /// When credentials can't be read or the server's address is not usable.
    pub async fn open(
        nats: &Nats,
        template: &Template,
        asks: mpsc::Sender<Ask>,
    ) -> Result<Self, NatsError> {
        let client = options(nats).await?.connect(nats.urls.as_slice()).await?;
        let messages = client.subscribe(template.wildcard()).await?;
        Ok(Self {
            client,
            messages,
            template: template.clone(),
            asks,
        })
    }

    /// Hands on what workers say until cancelled.
    pub async fn run(mut self, cancel: CancellationToken) {
        loop {
            let message = tokio::select! {
                () = cancel.cancelled() => return,
                message = self.messages.next() => message,
            };
            let Some(message) = message else { return };
            let Some(reply) = self.ask(&message).await else {
                continue;
            };
            let (client, to) = (self.client.clone(), message.reply);
            // Waiting for one must not hold up the others.
            tokio::spawn(async move {
                let answer = match reply.await.unwrap_or(Err(RegisterError::ShuttingDown)) {
                    Ok(Some(joined)) => json!(joined),
                    Ok(None) => json!({}),
                    Err(error) => {
                        tracing::warn!(%error, "a registration over nats is refused");
                        json!({"error": {"kind": error.kind(), "message": error.to_string()}})
                    }
                };
                if let Some(to) = to {
                    // Nobody may be left to tell.
                    let _ = client.publish(to, answer.to_string().into()).await;
                }
            });
        }
    }

    /// Where the answer will come; `None` for a subject that names no worker.
    async fn ask(
        &self,
        message: &Message,
    ) -> Option<oneshot::Receiver<Result<Option<Joined>, RegisterError>>> {
        let worker = self.template.worker(&message.subject)?;
        let (reply, answer) = oneshot::channel();
        if message.payload.is_empty() {
            let (told, left) = oneshot::channel();
            self.asks.send(Ask::Leave(worker, told)).await.ok()?;
            tokio::spawn(async move {
                let left = left.await.unwrap_or(Err(RegisterError::ShuttingDown));
                reply.send(left.map(|()| None))
            });
            return Some(answer);
        }
        let said = if message.payload.len() > LONGEST {
            Err(RegisterError::Body(format!("above {LONGEST} bytes")))
        } else {
            Said::read(&message.payload)
        };
        let said = said.and_then(|said| match said.id() {
            id if id == worker => Ok(said),
            id => Err(RegisterError::OtherWorker {
                said: id,
                expected: worker,
            }),
        });
        match said {
            Err(error) => {
                let _ = reply.send(Err(error));
            }
            Ok(said) => {
                let (told, joined) = oneshot::channel();
                self.asks.send(Ask::Join(Box::new(said), told)).await.ok()?;
                tokio::spawn(async move {
                    let joined = joined.await.unwrap_or(Err(RegisterError::ShuttingDown));
                    reply.send(joined.map(Some))
                });
            }
        }
        Some(answer)
    }
}
