//! Requests that wait: from the reports of filters into the queues, and verdicts back.

use std::collections::HashSet;

use kv_core::report::{Report, Step};

use super::{Service, unix_ns};
use crate::load::{Outcome, ProxyId};

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
}
