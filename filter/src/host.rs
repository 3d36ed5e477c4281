//! Everything the filter asks of Envoy.
//!
//! Values are bytes, never strings: a client chooses them. No call panics or fails loudly; a
//! refusal is `None` or `false`, and callers count it.

use crate::header_map::HeaderMap;

/// Severity of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Level {
    /// Normal changes: a lease taken, a stream opened.
    Info = 2,
    /// Something works less well than it should.
    Warn = 3,
    /// Something does not work.
    Error = 4,
    /// The module is about to trap.
    Critical = 5,
}

/// Which header map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Headers {
    /// The request's.
    Request = 0,
    /// The response's.
    Response = 2,
}

/// A kind of metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MetricKind {
    /// Only grows.
    Counter = 0,
    /// Goes up and down.
    Gauge = 1,
    /// Distribution of recorded values.
    Histogram = 2,
}

/// A metric defined in this VM. The value behind it is shared by all threads of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MetricId(pub u32);

/// A gRPC stream of a root context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token(pub u32);

/// A method of a gRPC service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Method {
    /// The service.
    pub service: &'static str,
    /// The method.
    pub method: &'static str,
}

/// A queue that the VMs of one `vm_id` share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queue(pub u32);

/// A value in shared data.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shared {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Changes with every write.
    pub version: u32,
}

/// What must stand under a key for a write to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Anything or nothing.
    Anything,
    /// Nothing: the key has never been written.
    Nothing,
    /// The value of this version.
    Version(u32),
}

/// Envoy, as one VM sees it. Calls on headers, body and properties concern the context whose
/// callback is running, or the one entered by [`Host::enter`].
pub trait Host {
    /// Writes a log line.
    fn log(&self, level: Level, message: &str);
    /// Monotonic clock of the process, nanoseconds.
    fn now_ns(&self) -> u64;
    /// Wall clock, Unix nanoseconds.
    fn unix_ns(&self) -> u64;
    /// Random bits from the operating system.
    fn random(&self) -> u64;

    /// Calls `on_tick` of the current root context at this period.
    fn set_tick_ms(&self, period: u32);
    /// The plugin's configuration; only during `on_configure`.
    fn configuration(&self) -> Vec<u8>;
    /// A property, its path joined by NUL.
    fn property(&self, path: &[u8]) -> Option<Vec<u8>>;
    /// Makes a context the current one; `false` if it is gone.
    fn enter(&self, context: u32) -> bool;

    /// Reads shared data.
    fn shared(&self, key: &[u8]) -> Option<Shared>;
    /// Writes shared data; `false` if `expect` did not hold or Envoy refused.
    fn set_shared(&self, key: &[u8], value: &[u8], expect: Expect) -> bool;

    /// Makes the current root context the one that is told of arrivals in a queue. What is in the
    /// queue stays.
    fn register_queue(&self, name: &str) -> Option<Queue>;
    /// A queue that some VM has registered.
    fn resolve_queue(&self, name: &str) -> Option<Queue>;
    /// Appends to a queue.
    fn enqueue(&self, queue: Queue, item: &[u8]) -> bool;
    /// Takes the first item of a queue; `None` from an empty one.
    fn dequeue(&self, queue: Queue) -> Option<Vec<u8>>;

    /// All headers; `None` if Envoy does not tell.
    fn headers(&self, map: Headers) -> Option<HeaderMap>;
    /// First value of a header.
    fn header(&self, map: Headers, name: &str) -> Option<Vec<u8>>;
    /// Sets a header to one value.
    fn set_header(&self, map: Headers, name: &str, value: &[u8]) -> bool;
    /// Removes all values of a header.
    fn remove_header(&self, map: Headers, name: &str) -> bool;
    /// Part of the buffered request body.
    fn body(&self, start: usize, size: usize) -> Vec<u8>;
    /// Puts another request body in the place of the buffered one, which has this size.
    fn replace_body(&self, size: usize, body: &[u8]) -> bool;
    /// Part of the part of the response body that is at hand.
    fn answer(&self, start: usize, size: usize) -> Vec<u8>;
    /// Lets a held request go on.
    fn resume_request(&self) -> bool;
    /// Answers a request with JSON and these headers besides, instead of sending it on. Its callback
    /// must pause it.
    fn reply(&self, status: u32, headers: &[(&str, &str)], json: &[u8]) -> bool;

    /// Defines a metric.
    fn define(&self, kind: MetricKind, name: &str) -> Option<MetricId>;
    /// Adds to a counter or gauge. Gauges are 64-bit and wrap.
    fn add(&self, metric: MetricId, delta: i64) -> bool;
    /// Sets a gauge, or records a value in a histogram.
    fn record(&self, metric: MetricId, value: u64) -> bool;
    /// Value of a counter or gauge.
    fn metric(&self, metric: MetricId) -> Option<u64>;

    /// Opens a gRPC stream to an Envoy cluster.
    fn open_stream(&self, cluster: &str, service: &str, method: &str) -> Option<Token>;
    /// Sends a message.
    fn send(&self, stream: Token, message: &[u8]) -> bool;
    /// The message whose callback is running.
    fn message(&self, size: usize) -> Vec<u8>;
    /// Calls a method with one message each way, on behalf of the current context. The answer, or
    /// that there is none within this many milliseconds, comes by a callback of the context whose
    /// callback is running, and its message belongs to the context that called. `None` if it
    /// failed at once.
    fn call(&self, cluster: &str, method: Method, message: &[u8], timeout_ms: u64)
    -> Option<Token>;
    /// Forgets a stream that the other side has closed.
    fn close_stream(&self, stream: Token);
    /// Resets a stream. Not during a callback of that stream, whose remaining messages Envoy would
    /// deliver to freed memory.
    fn reset_stream(&self, stream: Token);
}
