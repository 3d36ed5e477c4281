//! Registration over NATS: a message on a worker's own subject is what it says; an empty one is its
//! farewell. A message with a reply subject is answered.
//!
//! A worker speaks for itself alone: its id is in the subject, which NATS permissions bind.

use async_nats::{Client, Message, Subscriber};
use futures::future::BoxFuture;
use futures::{FutureExt as _, StreamExt as _, TryFutureExt as _};
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::Ask;
use super::outcome::RegisterError;
use super::said::Said;
use crate::config::Nats;
use crate::ingest::nats::{NatsError, options};
use crate::ingest::subject::Template;

/// Longest message, in bytes.
const LONGEST: usize = 64 << 10;

/// What a worker is answered.
type Reply = BoxFuture<'static, Result<Value, RegisterError>>;

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
                let answer = reply.await.unwrap_or_else(|error| {
                    tracing::warn!(%error, "a registration over nats is refused");
                    json!({"error": {"kind": error.kind(), "message": error.to_string()}})
                });
                if let Some(to) = to {
                    // Nobody may be left to tell.
                    let _ = client.publish(to, answer.to_string().into()).await;
                }
            });
        }
    }

    /// The answer, when it comes; `None` for a subject that names no worker.
    async fn ask(&self, message: &Message) -> Option<Reply> {
        let worker = self.template.worker(&message.subject)?;
        if message.payload.is_empty() {
            let leave = move |reply| Ask::Leave(worker, reply);
            return self.put(leave, |()| json!({})).await;
        }
        let said = if message.payload.len() > LONGEST {
            Err(RegisterError::Body(format!("above {LONGEST} bytes")))
        } else {
            Said::read_of(&message.payload, worker)
        };
        match said.map(Box::new) {
            Ok(said) => {
                let join = |reply| Ask::Join(said, reply);
                self.put(join, |joined| json!(joined)).await
            }
            Err(error) => Some(std::future::ready(Err(error)).boxed()),
        }
    }

    /// Hands a question on: what is told of its answer, when that comes; `None` where nobody takes
    /// questions.
    async fn put<T: Send + 'static>(
        &self,
        question: impl FnOnce(oneshot::Sender<Result<T, RegisterError>>) -> Ask,
        told: fn(T) -> Value,
    ) -> Option<Reply> {
        let (reply, answer) = oneshot::channel();
        self.asks.send(question(reply)).await.ok()?;
        let answer = answer.map(|answer| answer.unwrap_or(Err(RegisterError::ShuttingDown)));
        Some(answer.map_ok(told).boxed())
    }
}
