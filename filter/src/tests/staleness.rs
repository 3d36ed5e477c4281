//! A world that ages, changes or is incomplete.

use super::*;
use crate::host::Level;

fn head(change: impl FnOnce(&mut Head)) -> Vec<u8> {
    let mut head = Head {
        epoch: EPOCH,
        level: 2,
        group: 8,
        ready: true,
        table_version: 1,
        beat: 1,
    };
    change(&mut head);
    head.encode().to_vec()
}

fn wait(site: &mut Site, ms: u64) {
    for _ in 0..ms / 50 {
        site.tick();
    }
}

#[test]
fn a_silent_sidecar_is_told_once_and_its_index_fades() {
    let tokens = prompt(1, 100);
    let mut site = Site::new();
    let mut other = site.beside();
    site.publish(&table(2, Mode::Kv), &[(0, Slot(1), &tokens)]);
    other.vm.on_tick(ROOT);
    wait(&mut site, 4_900);
    assert!(!site.host.has_metric("kv_router_stale"));
    wait(&mut site, 20_000);
    assert_eq!(site.host.named("kv_router_stale"), 1);
    other.vm.on_tick(ROOT);
    assert_eq!(site.host.logged(Level::Warn).len(), 1);
    assert_eq!(
        other.host.logged(Level::Warn).len(),
        0,
        "one line a process"
    );
    let context = site.complete(&body(&tokens));
    assert_eq!(site.destination(), Some(endpoint(1)));
    assert_eq!(site.routed("default", "kv"), 1);
    site.over(context);
    wait(&mut site, 40_000);
    site.complete(&body(&tokens));
    assert_eq!(site.routed("default", "stale"), 1);
    site.put(&key::HEAD, &head(|head| head.beat = 2));
    wait(&mut site, 50);
    assert_eq!(site.host.named("kv_router_stale"), 0);
    site.complete(&body(&tokens));
    assert_eq!(site.routed("default", "kv"), 2);
}

#[test]
fn pages_count_only_when_complete_and_of_the_tables_epoch() {
    let tokens = prompt(1, 100);
    let mut site = Site::new();
    site.publish(&table(2, Mode::Kv), &[(0, Slot(1), &tokens)]);
    site.put(&key::HEAD, &head(|head| head.ready = false));
    site.complete(&body(&tokens));
    site.put(&key::HEAD, &head(|head| head.epoch = EPOCH + 1));
    site.complete(&body(&tokens));
    assert_eq!(site.routed("default", "no_index"), 2);
    site.put(&key::HEAD, &head(|_| {}));
    site.complete(&body(&tokens));
    assert_eq!(site.routed("default", "kv"), 1);
    assert_eq!(site.destination(), Some(endpoint(1)));
}

#[test]
fn a_changed_table_is_read_once_and_a_broken_one_keeps_the_last() {
    let mut site = Site::new();
    site.publish(&table(2, Mode::Kv), &[]);
    site.complete(b"{}");
    let defined = site.host.defined();
    site.complete(b"{}");
    assert_eq!(site.host.defined(), defined);
    site.put(&key::TABLE, b"\x01broken");
    site.put(&key::HEAD, &head(|head| head.table_version = 2));
    for _ in 0..3 {
        site.complete(b"{}");
        assert!(site.destination().is_some());
    }
    assert_eq!(site.faults("table"), 1);
    site.put(&key::HEAD, b"short");
    site.complete(b"{}");
    assert!(site.destination().is_some());
    assert!(site.faults("head") > 0);
}

#[test]
fn a_table_that_shrinks_leaves_running_bookings_exact() {
    let mut site = Site::new();
    site.publish(&table(2, Mode::Kv), &[]);
    let contexts = [(); 4].map(|()| site.complete(&body(&prompt(1, 40))));
    let mut less = table(1, Mode::Kv);
    less.version = 2;
    site.publish(&less, &[]);
    site.complete(b"{}");
    assert_eq!(site.destination(), Some(endpoint(0)));
    for context in contexts {
        site.over(context);
    }
    assert_eq!(site.load(11), Load::default());
}
