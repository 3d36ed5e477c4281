//! Defaults that are others under the key `compat`.

use serde_json::Value;

/// Keys of pools and what they are with `compat: dynamo`, unless anything says otherwise.
pub(super) fn defaults() -> impl Iterator<Item = (&'static str, Value)> {
    [
        ("policy", Value::from("dynamo")),
        ("shared_cache_multiplier", Value::from(0.0)),
    ]
    .into_iter()
}

/// Puts the defaults into the pools of a document that says so.
pub(super) fn put(root: &mut Value) {
    if root.get("compat").and_then(Value::as_str) != Some("dynamo") {
        return;
    }
    let pools = root.get_mut("pools").and_then(Value::as_array_mut);
    for pool in pools.into_iter().flatten().filter_map(Value::as_object_mut) {
        for (key, value) in defaults() {
            pool.entry(key).or_insert(value);
        }
    }
}
