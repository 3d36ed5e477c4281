"""The configuration files of the demo: the router's, and a plain Envoy's to compare with."""

import json
import os

from fleet import ROOT, RUN

ENGINES = 4
ENGINE_BLOCKS = 3072
MODEL = "sim"
BLOCK_SIZE = 16
JSON_SUBJECT = "kv-events.{worker_id}"
ROUTER_CONFIG = os.path.join(RUN, "kv-router.yaml")
ROUTED_BOOTSTRAP = os.path.join(RUN, "envoy.yaml")
PLAIN_BOOTSTRAP = os.path.join(RUN, "envoy-least-request.json")
FILTER_WASM = os.path.join(ROOT, "target", "wasm32-unknown-unknown", "wasm", "kv_filter.wasm")

# What is listened on, with the port that is taken unless somebody has it.
PORTS = {
    "http": 8000,
    "admin": 9100,
    "envoy_admin": 9901,
    "nats": 4222,
    "least_request_http": 8100,
    "least_request_admin": 9902,
    **{f"engine_{worker}": 8000 + worker for worker in range(1, ENGINES + 1)},
}


def write_router_config(fleet, router_mode):
    """kv-router's one YAML file, replaced in one step: the sidecar watches it."""
    ports = fleet.ports
    workers = "".join(
        f"  - {{id: {worker}, endpoint: 127.0.0.1:{ports[f'engine_{worker}']}}}\n" for worker in range(1, ENGINES + 1)
    )
    text = f"""\
http_host: 127.0.0.1
http_port: {ports["http"]}
admin: 127.0.0.1:{ports["admin"]}
envoy_admin: 127.0.0.1:{ports["envoy_admin"]}
socket: {fleet.sockets}/bridge.sock
state_dir: {quoted(os.path.join(RUN, "sidecar"))}
filter_wasm: {quoted(FILTER_WASM)}
nats:
  url: nats://127.0.0.1:{ports["nats"]}
  json_subject: {JSON_SUBJECT}
router_mode: {router_mode}
kv_cache_block_size: {BLOCK_SIZE}
decision_header: true
models: [{MODEL}]
workers:
{workers}"""
    write(ROUTER_CONFIG, text)


def write_plain_bootstrap(fleet):
    """Envoy's own least_request over the same engines, without the filter, with the same limits."""
    ports = fleet.ports
    engines = [{"endpoint": {"address": address(ports[f"engine_{worker}"])}} for worker in range(1, ENGINES + 1)]
    limits = {f"max_{what}": 100000 for what in ("connections", "pending_requests", "requests", "retries")}
    connection_manager = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "least_request",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "engines",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "engines", "timeout": "0s"}}],
                }
            ]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"},
            }
        ],
    }
    bootstrap = {
        "admin": {"address": address(ports["least_request_admin"])},
        "static_resources": {
            "listeners": [
                {
                    "name": "http",
                    "address": address(ports["least_request_http"]),
                    "per_connection_buffer_limit_bytes": 64 << 20,
                    "filter_chains": [
                        {
                            "filters": [
                                {
                                    "name": "envoy.filters.network.http_connection_manager",
                                    "typed_config": connection_manager,
                                }
                            ]
                        }
                    ],
                }
            ],
            "clusters": [
                {
                    "name": "engines",
                    "type": "STATIC",
                    "connect_timeout": "1s",
                    "lb_policy": "LEAST_REQUEST",
                    "circuit_breakers": {"thresholds": [limits]},
                    "load_assignment": {"cluster_name": "engines", "endpoints": [{"lb_endpoints": engines}]},
                }
            ],
        },
    }
    write(PLAIN_BOOTSTRAP, json.dumps(bootstrap, indent=2) + "\n")


def address(port):
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def quoted(path):
    """A path as a YAML scalar: JSON's strings are YAML's."""
    return json.dumps(path)


def write(path, text):
    part = path + ".part"
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(part, path)
