//! Which pool a request is for, where something else than its model says so.

use super::POOL;
use crate::header_map::HeaderMap;
use crate::hints::{Kind, is_trusted};
use crate::host::Host;
use crate::metrics::Event;
use crate::vm::Router;

/// Properties in which a route and a listener name the pool of their requests.
const NAMED: [&[u8]; 2] = [
    b"xds\0route_metadata\0filter_metadata\0kv\0pool",
    b"xds\0listener_metadata\0filter_metadata\0kv\0pool",
];

impl<H: Host> Router<H> {
    /// The pool that the current request's route names, else its listener, else a trusted client.
    /// One that there is not names none.
    pub(super) fn named_pool(&mut self, headers: &HeaderMap, now_ns: u64) -> Option<String> {
        let fleet = self.fleet(now_ns)?;
        let Self { host, metrics, .. } = self;
        // A single one needs no name, and its requests no further calls.
        if fleet.table.pools.len() < 2 {
            return None;
        }
        let configured = NAMED.iter().find_map(|path| host.property(path));
        let said = headers.get(POOL);
        let (name, is_said) = match (&configured, said) {
            (Some(name), _) => (&name[..], false),
            (None, said) => (said?, true),
        };
        let served = std::str::from_utf8(name)
            .ok()
            .and_then(|name| fleet.named(name));
        let Some(served) = served else {
            metrics.count(host, Event::UnknownPool, 1);
            return None;
        };
        if is_said && !is_trusted(host, Some(served.pool)) {
            metrics.hint_ignored(host, Kind::Pool);
            return None;
        }
        Some(served.pool.name.clone())
    }
}
