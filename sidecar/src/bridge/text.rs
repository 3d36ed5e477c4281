//! The call about prompts that are text, and the stream of such questions.

use std::future::ready;
use std::pin::Pin;
use std::sync::Arc;

use axum::Router;
use axum::routing::any;
use bytes::{BufMut, Bytes, BytesMut};
use futures::{Stream, StreamExt};
use kv_core::text::{LONGEST_BODY, METHOD, SERVICE, STREAM, numbered};
use tokio_util::sync::CancellationToken;
use tonic::server::Grpc;
use tonic::{Request, Response, Status, Streaming};
use tower::service_fn;

use super::Raw;
use crate::text::Reader;

/// Room beside the body in a question.
const BESIDES: usize = 4096;
/// Questions of one stream that are answered at a time. Those behind them wait in its window.
const AT_ONCE: usize = 256;

type Answers = Pin<Box<dyn Stream<Item = Result<Bytes, Status>> + Send>>;

/// The service: one method with one message each way, one with many.
#[derive(Clone)]
pub(super) struct Text {
    pub(super) reader: Arc<Reader>,
    pub(super) cancel: CancellationToken,
}

impl Text {
    /// Its methods.
    pub(super) fn routes(self) -> Router {
        let grpc = || Grpc::new(Raw).max_decoding_message_size(LONGEST_BODY + BESIDES);
        let service = self.clone();
        let one = move |request| async move {
            let answer = service_fn(|question: Request<Bytes>| {
                let answer = service.clone().answer(question.into_inner());
                async move { answer.await.map(Response::new) }
            });
            grpc().unary(answer, request).await
        };
        let many = move |request| async move {
            let answer = service_fn(|questions: Request<_>| {
                ready(Ok(Response::new(self.answers(questions.into_inner()))))
            });
            grpc().streaming(answer, request).await
        };
        Router::new()
            .route(&format!("/{SERVICE}/{METHOD}"), any(one))
            .route(&format!("/{SERVICE}/{STREAM}"), any(many))
    }

    /// The answers to the questions of a stream, until cancelled.
    fn answers(&self, questions: Streaming<Bytes>) -> Answers {
        let service = self.clone();
        let over = self.cancel.clone().cancelled_owned();
        // The task that writes the answers reads the questions: most are answered by the time that
        // another one would be awake.
        let answers = questions.map(move |question| {
            let service = service.clone();
            async move { service.answer_numbered(question?).await }
        });
        Box::pin(answers.buffer_unordered(AT_ONCE).take_until(over))
    }

    async fn answer(self, question: Bytes) -> Result<Bytes, Status> {
        let answer = self.reader.answer(question).await;
        answer.map_err(|error| Status::failed_precondition(error.to_string()))
    }

    /// The answer to a message of the stream.
    async fn answer_numbered(self, message: Bytes) -> Result<Bytes, Status> {
        let none = || Status::invalid_argument("a question without a number");
        let (number, question) = numbered(&message).ok_or_else(none)?;
        let answer = self.answer(message.slice_ref(question)).await?;
        let mut numbered = BytesMut::with_capacity(size_of_val(&number) + answer.len());
        numbered.put_u64_le(number);
        numbered.put(answer);
        Ok(numbered.freeze())
    }
}
