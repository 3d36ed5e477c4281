//! What a body said about where to go.

use kv_core::holdings::Named;
use kv_core::scan::{Field, Scan};

use crate::choose::Answer;
use crate::header_map::HeaderMap;
use crate::hints::{Hints, Nvext};
use crate::host::Host;
use crate::reason::Reason;
use crate::usage;
use crate::vm::Router;

/// Milliseconds after which a request that has to wait is of no use any more.
const DEADLINE: &str = "x-kv-router-deadline-ms";

/// All of it.
#[derive(Debug)]
pub(super) struct Read {
    pub(super) reason: Reason,
    pub(super) tokens: u32,
    pub(super) scan: Scan,
    /// Sequence hashes of a prompt that is text.
    pub(super) hashes: Vec<u64>,
    /// Its blocks in the pool's further families.
    pub(super) families: Vec<Named>,
    /// Whether the body was read to its end.
    pub(super) is_complete: bool,
    /// Bytes of the body that Envoy keeps.
    pub(super) bytes: usize,
    /// What is to stand in the place of the body once it is routed.
    pub(super) changed: Option<Vec<u8>>,
    pub(super) headers: HeaderMap,
    /// The pool, where it is named.
    pub(super) pool: Option<String>,
    /// The body's extensions.
    pub(super) nvext: Nvext,
    /// What counts of headers and extensions, once it is known.
    pub(super) hints: Option<Hints>,
}

impl Read {
    /// What counts of what the request says about its routing. Settled once, with the table as it
    /// is then.
    pub(super) fn hints<H: Host>(&mut self, router: &mut Router<H>) -> &Hints {
        self.hints.get_or_insert_with(|| {
            let fleet = router.world.fleet();
            let (pool, model) = (self.pool.as_deref(), self.scan.model.value());
            let model = model.map(String::as_str);
            let served = fleet.as_ref().and_then(|fleet| fleet.serve(pool, model));
            let pool = served.map(|served| served.pool);
            let Router { host, metrics, .. } = router;
            Hints::gather(host, metrics, pool, &self.headers, &self.nvext)
        })
    }

    /// Milliseconds after which the request is of no use any more, where it says so.
    pub(super) fn deadline_ms(&self) -> Option<u64> {
        let value = self.headers.get(DEADLINE)?;
        std::str::from_utf8(value).ok()?.trim().parse().ok()
    }

    /// What answer the body asks for.
    pub(super) fn answer(&self, host: &impl Host, expected: u32) -> Answer {
        match self.scan.stream {
            Field::Value(true) => Answer::Streamed {
                expected,
                tells_usage: self.wants_usage(host),
            },
            _ if self.is_complete => Answer::Whole,
            _ => Answer::Unknown,
        }
    }

    /// Whether a streamed answer is to say what it used.
    fn wants_usage(&self, host: &impl Host) -> bool {
        let place = self.scan.members.get(usage::STREAM_OPTIONS);
        place.is_some_and(|place| {
            let is_short = place.len() <= usage::MAX_STREAM_OPTIONS;
            !is_short || usage::is_asked_for(&host.body(place.start, place.len()))
        })
    }

    /// Nothing but the headers.
    pub(super) fn nothing(reason: Reason, headers: HeaderMap, pool: Option<String>) -> Self {
        Self {
            reason,
            tokens: 0,
            scan: Scan::default(),
            hashes: Vec::new(),
            families: Vec::new(),
            is_complete: false,
            bytes: 0,
            changed: None,
            headers,
            pool,
            nvext: Nvext::default(),
            hints: None,
        }
    }
}

/// What keeps a prompt's blocks apart from others': what the hints say, else the body.
pub(super) fn salt<'a>(hints: Option<&'a Hints>, body: &'a Field<String>) -> &'a str {
    let said = hints.and_then(|hints| hints.salt.as_ref());
    said.or(body.value()).map_or("", String::as_str)
}
