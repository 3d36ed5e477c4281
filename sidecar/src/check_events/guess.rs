//! Who most likely sends such events. Engines don't say; their versions differ in small things.

use crate::ingest::engine::inspect::{HashForm, Seen, Trait};

/// The engine and what may sit beside it.
pub(super) fn engine(seen: &Seen, is_dynamo: bool) -> String {
    let has = |it| seen.traits.contains(&it);
    let is_signed = seen.hashes.contains(&HashForm::Signed);
    let has_medium = |names: &[&str]| seen.media.keys().any(|m| names.contains(&m.as_str()));
    let engine = if is_dynamo {
        "Dynamo 1.6.1 or what speaks like its workers"
    } else if has(Trait::TrtLlm) {
        "TensorRT-LLM, its polled endpoint"
    } else if has(Trait::Objects) {
        "a Mooncake store"
    } else if has(Trait::Post) {
        "an engine that posts to the sidecar"
    } else if has_medium(&["CPU_TIER1", "CPU_TIER2"]) {
        "Dynamo's KVBM consolidator, passing through, or SGLang of early 2026"
    } else if has(Trait::Maps) && has(Trait::Locality) {
        "vLLM, 0.31 or later"
    } else if has(Trait::Maps) && has(Trait::LoraField) && !is_signed {
        "vLLM, a version with events as maps, such as 0.33"
    } else if has(Trait::MapInList) {
        "SGLang, a version with events as lists"
    } else if has(Trait::LongLists) {
        "vLLM, a version with events as lists, such as 0.20"
    } else if has(Trait::Maps) && (is_signed || seen.events.contains_key("BlockStored")) {
        "SGLang, a version with events as maps, such as 0.5.23"
    } else if has(Trait::Maps) {
        "vLLM or SGLang, a version with events as maps"
    } else if has(Trait::Lists) {
        "vLLM or SGLang, a version with events as lists"
    } else {
        "not known"
    };
    let mut also = Vec::new();
    let mut named_only = |names: &[&str], who| {
        if seen.named_only.iter().any(|m| names.contains(&m.as_str())) {
            also.push(who);
        }
    };
    named_only(&["CPU", "SSD"], "FlexKV");
    named_only(&["CXL"], "LMCache");
    if seen.media.contains_key("cpu") {
        also.push("LMCache");
    }
    if has_medium(&["FS", "OBJ"]) {
        also.push("vLLM's tiered offloading");
    }
    if has_medium(&["CPU_PINNED"]) {
        also.push("HiCache");
    }
    if also.is_empty() {
        return engine.to_owned();
    }
    format!("{engine}; with {}", also.join(", "))
}
