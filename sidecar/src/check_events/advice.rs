//! What reasons mean, and what to do.

use super::Totals;
use crate::ingest::Rejection;
use crate::ingest::engine::Settings;
use crate::ingest::engine::inspect::{Seen, Trait};

/// What a reason means, in half a sentence.
pub(super) fn why(rejection: Rejection) -> &'static str {
    match rejection {
        Rejection::Malformed => "can't be read",
        Rejection::WrongTopic => "the envelope's topic is not kv-events",
        Rejection::ResidencyDomain => "residency of something other than a worker",
        Rejection::TooManyBlocks => "more blocks than an event may have",
        Rejection::UnknownWorker => "no such worker in the configuration",
        Rejection::UnknownRank => "no such data-parallel rank",
        Rejection::WorkerMismatch => "speaks for several workers",
        Rejection::DuplicateId => "was there before",
        Rejection::EventsOff => "the pool takes no events",
        Rejection::UnaskedSnapshot => "a part of a snapshot that nobody asked for",
        Rejection::OtherSource => "the worker's events are taken from another source",
        Rejection::TooManyStrangers => "too many workers that the configuration lacks",
        Rejection::BatchTooLarge => "more bytes than a message may have",
        Rejection::TooManyEvents => "more events than a message may have",
        Rejection::UnknownEvent => "an event of an unknown name",
        Rejection::Ignored => "says of itself that it is to be ignored",
        Rejection::NotLocal => "its blocks lie elsewhere than at the worker",
        Rejection::Ownership => "its blocks belong to something other than the worker",
        Rejection::UnknownMedium => "the medium's tier is not known",
        Rejection::AttentionKind | Rejection::AttentionGroup => {
            "a cache of a hybrid model that does not hold whole prefixes"
        }
        Rejection::UnknownAttentionKind => "an unknown kind of attention",
        Rejection::UnlearnedGroup => "a group whose kind of attention no store has named",
        Rejection::AttentionWindow => "a cache of a smaller attention window than another one",
        Rejection::AmbiguousSalt => "its parent's hash was used under two salts",
        Rejection::BlockSizeMismatch => "the block size is no multiple of kv_cache_block_size",
        Rejection::NoTokens => "no token ids, and no family for the medium",
        Rejection::TooFewTokens => "fewer token ids than its blocks have",
        Rejection::RepeatedHash => "a hash twice in one chain",
        Rejection::PartialBlock => "ends in a block that is not full",
        Rejection::UnknownObject => "names an object that is no page's, or another tenant's",
        Rejection::UnknownBlock => "moves a block whose store was not seen",
    }
}

/// What to do about what was seen.
pub(super) fn advice(seen: &Seen, settings: &Settings, totals: &Totals) -> Vec<String> {
    let mut advice = Vec::new();
    let has = |it| seen.traits.contains(&it);
    let sizes: Vec<String> = seen.block_sizes.keys().map(u32::to_string).collect();
    let smallest = seen.block_sizes.keys().find(|size| **size > 0);
    if totals.dropped(Rejection::BlockSizeMismatch) > 0 {
        advice.push(format!(
            "none of those blocks can match: the engine has blocks of {} tokens, so set \
             kv_cache_block_size: {}",
            sizes.join(", "),
            smallest.map_or("the engine's".into(), u32::to_string),
        ));
    } else if let Some(size) = smallest
        && *size > settings.block_size
    {
        let parts = size / settings.block_size.max(1);
        advice.push(format!(
            "each block of the engine becomes {parts} of kv_cache_block_size {}; {size} would do \
             with fewer",
            settings.block_size
        ));
    }
    if smallest.is_some_and(|size| *size < 8) {
        advice.push(
            "blocks of so few tokens make a large index: a page size of 16 or more is better"
                .into(),
        );
    }
    let unknown = seen
        .media
        .keys()
        .filter(|m| settings.media.tier(m).is_none());
    for medium in unknown {
        advice.push(format!(
            "say the tier of medium {medium}: media: {{{medium}: host}}, or disk, or external"
        ));
    }
    let without = |medium: &&String| {
        let name = if medium.is_empty() {
            "GPU"
        } else {
            medium.as_str()
        };
        !settings
            .families
            .iter()
            .any(|f| f.media.iter().any(|m| m == name))
    };
    let media: Vec<&str> = seen
        .named_only
        .iter()
        .filter(without)
        .map(String::as_str)
        .collect();
    if !media.is_empty() {
        advice.push(format!(
            "blocks on {} come without token ids: say what their hashes are, such as families: \
             [{{family: flex-kv, media: [{}]}}]",
            media.join(", "),
            media.join(", ")
        ));
    }
    if has(Trait::LoraNumber) {
        advice.push(
            "adapters are named by a number alone: prompts of adapters will match nothing".into(),
        );
    }
    if has(Trait::Keys) && settings.image_token.is_none() {
        advice.push(
            "there are multimodal objects: without image_token_id such prompts match nothing"
                .into(),
        );
    }
    if has(Trait::TrtLlm) {
        advice.push("reading takes these events away: the sidecar must be the only reader".into());
    }
    if let Some(sequences) = totals.sequences {
        if sequences.missing > 0 {
            advice
                .push("messages were lost: give the engine a replay endpoint, and name it".into());
        }
        if sequences.restarts > 0 {
            advice.push("the engine began anew while it was watched".into());
        }
    }
    let stores = seen
        .events
        .iter()
        .filter(|(name, _)| name.to_lowercase().contains("stored"));
    if totals.stored() == 0 && stores.map(|(_, events)| events).sum::<u64>() > 0 {
        advice.push("no block of this would be indexed".into());
    }
    advice
}
