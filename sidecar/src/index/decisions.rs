//! Decisions that come with bookings, held against the index and the load as it was.

use kv_core::report::{Booked, Evidence};
use tracing::Level;

use super::{Field, Service, unix_ns};
use crate::decision::{self, Decision, Formula, Origin};
use crate::load::Prompt;
use crate::metrics::Outcome;

/// A decision to be judged.
#[derive(Debug)]
pub(super) struct Question {
    origin: Origin,
    /// Without hashes and evidence.
    booked: Booked,
    evidence: Evidence,
    prompt: Prompt,
    /// What the prompt met, but for the load.
    field: Field,
}

impl Service {
    /// Takes a decision to be judged, with the overlaps as they are.
    pub(super) fn take_decision(
        &mut self,
        origin: Origin,
        booked: &Booked,
        evidence: &Evidence,
        prompt: &Prompt,
        now_ms: u64,
    ) {
        let pool = usize::from(booked.owner.pool);
        let Some(field) = self.unloaded_field(pool, &prompt.hashes, &[]) else {
            return;
        };
        log(&field, evidence);
        let question = Question {
            origin,
            booked: Booked {
                hashes: Vec::new(),
                evidence: None,
                ..*booked
            },
            evidence: evidence.clone(),
            prompt: prompt.clone(),
            field,
        };
        let at_ns = evidence.at_ns.min(unix_ns());
        self.past.ask(question, at_ns, now_ms);
    }

    /// Judges decisions whose time has come.
    pub(super) fn judge_due(&mut self) {
        let now_ms = self.now_ms();
        while let Some(question) = self.past.next(now_ms) {
            self.judge(question);
        }
    }

    fn judge(&mut self, question: Question) {
        let Question {
            origin,
            booked,
            evidence,
            prompt,
            mut field,
        } = question;
        field.load(self.past.tracker(), booked.owner.pool, &prompt.hashes);
        let is_prompt_known = prompt.start == 0;
        let shadow = decision::judge(&field, booked.owner.id, &evidence, is_prompt_known);
        let outcome = shadow.verdict.name();
        self.metrics
            .shadow
            .get_or_create(&Outcome { outcome })
            .inc();
        if let Some(regret) = shadow.regret {
            if field.pool.policy.predicts_delay() {
                self.metrics.regret_delay.observe(regret);
            } else {
                self.metrics.regret.observe(regret);
            }
        }
        let decision = Decision::new(origin, &field, &booked, &evidence, &shadow);
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
