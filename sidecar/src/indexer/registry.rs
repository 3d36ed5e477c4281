//! Workers that registered at run time: a layer over the configuration, as if the file had them.

use std::collections::BTreeMap;

use kv_core::id::{Device, DpRank, Role, Slot, WorkerId};
use kv_core::policy::Policy;
use kv_core::queue::{Refusing, Thresholds};
use kv_core::table::Metadata;
use serde::Serialize;
use tokio::sync::oneshot;

use super::DEFAULT_GROUP;
use crate::config::{CachePolicy, Config, Events, Pool, Socket, Source, Worker, ZmqAddress};
use crate::ingest::engine::media::Media;

/// Pools for models that the configuration doesn't name. An empty one is used again.
const MAX_POOLS: usize = 64;
/// Ranks of a worker, as in the configuration.
const MAX_RANKS: u32 = 1024;
/// Tokens to a block, as in the configuration.
const MAX_BLOCK_SIZE: u32 = 4096;

/// A rank of a worker with its own events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registration {
    /// The worker.
    pub instance: WorkerId,
    /// Its rank.
    pub rank: DpRank,
    /// Model that it serves.
    pub model: String,
    /// Routing group that it belongs to.
    pub group: String,
    /// Tokens to a block.
    pub block_size: u32,
    /// Where it publishes, `tcp://host:port`.
    pub endpoint: String,
    /// Where it gives messages once more.
    pub replay: Option<String>,
}

/// Who is to be forgotten.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unregistration {
    /// The worker.
    pub instance: WorkerId,
    /// Model under which it registered.
    pub model: String,
    /// Its routing group; `None` is any, with all ranks.
    pub group: Option<String>,
    /// One rank; `None` is all.
    pub rank: Option<DpRank>,
}

/// Why a registration is refused. The messages are Dynamo's where Dynamo has the case.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// Not an address that can be subscribed to.
    #[error("invalid ZMQ endpoint `{0}`: must be tcp://host:port")]
    Endpoint(String),
    /// The same for replays.
    #[error("invalid replay endpoint `{0}`: must be tcp://host:port")]
    ReplayEndpoint(String),
    /// A size that no engine has.
    #[error("block_size must be 1 to 4096, not {0}")]
    BlockSize(u32),
    /// A rank that no engine has.
    #[error("dp_rank must be below 1024, not {0}")]
    Rank(DpRank),
    /// The worker serves something else.
    #[error("instance {instance} is already registered for model={model} routing_group={group}")]
    Elsewhere {
        /// The worker.
        instance: WorkerId,
        /// What it serves.
        model: String,
        /// Its group.
        group: String,
    },
    /// The rank is there.
    #[error("instance {instance} dp_rank {rank} already registered")]
    Taken {
        /// The worker.
        instance: WorkerId,
        /// Its rank.
        rank: DpRank,
    },
    /// Others of the model have blocks of another size.
    #[error(
        "block_size mismatch for model={model} routing_group={group}: existing={existing}, requested={requested}"
    )]
    OtherBlockSize {
        /// The model.
        model: String,
        /// The group.
        group: String,
        /// Its block size.
        existing: u32,
        /// What was asked for.
        requested: u32,
    },
    /// There is no room.
    #[error("too many {0}")]
    Full(&'static str),
    /// No such worker has registered.
    #[error("instance {0} not found")]
    NoInstance(WorkerId),
    /// It has registered for something else.
    #[error("instance {instance} is registered for model={model} routing_group={group}")]
    OtherPartition {
        /// The worker.
        instance: WorkerId,
        /// What it serves.
        model: String,
        /// Its group.
        group: String,
    },
    /// The worker has no such rank.
    #[error("instance {instance} dp_rank {rank} not found")]
    NoRank {
        /// The worker.
        instance: WorkerId,
        /// The rank.
        rank: DpRank,
    },
}

/// What the keeper of the configuration is asked.
#[derive(Debug)]
pub enum Ask {
    /// A rank comes.
    Register(Registration, oneshot::Sender<Result<(), RegistryError>>),
    /// A worker, or a rank of it, goes.
    Unregister(Unregistration, oneshot::Sender<Result<(), RegistryError>>),
    /// Every worker.
    Workers(oneshot::Sender<Vec<Listed>>),
}

/// A worker as `/workers` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Listed {
    /// The worker.
    pub instance_id: WorkerId,
    /// How its events come: `zmq`, or `other` for a worker of the configuration.
    pub source: &'static str,
    /// Model that it serves.
    pub model_name: String,
    /// Its routing group.
    pub routing_group: String,
    /// Tokens to a block.
    pub block_size: u32,
    /// Where each rank publishes.
    pub endpoints: BTreeMap<DpRank, String>,
}

/// A model in a routing group that the configuration doesn't name.
#[derive(Clone, Debug)]
struct Partition {
    model: String,
    group: String,
    block_size: u32,
}

/// Where a worker belongs.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    /// A pool of the configuration.
    Pool(String),
    /// A partition, by number.
    Partition(usize),
}

#[derive(Clone, Debug)]
struct Registered {
    place: Place,
    model: String,
    group: String,
    sockets: BTreeMap<DpRank, Socket>,
}

impl Registered {
    fn ranks(&self) -> u32 {
        self.sockets.keys().last().map_or(0, |rank| rank + 1)
    }
}

/// All that registered.
#[derive(Clone, Debug, Default)]
pub struct Registry {
    partitions: Vec<Partition>,
    workers: BTreeMap<WorkerId, Registered>,
}

impl Registry {
    /// The configuration with everything that registered.
    #[must_use]
    pub fn over(&self, base: &Config) -> Config {
        let mut config = base.clone();
        let partitions = self.partitions.iter().enumerate();
        config.pools.extend(partitions.map(|(number, partition)| {
            Pool {
                name: pool_name(number),
                models: vec![partition.model.clone()],
                lora_adapters: Vec::new(),
                block_size: partition.block_size,
                policy: base
                    .pools
                    .first()
                    .map_or_else(Policy::default, |pool| pool.policy),
                kv_events: true,
                ttl_ms: 0,
                cache_policy: CachePolicy::default(),
                predicted_ttl_ms: None,
                trusts_hints: false,
                trusted_sources: Vec::new(),
                affinity: None,
                device_ratio: 1,
                queue: None,
                overload: Thresholds::default(),
                refusing: Refusing::default(),
                slow_start_ms: 0,
                tokenizer: None,
                media: Media::default(),
                families: Vec::new(),
                image_token: None,
                workers: Vec::new(),
                dns: Vec::new(),
                routing_group: Some(partition.group.clone()),
            }
        }));
        for (id, registered) in &self.workers {
            let pool = match &registered.place {
                Place::Pool(name) => name.clone(),
                Place::Partition(number) => pool_name(*number),
            };
            let worker = Worker {
                id: *id,
                endpoint: None,
                role: Role::Aggregated,
                device: Device::default(),
                ranks: registered.ranks(),
                metadata: Metadata::default(),
                draining: false,
                source: Source::Indexer,
                events: Some(Events::Sockets(registered.sockets.clone())),
            };
            config.admit(&pool, worker);
        }
        config
    }

    /// Takes a rank in.
    ///
    /// # Errors
    /// Says why not; nothing has changed then.
    pub fn register(&mut self, base: &Config, asked: Registration) -> Result<(), RegistryError> {
        let Registration {
            instance,
            rank,
            block_size,
            ..
        } = asked;
        let endpoint = ZmqAddress::parse(&asked.endpoint)
            .ok_or_else(|| RegistryError::Endpoint(asked.endpoint.clone()))?;
        let replay = match &asked.replay {
            None => None,
            Some(text) => {
                let refused = || RegistryError::ReplayEndpoint(text.clone());
                Some(ZmqAddress::parse(text).ok_or_else(refused)?)
            }
        };
        if !(1..=MAX_BLOCK_SIZE).contains(&block_size) {
            return Err(RegistryError::BlockSize(block_size));
        }
        if rank >= MAX_RANKS {
            return Err(RegistryError::Rank(rank));
        }
        let here = (asked.model.as_str(), asked.group.as_str());
        if let Some((model, group)) = self.partition_of(base, instance) {
            if (model.as_str(), group.as_str()) != here {
                return Err(RegistryError::Elsewhere {
                    instance,
                    model,
                    group,
                });
            }
            let registered = self.workers.get(&instance);
            if registered.is_none_or(|worker| worker.sockets.contains_key(&rank)) {
                return Err(RegistryError::Taken { instance, rank });
            }
        }
        let (place, existing) = self.place(base, &asked)?;
        if existing != block_size {
            return Err(RegistryError::OtherBlockSize {
                model: asked.model,
                group: asked.group,
                existing,
                requested: block_size,
            });
        }
        let others = self.workers.get(&instance).map_or(0, Registered::ranks);
        let more = (rank + 1).saturating_sub(others);
        if self.owners(base, &place) + more > u32::from(Slot::MAX) {
            return Err(RegistryError::Full("ranks"));
        }
        if let Place::Partition(number) = place
            && !self.is_used(number)
        {
            let partition = Partition {
                model: asked.model.clone(),
                group: asked.group.clone(),
                block_size,
            };
            match self.partitions.get_mut(number) {
                Some(unused) => *unused = partition,
                None => self.partitions.push(partition),
            }
        }
        let worker = self.workers.entry(instance).or_insert_with(|| Registered {
            place,
            model: asked.model,
            group: asked.group,
            sockets: BTreeMap::new(),
        });
        worker.sockets.insert(rank, Socket { endpoint, replay });
        Ok(())
    }

    /// Forgets a worker, or a rank of it.
    ///
    /// # Errors
    /// When there is none such.
    pub fn unregister(&mut self, asked: &Unregistration) -> Result<(), RegistryError> {
        let instance = asked.instance;
        let worker = self
            .workers
            .get_mut(&instance)
            .ok_or(RegistryError::NoInstance(instance))?;
        let is_other = |group: &String| *group != worker.group;
        if worker.model != asked.model || asked.group.as_ref().is_some_and(is_other) {
            return Err(RegistryError::OtherPartition {
                instance,
                model: worker.model.clone(),
                group: worker.group.clone(),
            });
        }
        // Without a group, all of the worker goes.
        let rank = asked.rank.filter(|_| asked.group.is_some());
        if let Some(rank) = rank {
            if worker.sockets.remove(&rank).is_none() {
                return Err(RegistryError::NoRank { instance, rank });
            }
            if !worker.sockets.is_empty() {
                return Ok(());
            }
        }
        self.workers.remove(&instance);
        Ok(())
    }

    /// Every worker, of the configuration and registered.
    #[must_use]
    pub fn list(&self, base: &Config) -> Vec<Listed> {
        let config = self.over(base);
        let mut listed = Vec::new();
        for pool in &config.pools {
            for worker in &pool.workers {
                let endpoints: BTreeMap<DpRank, String> = (0..worker.ranks)
                    .filter_map(|rank| {
                        let address = worker.events.as_ref()?.zmq(rank)?;
                        Some((rank, format!("tcp://{address}")))
                    })
                    .collect();
                let registered = self.workers.get(&worker.id);
                let source = if endpoints.is_empty() { "other" } else { "zmq" };
                listed.push(Listed {
                    instance_id: worker.id,
                    source,
                    model_name: registered
                        .map_or_else(|| model_of(pool).to_owned(), |r| r.model.clone()),
                    routing_group: pool
                        .routing_group
                        .clone()
                        .unwrap_or_else(|| DEFAULT_GROUP.to_owned()),
                    block_size: pool.block_size,
                    endpoints,
                });
            }
        }
        listed
    }

    /// Model and routing group of a worker.
    fn partition_of(&self, base: &Config, instance: WorkerId) -> Option<(String, String)> {
        let has = |pool: &&Pool| pool.workers.iter().any(|w| w.id == instance);
        if let Some(pool) = base.pools.iter().find(has) {
            return Some((model_of(pool).to_owned(), DEFAULT_GROUP.to_owned()));
        }
        let worker = self.workers.get(&instance)?;
        Some((worker.model.clone(), worker.group.clone()))
    }

    /// Where a worker would go, and the block size there.
    fn place(&self, base: &Config, asked: &Registration) -> Result<(Place, u32), RegistryError> {
        let names = |pool: &&Pool| asked.group == DEFAULT_GROUP && serves(pool, &asked.model);
        if let Some(pool) = base.pools.iter().find(names) {
            return Ok((Place::Pool(pool.name.clone()), pool.block_size));
        }
        let mut numbered = self.partitions.iter().enumerate();
        let same = |(number, p): &(usize, &Partition)| {
            p.model == asked.model && p.group == asked.group && self.is_used(*number)
        };
        if let Some((number, partition)) = numbered.find(same) {
            return Ok((Place::Partition(number), partition.block_size));
        }
        // A partition that nobody is left in becomes this one.
        let free = (0..MAX_POOLS).find(|number| !self.is_used(*number));
        let free = free.ok_or(RegistryError::Full("models"))?;
        Ok((Place::Partition(free), asked.block_size))
    }

    fn is_used(&self, number: usize) -> bool {
        let place = Place::Partition(number);
        self.workers.values().any(|worker| worker.place == place)
    }

    /// Owners of a pool.
    fn owners(&self, base: &Config, place: &Place) -> u32 {
        let configured = match place {
            Place::Pool(name) => base.pools.iter().find(|pool| pool.name == *name),
            Place::Partition(_) => None,
        };
        let configured = configured.map_or(0, |p| p.workers.iter().map(|w| w.ranks).sum());
        let here = self.workers.values().filter(|w| w.place == *place);
        here.map(Registered::ranks).sum::<u32>() + configured
    }
}

/// Name of the pool of a partition. The configuration's names can't have a colon.
fn pool_name(number: usize) -> String {
    format!("registered:{number}")
}

/// The model that a pool goes by.
#[must_use]
pub(crate) fn model_of(pool: &Pool) -> &str {
    pool.models.first().unwrap_or(&pool.name)
}

/// Whether a pool goes by a model's name.
fn serves(pool: &Pool, model: &str) -> bool {
    model_of(pool) == model || pool.models.iter().any(|name| name == model)
}
