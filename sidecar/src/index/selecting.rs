//! The select service's questions: a choice from the exact state, and bookings beside the VMs'.

use std::sync::Arc;

use kv_core::id::OwnerId;
use kv_core::report::{Booked, OwnerKey, Step};
use kv_core::rng::Rng;
use kv_core::tracker::BookingId;

use super::{Field, Service, random_u64, unix_ns};
use crate::load::{Outcome, Prompt};
use crate::select::{
    Ask, Booking, Choice, Hashed, Pending, Question, SelectError, Served, Stage, Then, choose,
};

impl Service {
    pub(super) fn select(&mut self, ask: Ask) {
        // Whoever asked may have gone away.
        match ask {
            Ask::Served(reply) => {
                let _ = reply.send(Arc::clone(&self.served));
            }
            Ask::Meet {
                pool,
                prompt,
                reply,
            } => {
                let _ = reply.send(self.met(pool, &prompt));
            }
            Ask::Choose(question, reply) => {
                let _ = reply.send(self.choose(*question));
            }
            Ask::Book(booking, reply) => {
                self.reservations.forget(booking.pool, &booking.id);
                let _ = reply.send(self.reserve(*booking));
            }
            Ask::Claim { pool, id, reply } => {
                let _ = reply.send(self.claim(pool, &id));
            }
            Ask::Advance(id, stage, reply) => {
                let _ = reply.send(self.advance(&id, stage));
            }
        }
    }

    /// Takes the partitions over as requests from the select service meet them.
    pub(super) fn serve_selectable(&mut self) {
        let all = self.roster.selectable_pools(&self.ejection, &self.tables);
        self.selectable = all;
        let served = self.partitions().into_iter().filter_map(|partition| {
            Some(Served {
                number: partition.pool,
                models: partition.models,
                group: partition.group,
                pool: Arc::clone(self.selectable.get(partition.pool)?),
            })
        });
        self.served = served.collect();
    }

    fn met(&self, pool: usize, prompt: &Hashed) -> Option<Field> {
        let table = Arc::clone(self.selectable.get(pool)?);
        let mut field = self.meet(pool, table, &prompt.held, &prompt.families);
        let number = u16::try_from(pool).ok()?;
        field.load(self.accounts.tracker(), number, &prompt.used);
        Some(field)
    }

    fn choose(&mut self, question: Question) -> Result<Choice, SelectError> {
        if let Then::Book(id) = &question.then {
            self.is_free(id)?;
        }
        let field = self.met(question.pool, &question.prompt);
        let field = field.ok_or(SelectError::NoEndpoints)?;
        let choice = choose(&field, &question, &mut Rng::new(random_u64()))?;
        let is_shared = question.reuses != Some(false);
        let prefill_tokens = if choice.tracks_prefill {
            choice.prefill_tokens
        } else {
            0
        };
        match question.then {
            Then::Nothing => {}
            Then::Keep(id) => {
                let pending = Pending {
                    owner: choice.owner,
                    hashes: choice.hashes.clone(),
                    is_shared,
                    prefill_tokens,
                };
                let now_ms = self.now_ms();
                self.reservations.keep(question.pool, id, pending, now_ms);
            }
            Then::Book(id) => self.reserve(Booking {
                id,
                pool: question.pool,
                owner: choice.owner,
                hashes: choice.hashes.clone(),
                is_shared,
                prefill_tokens,
            })?,
        }
        Ok(choice)
    }

    fn is_free(&self, id: &str) -> Result<(), SelectError> {
        let booking = self.reservations.booking(id);
        if booking.is_some_and(|booking| self.accounts.tracker().get(&booking).is_some()) {
            return Err(SelectError::Reserved(id.to_owned()));
        }
        Ok(())
    }

    fn claim(&mut self, pool: usize, id: &str) -> Result<Option<OwnerId>, SelectError> {
        let now_ms = self.now_ms();
        let Some(pending) = self.reservations.pending(pool, id, now_ms).cloned() else {
            return Ok(None);
        };
        let owner = pending.owner;
        self.reserve(Booking {
            id: id.to_owned(),
            pool,
            owner,
            hashes: pending.hashes,
            is_shared: pending.is_shared,
            prefill_tokens: pending.prefill_tokens,
        })?;
        self.reservations.forget(pool, id);
        Ok(Some(owner))
    }

    fn reserve(&mut self, booking: Booking) -> Result<(), SelectError> {
        self.is_free(&booking.id)?;
        let pool = u16::try_from(booking.pool).map_err(|_| SelectError::NoEndpoints)?;
        let owner = OwnerKey {
            pool,
            id: booking.owner,
        };
        let (source, request) = (self.reservations.source(), self.reservations.number());
        let booked = Booked {
            request,
            owner,
            decoding: false,
            prefill_tokens: booking.prefill_tokens,
            blocks: u32::try_from(booking.hashes.len()).unwrap_or(u32::MAX),
            prefix: None,
            hashes: Vec::new(),
            evidence: None,
            session: None,
        };
        let prompt = if booking.is_shared {
            self.whole_prompt(booking.pool, booking.hashes)
        } else {
            Prompt::default()
        };
        let told = self.is_predicted(owner).then(|| prompt.hashes.clone());
        let now_ms = self.now_ms();
        match self.accounts.book(source, &booked, prompt, now_ms) {
            Outcome::Refused(_) => return Err(SelectError::Full(self.accounts.bookings())),
            _ => self.reservations.booked(booking.id, request),
        }
        if let Some(hashes) = told {
            self.predict(owner, &hashes, now_ms);
        }
        self.stepped(&Step::Book(Box::new(booked)));
        Ok(())
    }

    fn advance(&mut self, id: &str, stage: Stage) -> Result<(), SelectError> {
        let gone = || SelectError::NotReserved(id.to_owned());
        let booking = self.reservations.booking(id).ok_or_else(gone)?;
        let BookingId { source, request } = booking;
        let now_ms = self.now_ms();
        let is_booked = match stage {
            Stage::Prefilled => {
                let step = Step::FirstToken { request };
                let outcome = self.accounts.step(source, &step, now_ms);
                self.stepped(&step);
                outcome != Outcome::Unknown
            }
            Stage::Filled(left) => {
                let filled = self.accounts.tracker_mut().fill(&booking, 1, left, now_ms);
                self.remember(unix_ns());
                self.loads_due();
                filled
            }
            Stage::Over => {
                let step = Step::Free { request };
                let outcome = self.accounts.step(source, &step, now_ms);
                self.reservations.over(id);
                self.stepped(&step);
                outcome != Outcome::Unknown
            }
        };
        if is_booked {
            return Ok(());
        }
        self.reservations.over(id);
        Err(gone())
    }

    /// A step of a reserved request has been made.
    fn stepped(&mut self, step: &Step) {
        self.remember(unix_ns());
        self.step_for_peers(self.reservations.source(), step);
        self.announce();
        self.loads_due();
    }

    /// Forgets what is reserved and booked no more, and choices that nobody came for.
    pub(super) fn sweep_reservations(&mut self) {
        let tracker = self.accounts.tracker();
        self.reservations.retain(|id| tracker.get(id).is_some());
        let now_ms = self.now_ms();
        self.reservations.sweep(now_ms);
    }
}
