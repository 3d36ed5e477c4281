//! The snapshot of index and slots in the state folder.
//!
//! File: `KVRSTATE`, version u8, XXH3-64 of the payload as u64 LE, payload (postcard of [`State`]).

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use kv_core::affinity::Saved;
use kv_core::id::{OwnerId, WorkerId};
use kv_core::index::Held;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use crate::index::{Cursor, Knowledge, Slots};
use crate::ingest::Plane;
use crate::ingest::batch::Resume;

const MAGIC: &[u8; 8] = b"KVRSTATE";
/// Grows with every change of what [`State`] contains. A file of another version is moved aside:
/// what is in it comes back from the engines.
const VERSION: u8 = 3;
const HEADER: usize = MAGIC.len() + 1 + 8;

/// Everything that a restarted sidecar takes up again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Epoch of the pages.
    pub epoch: u32,
    /// Level of the pages.
    pub level: u8,
    /// The pools.
    pub pools: Vec<PoolState>,
    /// Sessions that are bound. The file has them after the rest.
    #[serde(skip)]
    pub sessions: Vec<Saved>,
}

/// A pool.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PoolState {
    /// Its name.
    pub name: String,
    /// Tokens to a block: with another size no block matches.
    pub block_size: u32,
    /// Secret of its pages.
    pub key: u64,
    /// Slots of its owners.
    pub slots: Slots,
    /// Its workers' own streams.
    pub streams: Vec<StreamState>,
    /// Its owners.
    pub owners: Vec<OwnerState>,
}

/// A worker's own stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamState {
    /// The worker.
    pub worker: WorkerId,
    /// Its number among the worker's streams.
    pub stream: u32,
    /// How it comes in.
    pub plane: Plane,
    /// Where it has come to.
    pub resume: Resume,
}

/// An owner.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OwnerState {
    /// Who it is.
    pub id: OwnerId,
    /// Ids of its events on Dynamo's plane.
    pub dynamo: Cursor,
    /// Ids of its worker's events on the JSON plane.
    pub json: Cursor,
    /// How much of its cache is known.
    pub knowledge: Knowledge,
    /// Its blocks, parents first.
    #[serde(default)]
    pub blocks: Vec<Held>,
    /// Blocks that may be gone, parents first.
    #[serde(default)]
    pub doubtful: Vec<Held>,
}

/// What goes wrong with the file.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The system refuses.
    #[error("{}: {error}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// What the system says.
        error: std::io::Error,
    },
    /// Another release wrote the file.
    #[error("{}: version {version}, not {VERSION}", file.display())]
    Version {
        /// The file.
        file: PathBuf,
        /// Its version.
        version: u8,
    },
    /// The file isn't what was written.
    #[error("{}: {why}", file.display())]
    Corrupt {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        why: &'static str,
    },
}

/// What was found at the start.
#[derive(Debug, PartialEq)]
pub enum Restored {
    /// No file, or no state folder.
    Absent,
    /// A file that isn't usable; it has been moved aside.
    Corrupt,
    /// A file of another release; it has been moved aside.
    OtherVersion,
    /// The state.
    State(State),
}

impl Restored {
    /// Label for metrics.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::Corrupt => "corrupt",
            Self::OtherVersion => "other_version",
            Self::State(_) => "restored",
        }
    }

    /// The state, if there is one.
    #[must_use]
    pub fn into_state(self) -> Option<State> {
        match self {
            Self::State(state) => Some(state),
            Self::Absent | Self::Corrupt | Self::OtherVersion => None,
        }
    }
}

/// The file in a state folder.
#[must_use]
pub fn file(dir: &Path) -> PathBuf {
    dir.join("index.state")
}

/// Replaces the file at once: a reader finds the old one or the whole of this.
///
/// # Errors
/// When the system refuses; the old file stays.
pub fn save(file: &Path, state: &State) -> Result<(), StateError> {
    let mut bytes = Vec::from(MAGIC);
    bytes.push(VERSION);
    bytes.extend([0; 8]);
    let mut bytes =
        postcard::to_extend(&(state, &state.sessions), bytes).map_err(|_| StateError::Corrupt {
            file: file.into(),
            why: "can't be encoded",
        })?;
    let sum = xxh3_64(&bytes[HEADER..]).to_le_bytes();
    bytes[HEADER - sum.len()..HEADER].copy_from_slice(&sum);
    // It holds the pools' secrets.
    replace(file, &bytes, 0o600).map_err(|error| StateError::Io {
        file: file.into(),
        error,
    })
}

/// Writes beside the file, with these permissions, syncs and renames.
///
/// # Errors
/// When the system refuses.
pub fn replace(file: &Path, bytes: &[u8], mode: u32) -> std::io::Result<()> {
    if let Some(dir) = file.parent() {
        std::fs::create_dir_all(dir)?;
    }
    // `serve` and `envoy` may write the same file at once.
    let mut beside = file.as_os_str().to_owned();
    beside.push(format!(".{}", std::process::id()));
    let mut out = std::fs::File::options()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(mode)
        .open(&beside)?;
    out.write_all(bytes)?;
    out.sync_all()?;
    std::fs::rename(&beside, file)
}

/// Reads the file of the last run. One that isn't usable is moved aside, so that it can be looked
/// at and isn't met again.
#[must_use]
pub fn restore(file: Option<&Path>) -> Restored {
    let Some(file) = file else {
        return Restored::Absent;
    };
    match load(file) {
        Ok(Some(state)) => Restored::State(state),
        Ok(None) => Restored::Absent,
        Err(error) => {
            let (restored, suffix) = match &error {
                StateError::Version { version, .. } => {
                    (Restored::OtherVersion, format!(".version-{version}"))
                }
                StateError::Io { .. } | StateError::Corrupt { .. } => {
                    (Restored::Corrupt, ".corrupt".to_owned())
                }
            };
            let mut aside = file.as_os_str().to_owned();
            aside.push(suffix);
            let moved = std::fs::rename(file, &aside);
            tracing::error!(%error, moved = moved.is_ok(), "state is not usable, starting afresh");
            restored
        }
    }
}

/// Reads a file; `None` if there is none.
///
/// # Errors
/// When it can't be read or isn't what was written.
pub fn load(file: &Path) -> Result<Option<State>, StateError> {
    let corrupt = |why| StateError::Corrupt {
        file: file.into(),
        why,
    };
    let bytes = match std::fs::read(file) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => {
            return Err(StateError::Io {
                file: file.into(),
                error,
            });
        }
    };
    let rest = bytes
        .strip_prefix(MAGIC)
        .ok_or_else(|| corrupt("not a state file"))?;
    let (version, rest) = rest.split_first().ok_or_else(|| corrupt("cut off"))?;
    if *version != VERSION {
        return Err(StateError::Version {
            file: file.into(),
            version: *version,
        });
    }
    let (sum, payload) = rest
        .split_first_chunk::<8>()
        .ok_or_else(|| corrupt("cut off"))?;
    if u64::from_le_bytes(*sum) != xxh3_64(payload) {
        return Err(corrupt("the checksum is wrong"));
    }
    let read = postcard::take_from_bytes::<State>(payload);
    let (mut state, rest) = read.map_err(|_| corrupt("malformed"))?;
    // What an earlier release wrote ends here.
    state.sessions = postcard::from_bytes(rest).unwrap_or_default();
    Ok(Some(state))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State {
        let mut slots = Slots::default();
        let id = OwnerId { worker: 9, rank: 1 };
        slots.assign(id).unwrap();
        let block = |sequence: u64, parent, name| Held {
            family: kv_core::id::Family::Dynamo,
            sequence,
            parent,
            name,
            tiers: 3,
        };
        let owner = OwnerState {
            id,
            dynamo: Cursor::after(Some(u64::MAX)),
            json: Cursor::default(),
            knowledge: Knowledge::Partial,
            blocks: vec![
                block(u64::MAX, None, None),
                block(2, Some(u64::MAX), Some(3)),
            ],
            doubtful: vec![block(7, None, Some(8))],
        };
        let stream = StreamState {
            worker: 9,
            stream: 1,
            plane: Plane::Zmq,
            resume: Resume {
                sequence: u64::MAX,
                mark: 5,
                is_whole: true,
            },
        };
        State {
            epoch: 7,
            level: 12,
            pools: vec![PoolState {
                name: "a".into(),
                block_size: 16,
                key: u64::MAX,
                slots,
                streams: vec![stream],
                owners: vec![owner],
            }],
            sessions: vec![Saved {
                key: 5,
                owner: id,
                idle_ms: 6,
                ttl_ms: 7,
            }],
        }
    }

    #[test]
    fn what_was_saved_is_restored() {
        let folder = tempfile::TempDir::new().unwrap();
        let file = file(&folder.path().join("not/there/yet"));
        assert_eq!(restore(Some(&file)), Restored::Absent);
        save(&file, &state()).unwrap();
        assert_eq!(restore(Some(&file)), Restored::State(state()));
        assert_eq!(restore(None), Restored::Absent);
    }

    #[test]
    fn a_file_cut_or_changed_anywhere_is_refused_and_moved_aside() {
        let folder = tempfile::TempDir::new().unwrap();
        let file = file(folder.path());
        save(&file, &state()).unwrap();
        let whole = std::fs::read(&file).unwrap();
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 0x40;
            for bytes in [&whole[..at], &changed] {
                std::fs::write(&file, bytes).unwrap();
                let is_version = at == MAGIC.len() && bytes.len() > at;
                let refused = if is_version {
                    Restored::OtherVersion
                } else {
                    Restored::Corrupt
                };
                assert_eq!(restore(Some(&file)), refused, "at {at}");
                assert_eq!(restore(Some(&file)), Restored::Absent, "at {at}");
            }
        }
    }
    #[test]
    fn a_file_of_another_release_is_refused_and_moved_aside() {
        let folder = tempfile::TempDir::new().unwrap();
        let file = file(folder.path());
        save(&file, &state()).unwrap();
        let mut bytes = std::fs::read(&file).unwrap();
        bytes[MAGIC.len()] = VERSION - 1;
        std::fs::write(&file, &bytes).unwrap();
        assert_eq!(restore(Some(&file)), Restored::OtherVersion);
        let aside = folder.path().join("index.state.version-2");
        assert_eq!(std::fs::read(aside).unwrap(), bytes);
        assert_eq!(restore(Some(&file)), Restored::Absent);
    }

    /// Who changes what a state contains changes its version, and then this.
    #[test]
    fn a_version_has_one_layout() {
        let folder = tempfile::TempDir::new().unwrap();
        let file = file(folder.path());
        save(&file, &state()).unwrap();
        let bytes = std::fs::read(&file).unwrap();
        let sum = &bytes[MAGIC.len() + 1..HEADER];
        let expected = [9, 137, 227, 29, 139, 247, 230, 75];
        assert_eq!((VERSION, sum), (3, &expected[..]));
    }
}
