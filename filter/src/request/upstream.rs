//! What Envoy is told of a request: its headers, its body, and to go on.

use kv_core::id::DpRank;
use kv_core::surface::Surface;

use super::read::Read;
use super::{DECISION, DESTINATION, POOL};
use crate::header_map::HeaderMap;
use crate::hints;
use crate::host::{Headers, Host};
use crate::metrics::{Event, Fault};
use crate::vm::Router;

/// Size of the body.
const LENGTH: &str = "content-length";

/// Headers that only this filter may set on a request.
const OURS: [&str; 3] = [DESTINATION, POOL, DECISION];

impl<H: Host> Router<H> {
    /// Lets the current request go on.
    pub(super) fn resume(&mut self) {
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
    pub(super) fn headers(&mut self) -> HeaderMap {
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
    pub(super) fn with_ids(&self, surface: Surface, read: &Read, ids: &[u8]) -> Option<Vec<u8>> {
        let fleet = self.world.fleet()?;
        let model = read.scan.model.value().map(String::as_str);
        let served = fleet.serve(read.pool.as_deref(), model)?;
        let body = self.host.body(0, read.bytes);
        let handover = served.pool.handover;
        handover.body(surface, &body, &read.scan.members, ids)
    }

    /// Sends this body instead of the one that came.
    pub(super) fn hand_over(&mut self, bytes: usize, body: &[u8]) {
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
    pub(super) fn send_to(&mut self, pool: &str, endpoints: Option<&str>, rank: Option<DpRank>) {
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
