//! Requests that wait: from the reports of filters into the queues, and verdicts back.

use std::collections::HashSet;

use kv_core::queue::Thresholds;
use kv_core::report::{Report, Step};
use kv_core::table::{Pool, Table};

use super::{Service, unix_ns};
use crate::load::{Outcome, ProxyId};

/// Thresholds that were set at run time. They hold until the configuration says something else.
#[derive(Clone, Copy, Debug)]
pub(super) struct SetThresholds {
    configured: Thresholds,
    set: Thresholds,
}

impl Service {
    /// A complete report lists all that wait in its VM.
    pub(super) fn keep_listed(&mut self, report: &Report) {
        let listed = report.steps.iter().filter_map(|step| match step {
            Step::Queued(queued) => Some(queued.ticket),
            _ => None,
        });
        let listed: HashSet<u64> = listed.collect();
        self.queues
            .retain(report.vm, |ticket| listed.contains(&ticket));
    }

    /// What a step says about waiting; `None` for one that says nothing about it.
    pub(super) fn queue_step(&mut self, proxy: &ProxyId, vm: u64, step: &Step) -> Option<Outcome> {
        match step {
            Step::Queued(queued) => {
                self.queues.enter(proxy, vm, queued, unix_ns());
                Some(Outcome::Queued)
            }
            Step::Unqueued { ticket } => {
                self.queues.leave(vm, *ticket);
                Some(Outcome::Unqueued)
            }
            _ => None,
        }
    }

    /// Lets those go for whom there is room.
    pub(super) fn settle_queues(&mut self) {
        if self.queues.is_idle() {
            return;
        }
        let accounts = &self.accounts;
        let parcels = self.queues.settle(unix_ns(), |owner| accounts.load(owner));
        for parcel in parcels {
            // Without a stream its VMs list those who wait when they have one again.
            if let Some(stream) = self.accounts.stream_of(&parcel.proxy) {
                let mail = parcel.mail.encode();
                self.publisher
                    .mail(stream, parcel.mailbox, mail, &mut self.index);
            }
        }
        if self.accounts.set_backlogs(self.queues.backlogs()) {
            self.loads_due();
        }
    }

    /// Nobody waits any more whose VM is gone.
    pub(super) fn sweep_queues(&mut self) {
        if self.queues.is_idle() {
            return;
        }
        let vms: HashSet<u64> = self.accounts.vms().collect();
        self.queues.keep_vms(|vm| vms.contains(&vm));
        self.settle_queues();
    }

    /// Puts what was set at run time in place of what is configured.
    pub(super) fn put_thresholds(&mut self, pools: &mut [Pool]) {
        for (at, pool) in pools.iter_mut().enumerate() {
            let holds = |set: &SetThresholds| set.configured == pool.overload;
            match self.thresholds.get(&at).copied() {
                Some(set) if holds(&set) => pool.overload = set.set,
                Some(_) => {
                    tracing::info!(pool = pool.name, "busy thresholds are configured anew");
                    self.thresholds.remove(&at);
                }
                None => {}
            }
        }
    }

    /// Thresholds by model, of pools that have any.
    pub(super) fn thresholds(&self) -> Vec<(String, Thresholds)> {
        let pools = self.tables.iter().filter(|pool| !pool.overload.is_unset());
        let by_model = pools.flat_map(|pool| {
            let any = pool.models.is_empty().then_some(&pool.name);
            let models = pool.models.iter().chain(any);
            models.map(|model| (model.clone(), pool.overload))
        });
        by_model.collect()
    }

    /// Sets thresholds of the pool that serves a model, and returns all of them.
    pub(super) fn set_threshold(&mut self, model: &str, change: Thresholds) -> Option<Thresholds> {
        let table: Table = self.table();
        let served = table
            .serve(None, Some(model))
            .filter(|served| served.known)?;
        let before = table.pools.get(served.pool)?.overload;
        if change.is_unset() {
            return Some(before);
        }
        let set = Thresholds {
            decode_blocks: change.decode_blocks.or(before.decode_blocks),
            prefill_tokens: change.prefill_tokens.or(before.prefill_tokens),
            prefill_share: change.prefill_share.or(before.prefill_share),
        };
        let known = self.thresholds.get(&served.pool);
        let configured = known.map_or(before, |known| known.configured);
        let set_at_run_time = SetThresholds { configured, set };
        self.thresholds.insert(served.pool, set_at_run_time);
        tracing::info!(model, ?set, "busy thresholds set");
        self.serve_owners();
        self.publish_table(None);
        Some(set)
    }
}
