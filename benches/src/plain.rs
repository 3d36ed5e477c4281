//! The Envoy to compare ours with: the same bootstrap without our filter.

use serde_json::{Value, json};

/// Takes our filter, those that prepare requests for it, and its policy out of a bootstrap, and puts
/// another filter in their place.
///
/// # Panics
/// When the bootstrap isn't one that `kv-router envoy` prints.
pub fn change(bootstrap: &mut Value, filter: Option<&str>) {
    let manager =
        &mut bootstrap["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0];
    let filters = &mut manager["typed_config"]["http_filters"];
    let list = filters.as_array_mut().expect("HTTP filters");
    let all = list.len();
    list.retain(|filter| filter["name"] == "envoy.filters.http.router");
    assert!(list.len() == 1 && all > 1, "{all} HTTP filters");
    list.splice(
        0..0,
        filter.map(|file| {
            json!({
                "name": "noop",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.filters.http.wasm.v3.Wasm",
                    "config": {"name": "noop", "root_id": "noop", "vm_config": {
                        "vm_id": "noop",
                        "runtime": "envoy.wasm.runtime.v8",
                        "code": {"local": {"filename": file}},
                    }},
                },
            })
        }),
    );
    let clusters = bootstrap["static_resources"]["clusters"]
        .as_array_mut()
        .expect("clusters");
    for cluster in clusters {
        if cluster["load_balancing_policy"].is_object() {
            cluster["load_balancing_policy"] = json!({"policies": [{"typed_extension_config": {
                "name": "envoy.load_balancing_policies.round_robin",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.load_balancing_policies\
                        .round_robin.v3.RoundRobin",
                },
            }}]});
        }
    }
}
