//! What messages look like, for people who want to know what an engine sends.

use std::collections::{BTreeMap, BTreeSet};

use super::event::{self, Event, Lora};
use super::payload::{self, Outer};
use super::value::Value;
use super::{Encoding, media};
use crate::ingest::Rejection;

/// Most distinct values that are listed of anything; more are left out.
const MOST: usize = 64;

/// What some messages of one stream have in common, as they are, before anything is decided.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Layouts of messages and events, in words.
    pub shapes: BTreeSet<String>,
    /// Events by name; those without one under `?`.
    pub events: BTreeMap<String, u64>,
    /// Tokens to a block, with events.
    pub block_sizes: BTreeMap<u32, u64>,
    /// Media as they are written, with events; an empty name is none.
    pub media: BTreeMap<String, u64>,
    /// Groups and their kinds.
    pub groups: BTreeMap<u32, Option<String>>,
    /// Data-parallel ranks that messages or events name.
    pub ranks: BTreeSet<u32>,
    /// How hashes are written.
    pub hashes: BTreeSet<HashForm>,
    /// Media of stores without token ids.
    pub named_only: BTreeSet<String>,
    /// Further traits.
    pub traits: BTreeSet<Trait>,
}

/// How a hash is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum HashForm {
    /// An integer that is not negative.
    Unsigned,
    /// A negative integer.
    Signed,
    /// Bytes, this many.
    Bytes(usize),
    /// Text.
    Text,
}

/// What some event has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Trait {
    /// Events as lists.
    Lists,
    /// Lists as long as only vLLM's are.
    LongLists,
    /// Lists with a map in place of the adapter's name.
    MapInList,
    /// Events as maps.
    Maps,
    /// Maps that name an adapter, be it none.
    LoraField,
    /// Fields that vLLM has since 0.31.
    Locality,
    /// Dictionaries of TensorRT-LLM.
    TrtLlm,
    /// Objects of a store.
    Objects,
    /// The body of a post to the sidecar.
    Post,
    /// Adapters.
    Lora,
    /// Adapters by number alone.
    LoraNumber,
    /// Salts.
    Salt,
    /// Multimodal objects or other keys.
    Keys,
    /// Token ids in pairs.
    Eagle,
}

/// Looks at a message.
pub fn message(bytes: &[u8], encoding: Encoding, seen: &mut Seen) {
    let mut forms = BTreeSet::new();
    let head = payload::read(bytes, encoding, &mut |event| {
        forms.insert(match event {
            Ok(value) => seen.event(value),
            Err(_) => "",
        });
    });
    if let Some(rank) = head.rank {
        bounded(&mut seen.ranks, rank);
    }
    let outer = match head.outer {
        Outer::Unknown => "unknown".to_owned(),
        Outer::List(length) => format!("a list of {length}"),
        Outer::Map => "a map".to_owned(),
        Outer::Bare => "bare events".to_owned(),
    };
    forms.remove("");
    let encoding = match encoding {
        Encoding::MsgPack => "MessagePack",
        Encoding::Json => "JSON",
    };
    let forms: Vec<&str> = forms.into_iter().collect();
    let events = match &forms[..] {
        [] => String::new(),
        forms => format!(", events as {}", forms.join(" and ")),
    };
    bounded(&mut seen.shapes, format!("{encoding}, {outer}{events}"));
    if head.is_post {
        seen.traits.insert(Trait::Post);
    }
}

fn bounded<T: Ord>(set: &mut BTreeSet<T>, it: T) {
    if set.len() < MOST {
        set.insert(it);
    }
}

fn count<K: Ord>(map: &mut BTreeMap<K, u64>, key: K) {
    if map.len() < MOST || map.contains_key(&key) {
        *map.entry(key).or_default() += 1;
    }
}

impl Seen {
    /// Looks at an event and says what form it has.
    fn event(&mut self, value: &Value<'_>) -> &'static str {
        let (form, name) = match value {
            Value::List(list) => {
                self.traits.insert(Trait::Lists);
                if list.len() > 8 {
                    self.traits.insert(Trait::LongLists);
                }
                if matches!(list.get(7), Some(Value::Map(_))) {
                    self.traits.insert(Trait::MapInList);
                }
                self.hashes_of(list.get(1));
                ("lists", list.first().and_then(Value::text))
            }
            Value::Map(map) if value.get("data").is_some() => {
                self.traits.insert(Trait::TrtLlm);
                let data = value.get("data");
                let name = data.and_then(|data| data.get("type"));
                let is_dictionary = map.iter().any(|(key, _)| key == "event_id");
                let form = if is_dictionary {
                    "TensorRT-LLM's dictionaries"
                } else {
                    "maps"
                };
                (form, name.and_then(Value::text))
            }
            Value::Map(map) => {
                self.traits.insert(Trait::Maps);
                for (key, _) in map {
                    match key.as_ref() {
                        "lora_name" => self.traits.insert(Trait::LoraField),
                        "locality" | "ownership" | "lookahead_token_ids" => {
                            self.traits.insert(Trait::Locality)
                        }
                        _ => false,
                    };
                }
                self.hashes_of(value.get("block_hashes"));
                let name = value.get("type").or_else(|| value.get("event_type"));
                ("maps", name.and_then(Value::text))
            }
            _ => ("values", None),
        };
        let name: String = name.unwrap_or("?").chars().take(64).collect();
        count(&mut self.events, name);
        match event::read(value, |_| None) {
            Ok(Event::Stored(stored)) => self.stored(&stored),
            Ok(Event::Removed(removed)) => self.place(&removed.place),
            Ok(Event::TrtLlm(event)) => {
                self.ranks.extend(event.rank);
                if let super::trtllm::Data::Stored(stored) = &event.data {
                    let longest = stored.blocks.iter().map(|b| b.tokens.len()).max();
                    let longest = longest.and_then(|n| u32::try_from(n).ok());
                    if let Some(size) = longest.filter(|size| *size > 0) {
                        count(&mut self.block_sizes, size);
                    }
                    self.adapter(&stored.lora, stored.salt.is_some());
                    if stored.blocks.iter().any(|b| !b.keys.is_empty()) {
                        self.traits.insert(Trait::Keys);
                    }
                }
            }
            Ok(Event::Object(_)) => {
                self.traits.insert(Trait::Objects);
            }
            Ok(Event::Cleared { .. }) | Err(_) => {}
        }
        form
    }

    fn stored(&mut self, stored: &event::Stored) {
        self.place(&stored.place);
        if let Some(size) = stored.block_size {
            count(&mut self.block_sizes, size);
        }
        if stored.tokens.ids.is_empty() && !stored.hashes.is_empty() {
            let medium = stored.place.medium.as_deref().unwrap_or_default();
            let medium = media::canonical(medium).chars().take(64).collect();
            bounded(&mut self.named_only, medium);
        }
        if stored.tokens.eagle {
            self.traits.insert(Trait::Eagle);
        }
        if stored.keys.iter().any(|keys| !keys.is_empty()) {
            self.traits.insert(Trait::Keys);
        }
        self.adapter(&stored.lora, stored.salt.is_some());
    }

    fn adapter(&mut self, lora: &Lora, is_salted: bool) {
        match lora {
            Lora::None => {}
            Lora::Named(_) => {
                self.traits.insert(Trait::Lora);
            }
            Lora::Numbered(_) => {
                self.traits.insert(Trait::LoraNumber);
            }
        }
        if is_salted {
            self.traits.insert(Trait::Salt);
        }
    }

    fn place(&mut self, place: &event::Place) {
        let medium = place.medium.as_deref().unwrap_or_default();
        count(&mut self.media, medium.chars().take(64).collect());
        if let Some(group) = place.group
            && (self.groups.len() < MOST || self.groups.contains_key(&group))
        {
            let kind = self.groups.entry(group).or_default();
            let named = place
                .kind
                .as_ref()
                .map(|kind| kind.chars().take(64).collect());
            *kind = named.or(kind.take());
        }
    }

    fn hashes_of(&mut self, list: Option<&Value<'_>>) {
        for hash in list.and_then(Value::list).unwrap_or_default() {
            let form = match hash {
                Value::Int(int) if *int < 0 => HashForm::Signed,
                Value::Int(_) => HashForm::Unsigned,
                Value::Bytes(bytes) => HashForm::Bytes(bytes.len()),
                Value::Str(_) => HashForm::Text,
                _ => continue,
            };
            bounded(&mut self.hashes, form);
        }
    }
}

/// Whether a rejection says that a message is not understood, rather than not wanted.
#[must_use]
pub fn is_riddle(rejection: Rejection) -> bool {
    matches!(
        rejection,
        Rejection::Malformed
            | Rejection::WrongTopic
            | Rejection::BatchTooLarge
            | Rejection::TooManyEvents
            | Rejection::TooManyBlocks
            | Rejection::UnknownEvent
            | Rejection::ResidencyDomain
    )
}
