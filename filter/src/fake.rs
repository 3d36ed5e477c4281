//! Envoy for tests: VMs of one process around shared data and metrics, recording what they do.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::rc::Rc;

use crate::header_map::HeaderMap;
use crate::host::{
    Expect, Headers, Host, Level, Method, MetricId, MetricKind, Queue, Shared, Token,
};

/// One VM's Envoy. Clones are the same VM.
#[derive(Clone, Default)]
pub(crate) struct Fake {
    process: Rc<Process>,
    vm: Rc<Local>,
}

/// What the VMs of a process share.
struct Process {
    now_ns: Cell<u64>,
    random: Cell<u64>,
    shared: RefCell<HashMap<Vec<u8>, Shared>>,
    writes: Cell<u32>,
    metrics: RefCell<BTreeMap<String, u64>>,
    queues: RefCell<Vec<Line>>,
    /// Adds to a gauge by another thread, to be made before the next read of one.
    meanwhile: RefCell<VecDeque<Option<(String, i64)>>>,
}

/// A shared queue.
struct Line {
    name: String,
    /// The VM that is told of arrivals.
    told: Rc<Local>,
    items: VecDeque<Vec<u8>>,
}

#[derive(Default)]
struct Local {
    configuration: RefCell<Vec<u8>>,
    metrics: RefCell<Vec<(MetricKind, String)>>,
    contexts: RefCell<HashMap<u32, Context>>,
    gone: RefCell<HashSet<u32>>,
    current: Cell<u32>,
    streams: RefCell<Vec<Stream>>,
    no_streams: Cell<bool>,
    calls: RefCell<Vec<Call>>,
    message: RefCell<Vec<u8>>,
    log: RefCell<Vec<(Level, String)>>,
}

#[derive(Default)]
struct Context {
    request: BTreeMap<String, Vec<u8>>,
    response: BTreeMap<String, Vec<u8>>,
    body: Vec<u8>,
    /// The part of the answer that is at hand.
    answer: Vec<u8>,
    received: u64,
    resumed: u32,
    upstream: Option<(String, u64)>,
    properties: HashMap<Vec<u8>, Vec<u8>>,
    reply: Option<(u32, Vec<u8>)>,
    reply_headers: HashMap<String, String>,
}

/// A stream that a VM opened.
#[derive(Clone, Default)]
pub(crate) struct Stream {
    /// Messages sent on it.
    pub(crate) sent: Vec<Vec<u8>>,
    /// Whether it is still open.
    pub(crate) open: bool,
}

/// A call that a VM made.
#[derive(Clone)]
pub(crate) struct Call {
    /// The context on whose behalf.
    pub(crate) context: u32,
    pub(crate) message: Vec<u8>,
    pub(crate) timeout_ms: u64,
}

impl Default for Process {
    fn default() -> Self {
        Self {
            now_ns: Cell::new(1_000_000_000),
            random: Cell::new(7),
            shared: RefCell::default(),
            writes: Cell::new(0),
            metrics: RefCell::default(),
            queues: RefCell::default(),
            meanwhile: RefCell::default(),
        }
    }
}

impl Fake {
    /// Another VM of the same process.
    pub(crate) fn beside(&self) -> Self {
        Self {
            process: Rc::clone(&self.process),
            vm: Rc::default(),
        }
    }

    pub(crate) fn advance_ms(&self, ms: u64) {
        let now = &self.process.now_ns;
        now.set(now.get() + ms * 1_000_000);
    }

    pub(crate) fn configure(&self, json: &[u8]) {
        *self.vm.configuration.borrow_mut() = json.to_vec();
    }

    /// Sets a request header of the current context as the client would; empty removes it.
    pub(crate) fn client_header(&self, name: &str, value: &[u8]) {
        self.context(|context| {
            if value.is_empty() {
                context.request.remove(name);
            } else {
                context.request.insert(name.to_owned(), value.to_vec());
            }
        });
    }

    /// Receives bytes of the current request's body.
    pub(crate) fn receive(&self, part: &[u8]) -> usize {
        self.context(|context| {
            context.body.extend(part);
            context.received += part.len() as u64;
            context.body.len()
        })
    }

    /// Receives a part of the current request's answer.
    pub(crate) fn answered(&self, part: &[u8]) -> usize {
        self.context(|context| context.answer = part.to_vec());
        part.len()
    }

    /// The value of a header as text.
    pub(crate) fn text(&self, map: Headers, name: &str) -> Option<String> {
        let value = self.header(map, name)?;
        Some(String::from_utf8(value).unwrap())
    }

    /// The current request has reached this worker, at this attempt.
    pub(crate) fn reach(&self, address: &str, attempt: u64) {
        self.context(|context| context.upstream = Some((address.to_owned(), attempt)));
    }

    /// Sets a property of the current context.
    pub(crate) fn say(&self, path: &[u8], value: &[u8]) {
        self.context(|context| context.properties.insert(path.to_vec(), value.to_vec()));
    }

    /// Sets a header of the response of the current context as the worker would.
    pub(crate) fn worker_header(&self, name: &str, value: &[u8]) {
        self.context(|context| context.response.insert(name.to_owned(), value.to_vec()));
    }

    /// The next part of the current response's body.
    pub(crate) fn answer(&self, part: &[u8]) -> usize {
        self.context(|context| context.answer = part.to_vec());
        part.len()
    }

    /// What the current request was answered with, instead of being sent on.
    pub(crate) fn replied(&self) -> Option<(u32, Vec<u8>)> {
        self.context(|context| context.reply.clone())
    }

    /// A header of that answer.
    pub(crate) fn reply_header(&self, name: &str) -> Option<String> {
        self.context(|context| context.reply_headers.get(name).cloned())
    }

    /// Items in the queue of a name.
    pub(crate) fn queued(&self, name: &str) -> usize {
        let queues = self.process.queues.borrow();
        let queue = queues.iter().find(|queue| queue.name == name);
        queue.map_or(0, |queue| queue.items.len())
    }

    /// Whether this VM is the one that is told of arrivals in a queue.
    pub(crate) fn is_told_of(&self, name: &str) -> bool {
        let queues = self.process.queues.borrow();
        let queue = queues.iter().find(|queue| queue.name == name);
        queue.is_some_and(|queue| Rc::ptr_eq(&queue.told, &self.vm))
    }

    /// Lets another thread add to a gauge, after `reads` more reads of gauges.
    pub(crate) fn meanwhile(&self, reads: usize, name: &str, delta: i64) {
        let mut meanwhile = self.process.meanwhile.borrow_mut();
        meanwhile.extend((0..reads).map(|_| None));
        meanwhile.push_back(Some((name.to_owned(), delta)));
    }

    pub(crate) fn resumed(&self, context: u32) -> u32 {
        let contexts = self.vm.contexts.borrow();
        contexts.get(&context).map_or(0, |context| context.resumed)
    }

    /// A context that can't be entered any more.
    pub(crate) fn end(&self, context: u32) {
        self.vm.gone.borrow_mut().insert(context);
    }

    /// Lets `open_stream` fail or succeed.
    pub(crate) fn refuse_streams(&self, refuse: bool) {
        self.vm.no_streams.set(refuse);
    }

    pub(crate) fn calls(&self) -> Vec<Call> {
        self.vm.calls.borrow().clone()
    }

    pub(crate) fn streams(&self) -> Vec<Stream> {
        self.vm.streams.borrow().clone()
    }

    /// Puts a message where the next `on_stream_message` finds it.
    pub(crate) fn deliver(&self, message: &[u8]) -> usize {
        *self.vm.message.borrow_mut() = message.to_vec();
        message.len()
    }

    /// Value of a metric by name, 0 if there is none. Of a histogram the number of values.
    pub(crate) fn named(&self, name: &str) -> u64 {
        self.process
            .metrics
            .borrow()
            .get(name)
            .copied()
            .unwrap_or(0)
    }

    pub(crate) fn has_metric(&self, name: &str) -> bool {
        self.process.metrics.borrow().contains_key(name)
    }

    /// Metrics of the process whose name contains `part`, with their values.
    pub(crate) fn metrics_with(&self, part: &str) -> Vec<(String, u64)> {
        let metrics = self.process.metrics.borrow();
        let matching = metrics.iter().filter(|(name, _)| name.contains(part));
        matching
            .map(|(name, value)| (name.clone(), *value))
            .collect()
    }

    /// How often this VM has defined a metric.
    pub(crate) fn defined(&self) -> usize {
        self.vm.metrics.borrow().len()
    }

    pub(crate) fn logged(&self, level: Level) -> Vec<String> {
        let log = self.vm.log.borrow();
        let at = log.iter().filter(|(l, _)| *l == level);
        at.map(|(_, message)| message.clone()).collect()
    }

    fn context<R>(&self, with: impl FnOnce(&mut Context) -> R) -> R {
        let mut contexts = self.vm.contexts.borrow_mut();
        with(contexts.entry(self.vm.current.get()).or_default())
    }

    fn value<R>(
        &self,
        metric: MetricId,
        with: impl FnOnce(MetricKind, &mut u64) -> R,
    ) -> Option<R> {
        let metrics = self.vm.metrics.borrow();
        let (kind, name) = metrics.get(metric.0 as usize)?;
        let mut values = self.process.metrics.borrow_mut();
        Some(with(*kind, values.get_mut(name)?))
    }
}

impl Host for Fake {
    fn log(&self, level: Level, message: &str) {
        self.vm.log.borrow_mut().push((level, message.to_owned()));
    }

    fn now_ns(&self) -> u64 {
        self.process.now_ns.get()
    }

    fn unix_ns(&self) -> u64 {
        1_700_000_000_000_000_000 + self.now_ns()
    }

    fn random(&self) -> u64 {
        let random = self
            .process
            .random
            .get()
            .wrapping_mul(0x9E37_79B9_7F4A_7C15)
            + 1;
        self.process.random.set(random);
        random
    }

    fn set_tick_ms(&self, _period: u32) {}

    fn configuration(&self) -> Vec<u8> {
        self.vm.configuration.borrow().clone()
    }

    fn property(&self, path: &[u8]) -> Option<Vec<u8>> {
        match path {
            b"plugin_vm_id" => Some(b"kv-router".to_vec()),
            b"request\0total_size" => {
                let received = self.context(|context| context.received);
                Some((200 + received).to_le_bytes().to_vec())
            }
            b"upstream\0address" => {
                let upstream = self.context(|context| context.upstream.clone());
                upstream.map(|(address, _)| address.into_bytes())
            }
            b"upstream\0request_attempt_count" => {
                let upstream = self.context(|context| context.upstream.clone());
                upstream.map(|(_, attempt)| attempt.to_le_bytes().to_vec())
            }
            _ => self.context(|context| context.properties.get(path).cloned()),
        }
    }

    fn enter(&self, context: u32) -> bool {
        let there = !self.vm.gone.borrow().contains(&context);
        if there {
            self.vm.current.set(context);
        }
        there
    }

    fn shared(&self, key: &[u8]) -> Option<Shared> {
        self.process.shared.borrow().get(key).cloned()
    }

    fn set_shared(&self, key: &[u8], value: &[u8], expect: Expect) -> bool {
        let mut shared = self.process.shared.borrow_mut();
        let fits = match (expect, shared.get(key)) {
            (Expect::Version(wanted), Some(there)) => wanted == there.version,
            (Expect::Nothing, there) => there.is_none(),
            (Expect::Anything | Expect::Version(_), _) => true,
        };
        if fits {
            self.process.writes.set(self.process.writes.get() + 1);
            let value = Shared {
                bytes: value.to_vec(),
                version: self.process.writes.get(),
            };
            shared.insert(key.to_vec(), value);
        }
        fits
    }

    fn register_queue(&self, name: &str) -> Option<Queue> {
        let mut queues = self.process.queues.borrow_mut();
        let told = Rc::clone(&self.vm);
        let at = queues.iter().position(|queue| queue.name == name);
        if let Some(at) = at {
            queues[at].told = told;
        } else {
            queues.push(Line {
                name: name.to_owned(),
                told,
                items: VecDeque::new(),
            });
        }
        let at = at.unwrap_or(queues.len() - 1);
        Some(Queue(u32::try_from(at).unwrap()))
    }

    fn resolve_queue(&self, name: &str) -> Option<Queue> {
        let queues = self.process.queues.borrow();
        let at = queues.iter().position(|queue| queue.name == name)?;
        Some(Queue(u32::try_from(at).unwrap()))
    }

    fn enqueue(&self, queue: Queue, item: &[u8]) -> bool {
        let mut queues = self.process.queues.borrow_mut();
        queues[queue.0 as usize].items.push_back(item.to_vec());
        true
    }

    fn dequeue(&self, queue: Queue) -> Option<Vec<u8>> {
        self.process.queues.borrow_mut()[queue.0 as usize]
            .items
            .pop_front()
    }

    fn headers(&self, map: Headers) -> Option<HeaderMap> {
        self.context(|context| {
            let headers = match map {
                Headers::Request => &context.request,
                Headers::Response => &context.response,
            };
            let size = |len: usize| u32::try_from(len).unwrap().to_le_bytes();
            let mut bytes = size(headers.len()).to_vec();
            for (name, value) in headers {
                bytes.extend([size(name.len()), size(value.len())].concat());
            }
            for (name, value) in headers {
                bytes.extend([name.as_bytes(), value, b""].join(&0));
            }
            Some(HeaderMap::new(bytes))
        })
    }

    fn header(&self, map: Headers, name: &str) -> Option<Vec<u8>> {
        self.context(|context| match map {
            Headers::Request => context.request.get(name).cloned(),
            Headers::Response => context.response.get(name).cloned(),
        })
    }

    fn set_header(&self, map: Headers, name: &str, value: &[u8]) -> bool {
        self.context(|context| match map {
            Headers::Request => context.request.insert(name.to_owned(), value.to_vec()),
            Headers::Response => context.response.insert(name.to_owned(), value.to_vec()),
        });
        true
    }

    fn remove_header(&self, map: Headers, name: &str) -> bool {
        self.context(|context| match map {
            Headers::Request => context.request.remove(name),
            Headers::Response => context.response.remove(name),
        });
        true
    }

    fn body(&self, start: usize, size: usize) -> Vec<u8> {
        self.context(|context| {
            let rest = context.body.get(start..).unwrap_or_default();
            rest[..size.min(rest.len())].to_vec()
        })
    }

    fn replace_body(&self, size: usize, body: &[u8]) -> bool {
        self.context(|context| {
            assert_eq!(context.body.len(), size);
            context.body = body.to_vec();
        });
        true
    }

    fn answer(&self, start: usize, size: usize) -> Vec<u8> {
        self.context(|context| {
            let rest = context.answer.get(start..).unwrap_or_default();
            rest[..size.min(rest.len())].to_vec()
        })
    }

    fn reply(&self, status: u32, headers: &[(&str, &str)], json: &[u8]) -> bool {
        let headers = headers.iter().map(|(n, v)| (n.to_string(), v.to_string()));
        self.context(|context| {
            context.reply = Some((status, json.to_vec()));
            context.reply_headers = headers.collect();
        });
        true
    }

    fn resume_request(&self) -> bool {
        self.context(|context| context.resumed += 1);
        true
    }

    fn define(&self, kind: MetricKind, name: &str) -> Option<MetricId> {
        let mut metrics = self.vm.metrics.borrow_mut();
        metrics.push((kind, name.to_owned()));
        let mut values = self.process.metrics.borrow_mut();
        values.entry(name.to_owned()).or_default();
        Some(MetricId(u32::try_from(metrics.len() - 1).unwrap()))
    }

    fn add(&self, metric: MetricId, delta: i64) -> bool {
        let added = self.value(metric, |kind, value| {
            assert!(kind == MetricKind::Gauge || delta > 0, "counters only grow");
            *value = value.wrapping_add_signed(delta);
        });
        added.is_some()
    }

    fn record(&self, metric: MetricId, value: u64) -> bool {
        let recorded = self.value(metric, |kind, now| match kind {
            MetricKind::Gauge => *now = value,
            MetricKind::Counter => *now += value,
            MetricKind::Histogram => *now += 1,
        });
        recorded.is_some()
    }

    fn metric(&self, metric: MetricId) -> Option<u64> {
        let meanwhile = self.process.meanwhile.borrow_mut().pop_front();
        if let Some(Some((name, delta))) = meanwhile
            && let Some(value) = self.process.metrics.borrow_mut().get_mut(&name)
        {
            *value = value.wrapping_add_signed(delta);
        }
        self.value(metric, |_, value| *value)
    }

    fn open_stream(&self, cluster: &str, _service: &str, _method: &str) -> Option<Token> {
        assert_eq!(cluster, "kv_router_sidecar");
        if self.vm.no_streams.get() {
            return None;
        }
        let mut streams = self.vm.streams.borrow_mut();
        streams.push(Stream {
            open: true,
            ..Stream::default()
        });
        Some(Token(u32::try_from(streams.len() - 1).unwrap()))
    }

    fn call(
        &self,
        cluster: &str,
        _method: Method,
        message: &[u8],
        timeout_ms: u64,
    ) -> Option<Token> {
        assert_eq!(cluster, "kv_router_sidecar");
        if self.vm.no_streams.get() {
            return None;
        }
        let mut calls = self.vm.calls.borrow_mut();
        calls.push(Call {
            context: self.vm.current.get(),
            message: message.to_vec(),
            timeout_ms,
        });
        Some(Token(1_000 + u32::try_from(calls.len()).unwrap()))
    }

    fn send(&self, stream: Token, message: &[u8]) -> bool {
        let mut streams = self.vm.streams.borrow_mut();
        let stream = &mut streams[stream.0 as usize];
        stream.sent.push(message.to_vec());
        stream.open
    }

    fn message(&self, _size: usize) -> Vec<u8> {
        self.vm.message.borrow().clone()
    }

    fn close_stream(&self, stream: Token) {
        self.vm.streams.borrow_mut()[stream.0 as usize].open = false;
    }

    fn reset_stream(&self, stream: Token) {
        self.close_stream(stream);
    }
}
