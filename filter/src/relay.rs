//! The leader's part in reports: it takes them out of the shared queue and sends them to the
//! sidecar, and shows the sidecar the lanes as they are.

use hashbrown::HashSet;
use kv_core::report::{OwnerKey, Sum};
use kv_core::wire::{self, QUEUE, Up};

use crate::fleet::Fleet;
use crate::host::{Host, Queue, Token};
use crate::metrics::{Event, Metrics};

/// Reports taken from the queue at a time, at most.
const MAX_REPORTS: usize = 256;
/// Their size, at most, in bytes.
const MAX_BYTES: usize = 1 << 20;
/// Aim for the reports of one message, in bytes.
const MESSAGE_BYTES: usize = 32 << 10;
/// Period of showing the lanes.
const LANES_NS: u64 = 1_000_000_000;
/// Owners of one message, at most.
const MESSAGE_LANES: usize = 1_000;

/// The relay of one root context.
#[derive(Debug, Default)]
pub struct Relay {
    queue: Option<Queue>,
    shown_ns: u64,
    /// Owners whose lanes were not zero when they were last shown; `None` before this leader has
    /// shown any, when the one before it may have shown them all.
    loaded: Option<HashSet<OwnerKey>>,
}

impl Relay {
    /// This root context has become the leader: arrivals are told to it.
    pub fn register(&mut self, host: &impl Host) {
        self.queue = host.register_queue(QUEUE);
        self.shown_ns = 0;
        self.loaded = None;
    }

    /// Sends the reports that are in the queue; without a stream they are dropped, and their VMs
    /// make up for it when there is one. `false` if the stream took a message no more.
    pub fn drain(&self, host: &impl Host, metrics: &mut Metrics, stream: Option<Token>) -> bool {
        let Some(queue) = self.queue else {
            return true;
        };
        let (mut count, mut bytes) = (0, 0);
        let (mut message, mut message_bytes) = (Vec::new(), 0);
        let mut alive = true;
        while count < MAX_REPORTS && bytes < MAX_BYTES {
            let Some(report) = host.dequeue(queue) else {
                break;
            };
            count += 1;
            bytes += report.len();
            if message_bytes + report.len() > MESSAGE_BYTES {
                let full = std::mem::take(&mut message);
                alive &= send(host, metrics, stream, full);
                message_bytes = 0;
            }
            message_bytes += report.len();
            message.push(report);
        }
        alive & send(host, metrics, stream, message)
    }

    /// Shows the lanes of all owners in use, and of those that no longer are, once a second.
    /// `false` if the stream took a message no more.
    pub fn show(&mut self, host: &impl Host, stream: Token, fleet: &Fleet, now_ns: u64) -> bool {
        if now_ns.saturating_sub(self.shown_ns) < LANES_NS {
            return true;
        }
        self.shown_ns = now_ns;
        let mut shown = Vec::new();
        let before = self.loaded.take();
        let mut now_loaded = HashSet::new();
        for place in fleet.places() {
            let lanes = place.lane.read(host);
            let loaded = (lanes.a, lanes.b) != (0, 0);
            if loaded {
                now_loaded.insert(place.owner);
            }
            if loaded || before.as_ref().is_none_or(|b| b.contains(&place.owner)) {
                shown.push(Sum {
                    owner: place.owner,
                    a: lanes.a,
                    b: lanes.b,
                });
            }
        }
        self.loaded = Some(now_loaded);
        let send = |part: &[Sum]| host.send(stream, &wire::encode(&Up::Lanes(part.to_vec())));
        shown.chunks(MESSAGE_LANES).all(send)
    }
}

fn send(
    host: &impl Host,
    metrics: &mut Metrics,
    stream: Option<Token>,
    reports: Vec<Vec<u8>>,
) -> bool {
    let count = u32::try_from(reports.len()).unwrap_or(u32::MAX);
    if count == 0 {
        return true;
    }
    let sent = stream.map(|stream| host.send(stream, &wire::encode(&Up::Reports(reports))));
    let event = match sent {
        Some(true) => Event::Report,
        Some(false) | None => Event::ReportDropped,
    };
    metrics.count(host, event, count);
    sent.unwrap_or(true)
}
