//! Who may have a request: what it asks of its worker, and where its session is.

use kv_core::affinity::Session;
use kv_core::constraint::{Bound, Constraints, Narrowed, pinned};
use kv_core::policy::Mode;

use crate::fleet::Served;
use crate::header_map::HeaderMap;
use crate::hints::{Hints, Malformed};
use crate::host::{Headers, Host};
use crate::metrics::{Event, Fault};
use crate::reason::Reason;
use crate::refusal::Refusal;
use crate::session::{self, Binding};
use crate::vm::Router;

/// Tells Envoy how often to send a request again.
const MAX_RETRIES: &str = "x-envoy-max-retries";

impl<H: Host> Router<H> {
    /// The owners that may have a request. In the mode direct it names one, unless it is not for
    /// generation.
    ///
    /// # Errors
    /// When it makes no sense, names a worker and may not, or nobody is left.
    pub fn narrow<'a>(
        &mut self,
        served: &Served<'a>,
        reason: Reason,
        hints: &Hints,
    ) -> Result<Narrowed<'a>, Refusal> {
        if let Some(Malformed(hint)) = hints.malformed {
            return Err(Refusal::HintMalformed(hint));
        }
        if hints.is_rank_alone {
            return Err(Refusal::RankAlone);
        }
        let Hints { constraints, .. } = hints;
        let is_direct = served.pool.policy.mode == Mode::Direct;
        match constraints.pin {
            None if is_direct && reason != Reason::Passed => {
                return Err(if hints.is_untrusted_pin {
                    Refusal::HintUntrusted
                } else {
                    Refusal::WorkerMissing
                });
            }
            Some(pin) if pinned(served.pool, pin).next().is_none() => {
                return Err(Refusal::WorkerUnknown(pin.worker));
            }
            Some(pin) if !constraints.lists(pin.worker) => {
                return Err(Refusal::WorkerNotAllowed(pin.worker));
            }
            _ => {}
        }
        let narrowed = constraints.narrow(served.pool, served.accepting());
        if narrowed.is_lora_missing {
            self.metrics.count(&self.host, Event::LoraMissing, 1);
        }
        if narrowed.owners.is_empty() && constraints.is_strict() {
            return Err(Refusal::NoWorkerFits);
        }
        let takes = |at: &usize| served.owner(*at).is_some_and(|owner| owner.accepting);
        if constraints.pin.is_some() && !narrowed.owners.iter().any(takes) {
            self.metrics.count(&self.host, Event::PinnedOut, 1);
        }
        Ok(narrowed)
    }

    /// The session of a request and where it is bound, which becomes a constraint. A request that
    /// names its worker or is not for generation has none.
    pub fn session(
        &mut self,
        served: &Served<'_>,
        reason: Reason,
        headers: &HeaderMap,
        constraints: &mut Constraints,
    ) -> Option<(Session, Option<Binding>)> {
        let affinity = served.pool.affinity.as_ref()?;
        if constraints.pin.is_some() || reason == Reason::Passed {
            return None;
        }
        let session = session::of(headers, affinity, served.pool.key)?;
        let takes = |owner| served.position(served.accepting(), owner).is_some();
        let binding = session::find(&self.host, affinity, session, takes);
        constraints.bound = binding.map(|binding| Bound {
            owner: binding.owner,
            slack: affinity.slack,
        });
        Some((session, binding))
    }

    /// The session of a request is on the owner that was chosen.
    pub fn place_session(
        &mut self,
        served: &Served<'_>,
        placed: Option<(Session, Option<Binding>)>,
        owner: Option<usize>,
    ) {
        let owner = owner.and_then(|owner| served.owner(owner));
        let Some(((session, before), (affinity, owner))) =
            placed.zip(served.pool.affinity.as_ref().zip(owner))
        else {
            return;
        };
        let event = match before {
            None => Event::SessionBound,
            Some(before) if before.owner == owner.id => Event::SessionKept,
            Some(_) => Event::SessionLeft,
        };
        self.metrics.count(&self.host, event, 1);
        // One that only load has driven away comes back.
        let takes = |before: Binding| served.position(served.accepting(), before.owner).is_some();
        let is_there = before.is_some_and(takes);
        if event != Event::SessionLeft || !is_there {
            session::note(&self.host, affinity, session, before, owner.id);
        }
    }

    /// A request that only some workers may have is not sent again to others.
    pub fn limit_retries(&mut self, has_second: bool) {
        let most: &[u8] = if has_second { b"1" } else { b"0" };
        if !self.host.set_header(Headers::Request, MAX_RETRIES, most) {
            self.metrics.fault(&self.host, Fault::Header);
        }
    }
}
