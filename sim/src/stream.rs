//! The engine's own stream of events: vLLM's batches on a PUB socket. With `FlexKV`, its events
//! come after the engine's in the same batch.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use kv_core::event::EventData;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::flexkv::Change;
use crate::zmq::Pub;

const TOPIC: &[u8] = b"kv-events";
const STORED: &str = "BlockStored";
const REMOVED: &str = "BlockRemoved";

/// An event as vLLM's `msgspec` lays it out: a list that begins with its name.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub(crate) enum Event {
    /// Hashes, parent, token ids, block size, LoRA id, medium.
    Stored(
        &'static str,
        Vec<u64>,
        Option<u64>,
        Vec<u32>,
        usize,
        Option<u64>,
        &'static str,
    ),
    /// Hashes, medium.
    Removed(&'static str, Vec<u64>, &'static str),
    /// The same as accelerated `FlexKV` writes it.
    RemovedSigned(&'static str, Vec<i64>, &'static str),
    Cleared((&'static str,)),
}

/// Token ids of the blocks that an engine names, which its events carry.
pub(crate) type TokensOf = HashMap<u64, Vec<u32>>;

/// The stream.
#[derive(Debug)]
pub(crate) struct Stream {
    socket: Pub,
    block_size: usize,
    sequence: u64,
}

// === impl Stream ===

impl Stream {
    /// Binds the socket.
    pub(crate) async fn bind(
        address: SocketAddr,
        block_size: usize,
        stop: CancellationToken,
    ) -> std::io::Result<Self> {
        Ok(Self {
            socket: Pub::bind(address, stop).await?,
            block_size,
            sequence: 0,
        })
    }

    /// Where the socket listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.socket.address()
    }

    /// Publishes a batch, if there is anything in it. Tokens of stored blocks are taken from
    /// `tokens_of`, tokens of dropped ones removed.
    pub(crate) fn publish(
        &mut self,
        changes: Vec<EventData>,
        outside: Vec<Change>,
        tokens_of: &mut TokensOf,
    ) {
        let mut gone: HashSet<u64> = HashSet::new();
        let mut events: Vec<Event> = Vec::new();
        for data in changes {
            match &data {
                EventData::Stored(stored) => {
                    stored
                        .blocks
                        .iter()
                        .for_each(|b| _ = gone.remove(&b.block_hash));
                }
                EventData::Removed(removed) => gone.extend(&removed.block_hashes),
                EventData::Cleared => {}
            }
            events.push(self.own(data, tokens_of));
        }
        tokens_of.retain(|hash, _| !gone.contains(hash));
        events.extend(outside.into_iter().map(|change| self.outside(change)));
        if events.is_empty() {
            return;
        }
        let at = SystemTime::now().duration_since(UNIX_EPOCH);
        let batch = (at.map_or(0.0, |at| at.as_secs_f64()), events, 0);
        match rmp_serde::to_vec(&batch) {
            Ok(payload) => {
                let sequence = self.sequence.to_be_bytes();
                self.socket.send(&[TOPIC, &sequence, &payload]);
                self.sequence += 1;
            }
            Err(error) => eprintln!("a batch of events is lost: {error}"),
        }
    }

    fn own(&self, data: EventData, tokens_of: &TokensOf) -> Event {
        match data {
            EventData::Stored(stored) => {
                let hashes: Vec<u64> = stored.blocks.iter().map(|b| b.block_hash).collect();
                let tokens = hashes.iter().filter_map(|hash| tokens_of.get(hash));
                let tokens = tokens.flatten().copied().collect();
                let (parent, size) = (stored.parent_hash, self.block_size);
                Event::Stored(STORED, hashes, parent, tokens, size, None, "GPU")
            }
            EventData::Removed(removed) => Event::Removed(REMOVED, removed.block_hashes, "GPU"),
            EventData::Cleared => Event::Cleared(("AllBlocksCleared",)),
        }
    }

    fn outside(&self, change: Change) -> Event {
        match change {
            Change::Stored(medium, hashes) => Event::Stored(
                STORED,
                hashes,
                None,
                Vec::new(),
                self.block_size,
                None,
                medium,
            ),
            Change::Removed(medium, hashes) => {
                let signed = hashes.into_iter().map(u64::cast_signed).collect();
                Event::RemovedSigned(REMOVED, signed, medium)
            }
        }
    }
}
