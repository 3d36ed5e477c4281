//! Sessions stay where they are bound.

use super::*;
use kv_core::affinity::{self, Affinity};

fn table(slack: Option<f64>) -> Table {
    let mut table = super::table(3, Mode::Kv);
    table.pools[0].affinity = Some(Affinity {
        ttl_s: 60,
        slack,
        headers: Vec::new(),
    });
    table
}

/// Sends a request of a session, with a prompt of its own. Returns its endpoint.
fn send(site: &mut Site, session: &[u8], first: u32) -> (u32, String) {
    let context = site.request(&GENERATE);
    site.host.client_header("x-session-id", session);
    site.vm.on_request_headers(context, false);
    site.part(context, &body(&prompt(first, 64)), true);
    (context, site.destination().unwrap())
}

fn counted(site: &Site, what: &str) -> u64 {
    site.host.named(&format!("kv_router_sessions_{what}_total"))
}

#[test]
fn a_hard_session_stays_whatever_it_costs_and_in_all_vms_of_a_process() {
    let mut site = Site::new();
    site.publish(&table(None), &[]);
    let (_, home) = send(&mut site, b"a", 1);
    let mut other = site.beside();
    for first in 2..6 {
        assert_eq!(send(&mut site, b"a", first).1, home);
        assert_eq!(send(&mut other, b"a", 10 + first).1, home);
    }
    assert_eq!((counted(&site, "bound"), counted(&site, "kept")), (1, 8));
    // Without a session the load goes elsewhere.
    let context = site.complete(&body(&prompt(30, 64)));
    assert_ne!(site.destination().unwrap(), home);
    site.over(context);
}

#[test]
fn a_soft_session_leaves_for_load_and_is_still_bound() {
    let mut site = Site::new();
    site.publish(&table(Some(1.5)), &[]);
    let (first, home) = send(&mut site, b"a", 1);
    let (second, elsewhere) = send(&mut site, b"a", 2);
    assert_ne!(elsewhere, home);
    assert_eq!(counted(&site, "left"), 1);
    site.over(first);
    site.over(second);
    assert_eq!(send(&mut site, b"a", 3).1, home);
}

#[test]
fn a_session_whose_worker_takes_no_requests_is_bound_anew() {
    let mut site = Site::new();
    let mut table = table(None);
    site.publish(&table, &[]);
    let (_, home) = send(&mut site, b"a", 1);
    let owners = &mut table.pools[0].owners;
    let position = owners.iter().position(|o| o.endpoint == home).unwrap();
    owners[position].accepting = false;
    table.version = 2;
    site.publish(&table, &[]);
    let (_, next) = send(&mut site, b"a", 2);
    assert_ne!(next, home);
    assert_eq!(counted(&site, "left"), 1);
    assert_eq!(send(&mut site, b"a", 3).1, next);
}

#[test]
fn the_sidecars_word_counts_before_that_of_the_process() {
    let mut site = Site::new();
    let table = table(None);
    site.publish(&table, &[]);
    let (_, home) = send(&mut site, b"a", 1);
    let pool = &table.pools[0];
    let other = pool.owners.iter().find(|o| o.endpoint != home).unwrap();
    let session = affinity::Session {
        key: affinity::key(b"a", pool.key),
        is_last: false,
    };
    let mut bindings = affinity::Bindings::default();
    bindings.book(session, other.id, 60_000, 0, |_| true);
    for (shard, bytes) in bindings.take_changed() {
        site.put(&key::bound(shard), &bytes);
    }
    assert_eq!(send(&mut site, b"a", 2).1, other.endpoint);
}
