//! Prompts to route, and what must be in the index for them.

use kv_core::event::StorageTier::{Device, HostPinned};
use kv_core::rng::Rng;

use crate::corpus::{Chain, Store};

/// Who holds what of a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Case {
    /// One owner holds all of it.
    Full,
    /// All owners hold 40 % (a system prompt), one of them on to 70 % on the device and 90 % with
    /// host memory.
    System,
    /// Every owner ends at another depth, evenly spread.
    Depths,
    /// Nobody holds anything.
    Miss,
}

impl Case {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Full, Self::System, Self::Depths, Self::Miss];

    /// For tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full hit, one owner",
            Self::System => "system prompt + tail",
            Self::Depths => "each owner another depth",
            Self::Miss => "miss",
        }
    }

    /// How many prompts to make: those that many owners hold fill the index fast.
    #[must_use]
    pub fn prompts(self) -> usize {
        match self {
            Self::Full | Self::Miss => 16,
            Self::System | Self::Depths => 2,
        }
    }
}

/// A prompt.
#[derive(Clone, Debug)]
pub struct Prompt {
    /// Its token ids.
    pub ids: Vec<u32>,
    /// Its blocks.
    pub chain: Chain,
    /// What the owners hold of it.
    pub stores: Vec<Store>,
    /// The worker that must be chosen when all are idle; `None` where any will do.
    pub worker: Option<u64>,
}

/// Random token ids of a vocabulary of 128 Ki.
#[must_use]
pub fn ids(count: usize, rng: &mut Rng) -> Vec<u32> {
    let id = |_| u32::try_from(rng.below(128 << 10)).expect("a small number");
    (0..count).map(id).collect()
}

impl Prompt {
    /// A prompt of `tokens` token ids for workers `1..=owners`.
    #[must_use]
    pub fn new(case: Case, tokens: usize, owners: usize, rng: &mut Rng) -> Self {
        let ids = ids(tokens, rng);
        let chain = Chain::of(&ids);
        let (all, last) = (chain.len(), owners as u64);
        let mut stores = Vec::new();
        let worker = match case {
            Case::Full => {
                let worker = 1 + rng.below(owners) as u64;
                stores.extend(chain.stores(worker, Device, 0, all));
                Some(worker)
            }
            Case::System => {
                let worker = 1 + rng.below(owners) as u64;
                for other in 1..=last {
                    stores.extend(chain.stores(other, Device, 0, all * 4 / 10));
                }
                stores.extend(chain.stores(worker, Device, all * 4 / 10, all * 7 / 10));
                stores.extend(chain.stores(worker, HostPinned, all * 7 / 10, all * 9 / 10));
                Some(worker)
            }
            Case::Depths => {
                for i in 1..=owners {
                    stores.extend(chain.stores(i as u64, Device, 0, (all * i / owners).max(1)));
                }
                (all >= 2 * owners).then_some(last)
            }
            Case::Miss => None,
        };
        Self {
            ids,
            chain,
            stores,
            worker,
        }
    }

    /// The body of a completion request.
    #[must_use]
    pub fn body(&self) -> Vec<u8> {
        self.body_with(r#""max_tokens":1"#)
    }

    /// The body of a request for a streamed completion of up to this many tokens.
    #[must_use]
    pub fn stream_body(&self, tokens: usize) -> Vec<u8> {
        self.body_with(&format!(r#""max_tokens":{tokens},"stream":true"#))
    }

    fn body_with(&self, rest: &str) -> Vec<u8> {
        let ids: Vec<String> = self.ids.iter().map(u32::to_string).collect();
        format!(r#"{{"model":"sim","prompt":[{}],{rest}}}"#, ids.join(",")).into_bytes()
    }
}
