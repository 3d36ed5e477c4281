//! The worker table: pools, their owners and policies, as the filter sees them.
//!
//! Encoded, what later releases added stands behind what earlier ones read ([`extension`]), so that
//! an earlier filter reads a later sidecar's table.

mod extension;
mod metadata;
mod queueing;
mod warmth;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::affinity::Affinity;
use crate::family::Scheme;
use crate::handover::Handover;
use crate::id::{Device, OwnerId, Role, Slot};
use crate::key;
use crate::policy::Policy;
use crate::queue::{Capacity, Class, Profile, Refusing, Thresholds};
use crate::text::Budget;
use extension::Extension;
use queueing::Queueing;

pub use metadata::Metadata;

/// Everything a decision needs besides pages, load and the request.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// Publisher's epoch, the same as in head and pages.
    pub epoch: u32,
    /// Grows with every change.
    pub version: u64,
    /// What holds for all pools.
    pub settings: Settings,
    /// The pools; the first serves requests that name no known model.
    pub pools: Vec<Pool>,
}

/// Filter settings that hold for all pools.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Requests with a longer body, in bytes, are routed by load and not buffered.
    pub body_limit: u64,
    /// Prompts with more token ids than this are routed by load.
    pub token_limit: u32,
    /// Whether the answer carries `x-kv-router-decision`.
    pub decision_header: bool,
}

/// Workers that serve the same models.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Pool {
    /// Name in metrics and records: `[A-Za-z0-9._-]`, at most 64 bytes.
    pub name: String,
    /// Secret that mixes unit keys, so that clients can't aim prompts at one page.
    pub key: u64,
    /// Model names served; empty takes any name.
    pub models: Vec<String>,
    /// LoRA adapters, which requests name as their model.
    pub lora_adapters: Vec<String>,
    /// Tokens to a block.
    pub block_size: u32,
    /// How to choose.
    pub policy: Policy,
    /// The owners, by slot.
    pub owners: Vec<Owner>,
    /// Whether any client's privileged hints count.
    #[serde(skip)]
    pub trusts_hints: bool,
    /// Addresses whose privileged hints count.
    #[serde(skip)]
    pub trusted_sources: Vec<IpNet>,
    /// How sessions are kept together; `None` where they are not.
    #[serde(skip)]
    pub affinity: Option<Affinity>,
    /// How many requests a worker with an accelerator takes for each of one without, in the mode
    /// device-aware-weighted; 0 counts as 1.
    #[serde(skip)]
    pub device_ratio: u32,
    /// How long the share of a worker grows that is there for the first time, milliseconds; 0 for
    /// none that does.
    #[serde(skip)]
    pub slow_start_ms: u32,
    /// Families in which blocks are looked up besides Dynamo's.
    #[serde(skip)]
    pub families: Vec<Scheme>,
    /// Slots of stores that all workers share.
    #[serde(skip)]
    pub stores: Vec<Slot>,
    /// How long the sidecar may take to read a prompt that is text; `None` where it has no tokenizer
    /// for this pool.
    #[serde(skip)]
    pub text: Option<Budget>,
    /// How requests wait while all workers are busy; `None` where they don't.
    #[serde(skip)]
    pub queue: Option<Profile>,
    /// Past which load a worker takes no requests at all.
    #[serde(skip)]
    pub overload: Thresholds,
    /// How requests are refused because of load.
    #[serde(skip)]
    pub refusing: Refusing,
    /// Whether prompts that are text are found by chunks of it where they are not tokenized.
    #[serde(skip)]
    pub chunks: bool,
    /// How workers get the token ids of prompts that came as text.
    #[serde(skip)]
    pub handover: Handover,
}

/// A (worker, dp rank) of a pool.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Owner {
    /// Its number in the pages.
    pub slot: Slot,
    /// Its identity.
    pub id: OwnerId,
    /// What it does.
    pub role: Role,
    /// `ip:port` of the worker.
    pub endpoint: String,
    /// Whether requests may be sent to it.
    pub accepting: bool,
    /// What else is known of it.
    #[serde(skip)]
    pub traits: Traits,
    /// What it is said to be.
    #[serde(skip)]
    pub metadata: Metadata,
}

/// What a worker is, and what has been learned of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traits {
    /// What it computes with.
    pub device: Device,
    /// Prompt tokens that it prefills in a second, queueing included; 0 where not known.
    pub prefill_rate: u32,
    /// Nanoseconds that it takes to prefill a token, without queueing; 0 where not known.
    pub prefill_ns_per_token: u32,
    /// Since when it takes requests, Unix milliseconds; 0 where it always has.
    pub since_ms: u64,
}

/// Which pool serves a request, and its model as what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Served<'a> {
    /// Position of the pool in the table.
    pub pool: usize,
    /// The adapter, where the model is one.
    pub lora: Option<&'a str>,
    /// Whether the pool names this model, or takes any.
    pub known: bool,
}

impl Table {
    /// Version byte and the table.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        key::encode(&(self, Extension::of(self), Queueing::of(self)))
    }

    /// The inverse of [`Table::encode`]; `None` for another version or broken bytes. What an
    /// earlier release wrote lacks the extension.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        if let Some((mut table, extension, queueing)) = key::decode::<(Self, _, _)>(bytes) {
            Extension::extend(extension, &mut table);
            Queueing::extend(queueing, &mut table);
            return Some(table);
        }
        let Some((mut table, extension)) = key::decode::<(Self, Extension)>(bytes) else {
            return key::decode(bytes);
        };
        extension.extend(&mut table);
        Some(table)
    }

    /// The pool for a request: the one of this name, else the one that names its model, else the
    /// first; `None` only for an empty table.
    #[must_use]
    pub fn serve(&self, pool: Option<&str>, model: Option<&str>) -> Option<Served<'_>> {
        let all = || self.pools.iter().enumerate();
        let named = all().find(|(_, p)| pool == Some(p.name.as_str()));
        let by_model = || all().find(|(_, p)| p.names(model));
        let (position, p) = named.or_else(by_model).or_else(|| all().next())?;
        Some(Served {
            pool: position,
            lora: p.adapter(model),
            known: p.names(model) || p.models.is_empty(),
        })
    }
}

impl Owner {
    /// What it can do.
    #[must_use]
    pub fn capacity(&self) -> Capacity {
        Capacity {
            batched_tokens: self.metadata.max_num_batched_tokens,
            blocks: self.metadata.total_kv_blocks,
        }
    }

    /// Whether it has room for one more request of a class.
    #[must_use]
    pub fn has_room(&self, class: &Class, prefill_tokens: u64, requests: u32) -> bool {
        let is_busy = class.is_busy(prefill_tokens, self.capacity());
        !is_busy && !self.metadata.is_full(requests)
    }
}

impl Pool {
    /// The adapter of this name.
    fn adapter(&self, model: Option<&str>) -> Option<&str> {
        let mut adapters = self.lora_adapters.iter().map(String::as_str);
        adapters.find(|adapter| model == Some(*adapter))
    }

    /// Whether this is one of its models or adapters.
    fn names(&self, model: Option<&str>) -> bool {
        let is_model = self.models.iter().any(|m| model == Some(m.as_str()));
        is_model || self.adapter(model).is_some()
    }

    /// The owner in a slot.
    #[must_use]
    pub fn owner(&self, slot: Slot) -> Option<&Owner> {
        let i = self.owners.binary_search_by_key(&slot, |o| o.slot).ok()?;
        self.owners.get(i)
    }

    /// Slots in use are below this.
    #[must_use]
    pub fn slots(&self) -> usize {
        let owners = self.owners.last().map(|owner| owner.slot);
        let last = owners.into_iter().chain(self.stores.iter().copied()).max();
        last.map_or(0, |slot| slot.index() + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::{Extension, Metadata, Owner, Pool, Served, Table, Traits};
    use crate::affinity::Affinity;
    use crate::family::Scheme;
    use crate::handover::Handover;
    use crate::id::{Device, Family, OwnerId, Role, Slot};
    use crate::key;
    use crate::policy::Scoring;
    use crate::queue::{Class, Profile, Thresholds};
    use crate::tracker::Tracking;

    fn table() -> Table {
        Table {
            epoch: 3,
            version: 9,
            pools: vec![
                Pool {
                    name: "small".into(),
                    models: vec!["llama-8b".into()],
                    ..Pool::default()
                },
                Pool {
                    name: "large".into(),
                    models: vec!["llama-70b".into()],
                    lora_adapters: vec!["sql".into()],
                    owners: vec![Owner {
                        slot: Slot(5),
                        id: OwnerId {
                            worker: 1 << 60,
                            rank: 1,
                        },
                        role: Role::Aggregated,
                        endpoint: "[::1]:8000".into(),
                        accepting: true,
                        traits: Traits {
                            device: Device::Cpu,
                            prefill_rate: 9_000,
                            prefill_ns_per_token: 80_000,
                            since_ms: u64::MAX,
                        },
                        metadata: Metadata {
                            taints: vec!["spot".into()],
                            labels: [("zone".into(), "a".into())].into(),
                            max_requests: 7,
                            ..Metadata::default()
                        },
                    }],
                    trusts_hints: true,
                    trusted_sources: vec!["10.0.0.0/8".parse().unwrap()],
                    affinity: Some(Affinity {
                        ttl_s: 60,
                        slack: Some(2.0),
                        headers: vec!["x-chat".into()],
                    }),
                    device_ratio: 8,
                    slow_start_ms: 5_000,
                    ..Pool::default()
                },
            ],
            ..Table::default()
        }
    }

    #[test]
    fn a_table_survives_encoding_and_refuses_other_versions() {
        let table = table();
        let mut bytes = table.encode();
        assert_eq!(Table::decode(&bytes), Some(table));
        bytes[0] += 1;
        assert_eq!(Table::decode(&bytes), None);
        assert_eq!(Table::decode(&[]), None);
    }

    #[test]
    fn tables_of_this_release_and_the_one_before_are_read_by_each_other() {
        let mut table = table();
        table.pools[1].policy.tracking.prefill_tokens = false;
        table.pools[1].policy.shared_cache_multiplier = 0.3;
        table.pools[1].stores = vec![Slot(7)];
        table.pools[0].overload.prefill_tokens = Some(9);
        table.pools[1].queue = Some(Profile::single(Class::new("default")));
        table.pools[1].chunks = true;
        table.pools[1].handover = Handover::Nvext;
        table.pools[1].families = vec![Scheme {
            family: Family::LmCache,
            block_size: 256,
            hash_seed: "7".into(),
        }];
        table.pools[1].policy.scoring = Scoring::PredictedDelay;
        table.pools[1].policy.delay.waiting = 0.5;
        table.pools[1].policy.overlap_score_credit_decay = 0.1;
        let bytes = table.encode();
        assert_eq!(Table::decode(&bytes).as_ref(), Some(&table));
        // Earlier releases read as much as they know and wrote no more.
        let without = key::decode::<(Table, Extension)>(&bytes).unwrap();
        let mut expected = Table {
            pools: table.pools.clone(),
            ..table.clone()
        };
        expected.pools[0].overload = Thresholds::default();
        expected.pools[1].queue = None;
        let written = key::encode(&without);
        assert_eq!(Table::decode(&written), Some(expected));
        let earlier = key::decode::<Table>(&bytes).unwrap();
        assert_eq!(earlier.pools[1].owners[0].endpoint, "[::1]:8000");
        assert_eq!(earlier.pools[1].policy.tracking, Tracking::default());
        assert_eq!(Table::decode(&key::encode(&table)), Some(earlier));
    }

    #[test]
    fn a_model_selects_its_pool_and_an_adapter_is_named() {
        let table = table();
        let served = |m| table.serve(None, m).unwrap();
        assert_eq!(served(Some("llama-70b")).pool, 1);
        assert_eq!(
            served(Some("sql")),
            Served {
                pool: 1,
                lora: Some("sql"),
                known: true
            }
        );
        assert_eq!(
            served(Some("?")),
            Served {
                pool: 0,
                lora: None,
                known: false
            }
        );
        assert_eq!(served(None).pool, 0);
        assert_eq!(Table::default().serve(None, None), None);
    }

    #[test]
    fn a_pool_that_is_named_comes_before_the_one_of_the_model() {
        let mut table = table();
        let served = |table: &Table, pool, model| {
            let served = table.serve(Some(pool), model).unwrap();
            (served.pool, served.lora.is_some(), served.known)
        };
        assert_eq!(served(&table, "small", Some("llama-8b")), (0, false, true));
        assert_eq!(served(&table, "small", Some("sql")), (0, false, false));
        assert_eq!(served(&table, "large", Some("sql")), (1, true, true));
        assert_eq!(served(&table, "large", None), (1, false, false));
        assert_eq!(served(&table, "?", Some("sql")), (1, true, true));
        // One without models takes any.
        table.pools[1].models.clear();
        assert_eq!(served(&table, "large", Some("?")), (1, false, true));
    }

    #[test]
    fn an_owner_is_found_by_slot() {
        let table = table();
        assert_eq!(table.pools[1].owner(Slot(5)).unwrap().id.rank, 1);
        assert!(table.pools[1].owner(Slot(4)).is_none());
        assert_eq!(table.pools[1].slots(), 6);
        let pool = Pool {
            stores: vec![Slot(9)],
            ..table.pools[1].clone()
        };
        assert_eq!(pool.slots(), 10);
    }
}
