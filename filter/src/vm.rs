//! One VM and the callbacks that Envoy makes into it.

use std::collections::BTreeMap;
use std::rc::Rc;

use hashbrown::HashMap;
use kv_core::key;
use kv_core::queue::Verdict;

use crate::bookings::Bookings;
use crate::bridge::{Bridge, Identity, stamp_idle};
use crate::choose::Chooser;
use crate::config::Config;
use crate::fleet::Fleet;
use crate::host::{Expect, Host, Level, Queue, Token};
use crate::inquiries::{Inquiries, Waiter};
use crate::lanes::Lanes;
use crate::metrics::{Event, Fault, Metrics};
use crate::request::Request;
use crate::text::Way;
use crate::waiting::{self, Waiting};
use crate::watchdog::Watchdog;
use crate::world::World;

/// What a callback tells Envoy to do with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send on.
    Continue,
    /// Keep.
    Pause,
}

/// What the requests of a VM share.
pub struct Router<H> {
    /// Envoy.
    pub host: H,
    /// Its metrics.
    pub metrics: Metrics,
    /// The published state.
    pub world: World,
    /// Load gauges.
    pub lanes: Lanes,
    /// What its requests have booked.
    pub bookings: Bookings,
    /// Chooses workers.
    pub chooser: Chooser,
    /// Whether requests may be held.
    pub watchdog: Watchdog,
    /// Requests that wait for a worker to have room.
    pub waiting: Waiting,
    /// Questions about texts that are under way.
    pub inquiries: Inquiries,
    /// Envoy cluster of the sidecar.
    pub cluster: String,
}

impl<H: Host> Router<H> {
    /// The worker table as of the last tick or decision, or as it is where there was none.
    pub fn fleet(&mut self, now_ns: u64) -> Option<Rc<Fleet>> {
        self.world.fleet().or_else(|| {
            self.refresh(now_ns);
            self.world.fleet()
        })
    }

    /// Brings the published state up to date.
    pub fn refresh(&mut self, now_ns: u64) {
        let (host, metrics, lanes) = (&self.host, &mut self.metrics, &mut self.lanes);
        let replaced = self.world.refresh(host, metrics, lanes, now_ns);
        if let Some(before) = replaced
            && let Some(fleet) = self.world.fleet()
        {
            self.bookings.follow(&before.table, &fleet.table);
        }
        let loads = self.world.loads();
        self.bookings
            .set_alone(loads.as_ref().is_some_and(|loads| loads.is_alone));
        let waits_elsewhere = loads.is_some_and(|loads| loads.backlogs.iter().any(|c| *c != 0));
        self.bookings
            .set_awaited(waits_elsewhere || !self.waiting.is_empty());
    }
}

impl<H: Host> Router<H> {
    /// Takes out of the lanes what the sidecar says is nobody's, once. The number that is kept
    /// outlives this VM; should it be done twice all the same, the sidecar asks for the reverse.
    fn write_off(&mut self, fleet: &Fleet) {
        let Some(loads) = self.world.loads() else {
            return;
        };
        let write_off = &loads.write_off;
        let number = write_off.number.to_le_bytes();
        let is_done = || {
            self.host
                .shared(&key::WRITTEN_OFF)
                .is_some_and(|w| w.bytes == number)
        };
        if write_off.sums.is_empty() || is_done() {
            return;
        }
        self.host
            .set_shared(&key::WRITTEN_OFF, &number, Expect::Anything);
        let (host, metrics) = (&self.host, &mut self.metrics);
        let place = |owner| fleet.place_of(owner);
        self.bookings
            .write_off(host, metrics, &write_off.sums, place);
        let owners = write_off.sums.len();
        host.log(
            Level::Warn,
            &format!("taken out of the lanes of {owners} owners what filters that ended had left"),
        );
    }
}

/// One VM: of an Envoy worker thread, of the main thread, or the canary that only checks the
/// configuration.
pub struct Vm<H> {
    router: Router<H>,
    identity: Option<Identity>,
    /// By context id, which grows: the last configured one is in charge, older ones are draining.
    roots: BTreeMap<u32, Option<Bridge>>,
    requests: HashMap<u32, Request>,
    /// Whether this VM has ever carried traffic.
    busy: bool,
}

impl<H: Host> Vm<H> {
    /// A VM before its first callback.
    #[must_use]
    pub fn new(host: H) -> Self {
        let seed = host.random();
        Self {
            router: Router {
                host,
                metrics: Metrics::default(),
                world: World::default(),
                lanes: Lanes::default(),
                bookings: Bookings::default(),
                chooser: Chooser::new(seed),
                watchdog: Watchdog::default(),
                waiting: Waiting::default(),
                inquiries: Inquiries::default(),
                cluster: String::new(),
            },
            identity: None,
            roots: BTreeMap::new(),
            requests: HashMap::new(),
            busy: false,
        }
    }

    /// A context comes to be: a root context where `root` is 0, else a request of that root.
    pub fn on_create(&mut self, context: u32, root: u32) {
        if root == 0 {
            self.roots.insert(context, None);
        } else {
            self.busy = true;
            self.requests.insert(context, Request::new(context, root));
        }
    }

    /// The VM starts. Called for each root context.
    pub fn on_start(&mut self) -> bool {
        let host = &self.router.host;
        let identity = self.identity.get_or_insert_with(|| Identity::seed(host));
        self.router.bookings.set_vm(identity.vm);
        self.router.waiting.mailbox.set_vm(identity.vm);
        true
    }

    /// A root context gets its configuration; `false` refuses it. Also called in a canary, so
    /// nothing outside this VM changes here.
    pub fn on_configure(&mut self, root: u32) -> bool {
        let host = &self.router.host;
        let config = match Config::parse(&host.configuration()) {
            Ok(config) => config,
            Err(fault) => {
                host.log(Level::Error, &format!("plugin configuration: {fault}"));
                return false;
            }
        };
        let Some(identity) = self.identity else {
            return false;
        };
        host.set_tick_ms(config.tick_ms);
        let bridge = Bridge::new(identity, root, &config);
        self.router.cluster = config.sidecar_cluster;
        self.roots.insert(root, Some(bridge));
        self.router.bookings.stay();
        true
    }

    /// Time has passed.
    pub fn on_tick(&mut self, root: u32) {
        let router = &mut self.router;
        let mut configured = self
            .roots
            .iter()
            .rev()
            .filter(|(_, bridge)| bridge.is_some());
        let newest = configured.next().map(|(id, _)| *id);
        let Some(Some(bridge)) = self.roots.get_mut(&root) else {
            return;
        };
        if newest != Some(root) {
            bridge.step_aside(&router.host);
            router.inquiries.step_aside(&router.host, root);
            return;
        }
        let now_ns = router.host.now_ns();
        if !self.busy {
            stamp_idle(&router.host, now_ns);
        }
        bridge.on_tick(&router.host, &mut router.metrics, self.busy);
        #[cfg(feature = "chaos")]
        if bridge.leads() {
            crate::chaos::obey(&router.host);
        }
        router.refresh(now_ns);
        if let Some(fleet) = router.world.fleet() {
            if bridge.leads() {
                router.write_off(&fleet);
                let place = |name| fleet.places().find(|place| place.lane.name() == name);
                router.bookings.sweep(&router.host, place);
            }
            bridge.show_lanes(&router.host, &mut router.metrics, &fleet);
        }
        router.bookings.on_tick(&router.host, &mut router.metrics);
        self.check_held(root, now_ns);
        self.check_waiting(root, now_ns);
        self.check_inquiries(root);
    }

    /// Keeps the stream for questions about texts, and lets those go on that it keeps waiting.
    fn check_inquiries(&mut self, root: u32) {
        let Router {
            host,
            metrics,
            world,
            inquiries,
            cluster,
            ..
        } = &mut self.router;
        let reads = |fleet: &Fleet| fleet.table.pools.iter().any(|pool| pool.text.is_some());
        let wanted = self.busy && world.fleet().is_some_and(|fleet| reads(&fleet));
        let in_vain = inquiries.on_tick(host, metrics, (root, cluster), wanted);
        self.go_on(&in_vain);
        self.router.host.enter(root);
    }

    /// Lets requests go on whose questions nobody answers.
    fn go_on(&mut self, waiters: &[Waiter]) {
        for &waiter in waiters {
            self.tell(waiter, None);
        }
    }

    /// Tells a request what came of its question.
    fn tell(&mut self, waiter: Waiter, answer: Option<&[u8]>) {
        let Waiter { context, number } = waiter;
        if self.router.host.enter(context) {
            self.with(context, (), |request, router| {
                request.on_answer(router, Way::Stream(number), answer);
            });
        }
    }

    /// Looks after the requests that wait for a worker.
    fn check_waiting(&mut self, root: u32, now_ns: u64) {
        let router = &mut self.router;
        let queues = |fleet: &Fleet| fleet.table.pools.iter().any(|pool| pool.queue.is_some());
        if router.world.fleet().is_some_and(|fleet| queues(&fleet)) {
            router.waiting.mailbox.keep(&router.host, root, now_ns);
        }
        if router.waiting.is_empty() {
            return;
        }
        self.read_mail(root);
        let router = &mut self.router;
        let late = router.waiting.late(now_ns);
        let is_lost = router.world.is_stale() || waiting::is_lost(&router.host, now_ns);
        for ticket in late {
            self.deliver(ticket, Verdict::Late);
        }
        if is_lost {
            self.release_all();
        }
        self.router.host.enter(root);
    }

    /// Lets those who wait go on in the order of their arrival, though nobody said so.
    fn release_all(&mut self) {
        for ticket in self.router.waiting.all() {
            let Router { host, metrics, .. } = &mut self.router;
            metrics.count(host, Event::HeldReleased, 1);
            self.deliver(ticket, Verdict::Go);
        }
    }

    /// Does what the sidecar says of the requests that wait.
    fn read_mail(&mut self, root: u32) {
        for (ticket, verdict) in self.router.waiting.mailbox.take(&self.router.host) {
            self.deliver(ticket, verdict);
        }
        self.router.host.enter(root);
    }

    /// Does what is to become of a request that waits, if it does still.
    fn deliver(&mut self, ticket: u64, verdict: Verdict) {
        let Some(context) = self.router.waiting.context(ticket) else {
            return;
        };
        if self.router.host.enter(context) {
            self.with(context, (), |request, router| {
                request.on_verdict(router, verdict);
            });
        } else {
            self.router.waiting.leave(ticket);
            self.router.unqueue(ticket);
        }
    }

    /// Something has come in a queue that a root context has registered.
    pub fn on_queue_ready(&mut self, root: u32, queue: Queue) {
        if self.router.waiting.mailbox.is(queue) {
            self.read_mail(root);
            return;
        }
        let Router { host, metrics, .. } = &mut self.router;
        if let Some(Some(bridge)) = self.roots.get_mut(&root) {
            bridge.relay(host, metrics);
        }
    }

    /// A message has come on a stream of a root context.
    pub fn on_stream_message(&mut self, root: u32, token: Token, size: usize) {
        let Router {
            host,
            metrics,
            inquiries,
            ..
        } = &mut self.router;
        if inquiries.is(token) {
            let message = host.message(size);
            if let Some((waiter, answer)) = inquiries.on_message(token, &message) {
                self.tell(waiter, Some(answer));
            }
        } else if let Some(Some(bridge)) = self.roots.get_mut(&root) {
            bridge.on_message(host, metrics, token, size);
        }
    }

    /// A stream has ended. Tokens are unique within a VM.
    pub fn on_stream_close(&mut self, token: Token) {
        let Router {
            host,
            metrics,
            inquiries,
            ..
        } = &mut self.router;
        for bridge in self.roots.values_mut().flatten() {
            bridge.on_close(host, metrics, token);
        }
        let in_vain = inquiries.on_close(host, metrics, token);
        self.go_on(&in_vain);
    }

    /// A call that a root context made for a request is over: with a message of this size, or without
    /// an answer.
    pub fn on_call_over(&mut self, context: u32, token: Token, size: Option<usize>) {
        let Some(request) = self.requests.get(&context) else {
            return;
        };
        let host = &self.router.host;
        let message = size.and_then(|size| {
            let is_there = host.enter(request.root());
            is_there.then(|| host.message(size))
        });
        if host.enter(context) {
            self.with(context, (), |request, router| {
                request.on_answer(router, Way::Call(token), message.as_deref());
            });
        }
    }

    /// See [`Request::on_headers`].
    pub fn on_request_headers(&mut self, context: u32, end: bool) -> Action {
        self.with(context, Action::Continue, |request, router| {
            request.on_headers(router, end)
        })
    }

    /// See [`Request::on_body`].
    pub fn on_request_body(&mut self, context: u32, size: usize, end: bool) -> Action {
        self.with(context, Action::Continue, |request, router| {
            request.on_body(router, size, end)
        })
    }

    /// See [`Request::on_trailers`].
    pub fn on_request_trailers(&mut self, context: u32) -> Action {
        self.with(context, Action::Continue, Request::on_trailers)
    }

    /// See [`Request::on_response_headers`].
    pub fn on_response_headers(&mut self, context: u32) {
        self.with(context, (), Request::on_response_headers);
    }

    /// See [`Request::on_response_body`].
    pub fn on_response_body(&mut self, context: u32, size: usize, end: bool) {
        self.with(context, (), |request, router| {
            request.on_response_body(router, size, end);
        });
    }

    /// A context is about to end.
    pub fn on_done(&mut self, context: u32) {
        if let Some(bridge) = self.roots.get_mut(&context)
            && let Some(mut bridge) = bridge.take()
        {
            bridge.step_aside(&self.router.host);
            let Router {
                host, inquiries, ..
            } = &mut self.router;
            let in_vain = inquiries.leave(host, context);
            self.go_on(&in_vain);
            self.router.host.enter(context);
            if self.roots.values().any(Option::is_some) {
                self.router.bookings.flush(&self.router.host);
            } else {
                // Without ticks and mail nobody would let them go.
                self.release_all();
                self.router.host.enter(context);
                self.router.waiting.mailbox.leave(&self.router.host);
                self.router.bookings.leave(&self.router.host);
            }
        }
    }

    /// A request is over.
    pub fn on_log(&mut self, context: u32) {
        self.with(context, (), Request::on_over);
    }

    /// A context is gone.
    pub fn on_delete(&mut self, context: u32) {
        self.on_log(context);
        self.requests.remove(&context);
        self.roots.remove(&context);
    }

    /// Lets held requests go if their bodies can't be seen.
    fn check_held(&mut self, root: u32, now_ns: u64) {
        let router = &mut self.router;
        let held = router.watchdog.check(&router.host, now_ns);
        if !held.is_empty() {
            router.metrics.fault(&router.host, Fault::Unheld);
            router.host.log(
                Level::Error,
                "held requests get no body: allow_on_headers_stop_iteration is missing; \
                 this VM routes by load alone",
            );
        }
        for context in held {
            if let Some(request) = self.requests.get_mut(&context)
                && self.router.host.enter(context)
            {
                request.let_go(&mut self.router);
            }
        }
        self.router.host.enter(root);
    }

    fn with<R>(
        &mut self,
        context: u32,
        otherwise: R,
        callback: impl FnOnce(&mut Request, &mut Router<H>) -> R,
    ) -> R {
        let Some(request) = self.requests.get_mut(&context) else {
            return otherwise;
        };
        let result = callback(request, &mut self.router);
        self.router.bookings.settle(&self.router.host);
        result
    }
}
