//! Events as engines publish them themselves, translated into changes for the index.
//!
//! A [`Normaliser`] stands behind each stream. It takes the messages of vLLM and SGLang and of
//! whatever speaks like them, in any version, and the dictionaries of TensorRT-LLM. It decides what
//! is wanted (attention groups, media, locality), hashes the tokens as requests are hashed, and
//! keeps what an event alone does not say: salts of parents, kinds of groups, sizes of blocks.
//!
//! Invariants:
//! - the changes follow from the messages since the last reset alone, in order;
//! - an event that is dropped is one rejection and touches no other;
//! - an engine's block of k router blocks is k blocks, of which the last has the engine's name and
//!   the others names that follow from it.

mod attention;
mod cut;
mod event;
mod hash;
pub mod inspect;
mod keys;
mod levels;
pub mod media;
mod objects;
mod payload;
mod salt;
mod trtllm;
mod value;

use std::collections::{HashMap, HashSet};

use kv_core::event::{EventData, Removed, Stored, StoredBlock};
use kv_core::hash::Seed;
use kv_core::id::{DpRank, Family, Tier};

use super::batch::Change;
use super::{MAX_EVENT_BLOCKS, Rejection};
use crate::config::{FamilyUse, Pool};
use attention::Groups;
use cut::Cutter;
use event::{Event, Lora, Place};
use levels::Levels;
use media::Media;
use objects::Objects;
use salt::Salts;

pub use keys::{mm_hash, pad};
pub use payload::{MAX_BATCH_BYTES, MAX_BATCH_EVENTS};

/// Ranks of a worker, at most; as many as a configuration may give one.
const MAX_RANKS: DpRank = 1024;

/// How a message is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Encoding {
    /// MessagePack.
    MsgPack,
    /// JSON.
    Json,
}

/// What a pool expects of its engines' events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Tokens to a block of the index.
    pub block_size: u32,
    /// Tiers by the names of media.
    pub media: Media,
    /// Hash families of events without token ids.
    pub families: Vec<FamilyUse>,
    /// The model's placeholder token of images, where requests come with placeholders replaced by
    /// [`pad`].
    pub image_token: Option<u32>,
}

impl Settings {
    /// What a configured pool expects.
    #[must_use]
    pub fn of(pool: &Pool) -> Self {
        Self {
            block_size: pool.block_size,
            media: pool.media.clone(),
            families: pool.families.clone(),
            image_token: pool.image_token,
        }
    }

    fn family(&self, medium: Option<&str>) -> Option<&FamilyUse> {
        let name = media::canonical(medium.unwrap_or_default());
        let name = if name.is_empty() { "GPU" } else { &name };
        let of_medium = |used: &&FamilyUse| used.media.iter().any(|m| m == name);
        self.families.iter().find(of_medium)
    }
}

/// What one message says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Normalised {
    /// Changes that are fit to apply, in order.
    pub changes: Vec<Change>,
    /// One to each event that was dropped, as a whole or in part.
    pub rejected: Vec<Rejection>,
}

/// Translates the messages of one stream.
#[derive(Debug)]
pub struct Normaliser {
    settings: Settings,
    default_rank: DpRank,
    groups: Groups,
    salts: Salts,
    levels: Levels,
    objects: Objects,
    /// Most router blocks to an engine block, where more than one.
    cuts: HashMap<(DpRank, Tier), u64>,
    /// Media of a family about which there have been events with token ids.
    both: HashSet<(DpRank, String)>,
}

impl Normaliser {
    /// For a stream whose messages are of `default_rank` where they name none.
    #[must_use]
    pub fn new(settings: Settings, default_rank: DpRank) -> Self {
        Self {
            settings,
            default_rank,
            groups: Groups::default(),
            salts: Salts::default(),
            levels: Levels::default(),
            objects: Objects::default(),
            cuts: HashMap::new(),
            both: HashSet::new(),
        }
    }

    /// Forgets what earlier messages said: the engine has started anew.
    pub fn reset(&mut self) {
        let settings = self.settings.clone();
        *self = Self::new(settings, self.default_rank);
    }

    /// Messages are lost.
    pub fn lose(&mut self) {
        self.objects.lose();
    }

    /// Translates a message.
    pub fn batch(&mut self, payload: &[u8], encoding: Encoding) -> Normalised {
        let mut out = Normalised::default();
        let mut events = Vec::new();
        // The rank may stand after the events.
        let settings = &self.settings;
        let family = |medium: Option<&str>| Some(settings.family(medium)?.family);
        let head = payload::read(payload, encoding, &mut |event| {
            events.push(event.and_then(|event| event::read(event, family)));
        });
        let rank = head.rank.unwrap_or(self.default_rank);
        if self.objects.was_lost() {
            out.push(
                rank,
                Some(Tier::External),
                Family::Dynamo,
                EventData::Cleared,
            );
        }
        for event in events {
            let outcome = event.and_then(|event| self.event(rank, event, &mut out));
            if let Err(rejection) = outcome {
                out.rejected.push(rejection);
            }
        }
        out
    }

    fn event(&mut self, rank: DpRank, event: Event, out: &mut Normalised) -> Result<(), Rejection> {
        let rank = match &event {
            Event::TrtLlm(event) => event.rank.unwrap_or(rank),
            Event::Stored(_) | Event::Removed(_) | Event::Cleared { .. } | Event::Object(_) => rank,
        };
        if rank >= MAX_RANKS {
            return Err(Rejection::UnknownRank);
        }
        match event {
            Event::Stored(stored) => self.stored(rank, stored, out),
            Event::Removed(removed) => self.removed(rank, &removed, out),
            Event::Cleared { medium, ownership } => {
                self.cleared(rank, medium.as_deref(), ownership.as_deref(), out)
            }
            Event::TrtLlm(event) => self.trtllm(rank, event, out),
            Event::Object(object) => {
                let change = self.objects.change(&object, &self.settings.families)?;
                if let Some((family, data)) = change {
                    out.push(rank, Some(Tier::External), family, data);
                }
                Ok(())
            }
        }
    }

    fn stored(
        &mut self,
        rank: DpRank,
        mut stored: event::Stored,
        out: &mut Normalised,
    ) -> Result<(), Rejection> {
        self.groups.learn(rank, &stored.place);
        let tier = self.tier(rank, &stored.place)?;
        if stored.hashes.is_empty() {
            return Ok(());
        }
        if stored.tokens.ids.is_empty() {
            return self.named_only(rank, tier, &stored, out);
        }
        let own = u64::from(self.settings.block_size.max(1));
        let size = match stored.block_size {
            Some(size) => u64::from(size),
            None => (stored.tokens.ids.len() / stored.hashes.len()) as u64,
        };
        if size == 0 || size % own != 0 {
            return Err(Rejection::BlockSizeMismatch);
        }
        let cut = size / own;
        if stored.hashes.len() as u64 * cut > MAX_EVENT_BLOCKS as u64 {
            return Err(Rejection::TooManyBlocks);
        }
        let salt = stored.salt.take();
        let salt = self
            .salts
            .store(rank, tier, stored.parent, &stored.hashes, salt.as_deref())?;
        let cutter = Cutter {
            own: own as usize,
            cut: cut as usize,
            eagle: stored.tokens.eagle,
            seed: seed(&stored.lora, salt),
            image_token: self.settings.image_token,
        };
        let (blocks, flaw) = cutter.chain(&stored);
        if !blocks.is_empty() {
            self.note_cut(rank, tier, cut);
            let medium = stored.place.medium.as_deref();
            if self.settings.family(medium).is_some() {
                let medium = media::canonical(medium.unwrap_or_default());
                self.both.insert((rank, medium));
            }
            let data = Stored {
                parent_hash: stored.parent,
                start_position: None,
                blocks,
            };
            out.push(rank, Some(tier), Family::Dynamo, EventData::Stored(data));
        }
        flaw.map_or(Ok(()), Err)
    }

    /// Blocks that are known by their names alone, which are hashes of a family.
    fn named_only(
        &self,
        rank: DpRank,
        tier: Tier,
        stored: &event::Stored,
        out: &mut Normalised,
    ) -> Result<(), Rejection> {
        let used = self.settings.family(stored.place.medium.as_deref());
        let used = used.ok_or(Rejection::NoTokens)?;
        if stored
            .block_size
            .is_some_and(|size| size != used.block_size)
        {
            return Err(Rejection::BlockSizeMismatch);
        }
        let data = named(stored.parent, &stored.hashes);
        out.push(rank, Some(tier), used.family, EventData::Stored(data));
        Ok(())
    }

    fn removed(
        &mut self,
        rank: DpRank,
        removed: &event::Removed,
        out: &mut Normalised,
    ) -> Result<(), Rejection> {
        let tier = self.tier(rank, &removed.place)?;
        if removed.hashes.is_empty() {
            return Ok(());
        }
        let medium = removed.place.medium.as_deref();
        let mut has_tokens = true;
        if let Some(used) = self.settings.family(medium) {
            let data = Removed {
                block_hashes: removed.hashes.clone(),
            };
            out.push(rank, Some(tier), used.family, EventData::Removed(data));
            let medium = media::canonical(medium.unwrap_or_default());
            has_tokens = self.both.contains(&(rank, medium));
        }
        if has_tokens {
            self.salts.remove(rank, tier, &removed.hashes);
            self.drop_blocks(rank, tier, &removed.hashes, out);
        }
        Ok(())
    }

    /// Removes blocks with those that they were cut into.
    fn drop_blocks(&self, rank: DpRank, tier: Tier, hashes: &[u64], out: &mut Normalised) {
        let cut = self.cuts.get(&(rank, tier)).copied().unwrap_or(1);
        let names = hashes.iter().flat_map(|hash| hash::names(*hash, cut));
        let data = Removed {
            block_hashes: names.collect(),
        };
        out.push(rank, Some(tier), Family::Dynamo, EventData::Removed(data));
    }

    fn note_cut(&mut self, rank: DpRank, tier: Tier, cut: u64) {
        if cut > 1 {
            let most = self.cuts.entry((rank, tier)).or_insert(1);
            *most = cut.max(*most);
        }
    }

    fn cleared(
        &mut self,
        rank: DpRank,
        medium: Option<&str>,
        ownership: Option<&str>,
        out: &mut Normalised,
    ) -> Result<(), Rejection> {
        let of_medium = |name: Option<&str>| {
            let name = name.filter(|name| !name.is_empty());
            name.and_then(|name| self.settings.media.tier(name))
        };
        let tier = match (medium, of_medium(medium), ownership) {
            (Some(medium), None, _) if !medium.is_empty() => {
                return Err(Rejection::UnknownMedium);
            }
            (_, Some(tier), None) => Some(tier),
            (_, tier, Some(_)) => match of_medium(ownership) {
                Some(tier) => Some(tier),
                None => {
                    attention::own(ownership)?;
                    tier
                }
            },
            (_, None, None) => None,
        };
        self.salts.clear(rank, tier);
        if tier.is_none() {
            self.levels.clear(rank);
        }
        out.push(rank, tier, Family::Dynamo, EventData::Cleared);
        Ok(())
    }

    /// The tier that an event is about, if it is wanted at all.
    fn tier(&self, rank: DpRank, place: &Place) -> Result<Tier, Rejection> {
        attention::own(place.ownership.as_deref())?;
        attention::local(place.locality.as_deref())?;
        let medium = place.medium.as_deref().unwrap_or_default();
        let tier = self
            .settings
            .media
            .tier(medium)
            .ok_or(Rejection::UnknownMedium)?;
        // What lies on disk or in a store is kept for its whole prefix whatever reads it.
        if tier <= Tier::Host {
            self.groups.wanted(rank, place)?;
        }
        Ok(tier)
    }
}

impl Normalised {
    fn push(&mut self, rank: DpRank, tier: Option<Tier>, family: Family, data: EventData) {
        self.changes.push(Change {
            rank,
            tier,
            family,
            data,
        });
    }
}

/// Blocks that are named by the hashes that they are found by.
fn named(parent_hash: Option<u64>, hashes: &[u64]) -> Stored {
    let block = |hash: &u64| StoredBlock {
        block_hash: *hash,
        tokens_hash: *hash,
        mm_extra_info: None,
    };
    Stored {
        parent_hash,
        start_position: None,
        blocks: hashes.iter().map(block).collect(),
    }
}

/// Seed of a store's block hashes: its adapter's and its salt's.
///
/// An adapter without a name can't be the one that a request names; its blocks get a seed that no
/// request has, rather than pass for the base model's.
fn seed(lora: &Lora, salt: u64) -> Seed {
    let base = match lora {
        Lora::None => Seed::default(),
        Lora::Named(name) => Seed::new(name, ""),
        Lora::Numbered(number) => Seed::new(&format!("\0lora_id {number}"), ""),
    };
    Seed(base.0.wrapping_add(salt))
}

#[cfg(test)]
mod tests;
