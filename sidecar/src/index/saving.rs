//! The snapshot to disk, taken owner by owner between other work: each owner's part agrees with
//! its own event ids, and owners need not agree with each other.

use std::path::PathBuf;

use kv_core::id::OwnerId;
use tokio::task::JoinHandle;

use super::{Service, random_u64, roster};
use crate::config;
use crate::metrics::Kind;
use crate::state::{self, OwnerState, PoolState, State};

/// Progress of saving.
#[derive(Debug)]
pub(super) struct Saving {
    file: Option<PathBuf>,
    is_changed: bool,
    under_way: Option<(State, Vec<(usize, OwnerId)>)>,
    writing: Option<JoinHandle<Result<(), state::StateError>>>,
}

impl Saving {
    pub(super) fn new(file: Option<PathBuf>) -> Self {
        Self {
            file,
            is_changed: false,
            under_way: None,
            writing: None,
        }
    }

    /// Something has changed since the last snapshot.
    pub(super) fn touch(&mut self) {
        self.is_changed = true;
    }

    /// Whether owners are left to be taken.
    pub(super) fn is_under_way(&self) -> bool {
        self.under_way.is_some()
    }
}

impl Service {
    /// Starts a snapshot if something has changed and none is being taken or written.
    pub(super) fn begin_saving(&mut self) {
        let is_writing = self
            .saving
            .writing
            .as_ref()
            .is_some_and(|w| !w.is_finished());
        let is_due = self.saving.file.is_some() && self.saving.is_changed;
        if !is_due || is_writing || self.saving.is_under_way() {
            return;
        }
        self.saving.is_changed = false;
        let pool = |p: &roster::Pool| PoolState {
            name: p.config.name.clone(),
            block_size: p.config.block_size,
            key: p.key,
            slots: p.slots.clone(),
            owners: Vec::new(),
        };
        let state = State {
            epoch: self.epoch,
            level: self.index.level(),
            pools: self.roster.pools.iter().map(pool).collect(),
        };
        let owners = |(number, pool): (usize, &roster::Pool)| {
            let owners = pool.workers.values().flat_map(|w| w.config.owners());
            owners.map(|id| (number, id)).collect::<Vec<_>>()
        };
        let owners = self.roster.pools.iter().enumerate().flat_map(owners);
        self.saving.under_way = Some((state, owners.collect()));
    }

    /// Takes one owner, or writes the file after the last.
    pub(super) fn save_step(&mut self) {
        let Some((mut state, mut left)) = self.saving.under_way.take() else {
            return;
        };
        if let Some((number, id)) = left.pop() {
            let part = self.owner_state(number, id);
            if let Some(pool) = state.pools.get_mut(number) {
                pool.owners.extend(part);
            }
            self.saving.under_way = Some((state, left));
        } else if let Some(file) = self.saving.file.clone() {
            let metrics = self.metrics.clone();
            self.saving.writing = Some(tokio::task::spawn_blocking(move || {
                let outcome = state::save(&file, &state);
                let kind = if outcome.is_ok() { "saved" } else { "failed" };
                metrics.saves.get_or_create(&Kind { kind }).inc();
                if let Err(error) = &outcome {
                    tracing::error!(%error, "can't save the state");
                }
                outcome
            }));
        }
    }

    /// Saves everything and waits until it is written.
    pub(super) async fn save_all(&mut self) {
        if let Some(writing) = self.saving.writing.take() {
            // Its outcome has been logged.
            let _ = writing.await;
        }
        self.saving.under_way = None;
        self.begin_saving();
        while self.saving.is_under_way() {
            self.save_step();
        }
        if let Some(writing) = self.saving.writing.take() {
            let _ = writing.await;
        }
    }

    fn owner_state(&mut self, number: usize, id: OwnerId) -> Option<OwnerState> {
        let (pool, worker) = self.roster.worker(id.worker)?;
        let owner = *worker.owner(id.rank)?;
        if pool != number || worker.repair.is_some() && owner.partial {
            return None;
        }
        Some(OwnerState {
            id,
            dynamo: owner.dynamo,
            json: worker.json,
            partial: owner.partial,
            blocks: self.index.dump(number, owner.slot),
        })
    }

    /// Sets the roster up from a configuration, with slots, keys and blocks of pools and owners
    /// that a snapshot knows.
    pub(super) fn restore(&mut self, pools: &[config::Pool], states: Vec<PoolState>) {
        let is_same =
            |s: &PoolState, p: &config::Pool| s.name == p.name && s.block_size == p.block_size;
        let mut states: Vec<Option<PoolState>> = states.into_iter().map(Some).collect();
        let mut kept = Vec::new();
        for pool in pools {
            let state = states
                .iter_mut()
                .find(|s| s.as_ref().is_some_and(|s| is_same(s, pool)))
                .and_then(Option::take);
            let (key, slots, owners) = match state {
                Some(state) => (state.key, state.slots, state.owners),
                None => (random_u64(), super::Slots::default(), Vec::new()),
            };
            let number = self.index.add_pool(key);
            for used in &pool.families {
                if let Some(most) = used.max_blocks {
                    self.index.limit(number, used.family, most as usize);
                }
            }
            self.roster.add(pool.clone(), key, slots);
            kept.push(owners);
        }
        let change = self.roster.update(pools);
        self.report_change(&change);
        for state in kept.into_iter().flatten() {
            self.restore_owner(&state);
        }
    }

    fn restore_owner(&mut self, state: &OwnerState) {
        if !self.takes_events(state.id.worker) {
            return;
        }
        let Some((pool, worker)) = self.roster.worker(state.id.worker) else {
            return;
        };
        worker.json = state.json;
        let Some(owner) = worker.owner_mut(state.id.rank) else {
            return;
        };
        owner.dynamo = state.dynamo;
        owner.partial = state.partial;
        let slot = owner.slot;
        let applied = self.index.restore(pool, slot, &state.blocks);
        if applied.collisions > 0 {
            tracing::warn!(
                worker = state.id.worker,
                blocks = applied.collisions,
                "blocks could not be restored"
            );
        }
    }
}
