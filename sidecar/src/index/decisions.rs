//! Decisions that come with bookings, held against the index and the accounts of load.

use kv_core::report::{Booked, Evidence};
use tracing::Level;

use super::{Field, Service};
use crate::decision::{self, Decision, Formula, Origin};
use crate::load::Prompt;
use crate::metrics::Outcome;

impl Service {
    /// Judges a decision. Its booking must not have been applied yet.
    pub(super) fn judge(
        &mut self,
        origin: Origin,
        booked: &Booked,
        evidence: &Evidence,
        prompt: &Prompt,
    ) {
        let pool = usize::from(booked.owner.pool);
        let Some(field) = self.field(pool, &prompt.hashes, &[]) else {
            return;
        };
        log(&field, evidence);
        let is_prompt_known = prompt.start == 0;
        let shadow = decision::judge(&field, booked.owner.id, evidence, is_prompt_known);
        let outcome = shadow.verdict.name();
        self.metrics
            .shadow
            .get_or_create(&Outcome { outcome })
            .inc();
        if let Some(regret) = shadow.regret {
            self.metrics.regret.observe(regret);
        }
        let decision = Decision::new(origin, &field, booked, evidence, &shadow);
        self.decisions.keep(decision);
    }
}

fn log(field: &Field, evidence: &Evidence) {
    if !tracing::enabled!(Level::DEBUG) {
        return;
    }
    if let Some(chosen) = evidence.candidates.first() {
        tracing::debug!("{}", Formula::new(field, evidence, chosen));
    }
}
