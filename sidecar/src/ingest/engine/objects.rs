//! Pages of SGLang's HiCache in a Mooncake store, which tells of them object by object.
//!
//! Each rank keeps a page's keys and values in objects of its own. Their names are
//! `[TAG_]HASH_R_k` and `[TAG_]HASH_R_v` for tensor-parallel rank R, with pipeline ranks
//! `HASH_R_P_k`, and of MLA models, whose ranks share a page, `HASH__k` or `HASH_P_k`. HASH is the
//! page's SHA-256 in hexadecimal, the digest that the family `hi-cache` computes. A page is there
//! while all its objects are.

use std::collections::HashMap;

use kv_core::event::{EventData, Removed};
use kv_core::id::Family;

use super::named;
use super::value::Value;
use crate::config::FamilyUse;
use crate::ingest::Rejection;

/// Most pages of which some object is there. Beyond it everything is forgotten.
const MAX_PAGES: usize = 1 << 20;
/// Most objects of a page: one bit to each.
const MAX_OBJECTS: usize = 64;
/// Hexadecimal digits of a page's hash.
const DIGITS: usize = 64;
/// The tenant of objects that name none.
const TENANT: &str = "default";

/// What happened to an object of a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Object {
    /// The page's hash, as the family reduces it.
    page: u64,
    /// The end of its name, which tells it from the page's others.
    part: String,
    is_stored: bool,
}

/// What follows for the pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// The page is there.
    Whole(u64),
    /// The page is not there.
    Gone(u64),
    /// Nothing.
    Same,
    /// There were too many: none is there any more.
    Forgotten,
}

impl Object {
    /// Reads an event that names an object; `None` if it doesn't.
    ///
    /// # Errors
    /// When it is no page's object, or another tenant's.
    pub(super) fn read(event: &Value<'_>) -> Option<Result<Self, Rejection>> {
        let kind = event.get("event_type")?.text()?;
        let name = event.get("object_key")?.text()?;
        let tenant = event.get("tenant_id").and_then(Value::text);
        let tenant = tenant.filter(|tenant| !tenant.is_empty());
        let is_stored = match kind {
            "stored" => true,
            "removed" => false,
            _ => return Some(Err(Rejection::UnknownEvent)),
        };
        let object = page_of(name).filter(|_| tenant.is_none_or(|tenant| tenant == TENANT));
        let object = object.map(|(page, part)| Self {
            page,
            part: part.to_owned(),
            is_stored,
        });
        Some(object.ok_or(Rejection::UnknownObject))
    }
}

/// The page that an object's name begins with, and the rest of the name.
fn page_of(name: &str) -> Option<(u64, &str)> {
    let mut fields = name.rsplit('_');
    let kind = fields.next().filter(|kind| matches!(*kind, "k" | "v"))?;
    let mut rest = 1 + kind.len();
    // A rank, or nothing in its place, and perhaps another rank.
    for _ in 0..2 {
        let rank = fields.next()?;
        rest += 1 + rank.len();
        if !rank.bytes().all(|digit| digit.is_ascii_digit()) {
            return None;
        }
        let hash = fields.clone().next()?;
        let is_hash = hash.len() == DIGITS && hash.bytes().all(|b| b.is_ascii_hexdigit());
        if let Some(page) = is_hash.then(|| digest(hash)).flatten() {
            return Some((page, name.get(name.len() - rest..)?));
        }
    }
    None
}

fn digest(hexadecimal: &str) -> Option<u64> {
    let byte = |at| u8::from_str_radix(hexadecimal.get(at..at + 2)?, 16).ok();
    let digest: Option<Vec<u8>> = (0..hexadecimal.len()).step_by(2).map(byte).collect();
    digest.map(|digest| Family::HiCache.reduce(&digest))
}

/// The objects that are there.
#[derive(Debug, Default)]
pub(super) struct Objects {
    /// A bit to each part that is there, by page.
    pages: HashMap<u64, u64>,
    /// Parts by the number of their bit.
    parts: Vec<String>,
    is_lost: bool,
}

impl Objects {
    /// Messages are lost: what was there may be gone.
    pub(super) fn lose(&mut self) {
        self.is_lost |= !self.parts.is_empty();
        self.pages.clear();
    }

    /// Whether messages have been lost since this was asked last.
    pub(super) fn was_lost(&mut self) -> bool {
        std::mem::take(&mut self.is_lost)
    }

    /// What follows for the index from what happened to an object.
    ///
    /// # Errors
    /// When the pool has no use for it.
    pub(super) fn change(
        &mut self,
        object: &Object,
        families: &[FamilyUse],
    ) -> Result<Option<(Family, EventData)>, Rejection> {
        let used = families.iter().find(|used| used.family == Family::HiCache);
        let used = used.ok_or(Rejection::NoTokens)?;
        Ok(match self.take(object, used.objects)? {
            Outcome::Same => None,
            Outcome::Whole(page) => Some((used.family, EventData::Stored(named(None, &[page])))),
            Outcome::Gone(page) => {
                let block_hashes = vec![page];
                Some((used.family, EventData::Removed(Removed { block_hashes })))
            }
            Outcome::Forgotten => Some((Family::Dynamo, EventData::Cleared)),
        })
    }

    /// Takes what happened to an object of a page that has `objects` of them.
    fn take(&mut self, object: &Object, objects: u32) -> Result<Outcome, Rejection> {
        let bit = 1 << self.part(&object.part)?;
        let page = object.page;
        if !object.is_stored {
            let Some(there) = self.pages.get_mut(&page) else {
                // It may be known from a time of which nothing is remembered here.
                return Ok(Outcome::Gone(page));
            };
            let was_whole = there.count_ones() >= objects;
            *there &= !bit;
            if *there == 0 {
                self.pages.remove(&page);
            }
            return Ok(if was_whole {
                Outcome::Gone(page)
            } else {
                Outcome::Same
            });
        }
        if self.pages.len() >= MAX_PAGES && !self.pages.contains_key(&page) {
            self.pages.clear();
            return Ok(Outcome::Forgotten);
        }
        let there = self.pages.entry(page).or_default();
        *there |= bit;
        Ok(if there.count_ones() >= objects {
            Outcome::Whole(page)
        } else {
            Outcome::Same
        })
    }

    fn part(&mut self, name: &str) -> Result<usize, Rejection> {
        let known = self.parts.iter().position(|part| part == name);
        if known.is_none() && self.parts.len() >= MAX_OBJECTS {
            return Err(Rejection::UnknownObject);
        }
        Ok(known.unwrap_or_else(|| {
            self.parts.push(name.to_owned());
            self.parts.len() - 1
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens 1 to 4 in a page of four, as SGLang hashes them.
    const HASH: &str = "cf97adeedb59e05bfd73a2b4c2a8885708c4f4f70c84c64b27120e72ab733b72";
    const PAGE: u64 = 0xcf97_adee_db59_e05b;

    fn object(part: &str, is_stored: bool) -> Object {
        Object {
            page: PAGE,
            part: part.into(),
            is_stored,
        }
    }

    #[test]
    fn names_are_those_of_every_layout() {
        for part in ["_0_k", "_0_v", "_12_3_k", "__k", "_7_k"] {
            assert_eq!(page_of(&format!("{HASH}{part}")), Some((PAGE, part)));
            assert_eq!(page_of(&format!("my_tag_{HASH}{part}")), Some((PAGE, part)));
        }
        for name in ["", "k", "_k", "__k", HASH, "abc_0_k"] {
            assert_eq!(page_of(name), None, "{name}");
        }
        for part in ["_k", "_0_w", "_0_1_2_k", "_x_k", "_0_k_"] {
            assert_eq!(page_of(&format!("{HASH}{part}")), None, "{part}");
        }
    }

    #[test]
    fn a_page_is_there_while_all_its_objects_are() {
        let mut objects = Objects::default();
        let mut take = |part, is_stored| objects.take(&object(part, is_stored), 2).unwrap();
        assert_eq!(take("_0_k", true), Outcome::Same);
        assert_eq!(take("_0_k", true), Outcome::Same);
        assert_eq!(take("_0_v", true), Outcome::Whole(PAGE));
        assert_eq!(take("_0_k", false), Outcome::Gone(PAGE));
        assert_eq!(take("_0_v", false), Outcome::Same);
        // Of an object that was stored before anything was heard.
        assert_eq!(take("_0_v", false), Outcome::Gone(PAGE));
    }

    #[test]
    fn what_was_lost_is_forgotten_once() {
        let mut objects = Objects::default();
        objects.lose();
        assert!(!objects.was_lost());
        objects.take(&object("__k", true), 1).unwrap();
        objects.lose();
        assert!(objects.was_lost());
        assert!(!objects.was_lost());
    }

    #[test]
    fn pages_have_no_more_objects_than_can_be() {
        let mut objects = Objects::default();
        for rank in 0..MAX_OBJECTS {
            objects
                .take(&object(&format!("_{rank}_k"), true), 64)
                .unwrap();
        }
        let one_more = objects.take(&object("_64_k", true), 64);
        assert_eq!(one_more, Err(Rejection::UnknownObject));
    }
}
