"""The configuration files of the demo: the router's, and a plain Envoy's to compare with."""

import json
import os

import plain
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
    engines = [ports[f"engine_{worker}"] for worker in range(1, ENGINES + 1)]
    bootstrap = {
        "admin": {"address": plain.address(ports["least_request_admin"])},
        **plain.bootstrap(ports["least_request_http"], engines, "LEAST_REQUEST"),
    }
    write(PLAIN_BOOTSTRAP, json.dumps(bootstrap, indent=2) + "\n")


def quoted(path):
    """A path as a YAML scalar: JSON's strings are YAML's."""
    return json.dumps(path)


def write(path, text):
    part = path + ".part"
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(part, path)
