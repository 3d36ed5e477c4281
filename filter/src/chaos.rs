//! Faults on request, for tests of what follows: the feature `chaos`.
//!
//! A request with the header `x-kv-chaos` orders one: `trap` of the VM that has the request,
//! `bridge-trap` and `bridge-block` of the VM that is the bridge, at its next tick. Anything else is
//! logged there.

use crate::host::{Expect, Headers, Host, Level};

/// Where an order for the bridge waits.
const ORDER: &[u8] = b"chaos";
/// How long a blocked VM does nothing.
const BLOCK_NS: u64 = 2_000_000_000;

/// Takes the order of the current request.
pub fn order(host: &impl Host) {
    let Some(order) = host.header(Headers::Request, "x-kv-chaos") else {
        return;
    };
    if order == b"trap" {
        std::process::abort();
    }
    host.set_shared(ORDER, &order, Expect::Anything);
}

/// Does to the bridge what was ordered, once.
pub fn obey(host: &impl Host) {
    let order = host.shared(ORDER).unwrap_or_default().bytes;
    if order.is_empty() {
        return;
    }
    host.set_shared(ORDER, b"", Expect::Anything);
    match order.as_slice() {
        b"bridge-trap" => {
            host.log(Level::Info, "chaos: the bridge stops");
            std::process::abort();
        }
        b"bridge-block" => {
            host.log(Level::Info, "chaos: the bridge stops");
            let until_ns = host.now_ns().saturating_add(BLOCK_NS);
            while host.now_ns() < until_ns {}
            host.log(Level::Info, "chaos: the bridge goes on");
        }
        _ => host.log(Level::Info, "chaos: the bridge was called"),
    }
}
