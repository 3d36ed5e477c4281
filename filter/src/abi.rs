//! Envoy's functions of the Proxy-Wasm ABI 0.2.1 that the SDK's wrappers would not do for. The only
//! unsafe code of the filter.
//!
//! Each of those wrappers panics on a status it does not expect, and a panic takes the thread's
//! filter down; here any status but `OK` is `None` or `false`. Besides:
//!
//! - Shared data: the SDK's keys are strings; the filter's are bytes.
//! - Properties: the SDK builds the path from a list at each call.
//! - Clocks and randomness: the SDK has neither a monotonic clock nor random bits.
//! - Shared queues: registering and resolving, as the rest, the status only.
//! - Log, tick, buffers, header maps, effective context, resumption, local replies, metrics, and a stream's
//!   messages, close and cancel: the status only. Envoy gives unexpected ones where headers or a
//!   body are gone already, and for functions that `capability_restriction_config` leaves out.
//!
//! A stream is opened and a call made by the SDK, whose dispatcher has to know the token; see
//! [`Host::open_stream`] and [`Host::call`].

#![allow(unsafe_code)]

use std::ptr::null_mut;
use std::time::Duration;

use proxy_wasm::hostcalls;
use proxy_wasm::types::{BufferType, StreamType};

use crate::header_map::{self, HeaderMap};
use crate::host::{
    Expect, Headers, Host, Level, Method, MetricId, MetricKind, Queue, Shared, Token,
};

const OK: u32 = 0;
const MONOTONIC: u32 = 1;

/// Header of every answer.
const JSON: (&str, &str) = ("content-type", "application/json");

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
    fn proxy_set_buffer_bytes(
        buffer: u32,
        start: usize,
        size: usize,
        data: *const u8,
        data_size: usize,
    ) -> u32;
    fn proxy_get_header_map_pairs(map: u32, data: *mut *mut u8, size: *mut usize) -> u32;
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
    fn proxy_send_local_response(
        status: u32,
        details: *const u8,
        details_size: usize,
        body: *const u8,
        body_size: usize,
        headers: *const u8,
        headers_size: usize,
        grpc_status: i32,
    ) -> u32;
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
pub(crate) struct Envoy;

/// Runs a call that returns bytes, which Envoy allocates by the SDK's `malloc`. Null stands for no bytes.
fn bytes(call: impl FnOnce(*mut *mut u8, *mut usize) -> u32) -> Option<Vec<u8>> {
    let (mut data, mut size) = (null_mut(), 0);
    if call(&raw mut data, &raw mut size) != OK {
        return None;
    }
    if data.is_null() {
        return Some(Vec::new());
    }
    // SAFETY: `data` came from the SDK's `malloc`, a boxed slice of `size` bytes, all written by Envoy.
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
            proxy_get_buffer_bytes(
                BufferType::PluginConfiguration as u32,
                0,
                usize::MAX,
                data,
                size,
            )
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

    fn headers(&self, map: Headers) -> Option<HeaderMap> {
        let pairs =
            bytes(|data, size| unsafe { proxy_get_header_map_pairs(map as u32, data, size) });
        pairs.map(HeaderMap::new)
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
        let body = BufferType::HttpRequestBody as u32;
        let call = |data, len| unsafe { proxy_get_buffer_bytes(body, start, size, data, len) };
        bytes(call).unwrap_or_default()
    }

    fn replace_body(&self, size: usize, body: &[u8]) -> bool {
        let buffer = BufferType::HttpRequestBody as u32;
        unsafe { proxy_set_buffer_bytes(buffer, 0, size, body.as_ptr(), body.len()) == OK }
    }

    fn answer(&self, start: usize, size: usize) -> Vec<u8> {
        let body = BufferType::HttpResponseBody as u32;
        let call = |data, len| unsafe { proxy_get_buffer_bytes(body, start, size, data, len) };
        bytes(call).unwrap_or_default()
    }

    fn reply(&self, status: u32, headers: &[(&str, &str)], json: &[u8]) -> bool {
        const NO_GRPC_STATUS: i32 = -1;
        let headers = header_map::encode([JSON].into_iter().chain(headers.iter().copied()));
        let details = b"refused_by_kv_router";
        unsafe {
            proxy_send_local_response(
                status,
                details.as_ptr(),
                details.len(),
                json.as_ptr(),
                json.len(),
                headers.as_ptr(),
                headers.len(),
                NO_GRPC_STATUS,
            ) == OK
        }
    }

    fn resume_request(&self) -> bool {
        unsafe { proxy_continue_stream(StreamType::HttpRequest as u32) == OK }
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
        let token = hostcalls::open_grpc_stream(&target, service, method, Vec::new());
        token.ok().map(Token)
    }

    fn call(
        &self,
        cluster: &str,
        method: Method,
        message: &[u8],
        timeout_ms: u64,
    ) -> Option<Token> {
        let target = grpc_service(cluster)?;
        let token = hostcalls::dispatch_grpc_call(
            &target,
            method.service,
            method.method,
            Vec::new(),
            Some(message),
            Duration::from_millis(timeout_ms),
        );
        token.ok().map(Token)
    }

    fn send(&self, stream: Token, message: &[u8]) -> bool {
        unsafe { proxy_grpc_send(stream.0, message.as_ptr(), message.len(), 0) == OK }
    }

    fn message(&self, size: usize) -> Vec<u8> {
        let message = BufferType::GrpcReceiveBuffer as u32;
        let call = |data, len| unsafe { proxy_get_buffer_bytes(message, 0, size, data, len) };
        bytes(call).unwrap_or_default()
    }

    fn close_stream(&self, stream: Token) {
        unsafe { proxy_grpc_close(stream.0) };
    }

    fn reset_stream(&self, stream: Token) {
        unsafe { proxy_grpc_cancel(stream.0) };
    }
}

/// `GrpcService { envoy_grpc { cluster_name } }` as protobuf, which is text as long as its lengths
/// are below 128; `None` for a longer name.
fn grpc_service(cluster: &str) -> Option<String> {
    const FIELD_1: char = '\n';
    let name = u8::try_from(cluster.len()).ok().filter(|len| *len < 126)?;
    let (service, name) = (char::from(name + 2), char::from(name));
    Some(format!("{FIELD_1}{service}{FIELD_1}{name}{cluster}"))
}
