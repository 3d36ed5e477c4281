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

use std::rc::Rc;

use kv_core::holdings::Named;
use kv_core::id::DpRank;
use kv_core::policy::Mode;
use kv_core::queue::Verdict;
use kv_core::report::Queued;
use kv_core::scan::{Field, Prompt, Scan, Scanner};
use kv_core::surface::{NVEXT, Surface, TOKEN_DATA};
use kv_core::table::Pool;

use crate::choose::{Answer, Ask, Barred, Busy, Gate, Published};
use crate::fleet::Served;
use crate::header_map::HeaderMap;
use crate::hints::{self, Hints, Nvext};
use crate::hold;
use crate::host::{Headers, Host};
use crate::metrics::{Event, Fault, Miss, Timing};
use crate::models;
use crate::reason::Reason;
use crate::refusal::{self, Refusal};
use crate::routed::{NO_POOL, Routed};
use crate::text::{Asked, Question, Way};
use crate::usage;
use crate::vm::{Action, Router};
use crate::waiting;

/// Names the worker; read by Envoy's `override_host` policy.
pub const DESTINATION: &str = "x-gateway-destination-endpoint";
/// Names the pool; routes may match it.
pub const POOL: &str = "x-kv-pool";
/// The decision record, on responses.
pub const DECISION: &str = "x-kv-router-decision";
/// Request header with the `content-encoding` of a body that Envoy has unpacked.
pub const PACKED: &str = "x-kv-packed";

/// Size of the body.
const LENGTH: &str = "content-length";

/// Milliseconds after which a request that has to wait is of no use any more.
pub const DEADLINE: &str = "x-kv-router-deadline-ms";

/// Headers that only this filter may set on a request.
const OURS: [&str; 3] = [DESTINATION, POOL, DECISION];

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

#[derive(Debug)]
struct Held {
    since_ns: u64,
    /// When the body part at hand came.
    part_ns: u64,
    surface: Surface,
    body_limit: usize,
    token_limit: u32,
    scanner: Scanner,
    /// Body bytes taken.
    taken: usize,
    /// Whether Envoy handed out all bytes it announced.
    whole: bool,
    headers: HeaderMap,
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

/// What a body said about where to go.
#[derive(Debug)]
struct Read {
    reason: Reason,
    tokens: u32,
    scan: Scan,
    /// Sequence hashes of a prompt that is text.
    hashes: Vec<u64>,
    /// Its blocks in the pool's further families.
    families: Vec<Named>,
    /// Whether the body was read to its end.
    is_complete: bool,
    /// Bytes of the body that Envoy keeps.
    bytes: usize,
    /// What is to stand in the place of the body once it is routed.
    changed: Option<Vec<u8>>,
    headers: HeaderMap,
    /// The body's extensions.
    nvext: Nvext,
    /// What counts of headers and extensions, once it is known.
    hints: Option<Hints>,
}

impl Read {
    /// What counts of what the request says about its routing. Settled once, with the table as it
    /// is then.
    fn hints<H: Host>(&mut self, router: &mut Router<H>) -> &Hints {
        self.hints.get_or_insert_with(|| {
            let fleet = router.world.fleet();
            let model = self.scan.model.value().map(String::as_str);
            let served = fleet.as_ref().and_then(|fleet| fleet.serve(model));
            let pool = served.map(|served| served.pool);
            let Router { host, metrics, .. } = router;
            Hints::gather(host, metrics, pool, &self.headers, &self.nvext)
        })
    }

    /// Milliseconds after which the request is of no use any more, where it says so.
    fn deadline_ms(&self) -> Option<u64> {
        let value = self.headers.get(DEADLINE)?;
        std::str::from_utf8(value).ok()?.trim().parse().ok()
    }

    /// What answer the body asks for.
    fn answer(&self, host: &impl Host, expected: u32) -> Answer {
        match self.scan.stream {
            Field::Value(true) => Answer::Streamed {
                expected,
                tells_usage: self.wants_usage(host),
            },
            _ if self.is_complete => Answer::Whole,
            _ => Answer::Unknown,
        }
    }

    /// Whether a streamed answer is to say what it used.
    fn wants_usage(&self, host: &impl Host) -> bool {
        let place = self.scan.members.get(usage::STREAM_OPTIONS);
        place.is_some_and(|place| {
            let is_short = place.len() <= usage::MAX_STREAM_OPTIONS;
            !is_short || usage::is_asked_for(&host.body(place.start, place.len()))
        })
    }

    /// Nothing but the headers.
    fn nothing(reason: Reason, headers: HeaderMap) -> Self {
        Self {
            reason,
            tokens: 0,
            scan: Scan::default(),
            hashes: Vec::new(),
            families: Vec::new(),
            is_complete: false,
            bytes: 0,
            changed: None,
            headers,
            nvext: Nvext::default(),
            hints: None,
        }
    }
}

/// What keeps a prompt's blocks apart from others': what the hints say, else the body.
fn salt<'a>(hints: Option<&'a Hints>, body: &'a Field<String>) -> &'a str {
    let said = hints.and_then(|hints| hints.salt.as_ref());
    said.or(body.value()).map_or("", String::as_str)
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
                self.state = State::Held(Box::new(Held { headers, ..held }));
                Action::Pause
            }
            Err(_) if end && hold::asks_for_models(&headers) => self.list(router, headers, now_ns),
            Err(reason) => {
                let read = Read::nothing(reason, headers);
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
            read.changed = router.with_ids(surface, read.bytes, &read.scan, &told.ids);
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
        // A table as of the last tick will do: the decision reads it again.
        let fleet = router.world.fleet().or_else(|| {
            router.refresh(now_ns);
            router.world.fleet()
        });
        let fleet = fleet.ok_or(Reason::NoTable)?;
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
            && let Some(served) = fleet.serve(None)
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
    fn list<H: Host>(&mut self, router: &mut Router<H>, headers: HeaderMap, now_ns: u64) -> Action {
        let fleet = router.world.fleet();
        let Some(list) = fleet.and_then(|fleet| models::list(&fleet.table)) else {
            let read = Read::nothing(Reason::Passed, headers);
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

    /// Sends the request on its way, or answers it.
    fn route<H: Host>(
        &mut self,
        router: &mut Router<H>,
        mut read: Read,
        since_ns: u64,
        part_ns: u64,
        pass: Pass,
    ) -> Action {
        router.refresh(part_ns);
        read.hints(router);
        let mut hints = read.hints.take().unwrap_or_default();
        let model = read.scan.model.value().map(String::as_str);
        let fleet = router.world.fleet();
        let served = fleet.as_ref().and_then(|fleet| {
            let served = fleet.serve(model)?;
            Some((fleet, served))
        });
        let routed = match &served {
            None => Routed::nowhere(),
            Some((fleet, served)) => {
                if read.scan.model != Field::Absent && !served.known {
                    router.metrics.count(&router.host, Event::UnknownModel, 1);
                    if read.is_complete && model.is_some() {
                        let model = model.unwrap_or_default();
                        let refusal = Refusal::ModelUnknown;
                        return self.refuse(router, served.pool, refusal, model);
                    }
                }
                let answer = read.answer(&router.host, hints.expected_output);
                if served.says_adapters() {
                    served.lora.clone_into(&mut hints.constraints.lora);
                }
                let placed =
                    router.session(served, read.reason, &read.headers, &mut hints.constraints);
                let narrowed = match router.narrow(served, read.reason, &hints) {
                    Ok(narrowed) => narrowed,
                    Err(refusal) => {
                        let model = model.unwrap_or_default();
                        return self.refuse(router, served.pool, refusal, model);
                    }
                };
                let salt = salt(Some(&hints), &read.scan.cache_salt);
                let hashing = served.hashing(salt);
                let (hashes, families) = match &mut read.scan.prompt {
                    Prompt::Tokens(tokens) if read.reason == Reason::Kv => {
                        let families = served.named(tokens.ids(), salt);
                        (tokens.hashes(hashing), families)
                    }
                    // It may be routed again.
                    _ => (&read.hashes[..], read.families.clone()),
                };
                let loads = router.world.loads();
                let published = loads.as_ref().map_or(0, |l| l.backlog(served.position));
                let gate = served.pool.queue.as_ref().map(|profile| Gate {
                    profile,
                    named: hints.policy_class.as_deref().unwrap_or_default(),
                    backlog: published | router.waiting.backlog(served.pool.key),
                });
                let is_asked = pass == Pass::Asks && served.pool.policy.mode == Mode::Kv;
                let ask = Ask {
                    reason: read.reason,
                    tokens: read.tokens,
                    hashes,
                    families: &families,
                    owners: &narrowed.owners,
                    constraints: &hints.constraints,
                    session: placed.map(|(session, _)| session),
                    answer,
                    gate: gate.filter(|_| is_asked),
                };
                let published = Published {
                    index: router.world.index(part_ns),
                    loads: loads.as_ref().and_then(|l| l.pools.get(served.position)),
                };
                let choice = router.chooser.choose(
                    &router.host,
                    &mut router.metrics,
                    &mut router.bookings,
                    served,
                    &published,
                    &ask,
                );
                let choice = match choice {
                    Ok(choice) => choice,
                    Err(Barred::Overloaded) => {
                        return self.refuse(router, served.pool, Refusal::Overloaded, "");
                    }
                    Err(Barred::Busy(busy)) => {
                        read.hints = Some(hints);
                        return self.line_up(router, served, read, busy, since_ns);
                    }
                };
                let is_empty = served.pool.owners.is_empty() && served.pool.queue.is_some();
                if is_empty && read.reason != Reason::Passed {
                    return self.refuse(router, served.pool, Refusal::NoWorkers, "");
                }
                if choice.is_full {
                    let model = model.unwrap_or_default();
                    return self.refuse(router, served.pool, Refusal::WorkersFull, model);
                }
                router.place_session(served, placed, choice.owner);
                let rank = choice.owner.and_then(|owner| served.rank(owner));
                router.send_to(&served.pool.name, choice.endpoints.as_deref(), rank);
                if hints.constraints.is_strict() {
                    router.limit_retries(choice.second.is_some());
                }
                Routed::new(router, Rc::clone(fleet), served, &ask, choice)
            }
        };
        if let Pass::Goes(Some(ticket)) = pass {
            router.unqueue(ticket);
        }
        // What routing reads of the body has been read.
        if let Some(body) = &read.changed {
            router.hand_over(read.bytes, body);
        }
        let metrics = &mut router.metrics;
        metrics.request(&router.host, routed.pool(), routed.reason());
        self.state = State::Routed(Box::new(routed));
        // Part of what routing takes.
        router.bookings.settle(&router.host);
        let now_ns = router.host.now_ns();
        metrics.time(&router.host, Timing::Decision, since_ns, now_ns);
        metrics.time(&router.host, Timing::AfterBody, part_ns, now_ns);
        Action::Continue
    }

    /// Has the request wait for a worker to have room, where it can.
    fn line_up<H: Host>(
        &mut self,
        router: &mut Router<H>,
        served: &Served<'_>,
        read: Read,
        busy: Busy,
        since_ns: u64,
    ) -> Action {
        let now_ns = router.host.now_ns();
        let pool = served.pool;
        let class = pool.queue.as_ref();
        let class = class.and_then(|profile| Some((profile, profile.classes().get(busy.class)?)));
        let waiting = &mut router.waiting;
        // The table may be younger than the last tick.
        if waiting.mailbox.number().is_none() {
            waiting.mailbox.keep(&router.host, self.root, now_ns);
        }
        let mailbox = waiting.mailbox.number();
        let is_heard = !router.world.is_stale() && waiting::is_heard(&router.host);
        // What is not at hand as a whole would flow past.
        let (Some((profile, class)), Some(mailbox), true, true) =
            (class, mailbox, is_heard, read.is_complete)
        else {
            router.metrics.count(&router.host, Event::HeldBypassed, 1);
            return self.route(router, read, since_ns, now_ns, Pass::Goes(None));
        };
        if let Some(full) = class.limits.forbids() {
            return self.refuse(router, pool, Refusal::QueueFull(full), "");
        }
        if !router.waiting.has_room(&profile.bounds) {
            return self.refuse(router, pool, Refusal::HeldFull, "");
        }
        let due_ms = read.deadline_ms();
        // Whoever says how soon would go before others who do not.
        let is_trusted = due_ms.is_some() && hints::is_trusted(&router.host, Some(pool));
        let wait_ms = profile.bounds.wait_ms;
        let wait_ms = due_ms.map_or(wait_ms, |due| due.min(wait_ms));
        let ticket = router.waiting.enter(waiting::Held {
            context: self.context,
            until_ns: now_ns.saturating_add(wait_ms.saturating_mul(1_000_000)),
            pool: pool.key,
            class: busy.class,
            tokens: read.tokens,
            body_bytes: read.bytes + read.changed.as_ref().map_or(0, Vec::len),
        });
        let Router {
            host,
            metrics,
            bookings,
            ..
        } = router;
        metrics.count(host, Event::Held, 1);
        let unix_ns = host.unix_ns();
        let due_ns = |ms: u64| unix_ns.saturating_add(ms.saturating_mul(1_000_000));
        let hints = read.hints.as_ref();
        let queued = Queued {
            ticket,
            pool: u16::try_from(served.position).unwrap_or(u16::MAX),
            mailbox,
            class: hints
                .and_then(|hints| hints.policy_class.clone())
                .unwrap_or_default(),
            tokens: read.tokens,
            cached_tokens: busy.cached_tokens,
            since_ns: unix_ns,
            priority: hints.map_or(0.0, |hints| hints.priority_jump),
            strict: hints.map_or(0, |hints| hints.strict_priority),
            due_ns: due_ms.filter(|_| is_trusted).map_or(0, due_ns),
            owners: busy.owners,
        };
        bookings.queue(host, metrics, queued);
        self.state = State::InLine(Box::new(InLine {
            ticket,
            since_ns,
            held_ns: now_ns,
            read,
        }));
        Action::Pause
    }

    /// Answers the request with an error.
    fn refuse<H: Host>(
        &mut self,
        router: &mut Router<H>,
        pool: &Pool,
        refusal: Refusal,
        model: &str,
    ) -> Action {
        let Router { host, metrics, .. } = router;
        metrics.request(host, &pool.name, Reason::Refused);
        metrics.refused(host, refusal);
        // Where no pool serves the model, or nothing can be read, no worker is missed.
        let misses = !matches!(
            refusal,
            Refusal::ModelUnknown | Refusal::BodyBroken | Refusal::BodyTooLong
        );
        if misses {
            metrics.missed(host, Miss::Unanswered);
        }
        // Callbacks on the answer find nothing left to do.
        self.state = State::Over;
        let retry_after = pool.refusing.retry_after_s.to_string();
        let headers = [
            (refusal::REASON, refusal.name()),
            (refusal::RETRY_AFTER, &retry_after),
        ];
        let headers = if refusal.may_pass() {
            &headers[..]
        } else {
            &headers[..1]
        };
        let status = refusal.status(&pool.refusing);
        if !host.reply(status, headers, refusal.body(model).as_bytes()) {
            metrics.fault(host, Fault::Reply);
        }
        Action::Pause
    }
}

impl<H: Host> Router<H> {
    /// Lets the current request go on.
    fn resume(&mut self) {
        if !self.host.resume_request() {
            self.metrics.fault(&self.host, Fault::Resume);
        }
    }

    /// A request waits no more.
    pub fn unqueue(&mut self, ticket: u64) {
        let Self {
            host,
            metrics,
            bookings,
            ..
        } = self;
        bookings.unqueue(host, metrics, ticket);
    }

    /// The request's headers. Those that only this filter may set are removed.
    fn headers(&mut self) -> HeaderMap {
        let headers = self.host.headers(Headers::Request);
        if headers.is_none() {
            self.metrics.fault(&self.host, Fault::Header);
        }
        for name in OURS {
            // What can't be seen may be there.
            if headers.as_ref().is_none_or(|h| h.get(name).is_some()) {
                self.host.remove_header(Headers::Request, name);
            }
        }
        headers.unwrap_or_default()
    }

    /// The body with its prompt's token ids, as the pool hands them over.
    fn with_ids(&self, surface: Surface, bytes: usize, scan: &Scan, ids: &[u8]) -> Option<Vec<u8>> {
        let fleet = self.world.fleet()?;
        let served = fleet.serve(scan.model.value().map(String::as_str))?;
        let body = self.host.body(0, bytes);
        let handover = served.pool.handover;
        handover.body(surface, &body, &scan.members, ids)
    }

    /// Sends this body instead of the one that came.
    fn hand_over(&mut self, bytes: usize, body: &[u8]) {
        if !self.host.replace_body(bytes, body) {
            self.metrics.fault(&self.host, Fault::Body);
            return;
        }
        self.metrics.count(&self.host, Event::HandedOver, 1);
        // One that is given must be true; without one the body goes in chunks.
        let length = body.len().to_string();
        let host = &self.host;
        let is_given = host.header(Headers::Request, LENGTH).is_some();
        if is_given && !host.set_header(Headers::Request, LENGTH, length.as_bytes()) {
            self.metrics.fault(&self.host, Fault::Header);
        }
    }

    /// Tells Envoy where to send the request: to the first of the endpoints that takes it.
    /// Its engine is told the rank, where it has several.
    fn send_to(&mut self, pool: &str, endpoints: Option<&str>, rank: Option<DpRank>) {
        let set = |name, value: &str| {
            self.host
                .set_header(Headers::Request, name, value.as_bytes())
        };
        let named = endpoints.is_none_or(|endpoints| set(DESTINATION, endpoints));
        let ranked = rank.is_none_or(|rank| set(hints::RANK, &rank.to_string()));
        if !(set(POOL, pool) && named && ranked) {
            self.metrics.fault(&self.host, Fault::Header);
        }
    }
}

impl Held {
    /// Takes the bytes of the body that are not taken yet.
    fn take<H: Host>(&mut self, router: &mut Router<H>, size: usize) {
        let wanted = size.saturating_sub(self.taken);
        if wanted == 0 || !self.whole {
            return;
        }
        let part = router.host.body(self.taken, wanted);
        if part.len() != wanted {
            self.whole = false;
            router.metrics.fault(&router.host, Fault::Body);
            return;
        }
        self.taken = size;
        self.scanner.feed(&part);
        let fleet = router.world.fleet();
        let hashing = fleet.and_then(|fleet| fleet.hashing(self.scanner.so_far()));
        if let Some(hashing) = hashing {
            self.scanner.hash(hashing);
        }
    }

    /// What a body that was not read to its end said: at most the pool.
    fn cut(self, reason: Reason) -> Read {
        let mut read = Read::nothing(reason, self.headers);
        read.scan.model = self.scanner.so_far().model.clone();
        read
    }

    /// What the complete body said.
    fn read(self, host: &impl Host) -> Read {
        let (limit, bytes) = (self.scanner.limit(), self.taken);
        let scan = self.scanner.finish();
        let (true, Ok(mut scan)) = (self.whole, scan) else {
            return Read::nothing(Reason::BadJson, self.headers);
        };
        let mut nvext = Nvext::default();
        if let Some(place) = scan.members.get(NVEXT) {
            let json = host.body(place.start, place.len());
            let mut scanner = Scanner::of(limit, Some(TOKEN_DATA));
            scanner.feed(&json);
            // Where it makes no sense, that is for the worker to judge.
            let within = scanner.finish().unwrap_or_default();
            nvext = Nvext::read(&json, &within.members);
            let is_prompt = matches!(within.prompt, Prompt::Tokens(_) | Prompt::TooManyTokens);
            if is_prompt && self.surface.takes_token_data() {
                scan.prompt = within.prompt;
            }
        }
        let text_key = self.surface.text_key();
        let has_text = text_key.is_some_and(|key| scan.members.get(key).is_some());
        let (reason, tokens) = match &scan.prompt {
            _ if self.surface == Surface::Embeddings => (Reason::NoReuse, 0),
            Prompt::Tokens(tokens) => {
                let count = u32::try_from(tokens.ids().len()).unwrap_or(u32::MAX);
                (Reason::Kv, count)
            }
            // At least that many, and an owner that gets them is busy.
            Prompt::TooManyTokens => (Reason::TooManyTokens, self.token_limit),
            Prompt::Text => (Reason::Text, 0),
            Prompt::Absent if has_text => (Reason::Text, 0),
            Prompt::Absent | Prompt::Unsupported => (Reason::NoPrompt, 0),
        };
        // Hashed without its salt, a prompt would match what it can't use.
        let readable_salt = matches!(scan.cache_salt, Field::Absent | Field::Value(_));
        let reason = match reason {
            Reason::Kv | Reason::Text if !readable_salt => Reason::NoPrompt,
            reason => reason,
        };
        Read {
            reason,
            tokens,
            scan,
            hashes: Vec::new(),
            families: Vec::new(),
            is_complete: true,
            bytes,
            changed: None,
            headers: self.headers,
            nvext,
            hints: None,
        }
    }
}
