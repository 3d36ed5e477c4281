//! What a worker's own stream of events needs, checked.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use kv_core::id::{DpRank, Family};

use super::check::Check;
use super::file;
use crate::ingest::engine::media::Media;

/// Longest name of a medium, bytes.
const MEDIUM_BYTES: usize = 64;

/// A worker's own stream of events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Events {
    /// Subscribed to over ZMQ, one socket to a rank.
    Zmq {
        /// The PUB sockets.
        endpoint: ZmqAddress,
        /// Topic to subscribe to; empty takes all.
        topic: String,
        /// The ROUTER sockets that give batches once more.
        replay: Option<ZmqAddress>,
    },
    /// The same, of a worker that registered rank by rank.
    Sockets(BTreeMap<DpRank, Socket>),
    /// Polled from TensorRT-LLM's HTTP server.
    TrtLlm {
        /// Where, `http://`.
        url: http::Uri,
        /// Pause between polls.
        poll: Duration,
    },
    /// Posted to the sidecar's HTTP API.
    Http {
        /// File with the token that the engine shows.
        token_file: Option<PathBuf>,
        /// Whether an engine on this machine needs no token.
        trusts_loopback: bool,
    },
}

/// Where one rank publishes over ZMQ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Socket {
    /// The PUB socket.
    pub endpoint: ZmqAddress,
    /// The ROUTER socket that gives batches once more.
    pub replay: Option<ZmqAddress>,
}

impl Events {
    /// `host:port` of a rank's PUB socket, where there is one.
    #[must_use]
    pub fn zmq(&self, rank: DpRank) -> Option<String> {
        match self {
            Self::Zmq { endpoint, .. } => endpoint.of(rank),
            Self::Sockets(sockets) => sockets.get(&rank)?.endpoint.of(0),
            Self::TrtLlm { .. } | Self::Http { .. } => None,
        }
    }
}

/// Sockets of all ranks of a worker: rank r is at port + r.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ZmqAddress {
    /// Name or address of the host; an IPv6 address in brackets.
    pub host: String,
    /// Port of rank 0.
    pub port: u16,
}

impl ZmqAddress {
    /// `host:port` of a rank; `None` where the port would be above 65535.
    #[must_use]
    pub fn of(&self, rank: DpRank) -> Option<String> {
        let port = u32::from(self.port).checked_add(rank)?;
        let port = u16::try_from(port).ok()?;
        Some(format!("{}:{port}", self.host))
    }

    /// The address of `tcp://host:port`; `None` for any other text.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (host, port) = text.strip_prefix("tcp://")?.rsplit_once(':')?;
        let port = port.parse().ok().filter(|port| *port != 0)?;
        let is_bare_v6 = host.contains(':') && !(host.starts_with('[') && host.ends_with(']'));
        let is_host = !host.is_empty() && !host.contains(['/', '*', ' ']) && !is_bare_v6;
        is_host.then(|| Self {
            host: host.to_owned(),
            port,
        })
    }
}

/// What the hashes are in events without token ids about some media.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FamilyUse {
    /// How they are computed; never Dynamo's.
    pub family: Family,
    /// Names of media, upper case; each in one family only.
    pub media: Vec<String>,
    /// Tokens to a hash, a multiple of the pool's block size.
    pub block_size: u32,
    /// `PYTHONHASHSEED` of the engines.
    pub hash_seed: String,
    /// Most hashes of one rank.
    pub max_blocks: Option<u32>,
    /// Objects in which a store keeps one page of HiCache.
    pub objects: u32,
}

impl Check {
    pub(super) fn events(
        &mut self,
        events: &file::Events,
        ranks: u32,
        prefix: &str,
    ) -> Option<Events> {
        let path = |key: &str| format!("{prefix}.{key}");
        let mut all = Vec::new();
        if let Some(zmq) = &events.zmq {
            let endpoint = zmq.endpoint.as_deref().unwrap_or_default();
            let endpoint = self.zmq(&path("zmq.endpoint"), endpoint, ranks);
            let replay = zmq.replay_endpoint.as_deref();
            let replay = replay.map(|r| self.zmq(&path("zmq.replay_endpoint"), r, ranks));
            all.push(endpoint.and_then(|endpoint| {
                Some(Events::Zmq {
                    endpoint,
                    topic: zmq.topic.clone(),
                    replay: match replay {
                        Some(replay) => Some(replay?),
                        None => None,
                    },
                })
            }));
        }
        if let Some(trtllm) = &events.trtllm {
            let url = trtllm.url.as_deref().unwrap_or_default();
            let path = path("trtllm.url");
            let is_http = |uri: &http::Uri| {
                uri.scheme() == Some(&http::uri::Scheme::HTTP) && uri.host().is_some()
            };
            let parsed = url.parse::<http::Uri>().ok().filter(is_http);
            if parsed.is_none() && trtllm.url.is_some() {
                let why = "must be a URL such as http://host:8000/kv_cache_events";
                self.refuse(&path, format!("{url:?}"), why);
            } else if parsed.is_some() {
                self.only(&path, url);
            }
            all.push(parsed.map(|url| Events::TrtLlm {
                url,
                poll: Duration::from_millis(trtllm.poll_ms),
            }));
        }
        if let Some(http) = &events.http {
            self.readable(&path("http.token_file"), http.token_file.as_deref());
            if http.token_file.is_none() && !http.trust_loopback {
                let why = "needs token_file or trust_loopback, or nobody may post";
                self.refuse(path("http"), "neither", why);
            }
            all.push(Some(Events::Http {
                token_file: http.token_file.clone(),
                trusts_loopback: http.trust_loopback,
            }));
        }
        if all.len() != 1 {
            let why = "must have one of zmq, trtllm and http";
            self.refuse(prefix, format!("{} of them", all.len()), why);
        }
        all.into_iter().next().flatten()
    }

    /// `host:port` of each socket.
    pub(super) fn dynamo_zmq(&mut self, sockets: &[String]) -> Vec<String> {
        let each = sockets
            .iter()
            .enumerate()
            .filter_map(|(i, text)| self.zmq(&format!("dynamo_zmq[{i}]"), text, 1)?.of(0));
        each.collect()
    }

    fn zmq(&mut self, path: &str, text: &str, ranks: u32) -> Option<ZmqAddress> {
        let address = ZmqAddress::parse(text);
        let last = ranks.saturating_sub(1);
        match &address {
            None if text.is_empty() => {}
            None => {
                let why = "must be tcp://host:port";
                self.refuse(path, format!("{text:?}"), why);
            }
            Some(address) if address.of(last).is_none() => {
                let why = format!("leaves no port for rank {last}");
                self.refuse(path, text, &why);
            }
            Some(address) => {
                for rank in 0..ranks {
                    self.only(path, &address.of(rank).unwrap_or_default());
                }
            }
        }
        address
    }

    /// A stream that two readers share counts its blocks twice, or is torn between them.
    fn only(&mut self, path: &str, stream: &str) {
        if let Some(other) = self.streams.insert(stream.to_owned(), path.to_owned())
            && other != path
        {
            self.refuse(path, stream, &format!("is read by {other}"));
        }
    }

    pub(super) fn media(&mut self, pool: &file::Pool, prefix: &str) -> Media {
        for name in pool.media.keys() {
            if name.is_empty() || name.len() > MEDIUM_BYTES {
                let why = format!("must have names of 1 to {MEDIUM_BYTES} bytes");
                self.refuse(format!("{prefix}media"), format!("{name:?}"), &why);
            }
        }
        Media::new(pool.media.iter().map(|(name, tier)| (&**name, *tier)))
    }

    pub(super) fn families(
        &mut self,
        pool: &file::Pool,
        media: &Media,
        prefix: &str,
    ) -> Vec<FamilyUse> {
        let mut seen = std::collections::HashMap::new();
        let mut uses = Vec::new();
        for (i, used) in pool.families.iter().enumerate() {
            let path = |key: &str| format!("{prefix}families[{i}].{key}");
            let own = pool.kv_cache_block_size.max(1);
            let block_size = used.block_size.unwrap_or(own);
            if block_size % own != 0 {
                let why = format!("must be a multiple of kv_cache_block_size, {own}");
                self.refuse(path("block_size"), block_size, &why);
            }
            if used.family == Some(Family::Dynamo) {
                let why = "must be an engine's: Dynamo's hashes come from token ids";
                self.refuse(path("family"), "dynamo", why);
            }
            let first = pool
                .families
                .iter()
                .position(|other| other.family == used.family);
            if let Some(first) = first.filter(|first| *first < i && used.family.is_some()) {
                let why = format!("is described by {prefix}families[{first}]");
                let name = used.family.unwrap_or_default().name();
                self.refuse(path("family"), name, &why);
            }
            let names = used.media.iter().flatten();
            let names: Vec<String> = names.map(|name| name.trim().to_uppercase()).collect();
            for (k, name) in names.iter().enumerate() {
                let at = path(&format!("media[{k}]"));
                if media.tier(name).is_none() {
                    self.refuse(&at, name, "is no medium: give its tier under `media`");
                } else if let Some(other) = seen.insert(name.clone(), at.clone()) {
                    self.refuse(&at, name, &format!("is taken by {other}"));
                }
            }
            if used.objects.is_some() && used.family != Some(Family::HiCache) {
                let why = "is for the family hi-cache alone";
                self.refuse(path("objects"), used.objects.unwrap_or_default(), why);
            }
            uses.push(FamilyUse {
                family: used.family.unwrap_or_default(),
                media: names,
                block_size,
                hash_seed: used.hash_seed.clone().unwrap_or_else(|| "0".into()),
                max_blocks: used.max_blocks,
                objects: used.objects.unwrap_or(2),
            });
        }
        uses
    }
}
