//! Every metric of the sidecar. The doc comment of each field is its entry in the catalogue; the
//! help text in the exposition is its short form.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// Content type of [`Metrics::encode`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// An event plane and what happened there.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PlaneKind {
    /// [`crate::ingest::Plane::kind`].
    pub plane: &'static str,
    /// What happened.
    pub kind: &'static str,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Kind {
    /// What happened.
    pub kind: &'static str,
}

/// A pool.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct InPool {
    /// The pool's name.
    pub pool: String,
}

/// A worker.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct OfWorker {
    /// The pool's name.
    pub pool: String,
    /// The worker.
    pub worker: u64,
}

/// What the exact state says of a decision.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Outcome {
    /// What it says.
    pub outcome: &'static str,
}

/// An owner.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct OfOwner {
    /// The pool's name.
    pub pool: String,
    /// The worker.
    pub worker: u64,
    /// Its data-parallel rank.
    pub rank: u32,
}

/// A class of a pool's queue.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct OfClass {
    /// The pool's name.
    pub pool: String,
    /// The class.
    pub class: String,
}

/// What became of a request that waited.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct QueueOutcome {
    /// The pool's name.
    pub pool: String,
    /// Its class.
    pub class: String,
    /// What became of it.
    pub outcome: &'static str,
}

macro_rules! metrics {
    ($($(#[doc = $doc:literal])+ $field:ident: $type:ty = $make:expr, $name:literal, $unit:expr, $help:literal;)+) => {
        /// The metrics and their registry.
        #[derive(Debug)]
        pub struct Metrics {
            registry: Registry,
            $($(#[doc = $doc])+ pub $field: $type,)+
        }

        impl Default for Metrics {
            fn default() -> Self {
                let mut registry = Registry::with_prefix("kv_router");
                $(
                    let $field: $type = $make;
                    let unit: Option<Unit> = $unit;
                    match unit {
                        Some(unit) => registry.register_with_unit($name, $help, unit, $field.clone()),
                        None => registry.register($name, $help, $field.clone()),
                    }
                )+
                Self { registry, $($field,)+ }
            }
        }
    };
}

metrics! {
    /// `kv_router_messages_total{plane,kind}`: messages received, kind `events` or `snapshot`.
    /// Flat while engines serve: they publish nothing, or on another subject.
    messages: Family<PlaneKind, Counter> = Family::default(), "messages", None, "Messages received";
    /// `kv_router_events_total{plane,kind}`: events applied, kind `stored`, `removed`, `cleared`.
    events: Family<PlaneKind, Counter> = Family::default(), "events", None, "Events applied";
    /// `kv_router_event_rejections_total{plane,kind}`: events dropped, kind says why
    /// ([`crate::ingest::Rejection`]). `unknown_worker`: the configuration lacks a worker.
    rejections: Family<PlaneKind, Counter> = Family::default(), "event_rejections", None, "Events dropped";
    /// `kv_router_event_gaps_total{pool}`: jumps in the event ids of an owner: events were lost.
    gaps: Family<InPool, Counter> = Family::default(), "event_gaps", None, "Jumps in event ids";
    /// `kv_router_streams_total{plane,kind}`: what became of workers' own streams: `opened`,
    /// `closed`, `failed` and `protocol` attempts to open one, `too_large` and `malformed` messages,
    /// `replay`, `replay_failed`, `gap`, `restarted`, `throttled` by their quota, `refused` posts,
    /// `second_reader` where a polled engine's events vanish, `unknown_worker` in a stream of all.
    streams: Family<PlaneKind, Counter> = Family::default(), "streams", None, "What became of engines' own streams";
    /// `kv_router_index_changes_total{kind}`: blocks by what an event did with them; `unknown`
    /// removals and `orphaned` stores point to lost events.
    changes: Family<Kind, Counter> = Family::default(), "index_changes", None, "Blocks by what was done with them";
    /// `kv_router_snapshots_total{kind}`: engines' answers to requests for a snapshot, kind
    /// `applied` or why not ([`crate::ingest::NoSnapshot`]).
    snapshots: Family<Kind, Counter> = Family::default(), "snapshots", None, "Snapshot requests by outcome";
    /// `kv_router_partial_owners`: owners of which blocks may be missing or left over.
    partial_owners: Gauge = Gauge::default(), "partial_owners", None, "Owners with incomplete knowledge";
    /// `kv_router_doubtful_blocks`: blocks that may be gone, because events about them were lost;
    /// they count for nothing until something vouches for them.
    doubtful: Gauge = Gauge::default(), "doubtful_blocks", None, "Blocks that may be gone";
    /// `kv_router_workers_without_endpoint`: workers that publish on Dynamo's plane and that the
    /// configuration lacks.
    strangers: Gauge = Gauge::default(), "workers_without_endpoint", None, "Workers that publish and have no endpoint";
    /// `kv_router_unwell_workers{kind}`: workers whose events don't agree with what they do: kind
    /// `silent`, `dropped`, `mismatched`, `inaccurate`, `dropping`, `two_sources`.
    unwell: Family<Kind, Gauge> = Family::default(), "unwell_workers", None, "Workers whose events do not agree with what they do";
    /// `kv_router_prediction_accuracy{pool,worker}`: share of the cached prompt tokens, predicted or
    /// found by the engine, that were both, over the last answers; 0 to 1.
    accuracy: Family<OfWorker, Gauge<f64, AtomicU64>> = Family::default(), "prediction_accuracy", None, "Share of cached tokens predicted rightly";
    /// `kv_router_predicted_cached_tokens_total{pool,worker}`: prompt tokens that decisions took to
    /// be cached, of answers that say how many were.
    predicted_tokens: Family<OfWorker, Counter> = Family::default(), "predicted_cached_tokens", None, "Prompt tokens taken to be cached";
    /// `kv_router_found_cached_tokens_total{pool,worker}`: prompt tokens that were, by those answers.
    found_tokens: Family<OfWorker, Counter> = Family::default(), "found_cached_tokens", None, "Prompt tokens found in caches";
    /// `kv_router_index_blocks`: distinct blocks in the index.
    blocks: Gauge = Gauge::default(), "index_blocks", None, "Distinct blocks";
    /// `kv_router_index_owner_blocks`: blocks counted once for each owner.
    owner_blocks: Gauge = Gauge::default(), "index_owner_blocks", None, "Blocks times owners";
    /// `kv_router_index_orphans`: blocks of stores that wait for their parent.
    orphans: Gauge = Gauge::default(), "index_orphans", None, "Blocks waiting for their parent";
    /// `kv_router_index_left_out_units`: units that did not fit into their page; above 0 some
    /// overlaps are seen too short.
    left_out_units: Gauge = Gauge::default(), "index_left_out_units", None, "Units that did not fit into their page";
    /// `kv_router_index_pages`: pages, each a key in Envoy's shared data.
    pages: Gauge = Gauge::default(), "index_pages", None, "Pages";
    /// `kv_router_index_bytes`: memory of the index. At `index_bytes` blocks are evicted.
    index_bytes: Gauge = Gauge::default(), "index", Some(Unit::Bytes), "Memory of the index";
    /// `kv_router_index_page_bytes`: memory of the pages in each Envoy, their keys included. At
    /// `page_bytes` blocks are evicted.
    page_bytes: Gauge = Gauge::default(), "index_page", Some(Unit::Bytes), "Memory of the pages in each Envoy";
    /// `kv_router_index_evicted_total`: blocks dropped because index or pages were full, the
    /// longest unused first. Their workers still have them.
    evicted: Counter = Counter::default(), "index_evicted", None, "Blocks dropped for want of memory";
    /// `kv_router_nats_connected`: 1 while connected. At 0 the index ages.
    nats_connected: Gauge = Gauge::default(), "nats_connected", None, "Whether NATS is connected";
    /// `kv_router_nats_connects_total`: connections made.
    nats_connects: Counter = Counter::default(), "nats_connects", None, "Connections made to NATS";
    /// `kv_router_nats_slow_total`: times the client dropped messages because the sidecar was
    /// behind; the gaps that follow are repaired where the plane can.
    nats_slow: Counter = Counter::default(), "nats_slow", None, "Times messages were dropped for lack of speed";
    /// `kv_router_bridge_subscribers`: Envoys that are being fed.
    subscribers: Gauge = Gauge::default(), "bridge_subscribers", None, "Envoys being fed";
    /// `kv_router_bridge_subscriptions_total{kind}`: streams opened, kind `accepted` or why refused:
    /// `version`, `format`, `term`, `too_many`, `malformed`, `empty`, `silent`.
    subscriptions: Family<Kind, Counter> = Family::default(), "bridge_subscriptions", None, "Streams opened";
    /// `kv_router_bridge_batches_total`: batches sent.
    batches: Counter = Counter::default(), "bridge_batches", None, "Batches sent";
    /// `kv_router_bridge_sent_bytes_total`: bytes sent.
    sent: Counter = Counter::default(), "bridge_sent", Some(Unit::Bytes), "Bytes sent";
    /// `kv_router_bridge_refused_writes_total`: writes the filter refused; above 0 is a defect.
    refused_writes: Counter = Counter::default(), "bridge_refused_writes", None, "Writes refused by the filter";
    /// `kv_router_publish_seconds`: from receiving an event to its pages being in Envoy.
    publish: Histogram = Histogram::new(exponential_buckets(0.000_1, 2.0, 16)), "publish", Some(Unit::Seconds), "From event received to written in Envoy";
    /// `kv_router_full_sync_seconds`: from a subscription to the last page being in Envoy.
    full_sync: Histogram = Histogram::new(exponential_buckets(0.001, 2.0, 14)), "full_sync", Some(Unit::Seconds), "From subscription to all pages written";
    /// `kv_router_reports_total{kind}`: reports of VMs, kind `next`, `complete`, `gap`, `repeated`,
    /// `fenced`, `malformed`, `version`, `empty`. A `gap`: reports before it were lost.
    reports: Family<Kind, Counter> = Family::default(), "reports", None, "Reports of VMs";
    /// `kv_router_report_steps_total{kind}`: steps of requests, kind `booked`, `kept`, `moved`,
    /// `first_token`, `prefilled`, `grown`, `cached`, `freed`, `failed`, `queued`, `unqueued`, `unknown`, `duplicate`, `full`,
    /// and of VMs, kind `vm`. `unknown` after a gap is normal.
    steps: Family<Kind, Counter> = Family::default(), "report_steps", None, "Steps of requests";
    /// `kv_router_unknown_prefixes_total`: bookings that name a prefix which the index has no more;
    /// its blocks count as nobody else's.
    unknown_prefixes: Counter = Counter::default(), "unknown_prefixes", None, "Bookings with a prefix not in the index";
    /// `kv_router_lane_leaks_total`: differences between lanes and reports, corrected. A few come
    /// with every VM that dies; more are a defect.
    leaks: Counter = Counter::default(), "lane_leaks", None, "Differences between lanes and reports";
    /// `kv_router_retired_vms_total`: VMs that fell silent while their Envoy did not.
    retired_vms: Counter = Counter::default(), "retired_vms", None, "VMs that fell silent";
    /// `kv_router_lost_proxies_total`: Envoys that went away for good.
    lost_proxies: Counter = Counter::default(), "lost_proxies", None, "Envoys that went away";
    /// `kv_router_expired_bookings_total`: bookings without any step for too long.
    expired: Counter = Counter::default(), "expired_bookings", None, "Bookings idle for too long";
    /// `kv_router_corrections_total`: times an Envoy was told about load.
    corrections: Counter = Counter::default(), "corrections", None, "Times an Envoy was told about load";
    /// `kv_router_written_off_lanes_total`: lanes that VMs which ended had left something in, and
    /// that an Envoy was told to empty.
    written_off: Counter = Counter::default(), "written_off_lanes", None, "Lanes that an Envoy was told to empty";
    /// `kv_router_worker_failures_total{kind}`: requests that a worker failed, kind `unreached`,
    /// `broken`, `status` ([`kv_core::report::Failure`]).
    worker_failures: Family<Kind, Counter> = Family::default(), "worker_failures", None, "Requests that a worker failed";
    /// `kv_router_worker_changes_total{kind}`: workers left out, kind `unreachable`, `failing` or
    /// `unwell` ([`crate::ejection::Why`]), taken back, kind `returned`, or kept because too few others were
    /// left, kind `spared`.
    worker_changes: Family<Kind, Counter> = Family::default(), "worker_changes", None, "Workers left out and taken back";
    /// `kv_router_workers_out`: workers that take no requests because they fail.
    workers_out: Gauge = Gauge::default(), "workers_out", None, "Workers that take no requests because they fail";
    /// `kv_router_registrations_total{kind}`: what workers said of themselves, kind `joined`,
    /// `changed`, `renewed`, `left`, `refused`, and leases that ran out, kind `expired`.
    registrations: Family<Kind, Counter> = Family::default(), "registrations", None, "What workers said of themselves";
    /// `kv_router_registered_workers`: workers under a lease.
    registered: Gauge = Gauge::default(), "registered_workers", None, "Workers under a lease";
    /// `kv_router_dns_lookups_total{kind}`: lookups of workers' names, kind `found`, `failed`. While
    /// they fail, the workers found before stay.
    lookups: Family<Kind, Counter> = Family::default(), "dns_lookups", None, "Lookups of workers' names";
    /// `kv_router_endpoint_discovery_total{kind}`: what went on between Envoys and the endpoints they
    /// are served: streams `opened`, responses `sent`, `taken`, `refused`, requests `malformed` or
    /// for an `other_type`.
    discovery: Family<Kind, Counter> = Family::default(), "endpoint_discovery", None, "Endpoints served to Envoys";
    /// `kv_router_bookings`: requests booked, over all Envoys.
    bookings: Gauge = Gauge::default(), "bookings", None, "Requests booked";
    /// `kv_router_sessions_total{outcome}`: requests of sessions by what became of the binding,
    /// `bound`, `kept`, `moved`, `lost`, `full`; and bindings that were `released`.
    sessions: Family<Outcome, Counter> = Family::default(), "sessions", None, "Requests of sessions, and bindings released";
    /// `kv_router_bound_sessions`: sessions that are bound to a worker.
    bound_sessions: Gauge = Gauge::default(), "bound_sessions", None, "Sessions bound to a worker";
    /// `kv_router_active_blocks{pool,worker,rank}`: distinct blocks in use on an owner.
    active_blocks: Family<OfOwner, Gauge> = Family::default(), "active_blocks", None, "Distinct blocks in use";
    /// `kv_router_active_prefill_tokens{pool,worker,rank}`: prompt tokens still to be prefilled.
    active_prefill_tokens: Family<OfOwner, Gauge> = Family::default(), "active_prefill_tokens", None, "Prompt tokens to be prefilled";
    /// `kv_router_active_requests{pool,worker,rank}`: requests on an owner.
    active_requests: Family<OfOwner, Gauge> = Family::default(), "active_requests", None, "Requests";
    /// `kv_router_select_requests_total{kind}`: questions to the select service that choose or book,
    /// kind `selected`, `reserved`, `prefilled`, `filled`, `freed`, or why not
    /// ([`crate::select::SelectError`]).
    selects: Family<Kind, Counter> = Family::default(), "select_requests", None, "Questions to the select service";
    /// `kv_router_select_seconds`: from a question for a worker to its answer.
    select_time: Histogram = Histogram::new(exponential_buckets(0.000_05, 2.0, 16)), "select", Some(Unit::Seconds), "Choosing a worker for the select service";
    /// `kv_router_reservations`: requests reserved through the select service.
    reservations: Gauge = Gauge::default(), "reservations", None, "Requests reserved through the select service";
    /// `kv_router_shadow_total{outcome}`: decisions held against the exact state, by what it says
    /// ([`crate::decision::Verdict`]). `not_least` is a defect; much `overlap` or `load`: filters
    /// learn too late.
    shadow: Family<Outcome, Counter> = Family::default(), "shadow", None, "Decisions against the exact state";
    /// `kv_router_regret_milliseconds`: the same of predicted delays.
    regret_delay: Histogram = Histogram::new(regret_buckets()), "regret_milliseconds", None, "Exact predicted delay of the choice above the least";
    /// `kv_router_regret_blocks`: exact cost of the choice less the least exact cost.
    regret: Histogram = Histogram::new(regret_buckets()), "regret_blocks", None, "Exact cost of the choice above the least";
    /// `kv_router_queue_depth{pool,class}`: requests that wait because all workers are busy.
    queue_depth: Family<OfClass, Gauge> = Family::default(), "queue_depth", None, "Requests that wait";
    /// `kv_router_queue_requests_total{pool,class,outcome}`: requests that were to wait, outcome
    /// `queued`, and what became of them: `granted`, `late`, `left`, or the limit that their class
    /// had reached, `requests`, `raw_isl_tokens`, `cached_tokens`.
    queue: Family<QueueOutcome, Counter> = Family::default(), "queue_requests", None, "Requests that were to wait";
    /// `kv_router_queue_wait_seconds{pool,class}`: how long requests waited until they were let go.
    queue_wait: Family<OfClass, Histogram> = Family::new_with_constructor(wait_histogram), "queue_wait", Some(Unit::Seconds), "How long requests waited";
    /// `kv_router_predicted_blocks`: blocks predicted for owners of pools without KV events.
    predicted: Gauge = Gauge::default(), "predicted_blocks", None, "Blocks predicted from requests";
    /// `kv_router_peers`: other routers that announce requests or give signs of life.
    peers: Gauge = Gauge::default(), "peers", None, "Other routers";
    /// `kv_router_peer_events_total{kind}`: events of peers applied, kind `booked`, `first_token`,
    /// `freed`, `stale`. `stale`: a snapshot showed that the end of a request was missed.
    peer_events: Family<Kind, Counter> = Family::default(), "peer_events", None, "Events of peers applied";
    /// `kv_router_peer_sent_events_total{kind}`: events told to peers, kind `booked`,
    /// `first_token`, `freed`.
    peer_sent: Family<Kind, Counter> = Family::default(), "peer_sent_events", None, "Events told to peers";
    /// `kv_router_peer_dropped_total{kind}`: what was dropped on the way from or to peers, kind says
    /// why ([`crate::peers::Dropped`]).
    peer_dropped: Family<Kind, Counter> = Family::default(), "peer_dropped", None, "Dropped on the way from or to peers";
    /// `kv_router_peer_snapshots_total{kind}`: snapshots of live bookings, kind `asked`, `answered`.
    peer_snapshots: Family<Kind, Counter> = Family::default(), "peer_snapshots", None, "Snapshots of live bookings";
    /// `kv_router_lost_peers_total`: sidecars that fell silent; their bookings were freed.
    lost_peers: Counter = Counter::default(), "lost_peers", None, "Sidecars that fell silent";
    /// `kv_router_texts_total{kind}`: prompts that were text, kind how far they were read: `whole`,
    /// `beginning`, `before_media`, or why not: `no_tokenizer`, `template`, `malformed`,
    /// `overloaded`, `deadline`. Much `beginning` or `deadline`: the budget is short for a cold
    /// prompt. `overloaded`: the sidecar lacks processors.
    texts: Family<Kind, Counter> = Family::default(), "texts", None, "Prompts that were text";
    /// `kv_router_text_tokens_total{kind}`: token ids of such prompts, kind `remembered`,
    /// `tokenized`. Few remembered ones although conversations go on: `cache_bytes` is too small.
    text_tokens: Family<Kind, Counter> = Family::default(), "text_tokens", None, "Token ids of prompts that were text";
    /// `kv_router_text_seconds`: from a question about a prompt to its answer.
    text_time: Histogram = Histogram::new(exponential_buckets(0.000_05, 2.0, 16)), "text", Some(Unit::Seconds), "Reading a prompt that is text";
    /// `kv_router_text_remembered_bytes`: token ids that are remembered.
    text_remembered: Gauge = Gauge::default(), "text_remembered", Some(Unit::Bytes), "Token ids that are remembered";
    /// `kv_router_state_saves_total{kind}`: snapshots of the index to disk, kind `saved`, `failed`.
    saves: Family<Kind, Counter> = Family::default(), "state_saves", None, "Snapshots written";
    /// `kv_router_bootstraps_total{kind}`: attempts to take over a peer's index, kind `taken` or why
    /// not ([`crate::bootstrap::BootstrapError`]).
    bootstraps: Family<Kind, Counter> = Family::default(), "bootstraps", None, "Attempts to take over the index of a peer";
    /// `kv_router_state_restores_total{kind}`: starts by where the index came from, kind
    /// `restored`, `absent`, `corrupt`, `other_version`.
    restores: Family<Kind, Counter> = Family::default(), "state_restores", None, "Starts by state found";
    /// `kv_router_filter_revivals_total{kind}`: filter configurations rewritten because a VM had
    /// trapped, kind `replaced`, `failed`. A trap is a defect: Envoy's log has its message.
    revivals: Family<Kind, Counter> = Family::default(), "filter_revivals", None, "Rewritten filter configurations";
    /// `kv_router_configuration_pending`: whether the file says something that is not in effect.
    configuration_pending: Gauge = Gauge::default(), "configuration_pending", None, "Whether the configuration file says something that is not in effect";
    /// `kv_router_config_reloads_total{kind}`: changes of the file, kind `applied`, `refused`,
    /// `restart_needed`.
    reloads: Family<Kind, Counter> = Family::default(), "config_reloads", None, "Configuration changes";
}

fn wait_histogram() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 17))
}

/// Nothing at all, then doubling from half a block or half a millisecond.
fn regret_buckets() -> impl Iterator<Item = f64> {
    std::iter::once(0.0).chain(exponential_buckets(0.5, 2.0, 14))
}

impl Metrics {
    /// OpenMetrics text.
    #[must_use]
    pub fn encode(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}
