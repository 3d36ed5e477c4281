//! Proxy-Wasm ABI 0.2.1: Envoy's functions that the module imports and the ones it exports. The
//! only unsafe code of the filter.
//!
//! The ABI is used directly, because the SDK panics on any status it does not expect, and a panic
//! takes the thread's filter down.

#![allow(unsafe_code)]

use std::alloc::Layout;
use std::cell::RefCell;
use std::ptr::null_mut;

use crate::host::{Expect, Headers, Host, Level, MetricId, MetricKind, Queue, Shared, Token};
use crate::vm::{Action, Vm};

const OK: u32 = 0;
const REQUEST_BODY: u32 = 0;
const GRPC_MESSAGE: u32 = 5;
const PLUGIN_CONFIGURATION: u32 = 7;
const REQUEST_STREAM: u32 = 0;
const MONOTONIC: u32 = 1;

/// A version that no value has. Envoy compares versions only of keys that exist, so a write that
/// expects it succeeds exactly where the key is absent.
const NO_VERSION: u32 = u32::MAX;

#[link(wasm_import_module = "env")]
unsafe extern "C" {
    fn proxy_log(level: u32, data: *const u8, size: usize) -> u32;
    fn proxy_get_current_time_nanoseconds(time: *mut u64) -> u32;
    fn proxy_set_tick_period_milliseconds(period: u32) -> u32;
    fn proxy_set_effective_context(context: u32) -> u32;
    fn proxy_get_property(
        path: *const u8,
        path_size: usize,
        data: *mut *mut u8,
        size: *mut usize,
    ) -> u32;
    fn proxy_get_buffer_bytes(
        buffer: u32,
        start: usize,
        max: usize,
        data: *mut *mut u8,
        size: *mut usize,
    ) -> u32;
    fn proxy_get_header_map_value(
        map: u32,
        key: *const u8,
        key_size: usize,
        data: *mut *mut u8,
        size: *mut usize,
    ) -> u32;
    fn proxy_replace_header_map_value(
        map: u32,
        key: *const u8,
        key_size: usize,
        value: *const u8,
        value_size: usize,
    ) -> u32;
    fn proxy_remove_header_map_value(map: u32, key: *const u8, key_size: usize) -> u32;
    fn proxy_continue_stream(stream: u32) -> u32;
    fn proxy_get_shared_data(
        key: *const u8,
        key_size: usize,
        data: *mut *mut u8,
        size: *mut usize,
        version: *mut u32,
    ) -> u32;
    fn proxy_set_shared_data(
        key: *const u8,
        key_size: usize,
        value: *const u8,
        value_size: usize,
        version: u32,
    ) -> u32;
    fn proxy_register_shared_queue(name: *const u8, size: usize, queue: *mut u32) -> u32;
    fn proxy_resolve_shared_queue(
        vm_id: *const u8,
        vm_id_size: usize,
        name: *const u8,
        size: usize,
        queue: *mut u32,
    ) -> u32;
    fn proxy_enqueue_shared_queue(queue: u32, data: *const u8, size: usize) -> u32;
    fn proxy_dequeue_shared_queue(queue: u32, data: *mut *mut u8, size: *mut usize) -> u32;
    fn proxy_define_metric(kind: u32, name: *const u8, size: usize, id: *mut u32) -> u32;
    fn proxy_increment_metric(id: u32, delta: i64) -> u32;
    fn proxy_record_metric(id: u32, value: u64) -> u32;
    fn proxy_get_metric(id: u32, value: *mut u64) -> u32;
    fn proxy_grpc_stream(
        target: *const u8,
        target_size: usize,
        service: *const u8,
        service_size: usize,
        method: *const u8,
        method_size: usize,
        metadata: *const u8,
        metadata_size: usize,
        token: *mut u32,
    ) -> u32;
    fn proxy_grpc_send(token: u32, data: *const u8, size: usize, end: u32) -> u32;
    fn proxy_grpc_close(token: u32) -> u32;
    fn proxy_grpc_cancel(token: u32) -> u32;
}

#[link(wasm_import_module = "wasi_snapshot_preview1")]
unsafe extern "C" {
    fn clock_time_get(clock: u32, precision: u64, time: *mut u64) -> u32;
    fn random_get(data: *mut u8, size: usize) -> u32;
}

/// Envoy.
struct Envoy;

/// Runs a call that returns bytes, which Envoy allocates by [`malloc`]. Null stands for no bytes.
fn bytes(call: impl FnOnce(*mut *mut u8, *mut usize) -> u32) -> Option<Vec<u8>> {
    let (mut data, mut size) = (null_mut(), 0);
    if call(&raw mut data, &raw mut size) != OK {
        return None;
    }
    if data.is_null() {
        return Some(Vec::new());
    }
    // SAFETY: `data` came from `malloc` below with exactly `size` bytes, all written by Envoy.
    Some(unsafe { Vec::from_raw_parts(data, size, size) })
}

// SAFETY for all calls below: pointers and sizes come from live Rust values, and Envoy reads or
// writes only within them during the call.
impl Host for Envoy {
    fn log(&self, level: Level, message: &str) {
        unsafe { proxy_log(level as u32, message.as_ptr(), message.len()) };
    }

    fn now_ns(&self) -> u64 {
        let mut time = 0;
        unsafe { clock_time_get(MONOTONIC, 0, &raw mut time) };
        time
    }

    fn unix_ns(&self) -> u64 {
        let mut time = 0;
        unsafe { proxy_get_current_time_nanoseconds(&raw mut time) };
        time
    }

    fn random(&self) -> u64 {
        let mut random = [0; 8];
        unsafe { random_get(random.as_mut_ptr(), random.len()) };
        u64::from_le_bytes(random)
    }

    fn set_tick_ms(&self, period: u32) {
        unsafe { proxy_set_tick_period_milliseconds(period) };
    }

    fn configuration(&self) -> Vec<u8> {
        let call = |data, size| unsafe {
            proxy_get_buffer_bytes(PLUGIN_CONFIGURATION, 0, usize::MAX, data, size)
        };
        bytes(call).unwrap_or_default()
    }

    fn property(&self, path: &[u8]) -> Option<Vec<u8>> {
        bytes(|data, size| unsafe { proxy_get_property(path.as_ptr(), path.len(), data, size) })
    }

    fn enter(&self, context: u32) -> bool {
        unsafe { proxy_set_effective_context(context) == OK }
    }

    fn shared(&self, key: &[u8]) -> Option<Shared> {
        let mut version = 0;
        let call = |data, size| unsafe {
            proxy_get_shared_data(key.as_ptr(), key.len(), data, size, &raw mut version)
        };
        let bytes = bytes(call)?;
        Some(Shared { bytes, version })
    }

    fn set_shared(&self, key: &[u8], value: &[u8], expect: Expect) -> bool {
        let version = match expect {
            Expect::Anything => 0,
            Expect::Nothing => NO_VERSION,
            Expect::Version(version) => version,
        };
        unsafe {
            proxy_set_shared_data(
                key.as_ptr(),
                key.len(),
                value.as_ptr(),
                value.len(),
                version,
            ) == OK
        }
    }

    fn register_queue(&self, name: &str) -> Option<Queue> {
        let mut queue = 0;
        let status =
            unsafe { proxy_register_shared_queue(name.as_ptr(), name.len(), &raw mut queue) };
        (status == OK).then_some(Queue(queue))
    }

    fn resolve_queue(&self, name: &str) -> Option<Queue> {
        let vm_id = self.property(b"plugin_vm_id").unwrap_or_default();
        let mut queue = 0;
        let status = unsafe {
            proxy_resolve_shared_queue(
                vm_id.as_ptr(),
                vm_id.len(),
                name.as_ptr(),
                name.len(),
                &raw mut queue,
            )
        };
        (status == OK).then_some(Queue(queue))
    }

    fn enqueue(&self, queue: Queue, item: &[u8]) -> bool {
        unsafe { proxy_enqueue_shared_queue(queue.0, item.as_ptr(), item.len()) == OK }
    }

    fn dequeue(&self, queue: Queue) -> Option<Vec<u8>> {
        bytes(|data, size| unsafe { proxy_dequeue_shared_queue(queue.0, data, size) })
    }

    fn header(&self, map: Headers, name: &str) -> Option<Vec<u8>> {
        bytes(|data, size| unsafe {
            proxy_get_header_map_value(map as u32, name.as_ptr(), name.len(), data, size)
        })
    }

    fn set_header(&self, map: Headers, name: &str, value: &[u8]) -> bool {
        unsafe {
            proxy_replace_header_map_value(
                map as u32,
                name.as_ptr(),
                name.len(),
                value.as_ptr(),
                value.len(),
            ) == OK
        }
    }

    fn remove_header(&self, map: Headers, name: &str) -> bool {
        unsafe { proxy_remove_header_map_value(map as u32, name.as_ptr(), name.len()) == OK }
    }

    fn body(&self, start: usize, size: usize) -> Vec<u8> {
        let call =
            |data, len| unsafe { proxy_get_buffer_bytes(REQUEST_BODY, start, size, data, len) };
        bytes(call).unwrap_or_default()
    }

    fn resume_request(&self) -> bool {
        unsafe { proxy_continue_stream(REQUEST_STREAM) == OK }
    }

    fn define(&self, kind: MetricKind, name: &str) -> Option<MetricId> {
        let mut id = 0;
        let status =
            unsafe { proxy_define_metric(kind as u32, name.as_ptr(), name.len(), &raw mut id) };
        (status == OK).then_some(MetricId(id))
    }

    fn add(&self, metric: MetricId, delta: i64) -> bool {
        unsafe { proxy_increment_metric(metric.0, delta) == OK }
    }

    fn record(&self, metric: MetricId, value: u64) -> bool {
        unsafe { proxy_record_metric(metric.0, value) == OK }
    }

    fn metric(&self, metric: MetricId) -> Option<u64> {
        let mut value = 0;
        let status = unsafe { proxy_get_metric(metric.0, &raw mut value) };
        (status == OK).then_some(value)
    }

    fn open_stream(&self, cluster: &str, service: &str, method: &str) -> Option<Token> {
        let target = grpc_service(cluster)?;
        // An empty map: the number of pairs.
        let metadata = [0; 4];
        let mut token = 0;
        let status = unsafe {
            proxy_grpc_stream(
                target.as_ptr(),
                target.len(),
                service.as_ptr(),
                service.len(),
                method.as_ptr(),
                method.len(),
                metadata.as_ptr(),
                metadata.len(),
                &raw mut token,
            )
        };
        (status == OK).then_some(Token(token))
    }

    fn send(&self, stream: Token, message: &[u8]) -> bool {
        unsafe { proxy_grpc_send(stream.0, message.as_ptr(), message.len(), 0) == OK }
    }

    fn message(&self, size: usize) -> Vec<u8> {
        let call = |data, len| unsafe { proxy_get_buffer_bytes(GRPC_MESSAGE, 0, size, data, len) };
        bytes(call).unwrap_or_default()
    }

    fn close_stream(&self, stream: Token) {
        unsafe { proxy_grpc_close(stream.0) };
    }

    fn reset_stream(&self, stream: Token) {
        unsafe { proxy_grpc_cancel(stream.0) };
    }
}

/// `GrpcService { envoy_grpc { cluster_name } }` as protobuf; `None` for a name whose lengths
/// don't fit one byte.
fn grpc_service(cluster: &str) -> Option<Vec<u8>> {
    const FIELD_1: u8 = 0x0a;
    let name = u8::try_from(cluster.len()).ok().filter(|len| *len < 126)?;
    let mut target = vec![FIELD_1, name + 2, FIELD_1, name];
    target.extend(cluster.as_bytes());
    Some(target)
}

/// Streams closed during a call of ours to Envoy that are not yet handled, at most.
const MAX_CLOSED: usize = 64;

thread_local! {
    static VM: RefCell<Vm<Envoy>> = RefCell::new(Vm::new(Envoy));
    /// Streams that Envoy closed while it was executing a call of ours; told at the next tick.
    static CLOSED: RefCell<Vec<Token>> = const { RefCell::new(Vec::new()) };
}

/// Runs a callback; `otherwise` if Envoy called back during a call of ours.
fn vm<R>(otherwise: R, callback: impl FnOnce(&mut Vm<Envoy>) -> R) -> R {
    VM.with(|vm| match vm.try_borrow_mut() {
        Ok(mut vm) => callback(&mut vm),
        Err(_) => otherwise,
    })
}

fn closed_meanwhile() -> Vec<Token> {
    CLOSED.with(|closed| {
        closed
            .try_borrow_mut()
            .map_or_else(|_| Vec::new(), |mut c| std::mem::take(&mut *c))
    })
}

#[unsafe(no_mangle)]
extern "C" fn proxy_abi_version_0_2_1() {}

#[unsafe(no_mangle)]
extern "C" fn _initialize() {
    std::panic::set_hook(Box::new(|info| {
        Envoy.log(Level::Critical, &info.to_string());
    }));
}

/// Memory that Envoy puts bytes into for us. A failure makes its call fail.
#[unsafe(no_mangle)]
extern "C" fn malloc(size: usize) -> *mut u8 {
    match Layout::array::<u8>(size) {
        // SAFETY: the layout is not empty.
        Ok(layout) if size > 0 => unsafe { std::alloc::alloc(layout) },
        _ => null_mut(),
    }
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_context_create(context: u32, root: u32) {
    vm((), |vm| vm.on_create(context, root));
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_vm_start(_root: u32, _size: usize) -> u32 {
    u32::from(vm(false, Vm::on_start))
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_configure(root: u32, _size: usize) -> u32 {
    u32::from(vm(false, |vm| vm.on_configure(root)))
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_tick(root: u32) {
    vm((), |vm| {
        for token in closed_meanwhile() {
            vm.on_stream_close(token);
        }
        vm.on_tick(root);
    });
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_queue_ready(root: u32, queue: u32) {
    vm((), |vm| vm.on_queue_ready(root, Queue(queue)));
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_grpc_receive(root: u32, token: u32, size: usize) {
    vm((), |vm| vm.on_stream_message(root, Token(token), size));
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_grpc_close(_root: u32, token: u32, _status: u32) {
    let handled = vm(false, |vm| {
        vm.on_stream_close(Token(token));
        true
    });
    if !handled {
        CLOSED.with(|closed| {
            if let Ok(mut closed) = closed.try_borrow_mut()
                && closed.len() < MAX_CLOSED
            {
                closed.push(Token(token));
            }
        });
    }
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_request_headers(context: u32, _count: u32, end: u32) -> u32 {
    vm(Action::Continue, |vm| {
        vm.on_request_headers(context, end != 0)
    }) as u32
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_request_body(context: u32, size: usize, end: u32) -> u32 {
    vm(Action::Continue, |vm| {
        vm.on_request_body(context, size, end != 0)
    }) as u32
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_request_trailers(context: u32, _count: u32) -> u32 {
    vm(Action::Continue, |vm| vm.on_request_trailers(context)) as u32
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_response_headers(context: u32, _count: u32, _end: u32) -> u32 {
    vm((), |vm| vm.on_response_headers(context));
    Action::Continue as u32
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_response_body(context: u32, size: usize, _end: u32) -> u32 {
    vm((), |vm| vm.on_response_body(context, size));
    Action::Continue as u32
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_done(context: u32) -> u32 {
    vm((), |vm| vm.on_done(context));
    1
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_log(context: u32) {
    vm((), |vm| vm.on_log(context));
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_delete(context: u32) {
    vm((), |vm| vm.on_delete(context));
}
