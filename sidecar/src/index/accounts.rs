//! Reports of proxies into the accounts of load, and corrections out to them.

use std::sync::Arc;

use kv_core::id::OwnerId;
use kv_core::ledger::Continuity;
use kv_core::loads::Loads;
use kv_core::report::{Booked, Failure, Report, Step, Sum};
use kv_core::table;
use tokio::time::{Duration, Instant};

use super::{Service, unix_ms, unix_ns};
use crate::decision::Origin;
use crate::load::{Outcome, Prompt, ProxyId};
use crate::metrics::Kind;

/// Least time between two corrections.
const LOADS_PAUSE: Duration = Duration::from_millis(5);
/// Places of a prompt, the deepest ones, at which the next one is expected to leave it.
const MAX_BRANCHES: usize = 4;
/// Finding out what to tell takes at most this part of the service's time.
const LOADS_SHARE: u32 = 10;

impl Service {
    pub(super) fn disconnect_proxy(&mut self, stream: u64) {
        let now_ms = self.now_ms();
        self.accounts.disconnected(stream, now_ms);
    }

    pub(super) fn reports(&mut self, stream: u64, reports: Vec<Report>) {
        let now_ms = self.now_ms();
        let Some(proxy) = self.accounts.proxy_of(stream).cloned() else {
            // Another stream has taken its place.
            let fenced = self.metrics.reports.get_or_create(&Kind { kind: "fenced" });
            fenced.inc_by(reports.len() as u64);
            return;
        };
        // What has changed besides.
        self.remember(unix_ns());
        for report in reports {
            let kind = match self.accounts.report(stream, &report, now_ms) {
                None | Some(Continuity::Repeated) => "repeated",
                Some(Continuity::Gap) => "gap",
                Some(Continuity::Next) if report.complete => "complete",
                Some(Continuity::Next) => "next",
            };
            self.metrics.reports.get_or_create(&Kind { kind }).inc();
            if kind == "repeated" {
                continue;
            }
            let arrived_ns = unix_ns();
            let time = |at_ns: u64| {
                if at_ns == 0 {
                    arrived_ns
                } else {
                    at_ns.min(arrived_ns)
                }
            };
            self.remember(time(report.at_ns));
            if report.complete {
                self.report_for_peers(report.vm);
                self.keep_listed(&report);
            }
            let origin = Origin {
                proxy: proxy.clone(),
                vm: report.vm,
            };
            for (at_ns, step) in report.timed() {
                let outcome = self.step(&origin, step, time(at_ns), now_ms);
                self.step_of_session(report.vm, step, outcome, now_ms);
                self.step_for_peers(report.vm, step);
                let kind = outcome.kind();
                self.metrics.steps.get_or_create(&Kind { kind }).inc();
            }
        }
        self.tell_sessions();
        self.judge_due();
        self.announce();
        self.loads_due();
        self.settle_queues();
    }

    /// What has changed happened at this time.
    pub(super) fn remember(&mut self, at_ns: u64) {
        let now_ms = self.now_ms();
        for change in self.accounts.take_journal() {
            self.past.change(change, at_ns, now_ms);
        }
    }

    fn step(&mut self, origin: &Origin, step: &Step, mut at_ns: u64, now_ms: u64) -> Outcome {
        let vm = origin.vm;
        if let Some(outcome) = self.queue_step(&origin.proxy, vm, step) {
            return outcome;
        }
        self.before_step(vm, step, now_ms);
        let outcome = match step {
            Step::Book(booked) => {
                let prompt = self.prompt(booked);
                if let Some(evidence) = &booked.evidence {
                    // One that was held against later loads stands since then.
                    at_ns = at_ns.max(evidence.at_ns.min(unix_ns()));
                    self.take_decision(origin.clone(), booked, evidence, &prompt, now_ms);
                }
                let is_told = prompt.start == 0 && self.is_predicted(booked.owner);
                let told = is_told.then(|| prompt.hashes.clone());
                let outcome = self.accounts.book(vm, booked, prompt, now_ms);
                if outcome == Outcome::Booked {
                    self.underway.begin(vm, booked, now_ms);
                }
                if let Some(hashes) = told.filter(|_| outcome == Outcome::Booked) {
                    let known = self.predict(booked.owner, &hashes, now_ms);
                    self.underway.predicted(vm, booked.request, known);
                }
                outcome
            }
            _ => self.accounts.step(vm, step, now_ms),
        };
        self.remember(at_ns);
        self.learn(vm, step);
        if let Step::Move { request, to } = step
            && outcome == Outcome::Moved
            && self.is_predicted(*to)
            && let Some((_, blocks)) = self.accounts.prompt(vm, *request)
        {
            let blocks = blocks.to_vec();
            let known = self.predict(*to, &blocks, now_ms);
            self.underway.predicted(vm, *request, known);
        }
        outcome
    }

    /// What a step says about the worker's cache.
    fn learn(&mut self, vm: u64, step: &Step) {
        if let Step::Cached {
            request,
            predicted,
            found,
        } = step
        {
            let prompt = self.accounts.prompt(vm, *request);
            if let Some((owner, prompt)) = prompt.map(|(o, p)| (o, p.to_vec())) {
                self.cache_found(owner, &prompt, *predicted, *found);
            }
        }
    }

    fn prompt_was_computed(&mut self, vm: u64, request: u64) {
        let prompt = self.accounts.prompt(vm, request);
        if let Some((owner, Some(last))) = prompt.map(|(o, p)| (o, p.last().copied())) {
            self.prompt_computed(owner, last);
        }
    }

    /// What a step tells of the worker that has the request when it comes.
    fn before_step(&mut self, vm: u64, step: &Step, now_ms: u64) {
        match step {
            Step::FirstToken { request } => {
                if let Some(owner) = self.accounts.owner(vm, *request) {
                    self.underway.first_token(vm, *request, owner.id, now_ms);
                }
            }
            Step::Prefilled { request } => self.underway.prefilled(vm, *request),
            Step::Free { request } => {
                let owner = self.accounts.owner(vm, *request);
                if self.underway.end(vm, *request)
                    && let Some(owner) = owner
                {
                    self.worker_answered(owner.id.worker);
                    // Not before: the end of a prefill whose first token is not seen is an estimate.
                    self.prompt_was_computed(vm, *request);
                }
            }
            Step::Move { request, .. } => self.take_prediction_back(vm, *request),
            Step::Failed {
                request,
                owner,
                failure,
            } => {
                let booked = self.accounts.owner(vm, *request);
                if *failure == Failure::Unreached && booked == Some(*owner) {
                    self.take_prediction_back(vm, *request);
                }
                // One that another worker answered has not been failed by that.
                if booked == Some(*owner) {
                    self.underway.failed(vm, *request);
                }
                self.worker_failed(*owner, *failure);
            }
            Step::Book(_)
            | Step::Cached { .. }
            | Step::Grown { .. }
            | Step::WrittenOff(_)
            | Step::Queued(_)
            | Step::Unqueued { .. }
            | Step::Leave => {}
        }
    }

    /// The owner of a request did not get it: what was predicted for its sake alone is not there.
    fn take_prediction_back(&mut self, vm: u64, request: u64) {
        let Some(known) = self.underway.missed(vm, request) else {
            return;
        };
        if let Some((owner, blocks)) = self.accounts.prompt(vm, request) {
            let blocks = blocks.get(known..).unwrap_or_default().to_vec();
            self.take_back(owner, &blocks);
        }
    }

    /// Tells proxies of rates that were learned, where they differ from what was told.
    pub(super) fn learn_rates(&mut self) {
        let (accounts, owners) = (&self.accounts, &self.tables);
        let is_known = |id: &OwnerId| {
            let mut pools = owners.iter();
            pools.any(|pool| pool.owners.iter().any(|owner| owner.id == *id))
        };
        let is_booked = |vm, request| accounts.owner(vm, request).is_some();
        self.underway.keep(is_booked, is_known);
        let mut is_changed = false;
        for pool in &mut self.roster.pools {
            let owners = pool.workers.values().flat_map(|w| w.config.owners());
            let prior_ms = pool.config.policy.delay.prefill_ms_per_token;
            let pool_ms = self.underway.pool_time(owners, prior_ms);
            for worker in pool.workers.values_mut() {
                for (owner, id) in worker.owners.iter_mut().zip(worker.config.owners()) {
                    let rate = self.underway.rate(id, owner.prefill_rate);
                    let told_ns = owner.prefill_ns_per_token;
                    let time_ns = self.underway.prefill_ns(id, pool_ms, told_ns);
                    is_changed |= rate != owner.prefill_rate || time_ns != told_ns;
                    owner.prefill_rate = rate;
                    owner.prefill_ns_per_token = time_ns;
                }
            }
        }
        if is_changed {
            self.serve_owners();
            self.publish_table(None);
        }
    }

    /// The prompt of a booking: the index has the blocks that the report names by their last one.
    fn prompt(&mut self, booked: &Booked) -> Prompt {
        let pool = usize::from(booked.owner.pool);
        let chain = match booked.prefix.filter(|(depth, _)| *depth > 0) {
            None => Some(Vec::new()),
            Some((depth, hash)) => {
                let chain = self.index.chain(pool, hash);
                chain.filter(|chain| u32::try_from(chain.len()) == Ok(depth))
            }
        };
        let Some(mut hashes) = chain else {
            self.metrics.unknown_prefixes.inc();
            return Prompt {
                start: booked.prefix.map_or(0, |(depth, _)| depth),
                hashes: booked.hashes.clone(),
                branches: Vec::new(),
            };
        };
        if let Some(last) = hashes.last() {
            self.index.touch(pool, *last);
        }
        hashes.extend(&booked.hashes);
        self.whole_prompt(pool, hashes)
    }

    /// A prompt of which all blocks are known.
    pub(super) fn whole_prompt(&self, pool: usize, hashes: Vec<u64>) -> Prompt {
        Prompt {
            start: 0,
            branches: self.index.branches(pool, &hashes, MAX_BRANCHES),
            hashes,
        }
    }

    pub(super) fn lanes(&mut self, stream: u64, shown: &[Sum]) {
        let now_ms = self.now_ms();
        let leaks = self.accounts.lanes(stream, shown, now_ms);
        for (owner, leak) in &leaks {
            self.metrics.leaks.inc();
            tracing::warn!(
                stream,
                pool = owner.pool,
                worker = owner.id.worker,
                rank = owner.id.rank,
                load = ?leak.load(),
                "lanes held what no report accounts for"
            );
        }
        if !leaks.is_empty() {
            self.loads_due();
        }
    }

    /// Drops what nobody claims.
    pub(super) fn sweep_loads(&mut self) {
        let swept = self.accounts.sweep(self.now_ms());
        for (proxy, vm) in &swept.vms {
            let ProxyId { process, vm_id } = proxy;
            tracing::warn!(process, vm_id, vm, "vm fell silent, its bookings are freed");
        }
        for ProxyId { process, vm_id } in &swept.proxies {
            tracing::warn!(process, vm_id, "proxy is gone, its bookings are freed");
        }
        if !swept.vms.is_empty() {
            self.silence.notify_one();
        }
        self.metrics.retired_vms.inc_by(swept.vms.len() as u64);
        self.metrics.lost_proxies.inc_by(swept.proxies.len() as u64);
        self.metrics.expired.inc_by(swept.expired as u64);
        self.metrics.written_off.inc_by(swept.written_off as u64);
        if swept.freed + swept.expired > 0 {
            self.swept_for_peers();
            self.sweep_reservations();
        }
        if swept != Default::default() {
            self.loads_due();
        }
    }

    /// Takes the pools and owners of the roster over.
    pub(super) fn serve_owners(&mut self) {
        self.forget_gauges();
        let mut pools = self.roster.table_pools(&self.ejection);
        self.put_thresholds(&mut pools);
        self.tables = pools.into_iter().map(Arc::new).collect();
        self.serve_selectable();
        let owners = |pool: &Arc<table::Pool>| {
            let owners = pool.owners.iter();
            owners.map(|o| (o.slot, o.id)).collect::<Vec<_>>()
        };
        self.accounts
            .serve(self.tables.iter().map(owners).collect());
        let mut pools = self.roster.pools.iter();
        let predicts = pools.any(|p| !p.config.kv_events || p.config.predicted_ttl_ms.is_some());
        self.accounts.set_predicting(predicts);
        self.queues.serve(&self.tables, unix_ns());
        self.settle_queues();
        self.loads_due();
    }

    /// Something has changed that proxies may have to be told.
    pub(super) fn loads_due(&mut self) {
        self.loads_at.get_or_insert(self.loads_from);
    }

    /// Tells every proxy what it doesn't know yet.
    pub(super) fn publish_loads(&mut self) {
        let begun = Instant::now();
        self.loads_at = None;
        for news in self.accounts.news(self.now_ms()) {
            self.loads_version = unix_ms().max(self.loads_version + 1);
            let loads = Loads {
                epoch: self.epoch,
                version: self.loads_version,
                pools: news.pools,
                write_off: news.write_off,
                backlogs: news.backlogs,
                is_alone: news.is_alone,
            };
            self.publisher
                .loads(news.stream, loads.encode(), &mut self.index);
            self.metrics.corrections.inc();
        }
        let pause = LOADS_PAUSE.max(LOADS_SHARE * begun.elapsed());
        self.loads_from = Instant::now() + pause;
        if self.accounts.is_unsettled() {
            self.loads_due();
        }
    }

    /// Milliseconds since the start.
    pub(super) fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}
