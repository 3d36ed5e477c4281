//! Questions to a task, by a command that carries where the answer goes.

use tokio::sync::{mpsc, oneshot};

/// Sends a question and waits for the answer; `None` where nobody takes or answers it any more.
pub(crate) async fn ask<Q, T>(
    to: &mpsc::Sender<Q>,
    question: impl FnOnce(oneshot::Sender<T>) -> Q,
) -> Option<T> {
    let (reply, answer) = oneshot::channel();
    to.send(question(reply)).await.ok()?;
    answer.await.ok()
}
