//! The life of one request.
//!
//! ```text
//! Fresh -- held at headers --> Held -- end of body, trailers, too long --> Routed --> Over
//!      \                           \-- text --> Asked -- answered, late -->/
//!       \------------------ decided at headers -------------------------->/
//! ```
//!
//! Where all workers are busy, a request whose body is complete stands `InLine` before it is `Routed`,
//! until the sidecar lets it go or it is refused.
//!
//! Whatever happens, what a request booked is released when it is over, once.

mod held;
mod pool;
mod read;
mod route;
mod upstream;

use kv_core::queue::Verdict;
use kv_core::scan::Scanner;
use kv_core::surface::Surface;
use kv_core::table::Pool;

use self::held::Held;
use self::read::{Read, salt};
use crate::header_map::HeaderMap;
use crate::hold;
use crate::host::Host;
use crate::metrics::{Event, Fault, Timing};
use crate::models;
use crate::reason::Reason;
use crate::refusal::Refusal;
use crate::routed::{NO_POOL, Routed};
use crate::text::{Asked, Question, Way};
use crate::vm::{Action, Router};

/// Names the worker; read by Envoy's `override_host` policy.
pub const DESTINATION: &str = "x-gateway-destination-endpoint";
/// Names the pool; routes may match it.
pub const POOL: &str = "x-kv-pool";
/// The decision record, on responses.
pub const DECISION: &str = "x-kv-router-decision";
/// Request header with the `content-encoding` of a body that Envoy has unpacked.
pub const PACKED: &str = "x-kv-packed";

/// One request.
#[derive(Debug)]
pub struct Request {
    context: u32,
    root: u32,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Before its headers.
    Fresh,
    /// Its body is being read.
    Held(Box<Held>),
    /// The sidecar reads its prompt.
    Asked(Box<Waiting>),
    /// It waits for a worker to have room.
    InLine(Box<InLine>),
    /// On its way to a worker.
    Routed(Box<Routed>),
    /// Done with; further callbacks do nothing.
    Over,
}

/// A request whose prompt the sidecar reads.
#[derive(Debug)]
struct Waiting {
    since_ns: u64,
    /// When the last body part came.
    part_ns: u64,
    /// The API.
    surface: Surface,
    asked: Asked,
    read: Read,
}

/// A request that waits for a worker to have room.
#[derive(Debug)]
struct InLine {
    ticket: u64,
    since_ns: u64,
    /// When it began to wait.
    held_ns: u64,
    read: Read,
}

/// Whether a request may be told to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pass {
    /// It may.
    Asks,
    /// It goes on whatever the load, having waited with a ticket or not.
    Goes(Option<u64>),
}

impl Request {
    /// A request of this HTTP context, which belongs to this root context.
    #[must_use]
    pub fn new(context: u32, root: u32) -> Self {
        Self {
            context,
            root,
            state: State::Fresh,
        }
    }

    /// Its root context.
    #[must_use]
    pub fn root(&self) -> u32 {
        self.root
    }

    /// Its headers have come; `end` without a body.
    pub fn on_headers<H: Host>(&mut self, router: &mut Router<H>, end: bool) -> Action {
        #[cfg(feature = "chaos")]
        crate::chaos::order(&router.host);
        let headers = router.headers();
        match self.state {
            State::Fresh => {}
            State::Held(_) | State::Asked(_) | State::InLine(_) => return Action::Pause,
            State::Routed(_) | State::Over => return Action::Continue,
        }
        let now_ns = router.host.now_ns();
        match self.hold(router, &headers, end, now_ns) {
            Ok(held) => {
                let pool = router.named_pool(&headers, now_ns);
                let held = Held {
                    headers,
                    pool,
                    ..held
                };
                self.state = State::Held(Box::new(held));
                Action::Pause
            }
            Err(reason) => {
                let asks_for_models = end && hold::asks_for_models(&headers);
                let pool = router.named_pool(&headers, now_ns);
                let read = Read::nothing(reason, headers, pool);
                if asks_for_models {
                    return self.list(router, read, now_ns);
                }
                self.route(router, read, now_ns, now_ns, Pass::Asks)
            }
        }
    }

    /// The body has grown to `size` bytes.
    pub fn on_body<H: Host>(&mut self, router: &mut Router<H>, size: usize, end: bool) -> Action {
        let held = match &mut self.state {
            State::Held(held) => held,
            State::Asked(_) | State::InLine(_) => return Action::Pause,
            State::Fresh | State::Routed(_) | State::Over => return Action::Continue,
        };
        router.watchdog.body_seen();
        held.part_ns = router.host.now_ns();
        if size > held.body_limit {
            return self.finish(router, Some(Reason::TooLong));
        }
        held.take(router, size);
        if end {
            self.finish(router, None)
        } else {
            Action::Pause
        }
    }

    /// The question about its prompt is answered; `None` without an answer.
    pub fn on_answer<H: Host>(&mut self, router: &mut Router<H>, way: Way, message: Option<&[u8]>) {
        let State::Asked(waiting) = &self.state else {
            return;
        };
        if !waiting.asked.is(way) {
            return;
        }
        let State::Asked(waiting) = std::mem::replace(&mut self.state, State::Over) else {
            return;
        };
        let Waiting {
            since_ns,
            part_ns,
            surface,
            asked,
            mut read,
        } = *waiting;
        let now_ns = router.host.now_ns();
        router
            .metrics
            .time(&router.host, Timing::Text, asked.since_ns(), now_ns);
        let told = asked.understand(message, now_ns);
        read.reason = told.reason;
        read.tokens = told.tokens;
        read.hashes = told.hashes;
        read.families = told.families;
        if !told.ids.is_empty() {
            read.changed = router.with_ids(surface, &read, &told.ids);
        }
        if self.route(router, read, since_ns, part_ns, Pass::Asks) == Action::Continue {
            router.resume();
        }
    }

    /// What becomes of a request that waits.
    pub fn on_verdict<H: Host>(&mut self, router: &mut Router<H>, verdict: Verdict) {
        if !matches!(self.state, State::InLine(_)) {
            return;
        }
        let State::InLine(line) = std::mem::replace(&mut self.state, State::Over) else {
            return;
        };
        let InLine {
            ticket,
            since_ns,
            held_ns,
            read,
        } = *line;
        let now_ns = router.host.now_ns();
        let held = router.waiting.leave(ticket);
        router
            .metrics
            .time(&router.host, Timing::Held, held_ns, now_ns);
        let refusal = match verdict {
            Verdict::Go => None,
            Verdict::Full(full) => Some(Refusal::QueueFull(full)),
            Verdict::Late => Some(Refusal::QueueLate),
        };
        match refusal {
            None => {
                let pass = Pass::Goes(Some(ticket));
                if self.route(router, read, since_ns, now_ns, pass) == Action::Continue {
                    router.resume();
                }
            }
            Some(refusal) => {
                let fleet = router.world.fleet();
                let pools = fleet.as_ref().map(|fleet| fleet.table.pools.iter());
                let pool = pools.and_then(|mut pools| {
                    pools.find(|pool| held.is_some_and(|held| held.pool == pool.key))
                });
                let gone = Pool::default();
                self.refuse(router, pool.unwrap_or(&gone), refusal, "");
            }
        }
        router.unqueue(ticket);
    }

    /// The body is complete and trailers have come.
    pub fn on_trailers<H: Host>(&mut self, router: &mut Router<H>) -> Action {
        if let State::Held(held) = &mut self.state {
            router.watchdog.body_seen();
            held.part_ns = router.host.now_ns();
            return self.finish(router, None);
        }
        match self.state {
            State::Asked(_) | State::InLine(_) => Action::Pause,
            _ => Action::Continue,
        }
    }

    /// The body callbacks that a held request waits for don't come in this VM.
    pub fn let_go<H: Host>(&mut self, router: &mut Router<H>) {
        if let State::Held(held) = &mut self.state {
            held.part_ns = router.host.now_ns();
            if self.finish(router, Some(Reason::Unheld)) == Action::Continue {
                router.host.resume_request();
            }
        }
    }

    /// Response headers have come.
    pub fn on_response_headers<H: Host>(&mut self, router: &mut Router<H>) {
        if let State::Routed(routed) = &mut self.state {
            routed.on_response_headers(router);
        }
    }

    /// A part of the response body has come; `end` with the last one.
    pub fn on_response_body<H: Host>(&mut self, router: &mut Router<H>, size: usize, end: bool) {
        if let State::Routed(routed) = &mut self.state {
            routed.on_response_body(router, size, end);
        }
    }

    /// The request is over, whatever happened.
    pub fn on_over<H: Host>(&mut self, router: &mut Router<H>) {
        match std::mem::replace(&mut self.state, State::Over) {
            State::Routed(routed) => routed.on_over(router),
            State::Held(_) => router.watchdog.over(self.context),
            State::InLine(line) => {
                let Router { host, metrics, .. } = router;
                metrics.count(host, Event::HeldLeft, 1);
                metrics.time(host, Timing::Held, line.held_ns, host.now_ns());
                router.waiting.leave(line.ticket);
                router.unqueue(line.ticket);
            }
            // An answer that comes later finds nothing left to do.
            State::Fresh | State::Asked(_) | State::Over => {}
        }
    }

    /// Decides at the headers whether to hold the request.
    fn hold<H: Host>(
        &self,
        router: &mut Router<H>,
        headers: &HeaderMap,
        end: bool,
        now_ns: u64,
    ) -> Result<Held, Reason> {
        if end {
            return Err(Reason::Passed);
        }
        let fleet = router.fleet(now_ns).ok_or(Reason::NoTable)?;
        let settings = fleet.table.settings;
        let surface = hold::judge(headers, settings.body_limit)?;
        if !router.watchdog.hold(&router.host, self.context, now_ns) {
            return Err(Reason::Unheld);
        }
        let tokens = usize::try_from(settings.token_limit).unwrap_or(usize::MAX);
        Ok(Held {
            since_ns: now_ns,
            part_ns: now_ns,
            surface,
            body_limit: usize::try_from(settings.body_limit).unwrap_or(usize::MAX),
            token_limit: settings.token_limit,
            scanner: Scanner::of(tokens, surface.ids_key()),
            taken: 0,
            whole: true,
            headers: HeaderMap::default(),
            pool: None,
        })
    }

    /// Ends the holding of a request, by `cut` if its body was not read to the end.
    fn finish<H: Host>(&mut self, router: &mut Router<H>, cut: Option<Reason>) -> Action {
        let State::Held(held) = std::mem::replace(&mut self.state, State::Over) else {
            return Action::Continue;
        };
        router.watchdog.over(self.context);
        let Held {
            since_ns,
            part_ns,
            surface,
            ..
        } = *held;
        let is_packed = held.whole && held.headers.get(PACKED).is_some();
        let read = match cut {
            Some(reason) => held.cut(reason),
            None => held.read(&router.host),
        };
        // Envoy passes on what it could unpack, and then no more.
        let refusal = match read.reason {
            Reason::BadJson if is_packed => Some(Refusal::BodyBroken),
            Reason::TooLong if is_packed => Some(Refusal::BodyTooLong),
            _ => None,
        };
        if let Some(refusal) = refusal
            && let Some(fleet) = router.world.fleet()
            && let Some(served) = fleet.serve(read.pool.as_deref(), None)
        {
            return self.refuse(router, served.pool, refusal, "");
        }
        if read.reason == Reason::Text {
            return self.ask(router, read, surface, since_ns, part_ns);
        }
        self.route(router, read, since_ns, part_ns, Pass::Asks)
    }

    /// Has the sidecar read a prompt that is text.
    fn ask<H: Host>(
        &mut self,
        router: &mut Router<H>,
        mut read: Read,
        surface: Surface,
        since_ns: u64,
        part_ns: u64,
    ) -> Action {
        router.refresh(part_ns);
        read.hints(router);
        let question = Question {
            contexts: (self.context, self.root),
            surface,
            pool: read.pool.as_deref(),
            bytes: read.bytes,
            scan: &read.scan,
            salt: salt(read.hints.as_ref(), &read.scan.cache_salt),
        };
        if let Some(chunks) = router.chunks(&question) {
            read.reason = Reason::KvText;
            read.tokens = chunks.tokens;
            read.hashes = chunks.hashes;
            return self.route(router, read, since_ns, part_ns, Pass::Asks);
        }
        match router.ask(&question) {
            Ok(asked) => {
                self.state = State::Asked(Box::new(Waiting {
                    since_ns,
                    part_ns,
                    surface,
                    asked,
                    read,
                }));
                Action::Pause
            }
            Err(reason) => {
                read.reason = reason;
                self.route(router, read, since_ns, part_ns, Pass::Asks)
            }
        }
    }

    /// Answers with the list of models, where it is known here.
    fn list<H: Host>(&mut self, router: &mut Router<H>, read: Read, now_ns: u64) -> Action {
        let fleet = router.world.fleet();
        let Some(list) = fleet.and_then(|fleet| models::list(&fleet.table)) else {
            return self.route(router, read, now_ns, now_ns, Pass::Asks);
        };
        let Router { host, metrics, .. } = router;
        metrics.request(host, NO_POOL, Reason::Answered);
        self.state = State::Over;
        if !host.reply(200, &[], list.as_bytes()) {
            metrics.fault(host, Fault::Reply);
        }
        Action::Pause
    }
}
