//! The filter's metrics. The doc comments are the catalogue.
//!
//! Envoy keeps them under `wasmcustom.`, which it drops when it exports them. A label is part of the
//! name, as `_label=.=value;.;`; Envoy's `stats_tags` take it out again with the regular expression
//! `(_?LABEL=\.=(.+?);\.;)` for each of [`LABELS`].
//!
//! The load gauges are in [`crate::lanes`]; `kv_router_turns_total` is in [`crate::fleet`].

use hashbrown::HashMap;
use kv_core::wire::WireError;

use crate::hints::Kind as Hint;
use crate::host::{Host, MetricId, MetricKind};
use crate::reason::Reason;
use crate::refusal::Refusal;

/// Labels that names below carry.
pub const LABELS: [&str; 3] = ["pool", "reason", "kind"];

/// Counter of routed requests by `pool` and `reason` ([`Reason::name`]); pool `none` where no
/// worker table is known. *Use*: share of requests routed by cache. *Action*: a growing share of
/// any reason but `kv` and `passed` says what keeps requests from being routed by cache.
pub const REQUESTS: &str = "kv_router_requests_total";

/// Counter of requests that the chosen worker has answered, by `pool` and `reason`, beside
/// [`REQUESTS`]. *Use*: its share there. *Action*: [`MISSED`] says what became of the rest.
pub const INTENDED: &str = "kv_router_routed_as_intended_total";

/// Counter of requests that the chosen worker has not answered, by `reason` ([`Miss::name`]).
pub const MISSED: &str = "kv_router_missed_total";

/// Counter of requests that were answered with an error, by `reason` ([`Refusal::name`]).
/// *Action*: each reason says what the client lacks.
pub const REFUSED: &str = "kv_router_refused_total";

/// Counter of requests with privileged hints that did not count, by `kind` ([`Hint::name`]).
/// *Action*: the route or the pool must trust the client, or clients are trying.
pub const HINTS_IGNORED: &str = "kv_router_hints_ignored_total";

/// Counter of things that went wrong, by `kind` ([`Fault::kind`]). *Action*: each kind says what;
/// all should stand still.
pub const FAULTS: &str = "kv_router_faults_total";

/// Gauge: 1 while the sidecar has not been heard of for 5 seconds. *Action*: look after the
/// sidecar; 30 seconds later cache hits begin to count less.
pub const STALE: &str = "kv_router_stale";

/// Pools counted apart in [`REQUESTS`]; requests of further ones count as pool `other`.
const MAX_POOLS: usize = 1024;

/// Counters without labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// `kv_router_bridge_batches_total`: batches from the sidecar written to shared data.
    Batch,
    /// `kv_router_bridge_writes_total`: writes in them.
    Write,
    /// `kv_router_bridge_refused_total`: writes refused because the sidecar may not write their
    /// key. *Action*: filter and sidecar are of different versions.
    Refused,
    /// `kv_router_bridge_leases_total`: times a VM became the bridge. *Action*: growth without
    /// reconfiguration means that threads stall or trap.
    Lease,
    /// `kv_router_unknown_model_total`: requests for a model that no pool names. They are answered
    /// with an error.
    UnknownModel,
    /// `kv_router_unknown_pool_total`: requests whose route, listener or client names a pool that
    /// there is not. They go to the pool of their model. *Action*: correct the name.
    UnknownPool,
    /// `kv_router_reports_total`: reports of VMs sent to the sidecar.
    Report,
    /// `kv_router_reports_dropped_total`: reports dropped because no sidecar listened. The VMs
    /// report whole when one does.
    ReportDropped,
    /// `kv_router_report_steps_dropped_total`: steps of requests dropped because no bridge took
    /// reports. *Action*: no VM of this Envoy could become the bridge.
    StepDropped,
    /// `kv_router_reports_complete_total`: reports of all bookings of a VM.
    Complete,
    /// `kv_router_bookings_raced_total`: bookings between whose decision and whose entry in the
    /// lanes the load of the chosen worker changed.
    Raced,
    /// `kv_router_bookings_undone_total`: bookings undone because that made another worker better.
    Undone,
    /// `kv_router_lora_missing_total`: requests for an adapter that no worker has loaded of those
    /// that might have them. *Action*: load it on one, or correct what workers say.
    LoraMissing,
    /// `kv_router_pinned_out_total`: requests sent to the worker that they name although it takes
    /// none.
    PinnedOut,
    /// `kv_router_sessions_bound_total`: requests whose session was bound nowhere.
    SessionBound,
    /// `kv_router_sessions_kept_total`: requests that went where their session is bound.
    SessionKept,
    /// `kv_router_sessions_left_total`: requests that went elsewhere: the worker was gone, or cost
    /// too much.
    SessionLeft,
    /// `kv_router_worker_failures_total`: times a worker was not reached, broke off or answered
    /// with a status of 500 or above.
    Failure,
    /// `kv_router_written_off_total`: lanes from which was taken what VMs had left there.
    WrittenOff,
    /// `kv_router_prefills_estimated_total`: answers that come whole and whose prefill was taken to
    /// be done by the worker's rate.
    Estimated,
    /// `kv_router_bookings_unlisted_total`: bookings for which the board of live prompts had no
    /// room. Their blocks count in full until the sidecar has corrected that. *Action*: some
    /// hundred requests at a time share their first block; nothing is wrong but for the delay.
    Unlisted,
    /// `kv_router_held_total`: requests that were held because all workers were busy.
    Held,
    /// `kv_router_held_released_total`: requests that were let go although the sidecar had not said
    /// so, because it was not heard of or the VM ended. *Action*: look after the sidecar.
    HeldReleased,
    /// `kv_router_held_left_total`: requests whose client left while they were held.
    HeldLeft,
    /// `kv_router_held_bypassed_total`: requests that should have been held and went on at once,
    /// because no sidecar was heard of or their body was not at hand as a whole.
    HeldBypassed,
    /// `kv_router_handed_over_total`: requests whose worker got the token ids of a prompt that came
    /// as text.
    HandedOver,
    /// `kv_router_text_calls_total`: questions about a text that went to the sidecar by a call of
    /// their own, because the stream for them was not open or an answer on it is late. *Action*: a
    /// few after a start are usual; where all are, sidecar and filter are of different versions.
    TextCall,
}

impl Event {
    /// One more than the last one's number.
    const COUNT: usize = Self::TextCall as usize + 1;

    fn name(self) -> &'static str {
        match self {
            Self::Batch => "kv_router_bridge_batches_total",
            Self::Write => "kv_router_bridge_writes_total",
            Self::Refused => "kv_router_bridge_refused_total",
            Self::Lease => "kv_router_bridge_leases_total",
            Self::UnknownModel => "kv_router_unknown_model_total",
            Self::UnknownPool => "kv_router_unknown_pool_total",
            Self::Report => "kv_router_reports_total",
            Self::ReportDropped => "kv_router_reports_dropped_total",
            Self::StepDropped => "kv_router_report_steps_dropped_total",
            Self::Complete => "kv_router_reports_complete_total",
            Self::Raced => "kv_router_bookings_raced_total",
            Self::Undone => "kv_router_bookings_undone_total",
            Self::LoraMissing => "kv_router_lora_missing_total",
            Self::PinnedOut => "kv_router_pinned_out_total",
            Self::SessionBound => "kv_router_sessions_bound_total",
            Self::SessionKept => "kv_router_sessions_kept_total",
            Self::SessionLeft => "kv_router_sessions_left_total",
            Self::Failure => "kv_router_worker_failures_total",
            Self::WrittenOff => "kv_router_written_off_total",
            Self::Estimated => "kv_router_prefills_estimated_total",
            Self::Unlisted => "kv_router_bookings_unlisted_total",
            Self::Held => "kv_router_held_total",
            Self::HeldReleased => "kv_router_held_released_total",
            Self::HeldLeft => "kv_router_held_left_total",
            Self::HeldBypassed => "kv_router_held_bypassed_total",
            Self::HandedOver => "kv_router_handed_over_total",
            Self::TextCall => "kv_router_text_calls_total",
        }
    }
}

/// Why the chosen worker has not answered a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Miss {
    /// Envoy sent the request again, because the chosen worker took no requests.
    Retried,
    /// Envoy sent the request elsewhere at once. *Action*: the workers' cluster lacks the
    /// `override_host` policy or the worker.
    OverrideMissed,
    /// No worker was chosen, Envoy's own policy did.
    Unattributed,
    /// No worker has answered: the client left, or none could be reached.
    Unanswered,
}

impl Miss {
    const COUNT: usize = 4;

    /// Metric label.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Retried => "retried",
            Self::OverrideMissed => "override_missed",
            Self::Unattributed => "unattributed",
            Self::Unanswered => "unanswered",
        }
    }
}

/// Histograms, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timing {
    /// `kv_router_decision_us`: from a request's headers to its decision, the client's upload
    /// included.
    Decision,
    /// `kv_router_decision_after_body_us`: from the last part of a request to its decision: what
    /// routing adds to the time to the first token.
    AfterBody,
    /// `kv_router_text_us`: from asking the sidecar about a prompt that is text to its answer, or to
    /// the end of the wait for it.
    Text,
    /// `kv_router_lookup_us`: finding the overlaps in the pages.
    Lookup,
    /// `kv_router_held_us`: from holding a request to letting it go on or refusing it.
    Held,
}

impl Timing {
    const COUNT: usize = 5;

    fn name(self) -> &'static str {
        match self {
            Self::Decision => "kv_router_decision_us",
            Self::AfterBody => "kv_router_decision_after_body_us",
            Self::Text => "kv_router_text_us",
            Self::Lookup => "kv_router_lookup_us",
            Self::Held => "kv_router_held_us",
        }
    }
}

/// Something that went wrong and was worked around.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The head record is broken; the last good one counts.
    Head,
    /// The worker table is broken; the last good one counts.
    Table,
    /// The published loads are broken; lanes count as they are.
    Loads,
    /// A worker's endpoint can't stand in a header; the worker gets no requests.
    Endpoint,
    /// Envoy did not define a load gauge; that owner's load is unknown.
    Lane,
    /// Envoy did not set a header; its own policy chose the worker.
    Header,
    /// Envoy did not answer a request that was to be refused.
    Reply,
    /// Envoy did not let a request go on whose prompt had been read.
    Resume,
    /// Envoy did not hand out all of a body it had announced.
    Body,
    /// `allow_on_headers_stop_iteration` is missing; this VM routes all requests by load.
    Unheld,
    /// The stream to the sidecar could not be opened.
    Connect,
    /// The stream to the sidecar ended.
    Closed,
    /// A batch came to a bridge that has been replaced; it was dropped.
    Fenced,
    /// A message on the stream could not be read.
    Wire(WireError),
}

impl Fault {
    /// Metric label.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::Head => "head",
            Self::Table => "table",
            Self::Loads => "loads",
            Self::Endpoint => "endpoint",
            Self::Lane => "lane",
            Self::Header => "header",
            Self::Reply => "reply",
            Self::Resume => "resume",
            Self::Body => "body",
            Self::Unheld => "unheld",
            Self::Connect => "connect",
            Self::Closed => "closed",
            Self::Fenced => "fenced",
            Self::Wire(error) => error.kind(),
        }
    }
}

/// Ids of the metrics this VM has used. Envoy makes a new id each time a name is defined.
#[derive(Debug, Default)]
pub struct Metrics {
    events: [Option<MetricId>; Event::COUNT],
    timings: [Option<MetricId>; Timing::COUNT],
    /// By kind, of which there are few.
    faults: Vec<(&'static str, Option<MetricId>)>,
    requests: HashMap<String, ByPool>,
    missed: [Option<MetricId>; Miss::COUNT],
    refused: [Option<MetricId>; Refusal::COUNT],
    hints_ignored: [Option<MetricId>; Hint::COUNT],
    stale: Option<MetricId>,
}

/// Counters of one pool, by reason.
#[derive(Debug, Default)]
struct ByPool {
    requests: [Option<MetricId>; Reason::COUNT],
    intended: [Option<MetricId>; Reason::COUNT],
}

impl Metrics {
    /// Adds to a counter.
    pub fn count(&mut self, host: &impl Host, event: Event, by: u32) {
        let define = || host.define(MetricKind::Counter, event.name());
        if let Some(slot) = self.events.get_mut(event as usize)
            && by > 0
        {
            add(host, slot, by.into(), define);
        }
    }

    /// Records a time span that began at `since_ns`.
    pub fn time(&mut self, host: &impl Host, timing: Timing, since_ns: u64, now_ns: u64) {
        let Some(slot) = self.timings.get_mut(timing as usize) else {
            return;
        };
        if slot.is_none() {
            *slot = host.define(MetricKind::Histogram, timing.name());
        }
        if let Some(id) = *slot {
            host.record(id, now_ns.saturating_sub(since_ns) / 1_000);
        }
    }

    /// Counts a fault.
    pub fn fault(&mut self, host: &impl Host, fault: Fault) {
        let kind = fault.kind();
        let define = || host.define(MetricKind::Counter, &labelled(FAULTS, &[("kind", kind)]));
        if let Some((_, slot)) = self.faults.iter_mut().find(|(known, _)| *known == kind) {
            add(host, slot, 1, define);
            return;
        }
        let mut slot = None;
        add(host, &mut slot, 1, define);
        self.faults.push((kind, slot));
    }

    /// Counts a routed request.
    pub fn request(&mut self, host: &impl Host, pool: &str, reason: Reason) {
        let (pool, slots) = self.pool(pool);
        if let Some(slot) = slots.requests.get_mut(reason.index()) {
            count(host, slot, REQUESTS, pool, reason);
        }
    }

    /// Counts a request that the chosen worker has answered.
    pub fn intended(&mut self, host: &impl Host, pool: &str, reason: Reason) {
        let (pool, slots) = self.pool(pool);
        if let Some(slot) = slots.intended.get_mut(reason.index()) {
            count(host, slot, INTENDED, pool, reason);
        }
    }

    /// Counts a privileged hint that does not count.
    pub fn hint_ignored(&mut self, host: &impl Host, hint: Hint) {
        let define = || {
            let labels = [("kind", hint.name())];
            host.define(MetricKind::Counter, &labelled(HINTS_IGNORED, &labels))
        };
        if let Some(slot) = self.hints_ignored.get_mut(hint as usize) {
            add(host, slot, 1, define);
        }
    }

    /// Counts a request that the chosen worker has not answered.
    pub fn missed(&mut self, host: &impl Host, miss: Miss) {
        let define = || {
            let labels = [("reason", miss.name())];
            host.define(MetricKind::Counter, &labelled(MISSED, &labels))
        };
        if let Some(slot) = self.missed.get_mut(miss as usize) {
            add(host, slot, 1, define);
        }
    }

    /// Counts a request that was answered with an error.
    pub fn refused(&mut self, host: &impl Host, refusal: Refusal) {
        let define = || {
            let labels = [("reason", refusal.name())];
            host.define(MetricKind::Counter, &labelled(REFUSED, &labels))
        };
        if let Some(slot) = self.refused.get_mut(refusal.index()) {
            add(host, slot, 1, define);
        }
    }

    fn pool<'a>(&mut self, pool: &'a str) -> (&'a str, &mut ByPool) {
        let pool = if self.requests.len() < MAX_POOLS || self.requests.contains_key(pool) {
            pool
        } else {
            "other"
        };
        (pool, self.requests.entry_ref(pool).or_default())
    }

    /// Sets the gauge of staleness; `true` if no other VM of the process has done so already.
    pub fn stale(&mut self, host: &impl Host, stale: bool) -> bool {
        if self.stale.is_none() {
            self.stale = host.define(MetricKind::Gauge, STALE);
        }
        let Some(id) = self.stale else {
            return true;
        };
        let before = host.metric(id);
        host.record(id, stale.into());
        before != Some(stale.into())
    }
}

fn count(host: &impl Host, slot: &mut Option<MetricId>, name: &str, pool: &str, reason: Reason) {
    let labels = [("pool", pool), ("reason", reason.name())];
    let define = || host.define(MetricKind::Counter, &labelled(name, &labels));
    add(host, slot, 1, define);
}

fn add(
    host: &impl Host,
    slot: &mut Option<MetricId>,
    by: i64,
    define: impl FnOnce() -> Option<MetricId>,
) {
    if slot.is_none() {
        *slot = define();
    }
    if let Some(id) = *slot {
        host.add(id, by);
    }
}

/// A name with its labels, as Envoy's `stats_tags` are to find them.
#[must_use]
pub fn labelled(name: &str, labels: &[(&str, &str)]) -> String {
    let mut labelled = name.to_owned();
    for (label, value) in labels {
        labelled.extend(["_", label, "=.=", value, ";.;"]);
    }
    labelled
}

#[cfg(test)]
mod tests {
    use super::{FAULTS, Fault, Metrics, labelled};
    use crate::fake::Fake;
    use crate::reason::Reason;
    use kv_core::wire::WireError;

    #[test]
    fn labels_stand_in_the_name() {
        let name = labelled(
            "kv_router_requests_total",
            &[("pool", "a.b"), ("reason", "kv")],
        );
        assert_eq!(
            name,
            "kv_router_requests_total_pool=.=a.b;.;_reason=.=kv;.;"
        );
    }

    #[test]
    fn a_metric_is_defined_once_and_counts() {
        let host = Fake::default();
        let mut metrics = Metrics::default();
        for _ in 0..3 {
            metrics.fault(&host, Fault::Wire(WireError::Version(9)));
            metrics.request(&host, "p", Reason::Text);
        }
        assert_eq!(host.named(&labelled(FAULTS, &[("kind", "version")])), 3);
        assert_eq!(host.defined(), 2);
    }

    #[test]
    fn pools_beyond_the_bound_share_a_label() {
        let host = Fake::default();
        let mut metrics = Metrics::default();
        for i in 0..2000 {
            metrics.request(&host, &format!("p{i}"), Reason::Kv);
        }
        assert_eq!(host.defined(), super::MAX_POOLS + 1);
    }
}
