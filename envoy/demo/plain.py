"""An Envoy without the filter, to compare with."""

V3 = "type.googleapis.com/envoy.extensions.filters"


def bootstrap(port, engines, policy):
    """Its bootstrap: it listens on `port` and spreads requests over the ports `engines` by its own
    policy, with the limits that kv-router's bootstrap has.
    """
    route = {"match": {"prefix": "/"}, "route": {"cluster": "engines", "timeout": "0s"}}
    manager = {
        "@type": f"{V3}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": policy.lower(),
        "route_config": {"virtual_hosts": [{"name": "engines", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            {"name": "envoy.filters.http.router", "typed_config": {"@type": f"{V3}.http.router.v3.Router"}}
        ],
    }
    connection_manager = {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
    listener = {
        "name": "http",
        "address": address(port),
        "per_connection_buffer_limit_bytes": 64 << 20,
        "filter_chains": [{"filters": [connection_manager]}],
    }
    limits = {f"max_{what}": 100_000 for what in ("connections", "pending_requests", "requests", "retries")}
    endpoints = [{"endpoint": {"address": address(engine)}} for engine in engines]
    cluster = {
        "name": "engines",
        "type": "STATIC",
        "connect_timeout": "1s",
        "lb_policy": policy,
        "circuit_breakers": {"thresholds": [limits]},
        "load_assignment": {"cluster_name": "engines", "endpoints": [{"lb_endpoints": endpoints}]},
    }
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}


def address(port):
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}
