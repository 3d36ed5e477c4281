//! The boards of live prompts in shared data, as this VM reads and writes them.

use kv_core::board::{Board, EntryId, Prints, shard};
use kv_core::key;

use crate::host::{Expect, Host};

/// How often a write is tried that other VMs come before.
const ATTEMPTS: u32 = 32;

/// Where an entry stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Listing {
    /// Its board.
    pub shard: u8,
    /// The entry.
    pub id: EntryId,
}

/// A prompt, and the board as it was when it was last looked at.
#[derive(Debug)]
pub struct Glimpse {
    shard: u8,
    prompt: Prints,
    board: Board,
    expect: Expect,
    /// Leading blocks of the prompt in use on each owner that uses any.
    shared: Vec<(u64, u32)>,
}

impl Glimpse {
    /// Looks up a prompt by its sequence hashes; `None` for one without.
    pub fn new(host: &impl Host, hashes: &[u64]) -> Option<Self> {
        let shard = shard(*hashes.first()?);
        let (board, expect) = read(host, shard);
        let prompt = Prints::new(hashes);
        let shared = board.shared(&prompt, None);
        Some(Self {
            shard,
            prompt,
            board,
            expect,
            shared,
        })
    }

    /// Looks again, past an entry of the prompt itself.
    pub fn again(&mut self, host: &impl Host, own: Option<Listing>) {
        (self.board, self.expect) = read(host, self.shard);
        self.shared = self
            .board
            .shared(&self.prompt, own.map(|listing| listing.id));
    }

    /// Leading blocks of the prompt in use on an owner.
    #[must_use]
    pub fn shared(&self, owner: u64) -> u32 {
        let found = self.shared.iter().find(|(o, _)| *o == owner);
        found.map_or(0, |(_, blocks)| *blocks)
    }

    /// Puts the prompt on the board. Returns where, and how many of its blocks others use on the
    /// owner; `None` where there is no room.
    pub fn list(
        &mut self,
        host: &impl Host,
        id: EntryId,
        owner: u64,
        now_s: u32,
    ) -> Option<(Listing, u32)> {
        let shard = self.shard;
        for _ in 0..ATTEMPTS {
            let shared = self.board.add(id, owner, &self.prompt, now_s)?;
            if host.set_shared(&key::board(shard), self.board.bytes(), self.expect) {
                return Some((Listing { shard, id }, shared));
            }
            (self.board, self.expect) = read(host, shard);
        }
        None
    }
}

impl Listing {
    /// Takes the entry off. Returns its owner, and how many of its blocks others use there; `None`
    /// if it is not there any more.
    #[must_use]
    pub fn remove(self, host: &impl Host) -> Option<(u64, u32)> {
        change(host, self.shard, |board| board.remove(self.id))
    }

    /// Moves the entry to another owner. Returns how many of its blocks others use on the one it
    /// leaves and on the one it goes to.
    #[must_use]
    pub fn relocate(self, host: &impl Host, to: u64) -> Option<(u32, u32)> {
        change(host, self.shard, |board| board.relocate(self.id, to))
    }
}

/// Shows that the entries of a board for which `is_live` holds are still somebody's.
pub fn stamp(host: &impl Host, shard: u8, now_s: u32, is_live: impl Fn(EntryId) -> bool) {
    change(host, shard, |board| {
        board.stamp(now_s, &is_live).then_some(())
    });
}

/// Takes what is nobody's off a board. Returns the owners and how many blocks of it others use there.
pub fn expire(host: &impl Host, shard: u8, now_s: u32) -> Vec<(u64, u32)> {
    let expired = change(host, shard, |board| {
        let expired = board.expire(now_s);
        (!expired.is_empty()).then_some(expired)
    });
    expired.unwrap_or_default()
}

/// Changes a board, unless `step` has nothing to change.
fn change<T>(
    host: &impl Host,
    shard: u8,
    mut step: impl FnMut(&mut Board) -> Option<T>,
) -> Option<T> {
    for _ in 0..ATTEMPTS {
        let (mut board, expect) = read(host, shard);
        let done = step(&mut board)?;
        if host.set_shared(&key::board(shard), board.bytes(), expect) {
            return Some(done);
        }
    }
    None
}

fn read(host: &impl Host, shard: u8) -> (Board, Expect) {
    match host.shared(&key::board(shard)) {
        Some(shared) => (
            Board::from_bytes(shared.bytes),
            Expect::Version(shared.version),
        ),
        None => (Board::default(), Expect::Nothing),
    }
}
