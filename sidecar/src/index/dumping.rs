//! The index out to a sidecar that starts, and in from one that runs.

use std::collections::VecDeque;

use kv_core::index::{Held, parents_first};
use tokio::sync::mpsc;
use tokio::time::{Duration, Instant};

use super::Service;
use super::walk::{Part, Walk};
use crate::dump::{Line, PoolLine, VERSION};
use crate::state::OwnerState;

/// Dumps that wait for their turn.
const MAX_DUMPS: usize = 8;
/// How long whoever asked for one may read nothing.
const STALLED: Duration = Duration::from_secs(10);

/// Why no dump is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotDumped {
    /// The index isn't complete itself.
    #[error("the index is being recovered")]
    NotReady,
    /// Others want one too.
    #[error("{MAX_DUMPS} dumps are under way already")]
    TooMany,
}

/// Why a line of a dump isn't taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotAdopted {
    /// Of another release.
    #[error("a dump of version {0}, expected {VERSION}")]
    Version(u32),
    /// A pool by a number that the dump didn't announce.
    #[error("pool {0} was not announced")]
    UnknownPool(usize),
    /// Blocks of another owner than the last one named.
    #[error("blocks of worker {0} out of order")]
    OutOfOrder(u64),
}

/// A dump under way.
#[derive(Debug)]
pub(super) struct Dump {
    out: mpsc::Sender<Line>,
    first: VecDeque<Line>,
    walk: Walk,
    owners: u64,
    blocks: u64,
    moved: Instant,
}

/// What has come of a dump.
#[derive(Debug, Default)]
pub(super) struct Adoption {
    /// Own numbers of the dump's pools.
    pools: Vec<Option<usize>>,
    owner: Option<(usize, OwnerState)>,
}

impl Service {
    /// Starts a dump.
    pub(super) fn begin_dump(&mut self, out: mpsc::Sender<Line>) -> Result<(), NotDumped> {
        if !self.ready {
            return Err(NotDumped::NotReady);
        }
        if self.dumps.len() >= MAX_DUMPS {
            return Err(NotDumped::TooMany);
        }
        let pool = |p: &super::roster::Pool| PoolLine {
            name: p.config.name.clone(),
            block_size: p.config.block_size,
        };
        let pools = &self.roster.pools;
        let head = Line::Dump {
            version: VERSION,
            pools: pools.iter().map(pool).collect(),
        };
        let streams = pools.iter().flat_map(Self::stream_states).map(Line::Stream);
        self.dumps.push_back(Dump {
            out,
            first: std::iter::once(head).chain(streams).collect(),
            walk: self.walk(),
            owners: 0,
            blocks: 0,
            moved: Instant::now(),
        });
        Ok(())
    }

    /// Takes lines of the dump whose turn it is.
    pub(super) fn dump_out(&self) -> Option<mpsc::Sender<Line>> {
        self.dumps.front().map(|dump| dump.out.clone())
    }

    /// The next line of the first dump has a place.
    pub(super) fn dump_step(&mut self, place: Option<mpsc::OwnedPermit<Line>>) {
        let (Some(mut dump), Some(place)) = (self.dumps.pop_front(), place) else {
            // Whoever asked is gone.
            return;
        };
        dump.moved = Instant::now();
        if let Some(line) = dump.first.pop_front() {
            place.send(line);
            self.dumps.push_front(dump);
            return;
        }
        let line = match self.walk_step(&mut dump.walk) {
            None => {
                place.send(Line::End {
                    owners: dump.owners,
                    blocks: dump.blocks,
                });
                return;
            }
            Some(Part::Owner(pool, state)) => {
                dump.owners += 1;
                Line::Owner { pool, state }
            }
            Some(Part::Blocks(pool, id, blocks)) => {
                dump.blocks += blocks.len() as u64;
                Line::Blocks {
                    pool,
                    id,
                    blocks: blocks.into_iter().map(Into::into).collect(),
                }
            }
        };
        place.send(line);
        self.dumps.push_front(dump);
    }

    /// Goes on with dumps however many events come, and gives up on whoever reads nothing.
    pub(super) fn sweep_dumps(&mut self) {
        if let Some(Ok(place)) = self.dump_out().map(mpsc::Sender::try_reserve_owned) {
            self.dump_step(Some(place));
        }
        let at = Instant::now();
        if self.dumps.front().is_some_and(|d| at >= d.moved + STALLED) {
            self.dumps.pop_front();
            if let Some(next) = self.dumps.front_mut() {
                next.moved = at;
            }
        }
    }

    /// Takes a line of a peer's dump over. `true` after the last one.
    ///
    /// # Errors
    /// When the lines make no sense; owners that came before stay.
    pub fn adopt(&mut self, line: Line) -> Result<bool, NotAdopted> {
        match line {
            Line::Dump { version, .. } if version != VERSION => {
                return Err(NotAdopted::Version(version));
            }
            Line::Dump { pools, .. } => {
                let own = |line: &PoolLine| {
                    let is_it = |p: &super::roster::Pool| {
                        p.config.name == line.name && p.config.block_size == line.block_size
                    };
                    self.roster.pools.iter().position(is_it)
                };
                self.adoption.pools = pools.iter().map(own).collect();
            }
            Line::Stream(state) => self.restore_stream(state),
            Line::Owner { pool, state } => {
                self.end_owner();
                let own = self.adoption.pools.get(pool);
                let own = *own.ok_or(NotAdopted::UnknownPool(pool))?;
                self.adoption.owner = own.map(|own| (own, state));
            }
            Line::Blocks { id, blocks, .. } => {
                // One of a pool that is not served here is skipped.
                let Some((_, owner)) = &mut self.adoption.owner else {
                    return Ok(false);
                };
                if owner.id != id {
                    return Err(NotAdopted::OutOfOrder(id.worker));
                }
                owner.blocks.extend(blocks.into_iter().map(Held::from));
            }
            Line::End { .. } => {
                self.end_owner();
                self.adoption = Adoption::default();
                self.is_bootstrapped = true;
                self.check_ready();
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn end_owner(&mut self) {
        let Some((pool, mut state)) = self.adoption.owner.take() else {
            return;
        };
        parents_first(&mut state.blocks);
        parents_first(&mut state.doubtful);
        let is_here = self
            .roster
            .worker(state.id.worker)
            .is_some_and(|(at, _)| at == pool);
        if is_here {
            self.restore_owner(&state);
            self.saving.touch();
        }
    }
}
