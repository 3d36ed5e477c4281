//! The SDK's contexts, which hand Envoy's callbacks on to the [`Vm`].
//!
//! # Why the SDK's dispatcher does not panic
//!
//! It panics on a context it does not know or knows already, on a second callback during a callback
//! of a context of the same kind, and on an unexpected status of the calls it makes itself.
//!
//! - *Contexts*: Envoy gives each living context its own id, creates it before any other callback
//!   and deletes it after the last one. A request's context keeps its root's alive. `on_configure`
//!   refuses in the canary what it would refuse later, so no root is created a second time.
//! - *Re-entrance*: `proxy_grpc_stream` calls back before it returns, with metadata of a stream that
//!   fails at once; the dispatcher does not know its token yet and ignores it. Envoy puts off
//!   resumption and the end of a stream until the callback is over, but not a stream's metadata: a
//!   stream that failed within `proxy_grpc_send` would panic here. Envoy's codec and sockets report
//!   failures from the event loop instead.
//! - *Statuses*: the dispatcher calls `proxy_set_effective_context` for a root that it has, and
//!   Envoy deletes a root in the module before it forgets it. Opening a stream fails with a status
//!   that the SDK knows: the target is well-formed, and an unknown cluster is a known failure.
//!   The same holds for a call, which fails at once where a stream does. The dispatcher takes a call
//!   for the request's whose callback makes it, though the root context does: it forgets it when it
//!   is over even if the request is gone.
//! - *Tokens*: Envoy counts them up. A token that is not known, because its
//!   root or stream is gone, is ignored. One that was cancelled stays in the dispatcher's map, a
//!   few bytes for each time a bridge gives its stream up.
//!
//! All this holds for an HTTP filter in Envoy 1.40. Installed as a network filter, or with a
//! `capability_restriction_config` that leaves out `proxy_set_effective_context`, the module traps.

use std::cell::RefCell;

use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::Action;

use crate::abi::Envoy;
use crate::host::{Host, Level, Queue, Token};
use crate::vm::{self, Vm};

proxy_wasm::main! {{
    std::panic::set_hook(Box::new(|info| Envoy.log(Level::Critical, &info.to_string())));
    proxy_wasm::set_root_context(|context| Box::new(Root::new(context)));
    proxy_wasm::set_http_context(|context, root| Box::new(Stream::new(context, root)));
}}

thread_local! {
    static VM: RefCell<Vm<Envoy>> = RefCell::new(Vm::new(Envoy));
}

/// Runs a callback; `otherwise` during another one, which does not happen.
fn vm<R>(otherwise: R, callback: impl FnOnce(&mut Vm<Envoy>) -> R) -> R {
    VM.with(|vm| match vm.try_borrow_mut() {
        Ok(mut vm) => callback(&mut vm),
        Err(_) => otherwise,
    })
}

/// A root context by its id. Envoy's deletion drops it.
struct Root(u32);

impl Root {
    fn new(context: u32) -> Self {
        vm((), |vm| vm.on_create(context, 0));
        Self(context)
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        vm((), |vm| vm.on_delete(self.0));
    }
}

impl Context for Root {
    fn on_grpc_stream_message(&mut self, token: u32, size: usize) {
        vm((), |vm| vm.on_stream_message(self.0, Token(token), size));
    }

    fn on_grpc_stream_close(&mut self, token: u32, _status: u32) {
        vm((), |vm| vm.on_stream_close(Token(token)));
    }

    fn on_done(&mut self) -> bool {
        vm((), |vm| vm.on_done(self.0));
        true
    }
}

impl RootContext for Root {
    fn on_vm_start(&mut self, _size: usize) -> bool {
        vm(false, Vm::on_start)
    }

    fn on_configure(&mut self, _size: usize) -> bool {
        vm(false, |vm| vm.on_configure(self.0))
    }

    fn on_tick(&mut self) {
        vm((), |vm| vm.on_tick(self.0));
    }

    fn on_queue_ready(&mut self, queue: u32) {
        vm((), |vm| vm.on_queue_ready(self.0, Queue(queue)));
    }
}

/// A request's context by its id. Envoy's deletion drops it.
struct Stream(u32);

impl Stream {
    fn new(context: u32, root: u32) -> Self {
        vm((), |vm| vm.on_create(context, root));
        Self(context)
    }

    fn act(callback: impl FnOnce(&mut Vm<Envoy>) -> vm::Action) -> Action {
        match vm(vm::Action::Continue, callback) {
            vm::Action::Continue => Action::Continue,
            vm::Action::Pause => Action::Pause,
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        vm((), |vm| vm.on_delete(self.0));
    }
}

impl Context for Stream {
    fn on_grpc_call_response(&mut self, token: u32, status: u32, size: usize) {
        const OK: u32 = 0;
        let size = (status == OK).then_some(size);
        vm((), |vm| vm.on_call_over(self.0, Token(token), size));
    }
}

impl HttpContext for Stream {
    fn on_http_request_headers(&mut self, _count: usize, end: bool) -> Action {
        Self::act(|vm| vm.on_request_headers(self.0, end))
    }

    fn on_http_request_body(&mut self, size: usize, end: bool) -> Action {
        Self::act(|vm| vm.on_request_body(self.0, size, end))
    }

    fn on_http_request_trailers(&mut self, _count: usize) -> Action {
        Self::act(|vm| vm.on_request_trailers(self.0))
    }

    fn on_http_response_headers(&mut self, _count: usize, _end: bool) -> Action {
        vm((), |vm| vm.on_response_headers(self.0));
        Action::Continue
    }

    fn on_http_response_body(&mut self, size: usize, end: bool) -> Action {
        vm((), |vm| vm.on_response_body(self.0, size, end));
        Action::Continue
    }

    fn on_log(&mut self) {
        vm((), |vm| vm.on_log(self.0));
    }
}
