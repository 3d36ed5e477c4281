//! Requests that wait for a worker to have room.

use kv_core::queue::{Bounds, Class, Full, Limit, Limits, Mail, Profile, Verdict, mailbox_name};
use kv_core::report::{Queued, Step};

use super::reports::Sidecar;
use super::*;
use crate::refusal::{REASON, RETRY_AFTER};

const PRIORITY: &str = "x-dynamo-request-priority";

/// A VM with two workers that one request each makes busy, and a mailbox.
fn site(change: impl FnOnce(&mut Pool)) -> Site {
    let mut site = Site::new();
    let mut table = table(2, Mode::Kv);
    let pool = &mut table.pools[0];
    pool.queue = Some(profile(class()));
    pool.trusts_hints = true;
    change(pool);
    site.publish(&table, &[]);
    site.tick();
    site.tick();
    site
}

fn class() -> Class {
    Class {
        busy_tokens: Some(7),
        ..Class::new("default")
    }
}

fn profile(class: Class) -> Profile {
    Profile::single(class)
}

impl Site {
    /// A request that is held.
    fn hold(&mut self, first: u32, headers: &[(&str, &[u8])]) -> u32 {
        let context = self.request(&[&GENERATE[..], headers].concat());
        assert_eq!(self.vm.on_request_headers(context, false), Action::Pause);
        let action = self.part(context, &body(&prompt(first, 8)), true);
        assert_eq!(action, Action::Pause);
        assert_eq!((self.destination(), self.host.replied()), (None, None));
        context
    }

    /// Both workers get a request.
    fn occupy(&mut self) -> [u32; 2] {
        [1, 2].map(|first| self.complete(&body(&prompt(first, 8))))
    }

    fn post_mail(&mut self, vm: u64, verdicts: &[(u64, Verdict)]) {
        let queue = self.host.resolve_queue(&mailbox_name(0)).unwrap();
        let mail = Mail {
            vm,
            verdicts: verdicts.to_vec(),
        };
        self.host.enqueue(queue, &mail.encode());
        self.vm.on_queue_ready(ROOT, queue);
    }

    fn refused(&self, context: u32) -> Option<(u32, String, Option<String>)> {
        assert!(self.host.enter(context));
        let (status, _) = self.host.replied()?;
        let reason = self.host.reply_header(REASON).unwrap();
        Some((status, reason, self.host.reply_header(RETRY_AFTER)))
    }

    fn is_resumed(&self, context: u32) -> bool {
        assert!(self.host.enter(context));
        self.host.resumed(context) > 0
    }

    /// What was said of waiting so far, and by whom.
    fn told_of(&mut self) -> (u64, Vec<Step>) {
        self.tick();
        let mut sidecar = Sidecar::default();
        sidecar.read(&[self]);
        let steps = sidecar.steps().into_iter();
        let own = |s: &Step| matches!(s, Step::Queued(_) | Step::Unqueued { .. });
        (sidecar.reports[0].vm, steps.filter(own).collect())
    }
}

fn queued(step: &Step) -> &Queued {
    let Step::Queued(queued) = step else {
        panic!("{step:?} queues nothing");
    };
    queued
}

#[test]
fn a_request_waits_until_it_is_let_go_and_is_routed_afresh() {
    let mut site = site(|_| {});
    let busy = site.occupy();
    let waiting = site.hold(3, &[(PRIORITY, b"5")]);
    let (vm, steps) = site.told_of();
    let [step] = &steps[..] else {
        panic!("{steps:?}");
    };
    let told = queued(step);
    assert_eq!((told.ticket, told.tokens, told.priority), (1, 8, 5.0));
    assert!(told.owners.is_empty() && told.due_ns == 0);
    // Mail for somebody else who had the mailbox, and about nobody.
    site.post_mail(vm + 1, &[(1, Verdict::Go)]);
    site.post_mail(vm, &[(9, Verdict::Go)]);
    assert!(!site.is_resumed(waiting));
    site.over(busy[1]);
    site.post_mail(vm, &[(1, Verdict::Go)]);
    assert!(site.is_resumed(waiting));
    assert_eq!(site.destination(), Some(endpoint(1)));
    site.post_mail(vm, &[(1, Verdict::Go)]);
    let (_, steps) = site.told_of();
    assert_eq!(steps[1..], [Step::Unqueued { ticket: 1 }]);
    for context in [busy[0], waiting] {
        site.over(context);
    }
    site.assert_idle();
}

#[test]
fn who_comes_while_others_wait_waits_behind_them() {
    let mut site = site(|_| {});
    let busy = site.occupy();
    let first = site.hold(3, &[]);
    busy.into_iter().for_each(|context| site.over(context));
    let second = site.hold(4, &[]);
    let (vm, steps) = site.told_of();
    assert_eq!(steps.len(), 2);
    site.post_mail(vm, &[(1, Verdict::Go), (2, Verdict::Go)]);
    for context in [first, second] {
        assert!(site.is_resumed(context));
        site.over(context);
    }
    // Nobody waits any more.
    let third = site.complete(&body(&prompt(5, 8)));
    site.over(third);
    site.assert_idle();
}

#[test]
fn a_client_that_leaves_while_it_waits_leaves_nothing() {
    let mut site = site(|_| {});
    let busy = site.occupy();
    let waiting = site.hold(3, &[]);
    site.over(waiting);
    let (vm, steps) = site.told_of();
    assert_eq!(steps[1..], [Step::Unqueued { ticket: 1 }]);
    site.post_mail(vm, &[(1, Verdict::Go)]);
    busy.into_iter().for_each(|context| site.over(context));
    site.assert_idle();
    assert_eq!(site.host.named("kv_router_held_left_total"), 1);
}

#[test]
fn who_waits_too_long_or_is_one_too_many_is_refused() {
    let mut site = site(|pool| {
        let bounds = Bounds {
            wait_ms: 500,
            requests: 2,
            ..Bounds::default()
        };
        pool.queue.as_mut().unwrap().bounds = bounds;
        pool.refusing.retry_after_s = 7;
    });
    let busy = site.occupy();
    let late = site.hold(3, &[]);
    let full = site.hold(4, &[]);
    let (context, _) = site.post();
    assert_eq!(
        site.part(context, &body(&prompt(5, 8)), true),
        Action::Pause
    );
    let seven = || Some("7".to_owned());
    assert_eq!(
        site.refused(context),
        Some((529, "held_full".into(), seven()))
    );
    let (vm, _) = site.told_of();
    let limit = Full {
        kind: Limit::Requests,
        current: 2,
        limit: 2,
    };
    site.post_mail(vm, &[(2, Verdict::Full(limit))]);
    assert_eq!(
        site.refused(full),
        Some((529, "queue_full".into(), seven()))
    );
    for _ in 0..9 {
        assert_eq!(site.refused(late), None);
        site.tick();
    }
    assert_eq!(
        site.refused(late),
        Some((429, "queue_late".into(), seven()))
    );
    for context in [late, full, context, busy[0], busy[1]] {
        site.over(context);
    }
    site.assert_idle();
}

#[test]
fn without_the_sidecar_all_go_in_the_order_they_came() {
    let mut site = site(|_| {});
    site.occupy();
    let waiting = [3, 4, 5].map(|first| site.hold(first, &[]));
    let now_ns = site.host.now_ns();
    site.put(&key::SILENT, &now_ns.to_le_bytes());
    for _ in 0..19 {
        site.tick();
        assert!(!site.is_resumed(waiting[0]));
        // Nobody else is held meanwhile.
        let context = site.complete(&body(&prompt(9, 8)));
        site.over(context);
    }
    site.tick();
    for context in waiting {
        assert!(site.is_resumed(context));
    }
    assert_eq!(site.host.named("kv_router_held_released_total"), 3);
    assert_eq!(site.host.named("kv_router_held_bypassed_total"), 19);
}

#[test]
fn a_vm_that_ends_lets_all_go() {
    let mut site = site(|_| {});
    site.occupy();
    let waiting = site.hold(3, &[]);
    site.vm.on_done(ROOT);
    assert!(site.is_resumed(waiting));
    let mailbox = site.host.shared(&key::mailbox(0)).unwrap().bytes;
    assert_eq!(mailbox, [0; 16]);
}

#[test]
fn a_class_that_may_not_wait_and_overloaded_workers_refuse_at_once() {
    let mut never = site(|pool| {
        let limits = Limits {
            tokens: Some(0),
            ..Limits::default()
        };
        pool.queue = Some(profile(Class { limits, ..class() }));
    });
    never.occupy();
    let (context, _) = never.post();
    assert_eq!(
        never.part(context, &body(&prompt(3, 8)), true),
        Action::Pause
    );
    let one = Some("1".to_owned());
    assert_eq!(
        never.refused(context),
        Some((529, "queue_full".into(), one.clone()))
    );

    let mut overloaded = site(|pool| {
        pool.queue = None;
        pool.overload.prefill_tokens = Some(7);
        pool.refusing.status = 503;
    });
    let busy = overloaded.occupy();
    let (context, _) = overloaded.post();
    let action = overloaded.part(context, &body(&prompt(3, 8)), true);
    assert_eq!(action, Action::Pause);
    assert_eq!(
        overloaded.refused(context),
        Some((503, "overloaded".into(), one))
    );
    overloaded.over(context);
    // Whoever has room gets the next.
    overloaded.over(busy[0]);
    overloaded.complete(&body(&prompt(4, 8)));
    assert_eq!(overloaded.destinations(), [endpoint(0)]);
}

#[test]
fn mailboxes_of_vms_that_are_gone_are_taken_over() {
    let one = site(|_| {});
    let mut two = one.beside();
    two.tick();
    two.tick();
    let owner = |site: &Site, number| {
        let bytes = site.host.shared(&key::mailbox(number)).unwrap().bytes;
        kv_core::queue::Mailbox::decode(&bytes).unwrap().vm
    };
    let (first, second) = (owner(&one, 0), owner(&one, 1));
    assert_ne!(first, second);
    // The first VM is never heard of again.
    two.host.advance_ms(31_000);
    let mut three = two.beside();
    three.tick();
    three.tick();
    assert!(![first, second].contains(&owner(&three, 0)));
}
