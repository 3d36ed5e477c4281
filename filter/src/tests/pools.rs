//! Which pool a request is for: what its route, its listener, a trusted client or its model names.

use super::*;
use crate::hints::Kind;
use crate::request::POOL;

const ROUTE: &[u8] = b"xds\0route_metadata\0filter_metadata\0kv\0pool";
const LISTENER: &[u8] = b"xds\0listener_metadata\0filter_metadata\0kv\0pool";

/// A site with the pools `one`, which lists the model `m`, and `two`, which takes any. `two` trusts
/// its clients.
fn site() -> Site {
    let site = Site::new();
    let named = |name: &str, key| Pool {
        name: name.into(),
        key,
        ..pool(2, Mode::Kv)
    };
    let mut table = table(0, Mode::Kv);
    table.pools = vec![named("one", 1), named("two", 2)];
    table.pools[0].models = vec!["m".into()];
    table.pools[1].trusts_hints = true;
    site.publish(&table, &[]);
    site
}

/// The pool that a completion with this model and header goes to, from a route and a listener that
/// name these; `None` if it is refused.
fn sent(
    site: &mut Site,
    [route, listener]: [Option<&str>; 2],
    header: Option<&str>,
    model: &str,
) -> Option<String> {
    let context = site.request(&GENERATE);
    for (path, name) in [(ROUTE, route), (LISTENER, listener)] {
        if let Some(name) = name {
            site.host.say(path, name.as_bytes());
        }
    }
    if let Some(name) = header {
        site.host.client_header(POOL, name.as_bytes());
    }
    assert_eq!(site.vm.on_request_headers(context, false), Action::Pause);
    let body = format!("{{\"model\":\"{model}\",\"prompt\":[1,2,3,4]}}");
    site.part(context, body.as_bytes(), true);
    let pool = site.host.text(Headers::Request, POOL);
    let is_refused = site.host.replied().is_some();
    site.over(context);
    assert_eq!(pool.is_none(), is_refused);
    pool
}

#[test]
fn the_first_that_names_a_pool_counts() {
    let mut site = site();
    let (one, two, none) = (Some("one"), Some("two"), None);
    let mut goes = |config, header, model| sent(&mut site, config, header, model);
    assert_eq!(goes([none, none], none, "m").as_deref(), one);
    assert_eq!(goes([none, none], two, "m").as_deref(), two);
    assert_eq!(goes([none, two], none, "m").as_deref(), two);
    assert_eq!(goes([none, one], two, "m").as_deref(), one);
    assert_eq!(goes([two, one], none, "m").as_deref(), two);
    // One that lists no models takes any.
    assert_eq!(goes([two, none], none, "x").as_deref(), two);
    assert_eq!(goes([none, none], none, "x"), None);
    assert_eq!(goes([one, none], none, "x"), None);
    site.assert_idle();
}

#[test]
fn a_pool_that_there_is_not_or_whose_clients_are_not_trusted_is_not_named() {
    let mut site = site();
    let ignored = |site: &Site| {
        let kind = Kind::Pool.name();
        let name = format!("kv_router_hints_ignored_total_kind=.={kind};.;");
        site.host.named(&name)
    };
    let unknown = |site: &Site| site.host.named("kv_router_unknown_pool_total");
    let by_model = Some("one".to_owned());
    assert_eq!(sent(&mut site, [None, None], Some("one"), "m"), by_model);
    assert_eq!((ignored(&site), unknown(&site)), (1, 0));
    assert_eq!(sent(&mut site, [Some("three"), None], None, "m"), by_model);
    assert_eq!(sent(&mut site, [None, None], Some("\u{e9}"), "m"), by_model);
    assert_eq!((ignored(&site), unknown(&site)), (1, 2));
}

#[test]
fn what_is_not_held_goes_to_the_named_pool_too() {
    let mut site = site();
    let context = site.request(&[(":method", b"GET"), (":path", b"/health")]);
    site.host.say(ROUTE, b"two");
    assert_eq!(site.vm.on_request_headers(context, true), Action::Continue);
    assert_eq!(
        site.host.text(Headers::Request, POOL).as_deref(),
        Some("two")
    );
    site.over(context);
}
