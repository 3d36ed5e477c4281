//! Where a request goes, once all is known that there is to know: to a worker, into the queue, or back.

use std::rc::Rc;

use kv_core::policy::Mode;
use kv_core::report::Queued;
use kv_core::scan::{Field, Prompt};
use kv_core::table::Pool;

use super::read::{Read, salt};
use super::{InLine, Pass, Request, State};
use crate::choose::{Ask, Barred, Busy, Gate, Published};
use crate::fleet::Served;
use crate::hints;
use crate::host::Host;
use crate::metrics::{Event, Fault, Miss, Timing};
use crate::reason::Reason;
use crate::refusal::{self, Refusal};
use crate::routed::Routed;
use crate::vm::{Action, Router};
use crate::waiting;

impl Request {
    /// Sends the request on its way, or answers it.
    pub(super) fn route<H: Host>(
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
            let served = fleet.serve(read.pool.as_deref(), model)?;
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
    pub(super) fn line_up<H: Host>(
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
    pub(super) fn refuse<H: Host>(
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
