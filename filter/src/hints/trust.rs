//! Whose privileged hints count.

use std::net::SocketAddr;

use kv_core::table::Pool;

use crate::host::Host;

/// Property of the route's metadata that says whom to trust, and the value that trusts the client.
const ROUTE: (&[u8], &[u8]) = (b"xds\0route_metadata\0filter_metadata\0kv\0trust", b"hints");
/// Property with the client's address and port.
const SOURCE: &[u8] = b"source\0address";

/// Whether the current request is one of a trusted client: the pool trusts all or this address, or
/// the route says so.
#[must_use]
pub fn is_trusted(host: &impl Host, pool: Option<&Pool>) -> bool {
    pool.is_some_and(|pool| pool.trusts_hints || comes_from(host, pool)) || route_trusts(host)
}

fn comes_from(host: &impl Host, pool: &Pool) -> bool {
    if pool.trusted_sources.is_empty() {
        return false;
    }
    let source = host.property(SOURCE).unwrap_or_default();
    let source = std::str::from_utf8(&source).ok();
    let source = source.and_then(|source| source.parse::<SocketAddr>().ok());
    source.is_some_and(|source| {
        let address = source.ip().to_canonical();
        pool.trusted_sources
            .iter()
            .any(|net| net.contains(&address))
    })
}

fn route_trusts(host: &impl Host) -> bool {
    let (path, value) = ROUTE;
    host.property(path).as_deref() == Some(value)
}
