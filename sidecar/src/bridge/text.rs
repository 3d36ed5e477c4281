//! The call about prompts that are text, and the stream of such questions.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{BufMut, Bytes, BytesMut};
use futures::{Stream, StreamExt};
use kv_core::text::{LONGEST_BODY, METHOD, SERVICE, STREAM, numbered};
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::server::{Grpc, NamedService, StreamingService, UnaryService};
use tonic::{Request, Response, Status, Streaming};

use super::Raw;
use crate::text::Reader;

/// Room beside the body in a question.
const BESIDES: usize = 4096;
/// Questions of one stream that are answered at a time. Those behind them wait in its window.
const AT_ONCE: usize = 256;

type Answer<T, E> = Pin<Box<dyn Future<Output = Result<T, E>> + Send>>;

type Answers = Pin<Box<dyn Stream<Item = Result<Bytes, Status>> + Send>>;

/// The service: one method with one message each way, one with many.
#[derive(Clone)]
pub(super) struct Text {
    pub(super) reader: Arc<Reader>,
    pub(super) cancel: CancellationToken,
}

impl Text {
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

impl NamedService for Text {
    const NAME: &'static str = SERVICE;
}

impl UnaryService<Bytes> for Text {
    type Response = Bytes;
    type Future = Answer<Response<Bytes>, Status>;

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        let answer = self.clone().answer(request.into_inner());
        Box::pin(async move { answer.await.map(Response::new) })
    }
}

impl StreamingService<Bytes> for Text {
    type Response = Bytes;
    type ResponseStream = Answers;
    type Future = Answer<Response<Answers>, Status>;

    fn call(&mut self, request: Request<Streaming<Bytes>>) -> Self::Future {
        let service = self.clone();
        let over = self.cancel.clone().cancelled_owned();
        // The task that writes the answers reads the questions: most are answered by the time that
        // another one would be awake.
        let answers = request.into_inner().map(move |question| {
            let service = service.clone();
            async move { service.answer_numbered(question?).await }
        });
        let answers = answers.buffer_unordered(AT_ONCE).take_until(over);
        Box::pin(async move { Ok(Response::new(Box::pin(answers) as Answers)) })
    }
}

impl tonic::codegen::Service<http::Request<Body>> for Text {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Answer<http::Response<Body>, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let service = self.clone();
        Box::pin(async move {
            let mut grpc = Grpc::new(Raw).max_decoding_message_size(LONGEST_BODY + BESIDES);
            match request.uri().path().rsplit('/').next() {
                Some(METHOD) => Ok(grpc.unary(service, request).await),
                Some(STREAM) => Ok(grpc.streaming(service, request).await),
                _ => Ok(Status::unimplemented("no such method").into_http()),
            }
        })
    }
}
