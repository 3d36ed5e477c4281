use kv_core::load::Leg;
use kv_core::loads::PoolLoads;

use super::news::LASTING_ALONE_MS;
use super::*;

const OWNER: OwnerKey = OwnerKey {
    pool: 0,
    id: OwnerId { worker: 1, rank: 0 },
};

fn accounts() -> Accounts {
    let mut accounts = Accounts::new(Settings {
        tracking: Tracking::default(),
        expiry_ms: 300_000,
    });
    accounts.serve(vec![vec![(Slot(3), OWNER.id)]]);
    accounts
}

fn proxy(process: u64) -> ProxyId {
    ProxyId {
        process,
        vm_id: "v".into(),
    }
}

fn booked(request: u64) -> Booked {
    Booked {
        request,
        owner: OWNER,
        decoding: false,
        prefill_tokens: 32,
        blocks: 2,
        prefix: None,
        hashes: vec![1, 2],
        evidence: None,
        session: None,
    }
}

/// A report of VM 7 in which so many requests are booked.
fn report(sequence: u64, requests: &[u64], complete: bool) -> Report {
    let mut sum = Sum::new(OWNER);
    requests.iter().for_each(|_| sum.add(Leg::book(32, 2).1));
    let book = |request: &u64| Step::Book(Box::new(booked(*request)));
    Report {
        vm: 7,
        sequence,
        complete,
        sums: vec![sum],
        steps: requests.iter().map(book).collect(),
        ..Report::default()
    }
}

fn apply(accounts: &mut Accounts, stream: u64, report: &Report, now_ms: u64) {
    let continuity = accounts.report(stream, report, now_ms).unwrap();
    assert_ne!(continuity, Continuity::Repeated);
    for step in &report.steps {
        let Step::Book(booked) = step else { continue };
        let prompt = Prompt {
            start: 0,
            hashes: booked.hashes.clone(),
            branches: Vec::new(),
        };
        accounts.book(report.vm, booked, prompt, now_ms);
    }
}

fn waiting(accounts: &Accounts) -> u32 {
    accounts.load(&OWNER).waiting
}

#[test]
fn a_vm_is_retired_only_after_it_could_have_reported() {
    let mut accounts = accounts();
    accounts.connected(proxy(1), 10, true, 0);
    apply(&mut accounts, 10, &report(1, &[1, 2], true), 0);
    accounts.disconnected(10, 3_000);
    // Nobody could report meanwhile.
    assert_eq!(accounts.sweep(10_000), Swept::default());
    accounts.connected(proxy(1), 11, true, 10_000);
    assert_eq!(accounts.sweep(14_999), Swept::default());
    assert_eq!(waiting(&accounts), 2);
    let swept = accounts.sweep(15_000);
    assert_eq!((swept.vms, swept.freed), (vec![(proxy(1), 7)], 2));
    assert_eq!(waiting(&accounts), 0);
    let news = accounts.news(15_000);
    let correction = news[0].pools[0].correction(Slot(3));
    assert_eq!((news[0].stream, correction.waiting), (11, -2));
    // It comes back: its bookings count again, and its lanes once.
    apply(&mut accounts, 11, &report(2, &[1, 2], true), 27_000);
    assert_eq!(waiting(&accounts), 2);
    for (now_ms, blocks) in [(27_000, -4), (27_000 + LASTING_ALONE_MS, -2)] {
        let correction = accounts.news(now_ms)[0].pools[0].correction(Slot(3));
        assert_eq!((correction.waiting, correction.blocks), (0, blocks));
        assert_eq!(accounts.is_unsettled(), blocks == -4);
    }
}

#[test]
fn a_process_without_a_stream_goes_after_a_while() {
    let mut accounts = accounts();
    accounts.connected(proxy(1), 10, true, 0);
    accounts.connected(proxy(2), 20, true, 0);
    apply(&mut accounts, 10, &report(1, &[1], true), 0);
    accounts.disconnected(10, 1_000);
    assert_eq!(accounts.sweep(9_000).proxies, []);
    assert!(accounts.is_reported());
    let swept = accounts.sweep(9_001);
    assert_eq!((swept.proxies, swept.freed), (vec![proxy(1)], 1));
    assert_eq!((accounts.bookings(), accounts.raw().proxies.len()), (0, 1));
}

#[test]
fn a_late_message_of_a_replaced_stream_counts_for_nothing() {
    let mut accounts = accounts();
    accounts.connected(proxy(1), 10, true, 0);
    accounts.connected(proxy(1), 11, true, 0);
    assert_eq!(accounts.report(10, &report(1, &[1], true), 0), None);
    accounts.disconnected(10, 1);
    assert_eq!(accounts.sweep(20_000).proxies, []);
    assert_eq!(accounts.proxy_of(11), Some(&proxy(1)));
}

#[test]
fn bookings_expire_unless_they_are_mentioned() {
    let mut accounts = accounts();
    accounts.connected(proxy(1), 10, true, 0);
    apply(&mut accounts, 10, &report(1, &[1, 2], true), 0);
    for now_ms in (10_000..=310_000).step_by(10_000) {
        apply(&mut accounts, 10, &report(now_ms, &[1, 2], true), now_ms);
        assert_eq!(accounts.sweep(now_ms), Swept::default());
    }
    // The VM goes on, but neither lists them nor says that they are over.
    for now_ms in (320_000..=620_000).step_by(10_000) {
        apply(&mut accounts, 10, &report(now_ms, &[], false), now_ms);
        let swept = accounts.sweep(now_ms);
        assert_eq!(swept.expired, if now_ms == 620_000 { 2 } else { 0 });
    }
}

#[test]
fn a_complete_report_says_all_there_is() {
    let mut accounts = accounts();
    accounts.connected(proxy(1), 10, true, 0);
    apply(&mut accounts, 10, &report(1, &[1, 2], true), 0);
    let mut whole = report(5, &[2, 3], true);
    if let Step::Book(booked) = &mut whole.steps[0] {
        booked.decoding = true;
        booked.owner.id.worker = 9;
        booked.hashes = Vec::new();
    }
    apply(&mut accounts, 10, &whole, 1);
    assert_eq!(accounts.bookings(), 2);
    assert_eq!(waiting(&accounts), 1);
    let other = OwnerKey {
        id: OwnerId { worker: 9, rank: 0 },
        ..OWNER
    };
    let load = accounts.load(&other);
    // A booking that is known keeps its blocks, though they are not listed again.
    assert_eq!((load.decoding, load.blocks), (1, 2));
    assert_eq!(
        accounts.prompt(7, 2).map(|(_, blocks)| blocks),
        Some(&[1, 2][..])
    );
}

#[test]
fn only_changes_are_told() {
    let mut accounts = accounts();
    accounts.connected(proxy(1), 10, true, 0);
    accounts.connected(proxy(2), 20, true, 0);
    let streams = |news: Vec<News>| news.iter().map(|n| n.stream).collect::<Vec<_>>();
    assert_eq!(streams(accounts.news(0)), [10, 20]);
    assert!(accounts.news(0).is_empty());
    apply(&mut accounts, 10, &report(1, &[1], false), 0);
    let news = accounts.news(0);
    let told = |news: &News| {
        let PoolLoads {
            corrections,
            prefixes,
        } = &news.pools[0];
        (news.stream, corrections.len(), prefixes.len())
    };
    // The first proxy's lanes are right as they are, and it knows of its own requests.
    let told: Vec<_> = news.iter().map(told).collect();
    assert_eq!(told, [(20, 1, 1)]);
    accounts.step(7, &Step::FirstToken { request: 1 }, 0);
    let came = accounts.news(0);
    assert_eq!(streams(came), [10, 20]);
    assert!(accounts.news(0).is_empty());
    accounts.connected(proxy(1), 11, true, 0);
    assert_eq!(streams(accounts.news(0)), [11]);
}

#[test]
fn a_proxy_is_alone_until_another_is_there() {
    let mut accounts = accounts();
    accounts.connected(proxy(1), 10, true, 0);
    let alone = |news: Vec<News>| -> Vec<(u64, bool)> {
        news.iter().map(|n| (n.stream, n.is_alone)).collect()
    };
    assert_eq!(alone(accounts.news(0)), [(10, true)]);
    for predicts in [true, false] {
        accounts.set_predicting(predicts);
        assert_eq!(alone(accounts.news(0)), [(10, !predicts)]);
    }
    accounts.connected(proxy(2), 20, true, 0);
    assert_eq!(alone(accounts.news(0)), [(10, false), (20, false)]);
}

#[test]
fn blocks_that_nobody_can_name_are_counted_and_shared_with_nobody() {
    let mut accounts = accounts();
    let prompt = Prompt {
        start: 3,
        hashes: vec![8, 9],
        branches: Vec::new(),
    };
    let booked = |request| Booked {
        blocks: 5,
        ..booked(request)
    };
    for request in [1, 2] {
        let outcome = accounts.book(7, &booked(request), prompt.clone(), 0);
        assert_eq!(outcome, Outcome::Booked);
    }
    // Two named blocks once, three that have no name twice.
    assert_eq!(accounts.load(&OWNER).blocks, 8);
    assert_eq!(accounts.prompt(7, 1), None);
    for request in [1, 2] {
        let freed = accounts.step(7, &Step::Free { request }, 0);
        assert_eq!(freed, Outcome::Freed);
    }
    assert_eq!(accounts.load(&OWNER), ActiveLoad::default());
    assert_eq!(
        accounts.step(7, &Step::Free { request: 1 }, 0),
        Outcome::Unknown
    );
}
