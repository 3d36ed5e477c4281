//! A complete bootstrap for the configuration.

use super::files::Files;
use super::{
    BODY_BUFFER_BYTES, CLUSTER_LIMIT, DESTINATION, FILTER, LABELS, PACKED, POOL, SIDECAR_CLUSTER,
    WASM_TYPE, cluster, label_regex, quoted,
};
use crate::config::{Config, Pool};

/// How long a stream may be silent; above the time a request may be held.
const STREAM_IDLE: &str = "300s";

/// Where Envoy has the workers' endpoints from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Discovery {
    /// The sidecar, over its socket.
    #[default]
    Grpc,
    /// Files that the sidecar writes; Envoy starts from them without one.
    Files,
}

/// YAML for `envoy -c`. The filter's configuration is in `files`.
#[must_use]
pub fn bootstrap(config: &Config, files: &Files, discovery: Discovery) -> String {
    let admin = address(&config.envoy_admin);
    let listen = address(&config.listen);
    let socket = std::path::absolute(&config.socket).unwrap_or_else(|_| config.socket.clone());
    let socket = quoted(&socket.to_string_lossy());
    let ecds = quoted(&files.filter().to_string_lossy());
    let routes: String = routes(&config.pools);
    let clusters: String = config
        .pools
        .iter()
        .map(|p| clusters(p, files, discovery))
        .collect();
    let ads = match discovery {
        Discovery::Grpc => ads(),
        Discovery::Files => String::new(),
    };
    let unpacking = unpacking();
    let tag = |label: &&str| {
        let regex = quoted(&label_regex(label));
        format!("  - {{tag_name: {label}, regex: {regex}}}\n")
    };
    let tags: String = LABELS.iter().map(tag).collect();
    let remote = if config.trusts_sources() {
        "          # Clients are known by their connections, not by what they say in a header.\n          \
         use_remote_address: true\n"
    } else {
        ""
    };
    format!(
        r#"# Printed by `kv-router envoy`.
node: {{id: kv-router, cluster: kv-router}}
admin:
  address: {admin}
stats_config:
  # Labels stand in the names of the filter's metrics.
  stats_tags:
{tags}  histogram_bucket_settings:
  - match: {{safe_regex: {{regex: ".*kv_router_.*_us"}}}}
    buckets: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 100000, 1000000]
{ads}static_resources:
  listeners:
  - name: kv_router
    address: {listen}
    # What a connection buffers without being held; held bodies have a limit of their own.
    per_connection_buffer_limit_bytes: 32768
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: kv_router
          stream_idle_timeout: {STREAM_IDLE}
{remote}          upgrade_configs: [{{upgrade_type: websocket}}]
          # WebSockets over HTTP/2 begin with a CONNECT.
          http2_protocol_options: {{allow_connect: true}}
          route_config:
            name: kv_router
            virtual_hosts:
            - name: pools
              domains: ["*"]
              routes:
{routes}          http_filters:
{unpacking}          - name: {FILTER}
            config_discovery:
              config_source: {{path_config_source: {{path: {ecds}}}, resource_api_version: V3}}
              type_urls: [{WASM_TYPE}]
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  clusters:
  - name: {SIDECAR_CLUSTER}
    type: STATIC
    connect_timeout: 1s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{http2_protocol_options: {{}}}}
    load_assignment:
      cluster_name: {SIDECAR_CLUSTER}
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{pipe: {{path: {socket}}}}}}}}}]}}]
{clusters}"#
    )
}

/// One stream for the endpoints of all pools, from the sidecar.
fn ads() -> String {
    format!(
        r#"dynamic_resources:
  ads_config:
    api_type: GRPC
    transport_api_version: V3
    grpc_services:
    - envoy_grpc:
        cluster_name: {SIDECAR_CLUSTER}
        # A sidecar that was restarted is asked again within a second.
        retry_policy: {{retry_back_off: {{base_interval: 0.1s, max_interval: 1s}}}}
"#
    )
}

/// What unpacks compressed bodies, and the most that a part of one may grow by. Brotli and Zstandard
/// have a bound of this size built in.
const PACKINGS: [(&str, &str); 3] = [
    ("gzip", "gzip.decompressor.v3.Gzip, max_inflate_ratio: 100"),
    ("brotli", "brotli.decompressor.v3.Brotli"),
    ("zstd", "zstd.decompressor.v3.Zstd"),
];

/// Filters that unpack the bodies of requests. Envoy passes on what it could unpack of a body that
/// is broken or a bomb; the header tells the filter after them to refuse it then.
fn unpacking() -> String {
    let one = |(name, library): (&str, &str)| {
        format!(
            r#"          - name: envoy.filters.http.decompressor.{name}
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.decompressor.v3.Decompressor
              decompressor_library:
                name: {name}
                typed_config: {{"@type": type.googleapis.com/envoy.extensions.compression.{library}}}
              request_direction_config:
                advertise_accept_encoding: false
                common_config: {{ignore_no_transform_header: true}}
              response_direction_config:
                common_config: {{enabled: {{default_value: false, runtime_key: kv_router.unpack_answers}}}}
"#
        )
    };
    format!(
        r#"          - name: envoy.filters.http.header_mutation
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.header_mutation.v3.HeaderMutation
              mutations:
                request_mutations:
                - remove: {PACKED}
                - append:
                    header: {{key: {PACKED}, value: "%REQ(content-encoding)%"}}
                    append_action: OVERWRITE_IF_EXISTS_OR_ADD
{}"#,
        PACKINGS.map(one).concat()
    )
}

fn address(address: &std::net::SocketAddr) -> String {
    let ip = quoted(&address.ip().to_string());
    let port = address.port();
    format!("{{socket_address: {{address: {ip}, port_value: {port}}}}}")
}

/// A pool's cluster comes in two kinds: engines speak HTTP/1.1, and gRPC needs HTTP/2.
const KINDS: [(&str, &str, &str); 2] = [
    ("_grpc", "http2_protocol_options", ", grpc: {}"),
    ("", "http_protocol_options", ""),
];

/// By the pool the filter named; what it named none for goes to the first pool.
fn routes(pools: &[Pool]) -> String {
    let by_name = pools.iter().map(|pool| {
        let name = quoted(&pool.name);
        let header = format!(", headers: [{{name: {POOL}, string_match: {{exact: {name}}}}}]");
        (pool, header)
    });
    let rest = pools.first().map(|pool| (pool, String::new()));
    let both = by_name.chain(rest).flat_map(|(pool, header)| {
        KINDS.map(|(suffix, _, matched)| route(pool, suffix, &format!("{matched}{header}")))
    });
    both.collect()
}

fn route(pool: &Pool, suffix: &str, matched: &str) -> String {
    let cluster = quoted(&format!("{}{suffix}", cluster(&pool.name)));
    format!(
        r#"              - match: {{prefix: "/"{matched}}}
                request_body_buffer_limit: {BODY_BUFFER_BYTES}
                request_headers_to_remove: [{PACKED}]
                route:
                  cluster: {cluster}
                  timeout: 0s
                  # Only what no engine has begun on is sent again.
                  retry_policy:
                    retry_on: connect-failure,refused-stream,reset-before-request
                    num_retries: 2
                    retry_host_predicate:
                    - name: envoy.retry_host_predicates.previous_hosts
                      typed_config: {{"@type": type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate}}
                    host_selection_retry_max_attempts: 5
"#
    )
}

fn clusters(pool: &Pool, files: &Files, discovery: Discovery) -> String {
    let eds = match discovery {
        // Without a sidecar Envoy starts with no endpoints after this time.
        Discovery::Grpc => "ads: {}, initial_fetch_timeout: 5s".to_owned(),
        Discovery::Files => {
            let file = quoted(&files.endpoints(&pool.name).to_string_lossy());
            format!("path_config_source: {{path: {file}}}")
        }
    };
    let service = quoted(&cluster(&pool.name));
    let one = |(suffix, protocol, _): (&str, &str, &str)| {
        let name = quoted(&format!("{}{suffix}", cluster(&pool.name)));
        format!(
            r#"  - name: {name}
    type: EDS
    connect_timeout: 2s
    eds_cluster_config:
      service_name: {service}
      eds_config: {{{eds}, resource_api_version: V3}}
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{{protocol}: {{}}}}
    circuit_breakers:
      thresholds:
      - max_connections: {CLUSTER_LIMIT}
        max_pending_requests: {CLUSTER_LIMIT}
        max_requests: {CLUSTER_LIMIT}
        max_retries: {CLUSTER_LIMIT}
    load_balancing_policy:
      policies:
      - typed_extension_config:
          name: envoy.load_balancing_policies.override_host
          typed_config:
            "@type": type.googleapis.com/envoy.extensions.load_balancing_policies.override_host.v3.OverrideHost
            override_host_sources: [{{header: {DESTINATION}}}]
            fallback_policy:
              policies:
              - typed_extension_config:
                  name: envoy.load_balancing_policies.least_request
                  typed_config: {{"@type": type.googleapis.com/envoy.extensions.load_balancing_policies.least_request.v3.LeastRequest}}
"#
        )
    };
    KINDS.map(one).concat()
}
