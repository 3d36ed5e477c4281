//! The call about prompts that are text.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use kv_core::text::{LONGEST_BODY, METHOD, SERVICE};
use tonic::body::Body;
use tonic::server::{Grpc, NamedService, UnaryService};
use tonic::{Request, Response, Status};

use super::Raw;
use crate::text::Reader;

/// Room beside the body in a question.
const BESIDES: usize = 4096;

type Answer<T, E> = Pin<Box<dyn Future<Output = Result<T, E>> + Send>>;

/// The service: one method, one message each way.
#[derive(Clone)]
pub(super) struct Text(pub(super) Arc<Reader>);

impl NamedService for Text {
    const NAME: &'static str = SERVICE;
}

impl UnaryService<Bytes> for Text {
    type Response = Bytes;
    type Future = Answer<Response<Bytes>, Status>;

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        let reader = Arc::clone(&self.0);
        Box::pin(async move {
            let answer = reader.answer(request.into_inner()).await;
            let answer = answer.map_err(|error| Status::failed_precondition(error.to_string()));
            answer.map(Response::new)
        })
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
            let method = request.uri().path().rsplit('/').next();
            if method != Some(METHOD) {
                return Ok(Status::unimplemented("no such method").into_http());
            }
            let mut grpc = Grpc::new(Raw).max_decoding_message_size(LONGEST_BODY + BESIDES);
            Ok(grpc.unary(service, request).await)
        })
    }
}
