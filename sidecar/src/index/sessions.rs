//! The sessions of all proxies: who has them, told to every Envoy.

use std::collections::{HashMap, HashSet};

use kv_core::affinity::{Bindings, Saved, Session};
use kv_core::id::OwnerId;
use kv_core::report::{Booked, OwnerKey, Step};

use super::Service;
use crate::load::Outcome;
use crate::metrics;

/// Bindings, and the requests under way that belong to sessions.
#[derive(Debug, Default)]
pub(super) struct Sessions {
    bindings: Bindings,
    /// By VM and its number for the request: its session and its owner.
    requests: HashMap<(u64, u64), (Session, OwnerId)>,
    /// Whether all shards have been published.
    is_told: bool,
}

impl Sessions {
    /// With what was saved of the last run.
    pub(super) fn restored(saved: &[Saved]) -> Self {
        let mut sessions = Self::default();
        sessions.bindings.restore(saved, 0);
        sessions
    }

    /// What the state folder keeps.
    pub(super) fn save(&self, now_ms: u64) -> Vec<Saved> {
        self.bindings.save(now_ms)
    }
}

impl Service {
    /// What a step says about its request's session.
    pub(super) fn step_of_session(&mut self, vm: u64, step: &Step, outcome: Outcome, now_ms: u64) {
        match step {
            Step::Book(booked) => self.session_booked(vm, booked, outcome, now_ms),
            Step::Move { request, to } => {
                if let Some((session, owner)) = self.sessions.requests.get_mut(&(vm, *request)) {
                    self.sessions.bindings.relocate(*session, *owner, to.id);
                    *owner = to.id;
                }
            }
            Step::Free { request } => {
                if let Some((session, _)) = self.sessions.requests.remove(&(vm, *request)) {
                    self.sessions.bindings.over(session, now_ms);
                }
            }
            _ => {}
        }
    }

    fn session_booked(&mut self, vm: u64, booked: &Booked, outcome: Outcome, now_ms: u64) {
        let Some(session) = booked.session else {
            return;
        };
        let request = (vm, booked.request);
        let is_new = matches!(outcome, Outcome::Booked | Outcome::Kept);
        let pool = self.tables.get(usize::from(booked.owner.pool));
        let ttl_s = pool.and_then(|pool| Some(pool.affinity.as_ref()?.ttl_s));
        let Some(ttl_s) = ttl_s.filter(|_| is_new) else {
            return;
        };
        if self.sessions.requests.contains_key(&request) {
            return;
        }
        let tables = &self.tables;
        let stays = |owner: OwnerId| takes_requests(tables, owner);
        let (owner, ttl_ms) = (booked.owner.id, u64::from(ttl_s) * 1_000);
        let bindings = &mut self.sessions.bindings;
        let outcome = bindings.book(session, owner, ttl_ms, now_ms, stays).name();
        self.sessions.requests.insert(request, (session, owner));
        let label = metrics::Outcome { outcome };
        self.metrics.sessions.get_or_create(&label).inc();
    }

    /// Releases sessions whose time is over or whose owner is gone.
    pub(super) fn sweep_sessions(&mut self) {
        let now_ms = self.now_ms();
        let accounts = &self.accounts;
        let is_booked = |key: &(u64, u64)| -> Option<OwnerKey> { accounts.owner(key.0, key.1) };
        let requests = &mut self.sessions.requests;
        let gone: Vec<(u64, u64)> = requests
            .keys()
            .filter(|k| is_booked(k).is_none())
            .copied()
            .collect();
        for request in gone {
            if let Some((session, _)) = requests.remove(&request) {
                self.sessions.bindings.over(session, now_ms);
            }
        }
        let owners = self.tables.iter().flat_map(|pool| &pool.owners);
        let accepting: HashSet<OwnerId> = owners.filter(|o| o.accepting).map(|o| o.id).collect();
        let stays = |owner: OwnerId| accepting.contains(&owner);
        let over = self.sessions.bindings.sweep(now_ms, stays);
        let outcome = "released";
        let label = metrics::Outcome { outcome };
        self.metrics
            .sessions
            .get_or_create(&label)
            .inc_by(over as u64);
        self.metrics
            .bound_sessions
            .set(self.sessions.bindings.len() as i64);
        self.tell_sessions();
    }

    /// Tells all Envoys what has changed; the first time everything.
    pub(super) fn tell_sessions(&mut self) {
        let mut pools = self.tables.iter();
        if !pools.any(|pool| pool.affinity.is_some()) {
            return;
        }
        let bindings = &mut self.sessions.bindings;
        let changed = bindings.take_changed();
        let shards = if self.sessions.is_told {
            changed
        } else {
            bindings.shards()
        };
        self.sessions.is_told = true;
        if !shards.is_empty() {
            self.saving.touch();
            self.publisher.sessions(shards, &mut self.index);
        }
    }
}

/// Whether some pool has an owner and it takes requests.
fn takes_requests(tables: &[std::sync::Arc<kv_core::table::Pool>], owner: OwnerId) -> bool {
    let mut owners = tables.iter().flat_map(|pool| &pool.owners);
    owners.any(|other| other.id == owner && other.accepting)
}
