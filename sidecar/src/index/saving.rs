//! The snapshot to disk, taken part by part between other work.

use std::path::PathBuf;

use kv_core::index::parents_first;
use tokio::task::JoinHandle;

use super::knowledge::{Knowledge, Stream};
use super::walk::{Part, Walk};
use super::{Service, random_u64, roster};
use crate::config;
use crate::metrics::Kind;
use crate::state::{self, OwnerState, PoolState, State, StreamState};

/// Progress of saving.
#[derive(Debug)]
pub(super) struct Saving {
    file: Option<PathBuf>,
    is_changed: bool,
    under_way: Option<(State, Walk)>,
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
        // What is there before a peer was asked is not worth going on with.
        if !is_due || is_writing || self.saving.is_under_way() || self.awaits_peer {
            return;
        }
        self.saving.is_changed = false;
        let pool = |p: &roster::Pool| PoolState {
            name: p.config.name.clone(),
            block_size: p.config.block_size,
            key: p.key,
            slots: p.slots.clone(),
            streams: Self::stream_states(p),
            owners: Vec::new(),
        };
        let state = State {
            epoch: self.epoch,
            level: self.index.level(),
            pools: self.roster.pools.iter().map(pool).collect(),
            sessions: self.sessions.save(self.now_ms()),
        };
        self.saving.under_way = Some((state, self.walk()));
    }

    /// Takes one part, or writes the file after the last.
    pub(super) fn save_step(&mut self) {
        let Some((mut state, mut walk)) = self.saving.under_way.take() else {
            return;
        };
        if let Some(part) = self.walk_step(&mut walk) {
            let (number, part) = match part {
                Part::Owner(number, owner) => (number, Ok(owner)),
                Part::Blocks(number, _, blocks) => (number, Err(blocks)),
            };
            if let Some(pool) = state.pools.get_mut(number) {
                match (part, pool.owners.last_mut()) {
                    (Ok(owner), _) => pool.owners.push(owner),
                    (Err(blocks), Some(owner)) => owner.blocks.extend(blocks),
                    (Err(_), None) => {}
                }
            }
            self.saving.under_way = Some((state, walk));
        } else if let Some(file) = self.saving.file.clone() {
            let metrics = self.metrics.clone();
            self.saving.writing = Some(tokio::task::spawn_blocking(move || {
                let owners = state.pools.iter_mut().flat_map(|pool| &mut pool.owners);
                owners.for_each(|owner| parents_first(&mut owner.blocks));
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
            let (key, slots) = match &state {
                Some(state) => (state.key, state.slots.clone()),
                None => (random_u64(), super::Slots::default()),
            };
            let number = self.index.add_pool(key);
            for used in &pool.families {
                if let Some(most) = used.max_blocks {
                    self.index.limit(number, used.family, most as usize);
                }
            }
            self.roster.add(pool.clone(), key, slots);
            kept.extend(state);
        }
        let change = self.roster.update(pools);
        self.report_change(&change);
        for pool in kept {
            for state in &pool.owners {
                self.restore_owner(state);
            }
            for state in pool.streams {
                self.restore_stream(state);
            }
        }
    }

    /// Takes over what is known of an owner. Its blocks come parents first.
    pub(super) fn restore_owner(&mut self, state: &OwnerState) {
        if !self.takes_events(state.id.worker) {
            return;
        }
        let Some((pool, worker)) = self.roster.worker(state.id.worker) else {
            return;
        };
        // Ranks were taken one after another: what the earliest has is true of all.
        worker.json = match (worker.json.last, state.json.last) {
            (Some(known), Some(last)) if known <= last => worker.json,
            _ => state.json,
        };
        let Some(owner) = worker.owner_mut(state.id.rank) else {
            return;
        };
        owner.dynamo = state.dynamo;
        owner.knowledge = state.knowledge;
        let slot = owner.slot;
        let applied = self.index.restore(pool, slot, &state.blocks);
        if !state.doubtful.is_empty() {
            let doubt = self.doubts.entry((pool, slot)).or_default();
            doubt.add(state.doubtful.clone());
        }
        if applied.collisions > 0 {
            tracing::warn!(
                worker = state.id.worker,
                blocks = applied.collisions,
                "blocks could not be restored"
            );
        }
    }

    /// Takes over where a worker's own stream has come to, unless it comes from elsewhere.
    pub(super) fn restore_stream(&mut self, state: StreamState) {
        let Some((_, worker)) = self.roster.worker(state.worker) else {
            return;
        };
        if worker
            .source
            .plane()
            .is_some_and(|plane| plane != state.plane)
        {
            return;
        }
        let mut stream = Stream::new(state.plane, state.stream, worker.config.ranks);
        stream.last = Some(state.resume);
        stream.knowledge = Knowledge::of(state.resume.is_whole);
        worker.streams.insert(state.stream, stream);
    }
}
